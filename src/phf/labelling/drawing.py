"""Which segments are labelled: a random sample of a corpus, in strata.

Every different text has a random number that depends on the text and the seed alone; a stratum gives the texts with the
smallest numbers. So a sample of 1,000 is part of the sample of 2,000 with the same seed, and labels that were paid for
are used again. One pass over the text, and memory for the sample.
"""

from __future__ import annotations

import heapq
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as settings
from tqdm import tqdm

from phf.core import store
from phf.core.config import STRICT, ConfigError, to_plain
from phf.core.types import Number, Rejected
from phf.data.corpus import Corpus
from phf.data.scored import ScoredCorpus, natural_threshold
from phf.data.segment import Given, Segmenter
from phf.scoring.inspect import Table

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
class Source:
    """Segments to draw from."""

    name: str
    fingerprint: str
    segments: Callable[[], Iterator[tuple[str, str, float] | Rejected]]
    """(document's id, text, score or NaN) of each, and rows that are no documents."""
    edges: tuple[float, ...] = ()
    """Scores that divide the strata of `by: score`; none for a corpus without scores."""
    threshold: float = math.nan
    """Scores above it are bad; one of `edges`."""


def from_scored(path: str, preference: str | None = None) -> Source:
    """The segments of a scored corpus. Raises StoreError for a folder that holds none."""
    corpus = ScoredCorpus(path, preference)

    def segments() -> Iterator[tuple[str, str, float] | Rejected]:
        for file in tqdm(corpus.files, desc="drawing", unit="file", disable=None, file=sys.stderr):
            for document in corpus.read(file):
                if isinstance(document, Rejected):
                    yield document
                else:
                    yield from ((document.id, *pair) for pair in zip(document.texts, document.scores, strict=True))

    score_S = Table(corpus).score_S.astype(np.float64)
    judged_S = score_S[~np.isnan(score_S)]
    mark = store.fingerprint([corpus.text, corpus.manifest.content])
    if not len(judged_S):
        return Source(str(path), mark, segments)
    threshold = natural_threshold(corpus.manifest, judged_S)
    return Source(str(path), mark, segments, _score_edges(judged_S, threshold), threshold)


def _score_edges(judged_S: np.ndarray, threshold: float) -> tuple[float, ...]:
    """The threshold, and cuts that divide the segments on each side of it into equal parts."""
    edges = {threshold}
    for side in (judged_S[judged_S > threshold], judged_S[judged_S <= threshold]):
        if len(side):
            cuts = np.quantile(side, np.arange(1, PARTS) / PARTS, method="lower")
            edges |= {float(cut) for cut in cuts if cut < side.max()}
    return tuple(sorted(edges))


def from_corpus(name: str, corpus: Corpus, segmenter: Segmenter) -> Source:
    """The segments of a corpus that was not scored."""

    def segments() -> Iterator[tuple[str, str, float] | Rejected]:
        for shard in tqdm(corpus.plan(), desc="drawing", unit="shard", disable=None, file=sys.stderr):
            for item in corpus.read(shard):
                if isinstance(item, Rejected):
                    yield item
                else:
                    cut = item.segments if isinstance(segmenter, Given) else segmenter.split(item.text)
                    yield from ((item.id, text, math.nan) for text in cut or (item.text,))

    return Source(
        name,
        store.fingerprint([to_plain(corpus), corpus.fingerprint(), to_plain(segmenter), segmenter.libraries]),
        segments,
    )


def draw(source: Source, drawing: Drawing) -> Draw:
    """Different texts with at least one character that is no white space, in random order, and the strata they came
    from. Raises ConfigError for a corpus without text, and for `by: score` without scores."""
    if drawing.by == "score" and not source.edges:
        raise ConfigError(f"{source.name} has no scores to draw by: give a scored corpus, or --by length")
    names = _names(source, drawing)
    smallest = [_Smallest(max(drawing.n, SKETCH)) for _ in names]
    sizes = [0] * len(names)
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
            stratum = _stratum(source, drawing, text, score)
            sizes[stratum] += 1
            smallest[stratum].add(_number(bare, drawing.seed, b"phf label"), Drawn(id, text, score, stratum))
    found = [part.in_order() for part in smallest]
    if not any(found):
        raise ConfigError(f"{source.name} holds no segment with text")
    sides = _sides(source, drawing, len(names))
    available = [[len(found[stratum]) for stratum in side] for side in sides]
    of_sides = shared_out(drawing.n, [sum(side) for side in available])
    share_of = {
        stratum: share
        for side, of_side, most in zip(sides, of_sides, available, strict=True)
        for stratum, share in zip(side, shared_out(of_side, most), strict=True)
    }
    shares = [share_of[stratum] for stratum in range(len(names))]
    drawn: dict[str, Drawn] = {}
    texts = [part.different() for part in smallest]
    for part, different, share in zip(found, texts, shares, strict=True):
        for drawn_item in part[:share]:  # a scorer that reads whole documents may put a text into two strata
            weight = drawn_item.times * different / share
            drawn.setdefault(drawn_item.text.strip(), replace(drawn_item, weight=weight))
    count = Counter(item.stratum for item in drawn.values())
    strata = [
        DrawnStratum(name, size, count[n], different)
        for n, (name, size, different) in enumerate(zip(names, sizes, texts, strict=True))
        if size
    ]
    order = sorted(drawn.values(), key=lambda item: _number(item.text.strip(), drawing.seed, b"phf order"))
    return Draw(order, strata, dict(sorted(rejected.items())), examples)


def _number(text: str, seed: int, purpose: bytes) -> int:
    return store.text_hash(f"{seed}:{text}", purpose)


def _names(source: Source, drawing: Drawing) -> list[str]:
    if drawing.by == "uniform":
        return ["all"]
    ends: Sequence[float] = LENGTHS if drawing.by == "length" else source.edges
    what = "characters" if drawing.by == "length" else "score"
    first = f"{what} up to {ends[0]:g}"
    inner = [f"{what} above {low:g} and up to {high:g}" for low, high in itertools.pairwise(ends)]
    return [first, *inner, f"{what} above {ends[-1]:g}", "not judged"]


def _sides(source: Source, drawing: Drawing, count: int) -> list[list[int]]:
    """Groups of strata that get equally many texts: with `by: score` those above the threshold, and the others."""
    if drawing.by != "score":
        return [list(range(count))]
    bad = range(source.edges.index(source.threshold) + 1, count - 1)
    return [[stratum for stratum in range(count) if stratum not in bad], list(bad)]


def _stratum(source: Source, drawing: Drawing, text: str, score: float) -> int:
    if drawing.by == "uniform":
        return 0
    if drawing.by == "length":
        return int(np.searchsorted(LENGTHS, len(text)))
    return len(source.edges) + 1 if math.isnan(score) else int(np.searchsorted(source.edges, score))


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
        self.heap: list[int] = []
        self.is_full = False
        """Whether there were more than `n`."""

    def add(self, number: int, item: Drawn) -> None:
        if number in self.items:
            known = self.items[number]
            self.items[number] = replace(known, times=known.times + 1)
            return
        if len(self.heap) == self.n and number > -self.heap[0]:
            self.is_full = True
            return
        self.items[number] = item
        if len(self.heap) < self.n:
            heapq.heappush(self.heap, -number)
        else:
            self.is_full = True
            del self.items[-heapq.heappushpop(self.heap, -number)]

    def different(self) -> float:
        """How many different items there were; an estimate if more than n (the k smallest of uniform numbers: Beyer et
        al., SIGMOD 2007)."""
        if not self.is_full:
            return float(len(self.heap))
        return max((self.n - 1) * 2**64 / max(-self.heap[0], 1), float(self.n))

    def in_order(self) -> list[Drawn]:
        return [self.items[number] for number in sorted(self.items)]
