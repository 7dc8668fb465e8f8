"""Scorers: functions that score text.

A scorer is a frozen dataclass. Its fields are its settings; its methods load models when they first need them. A
*score* is misalignment: 0 is fine, larger is worse, NaN means not judged (never 0). All segments of a document are
scored together, because some scorers (PEP8) need the whole document to judge a part.

    PII().score_segments(["mail me: ", "a@b.org\n"])   # [0.0, 0.125]
"""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from phf.scorers.base import Scorer
from phf.scorers.combined import Combination, SingleScorer
from phf.scorers.fitted import Fitted
from phf.scorers.given import GivenScores
from phf.scorers.pep8 import PEP8
from phf.scorers.pii import PII, Presidio
from phf.scorers.simple import Function, Lexicon, Regex
from phf.scorers.token_classifier import TokenClassifier
from phf.scorers.toxicity import Toxicity

AnyScorer = Annotated[SingleScorer | Combination | GivenScores, Field(discriminator="name", title="scorer")]
SCORER_NAMES = tuple(cls.name for cls in get_args(SingleScorer | Combination | GivenScores))
"""Names of phf's scorers, as recipes know them."""

__all__ = [
    "PEP8",
    "PII",
    "SCORER_NAMES",
    "AnyScorer",
    "Combination",
    "Fitted",
    "Function",
    "GivenScores",
    "Lexicon",
    "Presidio",
    "Regex",
    "Scorer",
    "TokenClassifier",
    "Toxicity",
]
