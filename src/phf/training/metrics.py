"""What a run reports while it trains: metrics.jsonl, trackers and the progress bar."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback

from phf.core import store
from phf.core.runs import CheckpointMark, SinceLine, add_line, keep_lines, read_lines
from phf.core.types import Number

REPORT_SECONDS = 60.0
"""Seconds between lines of progress where there is no terminal."""
SAVE_SECONDS = 600
"""Seconds between checkpoints where `save_every` is not set."""


# A line of metrics.jsonl


@dataclass(frozen=True, kw_only=True)
class MetricsLine(store.Flat):
    """A line of metrics.jsonl. Means are over the counted targets since the last line."""

    step: int
    """Steps so far."""
    tokens: int
    """Targets of this run so far."""
    loss: Number
    """The objective's own loss, per counted target."""
    lr: float
    """Learning rate of the last step."""
    grad_norm: Number | None = None
    """Norm of the gradient before clipping, at this step."""
    bad_gradient_share: float | None = None
    """Share of sum |dL/dlogit_target| that comes from bad segments: how much of the gradient acts on bad text."""
    value_correlation: float | None = None
    """AWR: correlation of predicted value and reward."""
    counted_share: float | None = None
    """Share of the targets that the loss counts."""
    weight_mean: float | None = None
    """RWR, AWR: mean weight."""
    effective_sample_share: float | None = None
    """RWR, AWR: (sum w)^2 / (n sum w^2), 1 for equal weights."""
    objective: dict[str, Number] = field(default_factory=dict)
    """The objective's own metrics, per counted target. In the file they are at the level of the other names."""
    expected_loss: float
    """Chinchilla's law for a model of this size after this many tokens."""
    model_tflops: float | None = None
    """Operations per second of the model, in 10^12."""
    mfu: float | None = None
    """Their share of the hardware's peak (PaLM's formula)."""
    tokens_per_s: float | None = None
    """Targets per second of training; judging and saving do not count."""

    def as_json(self) -> dict[str, Any]:
        """The line as it is in the file: the objective's metrics at the level of the others, and no metric of another
        objective."""
        line = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "objective"}
        for name in ("value_correlation", "weight_mean", "effective_sample_share"):
            if line[name] is None:
                del line[name]
        return line | self.objective

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> MetricsLine:
        names = {f.name for f in dataclasses.fields(cls)} - {"objective"}
        known = {k: v for k, v in line.items() if k in names}
        own = {k: math.nan if v is None else v for k, v in line.items() if k not in names}
        return cls(**known | {"objective": own})


def read_metrics(path: Path) -> list[MetricsLine]:
    """The lines of metrics.jsonl; none without the file. A torn line is left out."""
    try:
        return [MetricsLine.from_json(line) for line in (read_lines(path) if path.exists() else [])]
    except TypeError as error:
        raise store.StoreError(f"{path} has a line that is none of metrics: {error}") from None


def training_seconds(lines: Sequence[MetricsLine]) -> float:
    """Time in training steps, over all parts of an interrupted run."""
    before = [0, *(line.tokens for line in lines)]
    return float(sum((x.tokens - b) / x.tokens_per_s for x, b in zip(lines, before, strict=False) if x.tokens_per_s))


# Counting


class OpenLine:
    """What has been counted since the last line of metrics. The trainer adds to it; the record turns it into a line."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        """Sums of this process, float64."""
        self.last_step = 0
        """Step of the last line."""
        self.seconds = 0.0
        """Time in training steps; judging and saving do not count."""

    def add(self, sums: Mapping[str, Tensor]) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double()

    def totals(self) -> dict[str, float]:
        """Sums over all processes."""
        names = sorted(self.sums)
        if not names:
            return {}
        values = torch.stack([self.sums[n] for n in names])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(values)
        return dict(zip(names, values.tolist(), strict=True))

    def state(self, step: int) -> SinceLine:
        """What a checkpoint at `step` keeps. Called on all processes."""
        return SinceLine(step - self.last_step, self.seconds, self.totals())

    def resume(self, mark: CheckpointMark, device: torch.device, first: bool) -> None:
        """Continue where a checkpoint left off. `first`: whether this is the first process, which takes the sums of
        all."""
        since = mark.since_line
        self.sums = {
            name: torch.tensor(value if first else 0.0, dtype=torch.float64, device=device)
            for name, value in since.sums.items()
        }
        self.last_step = mark.step - since.steps
        self.seconds = since.seconds

    def close(self, step: int) -> None:
        """Start the next line."""
        self.sums = {}
        self.last_step = step
        self.seconds = 0.0


@dataclass(frozen=True)
class RunScale:
    """The sizes of a run that its metrics depend on."""

    steps: int
    step_tokens: int
    tokens_before: int
    """Targets that the starting weights had seen."""
    parameters: int
    flops_per_token: float
    peak_flops: float | None
    """Of the hardware, per second; None: not known."""


class JudgingCallback(TrainerCallback):
    """A callback that judges the model in training. `judged`: its newest numbers, by name, which trackers get with the
    next line of metrics. `texts`: its newest texts with their scores, by name, which they get with it."""

    def __init__(self) -> None:
        self.judged: dict[str, float] = {}
        self.texts: dict[str, list[tuple[str, float]]] = {}


class MetricsCallback(TrainerCallback):
    """Writes metrics.jsonl, passes the numbers to trackers and moves the progress bar. Comes before all other
    callbacks.

    `writer`: the process that writes. `timed_checkpoints`: ask for a checkpoint every `SAVE_SECONDS`. `judges`: whose
    numbers trackers get too.
    """

    def __init__(
        self,
        path: Path,
        scale: RunScale,
        line: OpenLine,
        writer: bool,
        timed_checkpoints: bool,
        judges: Sequence[JudgingCallback] = (),
    ) -> None:
        self.judges = judges
        self.path = path
        self.scale = scale
        self.line = line
        self.writer = writer
        self.timed_checkpoints = timed_checkpoints
        self.bar: Any = None
        self.saved_at = 0.0
        self.resumed_at = 0.0
        self.reported_at = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.writer:
            keep_lines(self.path, state.global_step)
            self.bar = tqdm(
                total=self.scale.steps * self.scale.step_tokens,
                initial=state.global_step * self.scale.step_tokens,
                desc="training",
                unit="tok",
                unit_scale=True,
                disable=None,
                file=sys.stderr,
            )
        # a checkpoint holds the values of the run that made it
        state.save_steps = args.save_steps
        state.logging_steps = args.logging_steps
        self.saved_at = time.perf_counter()
        self.resume_clock()

    def resume_clock(self) -> None:
        """The next step starts now; the other callbacks are done."""
        self.resumed_at = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.line.seconds += time.perf_counter() - self.resumed_at
        self.resume_clock()
        state.epoch = state.global_step / self.scale.steps  # the Trainer's own count restarts after a resume
        control.should_log |= state.global_step == self.scale.steps
        if self.bar is not None:
            self.bar.update(self.scale.step_tokens)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        waited = time.perf_counter() - self.saved_at if self.writer else 0.0  # the first process's clock counts for all
        self.line.add({"waited": torch.tensor(waited, dtype=torch.float64, device=args.device)})
        sums = self.line.totals()
        control.should_save |= sums.pop("waited") >= SAVE_SECONDS and self.timed_checkpoints
        line = self._line(state.global_step, sums, logs)
        self.line.close(state.global_step)
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{line.loss:.3f}", refresh=False)
            if self.bar.disable:
                self._report(line)
        # for the trackers, which come later
        logs.update({k: v for k, v in line.as_json().items() if isinstance(v, int | float)})
        for judge in self.judges:
            logs.update(judge.judged)
            judge.judged = {}
        if self.writer:
            add_line(self.path, line)

    def _report(self, line: MetricsLine) -> None:
        """A line a minute where there is no terminal for the bar."""
        now = time.perf_counter()
        self.reported_at = self.reported_at or now
        if now - self.reported_at < REPORT_SECONDS:
            return
        self.reported_at = now
        total = self.scale.steps * self.scale.step_tokens
        left = (total - line.tokens) / line.tokens_per_s if line.tokens_per_s else math.nan
        time_left = f"; about {left:,.0f} s left" if math.isfinite(left) else ""
        done = f"{line.tokens / 1e6:,.1f} of {total / 1e6:,.1f} million tokens"
        print(f"    training: loss {line.loss:.3f}, {done}{time_left}", file=sys.stderr, flush=True)

    def _line(self, step: int, sums: dict[str, float], logs: Mapping[str, float]) -> MetricsLine:
        """The line of metrics at `step`, from sums over all processes since the last one."""
        scale = self.scale
        seconds = self.line.seconds
        steps = step - self.line.last_step
        tokens = step * scale.step_tokens
        loss = sums.pop("loss") / steps
        counted = sums.pop("counted", 0.0)
        targets = sums.pop("targets", 0.0)
        logit_grad_abs = sums.pop("logit_grad_abs", 0.0)
        logit_grad_abs_bad = sums.pop("logit_grad_abs_bad", 0.0)
        correlation = value_correlation(sums, counted)
        weight = sums.pop("weight", 0.0)
        weight_sq = sums.pop("weight_sq", 0.0)
        flops = scale.flops_per_token * steps * scale.step_tokens / seconds if seconds > 0 else None
        return MetricsLine(
            step=step,
            tokens=tokens,
            loss=loss,
            lr=logs["learning_rate"],
            grad_norm=float(logs["grad_norm"]) if "grad_norm" in logs else None,
            bad_gradient_share=logit_grad_abs_bad / logit_grad_abs if logit_grad_abs else None,
            value_correlation=correlation,
            counted_share=counted / targets if targets else None,
            weight_mean=weight / counted if weight_sq else None,
            effective_sample_share=weight**2 / (counted * weight_sq) if weight_sq else None,
            objective={name: value / counted for name, value in sums.items() if counted},
            expected_loss=chinchilla_loss(scale.parameters, max(scale.tokens_before + tokens, 1)),
            model_tflops=flops / 1e12 if flops is not None else None,
            mfu=flops / scale.peak_flops if flops is not None and scale.peak_flops else None,
            tokens_per_s=steps * scale.step_tokens / seconds if seconds > 0 else None,
        )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved_at = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


class ResumeClock(TrainerCallback):
    """Comes after all other callbacks and tells the record that they, or a checkpoint, are done."""

    def __init__(self, record: MetricsCallback) -> None:
        self.record = record

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.record.resume_clock()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.record.resume_clock()


# Formulas


def value_correlation(sums: dict[str, float], count: float) -> float | None:
    """Correlation of predicted value and reward over counted targets, from AWR's sums, which are removed from
    `sums`. None for other objectives and where one of the two does not vary."""
    names = ("value", "value_sq", "reward", "reward_sq", "value_reward")
    if names[0] not in sums:
        return None
    v, vv, r, rr, vr = (sums.pop(n) / count for n in names)
    spread = (vv - v * v) * (rr - r * r)
    return max(-1.0, min((vr - v * r) / math.sqrt(spread), 1.0)) if spread > 0 else None


def chinchilla_loss(parameters: int, tokens: int) -> float:
    """Expected loss in nats per token, 1.69 + 406.4 N^-0.34 + 410.7 D^-0.28 (Hoffmann et al. 2022, equation 10)."""
    return float(1.69 + 406.4 * parameters**-0.34 + 410.7 * tokens**-0.28)
