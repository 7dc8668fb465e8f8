"""Several scorers combined into one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core.config import STRICT
from phf.core.types import Identity, Span
from phf.scorers.base import Scorer
from phf.scorers.fitted import Fitted
from phf.scorers.pep8 import PEP8
from phf.scorers.pii import PII, Presidio
from phf.scorers.simple import Function, Lexicon, Regex
from phf.scorers.token_classifier import TokenClassifier
from phf.scorers.toxicity import Toxicity

SingleScorer = PII | Presidio | PEP8 | Toxicity | TokenClassifier | Fitted | Lexicon | Regex | Function
"""All scorers but the combination."""


@dataclass(frozen=True, config=STRICT)
class Combination(Scorer):
    """The largest of several scores (`how: max`) or their sum (`how: sum`). `weights` multiply the scores; default 1.

    The score is NaN if one of the scorers gives NaN. `threshold`: scores above it are bad; None: what the scorers say,
    if their own thresholds times their weights are all the same.
    """

    scorers: Annotated[
        tuple[Annotated[SingleScorer, Field(discriminator="name", title="scorer")], ...], Field(min_length=2)
    ]
    """The scorers, each with its name and settings."""
    name: Literal["combination"] = "combination"
    how: Literal["max", "sum"] = "max"
    """How their scores become one."""
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    threshold: Annotated[float | None, Field(exclude_if=lambda value: value is None)] = None

    def __post_init__(self) -> None:
        if self.weights is not None and len(self.weights) != len(self.scorers):
            raise ValueError(f"weights: {len(self.weights)} given for {len(self.scorers)} scorers")

    @property
    def judges_code(self) -> bool:
        return any(s.judges_code for s in self.scorers)

    @property
    def finds_personal_data(self) -> bool:
        return any(s.finds_personal_data for s in self.scorers)

    @property
    def names(self) -> dict[str, str]:
        return {f"scorers.{n}.{k}": v for n, scorer in enumerate(self.scorers) for k, v in scorer.names.items()}

    @property
    def bad_above(self) -> float | None:
        own = [s.bad_above for s in self.scorers]
        if self.threshold is not None or None in own:
            return self.threshold
        if self.how == "sum":
            return 0.0 if set(own) == {0.0} else None
        weighted = {w * (t or 0.0) for w, t in zip(self.weights or [1.0] * len(own), own, strict=True)}
        return weighted.pop() if len(weighted) == 1 else None

    @property
    def judges_by_document(self) -> bool:
        return any(s.judges_by_document for s in self.scorers)

    def identity(self) -> Identity:
        parts = [s.identity() for s in self.scorers]
        units = {p["unit"] for p in parts}
        return {
            "name": self.name,
            "unit": units.pop() if len(units) == 1 else "score",
            "how": self.how,
            "weights": list(self.weights or [1.0] * len(parts)),
            "scorers": parts,
        }

    def _combine(self, scores: Sequence[float]) -> float:
        if any(map(math.isnan, scores)):
            return math.nan
        weighted = [w * s for w, s in zip(self.weights or [1.0] * len(scores), scores, strict=True)]
        return max(weighted) if self.how == "max" else sum(weighted)

    def spans(self, text: str) -> list[Span]:
        return sorted(
            (s for scorer in self.scorers for s in scorer.spans(text)), key=lambda s: (s.start, s.end, s.label)
        )

    def score_text(self, text: str) -> float:
        return self._combine([s.score_text(text) for s in self.scorers])

    def judge_segments(self, segments: Sequence[str]) -> tuple[list[float], Counter[str]]:
        return self.judge_documents([segments])[0]

    def judge_documents(self, documents: Sequence[Sequence[str]]) -> list[tuple[list[float], Counter[str]]]:
        judged = [scorer.judge_documents(documents) for scorer in self.scorers]
        combined: list[tuple[list[float], Counter[str]]] = []
        for parts in zip(*judged, strict=True):
            scores = [self._combine(s) for s in zip(*(scores for scores, _ in parts), strict=True)]
            combined.append((scores, sum((labels for _, labels in parts), Counter())))
        return combined

    def without_cut(self, text: str) -> str:
        """The shortest part that one of the scorers keeps, so the truncation causes no fault for any of them."""
        return min((s.without_cut(text) for s in self.scorers), key=len)
