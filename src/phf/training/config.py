"""Settings of a training run, and what follows from them: steps, micro-batches, whether to compile."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core.config import STRICT, ConfigError
from phf.core.device import pick_device
from phf.tokens.noise import AnyNoise


@dataclass(frozen=True, config=STRICT)
class MixtureConfig:
    """How often documents are read in an epoch, by a column of the corpus (`phf tokenize --column`). A number may be a
    fraction: 0.5 reads every second document of the group, to one document exactly."""

    column: str
    times: dict[str, Annotated[float, Field(ge=0, le=100)]] = Field(min_length=1)
    """By value of the column."""
    other: Annotated[float, Field(ge=0, le=100)] = 1.0
    """For documents with another value, or with none."""


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """How to train. `tokens` is the budget of targets, rounded up to whole steps of `batch_rows` x `context`."""

    tokens: Annotated[float, Field(gt=0)]
    scores: str | None = None
    """Which preference the objective sees, where the token store holds several; None: the scored corpus's own."""
    token_scores: bool = False
    """Give the objective a score for each token instead of its segment's. The store needs them (`phf tokenize
    --token-scores`)."""
    scorer_noise: Annotated[AnyNoise, Field(exclude_if=lambda value: value is None)] = None
    """Errors added to the scores that the objective sees, to learn what a worse scorer would do: {missed: share of the
    bad segments, false_alarms: share of the good ones}, or one number for both. The path of an audit's `audit.json`
    stands for the errors that it found in each range of the scores. Judging sees none of them."""
    mixture: MixtureConfig | None = None
    """How often documents are read in an epoch, by what a column of the corpus says about them."""
    context: Annotated[int, Field(gt=0)] = 1024
    """Targets in a row."""
    batch_rows: Annotated[int, Field(gt=0)] = 64
    """Rows in a step, over all processes."""
    micro_rows: Annotated[int, Field(gt=0)] | None = None
    """Rows at a time on one device; None: the device's share of the batch, at most 32."""
    lr: Annotated[float, Field(gt=0)] = 5e-4
    """Largest learning rate, after the warm-up."""
    optimizer: Annotated[Literal["adamw", "muon"], Field(exclude_if=lambda value: value == "adamw")] = "adamw"
    """adamw, or muon for the matrices of the trunk and AdamW for the rest (phf.training.optimizer)."""
    muon_lr: Annotated[float | None, Field(gt=0, exclude_if=lambda value: value is None)] = None
    """Learning rate of the matrices under muon; None: `lr`."""
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """How the learning rate falls after the warm-up; wsd: constant, then falling over `decay`."""
    warmup: Annotated[float, Field(ge=0)] = 0.01
    """Tokens with rising learning rate. Up to 1: share of the budget."""
    decay: Annotated[float, Field(gt=0)] = 0.2
    """wsd only: tokens with falling learning rate, at most what the warm-up leaves. Up to 1: share of the budget."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Of matrices and embeddings, not of biases and norms."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's two averages."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient; 0: no clipping."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the processor has it, else float32."""
    compile: bool | Literal["auto"] = "auto"
    """auto: compile runs that are long enough for it to pay (`COMPILE_FROM`)."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """auto: where the model has "sdpa", torch's fused attention without a mask and, in bfloat16 on a CPU, our own
    in blocks (phf.training.attention). For other models, transformers' choice."""
    document_mask: Annotated[bool, Field(exclude_if=lambda value: value is False)] = False
    """Let tokens attend only to their own document, whose positions start at 0. Judging does the same."""
    save_every: Annotated[float, Field(gt=0)] | None = None
    """Tokens between checkpoints. Up to 1: share of the budget. None: ten minutes of training. There is always one
    at the end."""
    keep: Annotated[int, Field(gt=0)] = 2
    """How many of the newest checkpoints are kept."""
    skip_tokens: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Source tokens to skip at the start of the training order. auto: those that the starting weights have read, if phf
    trained them on the text of this store; else 0. The order is the same for every objective, so a run continues where
    the one before stopped."""
    budget: Literal["targets", "source"] = "targets"
    """What `tokens` counts: targets, or source tokens of the training order. With source tokens, objectives that drop
    documents or insert tokens read the same text."""
    milestones: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Tokens at which a checkpoint is made and kept forever. Up to 1: share of the budget. A milestone after the
    budget is its end."""
    shard: bool = False
    """Divide weights, gradients and optimizer state over the processes (FSDP2), for models that are too large for one
    device. Needs torchrun or accelerate launch."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    log_every: Annotated[int, Field(gt=0)] = 10
    """Steps between lines of metrics.jsonl."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that make rows during training; 0: the training process makes them. None: one for a GPU, else 0
    (making rows takes under 2% of a step on a CPU)."""
    chunk: Annotated[int, Field(gt=0)] | None = None
    """Targets at a time in the loss; None: chosen by vocabulary size."""
    report_to: tuple[str, ...] = ()
    """Trackers, by transformers' names, for example tensorboard."""

    def __post_init__(self) -> None:
        if self.muon_lr is not None and self.optimizer != "muon":
            raise ValueError("muon_lr is for optimizer=muon")
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"the warm-up takes {self.warmup_steps} steps, but tokens={self.tokens:g} are {self.steps} steps of "
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
"""Settings that may change when a run is resumed: the objective, the rows and their order do not depend on them."""

COMPILE_FROM = {"cpu": 5e13, "cuda": 2e16}
"""Operations of a run (6 x parameters x tokens) from which compiling pays. On a CPU it takes 10 to 30 seconds and
saves a fifth of a small Llama's step and a twentieth of a GPT-2's. A run of this size takes a minute on a GPU."""


def pick_compile(config: TrainConfig, parameters: int) -> bool:
    """Whether to compile a model of this size. The run's length decides, not a clock: the same run gives the same
    bytes."""
    if config.compile != "auto":
        return config.compile
    device = "cuda" if pick_device().startswith("cuda") else "cpu"
    return 6.0 * parameters * config.total_tokens >= COMPILE_FROM[device]


def micro_batch(config: TrainConfig, world: int) -> tuple[int, int]:
    """(rows at a time, accumulation steps). Times `world` processes, their product is exactly the batch. Raises
    ConfigError if the batch cannot be divided."""
    share, rest = divmod(config.batch_rows, world)
    if rest or share == 0:
        near = ", ".join(str(world * k) for k in sorted({max(share, 1), share + 1}))
        raise ConfigError(f"train.batch_rows={config.batch_rows} cannot be divided over {world} processes; use {near}")
    if config.micro_rows is not None:
        if share % config.micro_rows:
            divisors = [d for d in range(1, share + 1) if share % d == 0]
            raise ConfigError(
                f"train.micro_rows={config.micro_rows} does not divide {share} rows per process; use one of {divisors}"
            )
        return config.micro_rows, share // config.micro_rows
    rows = next(d for d in range(min(share, 32), 0, -1) if share % d == 0)
    return rows, share // rows
