"""Strata of a corpus by its scores: what labels in each say about the whole (Cochran 1977, chapter 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from phf.core.config import ConfigError
from phf.core.statistics import weighted_share
from phf.core.types import Estimate, Number

STRATA = 5
"""Most strata on each side of the threshold."""
DRAWS = 4000
"""Draws from the posterior distribution for an interval."""


@dataclass(frozen=True)
class Stratum:
    """The corpus's segments with scores in (above, up_to]."""

    above: Number | None
    """None: from the lowest score."""
    up_to: Number | None
    """None: up to the highest score."""
    segments: int
    """Judged segments of the corpus."""
    labelled: int
    """Of these, segments with a label whose text occurs once."""
    bad: int
    """Of these, segments that are labelled bad."""
    repeated: int
    """Segments with a label whose text occurs several times in the corpus: one label is known to hold for all."""
    repeated_bad: int
    """Of these, segments that are labelled bad."""
    share: Estimate
    """Share of bad segments, with Wilson's interval for those that are not known."""
    effective: Number = math.nan
    """Labels of texts that occur once, in labels that weigh equally ((sum w)^2 / sum w^2, Kish 1965); null without
    weights."""
    effective_bad: Number = math.nan
    """Bad ones among these."""


def stratum_edges(score_N: np.ndarray, threshold: float, source: str = "the labels") -> list[float]:
    """Inner ends of strata, ascending; the threshold is one of them. Every stratum holds a labelled score.

    On each side of the threshold, the labelled scores `score_N` [N] are divided into at most `STRATA` equal parts, with
    equal scores in one part. Raises ConfigError if one side has no labelled score.
    """
    edges = {threshold}
    for side, where in ((score_N[score_N > threshold], "above"), (score_N[score_N <= threshold], "not above")):
        if not len(side):
            raise ConfigError(
                f"{source}: no labelled segment has a score {where} the threshold {threshold:g}, so precision and "
                f"recall are not known. Label some, or give another --threshold"
            )
        edges |= equal_parts(side, STRATA)
    return sorted(edges)


def equal_parts(score_N: np.ndarray, parts: int) -> set[float]:
    """Inner ends that divide scores [N] into at most this number of equal parts. Equal scores are in one part."""
    if not len(score_N):
        return set()
    cuts = np.quantile(score_N, np.arange(1, parts) / parts, method="lower")
    return {float(cut) for cut in cuts if cut < score_N.max()}


def strata_of(
    judged_S: np.ndarray,
    score_N: np.ndarray,
    bad_N: np.ndarray,
    times_N: np.ndarray,
    edges: Sequence[float],
    weight_N: np.ndarray | None = None,
) -> list[Stratum]:
    of_S = np.searchsorted(edges, judged_S, side="left")
    of_N = np.searchsorted(edges, score_N, side="left")
    ends = [None, *edges, None]
    found = []
    for number in range(len(edges) + 1):
        once = (of_N == number) & (times_N == 1)
        several = (of_N == number) & (times_N > 1)
        size = int((of_S == number).sum())
        known = int(times_N[several].sum())
        known_bad = int(times_N[several & bad_N].sum())
        n = int(once.sum())
        bad = int(bad_N[once].sum())
        share, effective = weighted_share(bad_N[once], None if weight_N is None else weight_N[once])
        effective_bad = effective * share.mean
        if known:
            whole = max(size, known)
            rest = whole - known
            low, high = share.ci95 if n else (0.0, 1.0)
            mean = share.mean if n else known_bad / known
            share = Estimate(
                (known_bad + rest * mean) / whole,
                share.stderr * rest / whole if n else math.nan,
                n,
                ((known_bad + rest * low) / whole, (known_bad + rest * high) / whole),
            )
        ends_here = (ends[number], ends[number + 1])
        found.append(Stratum(*ends_here, size, n, bad, known, known_bad, share, effective, effective_bad))
    return found


def weighted(strata: Sequence[Stratum], chosen: Sequence[bool], seed: int = 0) -> tuple[Estimate, Estimate, Estimate]:
    """Of the `chosen` strata together: (share of bad segments in them, share of all bad segments that is in them, share
    of all good segments that is in them).

    Cochran 1977, section 5A.9: bad segments are the sum of N_h p_h over strata h, N_h their segments in the corpus and
    p_h the share of bad ones among the labelled. Segments with a repeated text that is labelled are counted apart from
    N_h and p_h: what they are is known.
    """
    known_H = np.array([stratum.repeated for stratum in strata], np.float64)
    known_bad_H = np.array([stratum.repeated_bad for stratum in strata], np.float64)
    rest_H = np.maximum(np.array([stratum.segments for stratum in strata]) - known_H, 0)
    n_H = np.array([s.labelled if math.isnan(s.effective) else s.effective for s in strata], np.float64)
    bad_H = np.array([s.bad if math.isnan(s.effective) else s.effective_bad for s in strata], np.float64)
    in_H = np.array(chosen)

    def parts(share_H: np.ndarray) -> np.ndarray:
        bad = known_bad_H + rest_H * share_H
        good = known_H - known_bad_H + rest_H * (1 - share_H)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.stack(
                [
                    bad[..., in_H].sum(-1) / (known_H + rest_H)[in_H].sum(),
                    bad[..., in_H].sum(-1) / bad.sum(-1),
                    good[..., in_H].sum(-1) / good.sum(-1),
                ]
            )

    rng = np.random.Generator(np.random.Philox(seed))
    prior = 1 / len(strata)  # a half for two strata; a half for each of ten would be as much as five bad labels
    drawn = rng.beta(bad_H + prior, np.maximum(n_H - bad_H, 0) + prior, (DRAWS, len(strata)))
    drawn_3R = parts(drawn)
    n = sum(stratum.labelled for stratum in strata)
    found = []
    with np.errstate(invalid="ignore", divide="ignore"):
        share_H = np.where(n_H > 0, bad_H / n_H, known_bad_H / known_H)
    for value, draws in zip(parts(share_H).tolist(), drawn_3R, strict=True):
        low, high = np.quantile(draws, [0.025, 0.975])
        found.append(Estimate(value, float(draws.std()), n, (min(float(low), value), max(float(high), value))))
    return found[0], found[1], found[2]


def divided_strata(
    edges: Sequence[float],
    score_S: np.ndarray,
    score_N: np.ndarray,
    bad_N: np.ndarray,
    times_N: np.ndarray,
    weight_N: np.ndarray | None = None,
) -> list[Stratum]:
    """The strata of a part of the corpus: scores of its segments [S] and of its labelled texts [N], at least one.
    Strata without a label are joined with the next one that has some, so that labels which were drawn by the score are
    weighted in every part."""
    found = [stratum for stratum in strata_of(score_S, score_N, bad_N, times_N, edges, weight_N) if stratum.segments]
    joined: list[Stratum] = []
    waiting = 0
    for stratum in found:
        waiting += stratum.segments
        if stratum.labelled or stratum.repeated:
            joined.append(replace(stratum, segments=waiting))
            waiting = 0
    return [*joined[:-1], replace(joined[-1], segments=joined[-1].segments + waiting)]
