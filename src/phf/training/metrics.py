"""TODO."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from phf.core.runs import add_line, keep_lines

SAVE_SECONDS = 600
"""Between checkpoints where no number of tokens is asked for."""


def training_seconds(lines: Sequence[dict[str, Any]]) -> float:
    """Time spent in training steps, over all the legs of a run that was interrupted."""
    before = [0, *(line["tokens"] for line in lines)]
    return float(
        sum((x["tokens"] - b) / x["tokens_per_s"] for x, b in zip(lines, before, strict=False) if x["tokens_per_s"])
    )


class Record(TrainerCallback):
    """metrics.jsonl, what trackers see, and the progress bar. Stands before all other callbacks."""

    def __init__(
        self, path: Path, steps: int, step_tokens: int, params: int, token_flops: float, peak_flops: float | None,
        writer: bool, tokens_before: int, saves: bool,
    ) -> None:  # fmt: skip
        self.path, self.steps, self.step_tokens, self.params, self.writer = path, steps, step_tokens, params, writer
        self.token_flops, self.peak_flops, self.tokens_before = token_flops, peak_flops, tokens_before
        self.saves, self.saved_at = saves, 0.0  # whether it asks for checkpoints, every SAVE_SECONDS of a clock
        self.trainer: Any = None
        self.bar: Any = None
        self.last_step = 0
        self.seconds = 0.0  # in training steps, since the last line: judging and saving do not count
        self.resumed_at = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.writer:
            keep_lines(self.path, state.global_step)
            self.bar = tqdm(total=self.steps * self.step_tokens, initial=state.global_step * self.step_tokens, desc="training", unit="tok",
                            unit_scale=True, disable=None, file=sys.stderr)  # fmt: skip
        # a checkpoint brings those of the run that made it
        state.save_steps, state.logging_steps = args.save_steps, args.logging_steps
        self.saved_at = time.perf_counter()
        self.resume()

    def resume(self) -> None:
        """The next step begins now, once the other callbacks are done."""
        self.resumed_at = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self.resumed_at
        self.resume()
        state.epoch = state.global_step / self.steps  # the Trainer's own count starts anew after a resume
        control.should_log |= state.global_step == self.steps
        if self.bar is not None:
            self.bar.update(self.step_tokens)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        assert self.trainer is not None
        waited = time.perf_counter() - self.saved_at if self.writer else 0.0  # by one clock, for all processes
        self.trainer.sums["waited"] = torch.tensor(waited, dtype=torch.float64, device=args.device)
        sums, self.trainer.sums = self.trainer.sums_of_all(), {}
        control.should_save |= sums.pop("waited") >= SAVE_SECONDS and self.saves
        step = state.global_step
        seconds, steps = self.seconds, step - self.last_step
        self.last_step, self.seconds = step, 0.0
        line: dict[str, Any] = {
            "step": step,
            "tokens": step * self.step_tokens,
            "loss": sums.pop("loss") / steps,
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
        line["expected_loss"] = chinchilla_loss(self.params, max(self.tokens_before + line["tokens"], 1))
        flops = self.token_flops * steps * self.step_tokens / seconds if seconds > 0 else None
        line["model_tflops"] = flops / 1e12 if flops is not None else None
        line["mfu"] = flops / self.peak_flops if flops is not None and self.peak_flops else None
        line["tokens_per_s"] = steps * self.step_tokens / seconds if seconds > 0 else None
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
        # for the trackers, which come behind
        logs.update({k: v for k, v in line.items() if isinstance(v, int | float)})
        if self.writer:
            add_line(self.path, line)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved_at = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


class Resume(TrainerCallback):
    """Stands behind all other callbacks and tells the record that they, or a checkpoint, are done."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.record.resume()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.record.resume()


def _correlation(sums: dict[str, float], count: float) -> dict[str, float]:
    """Correlation of predicted value and reward over counted targets, from AWR's sums (taken out of `sums`)."""
    names = ("value", "value_sq", "reward", "reward_sq", "value_reward")
    if names[0] not in sums:
        return {}
    v, vv, r, rr, vr = (sums.pop(n) / count for n in names)
    spread = (vv - v * v) * (rr - r * r)
    return {"value_correlation": max(-1.0, min((vr - v * r) / math.sqrt(spread), 1.0))} if spread > 0 else {}


def chinchilla_loss(params: int, tokens: int) -> float:
    """Expected loss in nats a token, 1.69 + 406.4 N^-0.34 + 410.7 D^-0.28 (Hoffmann et al. 2022, equation 10)."""
    return float(1.69 + 406.4 * params**-0.34 + 410.7 * tokens**-0.28)
