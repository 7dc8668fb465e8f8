"""Judging while training changes nothing and misses nothing."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from helpers import STEP, TINY_MODEL, train_config, weights_of
from phf.core.config import ConfigError
from phf.core.runs import read_metrics
from phf.evaluation.capabilities.humaneval import HumanEval
from phf.evaluation.capabilities.lambada import Lambada
from phf.evaluation.evaluate import evaluate_run
from phf.evaluation.kl import KL, LocalModel
from phf.evaluation.monitor import During, JudgeDuring
from phf.generation.sample import read_samples
from phf.generation.scenario import Scenario
from phf.objectives import MLE, Conditional
from phf.training.train import train

SCENARIO = Scenario(num_samples=8, max_tokens=12, min_tokens=1, batch=8)


def judged(run, tokens_dir, objective, during, settings, **kwargs):
    callback = JudgeDuring(during, run, tokens_dir, settings, objective)
    train(tokens_dir, run, TINY_MODEL, objective, settings, callbacks=(callback,), **kwargs)
    return [json.loads(line) for line in (run / "during.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("objective", [MLE(), Conditional()], ids=lambda o: o.name)
def test_the_weights_are_the_same_bytes_with_and_without_it(tmp_path, tokens_dir, objective):
    dropout = {"config": TINY_MODEL.config | {"attention_dropout": 0.2}}  # draws from the random stream in every step
    model = type(TINY_MODEL)(**dropout)
    settings = train_config(10)
    train(tokens_dir, tmp_path / "without", model, objective, settings)
    callback = JudgeDuring(
        During(every=3 * STEP, scenarios={"plain": SCENARIO}), tmp_path / "with", tokens_dir, settings, objective
    )
    train(tokens_dir, tmp_path / "with", model, objective, settings, callbacks=(callback,))
    assert weights_of(tmp_path / "with") == weights_of(tmp_path / "without")
    lines = [json.loads(line) for line in (tmp_path / "with" / "during.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [STEP * n for n in (3, 6, 9, 10)]  # and the final model
    for line in lines:
        assert set(line["heldout"]) == {"all", "good", "bad"}
        assert line["heldout"]["good"] > 0
        assert line["misalignment"]["n"] + line["unjudged"] == 8


def test_the_whole_evaluation_while_training_changes_nothing(tmp_path, tokens_dir):
    settings = train_config(6)
    train(tokens_dir, tmp_path / "reference", TINY_MODEL, MLE(), settings, seed=1)
    train(tokens_dir, tmp_path / "without", TINY_MODEL, Conditional(), settings)
    (tmp_path / "l.jsonl").write_text('{"text": "the model reads a line"}\n' * 3)
    during = During(
        every=3 * STEP, scenarios={"plain": SCENARIO, "bad": dataclasses.replace(SCENARIO, control="bad")},
        kl=KL(LocalModel(str(tmp_path / "reference")), num_samples=8, max_tokens=8), capabilities=(Lambada(str(tmp_path / "l.jsonl")),),
    )  # fmt: skip
    lines = judged(tmp_path / "with", tokens_dir, Conditional(), during, settings)
    assert weights_of(tmp_path / "with") == weights_of(tmp_path / "without")
    assert [line["tokens"] for line in lines] == [3 * STEP, 6 * STEP]
    for line in lines:
        assert set(line["scenarios"]) == {"plain", "bad"}
        assert line["misalignment"] == line["scenarios"]["plain"]["misalignment"]
        assert line["capabilities"][0]["passages"] == 3
        for name in ("plain", "bad"):
            samples = read_samples(tmp_path / "with" / "samples" / f"{line['tokens']}-{name}.jsonl")
            scores = [s.score for s in samples if s.score == s.score]
            assert np.mean(scores) == pytest.approx(line["scenarios"][name]["misalignment"]["mean"])
    divergences = [line["kl"]["forward"]["nats_per_text"]["mean"] for line in lines]
    final = evaluate_run(tmp_path / "with", {"plain": SCENARIO}, kl_from=during.kl)
    assert divergences[1] == pytest.approx(final["kl"]["forward"]["nats_per_text"]["mean"], rel=1e-4)
    assert divergences[0] != divergences[1]


@pytest.mark.parametrize(
    "during, message",
    [
        (
            {"scenarios": {"x": Scenario(control="bad")}},
            "during.scenarios.x asks for control tokens, which mle has not",
        ),
        ({"scenarios": {"x": Scenario(prompts="nowhere.jsonl")}}, "nowhere.jsonl"),
        ({"capabilities": (Lambada("nowhere.jsonl"),)}, "nowhere.jsonl"),
        ({"capabilities": (HumanEval("nowhere.jsonl"),)}, "runs code that the model wrote"),
        ({"scenarios": {"x": Scenario(max_tokens=4096)}}, "exceed the model's 128 positions"),
        ({"kl": KL(LocalModel("./nowhere"))}, "nowhere: no such folder"),
    ],
)
def test_what_cannot_be_judged_is_said_before_training(tmp_path, tokens_dir, during, message):
    with pytest.raises(ConfigError, match=message):
        judged(tmp_path / "r", tokens_dir, MLE(), During(every=STEP, **during), train_config(2))
    assert not (tmp_path / "r" / "metrics.jsonl").exists() or not read_metrics(tmp_path / "r" / "metrics.jsonl")


def test_the_threshold_of_kl_is_the_fitted_objectives(tmp_path, tokens_dir, tokens):
    objective = Conditional(threshold="median")
    callback = JudgeDuring(During(every=STEP, threshold=0.5), tmp_path / "r", tokens_dir, train_config(2), objective)
    assert callback.control_threshold == objective.fit(tokens.table).threshold == 0


def test_kl_alone_has_the_true_tokens_too(tmp_path, tokens_dir):
    train(tokens_dir, tmp_path / "reference", TINY_MODEL, MLE(), train_config(2))
    during = During(every=10 * STEP, kl=KL(LocalModel(str(tmp_path / "reference")), num_samples=4, max_tokens=8))
    (line,) = judged(tmp_path / "r", tokens_dir, Conditional(), during, train_config(2))
    assert set(line["kl"]) >= {"forward", "oracle"}


def test_a_run_that_is_done_asks_nothing_of_what_judges_it(tmp_path, tokens_dir):
    (tmp_path / "l.jsonl").write_text('{"text": "the model reads a line"}\n')
    during = During(every=STEP, capabilities=(Lambada(str(tmp_path / "l.jsonl")),))
    lines = judged(tmp_path / "r", tokens_dir, MLE(), during, train_config(2))
    (tmp_path / "l.jsonl").unlink()
    assert judged(tmp_path / "r", tokens_dir, MLE(), during, train_config(2)) == lines


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_anew_for_every_length_of_a_sample(tmp_path, tokens_dir):
    frames = []
    for scenarios in ({}, {"plain": SCENARIO}):
        torch.compiler.reset()
        counters.clear()
        judged(
            tmp_path / str(not scenarios),
            tokens_dir,
            MLE(),
            During(2 * STEP, 500, scenarios),
            train_config(4, compile=True),
        )
        frames.append(counters["frames"]["total"])
    assert frames[0] == frames[1] > 0
    assert weights_of(tmp_path / "True") == weights_of(tmp_path / "False")


def test_the_last_line_is_what_judging_the_finished_run_says(tmp_path, tokens_dir):
    lines = judged(
        tmp_path / "r", tokens_dir, Conditional(), During(10 * STEP, 10**6, {"plain": SCENARIO}), train_config(10)
    )
    final = evaluate_run(tmp_path / "r", {"plain": SCENARIO})
    assert lines[-1]["heldout"]["good"] == pytest.approx(final["heldout"]["good"]["good"]["nats_per_byte"], rel=1e-5)
    assert lines[-1]["misalignment"]["mean"] == pytest.approx(final["scenarios"]["plain"]["misalignment"]["mean"])


def test_after_an_interruption_no_line_is_twice_or_missing(tmp_path, tokens_dir):
    during, settings = During(every=2 * STEP), train_config(10, save_every=3 * STEP)
    whole = judged(tmp_path / "whole", tokens_dir, MLE(), during, settings)
    judged(tmp_path / "r", tokens_dir, MLE(), during, settings, stop_after=5)
    (tmp_path / "r" / "during.jsonl").open("a").write('{"step": 6, "torn')
    resumed = judged(tmp_path / "r", tokens_dir, MLE(), during, settings)
    assert [line["tokens"] for line in resumed] == [line["tokens"] for line in whole]
    for a, b in zip(resumed, whole, strict=True):
        assert a["heldout"] == b["heldout"]


def test_its_time_is_not_counted_as_training(tmp_path, tokens_dir, monkeypatch):
    """A line of metrics says how fast training is, whatever the callbacks do."""
    import time

    from phf.training import metrics

    lost = [0.0]  # hours that judging takes, by a clock of the test's

    def judge(self, lm, tokens):
        lost[0] += 3600
        return {}

    class Clock:
        @staticmethod
        def perf_counter():
            return time.perf_counter() + lost[0]

    monkeypatch.setattr(metrics, "time", Clock)
    monkeypatch.setattr(JudgeDuring, "judge", judge)
    judged(tmp_path / "r", tokens_dir, MLE(), During(every=STEP), train_config(6))
    assert lost[0] == 6 * 3600
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["tokens_per_s"] > STEP / 3600 for line in lines)
    assert all(line["mfu"] is None or 0 < line["mfu"] < 2 for line in lines)
    assert not any(math.isnan(line["model_tflops"]) for line in lines)
