"""What objectives may know about a whole token store: quantiles and means of the scores of its training part.

All of it is computed a block at a time, in memory that does not grow with the store. Quantiles are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from phf.core.types import Block

Unit = Literal["segments", "documents", "tokens"]
"""Whose scores count: those of segments, documents' means over their judged segments, or what a loss reads: scores of
tokens where the store has them, otherwise those of segments."""


@dataclass(frozen=True)
class Statistics:
    """Statistics of the training part of a store, for one preference. Segments that were not judged do not count.

    `blocks`: goes through the store. `bad_above`: scores above it are bad, by the scorer. `others`: the statistics of
    another preference of the store. `of_tokens`: whether tokens have scores of their own, which are float16.
    """

    blocks: Callable[[], Iterator[Block]]
    bad_above: float = 0.0
    others: Callable[[str], Statistics] | None = None
    of_tokens: bool = False

    def of(self, preference: str | None) -> Statistics:
        """The statistics of another preference."""
        if preference is None:
            return self
        if self.others is None:
            raise ValueError(f"statistics without the scores named {preference!r}")
        return self.others(preference)

    def _judged(self, unit: Unit) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Scores (float64) of the judged training text of each block, and for how many tokens each stands."""
        for block in self.blocks():
            if unit == "tokens" and block.token_score_T is not None:
                score = block.token_score_T[block.train_S[block.segment_T] & ~np.isnan(block.token_score_T)]
                yield score.astype(np.float64), np.ones(len(score))
            else:
                use_S = block.train_S & ~np.isnan(block.score_S)
                yield block.score_S[use_S].astype(np.float64), block.tokens_S[use_S].astype(np.float64)

    def _values(self, unit: Unit) -> Iterator[np.ndarray]:
        if unit != "documents":
            for score, _ in self._judged(unit):
                yield score
            return
        for block in self.blocks():
            mean = block.doc_mean_D()[block.train_D]
            yield mean[~np.isnan(mean)]

    def count(self, unit: Unit = "segments") -> int:
        """Number of judged training segments, or of training documents with one."""
        return sum(len(values) for values in self._values(unit))

    def quantiles(self, shares: list[float], unit: Unit = "segments") -> list[float]:
        """The values below which these shares of the scores are; between two of them, their mean by distance
        (numpy's default). NaN without a judged segment."""
        count = self.count(unit)
        if not count:
            return [math.nan] * len(shares)
        places = [share * (count - 1) for share in shares]
        ranks = sorted({int(f) for place in places for f in (math.floor(place), math.ceil(place))})
        found = dict(zip(ranks, self._ranked(ranks, unit), strict=True))
        values = []
        for place in places:
            low = found[math.floor(place)]
            high = found[math.ceil(place)]
            values.append(low + (high - low) * (place - math.floor(place)))
        return values

    def median(self, unit: Unit = "segments") -> float:
        return self.quantiles([0.5], unit)[0]

    def _ranked(self, ranks: list[int], unit: Unit) -> list[float]:
        """The values with these ranks, 0 for the smallest, by 16 of their 64 bits at a time."""
        rest = list(ranks)
        prefixes = [0] * len(ranks)
        for shift in (48, 32, 16, 0):
            histograms = {prefix: np.zeros(1 << 16, np.int64) for prefix in prefixes}
            for values in self._values(unit):
                keys = _sortable(values)
                for prefix, histogram in histograms.items():
                    of = keys if shift == 48 else keys[keys >> np.uint64(shift + 16) == np.uint64(prefix)]
                    digits = (of >> np.uint64(shift)).astype(np.int64) & 0xFFFF
                    histogram += np.bincount(digits, minlength=1 << 16)
            for n, prefix in enumerate(prefixes):
                cumulative = np.cumsum(histograms[prefix])
                digit = int(np.searchsorted(cumulative, rest[n], side="right"))
                rest[n] -= int(cumulative[digit - 1]) if digit else 0
                prefixes[n] = prefix << 16 | digit
        return [_from_sortable(key) for key in prefixes]

    def share_at_most(self, limit: float, unit: Unit = "segments") -> float:
        """The share of values that are at most `limit` in float32, as scores are stored. NaN without any."""
        counts = [(int((v.astype(np.float32) <= np.float32(limit)).sum()), len(v)) for v in self._values(unit)]
        total = sum(n for _, n in counts)
        return sum(k for k, _ in counts) / total if total else math.nan

    def mean(self, function: Callable[[np.ndarray], np.ndarray], unit: Unit = "tokens") -> float:
        """Mean of a function of the score over the judged training tokens. NaN without any."""
        sums = [(float((function(s) * w).sum()), float(w.sum())) for s, w in self._judged(unit)]
        weight = math.fsum(w for _, w in sums)
        return math.fsum(s for s, _ in sums) / weight if weight else math.nan

    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation of the score over the judged training tokens. NaN without any."""
        mean = self.mean(lambda score: score)
        return mean, math.sqrt(self.mean(lambda score: (score - mean) ** 2)) if not math.isnan(mean) else math.nan

    def smallest(self) -> float:
        """The smallest score that a loss reads; NaN without judged text."""
        return min((float(s.min()) for s, _ in self._judged("tokens") if len(s)), default=math.nan)


def _sortable(values: np.ndarray) -> np.ndarray:
    """float64 as unsigned integers of the same order."""
    bits = (values + 0.0).view(np.uint64)  # + 0.0: -0 is 0
    negative = bits >> np.uint64(63) == 1
    return np.where(negative, ~bits, bits | np.uint64(1 << 63))


def _from_sortable(key: int) -> float:
    bits = key & ((1 << 63) - 1) if key >> 63 else ~key & ((1 << 64) - 1)
    return float(np.array([bits], np.uint64).view(np.float64)[0])
