"""The Trainer that phf trains with: rows in order, exact resume, marked checkpoints, metrics. Floor 4.

A small subclass of the Hugging Face Trainer and its callbacks. `train.py` sets them up.
"""

from __future__ import annotations

import contextlib
import errno
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from phf.core import store
from phf.core.config import to_plain
from phf.core.runs import COMPLETE, MODEL_CARD, _step_of, complete_checkpoints
from phf.tokens.rows import Order, Rows
from phf.tokens.tokenizer import save_tokenizer
from phf.training import fsdp as sharding
from phf.training.lm import load_lm_weights, save_lm
from phf.training.metrics import Record
from phf.training.model import PHFModel


class TrainingError(RuntimeError):
    """Training cannot go on."""


@contextlib.contextmanager
def saying_if_full(folder: Path) -> Iterator[None]:
    """A disk that is full is a TrainingError that says so: every library has words of its own for it."""
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(folder).free
        if getattr(error, "errno", None) == errno.ENOSPC or free < 2**24:
            raise TrainingError(
                f"no space left for {folder} ({free / 1e6:.0f} MB free); make room and run the same command again: it goes on "
                "from the newest whole checkpoint"
            ) from error
        raise


class RowBatches(Sampler[list[int]]):
    """This process's row positions, from `start` steps on: O(1) to resume, the same order for any world size."""

    def __init__(self, steps: int, batch: int, micro: int, accumulate: int, rank: int) -> None:
        self.steps, self.batch, self.micro, self.accumulate, self.rank = steps, batch, micro, accumulate, rank
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
    """Rows in training order, from the row `first` of that order on; fetched a batch at a time."""

    def __init__(self, rows: Rows, seed: int, total: int, first: int = 0) -> None:
        self.rows, self.order, self.total, self.first = rows, Order(rows.num_rows, seed), total, first

    def __len__(self) -> int:
        return self.total

    def __getitems__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        return to_tensors(
            self.rows.batch(self.order.rows(self.first + positions[0], self.first + positions[-1] + 1))
        )  # they are consecutive


def to_tensors(batch: Any) -> dict[str, torch.Tensor]:
    """A batch of rows as the arguments of `PHFModel.forward`."""
    return {
        "input_ids": torch.from_numpy(batch.input_BT),
        "targets": torch.from_numpy(batch.target_BT),
        "scores": torch.from_numpy(batch.score_BT),
        "mask": torch.from_numpy(batch.mask_BT),
    }


class PHFTrainer(Trainer):
    """The Trainer with our rows, our denominators, the inner LM in `from_pretrained` form and marked checkpoints."""

    def __init__(
        self,
        model: PHFModel,
        rows: TrainingRows,
        sampler: RowBatches,
        tokenizer: Any,
        keep: int,
        milestones: set[int],
        seen: Callable[[int], int],
        record: Record,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, train_dataset=rows, **kwargs)
        self.record = record
        self.wrapper, self.rows, self.sampler, self.text_tokenizer, self.keep = model, rows, sampler, tokenizer, keep
        self.folder, self.milestones, self.seen = Path(kwargs["args"].output_dir), milestones, seen
        self.loss_is_scaled_for_ga = True  # we divide by the targets of the whole accumulated batch
        self.sums: dict[str, torch.Tensor] = {}
        self.sharded = sharding.is_sharded(model)
        if self.sharded:  # averages gradients over processes itself
            self.accelerator.prepare_model = lambda model, **kwargs: model

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if not sharding.is_sharded(model):  # else it is there
            super()._move_model_to_device(model, device)

    # data
    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.rows,
            batch_sampler=self.sampler,
            collate_fn=_identity,
            num_workers=(workers := self.args.dataloader_num_workers),
            prefetch_factor=max(2, self.args.gradient_accumulation_steps) if workers else None,  # a step takes so many
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else the loader would draw from the global stream, once more after a resume
        )

    def _prepare_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """To the device, while it computes: batches lie in pinned memory where there is a GPU."""
        return {name: value.to(self.args.device, non_blocking=True) for name, value in inputs.items()}

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if not batch_samples:
            return None
        counted = torch.stack(
            [self.wrapper.objective.counted(b["scores"], b["mask"]).sum() for b in batch_samples]
        ).sum()
        counted = counted.to(device, non_blocking=True)
        if self.args.world_size > 1:
            counted = self.accelerator.gather(counted.reshape(1)).sum()
        return counted.clamp(min=1)

    # loss
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # DDP averages gradients over processes, and the denominator is that of all of them
        out = model(**inputs, denominator=num_items_in_batch / self.args.world_size)
        sums = out["metrics"] | {"loss": out["loss"].detach().double() / self.args.world_size}
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double()
        return out["loss"]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called once a step, before the update: the only place where a GPU is waited for."""
        # the norm first: what is not finite in one process makes the norm so in all, and all stop
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if self.sharded else norm
        self._check_finite("loss", self.sums["loss"].item())  # one that is not finite makes the sum so
        self._check_finite("norm of the gradient", norm)
        return norm

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            process = f", process {self.args.process_index}" if self.args.world_size > 1 else ""
            raise TrainingError(
                f"the {what} is {value} at step {self.state.global_step + 1}{process} (lr {self._get_learning_rate():.3g}); the weights were "
                "not updated. Lower train.lr, look at the scores with extreme values, or use train.precision=fp32"
            )

    def sums_of_all(self) -> dict[str, float]:
        """Metric sums since the last line of metrics, over all processes."""
        names = sorted(self.sums)
        if not names:
            return {}
        values = torch.stack([self.sums[n] for n in names])
        if self.args.world_size > 1:
            values = self.accelerator.reduce(values, "sum")
        return dict(zip(names, values.tolist(), strict=True))

    def go_on_from(self, checkpoint: Path) -> None:
        """Take up rows and metrics where a checkpoint left them, so that the next line is that of a run that did not stop."""
        mark = store.read_json(checkpoint / COMPLETE)
        since = mark.get("since_line", {"steps": 0, "seconds": 0.0, "sums": {}})
        first = self.args.process_index == 0  # sums are of all processes already
        self.sums = {
            name: torch.tensor(
                (math.nan if value is None else value) if first else 0.0, dtype=torch.float64, device=self.args.device
            )
            for name, value in since["sums"].items()
        }
        self.record.last_step, self.record.seconds = mark["step"] - since["steps"], since["seconds"]
        self.sampler.start = mark["step"]

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.callback_handler.model = self.wrapper.lm  # callbacks know LMs, not our wrapper
        return prepared

    # checkpoints
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        cut = self.rows.rows.tokens.manifest.get("segmenter")
        folder = Path(output_dir) if output_dir else self.folder
        tokens = self.seen(self.state.global_step)
        save_model(self.wrapper, self.text_tokenizer, folder, cut, tokens, self.args.should_save)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        optimizer, scheduler = self._inner()
        state = sharding.optimizer_state(optimizer, keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        optimizer, scheduler = self._inner()
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
        sharding.load_optimizer_state(optimizer, state)
        scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _inner(self) -> tuple[Any, Any]:
        """torch's optimizer and its scheduler, without accelerate around it."""
        optimizer: Any = self.optimizer
        return optimizer.optimizer, self.lr_scheduler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder, step = self.folder / f"checkpoint-{self.state.global_step}", self.state.global_step
        since = {
            "steps": step - self.record.last_step,
            "seconds": self.record.seconds,
            "sums": self.sums_of_all(),
        }
        with saying_if_full(self.folder):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            store.write_json(folder / COMPLETE, {"step": step, "tokens": self.seen(step), "since_line": since})
            passing = [c for c in complete_checkpoints(self.folder) if _step_of(c) not in self.milestones]
            for old in passing[: -self.keep]:
                (old / COMPLETE).unlink()
                shutil.rmtree(old)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.sharded:  # else they were loaded before
            load_lm_weights(self.wrapper.lm, resume_from_checkpoint)
            self.wrapper.load_value_head(resume_from_checkpoint)


def _identity(batch: Any) -> Any:
    return batch


def save_model(
    wrapper: PHFModel,
    tokenizer: Any,
    folder: Path,
    segmenter: dict[str, Any] | None,
    tokens: int,
    writer: bool = True,
) -> None:
    """The LM as `from_pretrained` wants it, with its tokenizer, the value head beside it, and a card: what was learned, how
    texts were cut into the segments that are tokenised by themselves, and how many target `tokens` were seen. Called on
    all processes; `writer`: the one that writes."""
    state = sharding.state_of(wrapper, keep=writer)
    if not writer:
        return
    parts = {
        prefix: {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        for prefix in ("lm.", "value_head.")
    }
    save_lm(wrapper.lm, folder, parts["lm."])
    save_tokenizer(tokenizer, folder)
    wrapper.save_value_head(folder, parts["value_head."])
    roles = dict(zip(("good", "bad"), wrapper.objective.control_tokens, strict=False))
    card = {"objective": to_plain(wrapper.objective), "control_tokens": roles, "segmenter": segmenter, "tokens": tokens}
    store.write_json(folder / MODEL_CARD, card)


class SaveAt(TrainerCallback):
    def __init__(self, steps: set[int]) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_save |= state.global_step in self.steps
        return control


class StopAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step >= self.steps:
            control.should_save = True
            control.should_training_stop = True
        return control
