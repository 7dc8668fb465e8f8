from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phf.core.config import ConfigError, load, merge, parse_override, read_yaml, validate
from phf.objectives import AnyObjective, Conditional
from phf.recipes.recipe import Recipe, load_recipe, packaged
from phf.training.train import TrainConfig


def test_numbers_without_a_dot_are_numbers(tmp_path):
    (tmp_path / "a.yaml").write_text("a: 1e-4\nb: 5E6\nc: 1_000\nd: 0.5\ne: '1e-4'\nf: 12\ng: 1.5e3\nh: 2e\n")
    assert read_yaml(tmp_path / "a.yaml") == {
        "a": 1e-4,
        "b": 5e6,
        "c": 1000,
        "d": 0.5,
        "e": "1e-4",
        "f": 12,
        "g": 1500.0,
        "h": "2e",
    }


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_float_survives_an_override(value):
    assert parse_override(f"a.b={value!r}") == {"a": {"b": value}}


def test_merge_is_key_by_key_but_another_name_replaces():
    base = {"train": {"lr": 1, "tokens": 5}, "scorer": {"name": "regex", "pattern": "x"}}
    assert merge(base, {"train": {"lr": 2}}) == {"train": {"lr": 2, "tokens": 5}, "scorer": base["scorer"]}
    assert merge(base, {"scorer": {"name": "pii"}})["scorer"] == {"name": "pii"}


def test_later_files_and_overrides_win(tmp_path):
    (tmp_path / "a.yaml").write_text("tokens: 10\nlr: 1e-3\n")
    (tmp_path / "b.yaml").write_text("lr: 2e-3\n")
    config = load([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["clip=0"], TrainConfig)
    assert (config.tokens, config.lr, config.clip) == (10, 2e-3, 0)


def test_every_problem_is_named_at_once_with_its_path():
    with pytest.raises(ConfigError) as caught:
        load_recipe(
            [
                "demo",
                "train.tokns=1",
                "train.lr=fast",
                "objectives.mle.threshold=1",
                "seeds=[]",
                "scenarios.unconditional.top_p=2",
            ]
        )
    message = str(caught.value)
    assert "train.tokns: unknown key (did you mean 'tokens'?)" in message
    assert "train.lr" in message
    assert "'fast'" in message
    assert "objectives.mle" in message
    assert "seeds" in message
    assert "top_p" in message
    assert "5 problems" in message


def test_one_value_where_a_list_belongs_is_shown_as_a_list():
    with pytest.raises(ConfigError, match=r"report_to: expected a list, in brackets \(.*\), got 'tensorboard'"):
        validate({"tokens": 10, "report_to": "tensorboard"}, TrainConfig)


def test_impossible_values_are_errors():
    with pytest.raises(ConfigError, match="alpha"):
        validate({"name": "unlikelihood", "alpha": -1}, AnyObjective)
    with pytest.raises(ConfigError, match="finite"):
        validate({"name": "conditional", "threshold": float("nan")}, AnyObjective)
    with pytest.raises(ConfigError, match="two different"):
        validate({"name": "conditional", "good": "<a>", "bad": "<a>"}, AnyObjective)
    with pytest.raises(ConfigError, match="name"):
        validate({"name": "conditonal"}, AnyObjective)
    assert validate({"name": "conditional", "threshold": 0}, AnyObjective) == Conditional(0.0)


def test_yaml_mistakes_name_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: not valid YAML"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("a: 1\na: 2\n")
    with pytest.raises(ConfigError, match="'a' appears twice"):
        read_yaml(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        read_yaml(tmp_path / "c.yaml")
    (tmp_path / "d.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_yaml(tmp_path / "d.yaml")
    with pytest.raises(ConfigError, match="No such file"):
        read_yaml(tmp_path / "none.yaml")


def test_yaml_makes_no_python_objects(tmp_path):
    (tmp_path / "a.yaml").write_text("a: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "name", [n for n in packaged() if n.startswith("paper-") or n in ("demo", "pep8", "finetuning", "grid")]
)
def test_packaged_recipes_load_alone_and_quick(name):
    assert isinstance(load_recipe([name]), Recipe)
    assert load_recipe([name, "quick"]).quick


def test_unknown_recipe_is_named():
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        load_recipe(["demoo"])


def test_a_file_can_be_based_on_a_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: demo\nout: elsewhere\ntrain_for: {unlikelihood: {lr: 1e-3}}\n")
    recipe = load_recipe([str(tmp_path / "mine.yaml")])
    assert recipe.out == "elsewhere"
    assert {v.objective_name: v.train.lr for v in recipe.variants}["unlikelihood"] == 1e-3
    assert recipe.variants[0].train.lr == recipe.train.lr


def test_settings_for_an_unknown_objective_are_an_error():
    with pytest.raises(ConfigError, match="train_for.mlee: no such objective"):
        load_recipe(["demo", "train_for.mlee.lr=1"])


@pytest.mark.parametrize(
    "setting, message",
    [("seeds=[-1]", "seeds"), ("train.betas=[1.5, 2]", "train.betas"), ("train.report_to=[x", "not valid YAML")],
)
def test_more_impossible_values(setting, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(["demo", setting])


def test_a_recipe_based_on_itself_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match="based on itself"):
        load_recipe(["a.yaml"])


def test_merge_keys_of_yaml_work(tmp_path):
    (tmp_path / "a.yaml").write_text("x: &x {lr: 1}\ny:\n  <<: *x\n  tokens: 2\n")
    assert read_yaml(tmp_path / "a.yaml")["y"] == {"lr": 1, "tokens": 2}


def test_quick_has_a_folder_of_its_own():
    assert str(load_recipe(["demo"]).folder) == "runs/demo"
    assert str(load_recipe(["pep8", "quick"]).folder) == "runs/pep8-quick"


def test_a_folder_does_not_shadow_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert load_recipe(["demo"]).title
