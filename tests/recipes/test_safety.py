"""Recipes lose nothing: names stay in their folder, what can be checked is checked first, a failure costs its part."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import yaml

from helpers import TINY_LLAMA, write_jsonl
from phf.core import store
from phf.core.check import check_below
from phf.core.config import ConfigError
from phf.core.runs import RunFolder, file_name
from phf.evaluation.capabilities.lambada import Lambada
from phf.evaluation.results import read_eval
from phf.recipes import run as run_module
from phf.recipes.recipe import load_recipe
from phf.recipes.run import RecipeError, run_recipe


@pytest.fixture
def settings(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [f"line {n}\nsee https://x.y/{n}\n" * 12 for n in range(40)])
    write_jsonl(tmp_path / "lambada.jsonl", ["some words that end in a word"] * 3)
    return {
        "out": str(tmp_path / "out"),
        "corpus": {"name": "jsonl", "path": str(tmp_path / "a.jsonl")},
        "segmenter": {"name": "lines"},
        "scorer": {"name": "regex", "pattern": "https?://\\S+"},
        "tokenizer": {"name": "bpe", "vocab_size": 300},
        "model": {"name": "from_config", "config": dict(TINY_LLAMA)},
        "train": {"tokens": 600, "context": 32, "batch_rows": 4, "precision": "fp32", "compile": False, "warmup": 0},
        "objectives": {"mle": {"name": "mle"}},
        "scenarios": {"plain": {"num_samples": 3, "max_tokens": 6, "min_tokens": 1}},
        "heldout": 0.2,
    }


def load(tmp_path, settings, *more):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return load_recipe([str(path), *more])


@pytest.mark.parametrize("name", ["../x", "/tmp/x", ".hidden", "a/b", "a\nb", "x" * 101, "x.old-1", ""])
@pytest.mark.parametrize("part", ["objectives", "scenarios"])
def test_names_cannot_leave_the_folder(tmp_path, settings, part, name):
    settings[part] = {name: next(iter(settings[part].values()))}
    with pytest.raises(ConfigError, match="because it names a file"):
        load(tmp_path, settings)
    for place in (RunFolder(tmp_path).samples, RunFolder(tmp_path).part):
        with pytest.raises(ConfigError, match="because it names a file"):
            place(name)
    assert file_name("conditional late$ é_1") == "conditional late$ é_1"


def test_a_name_with_dollars_is_shown_as_it_is(tmp_path, settings):
    settings["objectives"] = {"a$\\frac$": {"name": "mle"}}
    settings["objectives"] = {"a$x^$b": {"name": "mle"}}
    run_recipe(load(tmp_path, settings))
    figures = "".join(f.read_text() for f in (tmp_path / "out" / "report").glob("*.svg"))
    assert "a$x^$b" in figures
    assert [c.problems for c in check_below(tmp_path / "out")] == [[]] * 4  # scored, tokens, run, checkpoint


def test_overlays_add_no_part_that_the_recipe_leaves_out(tmp_path, settings):
    for more in ({}, {"monitor": None, "redteam": None}):
        small = load(tmp_path, settings | more, "quick")
        assert small.monitor is None
        assert small.redteam is None
        assert list(small.scenarios) == ["plain"]
        assert small.quick
    with_both = {"monitor": {"every": 1000}, "redteam": {"trials": 9}}
    small = load(tmp_path, settings | with_both, "quick")
    assert (small.monitor.heldout_tokens, small.redteam.trials) == (5000, 2)
    own = load(tmp_path, settings | {"monitor": None}, "monitor.every=500")  # the user's own wish
    assert own.monitor.every == 500


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scenarios": {"p": {"prompts": "/no/prompts.jsonl", "num_samples": 2}}}, "scenarios.p: .*does not exist"),
        ({"scenarios": {"p": {"prompts": "functions", "num_samples": 10**6}}}, "scenarios.p: .*use num_samples"),
        ({"capabilities": [{"name": "lambada", "path": "/no/lambada.jsonl"}]}, "capabilities.0: .*no such file"),
        ({"capabilities": [{"name": "humaneval", "path": "x"}]}, "capabilities.0: .*run_untrusted_code"),
        ({"redteam": {"trials": 1, "prompts": "/no/prompts.jsonl"}}, "redteam: .*does not exist"),
        ({"kl": {"reference": {"name": "local", "path": "./nowhere"}}}, "kl.reference.path"),
    ],
)
def test_what_can_be_checked_is_checked_before_anything_runs(tmp_path, settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_recipe(load(tmp_path, settings | changes))
    assert not (tmp_path / "out").exists()


def test_a_capability_that_fails_costs_only_itself(tmp_path, settings, monkeypatch):
    settings["capabilities"] = [{"name": "lambada", "path": str(tmp_path / "lambada.jsonl")}]
    recipe = load(tmp_path, settings)

    def broken(self, model):
        raise ValueError("out of luck")

    with monkeypatch.context() as patched:
        patched.setattr(Lambada, "measure", broken)
        with pytest.raises(RecipeError, match=r"mle-s0: Lambada0: ValueError: out of luck"):
            run_recipe(recipe)
    result = read_eval(RunFolder(tmp_path / "out" / "mle-s0"))
    assert result.failed == {"Lambada0": "ValueError: out of luck"}
    assert result.scenarios["plain"].samples == 3
    assert (tmp_path / "out" / "report.html").exists()
    samples = RunFolder(tmp_path / "out" / "mle-s0").samples("plain")
    before = samples.stat().st_mtime_ns
    results = run_recipe(recipe)  # the same command tries it again, and nothing else
    assert results.failed == {}
    assert samples.stat().st_mtime_ns == before
    assert read_eval(RunFolder(tmp_path / "out" / "mle-s0")).capabilities[0].name == "lambada"


def test_an_attack_that_fails_costs_only_itself(tmp_path, settings, monkeypatch):
    settings["redteam"] = {"trials": 1, "rounds": 0, "prompts": "functions"}
    recipe = load(tmp_path, settings)

    def broken(*args, **named):
        raise ConfigError("no attack today")

    import phf.redteaming.attack

    monkeypatch.setattr(phf.redteaming.attack, "redteam", broken)
    with pytest.raises(RecipeError, match="red-teaming: ConfigError: no attack today"):
        run_recipe(recipe)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]["run"] == "mle-s0"
    assert (tmp_path / "out" / "report.html").exists()


def test_the_recipes_threshold_reaches_every_stage(tmp_path, settings, monkeypatch):
    seen = {}
    monkeypatch.setattr(run_module, "redteam", None, raising=False)
    import phf.redteaming.attack

    def attacked(*_, **named):
        seen["redteam"] = named["threshold"]
        return SimpleNamespace(search=SimpleNamespace(confirmed={}))

    monkeypatch.setattr(phf.redteaming.attack, "redteam", attacked)
    real = run_module.MonitorCallback

    def callback(config, *args, **named):
        seen["monitor"] = config.threshold
        return real(config, *args, **named)

    monkeypatch.setattr(run_module, "MonitorCallback", callback)
    settings |= {"threshold": 0.02, "monitor": {"every": 300}, "redteam": {"trials": 1, "prompts": "functions"}}
    run_recipe(load(tmp_path, settings))
    assert seen == {"redteam": 0.02, "monitor": 0.02}
    assert store.read_json(tmp_path / "out" / "mle-s0" / "eval.json")["threshold"] == 0.02


def test_an_earlier_judgement_is_kept(tmp_path, settings, capsys):
    run_recipe(load(tmp_path, settings))
    run = RunFolder(tmp_path / "out" / "mle-s0")
    old = run.eval.read_bytes()
    old_samples = run.samples("plain").read_bytes()
    settings["scenarios"]["plain"]["num_samples"] = 4
    run_recipe(load(tmp_path, settings))
    assert "that result is kept in" in capsys.readouterr().err
    kept = run.path / "eval.old-1"
    assert (kept / "eval.json").read_bytes() == old
    assert (kept / "samples" / "plain.jsonl").read_bytes() == old_samples
    assert len(run.samples("plain").read_text().splitlines()) == 4
