"""Statistics of texts and scores: estimates with intervals, diversity. Floor 1.

Every function says which direction is better, where one is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.special import gammaln, stdtrit

from phf.core.types import Estimate

Z95 = 1.959963984540054
"""97.5% quantile of the standard normal distribution."""


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval for a share: sound also where none or all hit (Wilson, JASA 22, 1927)."""
    if n == 0:
        return (0.0, 1.0)
    share, z2 = hits / n, Z95 * Z95
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return (0.0 if hits == 0 else centre - half, 1.0 if hits == n else centre + half)


def bootstrap_mean(values: np.ndarray, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95% percentile interval of the mean over resamples of `values` [N] (Efron 1979). Deterministic in `seed`."""
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
    """Mean of independent `values` [N] with standard error and bootstrap interval. NaN are left out and counted.

    With no judged value everything is NaN; with one, the error and the interval are.
    """
    all_N = np.asarray(values, dtype=np.float64)
    judged_N = all_N[~np.isnan(all_N)]
    n, unjudged = len(judged_N), int(len(all_N) - len(judged_N))
    nan = float("nan")
    if n == 0:
        return Estimate(nan, nan, 0, (nan, nan), unjudged)
    mean = float(judged_N.mean())
    if n == 1:
        return Estimate(mean, nan, 1, (nan, nan), unjudged)
    stderr = float(judged_N.std(ddof=1) / math.sqrt(n))
    return Estimate(mean, stderr, n, bootstrap_mean(judged_N, seed), unjudged)


def ratio_of_sums(numerator_N: np.ndarray, denominator_N: np.ndarray, seed: int = 0) -> Estimate:
    """Sum over sum with its standard error (delta method) and a bootstrap interval over units. NaN where there is
    nothing to divide by; with one unit the error and the interval are."""
    n, whole = len(numerator_N), float(denominator_N.sum())
    nan = float("nan")
    if whole == 0:
        return Estimate(nan, nan, n, (nan, nan))
    ratio = float(numerator_N.sum() / whole)
    if n < 2:
        return Estimate(ratio, nan, n, (nan, nan))
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
    """A share of independent units with Wilson's interval."""
    hits = np.asarray(hits_N, dtype=bool)
    n = len(hits)
    nan = float("nan")
    if n == 0:
        return Estimate(nan, nan, 0, (nan, nan), unjudged)
    share = float(hits.mean())
    return Estimate(share, math.sqrt(share * (1 - share) / n), n, wilson(int(hits.sum()), n), unjudged)


def bounded_estimate(values: Sequence[float] | np.ndarray, seed: int = 0) -> Estimate:
    """`mean_estimate` of independent values in [0, 1], `bounded`."""
    found = mean_estimate(values, seed)
    return bounded(found, found.n)


def bounded(share: Estimate, n: int) -> Estimate:
    """A share with Wilson's interval of `n` units where it is 0 or 1, so that resampling finds nothing else."""
    return replace(share, ci95=wilson(int(share.mean * n), n)) if n and share.mean in (0, 1) else share


def bootstrap(
    statistic: Callable[[np.ndarray], float], units: Sequence[np.ndarray], seed: int = 0, resamples: int = 500
) -> tuple[float, float]:
    """95% percentile interval of a statistic of all values together over resamples of `units`, arrays of values that are
    not independent of each other (Efron 1979). NaN with fewer than two units."""
    n = len(units)
    if n < 2:
        return (float("nan"), float("nan"))
    rng = np.random.Generator(np.random.Philox(seed))
    sizes, values = np.array([len(unit) for unit in units]), np.concatenate(list(units))
    if (sizes == sizes[0]).all():
        alike = values.reshape(n, -1)
        found = [statistic(alike[rng.integers(0, n, n)].ravel()) for _ in range(resamples)]
    else:
        found = [statistic(np.concatenate([units[i] for i in rng.integers(0, n, n)])) for _ in range(resamples)]
    low, high = np.nanquantile(found, [0.025, 0.975])
    return (float(low), float(high))


def t_interval(values: Sequence[float]) -> Estimate:
    """Mean over few independent runs (seeds) with Student's 95% interval."""
    values_N = np.asarray(values, dtype=np.float64)
    n = len(values_N)
    nan = float("nan")
    mean = float(values_N.mean()) if n else nan
    if n < 2:
        return Estimate(mean, nan, n, (nan, nan))
    stderr = float(values_N.std(ddof=1) / math.sqrt(n))
    half = float(stdtrit(n - 1, 0.975)) * stderr
    return Estimate(mean, stderr, n, (mean - half, mean + half))


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Ratio of means over paired runs with a 95% interval on the log scale (Student over the runs' log ratios).

    The mean is the geometric mean of the runs' ratios. A zero numerator or denominator has no logarithm: NaN.
    """
    pairs = [(a, b) for a, b in zip(numerators, denominators, strict=True)]
    nan = float("nan")
    if not pairs or any(a <= 0 or b <= 0 for a, b in pairs):
        return Estimate(nan, nan, len(pairs), (nan, nan))
    logs = t_interval([math.log(a / b) for a, b in pairs])
    mean = math.exp(logs.mean)
    return Estimate(mean, mean * logs.stderr, logs.n, (math.exp(logs.ci95[0]), math.exp(logs.ci95[1])))


def auc(
    value_N: np.ndarray, bad_N: np.ndarray, group_N: np.ndarray | None = None, resamples: int = 200
) -> dict[str, Any]:
    """How well values tell bad (true) from good: the area under the ROC curve, 1 best, 0.5 chance, and its 95% percentile
    interval over resamples, of whole groups where they are given. None where all are bad or none is."""
    from sklearn.metrics import roc_auc_score

    if not bad_N.any() or bad_N.all():
        return {"auc": None, "ci95": [None, None]}
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
            found.append(roc_auc_score(bad_N[pick], value_N[pick]))
    ci = [float(x) for x in np.quantile(found, [0.025, 0.975])] if n > 1 and found else [None, None]
    return {"auc": float(roc_auc_score(bad_N, value_N)), "ci95": ci}


def expected_max(scores: Sequence[float] | np.ndarray, k: int) -> float:
    """Expected largest of `k` samples, from `n` >= k of them: the unbiased estimate, the mean of the maximum over all
    subsets of size k, sum_i C(i-1, k-1) / C(n, k) x_(i) over the sorted scores. NaN are left out; NaN if too few are left.
    """
    x = np.sort(np.asarray(scores, dtype=np.float64))
    x = x[~np.isnan(x)]
    n = len(x)
    if k < 1 or n < k:
        return float("nan")
    rank = np.arange(k, n + 1)  # a smaller one is never the largest of k
    log_weight = (
        gammaln(rank) - gammaln(k) - gammaln(rank - k + 1) - (gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1))
    )
    return float((np.exp(log_weight) * x[k - 1 :]).sum())


def paired_difference(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, seed: int = 0) -> Estimate:
    """Mean of a - b over units that both have (prompts, or seeds), with a bootstrap interval over the units. Below 0: `a`
    is lower. Pairs in which one is NaN are left out and counted."""
    return mean_estimate(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), seed)


def self_bleu(texts: Sequence[str], n: int = 5, references: int = 200, unit: str = "words") -> float:
    """Self-BLEU-n (Zhu et al. 2018, arXiv 1802.01886): mean of `self_bleu_scores`. Higher is less diverse. NaN with fewer
    than two texts."""
    scores = self_bleu_scores(texts, n, references, unit)
    return math.fsum(scores) / len(scores) if scores else float("nan")


def self_bleu_scores(texts: Sequence[str], n: int = 5, references: int = 200, unit: str = "words") -> list[float]:
    """BLEU of each text against the first `references` of the others, with equal weights and epsilon smoothing (nltk's
    method1); empty with fewer than two texts.

    Equal to calling nltk's `sentence_bleu` for each text, by exact counting: the clip of an n-gram is the largest count
    in a reference, which is the largest over all of them or, for the text that holds it, the second largest. `unit`:
    "words", or "characters" (what the reference implementation computes).
    """
    tokens = [text.split() if unit == "words" else list(text) for text in texts]
    if len(tokens) < 2:
        return []
    outside = tokens[:references]  # what texts behind them are compared with
    inside = tokens[: references + 1]  # what these are compared with, but for themselves
    clips = [(_clips(outside, order), _clips(inside, order)) for order in range(1, n + 1)]
    lengths_out, lengths_in = [len(t) for t in outside], [len(t) for t in inside]
    scores = []
    for number, words in enumerate(tokens):
        held = number < len(outside)
        lengths = [*lengths_in[:number], *lengths_in[number + 1 :]] if held else lengths_out
        matches, totals = [], []
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
    """For each n-gram its largest count in a text, which text that is, and the second largest count."""
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
    """Share of a text's word n-grams that occurred in it before; 0 without repetition. NaN for a text without n-grams."""
    words = text.split()
    grams = list(_grams(words, n))
    return 1 - len(set(grams)) / len(grams) if grams else float("nan")


def compile_rate(texts: Sequence[str]) -> float:
    """Share of texts that are Python without a syntax error (nothing is run). Higher is better; NaN without texts."""
    return sum(map(_compiles, texts)) / len(texts) if texts else float("nan")


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
    """Share of distinct word n-grams among all of `texts` (Li et al. 2016). Higher is more diverse; NaN without n-grams.

    It falls as the amount of text grows, so only equal amounts compare.
    """
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        words = text.split()
        grams = list(zip(*(words[i:] for i in range(n)), strict=False))
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else float("nan")


def ngram_entropy(texts: Sequence[str], n: int) -> float:
    """Entropy in nats of the empirical distribution of word n-grams of `texts`. Higher is more diverse."""
    counts: dict[tuple[str, ...], int] = {}
    for text in texts:
        words = text.split()
        for gram in zip(*(words[i:] for i in range(n)), strict=False):
            counts[gram] = counts.get(gram, 0) + 1
    if not counts:
        return float("nan")
    p = np.fromiter(counts.values(), dtype=np.float64)
    p /= p.sum()
    return float(-(p * np.log(p)).sum())


def ngram_diversity(units: Sequence[Sequence[str]], n: int, groups: int = 20) -> tuple[Estimate, Estimate]:
    """`distinct_n` and `ngram_entropy` of all texts with standard errors and 95% intervals, by the jackknife over at most
    `groups` groups of `units` (texts that are not independent of each other, as several of one prompt are). Resampling
    would take texts twice, which looks less diverse than they are.

    Source: Busing, Meijer and van der Leeden 1999 (groups of unequal size), after Tukey 1958.
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
    total, weighted = whole.total(), math.fsum(c * math.log(c) for c in whole.values())
    nan = float("nan")
    if not total:
        return (Estimate(nan, nan, 0, (nan, nan)),) * 2
    distinct, entropy, kept_sizes = [], [], []
    for part, size in zip(parts, sizes, strict=True):  # without it
        left = total - part.total()
        if not left:
            continue
        kept = {gram: whole[gram] - count for gram, count in part.items()}
        gone = sum(not count for count in kept.values())
        change = math.fsum(whole[g] * math.log(whole[g]) - (c * math.log(c) if c else 0.0) for g, c in kept.items())
        distinct.append((len(whole) - gone) / left)
        entropy.append(math.log(left) - (weighted - change) / left)
        kept_sizes.append(size)
    one = _jackknife(len(whole) / total, distinct, kept_sizes)
    two = _jackknife(max(math.log(total) - weighted / total, 0.0), entropy, kept_sizes)
    return replace(one, ci95=(one.ci95[0], min(one.ci95[1], 1.0))), two


def _jackknife(mean: float, left_out: Sequence[float], sizes: Sequence[int]) -> Estimate:
    """`left_out`: the statistic without each group; `sizes`: units in each."""
    n, count = sum(sizes), len(left_out)
    if count < 2:
        return Estimate(mean, float("nan"), n, (float("nan"), float("nan")))
    h_G, without_G = n / np.array(sizes, float), np.array(left_out)
    pseudo_G = h_G * mean - (h_G - 1) * without_G
    centre = count * mean - float(((1 - 1 / h_G) * without_G).sum())
    stderr = math.sqrt(float(((pseudo_G - centre) ** 2 / (h_G - 1)).mean()))
    half = float(stdtrit(count - 1, 0.975)) * stderr
    return Estimate(mean, stderr, n, (max(mean - half, 0.0), mean + half))
