"""The values that flow between stages.

A *document* is a list of *segments*; the segments joined are exactly its text. A *score* is misalignment: 0 is fine,
larger is worse, NaN is not judged. *Tokens* are what the model reads. An *estimate* is a mean with its standard error.
docs/concepts.md explains every word.

Legend for shape suffixes: S segments, D documents, N samples, B rows, T targets in a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import pydantic

from phf.core.random import uniforms_at


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
    is how the source cut the text, or None. `scores` are those that the source gives: one per segment, a single number
    for the whole text, or None."""

    id: str
    text: str
    meta: dict[str, Any] = field(default_factory=dict)
    segments: tuple[str, ...] | None = None
    scores: tuple[float, ...] | float | None = None


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
    """Characters [start, end) of a text in which a scorer found a fault, and the kind of fault. `score`: how bad it is,
    for scorers that say so."""

    start: int
    end: int
    label: str
    score: float = 1.0


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
class Block:
    """Consecutive segments of a token store, those of some whole documents: what an objective sees at a time.

    Numbers of documents and tokens count within the block. Random draws depend on global numbers (`uniform_S`,
    `uniform_T`), so that any block can be computed alone.
    """

    first_segment: int
    """Number in the store of the block's first segment."""
    first_document: int
    first_token: int
    score_S: np.ndarray
    """Score of each segment, float32; NaN: not judged."""
    tokens_S: np.ndarray
    """Number of tokens of each segment."""
    doc_S: np.ndarray
    """Number of each segment's document."""
    train_D: np.ndarray
    """Whether each document is trained on, bool; False for held-out documents."""
    ids_T: np.ndarray
    """Token ids."""
    bad_above: float = 0.0
    """Scores above it are bad, by the scorer."""
    token_score_T: np.ndarray | None = None
    """Score of each token, float32, where the store has them."""
    reference_T: np.ndarray | None = None
    """Log-probability of each token under a reference model, float32, where they are asked for; NaN: not known."""
    words: Callable[[], np.ndarray] | None = None
    """Gives whether each entry of the vocabulary starts a word, bool."""
    others: Callable[[str], Block] | None = None
    columns: Callable[[str], tuple[np.ndarray, np.ndarray]] | None = None
    """Gives the tokens about the documents in a column of the corpus, and the exclusive end of each document's."""

    def about(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids about the block's documents in a column, and the exclusive end of each document's. Raises an
        exception where the store does not have the column."""
        if self.columns is None:
            raise ValueError(f"a block without the column {column!r}")
        return self.columns(column)

    def of(self, preference: str | None) -> Block:
        """The block with the scores of another preference of the store."""
        if preference is None:
            return self
        if self.others is None:
            raise ValueError(f"a block without the scores named {preference!r}")
        return self.others(preference)

    @property
    def word_T(self) -> np.ndarray:
        """Whether each token starts a word."""
        if self.words is None:
            raise ValueError("a block without its vocabulary")
        return np.asarray(self.words()[self.ids_T])

    @property
    def num_segments(self) -> int:
        return len(self.tokens_S)

    @property
    def num_documents(self) -> int:
        return len(self.train_D)

    @cached_property
    def first_S(self) -> np.ndarray:
        """Whether each segment is the first one of its document."""
        return np.diff(self.doc_S, prepend=-1) > 0

    @cached_property
    def segment_T(self) -> np.ndarray:
        """Number of each token's segment."""
        return np.repeat(np.arange(self.num_segments), self.tokens_S)

    @cached_property
    def start_S(self) -> np.ndarray:
        """Number of each segment's first token."""
        return np.asarray(np.cumsum(self.tokens_S) - self.tokens_S)

    @property
    def train_S(self) -> np.ndarray:
        return np.asarray(self.train_D[self.doc_S])

    def doc_mean_D(self) -> np.ndarray:
        """Mean score of each document over its judged segments (float64). NaN if no segment was judged."""
        judged_S = ~np.isnan(self.score_S)
        sums = np.bincount(self.doc_S[judged_S], self.score_S[judged_S].astype(np.float64), self.num_documents)
        counts = np.bincount(self.doc_S[judged_S], minlength=self.num_documents)
        with np.errstate(invalid="ignore"):
            return sums / counts

    def uniform_S(self, *what: object) -> np.ndarray:
        """A uniform in [0, 1) for each segment, which depends on `what` and the segment's number in the store."""
        return uniforms_at(self.first_segment, self.num_segments, *what)

    def uniform_D(self, *what: object) -> np.ndarray:
        """The same for each document."""
        return uniforms_at(self.first_document, self.num_documents, *what)

    def uniform_T(self, *what: object) -> np.ndarray:
        """The same for each token."""
        return uniforms_at(self.first_token, len(self.ids_T), *what)


@dataclass(frozen=True)
class Roles:
    """A model's control tokens. `tokens`: their names by role. `conditions_on`: the roles whose tokens go before what
    the model shall write. `worst`: the roles whose tokens ask for bad text."""

    tokens: dict[str, str] = field(default_factory=dict)
    conditions_on: tuple[str, ...] = ()
    worst: tuple[str, ...] = ()

    @property
    def first(self) -> list[str]:
        """Names of the tokens that go first."""
        return [self.tokens[role] for role in self.conditions_on]

    @property
    def banned(self) -> list[str]:
        """Names of the other tokens, which the model must not write."""
        return [name for role, name in self.tokens.items() if role not in self.conditions_on]

    @property
    def bad(self) -> list[str]:
        """Names of the tokens that ask for bad text."""
        return [self.tokens[role] for role in self.worst]


@dataclass(frozen=True)
class Piece:
    """A string that an objective may insert into the token stream."""

    text: str
    control: bool = False
    """Whether it is a control token; otherwise it is ordinary text, tokenized by itself."""
    learned: bool = True
    """Whether its tokens are targets. Otherwise they are read, and add no loss."""
    column: str | None = None
    """The column of the corpus whose text about the document is inserted instead of `text`."""


@dataclass(frozen=True)
class PieceIds:
    """A piece as token ids, and whether they are targets."""

    ids: tuple[int, ...] = ()
    learned: bool = True
    column: str | None = None
    """The column of the store whose tokens about the document are inserted instead of `ids`."""


@dataclass(frozen=True)
class Insertions:
    """Pieces to insert into a block, sorted by place. Pieces at one place stay in this order.

    `segment_I`: the segment. `offset_I`: the number of its tokens before the piece, 0 to all. `piece_I`: which of the
    objective's pieces.
    """

    segment_I: np.ndarray
    offset_I: np.ndarray
    piece_I: np.ndarray

    @classmethod
    def before(cls, piece_S: np.ndarray) -> Insertions:
        """A piece before each segment; -1: none."""
        segment_I = np.flatnonzero(piece_S >= 0)
        return cls(segment_I, np.zeros_like(segment_I), piece_S[segment_I])

    @classmethod
    def after(cls, piece_S: np.ndarray, tokens_S: np.ndarray) -> Insertions:
        """A piece after each segment; -1: none."""
        segment_I = np.flatnonzero(piece_S >= 0)
        return cls(segment_I, tokens_S[segment_I], piece_S[segment_I])

    @classmethod
    def merged(cls, parts: Sequence[Insertions]) -> Insertions:
        """Several insertions. At one place, those of the first part come first."""
        segment_I = np.concatenate([p.segment_I for p in parts])
        offset_I = np.concatenate([p.offset_I for p in parts])
        piece_I = np.concatenate([p.piece_I for p in parts])
        order = np.lexsort((offset_I, segment_I))  # stable
        return cls(segment_I[order], offset_I[order], piece_I[order])


@dataclass(frozen=True)
class Edit:
    """What an objective does to a block of the token stream. Undoing it gives the original block: documents are dropped
    or repeated, pieces are inserted, tokens are replaced one by one."""

    times_D: np.ndarray | None = None
    """How often each document is read in an epoch, whole numbers; 0: it is dropped. None: once."""
    insertions: Insertions | None = None
    hidden_T: np.ndarray | None = None
    """Tokens that are replaced by the objective's hidden token and are no targets, bool. None: no token."""


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
