"""Rows of the training order as batches of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from phf.tokens.source_order import TrainingOrder


class RowBatches(Sampler[list[int]]):
    """Positions of this process's rows in the training order, from step `start` on. Resuming takes no time, and
    every number of processes sees the same rows in the same steps."""

    def __init__(self, steps: int, batch: int, micro: int, accumulate: int, rank: int) -> None:
        self.steps = steps
        self.batch = batch
        self.micro = micro
        self.accumulate = accumulate
        self.rank = rank
        self.start = 0

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        share = self.micro * self.accumulate
        for step in range(self.start, self.steps):
            first = step * self.batch + self.rank * share
            for part in range(self.accumulate):
                yield list(range(first + part * self.micro, first + (part + 1) * self.micro))


class TrainingRows(torch.utils.data.Dataset[Any]):
    """The first `total` rows of a training order from place `first` on. A batch is fetched at a time."""

    def __init__(self, order: TrainingOrder, total: int, first: int = 0) -> None:
        self.order = order
        self.total = total
        self.first = first

    def __len__(self) -> int:
        return self.total

    def __getitems__(self, positions: list[int]) -> dict[str, Tensor]:
        # positions are consecutive
        first = self.first + positions[0]
        last = self.first + positions[-1]
        return to_tensors(self.order.batch(first, last + 1))


def to_tensors(batch: Any) -> dict[str, Tensor]:
    """A batch of rows as the arguments of `PHFModel.forward`."""
    return {
        "input_ids": torch.from_numpy(batch.input_BT),
        "targets": torch.from_numpy(batch.target_BT),
        "scores": torch.from_numpy(batch.score_BT),
        "mask": torch.from_numpy(batch.mask_BT),
    } | {
        name: torch.from_numpy(array)
        for name, array in (("phase", batch.phase_BT), ("reference", batch.reference_BT))
        if array is not None
    }


def document_positions(ids_BT: Tensor, end_of_text: int) -> Tensor:
    """Position of each token in its document, int64 [B, T]. A document starts with `end_of_text`; the first document of
    a row starts with the row."""
    place_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
    start_BT = torch.where(ids_BT == end_of_text, place_BT, 0).cummax(1).values
    return place_BT - start_BT


def identity(batch: Any) -> Any:
    return batch
