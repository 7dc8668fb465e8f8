"""The order of training: source text in windows, and the rows of any objective at each place of that order.

All objectives read the same source text in the same order, whatever they drop or insert.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from phf.core.random import key64, permute, uniforms_at
from phf.tokens.edited import NO_SOURCE, Edited, Stream
from phf.tokens.rows import Batch, too_few

WHOLE_TOKENS = 1 << 22
"""A store of up to this number of tokens is one window: few documents in a window cost 0.7% of the loss (LOG.md)."""
PIECE_ROWS = 4
"""Rows' worth of source text in a piece of such a window."""
GROUP_PIECES = 64
"""Pieces whose rows are mixed."""
WINDOW_TOKENS = 1 << 20
"""Source tokens in a window of a larger store, about."""
CACHED_TOKENS = 1 << 18
"""Edited tokens of a larger store that are kept in memory."""
Learned = Callable[[np.ndarray], np.ndarray]
"""Which of some targets an objective counts, by their scores."""
KEPT_WINDOWS = 4


@dataclass(frozen=True)
class Exposure:
    """How much text a run read. Counts of tokens."""

    source: int = 0
    """Source tokens that the training order passed, those of dropped documents too."""
    read_good: int = 0
    """Text tokens that were targets' places, of good segments."""
    read_bad: int = 0
    """The same of bad segments."""
    read_unjudged: int = 0
    """The same of segments that were not judged."""
    learned_good: int = 0
    """Those of `read_good` that the objective counts."""
    learned_bad: int = 0
    """Those of `read_bad` that the objective counts."""
    inserted: int = 0
    """Tokens that the objective inserted."""
    end_of_text: int = 0
    """Documents whose start was read."""
    hidden: int = 0
    """Tokens that the hidden token stands for: not read."""
    epochs: float = 0.0
    """Source tokens passed, divided by those of the training part."""

    def __add__(self, other: Exposure) -> Exposure:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Exposure(*(a + b for a, b in pairs))


@dataclass(frozen=True)
class _Groups:
    """The rows of a window in the order of training."""

    rows: np.ndarray
    ends: np.ndarray
    """Place at which each group ends."""
    sources: np.ndarray
    """Source tokens before that place."""


@dataclass(frozen=True)
class _Stretch:
    """Places [first, last) of the training order, and the source tokens before and after them."""

    first: int
    last: int
    before: float
    after: float


class SourceOrder:
    """The endless order in which training reads the stream of a store, defined over the source text.

    Each epoch permutes the blocks of the store and groups them into windows, which are the same text for every
    objective: all of a store of up to `WHOLE_TOKENS` source tokens, else about `WINDOW_TOKENS`. The streams of its
    blocks are joined, windows follow one another, and rows are cut from all of it. The rows that start in a window are
    permuted. So after each window, all objectives have read the same text, and the rows of a batch come from many
    documents.

    A window that is the whole store is permuted in pieces of `PIECE_ROWS` rows' worth of source text, the same for
    every objective, and the rows that start in `GROUP_PIECES` successive pieces are mixed. So after each group, all
    objectives have read the same text, but for the rows at the edges of pieces.

    A position is reached by the lengths of the windows before it, which are computed where they are needed.
    """

    def __init__(self, stream: Stream, context: int, seed: int) -> None:
        self.stream = stream
        self.tokens = stream.tokens
        self.context = context
        self.seed = seed
        blocks = self.tokens.num_blocks
        total = len(self.tokens.tokens)
        whole = total <= WHOLE_TOKENS
        self.window_blocks = blocks if whole else max(round(WINDOW_TOKENS * blocks / total), 1)
        self.windows = -(-blocks // self.window_blocks) if blocks else 0
        """Windows of an epoch."""
        stream.keep = WHOLE_TOKENS if whole else CACHED_TOKENS
        self.whole = whole
        self._layouts: dict[int, tuple[list[int], list[int]]] = {}
        self._groups: dict[int, _Groups] = {}
        self.source_K = np.full(blocks, -1, np.int64)
        self.ends: list[int] = []
        """End in the stream of each window so far."""
        self.sources: list[int] = []
        """End in source tokens of each window so far."""
        while len(self.ends) < self.windows and (not self.ends or self.ends[-1] <= context):
            self._extend()
        if not self.ends or self.ends[-1] <= context:
            raise too_few("train", self.ends[-1] if self.ends else 0, context)

    # Windows

    def window(self, g: int) -> np.ndarray:
        """Blocks of window g, counted through all epochs."""
        epoch, j = divmod(g, self.windows)
        count = self.tokens.num_blocks
        places = np.arange(j * self.window_blocks, min((j + 1) * self.window_blocks, count))
        return permute(places, count, key64(self.seed, "order", epoch))

    def _layout(self, g: int) -> tuple[list[int], list[int]]:
        """The blocks of window g and their ends in the stream. The last windows are kept."""
        if g not in self._layouts:
            blocks = [int(k) for k in self.window(g)]
            start = self.ends[g - 1] if g else 0
            ends = [start + n for n in itertools.accumulate(self.stream.length(k) for k in blocks)]
            if len(self._layouts) >= KEPT_WINDOWS:
                self._layouts.pop(next(iter(self._layouts)))
            self._layouts[g] = (blocks, ends)
        return self._layouts[g]

    def _source(self, k: int) -> int:
        """Source tokens of block k that are trained on."""
        if self.source_K[k] < 0:
            first, last = self.tokens.block_documents(k)
            ends_D = np.r_[first and self.tokens.doc_ends[first - 1], self.tokens.doc_ends[first:last]]
            ends_D = np.where(ends_D > 0, self.tokens.seg_ends[np.maximum(ends_D - 1, 0)], 0)
            self.source_K[k] = np.diff(ends_D)[~self.tokens.heldout_D[first:last]].sum()
        return int(self.source_K[k])

    def _extend(self) -> None:
        g = len(self.ends)
        blocks = self.window(g)
        self.ends.append((self.ends[-1] if g else 0) + sum(self.stream.length(int(k)) for k in blocks))
        self.sources.append((self.sources[-1] if g else 0) + sum(self._source(int(k)) for k in blocks))

    def _reach(self, position: int) -> None:
        """Know the windows up to a position of the stream."""
        while self.ends[-1] <= position:
            start = self.ends[-1]
            for _ in range(2 * self.windows):  # a whole epoch, wherever it starts
                self._extend()
                if self.ends[-1] > position:
                    return
            if self.ends[-1] == start:
                raise too_few("train", 0, self.context)

    def _rows_of(self, g: int) -> tuple[int, int]:
        """The rows [first, last) that start in window g."""
        first, last = (-(-end // self.context) for end in (self.ends[g - 1] if g else 0, self.ends[g]))
        return first, last

    def _window_at(self, row: int) -> int:
        """The window in which a row starts."""
        self._reach(row * self.context)
        return bisect.bisect_right(self.ends, row * self.context)

    # Rows

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Row numbers of the places [start, stop) of the training order."""
        parts = []
        while start < stop:
            g = self._window_at(start)
            first, last = self._rows_of(g)
            end = min(stop, last)
            if self.whole:
                parts.append(self._grouped(g).rows[start - first : end - first])
            else:
                here = np.arange(start, end)
                parts.append(first + permute(here - first, last - first, key64(self.seed, "rows", g)))
            start = end
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _grouped(self, g: int) -> _Groups:
        """The rows of window g, a whole store, in groups of pieces of its source text. The last windows are kept."""
        if g not in self._groups:
            piece_R = self._places(g) // (PIECE_ROWS * self.context)
            pieces = len(self._source_P)
            rank_P = np.argsort(permute(np.arange(pieces), pieces, key64(self.seed, "pieces", g)))
            group_R = rank_P[piece_R] // GROUP_PIECES
            mixed_R = uniforms_at(0, len(piece_R), self.seed, "rows", g)
            first, _ = self._rows_of(g)
            source_G = np.bincount(rank_P // GROUP_PIECES, self._source_P)
            before = self.sources[g - 1] if g else 0
            if len(self._groups) >= KEPT_WINDOWS:
                self._groups.pop(next(iter(self._groups)))
            self._groups[g] = _Groups(
                rows=first + np.lexsort((mixed_R, group_R)),
                ends=first + np.bincount(group_R, minlength=len(source_G)).cumsum(),
                sources=before + source_G.cumsum(),
            )
        return self._groups[g]

    def _places(self, g: int) -> np.ndarray:
        """Number in the store of the source token at which each row of window g starts; what is inserted starts with
        its segment."""
        first, last = self._rows_of(g)
        blocks, ends = self._layout(g)
        starts_R = np.arange(first, last) * self.context
        found_R = np.empty(last - first, np.int64)
        start = self.ends[g - 1] if g else 0
        for k, end in zip(blocks, ends, strict=True):
            here = slice(*np.searchsorted(starts_R, [start, end]))
            if here.start < here.stop:
                edited = self.stream.with_places(k)
                assert edited.segment is not None
                assert edited.source is not None
                at = starts_R[here] - start
                segment = edited.segment[at]
                of_segment = np.where(segment > 0, self.tokens.seg_ends[segment - 1], 0)
                source = edited.source[at]
                found_R[here] = np.where(source == NO_SOURCE, of_segment, self.tokens.first_token(k) + source)
            start = end
        return np.minimum(found_R, len(self.tokens.tokens) - 1)

    @functools.cached_property
    def _source_P(self) -> np.ndarray:
        """Source tokens of each piece of the store that are trained on."""
        pieces = -(-len(self.tokens.tokens) // (PIECE_ROWS * self.context))
        ends_D = self.tokens.seg_ends[self.tokens.doc_ends - 1]
        trained = np.repeat(~self.tokens.heldout_D, np.diff(ends_D, prepend=0)).astype(np.float64)
        piece_T = np.arange(len(trained)) // (PIECE_ROWS * self.context)
        return np.bincount(piece_T, trained, pieces)

    def read(self, low: int, high: int, places: bool = False) -> Edited:
        """Stream positions [low, high). `places`: with the places of the tokens."""
        self._reach(high - 1)
        g = bisect.bisect_right(self.ends, low)
        make = self.stream.with_places if places else self.stream.block
        parts = []
        while low < high:
            blocks, ends = self._layout(g)
            for n in range(bisect.bisect_right(ends, low), len(blocks)):
                start = ends[n - 1] if n else (self.ends[g - 1] if g else 0)
                stop = min(high, ends[n])
                if stop > low:
                    parts.append(make(blocks[n]).cut(low - start, stop - start))
                    low = stop
                if low == high:
                    break
            g += 1
        return Edited.joined(parts)

    def batch(self, start: int, stop: int) -> Batch:
        """The rows at the places [start, stop) of the training order."""
        names = self.stream.preferences
        out = Batch.empty(
            stop - start, self.context, None if names is None else len(names), self.tokens.reference is not None
        )
        for b, row in enumerate(self.rows(start, stop)):
            out.fill(b, self.read(int(row) * self.context, (int(row) + 1) * self.context + 1))
        return out

    # Source

    def source_at(self, place: int) -> float:
        """Source tokens before a place of the training order: those of the windows and groups before, and of its own
        the share of the rows before it."""
        part = self._stretch(self._window_at(place), place=place)
        return part.before + (place - part.first) / (part.last - part.first) * (part.after - part.before)

    def place_at(self, source: float) -> int:
        """The place of the training order before which there are `source` source tokens."""
        while self.sources[-1] < source:
            known = self.sources[-1]
            for _ in range(2 * self.windows):  # a whole epoch, wherever it starts
                self._extend()
            if self.sources[-1] == known:
                raise too_few("train", 0, self.context)
        g = bisect.bisect_left(self.sources, source)  # at the end of a window: there, not at the next one's start
        part = self._stretch(g, source=source)
        size = part.after - part.before
        return part.first + round((source - part.before) / size * (part.last - part.first)) if size else part.first

    def _stretch(self, g: int, place: int | None = None, source: float | None = None) -> _Stretch:
        """The group of window g that holds a place, or an amount of source text; without groups the whole window."""
        first, last = self._rows_of(g)
        window = _Stretch(first, last, float(self.sources[g - 1]) if g else 0.0, float(self.sources[g]))
        if not self.whole or (source is not None and source <= window.before):
            return window
        groups = self._grouped(g)
        if source is None:
            found = np.searchsorted(groups.ends, place or 0, side="right")
        else:
            found = np.searchsorted(groups.sources, source)
        n = min(int(found), len(groups.ends) - 1)
        return _Stretch(
            first=int(groups.ends[n - 1]) if n else window.first,
            last=int(groups.ends[n]),
            before=float(groups.sources[n - 1]) if n else window.before,
            after=float(groups.sources[n]),
        )

    def exposure(self, start: int, stop: int, learned: Learned | None = None) -> Exposure:
        """What the rows at the places [start, stop) read. `learned`: which of some targets the objective counts, by
        their scores; None: all."""
        totals = np.zeros(8, np.int64)
        place = start
        while place < stop:
            g = self._window_at(place)
            first, last = self._rows_of(g)
            end = min(stop, last)
            if (place, end) == (first, last):
                totals += self._count(first * self.context + 1, last * self.context + 1, learned)
            else:
                for row in np.sort(self.rows(place, end)):
                    totals += self._count(int(row) * self.context + 1, (int(row) + 1) * self.context + 1, learned)
            place = end
        source = self.source_at(stop) - self.source_at(start)
        good, bad, unjudged, learned_good, learned_bad, inserted, ends, hidden = (int(n) for n in totals)
        return Exposure(
            source=round(source),
            read_good=good,
            read_bad=bad,
            read_unjudged=unjudged,
            learned_good=learned_good,
            learned_bad=learned_bad,
            inserted=inserted,
            end_of_text=ends,
            hidden=hidden,
            epochs=source / self.epoch_source,
        )

    @property
    def epoch_source(self) -> int:
        """Source tokens of an epoch."""
        while len(self.sources) < self.windows:
            self._extend()
        return self.sources[self.windows - 1]

    def _count(self, low: int, high: int, learned: Learned | None) -> np.ndarray:
        part = self.read(low, high, places=True)
        assert part.source is not None
        score = np.asarray(self.tokens.score_S[part.segment])
        inserted = part.source == NO_SOURCE
        hidden = np.zeros(len(part.ids), bool) if self.stream.hidden_id is None else part.ids == self.stream.hidden_id
        text = ~inserted & ~hidden
        unjudged = text & np.isnan(score)
        bad = text & (score > np.float32(self.tokens.bad_above))
        good = text & ~unjudged & ~bad
        counted = part.learned if learned is None else part.learned & learned(part.score)
        ends = inserted & (part.ids == self.tokens.end_of_text_id)
        masks = (good, bad, unjudged, good & counted, bad & counted, inserted & ~ends, ends, hidden)
        return np.array([mask.sum() for mask in masks])


class TrainingOrder:
    """The orders of a run's phases, one after the other: each continues in the source text where the one before
    stopped. A run without a schedule has one phase.

    `until`: the places at which all phases but the last end.
    """

    def __init__(self, orders: Sequence[SourceOrder], until: Sequence[int] = ()) -> None:
        if len(until) != len(orders) - 1:
            raise ValueError(f"{len(orders)} phases need {len(orders) - 1} ends")
        self.orders = list(orders)
        self.starts = [0, *until]
        """First place of each phase."""
        self.own = [0]
        """The same place in the phase's own order."""
        for n, end in enumerate(until):
            source = orders[n].source_at(self.own[n] + end - self.starts[n])
            self.own.append(orders[n + 1].place_at(source))

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(phase, first place, end) in the phases' own orders of the places [start, stop)."""
        for n, (first, own) in enumerate(zip(self.starts, self.own, strict=True)):
            low = max(start, first)
            high = min(stop, self.starts[n + 1]) if n + 1 < len(self.starts) else stop
            if low < high:
                yield n, own + low - first, own + high - first

    def batch(self, start: int, stop: int) -> Batch:
        """The rows at the places [start, stop)."""
        made = [(n, self.orders[n].batch(low, high)) for n, low, high in self._parts(start, stop)]
        for order in self.orders[: made[0][0]]:  # phases that are over
            order.stream.forget()
        if len(self.orders) == 1:
            return made[0][1]
        return Batch.joined([batch for _, batch in made], [n for n, _ in made])

    def source_at(self, place: int) -> float:
        """Source tokens before a place."""
        n = bisect.bisect_right(self.starts, place) - 1
        return self.orders[n].source_at(self.own[n] + place - self.starts[n])

    def place_at(self, source: float) -> int:
        """The place of the first phase's order before which there are `source` source tokens."""
        return self.orders[0].place_at(source)

    def exposure(self, start: int, stop: int, learned: Sequence[Learned] | None = None) -> Exposure:
        """What the rows at the places [start, stop) read. `learned`: of each phase."""
        total = Exposure()
        for n, low, high in self._parts(start, stop):
            total = total + self.orders[n].exposure(low, high, None if learned is None else learned[n])
        return total
