"""The trainer: rows in order, exact resume, marked checkpoints.

A small subclass of the Hugging Face Trainer. It keeps the Trainer's callbacks, trackers, schedulers and launchers;
`OVERRIDES` lists what it overrides. phf.training.train sets it up.
"""

from __future__ import annotations

import contextlib
import errno
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from phf.core import folders, store
from phf.core.config import Plain, to_plain
from phf.core.runs import (
    COMPLETE,
    MODEL_RECORD,
    CheckpointMark,
    ModelRecord,
    checkpoint_folder,
    checkpoint_step,
    complete_checkpoints,
    remove_checkpoint,
)
from phf.core.types import PhfError
from phf.objectives import count_targets
from phf.tokens.tokenizer import save_tokenizer
from phf.training import fsdp
from phf.training.batches import RowBatches, TrainingRows, identity
from phf.training.config import TrainConfig
from phf.training.lm import load_lm_weights, save_lm
from phf.training.metrics import OpenLine
from phf.training.model import PHFModel
from phf.training.optimizer import make_muon


class TrainingError(PhfError, RuntimeError):
    """Training cannot continue."""


@contextlib.contextmanager
def disk_full_error(folder: Path) -> Iterator[None]:
    """Turn every library's own error about a full disk into a TrainingError that says so."""
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(folder).free
        if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or free < 2**24:
            raise TrainingError(
                f"no space left for {folder} ({free / 1e6:.0f} MB free); make room and run the same command again: it "
                "resumes from the newest whole checkpoint"
            ) from error
        raise


# The trainer


@dataclass(frozen=True)
class Override:
    """A method of the Hugging Face Trainer that `PHFTrainer` overrides."""

    why: str
    parameters: str
    """Names of the method's parameters in transformers. A test fails when they change."""


OVERRIDES = {
    "get_train_dataloader": Override("rows by position, without accelerate's sharding", "self"),
    "compute_loss": Override(
        "the loss comes from PHFModel, divided by the targets of all processes",
        "self model inputs return_outputs num_items_in_batch",
    ),
    "create_optimizer": Override("matrices by Muon, where the run asks for it", "self model"),
    "_prepare_inputs": Override("copies to a GPU while it computes", "self inputs"),
    "_get_num_items_in_batch": Override("counts the targets that the objective counts", "self batch_samples device"),
    "_get_grad_norm": Override("stops before an update that is not finite", "self model grad_norm"),
    "_prepare_for_training": Override(
        "callbacks get the LM, not PHFModel", "self max_steps train_dataloader resume_from_checkpoint"
    ),
    "_move_model_to_device": Override("a sharded model is in place already", "self model device"),
    "_save": Override("saves the LM as from_pretrained loads it", "self output_dir state_dict"),
    "_save_checkpoint": Override("marks whole checkpoints and removes old ones", "self model trial"),
    "_load_from_checkpoint": Override("loads what _save wrote", "self resume_from_checkpoint model"),
    "_save_optimizer_and_scheduler": Override("whole tensors of a sharded optimizer", "self output_dir"),
    "_load_optimizer_and_scheduler": Override("divides whole tensors over the processes", "self checkpoint"),
}
"""Names with an underscore are private to transformers: pyproject.toml bounds its version."""

RELIES_ON = {
    "loss_is_scaled_for_ga": "the Trainer does not divide the loss by the number of accumulated batches",
    "prepare_model": "accelerate leaves a sharded model as it is",
    "_get_learning_rate": "reported when training stops",
    "callback_handler": "its model is the LM, and phf's metrics come first in its callbacks",
    "_n_gpu": "one process uses one GPU",
}
"""Other names of transformers and accelerate that phf sets or reads, and why. A test fails if one disappears."""


@dataclass(frozen=True)
class CheckpointPlan:
    """What checkpoints say, and which are kept."""

    keep: int
    """How many of the newest are kept."""
    milestones: frozenset[int]
    """Steps whose checkpoints are kept forever."""
    step_tokens: int
    tokens_before: int
    """Targets that the starting weights had seen."""
    segmenter: Plain | None
    """How the training texts were cut."""
    text: str
    """Fingerprint of the store's text."""
    source_at: Callable[[int], float]
    """Source tokens of the training order that the model has read after a step."""
    key: str | None = None
    """Key of the run."""

    def tokens_at(self, step: int) -> int:
        """Targets that the model has seen after a step."""
        return self.tokens_before + step * self.step_tokens


class PHFTrainer(Trainer):
    """The Hugging Face Trainer with phf's rows, denominators and checkpoints. `line` counts what a line of metrics
    needs."""

    def __init__(
        self,
        model: PHFModel,
        rows: TrainingRows,
        sampler: RowBatches,
        tokenizer: Any,
        line: OpenLine,
        plan: CheckpointPlan,
        config: TrainConfig,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, train_dataset=rows, **kwargs)
        self.config = config
        self.wrapper = model
        self.rows = rows
        self.sampler = sampler
        self.text_tokenizer = tokenizer
        self.line = line
        self.plan = plan
        self.folder = Path(kwargs["args"].output_dir)
        self.loss_is_scaled_for_ga = True  # the denominator is that of the whole accumulated batch
        self.sharded = fsdp.is_sharded(model)
        if self.sharded:  # FSDP2 averages gradients over processes itself
            self.accelerator.prepare_model = lambda model, **kwargs: model

    def resume(self, checkpoint: Path) -> None:
        """Continue rows and metrics where a checkpoint left off: the next line is that of a run without
        interruption."""
        mark = store.read_record(checkpoint / COMPLETE, CheckpointMark)
        self.line.resume(mark, self.args.device, first=self.args.process_index == 0)
        self.sampler.start = mark.step

    # data

    def get_train_dataloader(self) -> DataLoader[Any]:
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.rows,
            batch_sampler=self.sampler,
            collate_fn=identity,
            num_workers=workers,
            prefetch_factor=max(2, self.args.gradient_accumulation_steps) if workers else None,  # batches of a step
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # the global stream would be drawn from once more after a resume
        )

    def _prepare_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.to(self.args.device, non_blocking=True) for name, value in inputs.items()}

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if not batch_samples:
            return None
        counts = [
            count_targets(self.wrapper.objective, b["scores"], b["mask"], b.get("phase")).sum() for b in batch_samples
        ]
        counted = torch.stack(counts).sum().to(device, non_blocking=True)
        if self.args.world_size > 1:
            counted = self.accelerator.gather(counted.reshape(1)).sum()
        return counted.clamp(min=1)

    # optimizer

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.config.optimizer == "muon" and self.optimizer is None:
            decays = self.get_decay_parameter_names(self.wrapper)
            self.optimizer = make_muon(self.wrapper, self.wrapper.lm, self.config, decays, self.wrapper.part)
        return super().create_optimizer(model)

    # loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # DDP averages gradients over processes, and the denominator is that of all processes
        self.wrapper.progress = self.state.global_step / max(self.state.max_steps, 1)
        out = model(**inputs, denominator=num_items_in_batch / self.args.world_size)
        self.line.add(out["metrics"] | {"loss": out["loss"].detach().double() / self.args.world_size})
        return out["loss"]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called once per step, before the update. This is the only place that waits for a GPU."""
        # the norm first: a gradient that is not finite in one process makes the norm so in all, and all stop
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        norm = norm.full_tensor() if self.sharded else norm
        self._check_finite("loss", self.line.sums["loss"].item())  # a sum with one value that is not finite is not
        self._check_finite("norm of the gradient", norm)
        return norm

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            process = f", process {self.args.process_index}" if self.args.world_size > 1 else ""
            raise TrainingError(
                f"the {what} is {value} at step {self.state.global_step + 1}{process} "
                f"(lr {self._get_learning_rate():.3g}); the weights were not updated. Lower train.lr, look for extreme "
                "scores, or use train.precision=fp32"
            )

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)  # type: ignore[no-untyped-call]
        self.callback_handler.model = self.wrapper.lm
        return prepared

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if not fsdp.is_sharded(model):
            super()._move_model_to_device(model, device)

    # checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir) if output_dir else self.folder
        self.save_model_now(folder, self.state.global_step)

    def save_model_now(self, folder: Path, step: int) -> None:
        """Save the model as it is after `step`. Called on all processes."""
        plan = self.plan
        seen = Seen(plan.segmenter, plan.tokens_at(step), plan.text, plan.source_at(step))
        save_model(self.wrapper, self.text_tokenizer, folder, seen, writer=self.args.should_save)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        folder = checkpoint_folder(self.folder, step)
        since = self.line.state(step)
        with disk_full_error(self.folder):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with disk_full_error(self.folder):
                files = folders.file_marks(folder, folders.files_below(folder))
                folders.sync_files(folder, files)
                store.write_json(
                    folder / COMPLETE,
                    CheckpointMark(step, self.plan.tokens_at(step), since, key=self.plan.key, files=files),
                )
            self._remove_old()

    def _remove_old(self) -> None:
        passing = [c for c in complete_checkpoints(self.folder) if checkpoint_step(c) not in self.plan.milestones]
        for old in passing[: -self.plan.keep]:
            remove_checkpoint(old)

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Load the model of a checkpoint."""
        self._load_from_checkpoint(str(checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.sharded:  # a sharded model was loaded before it was divided
            load_lm_weights(self.wrapper.lm, resume_from_checkpoint)
            self.wrapper.load_value_head(resume_from_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        optimizer, scheduler = self._inner()
        state = fsdp.optimizer_state(optimizer, keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        optimizer, scheduler = self._inner()
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
        fsdp.load_optimizer_state(optimizer, state)
        scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _inner(self) -> tuple[Any, Any]:
        """torch's optimizer, without accelerate's wrapper, and its scheduler."""
        optimizer: Any = self.optimizer
        return optimizer.optimizer, self.lr_scheduler


@dataclass(frozen=True)
class Seen:
    """What a model has read."""

    segmenter: Plain | None
    """How training texts were cut into the segments that are tokenized one by one."""
    tokens: int
    """Targets."""
    text: str
    """Fingerprint of the store's text."""
    source_tokens: float
    """Source tokens of the training order."""


def save_model(wrapper: PHFModel, tokenizer: Any, folder: Path, seen: Seen, writer: bool = True) -> None:
    """Save the LM as `from_pretrained` loads it, with its tokenizer, its value head and its record. Called on all
    processes; `writer`: whether this one writes."""
    state = fsdp.state_of(wrapper, keep=writer)
    if not writer:
        return
    parts = {
        prefix: {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        for prefix in ("lm.", "value_head.")
    }
    save_lm(wrapper.lm, folder, parts["lm."])
    save_tokenizer(tokenizer, folder)
    wrapper.save_value_head(folder, parts["value_head."])
    record = ModelRecord(
        objective=to_plain(wrapper.objective),
        control_tokens=wrapper.objective.roles,
        conditions_on=wrapper.objective.conditions_on,
        worst=wrapper.objective.worst,
        segmenter=seen.segmenter,
        tokens=seen.tokens,
        text=seen.text,
        source_tokens=seen.source_tokens,
        bad_above=wrapper.objective.bad_above,
        document_mask=wrapper.end_of_text is not None,
    )
    store.write_json(folder / MODEL_RECORD, record)


# Callbacks


class SaveAt(TrainerCallback):
    """Asks for a checkpoint at certain steps."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_save |= state.global_step in self.steps
        return control


class StopAfter(TrainerCallback):
    """Stops with a checkpoint after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step >= self.steps:
            control.should_save = True
            control.should_training_stop = True
        return control
