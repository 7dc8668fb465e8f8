"""Statistics of scores and texts: means with intervals, and how diverse texts are.

The docstring of a metric says whether higher or lower is better. Every random draw is fixed by a seed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import gammaln, stdtrit

from phf.core.types import Estimate, Number

Z95 = 1.959963984540054
"""97.5% quantile of the standard normal distribution."""


def wilson(hits: float, n: float) -> tuple[float, float]:
    """Wilson's 95% interval for a share, valid also at 0 and n hits (Wilson, JASA 22, 1927). `n` may be a number of
    units that weigh equally, which is not whole."""
    if n == 0:
        return (0.0, 1.0)
    share = hits / n
    z2 = Z95 * Z95
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return (0.0 if hits == 0 else centre - half, 1.0 if hits == n else centre + half)


def bootstrap_mean(values: np.ndarray, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95% percentile interval of the mean over bootstrap resamples of `values` [N] (Efron 1979)."""
    rng = np.random.Generator(np.random.Philox(seed))
    n = len(values)
    means = np.empty(resamples)
    block = max(1, 2**22 // n)
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        means[start : start + count] = values[rng.integers(0, n, (count, n))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return (float(low), float(high))


def mean_estimate(values: Sequence[float] | np.ndarray, seed: int = 0) -> Estimate:
    """Mean of independent `values` [N] with standard error and bootstrap interval. NaN values are left out and counted.

    Without a value everything is NaN; with a single one the standard error and the interval are.
    """
    all_N = np.asarray(values, dtype=np.float64)
    judged_N = all_N[~np.isnan(all_N)]
    n = len(judged_N)
    unjudged = int(len(all_N) - len(judged_N))
    if n == 0:
        return Estimate.missing(unjudged=unjudged)
    mean = float(judged_N.mean())
    if n == 1:
        return Estimate.missing(mean, 1, unjudged)
    stderr = float(judged_N.std(ddof=1) / math.sqrt(n))
    return Estimate(mean, stderr, n, bootstrap_mean(judged_N, seed), unjudged)


def ratio_of_sums(numerator_N: np.ndarray, denominator_N: np.ndarray, seed: int = 0) -> Estimate:
    """Ratio of two sums with its standard error (delta method) and a bootstrap interval over units.

    NaN if the denominators sum to 0. With a single unit the standard error and the interval are NaN.
    """
    n = len(numerator_N)
    whole = float(denominator_N.sum())
    if whole == 0:
        return Estimate.missing(n=n)
    ratio = float(numerator_N.sum() / whole)
    if n < 2:
        return Estimate.missing(ratio, n)
    residual = numerator_N - ratio * denominator_N
    stderr = float(residual.std(ddof=1) * np.sqrt(n) / whole)
    rng = np.random.Generator(np.random.Philox(seed))
    ratios = []
    for _ in range(2000):
        pick = rng.integers(0, n, n)
        if (below := denominator_N[pick].sum()) > 0:
            ratios.append(numerator_N[pick].sum() / below)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Estimate(ratio, stderr, n, (float(low), float(high)))


def share_estimate(hits_N: Sequence[bool] | np.ndarray, unjudged: int = 0) -> Estimate:
    """Share of independent units that hit, with Wilson's interval."""
    hits = np.asarray(hits_N, dtype=bool)
    n = len(hits)
    if n == 0:
        return Estimate.missing(unjudged=unjudged)
    share = float(hits.mean())
    return Estimate(share, math.sqrt(share * (1 - share) / n), n, wilson(int(hits.sum()), n), unjudged)


def weighted_share(hits_N: np.ndarray, weight_N: np.ndarray | None) -> tuple[Estimate, float]:
    """Share of the weight of units that hit, and how many units of equal weight they are worth ((sum w)^2 / sum w^2,
    Kish 1965; NaN without weights). The interval is Wilson's for that number."""
    if weight_N is None or not len(hits_N):
        return share_estimate(hits_N), math.nan
    share = float((weight_N * hits_N).sum() / weight_N.sum())
    effective = float(weight_N.sum() ** 2 / (weight_N**2).sum())
    stderr = math.sqrt(share * (1 - share) / effective)
    return Estimate(share, stderr, len(hits_N), wilson(share * effective, effective)), effective


def bounded_estimate(values: Sequence[float] | np.ndarray, seed: int = 0) -> Estimate:
    """`mean_estimate` of independent values in [0, 1], with `bounded`'s interval at 0 and 1."""
    found = mean_estimate(values, seed)
    return bounded(found, found.n)


def bounded(share: Estimate, n: int) -> Estimate:
    """`share` with Wilson's interval for `n` units where it is 0 or 1: resampling equal values has no spread."""
    return replace(share, ci95=wilson(int(share.mean * n), n)) if n and share.mean in (0, 1) else share


def bootstrap(
    statistic: Callable[[np.ndarray], float], units: Sequence[np.ndarray], seed: int = 0, resamples: int = 500
) -> tuple[float, float]:
    """95% percentile interval of a statistic over bootstrap resamples of `units` (Efron 1979). NaN with fewer than
    two.

    A unit is an array of values that are not independent of each other. `statistic` sees the values of all units
    joined.
    """
    n = len(units)
    if n < 2:
        return (math.nan, math.nan)
    rng = np.random.Generator(np.random.Philox(seed))
    sizes = np.array([len(unit) for unit in units])
    if (sizes == sizes[0]).all():
        alike = np.concatenate(list(units)).reshape(n, -1)
        found = [statistic(alike[rng.integers(0, n, n)].ravel()) for _ in range(resamples)]
    else:
        found = [statistic(np.concatenate([units[i] for i in rng.integers(0, n, n)])) for _ in range(resamples)]
    low, high = np.nanquantile(found, [0.025, 0.975])
    return (float(low), float(high))


def t_interval(values: Sequence[float]) -> Estimate:
    """Mean over a few independent runs (seeds) with Student's 95% interval. NaN for values that are all equal: they say
    nothing about their spread."""
    values_N = np.asarray(values, dtype=np.float64)
    n = len(values_N)
    if n < 2:
        return Estimate.missing(float(values_N.mean()) if n else math.nan, n)
    mean = float(values_N.mean())
    stderr = float(values_N.std(ddof=1) / math.sqrt(n))
    if (values_N == values_N[0]).all():
        return Estimate(float(values_N[0]), 0.0, n, (math.nan, math.nan))
    half = float(stdtrit(n - 1, 0.975)) * stderr
    return Estimate(mean, stderr, n, (mean - half, mean + half))


def around(intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The interval that holds all of these; NaN if it has no width."""
    low, high = min(low for low, _ in intervals), max(high for _, high in intervals)
    return (low, high) if low < high else (math.nan, math.nan)


def over_seeds(found: Sequence[Estimate]) -> Estimate:
    """One estimate as it is; of several runs Student's over their means, or of equal means an interval that holds those
    of all runs. A score that is never negative in the runs has no interval below 0."""
    over = found[0] if len(found) == 1 else t_interval([estimate.mean for estimate in found])
    if len(found) > 1 and math.isnan(over.ci95[0]):
        over = replace(over, ci95=around([estimate.ci95 for estimate in found]))
    if min(estimate.mean for estimate in found) >= 0:
        return replace(over, ci95=(max(over.ci95[0], 0.0), over.ci95[1]))
    return over


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Geometric mean of the ratios of paired runs, with Student's 95% interval over the logarithms of the ratios.

    Where a numerator is 0, which has no logarithm: the ratio of the sums with Student's interval by the ratio
    estimator's standard error (Cochran, Sampling Techniques, 1977, section 2.11), not below 0. NaN if a number is below
    0 or a denominator is 0; without an interval if all numerators are 0.
    """
    pairs = list(zip(numerators, denominators, strict=True))
    if not pairs or any(a < 0 or b <= 0 for a, b in pairs):
        return Estimate.missing(n=len(pairs))
    if any(a == 0 for a, _ in pairs):
        return _ratio_estimate(np.array(pairs))
    logs = t_interval([math.log(a / b) for a, b in pairs])
    mean = math.exp(logs.mean)
    return Estimate(mean, mean * logs.stderr, logs.n, (math.exp(logs.ci95[0]), math.exp(logs.ci95[1])))


def _ratio_estimate(pairs_N2: np.ndarray) -> Estimate:
    """`ratio_interval` of pairs with some numerator 0."""
    n = len(pairs_N2)
    above, below = pairs_N2.sum(0)
    ratio = float(above / below)
    if n < 2 or above == 0:
        return Estimate.missing(ratio, n)
    residual_N = pairs_N2[:, 0] - ratio * pairs_N2[:, 1]
    stderr = float(residual_N.std(ddof=1) * math.sqrt(n) / below)
    half = float(stdtrit(n - 1, 0.975)) * stderr
    return Estimate(ratio, stderr, n, (max(ratio - half, 0.0), ratio + half))


@dataclass(frozen=True)
class AUC:
    """Area under the ROC curve (1 best, 0.5 chance) and its 95% interval. NaN if all units are of one class."""

    auc: Number
    """Area under the ROC curve: 0.5 is chance, 1 perfect."""
    ci95: tuple[Number, Number]
    """95% interval."""


def auc(
    value_N: np.ndarray,
    bad_N: np.ndarray,
    group_N: np.ndarray | None = None,
    resamples: int = 200,
    weight_N: np.ndarray | None = None,
) -> AUC:
    """How well larger values point to bad units (`bad_N` bool). The interval is a bootstrap over units, or over whole
    groups where `group_N` numbers them. `weight_N`: weights of the units."""
    from sklearn.metrics import roc_auc_score

    if not bad_N.any() or bad_N.all():
        return AUC(math.nan, (math.nan, math.nan))
    places = None
    if group_N is not None:
        _, index = np.unique(group_N, return_inverse=True)
        places = np.split(np.argsort(index, kind="stable"), np.cumsum(np.bincount(index))[:-1])
    n = len(value_N) if places is None else len(places)
    rng = np.random.Generator(np.random.Philox(0))
    found = []
    for _ in range(resamples):
        drawn = rng.integers(0, n, n)
        pick = drawn if places is None else np.concatenate([places[g] for g in drawn])
        if 0 < bad_N[pick].sum() < len(pick):
            found.append(roc_auc_score(bad_N[pick], value_N[pick], sample_weight=_of(weight_N, pick)))
    low, high = np.quantile(found, [0.025, 0.975]) if n > 1 and found else (math.nan, math.nan)
    area = float(roc_auc_score(bad_N, value_N, sample_weight=weight_N))
    return AUC(area, (float(low), float(high)))


def _of(weight_N: np.ndarray | None, pick: np.ndarray) -> np.ndarray | None:
    return None if weight_N is None else weight_N[pick]


def auc_gain(
    new_N: np.ndarray,
    old_N: np.ndarray,
    bad_N: np.ndarray,
    resamples: int = 500,
    weight_N: np.ndarray | None = None,
) -> Estimate:
    """Area under the ROC curve of the values `new_N` less that of `old_N`, with a bootstrap over units, which are the
    same for both."""
    from sklearn.metrics import roc_auc_score

    if not bad_N.any() or bad_N.all():
        return Estimate.missing(math.nan)

    def gain(pick: np.ndarray) -> float:
        weights = _of(weight_N, pick)
        new, old = (roc_auc_score(bad_N[pick], v[pick], sample_weight=weights) for v in (new_N, old_N))
        return float(new - old)

    n = len(bad_N)
    rng = np.random.Generator(np.random.Philox(0))
    drawn = [rng.integers(0, n, n) for _ in range(resamples)]
    found = [gain(pick) for pick in drawn if 0 < bad_N[pick].sum() < n]
    low, high = np.quantile(found, [0.025, 0.975]) if found else (math.nan, math.nan)
    return Estimate(gain(np.arange(n)), float(np.std(found)) if found else math.nan, n, (float(low), float(high)))


def expected_max(scores: Sequence[float] | np.ndarray, k: int) -> float:
    """Expected largest of `k` samples, estimated without bias from n >= k of them.

    It is the mean of the maximum over all subsets of size k: sum_i C(i-1, k-1) / C(n, k) x_(i) over the sorted scores.
    NaN scores are left out. NaN if fewer than k are left.
    """
    x = np.sort(np.asarray(scores, dtype=np.float64))
    x = x[~np.isnan(x)]
    n = len(x)
    if k < 1 or n < k:
        return math.nan
    rank = np.arange(k, n + 1)  # the k - 1 smallest are never the largest of k
    log_weight = (
        gammaln(rank) - gammaln(k) - gammaln(rank - k + 1) - (gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1))
    )
    return float((np.exp(log_weight) * x[k - 1 :]).sum())


def krippendorff_alpha(units: Sequence[Sequence[object]]) -> float:
    """Agreement of the labels that each unit got, for labels without an order (Krippendorff, Computing Krippendorff's
    Alpha-Reliability, 2011). 1 is agreement, 0 is chance. Units with fewer than two labels do not count. NaN without a
    unit that counts, and where all labels are equal."""
    units = [labels for labels in units if len(labels) > 1]
    total = Counter(label for labels in units for label in labels)
    n = total.total()
    observed = sum(
        sum(count * (len(labels) - count) for count in Counter(labels).values()) / (len(labels) - 1) for labels in units
    )
    expected = sum(count * (n - count) for count in total.values())
    return 1 - observed * (n - 1) / expected if expected else math.nan


def ordinal_alpha(units: Sequence[Sequence[int]]) -> float:
    """Krippendorff's alpha for labels with an order (same source): labels count as the further apart the more labels
    were given between them. Other rules as `krippendorff_alpha`."""
    units = [labels for labels in units if len(labels) > 1]
    values, place = np.unique([label for labels in units for label in labels], return_inverse=True)
    total_V = np.bincount(place, minlength=len(values)).astype(np.float64)
    below_V = np.cumsum(total_V) - total_V / 2
    apart_VV = (below_V[:, None] - below_V[None, :]) ** 2
    expected = float(total_V @ apart_VV @ total_V)
    observed = 0.0
    end = 0
    for labels in units:
        count_V = np.bincount(place[end : end + len(labels)], minlength=len(values))
        end += len(labels)
        observed += float(count_V @ apart_VV @ count_V) / (len(labels) - 1)
    return 1 - observed * (total_V.sum() - 1) / expected if expected else math.nan


def paired_difference(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, seed: int = 0) -> Estimate:
    """Mean of a - b over paired units (prompts or seeds) with a bootstrap interval over the units. Below 0, `a` is
    lower. Pairs with a NaN are left out and counted."""
    return mean_estimate(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), seed)


def self_bleu(texts: Sequence[str], n: int = 5, references: int = 200, unit: str = "words") -> float:
    """Self-BLEU-n (Zhu et al. 2018, arXiv 1802.01886): the mean of `self_bleu_scores`. Higher is less diverse. NaN with
    fewer than two texts."""
    scores = self_bleu_scores(texts, n, references, unit)
    return math.fsum(scores) / len(scores) if scores else math.nan


def self_bleu_scores(texts: Sequence[str], n: int = 5, references: int = 200, unit: str = "words") -> list[float]:
    """BLEU of each text against the first `references` of the other texts, with equal weights and epsilon smoothing
    (nltk's method1). Empty with fewer than two texts. `unit`: "words", or "characters" as the reference implementation
    counts.

    Equal to nltk's `sentence_bleu` of each text, by exact counting. An n-gram is clipped at its largest count in a
    reference: the largest count over all texts or, for the text that holds the largest, the second largest.
    """
    units = [text.split() if unit == "words" else list(text) for text in texts]
    if len(units) < 2:
        return []
    outside = units[:references]  # the references of every later text
    inside = units[: references + 1]  # the references of these texts, without the text itself
    clips = [(_clips(outside, order), _clips(inside, order)) for order in range(1, n + 1)]
    lengths_out = [len(t) for t in outside]
    lengths_in = [len(t) for t in inside]
    scores = []
    for number, words in enumerate(units):
        held = number < len(outside)
        lengths = [*lengths_in[:number], *lengths_in[number + 1 :]] if held else lengths_out
        matches = []
        totals = []
        for order, (of_outside, of_inside) in enumerate(clips, 1):
            counts = Counter(_grams(words, order))
            table = of_inside if held else of_outside
            match = 0
            for gram, count in counts.items():
                best, owner, second = table.get(gram, (0, -1, 0))
                match += min(count, second if owner == number else best)
            matches.append(match)
            totals.append(max(1, counts.total()))
        scores.append(_bleu(matches, totals, len(words), lengths))
    return scores


def _grams(words: Sequence[str], order: int) -> zip[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(order)), strict=False)


def _clips(texts: Sequence[Sequence[str]], order: int) -> dict[tuple[str, ...], tuple[int, int, int]]:
    """For each n-gram: its largest count in one text, the number of that text, and the second largest count."""
    found: dict[tuple[str, ...], tuple[int, int, int]] = {}
    for number, words in enumerate(texts):
        for gram, count in Counter(_grams(words, order)).items():
            best, owner, second = found.get(gram, (0, -1, 0))
            found[gram] = (count, number, best) if count > best else (best, owner, max(second, count))
    return found


def _bleu(matches: Sequence[int], totals: Sequence[int], length: int, reference_lengths: Sequence[int]) -> float:
    if matches[0] == 0:
        return 0.0
    closest = min(reference_lengths, key=lambda r: (abs(r - length), r))
    penalty = 1.0 if length > closest else math.exp(1 - closest / length)
    logs = (math.log((m or 0.1) / t) / len(matches) for m, t in zip(matches, totals, strict=True))
    return penalty * math.exp(math.fsum(logs))


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's word n-grams that occurred earlier in the text. Lower is better. NaN for a text without
    n-grams."""
    words = text.split()
    grams = list(_grams(words, n))
    return 1 - len(set(grams)) / len(grams) if grams else math.nan


def compile_rate(texts: Sequence[str]) -> float:
    """Share of texts that are Python without a syntax error. Nothing is run. Higher is better; NaN without texts."""
    return sum(map(_compiles, texts)) / len(texts) if texts else math.nan


def _compiles(text: str) -> bool:
    import ast
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of distinct word n-grams among those of all `texts` together (Li et al. 2016). Higher is more diverse. NaN
    without n-grams. It falls as the amount of text grows, so compare only equal amounts.
    """
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        words = text.split()
        grams = list(zip(*(words[i:] for i in range(n)), strict=False))
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else math.nan


def ngram_entropy(texts: Sequence[str], n: int) -> float:
    """Entropy in nats of the distribution of word n-grams of all `texts` together. Higher is more diverse. NaN without
    n-grams."""
    counts: dict[tuple[str, ...], int] = {}
    for text in texts:
        words = text.split()
        for gram in zip(*(words[i:] for i in range(n)), strict=False):
            counts[gram] = counts.get(gram, 0) + 1
    if not counts:
        return math.nan
    p = np.fromiter(counts.values(), dtype=np.float64)
    p /= p.sum()
    return float(-(p * np.log(p)).sum())


def ngram_diversity(units: Sequence[Sequence[str]], n: int, groups: int = 20) -> tuple[Estimate, Estimate]:
    """`distinct_n` and `ngram_entropy` of all texts with standard errors and 95% intervals.

    A unit holds texts that are not independent of each other, such as the samples of one prompt. The intervals come
    from the jackknife over at most `groups` groups of units (Tukey 1958; groups of unequal size: Busing, Meijer and
    van der Leeden 1999). A bootstrap would take texts twice, which looks less diverse than the texts are.
    """
    parts = [Counter[tuple[str, ...]]() for _ in range(min(groups, len(units)))]
    sizes = [0] * len(parts)
    whole = Counter[tuple[str, ...]]()
    for number, texts in enumerate(units):
        sizes[number % len(parts)] += 1
        for text in texts:
            parts[number % len(parts)].update(_grams(text.split(), n))
    for part in parts:
        whole.update(part)
    total = whole.total()
    weighted = math.fsum(c * math.log(c) for c in whole.values())
    if not total:
        return Estimate.missing(), Estimate.missing()
    distinct: list[float] = []
    entropy: list[float] = []
    kept_sizes: list[int] = []
    for part, size in zip(parts, sizes, strict=True):  # the statistics without this part
        left = total - part.total()
        if not left:
            continue
        kept = {gram: whole[gram] - count for gram, count in part.items()}
        gone = sum(not count for count in kept.values())
        change = math.fsum(whole[g] * math.log(whole[g]) - (c * math.log(c) if c else 0.0) for g, c in kept.items())
        distinct.append((len(whole) - gone) / left)
        entropy.append(math.log(left) - (weighted - change) / left)
        kept_sizes.append(size)
    of_distinct = _jackknife(len(whole) / total, distinct, kept_sizes)
    of_entropy = _jackknife(max(math.log(total) - weighted / total, 0.0), entropy, kept_sizes)
    low, high = of_distinct.ci95
    return replace(of_distinct, ci95=(low, min(high, 1.0))), of_entropy


def _jackknife(mean: float, left_out: Sequence[float], sizes: Sequence[int]) -> Estimate:
    """The grouped jackknife. `left_out`: the statistic without each group; `sizes`: units in each group."""
    n = sum(sizes)
    count = len(left_out)
    if count < 2:
        return Estimate.missing(mean, n)
    h_G = n / np.array(sizes, float)
    without_G = np.array(left_out)
    pseudo_G = h_G * mean - (h_G - 1) * without_G
    centre = count * mean - float(((1 - 1 / h_G) * without_G).sum())
    stderr = math.sqrt(float(((pseudo_G - centre) ** 2 / (h_G - 1)).mean()))
    half = float(stdtrit(count - 1, 0.975)) * stderr
    return Estimate(mean, stderr, n, (max(mean - half, 0.0), mean + half))
