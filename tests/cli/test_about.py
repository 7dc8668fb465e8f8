"""`phf ls`, `phf help`, `--version`, and the spellings that people try first."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version

import pytest

from helpers import output_of
from phf.cli import COMMANDS, about, app, completing, main
from phf.cli.places import KINDS, PLACES, classes_at
from phf.core.config import ConfigError, load
from phf.core.docs import tag_of, type_text
from phf.objectives import Conditional
from phf.recipes.recipe import TrainStage
from phf.scorers import SCORER_NAMES


@pytest.mark.parametrize("kind", KINDS)
def test_ls_lists_names_in_lines_that_fit(kind, monkeypatch, capsys):
    lines = output_of(["ls", kind], monkeypatch, capsys).splitlines()
    assert len(lines) > 2
    assert all(len(line) <= 80 for line in lines)
    names = [line.split()[0] for line in lines]
    assert len(set(names)) == len(names)
    assert kind != "scorers" or names == list(SCORER_NAMES)
    assert kind != "recipes" or {"demo", "paper-pii"} <= set(names)


def test_ls_without_a_kind_lists_all(monkeypatch, capsys):
    out = output_of(["ls"], monkeypatch, capsys)
    assert [line[:-1] for line in out.splitlines() if not line.startswith(" ")] == list(KINDS)
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    "setting, parts",
    [
        ("train.lr", ["a number", "Largest learning rate", "default: 0.0005"]),
        ("train.lr=1e-3", ["a number"]),
        ("train.optimizer", ["adamw or muon", "default: adamw"]),
        ("objective.conditional.drop", ["(conditional)", "share `drop` of the control tokens", "default: 0.01"]),
        ("objective.drop", ["(conditional)", "default: 0.01"]),
        ("objective.schedule", ["phases (", "one after the other"]),
        ("scenario.safe_beam", ["a whole number or null", "SafeBeam"]),
        ("train.tokens", ["must be given"]),
        ("train.mixture.times", ["a mapping", "By value of the column"]),
        ("kl.reference", ["one of local, server"]),
        ("corpus", ["settings: path"]),
    ],
)
def test_help_explains_a_setting(setting, parts, monkeypatch, capsys):
    out = " ".join(output_of(["help", setting], monkeypatch, capsys).split())
    for part in parts:
        assert part in out


def test_every_setting_can_be_explained(monkeypatch, capsys):
    seen = 0
    for place in PLACES:
        for cls in classes_at(place):
            named = place if tag_of(cls) is None else f"{place}.{tag_of(cls)}"
            for field in dataclasses.fields(cls):
                if field.name != "name":
                    first, text, *_, last = output_of(["help", f"{named}.{field.name}"], monkeypatch, capsys).split(
                        "\n  "
                    )
                    assert "a value" not in first
                    assert len(text.split()) > 1, named
                    assert (
                        last.startswith(("default: ", "must be given"))
                        or len(classes_at(place)) > 1
                        or "settings" in last
                    )
                    seen += 1
    assert seen > 250


@pytest.mark.parametrize(
    "setting, parts",
    [
        ("", ["train", "How to train", "objective"]),
        ("conditional", ["objective.conditional:", "drop (a number; default: 0.01)"]),
        ("scorers.pii", ["scorer.pii:", "detectors (default or paper; default: default)"]),
        ("readers.jsonl", ["corpus.jsonl:", "path (text; must be given)", "Longest document"]),
        ("capability.lambada", ["path"]),
        ("attacker.evolution", ["max_words"]),
        ("recipe.demo", ["The whole path", "demo.yaml"]),
        ("model.tiny", ["4 layers of width 128"]),
        ("recipe.title", ["Title of the page.", "default: ''"]),
        ("recipe.grid", ["default: {}"]),
        ("redteam.attacker", ["default: {max_words: 40, name: evolution}"]),
        ("train.betas", ["default: [0.9, 0.95]"]),
        ("gpt2", ["model.gpt2:"]),
        ("quick", ["quick"]),
        ("TRAIN.lr", ["a number"]),
        ("objective.conditional", ["threshold (a number or median or auto; default: auto) Scores above it are bad."]),
    ],
)
def test_help_takes_the_names_that_ls_prints(setting, parts, monkeypatch, capsys):
    out = " ".join(output_of(["help", *setting.split()], monkeypatch, capsys).split())
    for part in parts:
        assert part in out


COMPLETED = [
    ("ls ", "objectives"),
    ("help tr", "train"),
    ("help train.l", "train.lr"),
    ("help objective.con", "objective.conditional"),
    ("score a b --scorer to", "toxicity"),
    ("score a b --segmenter ", "lines"),
    ("run demo q", "quick"),
    ("train t o model = ti", "tiny"),  # bash cuts a word at =
    ("train t o objective =", "conditional"),
    ("train t o train.l", "train.lr="),
    ("sample r s top", "top_p="),
    ("redteam r rou", "rounds="),
]


@pytest.mark.parametrize("typed, wanted", COMPLETED)
def test_tab_completes_names_and_settings(typed, wanted, monkeypatch, capsys):
    words = ["phf", *typed.split(" ")]
    monkeypatch.setenv("_PHF_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"phf {typed}")
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    monkeypatch.setattr("sys.argv", ["phf"])
    with pytest.raises(SystemExit):
        app(prog_name="phf")
    assert wanted in capsys.readouterr().out.split()


def test_tab_completes_whole_words_of_other_shells():
    assert completing.stage("objective=cond") == ["objective=conditional"]
    assert completing.stage("model.name=from_w") == ["model.name=from_weights"]
    assert completing.scenario("temp") == ["temperature="]
    assert completing.recipes("nothing") == []


@pytest.mark.parametrize(
    "wrong, near", [("train.lrr", "'lr'"), ("objective.conditonal", "'conditional'"), ("trian", "'train'")]
)
def test_a_misspelt_setting_gets_a_suggestion(wrong, near, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["phf", "help", wrong])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert f"did you mean {near}" in capsys.readouterr().err


def test_version_and_short_help(monkeypatch, capsys):
    assert output_of(["--version"], monkeypatch, capsys) == f"phf {version('phf')}\n"
    out = output_of(["-h"], monkeypatch, capsys)
    listed = [line.split()[0] for line in out.split("Commands:")[1].splitlines() if line.startswith("  ")]
    assert listed == list(COMMANDS)
    assert about.__doc__ is None  # the help of the program is the app's own


@pytest.mark.parametrize(
    "settings, drop, trackers",
    [
        (["objective=conditional"], 0.01, ()),
        (["objective=conditional", "objective.drop=0.5"], 0.5, ()),
        (["objective.name=mle", "objective=conditional", "train.report_to=tensorboard"], 0.01, ("tensorboard",)),
        (["objective=conditional", "train.report_to=tensorboard,trackio"], 0.01, ("tensorboard", "trackio")),
        (["objective=conditional", "train.report_to=[tensorboard]"], 0.01, ("tensorboard",)),
    ],
)
def test_what_people_type_first(settings, drop, trackers):
    stage = load([], [*settings, "train.tokens=1e6", "model=gpt2", "train.milestones=1e5"], TrainStage)
    assert stage.objective == Conditional(drop=drop)
    assert stage.train.report_to == trackers
    assert stage.train.milestones == (1e5,)


def test_a_misspelt_name_gets_a_suggestion():
    with pytest.raises(ConfigError, match="unknown objective 'conditonal' .did you mean 'conditional'"):
        load([], ["objective=conditonal", "train.tokens=1e6", "model=tiny"], TrainStage)


def test_types_in_words():
    assert type_text(tuple[float, ...]) == "a list of a number"
    assert type_text(tuple[float, float]) == "a list of 2 values"
    assert type_text(bool | None) == "true or false or null"
