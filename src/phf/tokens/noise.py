"""Errors added to a store's scores: what an objective would see of a worse scorer.

A share of the bad segments gets the score of a good one, and a share of the good ones that of a bad one, drawn from the
scores of the training part. Each segment is drawn by itself, as in the literature on label noise (class-conditional
noise: Natarajan et al., NeurIPS 2013). Or the shares are those that an audit found in each range of the scores, where
errors gather near the threshold (noise that depends on the instance: Xia et al., NeurIPS 2020).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core import store
from phf.core.config import STRICT, ConfigError
from phf.core.runs import NoiseCounts
from phf.core.text import one_line
from phf.core.types import Block, PhfError

NOISE_SETTING = "train.scorer_noise"
"""The path of these errors in a recipe, a grid, a message."""
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, config=STRICT)
class ScorerNoise:
    """How wrong the scores are that an objective sees, by segments. Bad is what scores above the scorer's own
    threshold."""

    missed: Share = 0.0
    """Share of the bad segments that get the score of a good one."""
    false_alarms: Share = 0.0
    """Share of the good segments that get the score of a bad one."""
    by_score: Annotated[tuple[tuple[float | None, Share], ...], Field(exclude_if=lambda value: not value)] = ()
    """Instead of both: (up to this score, share of the segments that get a score of the other class), ascending; the
    last score is null, for all higher ones."""
    threshold: Annotated[float | None, Field(exclude_if=lambda value: value is None)] = None
    """For by_score: the threshold that the shares are about."""
    scorer: Annotated[str | None, Field(exclude_if=lambda value: value is None)] = None
    """For by_score: fingerprint of the identity of the scorer that was audited."""

    def __post_init__(self) -> None:
        if self.by_score and (self.missed or self.false_alarms):
            raise ValueError("by_score takes the place of missed and false_alarms")
        ends = [math.inf if end is None else end for end, _ in self.by_score]
        if self.by_score and (not all(a < b for a, b in itertools.pairwise(ends)) or ends[-1] != math.inf):
            raise ValueError("by_score: the scores must rise, and the last must be null")

    def chance_S(self, score_S: np.ndarray, bad_above: float) -> np.ndarray:
        """The chance that the class of each segment is changed."""
        if not self.by_score:
            return np.where(score_S > np.float32(bad_above), self.missed, self.false_alarms)
        ends = np.array([end for end, _ in self.by_score if end is not None], np.float32)
        share = np.array([share for _, share in self.by_score])
        found_S: np.ndarray = share[np.searchsorted(ends, score_S, side="left")]
        return found_S


def noise_of_audit(path: str | Path) -> ScorerNoise:
    """The errors that an audit found, by the ranges of its scores. Raises ConfigError if the file is no audit."""
    from phf.scoring.audit import Audit

    try:
        audit = store.read_record(path, Audit)
    except (OSError, PhfError) as error:
        raise ConfigError(f"{path}: no audit that can be read ({one_line(error)}); make one with phf audit") from None
    found = []
    for stratum in audit.strata:
        is_bad = stratum.above is not None and stratum.above >= audit.threshold
        wrong = 1 - stratum.share.mean if is_bad else stratum.share.mean
        found.append((stratum.up_to, min(max(wrong, 0.0), 1.0)))
    return ScorerNoise(
        by_score=tuple(found), threshold=audit.threshold, scorer=store.fingerprint([audit.identity, "scorer"])
    )


def _spelled_out(value: Any) -> Any:
    """A number stands for the same share of both classes, and 0 for no errors; a text is the file of an audit."""
    if isinstance(value, str):
        try:
            return noise_of_audit(value)
        except ConfigError as error:
            raise ValueError(str(error)) from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return {"missed": value, "false_alarms": value} if value else None


AnyNoise = Annotated[
    ScorerNoise | None,
    pydantic.BeforeValidator(_spelled_out, json_schema_input_type=ScorerNoise | Share | str | None),
]


@plain_dataclass(frozen=True)
class Noise:
    """Errors of known sizes for the scores of one store.

    `good`, `bad`: sorted scores of good and of bad segments, which wrong scores are drawn from. `bad_above`: scores
    above it are bad. Draws depend on `seed` and the number of the segment alone.
    """

    noise: ScorerNoise
    seed: int
    good: np.ndarray
    bad: np.ndarray
    bad_above: float

    def wrong_S(self, block: Block) -> np.ndarray:
        """The segments whose class is changed, bool. Those that were not judged stay as they are."""
        chance_S = self.noise.chance_S(block.score_S, self.bad_above)
        wrong_S: np.ndarray = ~np.isnan(block.score_S) & (block.uniform_S(self.seed, "scorer noise") < chance_S)
        return wrong_S

    def scores_S(self, block: Block) -> np.ndarray:
        """The scores with errors, float32."""
        wrong_S = self.wrong_S(block)
        found_S: np.ndarray = block.score_S.copy()
        rank_S = block.uniform_S(self.seed, "score of the noise")
        was_bad_S = block.score_S > np.float32(self.bad_above)
        for chosen_S, values in ((wrong_S & was_bad_S, self.good), (wrong_S & ~was_bad_S, self.bad)):
            found_S[chosen_S] = values[(rank_S[chosen_S] * len(values)).astype(np.int64)]
        return found_S

    def count(self, blocks: Iterable[Block]) -> NoiseCounts:
        """What the errors do to the training part. `blocks`: with the scores before."""
        segments = bad = missed = false_alarms = 0
        for block in blocks:
            use_S = block.train_S & ~np.isnan(block.score_S)
            bad_S = use_S & (block.score_S > np.float32(self.bad_above))
            wrong_S = self.wrong_S(block)
            segments += int(use_S.sum())
            bad += int(bad_S.sum())
            missed += int((bad_S & wrong_S).sum())
            false_alarms += int((use_S & ~bad_S & wrong_S).sum())
        found = bad - missed
        return NoiseCounts(
            segments=segments,
            bad=bad,
            missed=missed,
            false_alarms=false_alarms,
            precision=found / (found + false_alarms) if found + false_alarms else float("nan"),
            recall=found / bad if bad else float("nan"),
        )


SAMPLE = 1 << 16
"""Scores of each class that wrong ones are drawn from, at most twice as many."""


class _Thinned:
    """Scores in order, every n-th of them once they are many."""

    def __init__(self) -> None:
        self.kept = np.zeros(0, np.float32)
        self.seen = 0
        self.step = 1

    def add(self, scores: np.ndarray) -> None:
        first = -self.seen % self.step
        self.kept = np.concatenate([self.kept, scores[first :: self.step]])
        self.seen += len(scores)
        while len(self.kept) > 2 * SAMPLE:
            self.kept = self.kept[::2]
            self.step *= 2


def make_noise(noise: ScorerNoise, seed: int, blocks: Iterable[Block], bad_above: float) -> Noise:
    """Errors for a store of these blocks. Raises ConfigError if no training segment is good, or none is bad, and for
    errors that were measured at another threshold."""
    if noise.threshold is not None and np.float32(noise.threshold) != np.float32(bad_above):
        raise ConfigError(
            f"{NOISE_SETTING}: the audit is about the threshold {noise.threshold:g}, and here scores above "
            f"{bad_above:g} are bad; audit with --threshold {bad_above:g}"
        )
    good = _Thinned()
    bad = _Thinned()
    for block in blocks:
        score_S = block.score_S[block.train_S & ~np.isnan(block.score_S)]
        bad_S = score_S > np.float32(bad_above)
        good.add(score_S[~bad_S])
        bad.add(score_S[bad_S])
    for name, found in (("good", good), ("bad", bad)):
        if not found.seen:
            raise ConfigError(
                f"{NOISE_SETTING}: no {name} segment among {good.seen + bad.seen:,} (threshold {bad_above:g}), so "
                "no wrong score can be drawn"
            )
    return Noise(noise, seed, np.sort(good.kept), np.sort(bad.kept), bad_above)
