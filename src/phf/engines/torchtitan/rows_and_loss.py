"""The data loader and the loss for torchtitan."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from phf.core.config import ConfigError
from phf.core.extras import MissingPackage, needs
from phf.engines.rows import labelled_rows, loss_of_logits, objective_of, open_fitted
from phf.training.batches import document_positions
from phf.training.order import training_order

try:
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import BaseLoss
except ImportError as error:
    raise MissingPackage(f"phf.engines.torchtitan {needs(error.name)}") from None


class RowLoader(BaseDataLoader):  # type: ignore[misc]
    """Rows of a token store in phf's training order, with their scores. The next row is its only state."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):  # type: ignore[misc]
        tokens: str = ""
        """Folder of the token store: the output of `phf tokenize`."""
        objective: str = "mle"
        """The objective: its name, or its settings as YAML."""
        scores: str | None = None
        """The preference that the objective sees."""
        seed: int = 0
        """Seed of the order of the text."""
        document_mask: bool = False
        """Whether attention stays inside a document, as with train.document_mask."""
        rows: int | None = None
        """Rows of the whole run, which a schedule divides. The trainer sets it."""

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, seq_len: int, local_batch_size: int, **_: Any
    ):
        tokens, tokenizer, self.objective = open_fitted(config.tokens, config.scores, config.objective, "torchtitan")
        self.order = training_order(tokens, self.objective, tokenizer, seq_len, config.seed, places=config.rows)
        self.world = dp_world_size
        self.rank = dp_rank
        self.batch = local_batch_size
        self.end_of_text = tokens.end_of_text_id if config.document_mask else -1  # -1: a row is one text
        self.next_row = 0

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            start = self.next_row + self.rank * self.batch
            rows = labelled_rows(self.order, self.objective, start, start + self.batch)
            self.next_row += self.world * self.batch
            labels = rows.pop("labels")
            ids = rows.pop("input_ids")
            yield {"input": ids, "positions": document_positions(ids, self.end_of_text)} | rows, labels

    def state_dict(self) -> dict[str, int]:
        return {"next_row": self.next_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.next_row = state_dict.get("next_row", 0)


class ObjectiveLoss(BaseLoss):  # type: ignore[misc]
    """The loss of a open_fitted objective on logits, as a sum over the targets that it counts."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):  # type: ignore[misc]
        objective: str = "mle"
        """The open_fitted objective as YAML. The trainer sets it."""

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.objective = objective_of(config.objective)
        self.fn = functools.partial(loss_of_logits, self.objective)
        self._maybe_compile(compile_config)

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **given: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`given`: `scores`, and for schedules `phase` and `progress`."""
        if "scores" not in given:
            raise ConfigError("the objective's loss needs the scores of its targets: train with ScoredTrainer")
        loss, metrics = self.fn(pred, labels, given["scores"], given.get("phase"), given.get("progress", 0.0))
        n = 1 if global_valid_tokens is None else global_valid_tokens.clamp(min=1)
        return loss / n, {f"{name}_mean": value / n for name, value in metrics.items()}
