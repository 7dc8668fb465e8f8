"""metrics.jsonl: equal lines with and without an interruption, what counts as training time, hardware utilisation."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic.dataclasses import dataclass
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import ROOT, STEP, TINY_LLAMA, metrics_of, train_tiny
from phf.core import device
from phf.core.config import STRICT
from phf.core.runs import complete_checkpoints
from phf.objectives import AWR, MLE, RWR, LossInputs, LossOutputs, Masking, Unlikelihood
from phf.training import metrics, trainer
from phf.training.config import TrainConfig
from phf.training.lm import FromConfig
from phf.training.probe import flops_per_token
from phf.training.train import train
from phf.training.trainer import PHFTrainer, TrainingError

MODEL = FromConfig(TINY_LLAMA)
OF_TIME = ("tokens_per_s", "model_tflops", "mfu")


def config(steps, **kwargs):
    settings = {"context": 32, "batch_rows": 16, "micro_rows": 8, "lr": 1e-2, "precision": "fp32"}
    return TrainConfig(tokens=steps * STEP, **settings | kwargs)


def timeless(run):
    return [{k: v for k, v in line.items() if k not in OF_TIME} for line in metrics_of(run)]


def test_an_interrupted_run_writes_the_lines_of_a_whole_one(tokens_dir, tmp_path):
    """The run stops between two lines. A checkpoint keeps the sums since the last line."""
    settings = config(25, log_every=10)
    train(tokens_dir=tokens_dir, out=tmp_path / "whole", model=MODEL, objective=AWR(), config=settings)
    for stop in (3, 15, None):
        train(
            tokens_dir=tokens_dir,
            out=tmp_path / "parts",
            model=MODEL,
            objective=AWR(),
            config=settings,
            stop_after=stop,
        )
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")
    assert [line["step"] for line in timeless(tmp_path / "whole")] == [10, 20, 25]  # the last steps too


@dataclass(frozen=True, config=STRICT)
class Overflowing(MLE):
    """The loss is finite, and one metric is not."""

    def loss(self, x: LossInputs) -> LossOutputs:
        out = super().loss(x)
        return LossOutputs(out.loss_sum, out.metrics | {"margin": out.loss_sum.detach() * float("inf")})


def test_a_metric_that_is_not_finite_is_null(tokens_dir, tmp_path):
    train(
        tokens_dir=tokens_dir,
        out=tmp_path / "r",
        model=MODEL,
        objective=Overflowing(),
        config=config(6, log_every=4),
        stop_after=3,
    )
    train(
        tokens_dir=tokens_dir, out=tmp_path / "r", model=MODEL, objective=Overflowing(), config=config(6, log_every=4)
    )
    assert [line["margin"] for line in timeless(tmp_path / "r")] == [None, None]


def test_lines_are_means_over_steps(tokens_dir, tmp_path):
    train(tokens_dir=tokens_dir, out=tmp_path / "ten", model=MODEL, objective=AWR(), config=config(20, log_every=10))
    train(tokens_dir=tokens_dir, out=tmp_path / "one", model=MODEL, objective=AWR(), config=config(20, log_every=1))
    ten = timeless(tmp_path / "ten")
    one = timeless(tmp_path / "one")
    assert [x["loss"] for x in ten] == pytest.approx(
        [np.mean([x["loss"] for x in part]) for part in (one[:10], one[10:])]
    )
    assert [x["grad_norm"] for x in ten] == [one[9]["grad_norm"], one[19]["grad_norm"]]


def test_a_resumed_run_follows_its_own_settings_of_checkpoints_and_lines(tokens_dir, tmp_path):
    train(tokens_dir=tokens_dir, out=tmp_path / "r", model=MODEL, objective=MLE(), config=config(20), stop_after=10)
    train(
        tokens_dir=tokens_dir,
        out=tmp_path / "r",
        model=MODEL,
        objective=MLE(),
        config=config(20, save_every=0.25, keep=9, log_every=4),
    )
    names = [p.name for p in complete_checkpoints(tmp_path / "r" / "checkpoints")]
    assert names == ["checkpoint-10", "checkpoint-15", "checkpoint-20"]
    assert [line["step"] for line in timeless(tmp_path / "r")] == [10, 12, 16, 20]


def test_checkpoints_are_timed_unless_their_tokens_are_given(tokens_dir, tmp_path, monkeypatch):
    def made(name, **kwargs):
        train(
            tokens_dir=tokens_dir,
            out=tmp_path / name,
            model=MODEL,
            objective=MLE(),
            config=config(20, keep=9, log_every=4, **kwargs),
        )
        return [int(p.name.split("-")[1]) for p in complete_checkpoints(tmp_path / name / "checkpoints")]

    assert made("short") == [20]
    monkeypatch.setattr(metrics, "SAVE_SECONDS", 0)
    assert made("long") == [4, 8, 12, 16, 20]
    assert made("tokens", save_every=10 * STEP) == [10, 20]
    lines = timeless(tmp_path / "short")
    assert timeless(tmp_path / "long") == timeless(tmp_path / "tokens") == lines
    assert "waited" not in lines[0]


@pytest.mark.parametrize("final", [False, True], ids=["checkpoint", "model"])
def test_a_full_disk_is_reported(tokens_dir, tmp_path, monkeypatch, final):
    """torch and safetensors have messages of their own for it. Training never resumes from a half-written file."""
    settings = config(8, save_every=4 * STEP)

    def fails(*args, **kwargs):
        if args[1].name == "model" if final else len(complete_checkpoints(tmp_path / "r" / "checkpoints")) == 1:
            raise RuntimeError("unexpected pos 5312 vs 5204")
        return save(*args, **kwargs)

    module, name = (PHFTrainer, "save_model_now") if final else (torch, "save")
    save = getattr(module, name)
    with monkeypatch.context() as m:
        m.setattr(module, name, fails)
        with pytest.raises(RuntimeError, match="unexpected pos"):  # there is room, so something else is wrong
            train(tokens_dir=tokens_dir, out=tmp_path / "r", model=MODEL, objective=MLE(), config=settings)
        m.setattr(trainer.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
        with pytest.raises(TrainingError, match=r"no space left for .*r.* \(0 MB free\); make room and run the same"):
            train(tokens_dir=tokens_dir, out=tmp_path / "r", model=MODEL, objective=MLE(), config=settings)
    train(tokens_dir=tokens_dir, out=tmp_path / "r", model=MODEL, objective=MLE(), config=settings)
    train(tokens_dir=tokens_dir, out=tmp_path / "whole", model=MODEL, objective=MLE(), config=settings)
    model = Path("model", "model.safetensors")
    assert (tmp_path / "r" / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()


def test_the_time_of_saving_does_not_count_as_training(tokens_dir, tmp_path, monkeypatch):
    lost = [0.0]  # seconds that saving takes, by this test's clock
    clock = metrics.time.perf_counter

    class Clock:
        @staticmethod
        def perf_counter():
            return clock() + lost[0]

    def save(*args, **kwargs):
        lost[0] += 3600
        return real(*args, **kwargs)

    real = trainer.save_model
    monkeypatch.setattr(metrics, "time", Clock)
    monkeypatch.setattr(trainer, "save_model", save)
    manifest = train(
        tokens_dir=tokens_dir,
        out=tmp_path / "r",
        model=MODEL,
        objective=MLE(),
        config=config(6, save_every=STEP, log_every=1),
    )
    assert lost[0] == 7 * 3600  # six checkpoints and the final model
    assert manifest.seconds < 3600


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_operations_are_those_that_torch_counts(family):
    """torch does not count norms and biases, a hundredth of these models."""
    sizes = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 384}
    if family == "llama":
        sizes |= {"num_key_value_heads": 2, "head_dim": 32}
    made = AutoConfig.for_model(
        family, **sizes, vocab_size=500, max_position_embeddings=64, attn_implementation="eager"
    )
    lm = AutoModelForCausalLM.from_config(made)
    ids = torch.arange(128).view(2, 64)
    counted = FlopCounterMode(display=False)
    with counted:
        lm(input_ids=ids, use_cache=False).logits.sum().backward()
    assert flops_per_token(lm, 64) * ids.numel() == pytest.approx(counted.get_total_flops(), rel=0.02)


def test_hardware_utilisation(tokens_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("phf.training.train.peak_flops", lambda dtype, processes: 1e15)
    train(tokens_dir=tokens_dir, out=tmp_path / "r", model=MODEL, objective=MLE(), config=config(10, log_every=5))
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "model")
    for line in metrics_of(tmp_path / "r"):
        assert line["model_tflops"] == pytest.approx(flops_per_token(lm, 32) * line["tokens_per_s"] / 1e12)
        assert line["mfu"] == pytest.approx(line["model_tflops"] / 1000)


@pytest.mark.parametrize(
    "processes, here, threads, cores, times", [(1, 1, 4, 4, 1), (2, 2, 2, 4, 2), (2, 2, 4, 4, 1), (8, 4, 1, 2, 4)]
)
def test_peak_flops_of_several_processes(monkeypatch, processes, here, threads, cores, times):
    ticks = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks) * 0.01)
    monkeypatch.setattr(device, "num_cpus", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", str(here))
    assert device.peak_flops.__wrapped__(None, processes) == pytest.approx(times * 2 * 1024**3 / 0.01)


def test_value_correlation_where_values_hardly_differ():
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(4, 256, generator=g)
    value = -0.5 + 2e-4 * (0.7 * (0.5 - scores) + 0.3 * torch.rand(4, 256, generator=g))
    logp = -torch.rand(4, 256, generator=g)
    objective = AWR(rewards="raw")
    out = objective.loss(LossInputs(logp, logp, scores, torch.ones(4, 256, dtype=torch.bool), value))
    found = metrics.value_correlation({k: float(v) for k, v in out.metrics.items()}, scores.numel())
    expected = np.corrcoef(value.double().flatten(), objective.reward(scores).flatten())[0, 1]
    assert found == pytest.approx(expected, rel=1e-4)
    assert not math.isclose(expected, 1.0, rel_tol=1e-2)


@pytest.mark.parametrize(
    "objective", [MLE(), Masking(), Unlikelihood(), Unlikelihood(by="score"), RWR(), AWR()], ids=str
)
def test_lines_are_plain_json_and_documented(tokens_dir, tmp_path, objective):
    train(tokens_dir=tokens_dir, out=tmp_path / "r", model=MODEL, objective=objective, config=config(4, log_every=2))
    table = (ROOT / "docs" / "training.md").read_text()
    for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        assert all(v is None or isinstance(v, int | float) for v in values.values())
        assert [name for name in values if f"`{name}`" not in table] == []


def test_progress_is_a_line_a_minute_where_there_is_no_terminal(tokens_dir, tmp_path, capfd, monkeypatch):
    train_tiny(tokens_dir, tmp_path / "short", steps=4)
    assert "training: loss" not in capfd.readouterr().err
    monkeypatch.setattr(metrics, "REPORT_SECONDS", 0.0)
    train_tiny(tokens_dir, tmp_path / "shown", steps=4)
    lines = [line for line in capfd.readouterr().err.splitlines() if "training: loss" in line]
    assert len(lines) == 4
    assert re.fullmatch(r"    training: loss \d\.\d{3}, 0\.0 of 0\.0 million tokens; about \d+ s left", lines[1])
