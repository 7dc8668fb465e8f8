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
import logging
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import transformers
from pydantic import Field
from pydantic.dataclasses import dataclass
from transformers import TrainerCallback, TrainingArguments

from phf.core import store
from phf.core.config import STRICT, ConfigError, did_you_mean, dump_yaml, read_yaml, to_plain
from phf.core.device import peak_flops, pick_device, pick_precision, tune_allocator
from phf.core.runs import COMPLETE, complete_checkpoints, read_metrics, tokens_seen, weights_mark
from phf.objectives import Objective
from phf.tokens.rows import Rows
from phf.tokens.store import TokenStore
from phf.training.fsdp import shard
from phf.training.fused import check_objective
from phf.training.lm import (
    FromConfig,
    FromWeights,
    add_control_embeddings,
    build_lm,
    flops_per_token,
    load_lm_weights,
    num_parameters,
    set_attention,
)
from phf.training.metrics import Record, Resume, training_seconds
from phf.training.model import PHFModel, trained_control_tokens, trained_value_head
from phf.training.trainer import (
    PHFTrainer,
    RowBatches,
    SaveAt,
    StopAfter,
    TrainingError,
    TrainingRows,
    save_model,
    saying_if_full,
)


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
    warmup: Annotated[float, Field(ge=0)] = 0.01
    """Tokens with rising learning rate or, up to 1, their share of the budget."""
    decay: Annotated[float, Field(gt=0)] = 0.2
    """wsd only: tokens with falling learning rate or, up to 1, their share of the budget; at most what the warm-up leaves."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient; 0: no clipping."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the processor has it, else float32."""
    compile: bool | Literal["auto"] = "auto"
    """auto: in runs so long that it pays (`COMPILE_FROM`)."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """auto: torch's fused attention (transformers' "sdpa") without a mask and, in bfloat16 on a CPU, our own in blocks
    (`phf.attention`), where the model knows "sdpa"; else transformers' choice for the model."""
    save_every: Annotated[float, Field(gt=0)] | None = None
    """Tokens between checkpoints or, up to 1, their share of the budget; None: ten minutes of training between them. And
    one at the end."""
    keep: Annotated[int, Field(gt=0)] = 2
    """Checkpoints kept, the newest."""
    skip_tokens: Annotated[float, Field(ge=0)] = 0
    """Targets at the start of the order of the data that are left out: when finetuning, those that the weights have seen. The
    order is that of this run's own rows, so it goes on exactly where both objectives make the same rows."""
    milestones: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Tokens at which a checkpoint is made and kept for good, or, up to 1, shares of the budget; what lies behind the
    budget is its end."""
    shard: bool = False
    """Divide weights, gradients and optimizer state over the processes (FSDP2), for models that are too large for one
    device's memory; under torchrun or accelerate launch."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    log_every: Annotated[int, Field(gt=0)] = 10
    """Steps between lines of metrics.jsonl."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that make rows beside training; 0: in the training process. None: one beside a GPU, else 0 (making rows takes
    under 2% of a step on a CPU)."""
    chunk: Annotated[int, Field(gt=0)] | None = None
    """Targets at a time in the loss; None: chosen by vocabulary size."""
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"the learning rate rises for {self.warmup_steps} steps, but tokens={self.tokens:g} are {self.steps} steps of "
                f"{self.batch_rows} x {self.context}; lower warmup, in tokens or as a share of them"
            )

    @property
    def step_tokens(self) -> int:
        return self.batch_rows * self.context

    def _steps_of(self, tokens: float) -> int:
        return round(tokens * self.steps if tokens <= 1 else tokens / self.step_tokens)

    @property
    def warmup_steps(self) -> int:
        return self._steps_of(self.warmup)

    @property
    def decay_steps(self) -> int:
        return max(min(self._steps_of(self.decay), self.steps - self.warmup_steps), 1)

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.step_tokens)

    @property
    def milestone_steps(self) -> set[int]:
        return {min(max(self._steps_of(m), 1), self.steps) for m in self.milestones}

    @property
    def save_steps(self) -> int:
        return self.steps if self.save_every is None else max(self._steps_of(self.save_every), 1)

    @property
    def total_tokens(self) -> int:
        return self.steps * self.step_tokens


FREE = ("micro_rows", "save_every", "keep", "log_every", "workers", "report_to", "shard")
"""Settings that may change when a run goes on: the objective, the rows and their order do not depend on them."""


COMPILE_FROM = {"cpu": 5e13, "cuda": 2e16}
"""Floating-point operations (6 x parameters x tokens) of a run from which compiling pays: on a CPU it takes 10 to 30
seconds and saves a fifth of a small Llama's steps, a twentieth of a GPT-2's; on a GPU such a run takes a minute."""


def pick_compile(config: TrainConfig, params: int) -> bool:
    """Whether to compile a model with so many parameters. By the run's length, not by a clock: the same run, the same bytes."""
    if config.compile != "auto":
        return config.compile
    device = "cuda" if pick_device().startswith("cuda") else "cpu"
    return 6.0 * params * config.total_tokens >= COMPILE_FROM[device]


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """The same bytes from the same run, on a CPU: a compiled embedding's gradient is otherwise added up in whatever
    order the threads come. Costs nothing measurable. (On a GPU it would cost speed, and is left as it is.)"""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = settings.fill_uninitialized_memory
    if not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filled


def can_compile() -> bool:
    """Whether torch.compile works here: on a CPU it needs a C++ compiler and Python's headers. Says so if not."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(4, device=pick_device()))
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
    if type(objective).__module__ != "phf.objectives.paper":
        check_objective(objective)
    value_head = trained_value_head(model.path, objective) if isinstance(model, FromWeights) else None
    key = run_key(tokens, model, objective, config, seed, value_head)
    if store.is_done(out, key):
        return store.read_manifest(out, "train")
    check_surroundings(config, judged=bool(callbacks))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    micro, accumulate = micro_batch(config, world)
    tune_allocator()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)

    tokenizer = tokens.tokenizer
    lm, control_ids = make_lm(model, objective, tokenizer, config, seed)
    rows = make_rows(tokens, objective, config, seed, control_ids)
    compiled = pick_compile(config, num_parameters(lm)) and can_compile()
    wrapper = PHFModel(
        lm,
        objective,
        pick_precision(config.precision),
        compiled and not config.shard,
        config.chunk,
        quick_attention=config.attention == "auto",
    )
    if value_head is not None:
        wrapper.load_value_head(value_head.parent)
    params = num_parameters(lm)

    if rank == 0:
        described = {
            "model": to_plain(model),
            "objective": to_plain(objective),
            "train": to_plain(config),
            "seed": seed,
            "tokens": str(tokens_dir),
        }
        begin_run(out, key, described)
    arguments = trainer_arguments(config, out / "checkpoints", micro, accumulate, seed, judged=bool(callbacks))
    resume = checkpoint_of_all(out / "checkpoints", arguments.device)
    if config.shard:
        if resume is not None:
            load_lm_weights(lm, resume)
            wrapper.load_value_head(resume)
        shard(wrapper, arguments.device, compiled)
        wrapper.compiled = compiled  # of the loss
    tokens_before = tokens_seen(model.path) if isinstance(model, FromWeights) else 0
    record = Record(
        out / "metrics.jsonl",
        config.steps,
        config.step_tokens,
        params,
        flops_per_token(lm, config.context),
        peak_flops(wrapper.autocast_dtype, world) if rank == 0 else None,
        rank == 0,
        tokens_before,
        saves=config.save_every is None,
    )
    sampler = RowBatches(config.steps, config.batch_rows, micro, accumulate, rank)
    data = TrainingRows(
        rows, seed, config.steps * config.batch_rows, first=math.ceil(config.skip_tokens / config.context)
    )
    trainer = PHFTrainer(
        wrapper,
        data,
        sampler,
        tokenizer,
        config.keep,
        config.milestone_steps,
        lambda step: tokens_before + step * config.step_tokens,
        record,
        args=arguments,
        callbacks=[*callbacks, Resume(record)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.callback_handler.callbacks.insert(0, record)
    record.trainer = trainer
    if config.milestones:
        trainer.add_callback(SaveAt(config.milestone_steps))
    if stop_after is not None:
        trainer.add_callback(StopAfter(stop_after))
    if rank == 0:
        check_environment(out / "environment.json", resume is not None, compiled, wrapper.autocast_dtype, micro)
    if resume is not None:
        trainer.go_on_from(resume)
    if sampler.start < config.steps:
        with deterministic():
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    else:
        trainer._load_from_checkpoint(str(resume))
    if stop_after is not None and max(trainer.state.global_step, sampler.start) < config.steps:
        return {"stage": "train", "step": trainer.state.global_step}
    trainer.accelerator.wait_for_everyone()
    cut, seen = tokens.manifest.get("segmenter"), tokens_before + config.total_tokens
    with saying_if_full(out):
        save_model(wrapper, tokenizer, out / "model", cut, seen, writer=rank == 0)
    if rank != 0:
        return {}
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
            "tokens_before": tokens_before,
            "steps": config.steps,
            "rows": rows.num_rows,
            "stream_tokens": rows.num_tokens,
            "epochs": config.steps * config.batch_rows / rows.num_rows,
            "text_tokens": text_tokens(rows, config.total_tokens),
        },
        seconds=training_seconds(read_metrics(out / "metrics.jsonl")),
        threads=torch.get_num_threads(),
        precision=_name_of(wrapper.autocast_dtype),
    )


def _name_of(precision: torch.dtype | None) -> str:
    return "fp32" if precision is None else "bf16"


def run_key(
    tokens: TokenStore,
    model: FromConfig | FromWeights,
    objective: Objective,
    config: TrainConfig,
    seed: int,
    value_head: Path | None,
) -> str:
    """What decides the bytes of a run, wherever its weights and its data lie."""
    start = weights_mark(model.path) if isinstance(model, FromWeights) else None
    decides = {
        "model": {k: v for k, v in to_plain(model).items() if v != {} and (start is None or k != "path")},
        "objective": to_plain(objective),
        "train": {k: v for k, v in to_plain(config).items() if k not in FREE},
        "seed": seed,
    }
    head = value_head and store.file_hash(value_head)
    return store.fingerprint([decides, tokens.manifest["content"], start, head, _code_of(objective), "train/3"])


def check_surroundings(config: TrainConfig, judged: bool) -> None:
    """Raise ConfigError for a tracker that is not there, and for a way of starting that `config` cannot be run in."""
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    known = get_available_reporting_integrations()
    for tracker in config.report_to:
        if tracker not in known:
            raise ConfigError(
                f"train.report_to: {tracker!r} is not installed or not known here{did_you_mean(tracker, known)}"
            )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        raise ConfigError(
            "accelerate asks for its FSDP; ask accelerate launch for plain data-parallel training (--multi_gpu), or use torchrun, and set "
            "train.shard=true: phf shards, saves and resumes by itself (docs/scaling.md)"
        )
    if config.shard and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "train.shard divides a model over processes: start this command with torchrun (docs/scaling.md)"
        )
    if config.shard and judged:
        raise ConfigError(
            "train.shard: judging while training needs the whole model on one process; leave during out and judge the "
            "checkpoints (train.milestones) with phf eval"
        )


def make_lm(
    model: FromConfig | FromWeights, objective: Objective, tokenizer: Any, config: TrainConfig, seed: int
) -> tuple[Any, list[int]]:
    """The LM with the objective's control tokens, which `tokenizer` is given too (in place), and their ids."""
    lm = build_lm(model, tokenizer, seed, config.context)
    trained = trained_control_tokens(model.path) if isinstance(model, FromWeights) else {}
    control_ids = add_control_embeddings(lm, tokenizer, objective.control_tokens, seed, trained)
    lm.generation_config.eos_token_id = tokenizer.eos_token_id
    if config.gradient_checkpointing:
        lm.activation_checkpointing_enable()
    if config.attention != "auto":
        set_attention(lm, config.attention)
    return lm, control_ids


def make_rows(tokens: TokenStore, objective: Objective, config: TrainConfig, seed: int, control_ids: list[int]) -> Rows:
    """The rows that an objective makes of a token store; where they lie is kept beside it for the next run."""
    edit = objective.edit(tokens.table, seed)
    digest = hashlib.blake2b(digest_size=16)
    for part in (edit.keep_D, edit.control_S):
        digest.update(b"-" if part is None else part.tobytes())
    index = tokens.path / "cache" / f"{store.fingerprint([tokens.manifest['content'], digest.hexdigest()])}.npy"
    return Rows(tokens, edit, config.context, control_ids, index_file=index)


def begin_run(out: Path, key: str, described: dict[str, Any]) -> None:
    """Mark a run's folder as begun. What other settings made there is set aside; half-written checkpoints are removed."""
    mark = store.read_json(out / ".started.json") if (out / ".started.json").exists() else None
    if mark is not None and mark["stage"] == "train" and mark["key"] != key:
        before = read_yaml(out / "config.yaml") if (out / "config.yaml").exists() else {}
        changed = changed_settings(before, described) or ["the data, the weights or the code"]
        print(
            f"note: training anew, since {', '.join(changed)} changed; what was there is now {set_aside(out)}",
            file=sys.stderr,
        )
    store.begin(out, "train", key)
    store.write_text(out / "config.yaml", dump_yaml(described))
    for folder in (out / "checkpoints").glob("checkpoint-*"):
        if not (folder / COMPLETE).exists():
            shutil.rmtree(folder)


SCHEDULERS = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
    "wsd": "warmup_stable_decay",
}
"""transformers' names."""


def trainer_arguments(
    config: TrainConfig, folder: Path, micro: int, accumulate: int, seed: int, judged: bool
) -> TrainingArguments:
    """The Trainer's settings. `judged`: whether one process judges the model while the others wait."""
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulate,
        learning_rate=config.lr,
        lr_scheduler_type=SCHEDULERS[config.schedule],
        lr_scheduler_kwargs={"num_decay_steps": config.decay_steps} if config.schedule == "wsd" else {},
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        max_grad_norm=config.clip,
        optim="adamw_torch_fused",
        logging_steps=min(config.log_every, config.steps),
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_steps,
        seed=seed,
        use_cpu=not on_gpu,
        ignore_data_skip=True,
        remove_unused_columns=False,
        label_names=[],
        dataloader_num_workers=config.workers if config.workers is not None else int(on_gpu),
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        # others wait for the one that judges, or that writes a model too large for one device
        ddp_timeout=7 * 86_400 if judged else 4 * 3600 if config.shard else 1800,
        report_to=list(config.report_to) or "none",
    )
    if arguments.n_gpu > 1:
        print("note: one GPU is used; for all of them start this command with torchrun", file=sys.stderr)
        arguments._n_gpu = 1
    return arguments


def _code_of(objective: Objective) -> str:
    """What an objective does beyond its settings: its class and, for one that is not ours, its source."""
    cls = type(objective)
    if cls.__module__ == "phf.objectives.paper":
        return cls.__name__
    try:
        return f"{cls.__module__}.{cls.__qualname__}\n{inspect.getsource(cls)}"
    except (OSError, TypeError):
        return f"{cls.__module__}.{cls.__qualname__}"


def check_environment(
    path: Path, resuming: bool, compiled: bool, precision: torch.dtype | None, micro_rows: int
) -> None:
    """Record what the run's bytes depend on; warn where a run goes on under something else."""
    now = {
        "versions": store.versions(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else torch.backends.cpu.get_cpu_capability(),
        "precision": _name_of(precision),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "micro_rows": micro_rows,
        "compiled": compiled,
    }
    before = store.read_json(path) if resuming and path.exists() else now
    differs = [f"{k} was {before[k]}, is {v}" for k, v in now.items() if before.get(k, v) != v]
    if differs:
        print(
            f"warning: going on under other conditions, so not to the same bytes: {'; '.join(differs)}", file=sys.stderr
        )
    if before is now or not path.exists():
        store.write_json(path, now)


def checkpoint_of_all(folder: Path, device: torch.device) -> Path | None:
    """The newest whole checkpoint, the same for every process: the first one says which. Raises TrainingError in a process
    that does not see it."""
    found = complete_checkpoints(folder)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return found[-1] if found else None
    name = torch.tensor([int(found[-1].name.split("-")[1]) if found else -1], device=device)
    torch.distributed.broadcast(name, src=0)
    step = int(name)
    chosen = folder / f"checkpoint-{step}"
    if step >= 0 and not (chosen / COMPLETE).exists():
        raise TrainingError(
            f"process {torch.distributed.get_rank()} does not see {chosen}, from which the first process goes on; run on a file "
            "system that all processes share"
        )
    return chosen if step >= 0 else None


def text_tokens(rows: Rows, targets: int) -> int:
    """How many of `targets` targets are text: control and end-of-text tokens aside, at the stream's own share of them."""
    lengths = np.diff(np.asarray(rows.ends_S), prepend=0)
    kept = lengths > 0
    text = np.diff(rows.tokens.seg_ends, prepend=0)[kept].sum()
    return round(targets * float(text) / max(rows.num_tokens, 1))


def changed_settings(before: Any, now: Any, path: str = "") -> list[str]:
    """Names of the settings that differ and that a run's bytes depend on."""
    if isinstance(before, dict) and isinstance(now, dict):
        if before.get("name") != now.get("name"):  # the rest belongs to it
            return [f"{path}.name"]
        return [
            name
            for key in {**before, **now}
            for name in changed_settings(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        ]
    decides = path not in ("tokens", "model.path") and path.removeprefix("train.") not in FREE
    same = before == now or (before is None and now == {})
    return [path] if decides and not same else []


def set_aside(folder: Path) -> Path:
    """Rename a run that other settings made, so that nothing trained is ever deleted."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside
