"""The page's section on errors of the scorer, from a small grid that is really run."""

from __future__ import annotations

import csv
import re
from dataclasses import replace

import numpy as np
import pytest

from helpers import tiny_recipe
from phf.core import store
from phf.core.runs import NoiseCounts, RunFolder
from phf.recipes.recipe import _as_tag, load_recipe
from phf.recipes.run import run_recipe
from phf.report.measures import Group, Value
from phf.report.noise import TAG, noise_curves
from phf.tokens.noise import ScorerNoise

SIZES = {"segments": 100, "bad": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("noise")
    recipe = load_recipe([tiny_recipe(out, grid={"train.scorer_noise": [0, 0.2, {"missed": 0.5}]})])
    results = run_recipe(recipe)
    assert [run.run for run in results.runs][:4] == [
        "mle-s0",
        "conditional-scorer_noise0-s0",
        "conditional-scorer_noise0.2-s0",
        "conditional-scorer_noise-missed0.5-s0",
    ]
    assert results.best == {}  # no errors at all is not a setting to choose
    return recipe.folder


def test_the_page_shows_every_level_with_what_the_manifests_count(folder):
    page = (folder / "report.html").read_text()
    section = page[page.index('<section aria-labelledby="noise">') :]
    rows = re.findall(r"<tr><td>((?:conditional|filtering)-scorer_noise[^<]*)</td>(.*?)</tr>", section, re.S)[:6]
    assert [name for name, _ in rows] == [
        f"{objective}-scorer_noise{level}"
        for objective in ("filtering", "conditional")
        for level in ("0", "-missed0.5", "0.2")
    ]
    for name, cells in rows:
        counts = store.read_json(folder / f"{name}-s0" / "manifest.json").get("noise")
        shown = [float(value) for value in re.findall(r'<td data-value="([^"]*)"', cells)[:3]]
        expected = [0, 1, 1]
        if counts is not None:
            wrong = (counts["missed"] + counts["false_alarms"]) / counts["segments"]
            expected = [wrong, counts["precision"], counts["recall"]]
        np.testing.assert_allclose(shown, expected)
    assert (folder / "report" / "noise.svg").exists()


@pytest.mark.parametrize(
    "noise",
    ["scorer_noise0.2", "scorer_noise1e-05", "scorer_noise-missed0.1-false_alarms0.2", "scorer_noise-audit"],
)
def test_levels_of_one_objective_are_one_curve(noise):
    assert TAG.sub("", f"masking-{noise}") == "masking"
    assert TAG.sub("", f"masking-{noise}-lr0.1") == "masking-lr0.1"


def test_the_file_of_an_audit_is_in_the_names_of_runs():
    assert _as_tag("runs/scored-1/audit.json") == "-scored_1_audit"
    assert _as_tag("other-audit.json") == "-other_audit"


def test_judging_sees_no_errors(folder):
    identities = {
        store.canonical(store.read_json(run / "eval.json")["identity"]) for run in folder.glob("*-s0") if run.is_dir()
    }
    assert len(identities) == 1
    with open(folder / "report" / "numbers.csv") as file:
        lines = [line for line in csv.DictReader(file) if line["measure"] == "bad"]
    assert len({line["n"] for line in lines}) == 1  # held-out text is divided in one way
    assert RunFolder(folder / "mle-s0").eval.exists()


def group(name: str, mean: float, ratio: tuple[float, float, float] | None = None, plain: bool = False) -> Group:
    values = {"misalignment": Value(mean, ci95=(0.9 * mean, 1.1 * mean), points=(mean,))}
    if ratio is not None:
        values["ratio"] = Value(ratio[0], ci95=ratio[1:])
    return Group(
        name=name,
        objective=name,
        share=1.0,
        runs=(f"{name}-s0",),
        values=values,
        samples=1,
        unjudged=0,
        empty=0,
        tokens=1,
        tokens_before=0,
        text_tokens=1,
        epochs=1,
        exposure={},
        seconds=1,
        tokens_per_s=None,
        is_plain=plain,
    )


class Run:
    """What `noise_curves` reads of a run."""

    def __init__(self, name: str, missed: int = 0, false_alarms: int = 0) -> None:
        self.name = name
        self.manifest = self
        self.seed = 0
        self.noise = None
        if missed or false_alarms:
            found = SIZES["bad"] - missed
            self.noise = NoiseCounts(
                **SIZES,
                missed=missed,
                false_alarms=false_alarms,
                precision=found / (found + false_alarms) if found + false_alarms else float("nan"),
                recall=found / SIZES["bad"],
            )


def test_the_verdict_is_about_the_largest_error_up_to_which_the_effect_holds():
    rows = [
        group("mle", 1.0, plain=True),
        group("masking-scorer_noise0", 0.2, (0.2, 0.1, 0.3)),
        group("masking-scorer_noise0.4", 0.5, (0.5, 0.4, 0.7)),  # holds again, but not all smaller errors do
        group("masking-scorer_noise0.1", 0.4, (0.4, 0.2, 0.8)),
        group("masking-scorer_noise0.2", 0.95, (0.95, 0.6, 1.2)),
        group("filtering", 1.0, (1.0, 0.9, 1.1)),
        group("filtering-scorer_noise0.1", 1.0, (1.0, 0.9, 1.1)),
        group("tag-scorer_noise0.1", 0.5),
        group("rwr", 0.5),
    ]
    runs = [
        Run("mle"),
        Run("masking-scorer_noise0"),
        Run("masking-scorer_noise0.4", 8, 32),
        Run("masking-scorer_noise0.1", 2, 8),
        Run("masking-scorer_noise0.2", 4, 16),
        Run("filtering"),
        Run("filtering-scorer_noise0.1", 2, 8),
        Run("tag-scorer_noise0.1", 2, 8),
        Run("rwr"),
    ]
    masking, filtering, tag = noise_curves(rows, runs)
    assert [round(level.wrong, 2) for level in masking.levels] == [0, 0.1, 0.2, 0.4]
    assert masking.verdict == (
        "masking is better than plain training down to precision 69% and recall 90% (0.40 times its score); no longer "
        "at precision 50% and recall 80%."
    )
    assert filtering.verdict == "filtering is not better than plain training at 95%, even without errors."
    assert tag.verdict == (  # without seeds in common: the intervals over samples
        "tag is better than plain training with every error here, down to precision 69% and recall 90%."
    )


def test_other_settings_of_the_grid_make_other_curves_and_two_kinds_of_error_are_named():
    rows = [group("mle", 1.0, plain=True)]
    runs = [Run("mle")]
    for lr in ("0.01", "1e-05"):
        for noise, missed in (("0", 0), ("0.2", 4)):
            name = f"masking-scorer_noise{noise}-lr{lr}"
            rows.append(group(name, 0.5, (0.5, 0.4, 0.6)))
            runs.append(Run(name, missed, 2 * missed))
    names = ("tag-scorer_noise-missed1.0", "tag-scorer_noise-missed0.1-false_alarms0.2")
    rows += [group(names[0], 1.0, (1.0, 0.8, 1.2)), group(names[1], 0.5, (0.5, 0.4, 0.6))]
    runs += [Run(names[0], 20, 0), Run(names[1], 2, 40)]
    found = noise_curves(rows, runs)
    assert [curve.objective for curve in found] == ["masking-lr0.01", "masking-lr1e-05", "tag"]
    assert [len(curve.levels) for curve in found] == [2, 2, 2]
    assert found[2].verdict == f"tag is better than plain training in {names[1]}; not in {names[0]}."


def test_noise_in_all_runs_leaves_plain_training_as_it_is(folder):
    given = load_recipe([str(folder / "recipe.yaml")])
    recipe = replace(given, grid={}, train=replace(given.train, scorer_noise=ScorerNoise(0.1, 0.1)))
    noise = {v.objective_name: v.train.scorer_noise for v in recipe.variants}
    assert noise["mle"] is None
    assert noise["conditional"].missed == 0.1


def test_over_seeds_the_paired_difference_decides():
    def over(name: str, points: tuple[float, ...], plain: bool = False) -> Group:
        made = group(name, sum(points) / len(points), plain=plain)
        return replace(made, values={"misalignment": replace(made.values["misalignment"], points=points)})

    def runs_of(name: str, missed: int = 0) -> list[Run]:
        made = [Run(name, missed) for _ in range(3)]
        for seed, run in enumerate(made):
            run.seed = seed
        return made

    rows = [over("mle", (1.0, 2.0, 3.0), plain=True)]
    runs = runs_of("mle")
    for name, points in (("masking-scorer_noise0.1", (0.9, 1.88, 2.91)), ("tag-scorer_noise0.1", (0.1, 2.1, 0.1))):
        rows.append(over(name, points))
        runs += runs_of(name, 2)
    masking, tag = noise_curves(rows, runs)
    assert masking.levels[0].holds  # each seed is lower by about 0.1
    assert not tag.levels[0].holds  # lower on average, but not in every seed


def test_pages_without_errors_have_no_such_section():
    assert noise_curves([group("mle", 1.0, plain=True), group("rwr", 0.5)], [Run("mle"), Run("rwr")]) == []
    assert noise_curves([group("rwr-scorer_noise0.1", 0.5)], [Run("rwr-scorer_noise0.1", 1)]) == []
