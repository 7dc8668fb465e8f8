"""phf's objectives in OLMo-core's own trainer (ai2-olmo-core 3).

    loader = RowLoader(order, batch_rows=64, context=1024, objective=objective, work_dir=..., dp_world_size=..., ...)
    module = ScoredTrainModule(model=model, optim=..., rank_microbatch_size=..., max_sequence_length=1024,
                               objective=objective, ...)
    TrainerConfig(...).build(module, loader).fit()

The loader's only state is the number of batches, so a run that was stopped on two processes continues on one. OLMo-core
divides a loss by each process's own number of targets; here this number is summed over the processes first. The
cross-entropy that OLMo-core's head returns is detached, so the loss is computed from the head's input.

Not supported: value heads (AWR), reference models (anchored), and tensor, context and pipeline parallelism, in which a
process does not hold whole rows or the whole head.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from phf.core.config import ConfigError, Plain
from phf.core.extras import MissingPackage, needs
from phf.core.runs import MODEL_RECORD, ModelRecord
from phf.core.store import read_json, write_json
from phf.engines.rows import check_objective, labelled_rows
from phf.objectives import Objective
from phf.tokens.source_order import TrainingOrder
from phf.tokens.store import TokenStore
from phf.tokens.tokenizer import add_control_tokens, save_tokenizer
from phf.training.fused import fused_loss

try:
    from olmo_core.data.data_loader import DataLoaderBase
    from olmo_core.nn.hf.checkpoint import save_hf_model
    from olmo_core.nn.lm_head import LMOutputWithLoss
    from olmo_core.train.train_module.transformer import TransformerTrainModule
except ImportError as error:
    raise MissingPackage(f"phf.engines.olmo {needs(error.name)}") from None

Batch = dict[str, torch.Tensor]


class RowLoader(DataLoaderBase):  # type: ignore[misc]
    """Rows of a training order. `objective`: fitted. `first`: place of the first row. The other arguments are those of
    OLMo-core's loaders: work_dir, dp_world_size, dp_rank, fs_local_rank."""

    def __init__(
        self, order: TrainingOrder, batch_rows: int, context: int, objective: Objective, first: int = 0, **settings: Any
    ) -> None:
        super().__init__(global_batch_size=batch_rows * context, **settings)
        if batch_rows % self.dp_world_size:
            raise ConfigError(f"batch_rows={batch_rows} cannot be divided over {self.dp_world_size} processes")
        check_objective(objective, "OLMo-core")
        self.order = order
        self.batch_rows = batch_rows
        self.objective = objective
        self.first = first

    @property
    def total_batches(self) -> int | None:
        return None  # the order is endless: the trainer's duration ends the run

    def state_dict(self) -> Plain:
        return {"batches": self.batches_processed, "epoch": self._epoch, "batch_rows": self.batch_rows}

    def load_state_dict(self, state_dict: Plain) -> None:
        if state_dict["batch_rows"] != self.batch_rows:
            raise ConfigError(f"the run has batches of {state_dict['batch_rows']} rows, not of {self.batch_rows}")
        self.batches_processed = state_dict["batches"]
        self._epoch = state_dict["epoch"]

    def reshuffle(self, epoch: int | None = None, **_: Any) -> None:
        self._epoch = 1 if epoch is None else epoch

    def global_num_tokens_in_batch(self, batch: Batch) -> int:
        return int(self.global_batch_size)

    def get_mock_batch(self) -> Batch:
        return self._batch(0)

    def _iter_batches(self) -> Iterable[Batch]:
        return map(self._batch, itertools.count(self.batches_processed))

    def _batch(self, step: int) -> Batch:
        """This process's rows of a step."""
        share = self.batch_rows // self.dp_world_size
        start = self.first + step * self.batch_rows + self.dp_rank * share
        return labelled_rows(self.order, self.objective, start, start + share)


class ScoredTrainModule(TransformerTrainModule):  # type: ignore[misc]
    """OLMo-core's train module with the loss of a phf objective (`objective`: fitted) on the batches of `RowLoader`."""

    def __init__(self, *args: Any, objective: Objective, **settings: Any) -> None:
        check_objective(objective, "OLMo-core")
        for name in ("tp_config", "cp_config", "pp_config", "ep_config"):
            if settings.get(name) is not None:
                raise ConfigError(f"{name}: with it a process does not hold whole rows or the whole head")
        if settings.get("z_loss_multiplier") is not None:
            raise ConfigError("z_loss_multiplier: the loss is the objective's alone")
        super().__init__(*args, **settings)
        self.objective = objective
        self._given: Batch = {}
        self._denominator = torch.ones(())
        self._plain_head = self.model.lm_head.forward
        self.model.lm_head.forward = self._head

    def train_batch(self, batch: Batch, dry_run: bool = False) -> None:
        counted = (batch["labels"] != self.label_ignore_index).sum().float().to(self.device)
        if dist.is_initialized():
            dist.all_reduce(counted)
            counted /= dist.get_world_size()  # gradients are means over the processes
        self._denominator = counted.clamp(min=1e-9)
        super().train_batch(batch, dry_run)

    def model_forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        self._given = {name: kwargs.pop(name) for name in ("scores", "phase") if name in kwargs}
        try:
            return super().model_forward(input_ids, labels, **kwargs)
        finally:
            self._given = {}

    def _head(self, x: torch.Tensor, *, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """The head's forward pass; in training the objective's loss."""
        given = self._given
        if "scores" not in given or labels is None:
            return self._plain_head(x, labels=labels, **kwargs)
        head = self.model.lm_head
        hidden = x if head.norm is None else head.norm(x)
        counted = labels != self.label_ignore_index
        out = fused_loss(
            hidden.flatten(0, 1),
            head.w_out.weight,
            bias_V=head.w_out.bias,
            target_N=torch.where(counted, labels, 0).flatten(),
            score_N=given["scores"].to(hidden.device).flatten(0, 1),
            mask_N=counted.flatten(),
            value_N=None,
            phase_N=given["phase"].to(hidden.device).flatten() if "phase" in given else None,
            progress=self._progress(),
            objective=self.objective,
            scale=1 / self._denominator,
        )
        return LMOutputWithLoss(None, out.loss_sum, out.loss_sum.detach(), None)  # what is logged is the loss, too

    def _progress(self) -> float:
        """The share of the training that is done, for schedules."""
        trainer = self._trainer
        steps = None if trainer is None else trainer.max_steps
        return 0.0 if trainer is None or not steps else min(trainer.global_step / steps, 1.0)


def export_to_hf(
    model: Any,
    state: Mapping[str, torch.Tensor],
    tokens: TokenStore,
    objective: Objective,
    context: int,
    folder: str | Path,
) -> None:
    """Write a trained OLMo-core model as a Hugging Face model with the store's tokenizer and phf's record, so that
    `phf eval`, `phf redteam` and plain `from_pretrained` load it. `state`: the model's whole state dict. `objective`:
    fitted. `context`: the longest text that it was trained on."""
    tokenizer = tokens.tokenizer
    add_control_tokens(tokenizer, list(objective.control_tokens))
    save_hf_model(folder, state, model, save_overwrite=True)
    config = Path(folder) / "config.json"
    known = {"max_position_embeddings": context, "eos_token_id": tokens.end_of_text_id, "bos_token_id": None}
    write_json(config, read_json(config) | known | {"pad_token_id": None})
    save_tokenizer(tokenizer, Path(folder))
    control = objective.control
    write_json(
        Path(folder) / MODEL_RECORD,
        ModelRecord(
            control_tokens=control.tokens,
            conditions_on=control.conditions_on,
            worst=control.worst,
            segmenter=tokens.manifest.segmenter,
            bad_above=objective.bad_above,
        ),
    )
