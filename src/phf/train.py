"""Training: rows through a model, by a small subclass of the Hugging Face Trainer. Floor 4.

    phf train tokens/ runs/conditional recipe.yaml objective.name=conditional

    run/  config.yaml (resolved)   metrics.jsonl   checkpoints/checkpoint-<step>/   model/   manifest.json

`model/` and every checkpoint load with plain `from_pretrained`. A checkpoint without its `complete.json` does not
exist: it is removed and training goes on from the one before. Resuming gives the same bytes as not stopping, on the
same machine, versions and number of threads. Budgets are in target tokens; the effective batch is in rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import transformers
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments

from phf import store
from phf.config import STRICT, ConfigError, did_you_mean, dump_yaml, to_plain
from phf.device import has_quick_bf16, pick_device
from phf.fused import check_objective
from phf.model import (
    MODEL_CARD,
    FromConfig,
    FromWeights,
    PHFModel,
    add_control_embeddings,
    build_lm,
    load_lm_weights,
    model_folder,
    num_parameters,
    save_lm,
    tokens_seen,
)
from phf.objectives import Objective
from phf.packing import Order, Rows
from phf.tokens import TokenStore

COMPLETE = "complete.json"


class TrainingError(RuntimeError):
    """Training cannot go on."""


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """How to train. `tokens` is the budget of targets; it is rounded up to whole steps of `batch_rows` x `context`."""

    tokens: Annotated[float, Field(gt=0)]
    scores: str | None = None
    """Whose scores the objective sees, where the token store holds several; None: the scored corpus's own."""
    context: Annotated[int, Field(gt=0)] = 1024
    batch_rows: Annotated[int, Field(gt=0)] = 64
    micro_rows: Annotated[int, Field(gt=0)] | None = None
    """Rows at a time on one device; None: as many as its share of the batch, at most 32."""
    lr: Annotated[float, Field(gt=0)] = 5e-4
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of the steps with rising learning rate."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    """wsd only: share of the steps with falling learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient; 0: no clipping."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the processor has it, else float32."""
    compile: bool = False
    attention: Literal["sdpa", "eager"] = "sdpa"
    save_every: Annotated[float, Field(gt=0)] | None = None
    """Tokens between checkpoints; None: only at the end."""
    keep: Annotated[int, Field(gt=0)] = 2
    """Checkpoints kept, the newest."""
    milestones: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Tokens at which a checkpoint is made and kept for good."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    log_every: Annotated[int, Field(gt=0)] = 10
    """Steps between lines of metrics.jsonl."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that make rows beside training; 0: in the training process (making rows takes under 2% of a step)."""
    chunk: Annotated[int, Field(gt=0)] | None = None
    """Targets at a time in the loss; None: chosen by vocabulary size."""
    report_to: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / (self.batch_rows * self.context))

    @property
    def milestone_steps(self) -> set[int]:
        return {min(max(round(m / (self.batch_rows * self.context)), 1), self.steps) for m in self.milestones}

    @property
    def total_tokens(self) -> int:
        return self.steps * self.batch_rows * self.context


def tune_allocator() -> None:
    """Keep freed memory instead of giving every large tensor back to the kernel (glibc on Linux; elsewhere nothing).

    Page faults otherwise cost a quarter to a third of a CPU training step.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_mmap_max = -1, -4
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


def pick_precision(precision: str) -> torch.dtype | None:
    """The autocast type: bfloat16 or None. Never float16: on a CPU it is slower than float32."""
    if precision == "fp32":
        return None
    if precision == "bf16":
        return torch.bfloat16
    return torch.bfloat16 if has_quick_bf16(pick_device()) else None


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """The same bytes from the same run, on a CPU: a compiled embedding's gradient is otherwise added up in whatever
    order the threads come. Costs nothing measurable. (On a GPU it would cost speed, and is left as it is.)"""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    if not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


def can_compile() -> bool:
    """Whether torch.compile works here: on a CPU it needs a C++ compiler and Python's headers. Says so if not."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(4))
    except Exception as error:  # whatever is missing, the uncompiled model gives the same result, slower
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        print(
            f"note: training uncompiled and so slower, since torch.compile does not work here: {reason}",
            file=sys.stderr,
        )
        return False
    return True


def micro_batch(config: TrainConfig, world: int) -> tuple[int, int]:
    """(rows at a time, accumulation steps) whose product over `world` processes is exactly the batch."""
    share, rest = divmod(config.batch_rows, world)
    if rest or share == 0:
        near = ", ".join(str(world * k) for k in sorted({max(share, 1), share + 1}))
        raise ConfigError(f"train.batch_rows={config.batch_rows} does not divide over {world} processes; {near} would")
    if config.micro_rows is not None:
        if share % config.micro_rows:
            divisors = [d for d in range(1, share + 1) if share % d == 0]
            raise ConfigError(
                f"train.micro_rows={config.micro_rows} does not divide {share} rows a process; one of {divisors} would"
            )
        return config.micro_rows, share // config.micro_rows
    rows = next(d for d in range(min(share, 32), 0, -1) if share % d == 0)
    return rows, share // rows


class _RowBatches(Sampler[list[int]]):
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


class _TrainingRows(torch.utils.data.Dataset[Any]):
    """Rows in training order; fetched a batch at a time."""

    def __init__(self, rows: Rows, seed: int, total: int) -> None:
        self.rows, self.order, self.total = rows, Order(rows.num_rows, seed), total

    def __len__(self) -> int:
        return self.total

    def __getitems__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        return to_tensors(self.rows.batch(self.order.rows(positions[0], positions[-1] + 1)))  # they are consecutive


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
        rows: _TrainingRows,
        sampler: _RowBatches,
        tokenizer: Any,
        keep: int,
        milestones: set[int],
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, train_dataset=rows, **kwargs)
        self.wrapper, self.rows, self.sampler, self.text_tokenizer, self.keep = model, rows, sampler, tokenizer, keep
        self.folder, self.milestones = Path(kwargs["args"].output_dir), milestones
        self.loss_is_scaled_for_ga = True  # we divide by the targets of the whole accumulated batch
        self.sums: dict[str, torch.Tensor] = {}

    # data
    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.rows,
            batch_sampler=self.sampler,
            collate_fn=_identity,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else the loader would draw from the global stream, once more after a resume
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if not batch_samples:
            return None
        counted = torch.stack(
            [self.wrapper.objective.counted(b["scores"], b["mask"]).sum() for b in batch_samples]
        ).sum()
        counted = counted.to(device)
        if self.args.world_size > 1:
            counted = self.accelerator.gather(counted.reshape(1)).sum()
        return counted.clamp(min=1)

    # loss
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        out = model(**inputs, denominator=num_items_in_batch)
        for name, value in out["metrics"].items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double()
        loss = out["loss"]
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1} (lr {self._get_learning_rate():.3g}); the weights were not "
                "updated. Lower train.lr, look at the scores with extreme values, or use train.precision=fp32"
            )
        return loss * self.args.world_size  # DDP averages gradients over processes; the denominator is global already

    def take_sums(self) -> dict[str, float]:
        """Metric sums since the last call, over all processes."""
        names = sorted(self.sums)
        if not names:
            return {}
        values = torch.stack([self.sums[n] for n in names])
        if self.args.world_size > 1:
            values = self.accelerator.reduce(values, "sum")
        self.sums = {}
        return dict(zip(names, values.tolist(), strict=True))

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.callback_handler.model = self.wrapper.lm  # callbacks know LMs, not our wrapper
        return prepared

    # checkpoints
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_model(self.wrapper, self.text_tokenizer, Path(output_dir) if output_dir else self.folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = self.folder / f"checkpoint-{self.state.global_step}"
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            store.write_json(folder / COMPLETE, {"step": self.state.global_step})
            passing = [c for c in complete_checkpoints(self.folder) if _step_of(c) not in self.milestones]
            for old in passing[: -self.keep]:
                (old / COMPLETE).unlink()
                shutil.rmtree(old)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_lm_weights(self.wrapper.lm, resume_from_checkpoint)
        self.wrapper.load_value_head(resume_from_checkpoint)


def _identity(batch: Any) -> Any:
    return batch


def save_model(wrapper: PHFModel, tokenizer: Any, folder: Path) -> None:
    """The LM as `from_pretrained` wants it, with its tokenizer, and the value head beside it."""
    save_lm(wrapper.lm, folder)
    tokenizer.save_pretrained(folder)
    wrapper.save_value_head(folder)
    roles = dict(zip(("good", "bad"), wrapper.objective.control_tokens, strict=False))
    store.write_json(folder / MODEL_CARD, {"objective": to_plain(wrapper.objective), "control_tokens": roles})


def complete_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if (p / COMPLETE).exists()]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one that a full disk or a power cut tore is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def training_seconds(lines: Sequence[dict[str, Any]]) -> float:
    """Time spent in training steps, over all the legs of a run that was interrupted."""
    before = [0, *(line["tokens"] for line in lines)]
    return float(
        sum((x["tokens"] - b) / x["tokens_per_s"] for x, b in zip(lines, before, strict=False) if x["tokens_per_s"])
    )


class _Record(TrainerCallback):
    """metrics.jsonl and the progress bar."""

    def __init__(self, path: Path, config: TrainConfig, params: int, writer: bool) -> None:
        self.path, self.config, self.params, self.writer = path, config, params, writer
        self.trainer: PHFTrainer | None = None
        self.bar: Any = None
        self.last = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.writer:
            lines = read_metrics(self.path) if self.path.exists() else []
            kept = [json.dumps(line) for line in lines if line["step"] <= state.global_step]
            store.write_text(self.path, "".join(line + "\n" for line in kept))
            self.bar = tqdm(total=self.config.total_tokens, initial=state.global_step * self._step_tokens, desc="training", unit="tok",
                            unit_scale=True, disable=None, file=sys.stderr)  # fmt: skip
        self.last = (time.perf_counter(), state.global_step)

    @property
    def _step_tokens(self) -> int:
        return self.config.batch_rows * self.config.context

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step / self.config.steps  # the Trainer's own count starts anew after a resume
        if self.bar is not None:
            self.bar.update(self._step_tokens)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        assert self.trainer is not None
        sums = self.trainer.take_sums()
        now, step = time.perf_counter(), state.global_step
        seconds, steps = now - self.last[0], step - self.last[1]
        self.last = (now, step)
        line: dict[str, Any] = {
            "step": step,
            "tokens": step * self._step_tokens,
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
        }
        line["grad_norm"] = float(logs["grad_norm"]) if "grad_norm" in logs else None
        counted = sums.pop("counted", 0.0)
        push, push_bad = sums.pop("push", 0.0), sums.pop("push_bad", 0.0)
        line["bad_gradient_share"] = push_bad / push if push else None
        line |= _correlation(sums, counted)
        targets = sums.pop("targets", 0.0)
        line["counted_share"] = counted / targets if targets else None
        weight, weight_sq = sums.pop("weight", None), sums.pop("weight_sq", None)
        if weight is not None and weight_sq:
            line["weight_mean"] = weight / counted
            line["effective_sample_share"] = weight**2 / (counted * weight_sq)
        line |= {name: value / counted for name, value in sums.items() if counted}
        line["expected_loss"] = chinchilla_loss(self.params, max(line["tokens"], 1))
        line["model_tflops"] = 6 * self.params * steps * self._step_tokens / seconds / 1e12 if seconds > 0 else None
        line["tokens_per_s"] = steps * self._step_tokens / seconds if seconds > 0 else None
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
        if self.writer:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(store.jsonable(line)) + "\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def _correlation(sums: dict[str, float], count: float) -> dict[str, float]:
    """Correlation of predicted value and reward over counted targets, from AWR's sums (taken out of `sums`)."""
    names = ("value", "value_sq", "reward", "reward_sq", "value_reward")
    if names[0] not in sums:
        return {}
    v, vv, r, rr, vr = (sums.pop(n) / count for n in names)
    spread = (vv - v * v) * (rr - r * r)
    return {"value_correlation": (vr - v * r) / math.sqrt(spread)} if spread > 0 else {}


def chinchilla_loss(params: int, tokens: int) -> float:
    """Expected loss in nats a token, 1.69 + 406.4 N^-0.34 + 410.7 D^-0.28 (Hoffmann et al. 2022, equation 10)."""
    return float(1.69 + 406.4 * params**-0.34 + 410.7 * tokens**-0.28)


def train(
    tokens_dir: str | Path,
    out: str | Path,
    model: FromConfig | FromWeights,
    objective: Objective,
    config: TrainConfig,
    seed: int = 0,
    stop_after: int | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> dict[str, Any]:
    """Train and return the run's manifest. Done already: returns at once; interrupted before: goes on from there.

    `stop_after`: stop after that many steps with a checkpoint (for tests and time-limited jobs); the run is then not
    finished. `callbacks` are handed the inner LM.
    """
    tokens = TokenStore.open(tokens_dir, config.scores)
    out = Path(out)
    objective = objective.fit(tokens.table)
    if type(objective).__module__ != "phf.objectives":
        check_objective(objective)
    resolved = {
        "model": to_plain(model),
        "objective": to_plain(objective),
        "train": to_plain(config),
        "seed": seed,
        "tokens": str(tokens_dir),
    }
    start_weights = store.path_hash(model_folder(model.path)) if isinstance(model, FromWeights) else None
    key = store.fingerprint(
        [
            {k: v for k, v in resolved.items() if k != "tokens"},
            tokens.manifest["content"],
            start_weights,
            _code_of(objective),
            "train/1",
        ]
    )
    if store.is_done(out, key):
        return store.read_manifest(out, "train")
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    known = get_available_reporting_integrations()
    for tracker in config.report_to:
        if tracker not in known:
            raise ConfigError(
                f"train.report_to: {tracker!r} is not installed or not known here{did_you_mean(tracker, known)}"
            )
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    micro, accumulate = micro_batch(config, world)
    tune_allocator()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)

    tokenizer = tokens.tokenizer
    lm = build_lm(model, tokenizer, seed, config.attention, config.context)
    control_ids = add_control_embeddings(lm, tokenizer, objective.control_tokens, seed)
    lm.generation_config.eos_token_id = tokenizer.eos_token_id
    edit = objective.edit(tokens.table, seed)
    digest = hashlib.blake2b(digest_size=16)
    for part in (edit.keep_D, edit.control_S):
        digest.update(b"-" if part is None else part.tobytes())
    index = tokens.path / "cache" / f"{store.fingerprint([tokens.manifest['content'], digest.hexdigest()])}.npy"
    rows = Rows(tokens, edit, config.context, control_ids, index_file=index)
    if config.gradient_checkpointing:
        lm.activation_checkpointing_enable()
    compiled = config.compile and can_compile()
    wrapper = PHFModel(lm, objective, pick_precision(config.precision), compiled, config.chunk)
    params = num_parameters(lm)

    if rank == 0:
        mark = store.read_json(out / ".started.json") if (out / ".started.json").exists() else None
        if mark is not None and mark["stage"] == "train" and mark["key"] != key:
            set_aside(out)
        store.begin(out, "train", key)
        store.write_text(out / "config.yaml", dump_yaml(resolved))
        for folder in (out / "checkpoints").glob("checkpoint-*"):
            if not (folder / COMPLETE).exists():
                shutil.rmtree(folder)
    save_steps = (
        config.steps
        if config.save_every is None
        else max(round(config.save_every / (config.batch_rows * config.context)), 1)
    )
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=config.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulate,
        learning_rate=config.lr,
        lr_scheduler_type={
            "linear": "linear",
            "cosine": "cosine",
            "constant": "constant_with_warmup",
            "wsd": "warmup_stable_decay",
        }[config.schedule],
        lr_scheduler_kwargs={"num_decay_steps": max(round(config.decay * config.steps), 1)}
        if config.schedule == "wsd"
        else {},
        warmup_steps=round(config.warmup * config.steps),
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        max_grad_norm=config.clip,
        optim="adamw_torch_fused",
        logging_steps=min(config.log_every, config.steps),
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=save_steps,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        ignore_data_skip=True,
        remove_unused_columns=False,
        label_names=[],
        dataloader_num_workers=config.workers,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to=list(config.report_to) or "none",
    )
    if arguments.n_gpu > 1:
        print("note: one GPU is used; for all of them start this command with torchrun", file=sys.stderr)
        arguments._n_gpu = 1
    record = _Record(out / "metrics.jsonl", config, params, rank == 0)
    sampler = _RowBatches(config.steps, config.batch_rows, micro, accumulate, rank)
    data = _TrainingRows(rows, seed, config.steps * config.batch_rows)
    trainer = PHFTrainer(
        wrapper,
        data,
        sampler,
        tokenizer,
        config.keep,
        config.milestone_steps,
        args=arguments,
        callbacks=[record, *callbacks],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    record.trainer = trainer
    if config.milestones:
        trainer.add_callback(_SaveAt(config.milestone_steps))
    if stop_after is not None:
        trainer.add_callback(_StopAfter(stop_after))
    resume = complete_checkpoints(out / "checkpoints")
    if rank == 0:
        check_environment(out / "environment.json", bool(resume), compiled)
    if resume:
        sampler.start = store.read_json(resume[-1] / COMPLETE)["step"]
    if sampler.start < config.steps:
        with deterministic():
            trainer.train(resume_from_checkpoint=str(resume[-1]) if resume else None)
    else:
        trainer._load_from_checkpoint(str(resume[-1]))
    if stop_after is not None and trainer.state.global_step < config.steps:
        return {"stage": "train", "step": trainer.state.global_step}
    trainer.accelerator.wait_for_everyone()
    if rank != 0:
        return {}
    save_model(wrapper, tokenizer, out / "model")
    return store.finish(
        out,
        "train",
        key,
        objective=to_plain(objective),
        model=to_plain(model),
        train=to_plain(config),
        seed=seed,
        tokens_dir=str(tokens_dir),
        tokens_content=tokens.manifest["content"],
        identity=tokens.manifest["identity"],
        control_tokens=list(objective.control_tokens),
        parameters=params,
        counts={
            "tokens": config.total_tokens,
            "tokens_before": tokens_seen(model.path) if isinstance(model, FromWeights) else 0,
            "steps": config.steps,
            "rows": rows.num_rows,
            "stream_tokens": rows.num_tokens,
            "epochs": config.steps * config.batch_rows / rows.num_rows,
            "text_tokens": text_tokens(rows, config.total_tokens),
        },
        seconds=training_seconds(read_metrics(out / "metrics.jsonl")),
        threads=torch.get_num_threads(),
        precision="bf16" if wrapper.autocast_dtype is not None else "fp32",
    )


def _code_of(objective: Objective) -> str:
    """What an objective does beyond its settings: its class and, for one that is not ours, its source."""
    cls = type(objective)
    if cls.__module__ == "phf.objectives":
        return cls.__name__
    try:
        return f"{cls.__module__}.{cls.__qualname__}\n{inspect.getsource(cls)}"
    except (OSError, TypeError):
        return f"{cls.__module__}.{cls.__qualname__}"


def check_environment(path: Path, resuming: bool, compiled: bool) -> None:
    """Record what the run's bytes depend on; warn where a run goes on under something else."""
    now = {
        "versions": store.versions(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "compiled": compiled,
    }
    before = store.read_json(path) if resuming and path.exists() else now
    differs = [f"{k} was {before.get(k)}, is {v}" for k, v in now.items() if before.get(k) != v]
    if differs:
        print(
            f"warning: going on under other conditions, so not to the same bytes: {'; '.join(differs)}", file=sys.stderr
        )
    if before is now or not path.exists():
        store.write_json(path, now)


def text_tokens(rows: Rows, targets: int) -> int:
    """How many of `targets` targets are text: control and end-of-text tokens aside, at the stream's own share of them."""
    lengths = np.diff(np.asarray(rows.ends_S), prepend=0)
    kept = lengths > 0
    text = np.diff(rows.tokens.seg_ends, prepend=0)[kept].sum()
    return round(targets * float(text) / max(rows.num_tokens, 1))


class _SaveAt(TrainerCallback):
    def __init__(self, steps: set[int]) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_save |= state.global_step in self.steps
        return control


class _StopAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step >= self.steps:
            control.should_save = True
            control.should_training_stop = True
        return control


def set_aside(folder: Path) -> Path:
    """Rename a run that other settings made, so that nothing trained is ever deleted."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside
