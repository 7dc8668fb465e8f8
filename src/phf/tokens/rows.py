"""Rows: the edited token stream cut into training rows that are addressed by index.

The stream holds, for every document that an objective keeps, end-of-text and then the segments, each after its
control token if it has one. Row i covers stream positions [i T, i T + T + 1). Rows overlap by one token, so every
token but the first is a target exactly once. Up to T targets at the end of the stream do not fill a row and are not
trained on.

The only index is the cumulative edited length of the segments. Making a row costs O(T) for any row. The order of
rows is a keyed permutation evaluated by index, so resuming costs nothing and any number of processes sees the same
order.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phf.core import store
from phf.core.config import ConfigError
from phf.core.random import key64, permute
from phf.core.types import Edit
from phf.tokens.store import TokenStore


@dataclass(frozen=True)
class Batch:
    """B rows of T targets. `score_BT`: score of the *target*'s segment; `mask_BT`: False for padding."""

    input_BT: np.ndarray
    target_BT: np.ndarray
    score_BT: np.ndarray
    mask_BT: np.ndarray


class Rows:
    """Rows of `context` targets of a token store under an edit.

    `control_ids`: token ids of the control tokens that the edit's `control_S` numbers. `split`: "train" or
    "heldout". `pad`: keep the last, partial row and mask its missing targets (for evaluation). `index_file`: where
    the index is kept for the next time. Raises ConfigError if there is not a single row.
    """

    def __init__(
        self,
        tokens: TokenStore,
        edit: Edit,
        context: int,
        control_ids: Sequence[int] = (),
        split: str = "train",
        pad: bool = False,
        index_file: Path | None = None,
    ) -> None:
        self.tokens = tokens
        self.context = context
        self.control_ids = np.array([*control_ids, -1], dtype=np.int64)  # the last one is never read
        self.control_S = edit.control_S
        self.first_S = np.zeros(len(tokens.seg_ends) + 1, bool)
        self.first_S[np.r_[0, tokens.doc_ends[:-1]]] = True
        kept = None if index_file is None else _kept_index(index_file, len(tokens.seg_ends))
        self.ends_S = self._edited_ends(edit, split) if kept is None else kept
        if kept is None and index_file is not None:
            _keep_index(index_file, self.ends_S)
        self.num_tokens = int(self.ends_S[-1]) if len(self.ends_S) else 0
        targets = max(self.num_tokens - 1, 0)
        self.num_rows = -(-targets // context) if pad else targets // context
        if self.num_rows == 0:
            raise ConfigError(
                f"the {split} part has {self.num_tokens} tokens after the objective's edit, too few for one row of "
                f"{context} targets; lower train.context, use more text or raise the threshold"
            )

    def _edited_ends(self, edit: Edit, split: str) -> np.ndarray:
        lengths = np.diff(self.tokens.seg_ends, prepend=0) + self.first_S[:-1]
        if edit.control_S is not None:
            lengths += edit.control_S >= 0
        keep_D = self.tokens.heldout_D if split == "heldout" else ~self.tokens.heldout_D
        if edit.keep_D is not None:
            keep_D = keep_D & edit.keep_D
        return np.asarray(np.where(keep_D[self.tokens.doc_S], lengths, 0).cumsum())

    def stream(self, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and segment numbers of the stream positions [low, high)."""
        position = np.arange(low, high)
        first, last = np.searchsorted(self.ends_S, [low, high - 1], side="right")
        ends = np.asarray(self.ends_S[first : last + 1])
        starts = np.r_[self.ends_S[first - 1] if first else 0, ends[:-1]]
        local = np.searchsorted(ends, position, side="right")
        seg = first + local
        offset = position - starts[local]
        is_first = self.first_S[seg]
        control = self.control_S[seg] if self.control_S is not None else np.full(len(seg), -1)
        specials = is_first.astype(np.int64) + (control >= 0)
        seg_start = np.where(seg > 0, self.tokens.seg_ends[seg - 1], 0)
        at = np.clip(seg_start + offset - specials, 0, len(self.tokens.tokens) - 1)
        ids = self.tokens.tokens[at].astype(np.int64)
        ids = np.where((offset == specials - 1) & (control >= 0), self.control_ids[control], ids)
        ids = np.where((offset == 0) & is_first, self.tokens.end_of_text_id, ids)
        return ids, seg

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The rows with these numbers, in this order."""
        shape = (len(rows), self.context)
        out = Batch(
            np.zeros(shape, np.int64),
            np.zeros(shape, np.int64),
            np.full(shape, np.nan, np.float32),
            np.zeros(shape, bool),
        )
        for b, row in enumerate(rows):
            low = int(row) * self.context
            ids, seg = self.stream(low, min(low + self.context + 1, self.num_tokens))
            count = len(ids) - 1
            out.input_BT[b, :count] = ids[:-1]
            out.target_BT[b, :count] = ids[1:]
            out.score_BT[b, :count] = self.tokens.score_S[seg[1:]]
            out.mask_BT[b, :count] = True
        return out


def _kept_index(file: Path, segments: int) -> np.ndarray | None:
    """An index that `_keep_index` kept; None if there is none, or if it is damaged. Its hash is in its name."""
    for found in file.parent.glob(f"{file.stem}-*.npy"):
        if store.file_hash(found) == found.stem.rpartition("-")[2]:
            index: np.ndarray = np.load(found, mmap_mode="r", allow_pickle=False)
            return index if len(index) == segments else None
    return None


def _keep_index(file: Path, ends_S: np.ndarray) -> None:
    data = io.BytesIO()
    np.save(data, ends_S)
    named = file.with_name(f"{file.stem}-{store.bytes_hash(data.getvalue())}.npy")
    with store.written_aside(named) as aside:
        aside.write_bytes(data.getvalue())


@dataclass(frozen=True)
class Order:
    """The order in which training reads rows: epoch after epoch, each with its own permutation."""

    num_rows: int
    seed: int

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Row numbers of positions [start, stop) of the endless training order."""
        position = np.arange(start, stop)
        out = np.empty(len(position), np.int64)
        for epoch in np.unique(position // self.num_rows):
            here = position // self.num_rows == epoch
            out[here] = permute(position[here] % self.num_rows, self.num_rows, key64(self.seed, "order", int(epoch)))
        return out
