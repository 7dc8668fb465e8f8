"""`phf ls`, `phf help`, `--version`, and the spellings that people try first."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version

import pytest

from helpers import output_of
from phf.cli import COMMANDS, about, main
from phf.cli.about import KINDS, PLACES, _classes, _imported
from phf.core.config import ConfigError, load
from phf.core.docs import type_text
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
        ("objective.schedule", ["settings: phases"]),
        ("scenario.safe_beam", ["a whole number or null", "SafeBeam"]),
        ("train.tokens", ["must be given"]),
        ("train.mixture.times", ["a mapping", "By value of the column"]),
        ("kl.reference", ["name: local or name: server"]),
        ("corpus", ["settings: path"]),
    ],
)
def test_help_explains_a_setting(setting, parts, monkeypatch, capsys):
    out = " ".join(output_of(["help", setting], monkeypatch, capsys).split())
    for part in parts:
        assert part in out


def test_every_setting_can_be_explained(monkeypatch, capsys):
    seen = 0
    for place, type_ in PLACES.items():
        for cls in _classes(_imported(type_)):
            for field in dataclasses.fields(cls):
                about_it = output_of(["help", f"{place}.{field.name}"], monkeypatch, capsys)
                assert "a value" not in about_it.splitlines()[0], about_it
                seen += 1
    assert seen > 150


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
