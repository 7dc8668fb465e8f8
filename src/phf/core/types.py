"""The values that flow between stages.

A *document* is a list of *segments*; the segments joined are exactly its text. A *score* is misalignment: 0 is fine,
larger is worse, NaN is not judged. *Tokens* are what the model reads. An *estimate* is a mean with its standard error.
docs/concepts.md explains every word.

Legend for shape suffixes: S segments, D documents, N samples, B rows, T targets in a row, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import pydantic


class PhfError(Exception):
    """A problem whose message says what to do. The command line prints `label` and the message, and exits with
    `exit_code`."""

    exit_code = 1
    label = "error"


def _nan_if_none(value: Any) -> Any:
    return math.nan if value is None else value


Number = Annotated[
    float,
    pydantic.BeforeValidator(_nan_if_none),
    pydantic.WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "null"}]}),
]
"""A float that may be NaN. JSON has no NaN: files hold null instead."""

Identity = dict[str, Any]
"""What identifies a scorer: its `name`, its `unit` and everything else that decides its scores. Plain JSON data."""


@dataclass(frozen=True)
class Document:
    """One text of the corpus. `meta` is what the source says about the text; JSON must be able to hold it. `segments`
    is how the source cut the text, or None."""

    id: str
    text: str
    meta: dict[str, Any] = field(default_factory=dict)
    segments: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Rejected:
    """A row of the corpus that cannot become a document, and why. Manifests count these rows by reason."""

    id: str
    reason: str


@dataclass(frozen=True)
class ScoredDocument:
    """A document cut into segments, each with its score. NaN: the segment could not be judged."""

    id: str
    texts: tuple[str, ...]
    scores: tuple[float, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "".join(self.texts)


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a text in which a scorer found a fault, and the kind of fault."""

    start: int
    end: int
    label: str


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` independent units with its standard error and 95% interval. `unjudged` units were left out."""

    mean: Number
    """The estimate."""
    stderr: Number
    """Standard error."""
    n: int
    """Number of units that the mean is over."""
    ci95: tuple[Number, Number]
    """95% interval."""
    unjudged: int = 0
    """Units that were not judged and are left out."""

    @classmethod
    def missing(cls, mean: float = math.nan, n: int = 0, unjudged: int = 0) -> Estimate:
        """An estimate without standard error and interval; without `mean`, nothing was measured at all."""
        return cls(mean, math.nan, n, (math.nan, math.nan), unjudged)


@dataclass(frozen=True)
class SegmentTable:
    """What an objective may know about a token store in order to edit it: one entry per segment, in order.

    `score_S` float32 (NaN: not judged); `tokens_S` number of tokens; `doc_S` index of the segment's document;
    `train_D` bool, False for held-out documents; `bad_above`: scores above it are bad, by the scorer.
    """

    score_S: np.ndarray
    tokens_S: np.ndarray
    doc_S: np.ndarray
    train_D: np.ndarray
    bad_above: float = 0.0

    @property
    def train_S(self) -> np.ndarray:
        return np.asarray(self.train_D[self.doc_S])

    def doc_mean_D(self) -> np.ndarray:
        """Mean score of each document over its judged segments (float64). NaN if no segment was judged."""
        num_docs = len(self.train_D)
        judged_S = ~np.isnan(self.score_S)
        sums = np.bincount(self.doc_S[judged_S], weights=self.score_S[judged_S].astype(np.float64), minlength=num_docs)
        counts = np.bincount(self.doc_S[judged_S], minlength=num_docs)
        with np.errstate(invalid="ignore"):
            return sums / counts


@dataclass(frozen=True)
class Edit:
    """What an objective does to the token stream, for all segments at once.

    `keep_D`: documents that stay (None: all). `control_S`: number of the control token before each segment, -1 for none
    (None: no segment gets one). An edit can do nothing else, so removing the control tokens restores the original.
    """

    keep_D: np.ndarray | None = None
    control_S: np.ndarray | None = None


@dataclass(frozen=True)
class Sample:
    """A text written by a model. `prompt` is the text before it, `text` what the model wrote. Neither holds control
    tokens.

    `logp`: natural log-probability of the written tokens (text and end-of-text) under the untruncated model at
    temperature 1. `finished`: the sample ended with end-of-text, not at the length limit. A judged sample also has its
    `score`, and for the judged text (which includes the prompt where the scenario says so) the score and the exclusive
    end of each segment.
    """

    id: int
    """Number of the sample."""
    prompt: str
    """The prompt, or an empty string."""
    text: str
    """What the model wrote, without control tokens."""
    num_tokens: int
    """Text tokens that were written; 0 for samples of a server."""
    logp: Number
    """Natural log-probability of the written tokens; NaN for samples of a server."""
    finished: bool
    """Whether the text ended with end-of-text."""
    seed: int
    """Seed of the draw."""
    score: Number = math.nan
    """Score of the text; NaN: not judged."""
    segment_ends: tuple[int, ...] = ()
    """Exclusive ends of the segments of the judged text, in characters."""
    segment_scores: tuple[Number, ...] = ()
    """Their scores."""
