"""Scores that a corpus comes with, taken as they are.

    phf score published/ scored/ --segmenter given segmenter.cut.name=sentences --scorer given scorer.source="..."

A row has a list `scores`, one for each of its `texts`, or one number `score` for its text. Nothing here can judge new
text, so samples need a scorer of their own (`judge` in a recipe, `--scorer` of `phf eval`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core.config import STRICT, ConfigError
from phf.core.types import Identity, Span
from phf.scorers.base import Scorer


@dataclass(frozen=True, config=STRICT)
class GivenScores(Scorer):
    """The scores in the rows of the corpus. `source`: what made them, as the data's card states it. `unit`: of the
    scores, for example probability. `threshold`: scores above it are bad; None: by their distribution."""

    source: Annotated[str, Field(min_length=1)]
    name: Literal["given"] = "given"
    unit: str = "score"
    threshold: float | None = None

    @property
    def bad_above(self) -> float | None:
        if self.threshold is None and self.unit == "probability":
            return 0.5
        return self.threshold

    def identity(self) -> Identity:
        return {"name": self.name, "unit": self.unit, "source": self.source}

    def spans(self, text: str) -> list[Span]:
        raise self._error()

    def judge_segments(self, segments: Sequence[str]) -> tuple[list[float], Counter[str]]:
        raise self._error()

    def score_text(self, text: str) -> float:
        raise self._error()

    def _error(self) -> ConfigError:
        return ConfigError(
            "the scores came with the corpus, so the scorer 'given' judges no other text: name one that does "
            "(--scorer, or judge in a recipe)"
        )
