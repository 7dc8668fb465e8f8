"""Rows: the edited token stream cut into training rows that are addressed by number.

Row i covers stream positions [i T, i T + T + 1). Rows overlap by one token, so every token but the first is a target
exactly once. `Rows` reads the stream in the order of the store, for evaluation; phf.tokens.source_order reads it in the
order of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phf.core.config import ConfigError
from phf.core.types import PieceIds
from phf.tokens.edited import Edited, Editor, Stream
from phf.tokens.store import TokenStore


@dataclass(frozen=True)
class Batch:
    """B rows of T targets. `score_BT`: score of the *target* ([B, T, preferences] for several); `mask_BT`: False where
    there is no target. `phase_BT`: phase of the schedule that each target belongs to; None for a single phase.
    `reference_BT`: log-probability of the target under a reference model, NaN where it is not known; None without
    one."""

    input_BT: np.ndarray
    target_BT: np.ndarray
    score_BT: np.ndarray
    mask_BT: np.ndarray
    phase_BT: np.ndarray | None = None
    reference_BT: np.ndarray | None = None

    @classmethod
    def empty(cls, rows: int, context: int, preferences: int | None, reference: bool = False) -> Batch:
        shape = (rows, context)
        return cls(
            np.zeros(shape, np.int64),
            np.zeros(shape, np.int64),
            np.full(shape if preferences is None else (*shape, preferences), np.nan, np.float32),
            np.zeros(shape, bool),
            reference_BT=np.full(shape, np.nan, np.float32) if reference else None,
        )

    def fill(self, b: int, part: Edited) -> None:
        """Make row b of these tokens."""
        count = len(part) - 1
        self.input_BT[b, :count] = part.ids[:-1]
        self.target_BT[b, :count] = part.ids[1:]
        self.score_BT[b, :count] = part.score[1:]
        self.mask_BT[b, :count] = part.learned[1:]
        if self.reference_BT is not None and part.reference is not None:
            self.reference_BT[b, :count] = part.reference[1:]

    @classmethod
    def joined(cls, batches: Sequence[Batch], phases: Sequence[int]) -> Batch:
        """The rows of several batches, with the phase of each."""
        references = [batch.reference_BT for batch in batches if batch.reference_BT is not None]
        return cls(
            np.concatenate([batch.input_BT for batch in batches]),
            np.concatenate([batch.target_BT for batch in batches]),
            np.concatenate([batch.score_BT for batch in batches]),
            np.concatenate([batch.mask_BT for batch in batches]),
            np.concatenate([np.full(b.mask_BT.shape, n, np.uint8) for n, b in zip(phases, batches, strict=True)]),
            np.concatenate(references) if references else None,
        )


class Rows:
    """Rows of `context` targets of a token store under an edit, in the order of the store.

    `pieces`: what the edit inserts, as token ids. `split`: "train" or "heldout". `pad`: keep the last, partial row and
    mask its missing targets. Up to `context` targets at the end of the stream do not fill a row otherwise. Raises
    ConfigError if there is not a single row.
    """

    def __init__(
        self,
        tokens: TokenStore,
        edit: Editor,
        context: int,
        pieces: Sequence[PieceIds] = (),
        split: str = "train",
        pad: bool = False,
        hidden_id: int | None = None,
    ) -> None:
        self.tokens = tokens
        self.context = context
        self.blocks = Stream(tokens, edit, pieces, hidden_id, split)
        self.ends_K = np.cumsum([self.blocks.length(k) for k in range(tokens.num_blocks)], dtype=np.int64)
        self.num_tokens = int(self.ends_K[-1]) if len(self.ends_K) else 0
        targets = max(self.num_tokens - 1, 0)
        self.num_rows = -(-targets // context) if pad else targets // context
        if self.num_rows == 0:
            raise too_few(split, self.num_tokens, context)

    def stream(self, low: int, high: int, places: bool = True) -> Edited:
        """The stream positions [low, high). `places`: with the places of the tokens."""
        make = self.blocks.with_places if places else self.blocks.block
        parts = []
        k = int(np.searchsorted(self.ends_K, low, side="right"))
        while low < high:
            start = int(self.ends_K[k - 1]) if k else 0
            stop = min(high, int(self.ends_K[k]))
            if stop > low:
                parts.append(make(k).cut(low - start, stop - start))
                low = stop
            k += 1
        return Edited.joined(parts)

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The rows with these numbers, in this order."""
        out = Batch.empty(len(rows), self.context, None)
        for b, row in enumerate(rows):
            low = int(row) * self.context
            out.fill(b, self.stream(low, min(low + self.context + 1, self.num_tokens), places=False))
        return out


def too_few(split: str, tokens: int, context: int) -> ConfigError:
    return ConfigError(
        f"the {split} part has {tokens} tokens after the objective's edit, too few for one row of {context} targets; "
        "lower train.context, use more text or raise the threshold"
    )
