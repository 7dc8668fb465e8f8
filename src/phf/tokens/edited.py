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

CACHED_TOKENS = 1 << 22
"""Edited blocks are kept in memory up to this number of tokens."""
NO_SOURCE = -1


@dataclass(frozen=True)
class Edited:
    """A block after an edit, one entry per token of the stream."""

    ids: np.ndarray
    segment: np.ndarray
    """Number in the store of the segment that the token belongs to, int64. End-of-text belongs to the segment that
    follows."""
    source: np.ndarray
    """Number in the block of the token that was there before the edit, int64; -1 for inserted ones."""
    score: np.ndarray
    """Score of the token, float32; for several preferences [tokens, preferences]."""
    learned: np.ndarray
    """Whether the token is a target, bool."""

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, start: int, stop: int) -> Edited:
        part = slice(start, stop)
        return Edited(self.ids[part], self.segment[part], self.source[part], self.score[part], self.learned[part])

    @classmethod
    def joined(cls, parts: Sequence[Edited]) -> Edited:
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([p.ids for p in parts]),
            np.concatenate([p.segment for p in parts]),
            np.concatenate([p.source for p in parts]),
            np.concatenate([p.score for p in parts]),
            np.concatenate([p.learned for p in parts]),
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
    made_E, segment_E, at_E = _insertions(block, edit, pieces)
    length_E = np.array([1, *(len(p.ids) for p in pieces)], np.int64)[made_E]
    start_E = at_E + np.cumsum(length_E) - length_E
    total = len(block.ids_T) + int(length_E.sum())
    inserted = np.zeros(total, bool)
    ids = np.empty(total, np.int64)
    segment = np.empty(total, np.int64)
    learned = np.ones(total, bool)
    where, of = _spread(start_E, length_E)
    inserted[where] = True
    within = where - start_E[of]
    kind = made_E[of]
    table, learned_of = _piece_table(end_of_text_id, pieces)
    ids[where] = table[kind, within]
    learned[where] = learned_of[kind]
    segment[where] = segment_E[of]
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
    whole = Edited(ids, segment + block.first_segment, source, score, learned)
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
        sizes = np.array([len(p.ids) for p in pieces], np.int64)
        added = np.bincount(
            edit.insertions.segment_I, sizes[edit.insertions.piece_I].astype(np.float64), block.num_segments
        )
        length_S = length_S + added.astype(np.int64)
    return int((length_S * times(block, edit, train)[block.doc_S]).sum())


def _insertions(block: Block, edit: Edit, pieces: Sequence[PieceIds]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All that is inserted, in order: which piece (0 for end-of-text, then one more than the piece's number), its
    segment, and the number of the block's tokens before it."""
    first = np.flatnonzero(block.first_S)
    if edit.insertions is None:
        return np.zeros(len(first), np.int64), first, block.start_S[first]
    found = edit.insertions
    made = np.r_[np.zeros(len(first), np.int64), found.piece_I.astype(np.int64) + 1]
    segment = np.r_[first, found.segment_I]
    offset = np.r_[np.full(len(first), -1), found.offset_I]
    order = np.lexsort((offset, segment))  # stable: pieces at one place keep their order
    at = block.start_S[segment] + np.maximum(offset, 0)
    return made[order], segment[order], at[order]


def _spread(start_E: np.ndarray, length_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of all tokens of all insertions, and the number of each token's insertion."""
    of = np.repeat(np.arange(len(start_E)), length_E)
    within = np.arange(len(of)) - np.repeat(np.cumsum(length_E) - length_E, length_E)
    return start_E[of] + within, of


def _piece_table(end_of_text_id: int, pieces: Sequence[PieceIds]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of end-of-text and of each piece, one row each, and whether they are targets."""
    rows = [(end_of_text_id,), *(p.ids for p in pieces)]
    table = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for n, row in enumerate(rows):
        table[n, : len(row)] = row
    return table, np.array([True, *(p.learned for p in pieces)])


def _repeated(whole: Edited, doc: np.ndarray, times_D: np.ndarray) -> Edited:
    """The documents of a block as often as `times_D` says: all of them once, then those that come again."""
    most = int(times_D.max(initial=0))
    if most <= 1 and times_D.all():
        return whole
    rounds = [_where(whole, (times_D > n)[doc]) for n in range(most)]
    return Edited.joined(rounds) if rounds else whole.cut(0, 0)


def _where(whole: Edited, keep: np.ndarray) -> Edited:
    return Edited(whole.ids[keep], whole.segment[keep], whole.source[keep], whole.score[keep], whole.learned[keep])


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

    def length(self, k: int) -> int:
        """Number of tokens of block k after the edit."""
        if self.length_K[k] < 0:
            block = self.tokens.block(k)
            self.length_K[k] = edited_length(block, self.edit(block), self.pieces, self.train)
        return int(self.length_K[k])

    def block(self, k: int) -> Edited:
        """Block k after the edit."""
        found = self.kept.get(k)
        if found is None:
            block = self.tokens.block(k)
            found = apply_edit(
                block,
                self.edit(block),
                self.tokens.end_of_text_id,
                self.pieces,
                self.hidden_id,
                self.train,
                self.preferences,
            )
            self.kept[k] = found
            self.kept_tokens += len(found)
            while self.kept_tokens > CACHED_TOKENS and len(self.kept) > 1:
                self.kept_tokens -= len(self.kept.popitem(last=False)[1])
        else:
            self.kept.move_to_end(k)
        return found
