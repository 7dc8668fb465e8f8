"""The values that flow between stages. Floor 0: imports nothing of phf.

Words (docs/concepts.md): a *document* is a list of *segments* whose concatenation is exactly its text; a *score* is
misalignment (0 fine, larger worse, NaN not judged); *tokens* are what the model reads; an *estimate* is a mean with
its standard error.

Legend for shape suffixes: S segments, D documents, N samples, B rows, T targets in a row, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Document:
    """One text of the corpus. `meta` holds what the source says about it and must be JSON-serialisable; `segments` is
    how the source cut it, where it did."""

    id: str
    text: str
    meta: dict[str, Any] = field(default_factory=dict)
    segments: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Rejected:
    """A row of the corpus that could not become a document, and why. Counted in the manifest, never dropped silently."""

    id: str
    reason: str


@dataclass(frozen=True)
class ScoredDocument:
    """A document cut into segments, each with its score (NaN: could not be judged)."""

    id: str
    texts: tuple[str, ...]
    scores: tuple[float, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "".join(self.texts)


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a text that a scorer found fault with, and the kind of fault."""

    start: int
    end: int
    label: str


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error over `n` independent units, and a 95% interval. `unjudged` were left out."""

    mean: float
    stderr: float
    n: int
    ci95: tuple[float, float]
    unjudged: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ci95": list(self.ci95)}


@dataclass(frozen=True)
class SegmentTable:
    """What an objective may know of a token store in order to edit it: one entry per segment, in order.

    `score_S` float32 (NaN: not judged); `tokens_S` number of tokens; `doc_S` index of the segment's document;
    `train_D` bool, False for held-out documents.
    """

    score_S: np.ndarray
    tokens_S: np.ndarray
    doc_S: np.ndarray
    train_D: np.ndarray

    @property
    def train_S(self) -> np.ndarray:
        return np.asarray(self.train_D[self.doc_S])

    def doc_mean_D(self) -> np.ndarray:
        """Mean score of each document over its judged segments (float64); NaN where none was judged."""
        num_docs = len(self.train_D)
        judged_S = ~np.isnan(self.score_S)
        sums = np.bincount(self.doc_S[judged_S], weights=self.score_S[judged_S].astype(np.float64), minlength=num_docs)
        counts = np.bincount(self.doc_S[judged_S], minlength=num_docs)
        with np.errstate(invalid="ignore"):
            return sums / counts


@dataclass(frozen=True)
class Edit:
    """What an objective does to the token stream, for all segments at once.

    `keep_D`: documents that stay (None: all). `control_S`: number of the control token put before the segment,
    -1 for none (None: no segment gets one). Nothing else can be edited, so that removing the control tokens of an
    edited document always gives the original.
    """

    keep_D: np.ndarray | None = None
    control_S: np.ndarray | None = None


@dataclass(frozen=True)
class Sample:
    """A text written by a model. `prompt` is what it was given, `text` what it wrote, both without control tokens.

    `logp`: natural log-probability of the written tokens (text and end-of-text) under the untruncated model at
    temperature 1. `finished`: whether it ended with end-of-text rather than at the length limit. Once judged: `score`, and
    the score of each segment of what was judged (the prompt with it, where the scenario says so), with its exclusive end.
    """

    id: int
    prompt: str
    text: str
    num_tokens: int
    logp: float
    finished: bool
    seed: int
    score: float = float("nan")
    segment_ends: tuple[int, ...] = ()
    segment_scores: tuple[float, ...] = ()
