"""The edited token stream of a store, a block at a time.

The stream holds, for every document that an objective keeps, end-of-text and then its segments with what the objective
inserts. A block is the segments of some whole documents; its edit depends on the block alone, so the only index is one
length per block. Documents that are repeated come again at the end of their block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from phf.core.types import Block, Edit, PieceIds
from phf.tokens.store import TokenStore

Editor = Callable[[Block], Edit]
"""What edits a block: an objective with its seed."""

NO_SOURCE = -1


@dataclass(frozen=True)
class Edited:
    """A block after an edit, one entry per token of the stream."""

    ids: np.ndarray
    score: np.ndarray
    """Score of the token, float32; for several preferences [tokens, preferences]."""
    learned: np.ndarray
    """Whether the token is a target, bool."""
    segment: np.ndarray | None = None
    """Number in the store of the segment that the token belongs to, int64. End-of-text belongs to the segment that
    follows. None where places are not kept."""
    source: np.ndarray | None = None
    """Number in the block of the token that was there before the edit, int64; -1 for inserted ones. None where places
    are not kept."""

    reference: np.ndarray | None = None
    """Log-probability of the token under a reference model, float32; NaN: not known. None without one."""

    def __len__(self) -> int:
        return len(self.ids)

    def _each(self, change: Callable[[np.ndarray], np.ndarray]) -> Edited:
        more = (None if a is None else change(a) for a in (self.segment, self.source, self.reference))
        return Edited(change(self.ids), change(self.score), change(self.learned), *more)

    def cut(self, start: int, stop: int) -> Edited:
        return self._each(lambda array: array[start:stop])

    def where(self, keep: np.ndarray) -> Edited:
        return self._each(lambda array: array[keep])

    def without_places(self) -> Edited:
        """What training needs, in little memory."""
        return Edited(self.ids.astype(np.int32), self.score, self.learned, reference=self.reference)

    @classmethod
    def joined(cls, parts: Sequence[Edited]) -> Edited:
        if len(parts) == 1:
            return parts[0]
        segments = [p.segment for p in parts if p.segment is not None]
        sources = [p.source for p in parts if p.source is not None]
        references = [p.reference for p in parts if p.reference is not None]
        more = (np.concatenate(arrays) if arrays else None for arrays in (segments, sources, references))
        return cls(
            np.concatenate([p.ids for p in parts]),
            np.concatenate([p.score for p in parts]),
            np.concatenate([p.learned for p in parts]),
            *more,
        )


def apply_edit(
    block: Block,
    edit: Edit,
    end_of_text_id: int,
    pieces: Sequence[PieceIds] = (),
    hidden_id: int | None = None,
    train: bool = True,
    preferences: Sequence[str] | None = None,
) -> Edited:
    """The block after the edit. `train`: its training documents, otherwise its held-out ones. `preferences`: whose
    scores the tokens get; None: those of the block."""
    added = _insertions(block, edit, end_of_text_id, pieces)
    start_E = added.at_E + np.cumsum(added.length_E) - added.length_E
    total = len(block.ids_T) + int(added.length_E.sum())
    inserted = np.zeros(total, bool)
    ids = np.empty(total, np.int64)
    segment = np.empty(total, np.int64)
    learned = np.ones(total, bool)
    where, of = _spread(start_E, added.length_E)
    inserted[where] = True
    ids[where] = added.flat[added.first_E[of] + where - start_E[of]]
    learned[where] = added.learned_E[of]
    segment[where] = added.segment_E[of]
    text = ~inserted
    ids[text] = block.ids_T
    segment[text] = block.segment_T
    source = np.full(total, NO_SOURCE, np.int64)
    source[text] = np.arange(len(block.ids_T))
    if edit.hidden_T is not None and edit.hidden_T.any():
        if hidden_id is None:
            raise ValueError("the edit hides tokens, but the objective names no hidden token")
        hidden = np.zeros(total, bool)
        hidden[text] = edit.hidden_T
        ids[hidden] = hidden_id
        learned[hidden] = False
    if preferences is None:
        score = _scores(block, segment, text)
    else:
        score = np.stack([_scores(block.of(name), segment, text) for name in preferences], axis=-1)
    reference = None
    if block.reference_T is not None:
        reference = np.full(total, np.nan, np.float32)
        reference[text] = block.reference_T
    whole = Edited(ids, score, learned, segment + block.first_segment, source, reference)
    return _repeated(whole, block.doc_S[segment], times(block, edit, train))


def _scores(block: Block, segment: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Score of each token of the stream: its own where the store has scores of tokens, otherwise its segment's."""
    score: np.ndarray = block.score_S[segment]
    if block.token_score_T is not None:
        score[text] = block.token_score_T
    return score


def times(block: Block, edit: Edit, train: bool = True) -> np.ndarray:
    """How often each document of the block is read; 0 for those of the other split."""
    times_D = np.ones(block.num_documents, np.int64) if edit.times_D is None else edit.times_D.astype(np.int64)
    return np.where(block.train_D == train, times_D, 0)


def edited_length(block: Block, edit: Edit, pieces: Sequence[PieceIds] = (), train: bool = True) -> int:
    """The number of tokens that `apply_edit` gives."""
    length_S = block.tokens_S + block.first_S
    if edit.insertions is not None:
        found = edit.insertions
        _, _, length_PD = _pieces(block, 0, pieces)
        length_I = length_PD[found.piece_I + 1, block.doc_S[found.segment_I]]
        added = np.bincount(found.segment_I, length_I.astype(np.float64), block.num_segments)
        length_S = length_S + added.astype(np.int64)
    return int((length_S * times(block, edit, train)[block.doc_S]).sum())


@dataclass(frozen=True)
class _Added:
    """All that is inserted into a block, end-of-text too, in order."""

    flat: np.ndarray
    """Ids of all pieces in a row."""
    first_E: np.ndarray
    """Where the ids of each insertion start in that row."""
    length_E: np.ndarray
    learned_E: np.ndarray
    segment_E: np.ndarray
    at_E: np.ndarray
    """Number of the block's tokens before each insertion."""


def _insertions(block: Block, edit: Edit, end_of_text_id: int, pieces: Sequence[PieceIds]) -> _Added:
    flat, first_PD, length_PD = _pieces(block, end_of_text_id, pieces)
    learned_P = np.array([True, *(p.learned for p in pieces)])
    segment_E = np.flatnonzero(block.first_S)
    offset_E = np.full(len(segment_E), -1)
    piece_E = np.zeros(len(segment_E), np.int64)
    if edit.insertions is not None:
        found = edit.insertions
        segment_E = np.r_[segment_E, found.segment_I]
        offset_E = np.r_[offset_E, found.offset_I]
        piece_E = np.r_[piece_E, found.piece_I.astype(np.int64) + 1]
        order = np.lexsort((offset_E, segment_E))  # stable: pieces at one place keep their order
        segment_E = segment_E[order]
        offset_E = offset_E[order]
        piece_E = piece_E[order]
    doc_E = block.doc_S[segment_E]
    return _Added(
        flat=flat,
        first_E=first_PD[piece_E, doc_E],
        length_E=length_PD[piece_E, doc_E],
        learned_E=learned_P[piece_E],
        segment_E=segment_E,
        at_E=block.start_S[segment_E] + np.maximum(offset_E, 0),
    )


def _pieces(block: Block, end_of_text_id: int, pieces: Sequence[PieceIds]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ids of end-of-text and of all pieces in a row; and for each piece and document, where its ids start in that
    row and how many there are, [pieces, documents]."""
    parts = [np.array([end_of_text_id], np.int64)]
    shape = (len(pieces) + 1, block.num_documents)
    first_PD = np.zeros(shape, np.int64)
    length_PD = np.ones(shape, np.int64)
    at = 1
    for n, piece in enumerate(pieces, 1):
        if piece.column is None:
            ids = np.array(piece.ids, np.int64)
            first_PD[n] = at
            length_PD[n] = len(ids)
        else:
            found, ends_D = block.about(piece.column)
            ids = found.astype(np.int64)
            length_PD[n] = np.diff(ends_D, prepend=0)
            first_PD[n] = at + ends_D - length_PD[n]
        parts.append(ids)
        at += len(ids)
    return np.concatenate(parts), first_PD, length_PD


def _spread(start_E: np.ndarray, length_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of all tokens of all insertions, and the number of each token's insertion."""
    of = np.repeat(np.arange(len(start_E)), length_E)
    within = np.arange(len(of)) - np.repeat(np.cumsum(length_E) - length_E, length_E)
    return start_E[of] + within, of


def _repeated(whole: Edited, doc: np.ndarray, times_D: np.ndarray) -> Edited:
    """The documents of a block as often as `times_D` says: all of them once, then those that come again."""
    most = int(times_D.max(initial=0))
    if most <= 1 and times_D.all():
        return whole
    rounds = [whole.where((times_D > n)[doc]) for n in range(most)]
    return Edited.joined(rounds) if rounds else whole.cut(0, 0)


class Stream:
    """The edited stream of a token store. `length(k)` and `block(k)` cost what block k costs.

    `pieces`: what the edit inserts, as token ids. `hidden_id`: the id that stands for hidden tokens. `split`: "train"
    or "heldout". `preferences`: whose scores the tokens get; None: those of the store's preference.
    """

    def __init__(
        self,
        tokens: TokenStore,
        edit: Editor,
        pieces: Sequence[PieceIds] = (),
        hidden_id: int | None = None,
        split: str = "train",
        preferences: Sequence[str] | None = None,
    ) -> None:
        self.tokens = tokens
        self.preferences = preferences
        self.edit = edit
        self.pieces = tuple(pieces)
        self.hidden_id = hidden_id
        self.train = split != "heldout"
        self.length_K = np.full(tokens.num_blocks, -1, np.int64)
        """Edited lengths as far as they are known; -1 otherwise."""
        self.kept: OrderedDict[int, Edited] = OrderedDict()
        self.kept_tokens = 0
        self.keep = 1 << 18
        """Edited blocks are kept in memory up to this number of tokens."""
        self.last: tuple[int, Edited] | None = None

    def forget(self) -> None:
        """Keep no block in memory."""
        self.kept.clear()
        self.kept_tokens = 0
        self.last = None

    def length(self, k: int) -> int:
        """Number of tokens of block k after the edit."""
        if self.length_K[k] < 0:
            block = self.tokens.block(k)
            self.length_K[k] = edited_length(block, self.edit(block), self.pieces, self.train)
        return int(self.length_K[k])

    def with_places(self, k: int) -> Edited:
        """Block k after the edit, with the places of its tokens. The last block is kept."""
        if self.last is not None and self.last[0] == k:
            return self.last[1]
        block = self.tokens.block(k)
        made = apply_edit(
            block,
            self.edit(block),
            self.tokens.end_of_text_id,
            self.pieces,
            self.hidden_id,
            self.train,
            self.preferences,
        )
        self.last = (k, made)
        return made

    def block(self, k: int) -> Edited:
        """Block k after the edit, without places. The last blocks are kept."""
        found = self.kept.get(k)
        if found is None:
            found = self.with_places(k).without_places()
            self.kept[k] = found
            self.kept_tokens += len(found)
            while self.kept_tokens > self.keep and len(self.kept) > 1:
                self.kept_tokens -= len(self.kept.popitem(last=False)[1])
        else:
            self.kept.move_to_end(k)
        return found
