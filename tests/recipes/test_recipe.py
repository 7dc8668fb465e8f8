"""Recipes as plans of runs: composition, phases, grids, presets, the best setting, independent commands, plans."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import TINY_LLAMA
from phf.core import store
from phf.core.config import ConfigError, dump_yaml
from phf.core.types import Estimate
from phf.recipes.plan import make_plan, plan_table
from phf.recipes.recipe import load_recipe, packaged
from phf.recipes.run import commands, run_recipe
from phf.report.results import BEST_RULE, RunSummary, best_settings
from phf.training.lm import FromWeights
from phf.training.train import train

OBJECTIVES = ("mle", "filtering", "conditional", "unlikelihood", "rwr", "awr")
TASKS = ("paper-toxicity", "paper-pii", "paper-pep8")


@pytest.mark.parametrize("task, preset", itertools.product(TASKS, ("corrected", "paper", "published")))
def test_every_combination_of_the_papers_recipes_composes(task, preset):
    for objective, phase in itertools.product(OBJECTIVES, ((), ("finetune50",), ("finetune10",))):
        recipe = load_recipe([task, objective, *phase, f"preset={preset}"])
        wanted = [
            v for v in recipe.variants if v.objective_name == objective and v.phase == "".join(phase or ["pretrain"])
        ]
        assert len(wanted) == 1
        assert len(recipe.variants) == (1 if not phase else 2)
        (variant,) = wanted
        assert variant.train.context == 1024
        start = recipe.variants[0].train
        if phase:
            share = {"finetune50": 0.5, "finetune10": 0.1}[phase[0]]
            assert variant.train.total_tokens == pytest.approx(share * start.total_tokens, rel=1e-3)
            assert variant.train.skip_tokens == "auto"
            assert isinstance(variant.model, FromWeights)
        else:
            assert variant.train.total_tokens >= 3.3e9


@pytest.mark.parametrize("task", TASKS)
def test_all_finetuning_recipes_share_their_start(task):
    """Otherwise each recipe would train the start again, which takes days."""
    starts = [
        load_recipe([task, *more]).variants[0] for more in (["mle"], ["mle", "finetune50"], ["rwr", "finetune10"], [])
    ]
    assert all(v.name == "mle-s42" for v in starts)
    assert len({json.dumps(dataclasses.asdict(v.train), default=str) for v in starts}) == 1
    folders = {load_recipe([task, "mle", f"preset={p}"]).folder for p in ("corrected", "paper")}
    assert len(folders) == 2
    both = load_recipe([task, "mle", "conditional"])
    assert both.chosen == ["mle", "conditional"]


def test_the_papers_hyper_parameters_are_those_of_its_code():
    """The paper's figures: learning rate / batch / threshold / alpha / beta of each objective and task."""
    table = {
        "paper-toxicity": {
            "mle": (5e-4, 64),
            "filtering": (5e-4, 64, 7.8e-4),
            "conditional": (5e-4, 64, 5.6e-4, 0.01),
            "unlikelihood": (5e-4, 64, 7.8e-4, 1),
            "rwr": (5e-4, 1024, 10),
            "awr": (1e-3, 1024, 0.5, 10),
        },
        "paper-pii": {
            "mle": (5e-4, 64),
            "filtering": (5e-4, 64, 2.86e-4),
            "conditional": (5e-4, 64, 0, 0.01),
            "unlikelihood": (5e-4, 64, 0, 1),
            "rwr": (5e-4, 64, 10),
            "awr": (5e-4, 64, 0.5, 0.1),
        },
        "paper-pep8": {
            "mle": (8e-4, 64),
            "filtering": (8e-4, 64, 2.361e-3),
            "conditional": (8e-4, 64, 0, 0.1),
            "unlikelihood": (8e-4, 64, 0, 0.01),
            "rwr": (1e-3, 64, 10),
            "awr": (1e-3, 256, 0.05, 1),
        },
    }
    knobs = {
        "filtering": ["threshold"],
        "conditional": ["threshold", "drop"],
        "unlikelihood": ["threshold", "alpha"],
        "rwr": ["beta"],
        "awr": ["alpha", "beta"],
    }
    for task, rows in table.items():
        for v in load_recipe([task, "preset=paper"]).variants:
            lr, batch, *rest = rows[v.objective_name]
            assert (v.train.lr, v.train.batch_rows) == (lr, batch), (task, v.name)
            assert [getattr(v.objective, k) for k in knobs.get(v.objective_name, [])] == rest, (task, v.name)
            if v.objective_name in ("rwr", "awr"):
                assert v.objective.rewards == "raw"
        for v in load_recipe([task]).variants:  # corrected
            if v.objective_name in ("rwr", "awr"):
                assert v.objective.rewards == "standardised"
            if v.objective_name == "unlikelihood":
                assert v.objective.by == "threshold"
    late = {
        v.objective_name: v.train for v in load_recipe(["paper-pii", "finetune50"]).variants if v.phase == "finetune50"
    }
    for name, settings in late.items():
        assert (settings.lr, settings.batch_rows) == (1e-4, 512 if name in ("rwr", "awr") else 128)
    assert set(late) == set(OBJECTIVES)
    by_score = load_recipe(["paper-pii", "unlikelihood", "preset=paper"]).variants[0].objective
    assert by_score.by == "score"
    assert load_recipe(["paper-toxicity", "unlikelihood", "preset=paper"]).variants[0].objective.by == "threshold"


def test_every_packaged_recipe_loads_alone_or_merged_into_another():
    for name in packaged():
        try:
            assert load_recipe([name]).variants
        except ConfigError:
            assert load_recipe(["paper-pii", name]).variants, name


@pytest.fixture
def tiny(scored_dir, tmp_path):
    """The smallest recipe, as a file."""
    recipe = {
        "out": str(tmp_path / "run"),
        "corpus": {"name": "jsonl", "path": str(scored_dir.parent / "texts.jsonl")},
        "segmenter": {"name": "lines"},
        "scorer": {"name": "regex", "pattern": "https?://\\S+"},
        "tokenizer": {"name": "bpe", "vocab_size": 300},
        "heldout": 0.1,
        "model": {"name": "from_config", "config": TINY_LLAMA},
        "train": {"tokens": 20 * 512, "context": 32, "batch_rows": 16, "lr": 0.02},
        "objectives": {n: {"name": n} for n in OBJECTIVES},
        "scenarios": {"unconditional": {"num_samples": 4, "max_tokens": 12}},
    }
    (tmp_path / "tiny.yaml").write_text(dump_yaml(recipe))
    return str(tmp_path / "tiny.yaml")


def test_each_objective_and_phase_trains(tiny):
    """Each takes at least two steps on a tiny model, from the checkpoint of its phase."""
    recipe = load_recipe([tiny, "finetune50", "finetune10", "phases.pretrain={}", "only=null"])
    run_recipe(recipe, only="data")
    assert len(recipe.variants) == 18
    for variant in recipe.variants:
        done = train(
            tokens_dir=recipe.folder / "tokens",
            out=recipe.folder / variant.name,
            model=variant.model,
            objective=variant.objective,
            config=variant.train,
            seed=variant.seed,
        )
        steps, before = {"pretrain": (20, 0), "finetune50": (10, 10), "finetune10": (2, 18)}[variant.phase]
        assert (done.counts.steps, done.counts.tokens_before) == (steps, before * 512)
    checkpoints = {p.name for p in (recipe.folder / "mle-s0" / "checkpoints").iterdir()}
    assert checkpoints == {"checkpoint-10", "checkpoint-18", "checkpoint-20"}


def test_finetuning_continues_with_rows_not_seen_yet(tiny):
    """The rows after those of the starting run, in the same order, as if training had not stopped."""
    import torch

    from phf.core.runs import source_read
    from phf.tokens.store import TokenStore
    from phf.training.batches import TrainingRows
    from phf.training.order import training_order

    recipe = load_recipe([tiny, "finetune50", "mle"])
    run_recipe(recipe, only="data")
    tokens = TokenStore.open(recipe.folder / "tokens")
    start, late = recipe.variants
    train(
        tokens_dir=tokens.path,
        out=recipe.folder / start.name,
        model=start.model,
        objective=start.objective,
        config=start.train,
        seed=start.seed,
    )
    order = training_order(tokens, start.objective, None, 32, 0)
    whole = TrainingRows(order, 20 * 16)
    rest = TrainingRows(order, 10 * 16, first=order.place_at(source_read(late.model.path, tokens.manifest.tokens)))
    assert torch.equal(
        whole.__getitems__(list(range(160, 176)))["input_ids"], rest.__getitems__(list(range(16)))["input_ids"]
    )


def test_runs_that_a_grid_compares_with_come_first(tiny):
    recipe = load_recipe(
        [
            tiny,
            "objectives.near={name: anchored, reference: mle-s0}",
            "only=[near, mle, conditional]",
            "grid={objectives.near.reference: [mle-s0, conditional-s0, /elsewhere]}",
            "seeds=[0]",
        ]
    )
    assert recipe.reference_runs == {"mle-s0", "conditional-s0"}
    assert {v.name for v in recipe.variants[:2]} == recipe.reference_runs
    assert len(recipe.variants) == 5


def test_a_grid_is_every_combination_that_applies(tiny):
    recipe = load_recipe(
        [tiny, "only=[mle, rwr]", "grid={train.lr: [0.01, 0.02], objective.beta: [0.1, 1]}", "seeds=[3]"]
    )
    assert [v.name for v in recipe.variants] == [
        "mle-lr0.01-s3",
        "mle-lr0.02-s3",
        "rwr-lr0.01-beta0.1-s3",
        "rwr-lr0.01-beta1-s3",
        "rwr-lr0.02-beta0.1-s3",
        "rwr-lr0.02-beta1-s3",
    ]
    found = {v.name: v for v in recipe.variants}
    assert found["rwr-lr0.01-beta1-s3"].train.lr == 0.01
    assert found["rwr-lr0.01-beta1-s3"].objective.beta == 1
    only_one = load_recipe([tiny, "only=[rwr, awr]", "grid={objectives.awr.beta: [0.1, 1]}"])
    assert [v.name for v in only_one.variants] == ["rwr-s0", "awr-beta0.1-s0", "awr-beta1-s0"]
    for wrong, message in (
        ("grid={lr: [1]}", "'lr' is none of train.SETTING"),
        ("grid={train.lr: []}", "has no values"),
        ("grid={objective.bta: [1]}", "applies to none of"),
        ("grid={train.lrr: [1]}", "unknown key"),
        ("grid={train.lr: [1, 1]}", "two runs would be named"),
        ("only=[mel]", "did you mean 'mle'"),
        ("preset=papre", "'papre' is not one of the recipe's"),
        ("phases={late: {share: 0}}", "more than 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_recipe([tiny, wrong])
    with pytest.raises(ConfigError, match="no objective 'mel'"):
        load_recipe([tiny, "finetune50", "finetune_from=mel"])


def test_settings_win_over_a_preset_which_is_merged_once(tiny, tmp_path):
    extra = tmp_path / "p.yaml"
    extra.write_text(dump_yaml({"preset": "slow", "presets": {"slow": {"train": {"lr": 0.001}}}}))
    assert load_recipe([tiny, str(extra)]).train.lr == 0.001
    changed = load_recipe([tiny, str(extra), "train.lr=0.5"])
    assert changed.train.lr == 0.5
    command = [sys.executable, "-m", "phf", "run", tiny, str(extra), "train.lr=0.5", "--dry-run"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    (tmp_path / "again.yaml").write_text(printed.stdout)
    assert load_recipe([str(tmp_path / "again.yaml")]).train.lr == 0.5


def run(group: str, good: float, half: float, misalignment: float, objective: str = "rwr") -> RunSummary:
    """A run with these numbers: held-out loss on good text with its interval, and misalignment."""
    return RunSummary(
        objective=objective,
        run=f"{group}-s0",
        group=group,
        phase="pretrain",
        share=1.0,
        settings={},
        seed=0,
        tokens=1,
        tokens_before=0,
        text_tokens=1,
        epochs=1.0,
        misalignment=Estimate.missing(misalignment),
        hit_rate=Estimate.missing(),
        bad_segments=0.0,
        unjudged=0,
        empty=0,
        mean_chars=1.0,
        distinct_2=1.0,
        self_bleu_5=0.0,
        expected_max={},
        kl=None,
        capabilities=[],
        heldout={"good": good},
        heldout_good_ci95=(good - half, good + half),
        train_seconds=1.0,
        parameters=1,
        scenarios={},
    )


def test_the_best_setting_is_by_held_out_loss_then_misalignment():
    runs = [run("a", 1.0, 0.1, 0.5), run("b", 1.15, 0.1, 0.1), run("c", 2.0, 0.1, 0.0), run("d", 9.0, 0.1, 0.0, "mle")]
    found = best_settings(runs)
    assert list(found) == ["rwr pretrain"]  # mle has one setting only
    wide = best_settings([run("a", 1.0, 0.1, 0.5), run("b", 1.05, 0.01, 0.3), run("c", 1.1, 0.02, 0.1)])
    assert wide["rwr pretrain"].group == "c"  # its interval overlaps that of the lowest
    assert found["rwr pretrain"].group == "b"  # not significantly worse than a, and less misaligned; c costs too much
    assert found["rwr pretrain"].candidates == ["a", "b"]
    assert found["rwr pretrain"].rule == BEST_RULE
    assert best_settings([run("a", 1.0, 0.0, 0.2), run("b", 1.5, 0.0, 0.1)])["rwr pretrain"].group == "a"


def test_separate_commands_give_what_one_command_gives(tiny, tmp_path):
    arguments = [tiny, "finetune50", "only=[mle, conditional]", "phases.pretrain={}"]
    recipe = load_recipe(arguments)
    blocks = commands(recipe, arguments)
    assert [[c.split("--only ")[-1] for c in block] for block in blocks[:-1]] == [
        ["data"],
        ["mle-s0"],
        ["conditional-s0", "mle-finetune50-s0", "conditional-finetune50-s0"],
    ]
    with pytest.raises(ConfigError, match="run the same command with --only data first"):
        run_recipe(recipe, only="mle-s0")
    for command in [c for block in blocks for c in reversed(block)]:
        words = shlex.split(command)
        assert words[0] == "phf"
        assert "=" in command
        only = words[words.index("--only") + 1] if "--only" in words else None
        if only == "conditional-finetune50-s0":  # one of them as a command
            subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True)
        else:
            run_recipe(load_recipe([w for w in words[2:] if w not in ("--only", only)]), only=only)
    apart = store.read_json(recipe.folder / "results.json")
    assert len(apart["runs"]) == 4
    recipe.folder.rename(tmp_path / "apart")
    together = run_recipe(recipe)

    def numbers(results):
        return [
            {k: v for k, v in r.items() if "seconds" not in k}
            for r in json.loads(json.dumps(store.jsonable(results)["runs"]))
        ]

    assert numbers(together) == numbers(apart)
    with pytest.raises(ConfigError, match="no run 'mel-s0' in this recipe"):
        run_recipe(recipe, only="mel-s0")


def test_references_of_other_runs_come_first(tiny):
    arguments = [
        tiny,
        "only=[mle, unlikelihood]",
        "kl={reference: {name: local, path: unlikelihood-s0}, num_samples: 6, max_tokens: 8}",
    ]
    recipe = load_recipe(arguments)
    blocks = commands(recipe, arguments)
    assert [[c.split("--only ")[-1] for c in block] for block in blocks[:-1]] == [
        ["data"],
        ["unlikelihood-s0"],
        ["mle-s0"],
    ]
    results = run_recipe(recipe)
    assert [r.run for r in results.runs] == ["unlikelihood-s0", "mle-s0"]
    assert results.runs[0].kl.reference.path == str(recipe.folder / "unlikelihood-s0")
    left = run_recipe(load_recipe([*arguments, "only=[mle]"]))  # its reference is not one of the runs
    assert left.runs[0].kl is None


def test_texts_of_a_reference_from_elsewhere_are_drawn_once_with_the_data(tiny, tmp_path):
    first = load_recipe([tiny, "only=[mle]"])
    run_recipe(first)
    reference = f"kl={{reference: {{name: local, path: {first.folder}/mle-s0}}, num_samples: 6, max_tokens: 8}}"
    second = load_recipe([tiny, "only=[mle, conditional]", f"out={tmp_path}/second", reference])
    run_recipe(second, only="data")
    (texts,) = (second.folder / "cache").glob("reference-*.json")
    stamp = texts.stat().st_mtime_ns
    results = run_recipe(second)
    assert list((second.folder / "cache").glob("reference-*.json")) == [texts]
    assert texts.stat().st_mtime_ns == stamp
    assert all(r.kl.forward.nats_per_text.n == 6 for r in results.runs)


def test_a_run_without_its_start_tells_what_to_do(tiny):
    recipe = load_recipe([tiny, "finetune50", "only=[conditional]"])
    run_recipe(recipe, only="data")
    with pytest.raises(RuntimeError, match="run mle-s0 first"):
        run_recipe(recipe, only="conditional-finetune50-s0")
    half = recipe.folder / "mle-s0" / "checkpoints" / "checkpoint-10"
    half.mkdir(parents=True)
    (half / "config.json").write_text("{}")
    with pytest.raises(RuntimeError, match="missing or incomplete"):
        run_recipe(recipe, only="conditional-finetune50-s0")


def test_one_run_alone_never_makes_the_data_again(tiny):
    recipe = load_recipe([tiny, "only=[mle]"])
    run_recipe(recipe, only="data")
    changed = load_recipe([tiny, "only=[mle]", "tokenizer.vocab_size=310"])
    with pytest.raises(
        ConfigError, match="was made with another tokenizer: run the same command with --only data first"
    ):
        run_recipe(changed, only="mle-s0")


def test_late_budgets_and_pretraining_settings_are_kept(tiny):
    late = load_recipe([tiny, "finetune50", "only=[rwr]", "grid={train.tokens: [1024, 2048]}"])
    assert [v.train.total_tokens for v in late.variants if v.phase == "finetune50"] == [1024, 2048]
    own = load_recipe([tiny, "finetune50", "only=[mle]", "phases.pretrain={train: {lr: 0.5}}"])
    assert [v.name for v in own.variants] == ["mle-s0", "mle-finetune50-s0"]
    assert own.variants[0].train.lr == 0.5
    assert own.variants[0].train.milestones == (5120.0,)
    with pytest.raises(
        ConfigError, match="the first, must suit all: mle has no control tokens, so control=bad does not work"
    ):
        load_recipe([tiny, "scenarios={a: {control: bad}}", "scenarios.unconditional.control=bad"])


# plans


def test_a_plan_is_the_arithmetic(tiny):
    recipe = load_recipe([tiny, "finetune50", "only=[mle]", "phases.pretrain={}"])
    found = make_plan(recipe, tokens_per_s=1000, memory_gb=8, disk_gb=8)
    first, late = found.runs
    width = 16
    layers = 2
    vocab = 300
    parameters = vocab * width + layers * (4 * width * width + 3 * width * 32 + 2 * width) + width
    assert first.parameters == parameters
    assert first.flops == 6 * parameters * 20 * 512
    assert first.hours == pytest.approx(20 * 512 / 1000 / 3600)
    assert late.tokens == 10 * 512
    assert found.flops == first.flops * 1.5
    assert first.memory_gb > 16 * parameters / 1e9
    assert first.disk_gb == pytest.approx(parameters * (12 * 2 + 4) / 1e9)  # the end and the milestone
    assert found.problems == []
    assert found.scoring.documents == 60
    assert found.scoring.exact
    table, lines = plan_table(found)
    assert [row[0] for row in table] == ["mle-s0", "mle-finetune50-s0"]
    assert any("60 documents" in line for line in lines)
    assert (found.attack_samples > 0) == any(line.startswith("attacks: up to") for line in lines)
    search = {"trials": 2, "rounds": 3, "pool": 4, "candidates": 5, "confirm": 6, "continuations": 7}
    asked = load_recipe([tiny, "only=[mle]", "token_attacks=null", *(f"redteam.{k}={v}" for k, v in search.items())])
    planned = make_plan(asked, tokens_per_s=1000, memory_gb=8, disk_gb=8, score=False)
    assert planned.attack_samples == 2 * (4 + 3 * 5 + 6) * 7
    assert any("redteam=null" in line for line in plan_table(planned)[1])
    by_rate = make_plan(recipe, tflops=1e-3, utilisation=0.5, memory_gb=8, disk_gb=8, score=False)
    assert by_rate.runs[0].hours == pytest.approx(first.flops / 5e8 / 3600)


def test_a_plan_for_several_processes(tiny):
    """Two processes take half the hours. With train.shard a device holds half of the state, and all of the
    embeddings and their gradient."""
    settings = {"tflops": 1e-3, "memory_gb": 8, "disk_gb": 8, "score": False}
    common = [tiny, "only=[mle]", "train.micro_rows=4", "train.gradient_checkpointing=true"]
    one, two, divided = (
        make_plan(load_recipe([*common, *more]), processes=n, **settings).runs[0]
        for n, more in ((1, []), (2, []), (2, ["train.shard=true"]))
    )
    assert two.hours == divided.hours == pytest.approx(one.hours / 2)
    assert two.memory_gb == one.memory_gb
    embeddings = 300 * 16
    assert divided.memory_gb - two.memory_gb == pytest.approx((8 * embeddings - 8 * one.parameters) / 1e9)


def test_a_plan_refuses_what_cannot_fit(monkeypatch, capsys):
    def plan(*arguments):
        """(exit status, output, messages) of the command."""
        from phf.cli import main

        monkeypatch.setattr(sys, "argv", ["phf", "plan", *arguments, "--no-score"])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    paper = ["paper-toxicity", "mle", "--tflops", "100"]
    code, out, _ = plan(*paper, "--memory-gb", "80", "--disk-gb", "100")
    assert code == 0
    assert "3,300,065,280" in out
    assert "2.46e+18" in out
    code, _, messages = plan(*paper, "--memory-gb", "4", "--disk-gb", "1")
    assert code == 2
    assert "mle-s42 needs about" in messages
    assert "lower train.micro_rows" in messages
    assert "GB of disk" in messages
    assert "the model has 512 positions" in plan("demo", "train.context=1024")[2]
    code, _, messages = plan("demo", "model.config.model_type=lama")
    assert code == 2
    assert messages.startswith("error: ")


def test_a_plan_reports_what_it_cannot_know(tiny, tmp_path, monkeypatch):
    recipe = load_recipe([tiny, "only=[mle]"])
    monkeypatch.setattr("phf.recipes.plan._time_scorer", lambda *given: raise_(OSError("gone")))
    found = make_plan(recipe, tokens_per_s=1, memory_gb=1, disk_gb=1)
    assert found.scoring == "not known (gone)"
    assert Path(recipe.folder / "scored").exists() is False


def raise_(error):
    raise error
