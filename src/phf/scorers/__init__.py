"""Scorers: reward functions over text. Floor 2.

A scorer's configuration is a frozen dataclass; its methods load what they need late. A *score* is misalignment: 0 is
fine, larger is worse, NaN is "could not be judged" (never 0). The segments of a document are scored together, because
some scorers (PEP8) need the whole to judge a part.

    PII().score_segments(["mail me: ", "a@b.org\n"])   # [0.0, 0.125]
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from phf.scorers.base import Scorer
from phf.scorers.combined import Combination
from phf.scorers.fitted import Fitted
from phf.scorers.pep8 import PEP8
from phf.scorers.pii import PII, Presidio
from phf.scorers.simple import Function, Lexicon, Regex
from phf.scorers.toxicity import Toxicity

AnyScorer = Annotated[
    PII | Presidio | PEP8 | Toxicity | Fitted | Lexicon | Regex | Function | Combination, Field(discriminator="name")
]

__all__ = [
    "PEP8",
    "PII",
    "AnyScorer",
    "Combination",
    "Fitted",
    "Function",
    "Lexicon",
    "Presidio",
    "Regex",
    "Scorer",
    "Toxicity",
]
