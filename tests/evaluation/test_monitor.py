"""Judging during training changes no byte of the run and misses nothing."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from helpers import LINK, STEP, TINY_MODEL, metrics_of, train_config, train_tiny, weights_of
from phf.core.config import ConfigError
from phf.core.runs import read_lines
from phf.evaluation.capabilities.humaneval import HumanEval
from phf.evaluation.capabilities.lambada import Lambada
from phf.evaluation.evaluate import evaluate_run
from phf.evaluation.kl import KL, LocalModel
from phf.evaluation.monitor import Monitor, MonitorCallback
from phf.evaluation.results import MonitorLine
from phf.generation.loaded import load_model
from phf.generation.sample import read_samples
from phf.generation.scenario import Scenario
from phf.objectives import MLE, Conditional, Objective
from phf.scorers import Presidio
from phf.scorers.masking import without_personal_data
from phf.training.train import train


@dataclasses.dataclass(frozen=True)
class OwnLimit(Objective):
    """An objective of a user that calls scores above a number of its own bad."""

    @property
    def bad_above(self):
        return 0.25


SCENARIO = Scenario(num_samples=8, max_tokens=12, min_tokens=1, batch=8)


def judged(run, tokens_dir, objective, monitor, settings, **kwargs):
    callback = MonitorCallback(monitor, run, tokens_dir, settings, objective)
    train(
        tokens_dir=tokens_dir,
        out=run,
        model=TINY_MODEL,
        objective=objective,
        config=settings,
        callbacks=(callback,),
        **kwargs,
    )
    return [json.loads(line) for line in (run / "monitor.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("objective", [MLE(), Conditional()], ids=lambda o: o.name)
def test_the_weights_are_the_same_bytes_with_and_without_a_monitor(tmp_path, tokens_dir, objective):
    dropout = {"config": TINY_MODEL.config | {"attention_dropout": 0.2}}  # draws from the random stream in every step
    model = type(TINY_MODEL)(**dropout)
    settings = train_config(10)
    train(tokens_dir=tokens_dir, out=tmp_path / "without", model=model, objective=objective, config=settings)
    callback = MonitorCallback(
        Monitor(every=3 * STEP, scenarios={"plain": SCENARIO}), tmp_path / "with", tokens_dir, settings, objective
    )
    train(
        tokens_dir=tokens_dir,
        out=tmp_path / "with",
        model=model,
        objective=objective,
        config=settings,
        callbacks=(callback,),
    )
    assert weights_of(tmp_path / "with") == weights_of(tmp_path / "without")
    lines = [json.loads(line) for line in (tmp_path / "with" / "monitor.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [STEP * n for n in (3, 6, 9, 10)]  # and the final model
    for line in lines:
        assert set(line["heldout"]) == {"all", "good", "bad"}
        assert line["heldout"]["good"] > 0
        assert line["misalignment"]["n"] + line["unjudged"] == 8


def test_a_whole_evaluation_during_training_changes_nothing(tmp_path, tokens_dir):
    settings = train_config(6)
    train(tokens_dir=tokens_dir, out=tmp_path / "reference", model=TINY_MODEL, objective=MLE(), config=settings, seed=1)
    train(tokens_dir=tokens_dir, out=tmp_path / "without", model=TINY_MODEL, objective=Conditional(), config=settings)
    (tmp_path / "l.jsonl").write_text('{"text": "the model reads a line"}\n' * 3)
    monitor = Monitor(
        every=3 * STEP,
        scenarios={"plain": SCENARIO, "bad": dataclasses.replace(SCENARIO, control="bad")},
        kl=KL(LocalModel(str(tmp_path / "reference")), num_samples=8, max_tokens=8),
        capabilities=(Lambada(str(tmp_path / "l.jsonl")),),
    )
    lines = judged(tmp_path / "with", tokens_dir, Conditional(), monitor, settings)
    assert weights_of(tmp_path / "with") == weights_of(tmp_path / "without")
    assert [line["tokens"] for line in lines] == [3 * STEP, 6 * STEP]
    for line in lines:
        assert set(line["scenarios"]) == {"plain", "bad"}
        assert line["misalignment"] == line["scenarios"]["plain"]["misalignment"]
        assert line["capabilities"][0]["passages"] == 3
        for name in ("plain", "bad"):
            samples = read_samples(tmp_path / "with" / "samples" / f"{line['tokens']}-{name}.jsonl")
            scores = [s.score for s in samples if not math.isnan(s.score)]
            assert np.mean(scores) == pytest.approx(line["scenarios"][name]["misalignment"]["mean"])
    divergences = [line["kl"]["forward"]["nats_per_text"]["mean"] for line in lines]
    final = evaluate_run(tmp_path / "with", {"plain": SCENARIO}, kl_from=monitor.kl)
    assert divergences[1] == pytest.approx(final.kl.forward.nats_per_text.mean, rel=1e-4)
    assert divergences[0] != divergences[1]


@pytest.mark.parametrize(
    "monitor, message",
    [
        (
            {"scenarios": {"x": Scenario(control="bad")}},
            "monitor.scenarios.x: mle has no control tokens, so control=bad does not work",
        ),
        ({"scenarios": {"x": Scenario(prompts="nowhere.jsonl")}}, "nowhere.jsonl"),
        ({"capabilities": (Lambada("nowhere.jsonl"),)}, "nowhere.jsonl"),
        ({"capabilities": (HumanEval("nowhere.jsonl"),)}, "runs code that the model wrote"),
        ({"scenarios": {"x": Scenario(max_tokens=4096)}}, "128 positions"),
        ({"kl": KL(LocalModel("./nowhere"))}, "nowhere: not a local folder"),
    ],
)
def test_what_cannot_be_judged_is_reported_before_training(tmp_path, tokens_dir, monitor, message):
    with pytest.raises(ConfigError, match=message):
        judged(tmp_path / "r", tokens_dir, MLE(), Monitor(every=STEP, **monitor), train_config(2))
    assert not (tmp_path / "r" / "metrics.jsonl").exists() or not metrics_of(tmp_path / "r")


def test_the_threshold_of_kl_is_the_fitted_objectives(tmp_path, tokens_dir, tokens):
    objective = Conditional(threshold="median")
    callback = MonitorCallback(
        Monitor(every=STEP, threshold=0.5), tmp_path / "r", tokens_dir, train_config(2), objective
    )
    assert callback.control_threshold == objective.fit(tokens.statistics).threshold == 0


def test_the_finished_model_keeps_the_threshold_of_the_users_own_objective(tmp_path, tokens_dir):
    train_tiny(tokens_dir, tmp_path / "r", OwnLimit(), steps=2)
    assert load_model(tmp_path / "r").threshold == 0.25
    record = tmp_path / "r" / "model" / "phf.json"
    earlier = json.loads(record.read_text()) | {"objective": {"name": "conditional", "threshold": 0.5}}
    del earlier["bad_above"]
    record.write_text(json.dumps(earlier))
    assert load_model(tmp_path / "r").threshold == 0.5  # a record of an earlier version


def test_kl_alone_is_measured_with_the_true_tokens_too(tmp_path, tokens_dir):
    train_tiny(tokens_dir, tmp_path / "reference", steps=2)
    monitor = Monitor(every=10 * STEP, kl=KL(LocalModel(str(tmp_path / "reference")), num_samples=4, max_tokens=8))
    (line,) = judged(tmp_path / "r", tokens_dir, Conditional(), monitor, train_config(2))
    assert set(line["kl"]) >= {"forward", "oracle"}


def test_a_finished_run_does_not_need_the_files_of_its_monitor(tmp_path, tokens_dir):
    (tmp_path / "l.jsonl").write_text('{"text": "the model reads a line"}\n')
    monitor = Monitor(every=STEP, capabilities=(Lambada(str(tmp_path / "l.jsonl")),))
    lines = judged(tmp_path / "r", tokens_dir, MLE(), monitor, train_config(2))
    (tmp_path / "l.jsonl").unlink()
    assert judged(tmp_path / "r", tokens_dir, MLE(), monitor, train_config(2)) == lines


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_again_for_samples_of_another_length(tmp_path, tokens_dir):
    frames = []
    for scenarios in ({}, {"plain": SCENARIO}):
        torch.compiler.reset()
        counters.clear()
        judged(
            tmp_path / str(not scenarios),
            tokens_dir,
            MLE(),
            Monitor(2 * STEP, 500, scenarios),
            train_config(4, compile=True),
        )
        frames.append(counters["frames"]["total"])
    assert frames[0] == frames[1] > 0
    assert weights_of(tmp_path / "True") == weights_of(tmp_path / "False")


def test_the_last_line_is_what_judging_the_finished_run_says(tmp_path, tokens_dir):
    lines = judged(
        tmp_path / "r", tokens_dir, Conditional(), Monitor(10 * STEP, 10**6, {"plain": SCENARIO}), train_config(10)
    )
    final = evaluate_run(tmp_path / "r", {"plain": SCENARIO})
    assert lines[-1]["heldout"]["good"] == pytest.approx(final.heldout.good.good.nats_per_byte, rel=1e-5)
    assert lines[-1]["misalignment"]["mean"] == pytest.approx(final.scenarios["plain"].misalignment.mean)


def test_after_an_interruption_no_line_is_repeated_or_missing(tmp_path, tokens_dir):
    monitor = Monitor(every=2 * STEP)
    settings = train_config(10, save_every=3 * STEP)
    whole = judged(tmp_path / "whole", tokens_dir, MLE(), monitor, settings)
    judged(tmp_path / "r", tokens_dir, MLE(), monitor, settings, stop_after=5)
    (tmp_path / "r" / "monitor.jsonl").open("a").write('{"step": 6, "torn')
    resumed = judged(tmp_path / "r", tokens_dir, MLE(), monitor, settings)
    assert [line["tokens"] for line in resumed] == [line["tokens"] for line in whole]
    for a, b in zip(resumed, whole, strict=True):
        assert a["heldout"] == b["heldout"]


def test_the_time_of_judging_does_not_count_as_training(tmp_path, tokens_dir, monkeypatch):
    """A line of metrics reports the speed of training, however long callbacks take."""
    import time

    from phf.training import metrics

    lost = [0.0]  # seconds that judging takes, by this test's clock

    def judge(self, lm, step):
        lost[0] += 3600
        return MonitorLine(step=step, tokens=0)

    class Clock:
        @staticmethod
        def perf_counter():
            return time.perf_counter() + lost[0]

    monkeypatch.setattr(metrics, "time", Clock)
    monkeypatch.setattr(MonitorCallback, "judge", judge)
    judged(tmp_path / "r", tokens_dir, MLE(), Monitor(every=STEP), train_config(6))
    assert lost[0] == 6 * 3600
    lines = metrics_of(tmp_path / "r")
    assert all(line["tokens_per_s"] > STEP / 3600 for line in lines)
    assert all(line["mfu"] is None or 0 < line["mfu"] < 2 for line in lines)
    assert not any(math.isnan(line["model_tflops"]) for line in lines)


def test_trackers_get_a_table_of_samples(tokens_dir, tmp_path, monkeypatch):
    """TensorBoard, really installed, and what Weights & Biases and trackio are given."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers.integrations import integration_utils

    given = []
    configured = []

    class Table:
        def __init__(self, columns=None, data=None, dataframe=None):
            rows = data if dataframe is None else dataframe.values.tolist()
            self.rows = [tuple(row) for row in rows]

    class Spy(TrainerCallback):
        def __init__(self):
            run = SimpleNamespace(tags=("mine",))
            config = SimpleNamespace(update=lambda found, allow_val_change: configured.append((found, run)))
            self._wandb = self._trackio = SimpleNamespace(Table=Table, log=given.append, config=config, run=run)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "spy", Spy)
    known = integration_utils.get_available_reporting_integrations()
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: [*known, "spy"])
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    scenario = Scenario(num_samples=4, max_tokens=24)
    monitor = Monitor(every=4 * 512, heldout_tokens=0, scenarios={"plain": scenario})
    to = ("tensorboard", "spy")
    callback = MonitorCallback(monitor, tmp_path / "r", tokens_dir, train_config(8, report_to=to), MLE())
    train_tiny(tokens_dir, tmp_path / "r", steps=8, callbacks=(callback,), report_to=to)
    written = {step: read_samples(tmp_path / "r" / "samples" / f"{step * 512}-plain.jsonl") for step in (4, 8)}
    for step, samples in written.items():
        of_step = [g for g in given if g["train/global_step"] == step]
        assert len(of_step) == 2  # once for each of the spy's two trackers
        for one in of_step:
            assert one["monitor/samples/plain"].rows == [(s.text, s.score) for s in samples]
    for found, run in configured:
        assert found["phf"]["objective"] == {"name": "mle"}
        assert found["phf"]["scorer"]["name"] == "regex"
        assert run.tags == ("mine", "objective: mle", "scorer: regex")
    assert len(configured) == 2
    board = EventAccumulator(str(tmp_path / "board"), size_guidance={"tensors": 0}).Reload()
    found = board.Tensors("monitor/samples/plain/text_summary")
    assert [event.step for event in found] == [4, 8]
    assert "name: mle" in board.Tensors("phf/text_summary")[0].tensor_proto.string_val[0].decode()
    shown = found[0].tensor_proto.string_val[0].decode()
    assert shown.count("\n") == 5
    assert written[4][0].text.split("\n")[0].split()[0] in shown
    assert any("monitor/scenario/plain/misalignment" in tag for tag in board.Tags()["scalars"])


def test_personal_data_are_masked_for_trackers():
    assert without_personal_data("mail a@b.org now", Presidio(entities=("EMAIL_ADDRESS",))) == "mail •@•.••• now"
    assert without_personal_data("mail a@b.org now", LINK) == "mail a@b.org now"


def test_trackers_get_the_numbers_of_judging(tokens_dir, tmp_path, monkeypatch):
    """With the next line of metrics, under stable names, and only once."""
    from transformers.integrations import integration_utils

    seen = []

    class Spy(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "spy", Spy)
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["spy"])
    scenario = Scenario(num_samples=4, max_tokens=8, min_tokens=1)
    monitor = Monitor(every=4 * 512, heldout_tokens=500, scenarios={"plain": scenario})
    config = train_config(8, report_to=("spy",))
    callback = MonitorCallback(monitor, tmp_path / "r", tokens_dir, config, MLE())
    train_tiny(tokens_dir, tmp_path / "r", steps=8, callbacks=(callback,), report_to=("spy",))
    lines = read_lines(tmp_path / "r" / "monitor.jsonl")
    judged = [logs for logs in seen if "monitor/tokens" in logs]
    assert [logs["monitor/tokens"] for logs in judged] == [line["tokens"] for line in lines] == [2048, 4096]
    for logs, line in zip(judged, lines, strict=True):
        assert logs["monitor/heldout/good"] == line["heldout"]["good"]
        plain = line["scenarios"]["plain"]
        assert logs["monitor/scenario/plain/misalignment"] == plain["misalignment"]["mean"]
        assert logs["monitor/scenario/plain/distinct_2"] == plain["distinct_2"]
        assert "loss" in logs
