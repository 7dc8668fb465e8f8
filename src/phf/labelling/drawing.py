"""Which segments are labelled: a random sample of a corpus, in strata.

Every different text has a random number that depends on the text and the seed alone; a stratum gives the texts with the
smallest numbers. So a sample of 1,000 is part of the sample of 2,000 with the same seed, and labels that were paid for
are used again. One pass over the text, and memory for the sample.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from phf.core import store
from phf.core.config import STRICT, ConfigError, to_plain
from phf.core.progress import Progress
from phf.core.types import Number, Rejected
from phf.data.corpus import Corpus
from phf.data.scored import ScoredCorpus, natural_threshold
from phf.data.segment import Segmenter, segments_of
from phf.scoring.strata import equal_parts
from phf.scoring.table import Table

LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
"""Characters that divide the strata of `by: length`."""
SKETCH = 1024
"""Texts that are kept of each stratum at least: the number of different texts is then known to about 3%."""
PARTS = 4
"""Strata on each side of the threshold with `by: score`."""


@settings(frozen=True, config=STRICT)
class Drawing:
    """How to draw segments."""

    n: Annotated[int, Field(gt=0)] = 1000
    """Texts to draw; all if the corpus has fewer."""
    by: Literal["uniform", "length", "score"] = "uniform"
    """Strata, with equally many texts each: none, by length, or by a first score, half of them above its threshold."""
    seed: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True)
class Drawn:
    """A text to label."""

    id: str
    """Its document's."""
    text: str
    score: Number
    """Its first score; NaN for none."""
    stratum: int
    weight: float = 1.0
    """Segments of the corpus that it stands for: how often it occurs, by the different texts of its stratum for each
    one drawn."""
    times: int = 1
    """Segments with this text."""


@dataclass(frozen=True)
class DrawnStratum:
    """A part of the corpus that texts were drawn from."""

    name: str
    """Which part."""
    segments: int
    """Its segments in the corpus, repeated texts included."""
    drawn: int
    """Texts that were drawn from it."""
    texts: float = 0.0
    """Its different texts; an estimate where more than were asked for."""


@dataclass(frozen=True)
class Draw:
    """What was drawn."""

    texts: list[Drawn]
    """In random order."""
    strata: list[DrawnStratum]
    rejected: dict[str, int]
    """Rows of the corpus that are no documents, by reason."""
    examples: dict[str, str]
    """The first one of each reason."""


@dataclass(frozen=True)
class Cuts:
    """Scores that divide strata, ascending."""

    edges: tuple[float, ...]
    threshold: float
    """Scores above it are bad; one of `edges`."""


@dataclass(frozen=True)
class Source:
    """Segments to draw from."""

    name: str
    fingerprint: str
    segments: Callable[[], Iterator[tuple[str, str, float] | Rejected]]
    """(document's id, text, score or NaN) of each, and rows that are no documents."""
    cuts: Callable[[], Cuts | None] = lambda: None
    """Reads the scores that divide the strata of `by: score`; None for a corpus without scores."""


def from_scored(path: str, preference: str | None = None) -> Source:
    """The segments of a scored corpus. Raises StoreError for a folder that holds none."""
    corpus = ScoredCorpus(path, preference)

    def segments() -> Iterator[tuple[str, str, float] | Rejected]:
        for file in Progress(corpus.files, desc="drawing", unit="file"):
            for document in corpus.read(file):
                if isinstance(document, Rejected):
                    yield document
                else:
                    yield from ((document.id, *pair) for pair in zip(document.texts, document.scores, strict=True))

    def cuts() -> Cuts | None:
        score_S = Table(corpus).score_S.astype(np.float64)
        judged_S = score_S[~np.isnan(score_S)]
        if not len(judged_S):
            return None
        threshold = natural_threshold(corpus.manifest, judged_S)
        sides = (judged_S[judged_S > threshold], judged_S[judged_S <= threshold])
        return Cuts(tuple(sorted({threshold, *(cut for side in sides for cut in equal_parts(side, PARTS))})), threshold)

    return Source(str(path), store.fingerprint([corpus.text, corpus.manifest.content]), segments, cuts)


def from_corpus(name: str, corpus: Corpus, segmenter: Segmenter) -> Source:
    """The segments of a corpus that was not scored."""

    def segments() -> Iterator[tuple[str, str, float] | Rejected]:
        for shard in Progress(corpus.plan(), desc="drawing", unit="shard"):
            for item in corpus.read(shard):
                if isinstance(item, Rejected):
                    yield item
                else:
                    yield from ((item.id, text, math.nan) for text in segments_of(item, segmenter))

    return Source(
        name,
        store.fingerprint([to_plain(corpus), corpus.fingerprint(), to_plain(segmenter), segmenter.libraries]),
        segments,
    )


def draw(source: Source, drawing: Drawing) -> Draw:
    """Different texts with at least one character that is no white space, in random order, and the strata they came
    from. Raises ConfigError for a corpus without text, and for `by: score` without scores."""
    strata = _Strata.of(source, drawing)
    smallest = [_Smallest(max(drawing.n, SKETCH)) for _ in strata.names]
    sizes = [0] * len(strata.names)
    rejected: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for item in source.segments():
        if isinstance(item, Rejected):
            rejected[item.reason] += 1
            examples.setdefault(item.reason, item.id)
            continue
        id, text, score = item
        bare = text.strip()
        if bare:
            stratum = strata.place(text, score)
            sizes[stratum] += 1
            number = _number(bare, drawing.seed, b"phf label")
            if smallest[stratum].is_new(number):
                smallest[stratum].add(number, Drawn(id, text, score, stratum))
    found = [part.in_order() for part in smallest]
    if not any(found):
        raise ConfigError(f"{source.name} holds no segment with text")
    shares = strata.shares(drawing.n, [len(part) for part in found])
    texts = [part.different() for part in smallest]
    drawn: dict[str, Drawn] = {}
    for part, different, share in zip(found, texts, shares, strict=True):
        for one in part[:share]:  # a scorer that reads whole documents may put a text into two strata
            drawn.setdefault(one.text.strip(), replace(one, weight=one.times * different / share))
    count = Counter(one.stratum for one in drawn.values())
    made = [
        DrawnStratum(name, size, count[n], different)
        for n, (name, size, different) in enumerate(zip(strata.names, sizes, texts, strict=True))
        if size
    ]
    order = sorted(drawn.values(), key=lambda one: _number(one.text.strip(), drawing.seed, b"phf order"))
    return Draw(order, made, dict(sorted(rejected.items())), examples)


def _number(text: str, seed: int, purpose: bytes) -> int:
    return store.text_hash(f"{seed}:{text}", purpose)


@dataclass(frozen=True)
class _Strata:
    """How a corpus is divided. `ends`: inner ends of lengths or scores; stratum n holds what is at most `ends[n]`."""

    names: list[str]
    by: str = "uniform"
    ends: tuple[float, ...] = ()
    bad: range = range(0)
    """With `by: score`, the strata above the threshold, which get half of the texts."""

    @classmethod
    def of(cls, source: Source, drawing: Drawing) -> _Strata:
        """Raises ConfigError for `by: score` without scores."""
        if drawing.by == "uniform":
            return cls(["all"])
        if drawing.by == "length":
            return cls(_names("characters", LENGTHS), "length", LENGTHS)
        cuts = source.cuts()
        if cuts is None:
            raise ConfigError(f"{source.name} has no scores to draw by: give a scored corpus, or --by length")
        bad = range(cuts.edges.index(cuts.threshold) + 1, len(cuts.edges) + 1)
        return cls([*_names("score", cuts.edges), "not judged"], "score", cuts.edges, bad)

    def place(self, text: str, score: float) -> int:
        """The stratum of a segment."""
        if self.by == "score":
            return len(self.ends) + 1 if math.isnan(score) else bisect.bisect_left(self.ends, score)
        return bisect.bisect_left(self.ends, len(text))

    def shares(self, n: int, available: Sequence[int]) -> list[int]:
        """How many of `n` texts each stratum gives, of those that it has."""
        sides = [[k for k in range(len(available)) if k not in self.bad], list(self.bad)]
        of_sides = shared_out(n, [sum(available[k] for k in side) for side in sides])
        found = [0] * len(available)
        for side, of_side in zip(sides, of_sides, strict=True):
            for k, share in zip(side, shared_out(of_side, [available[k] for k in side]), strict=True):
                found[k] = share
        return found


def _names(what: str, ends: Sequence[float]) -> list[str]:
    inner = [f"{what} above {low:g} and up to {high:g}" for low, high in itertools.pairwise(ends)]
    return [f"{what} up to {ends[0]:g}", *inner, f"{what} above {ends[-1]:g}"]


def shared_out(n: int, available: Sequence[int]) -> list[int]:
    """`n` in equal parts, none larger than `available`; what some cannot take goes to the others."""
    shares = [0] * len(available)
    left = min(n, sum(available))
    while left:
        open_ = [i for i, most in enumerate(available) if shares[i] < most]
        step = max(left // len(open_), 1)
        for i in open_:
            more = min(step, available[i] - shares[i], left)
            shares[i] += more
            left -= more
    return shares


class _Smallest:
    """The `n` different items with the smallest numbers, and how often each occurred. An item whose number is small
    enough in the end was small enough when it occurred first, so the counts are exact."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.items: dict[int, Drawn] = {}
        self.times: dict[int, int] = {}
        self.heap: list[int] = []
        self.is_full = False
        """Whether there were more than `n`."""

    def is_new(self, number: int) -> bool:
        """Count an occurrence. Whether its item is wanted and not there yet."""
        if number in self.times:
            self.times[number] += 1
            return False
        if len(self.heap) == self.n and number > -self.heap[0]:
            self.is_full = True
            return False
        return True

    def add(self, number: int, item: Drawn) -> None:
        """Keep an item that is new."""
        self.items[number] = item
        self.times[number] = 1
        if len(self.heap) < self.n:
            heapq.heappush(self.heap, -number)
            return
        self.is_full = True
        last = -heapq.heappushpop(self.heap, -number)
        del self.items[last]
        del self.times[last]

    def different(self) -> float:
        """How many different items there were; an estimate if more than n (the k smallest of uniform numbers: Beyer et
        al., SIGMOD 2007)."""
        if not self.is_full:
            return float(len(self.heap))
        return max((self.n - 1) * 2**64 / max(-self.heap[0], 1), float(self.n))

    def in_order(self) -> list[Drawn]:
        return [replace(self.items[number], times=self.times[number]) for number in sorted(self.items)]
