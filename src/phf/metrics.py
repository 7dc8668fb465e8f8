"""Statistics of texts and scores: estimates with intervals, diversity. Floor 1, numpy only.

Every function says which direction is better, where one is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from phf.types import Estimate

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


def share_estimate(hits_N: Sequence[bool] | np.ndarray, unjudged: int = 0) -> Estimate:
    """A share of independent units with Wilson's interval."""
    hits = np.asarray(hits_N, dtype=bool)
    n = len(hits)
    nan = float("nan")
    if n == 0:
        return Estimate(nan, nan, 0, (nan, nan), unjudged)
    share = float(hits.mean())
    return Estimate(share, math.sqrt(share * (1 - share) / n), n, wilson(int(hits.sum()), n), unjudged)


def t_interval(values: Sequence[float]) -> Estimate:
    """Mean over few independent runs (seeds) with Student's 95% interval."""
    values_N = np.asarray(values, dtype=np.float64)
    n = len(values_N)
    nan = float("nan")
    mean = float(values_N.mean()) if n else nan
    if n < 2:
        return Estimate(mean, nan, n, (nan, nan))
    stderr = float(values_N.std(ddof=1) / math.sqrt(n))
    half = _t975(n - 1) * stderr
    return Estimate(mean, stderr, n, (mean - half, mean + half))


def _t975(df: int) -> float:
    """97.5% quantile of Student's t: exact to 3 decimals up to 10 degrees of freedom, then Cornish-Fisher."""
    table = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]
    if df <= len(table):
        return table[df - 1]
    z = Z95
    return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)


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
