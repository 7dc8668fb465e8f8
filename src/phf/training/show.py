"""Rows as a person reads them: what the objective inserts, what is bad, what adds no loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from phf.objectives import Objective, count_targets
from phf.tokens.rows import Batch
from phf.tokens.store import TokenStore


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a row of one kind."""

    kind: str
    """control, end, bad, good or unjudged."""
    learned: bool
    """Whether the objective counts them as targets."""
    text: str
    tokens: int


def pieces_of(batch: Batch, tokens: TokenStore, objective: Objective, tokenizer: Any) -> list[list[Piece]]:
    """The targets of each row, by kind. `objective`: fitted. `tokenizer`: with its control tokens."""
    score = torch.from_numpy(batch.score_BT)
    phase = None if batch.phase_BT is None else torch.from_numpy(batch.phase_BT)
    counted_BT = count_targets(objective, score, torch.from_numpy(batch.mask_BT), phase).numpy()
    score_BT = batch.score_BT
    limit = tokens.bad_above
    if score_BT.ndim == 3:  # by the store's preference, if the objective has it
        names = list(objective.preferences or ())
        n = names.index(tokens.preference) if tokens.preference in names else 0
        score_BT, limit = score_BT[..., n], tokens.with_scores(names[n]).bad_above
    control = np.array(tokenizer.convert_tokens_to_ids(list(objective.control_tokens)), np.int64)
    kinds_BT = np.where(np.isnan(score_BT), "unjudged", np.where(score_BT > limit, "bad", "good"))
    kinds_BT[batch.target_BT == tokens.end_of_text_id] = "end"
    kinds_BT[np.isin(batch.target_BT, control)] = "control"
    return [
        list(_pieces(ids, kinds, counted, tokenizer))
        for ids, kinds, counted in zip(batch.target_BT, kinds_BT, counted_BT, strict=True)
    ]


def _pieces(ids_T: np.ndarray, kinds_T: np.ndarray, counted_T: np.ndarray, tokenizer: Any) -> Iterator[Piece]:
    labels = zip(kinds_T.tolist(), counted_T.tolist(), strict=True)
    for (kind, learned), group in itertools.groupby(zip(labels, ids_T.tolist(), strict=True), key=lambda pair: pair[0]):
        ids = [i for _, i in group]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield Piece(kind, learned, text, len(ids))
