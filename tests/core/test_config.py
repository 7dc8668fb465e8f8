from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phf.core.config import ConfigError, load, merge, parse_override, read_yaml, untyped, validate
from phf.objectives import AnyObjective, Conditional
from phf.recipes.recipe import Recipe, load_recipe, packaged
from phf.training.config import TrainConfig


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
    assert untyped(parse_override(f"a.b={value!r}")) == {"a": {"b": value}}


def test_merge_is_key_by_key_but_another_name_replaces():
    base = {"train": {"lr": 1, "tokens": 5}, "scorer": {"name": "regex", "pattern": "x"}}
    assert merge(base, {"train": {"lr": 2}}) == {"train": {"lr": 2, "tokens": 5}, "scorer": base["scorer"]}
    assert merge(base, {"scorer": {"name": "pii"}})["scorer"] == {"name": "pii"}


def test_later_files_and_overrides_win(tmp_path):
    (tmp_path / "a.yaml").write_text("tokens: 10\nlr: 1e-3\n")
    (tmp_path / "b.yaml").write_text("lr: 2e-3\n")
    config = load([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["clip=0"], TrainConfig)
    assert (config.tokens, config.lr, config.clip) == (10, 2e-3, 0)


def test_all_problems_are_reported_together_with_their_paths():
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
    assert message.startswith("the command line has 5 problems:")


def mistake(arguments):
    with pytest.raises(ConfigError) as caught:
        load_recipe(arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    "setting, message",
    [
        ("objectives.mine.name=unlikelyhood", "unknown objective 'unlikelyhood' (did you mean 'unlikelihood'?)"),
        ("scorer.name=pepp8", "unknown scorer 'pepp8' (did you mean 'pep8'?)"),
        ("corpus.name=installed_package", "unknown reader 'installed_package' (did you mean 'installed_packages'?)"),
        ("segmenter.name=sentence", "unknown segmenter 'sentence' (did you mean 'sentences'?)"),
        ("redteam.attacker.name=evolutions", "unknown attacker 'evolutions' (did you mean 'evolution'?)"),
        ("tokenizer.name=bpee", "unknown tokenizer 'bpee' (did you mean 'bpe'?)"),
        ("model.name=from_weight", "unknown model 'from_weight' (did you mean 'from_weights'?)"),
        ("capabilities=[{name: lambda}]", "unknown capability 'lambda' (did you mean 'lambada'?)"),
        ("kl.reference.name=locl", "unknown reference 'locl' (did you mean 'local'?)"),
        ("train.schedule=cosin", "(did you mean 'cosine'?)"),
        ("during.every=1e6", "during: unknown key (renamed to 'monitor')"),
    ],
)
def test_a_mistyped_name_gets_a_suggestion(setting, message):
    found = mistake(["demo", setting])
    assert message in found
    assert "discriminator" not in found
    assert "tag" not in found


def test_problems_are_reported_under_the_place_they_come_from(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: demo\ntrain: {lr: fast}\n")
    file = str(tmp_path / "mine.yaml")
    expected = f"{file}: train.lr: .*\nthe command line: train.clip: .*"
    assert re.fullmatch(expected, mistake([file, "train.clip=-1"]))
    assert mistake(["demo", "train.tokens=1000", "train.warmup=1e6"]).startswith(
        "the command line: train: the warm-up takes"
    )


@pytest.mark.parametrize(
    "setting, message",
    [
        ("model.name=from_weights", "model.path: missing"),
        ("scorer.name=regex", "scorer.pattern: missing"),
        ("kl.reference.name=server", "kl.reference.url: missing"),
        ("corpus.name=jsonl", "corpus.path: missing"),
        ("monitor.kl.num_samples=8", "monitor.kl.reference: missing"),
        ("trian.lr=1", "trian: unknown key (did you mean 'train'?)"),
        ("objectives.mine.threshold=0", "objectives.mine: which objective? give a name: mle, filtering"),
        ("objectives.mine=mel", "objectives.mine: unknown objective 'mel' (did you mean 'mle'?)"),
        ("train=5", "train: expected settings, as a mapping ({name: value}) or with a dot (a.b=value), got 5"),
        ("train.lr=fast", "train.lr: expected a number, got 'fast'"),
        ("train.lr=0", "train.lr: expected more than 0, got 0"),
        ("seeds=[a]", "seeds.0: expected a whole number, got 'a'"),
        ("seeds=[]", "seeds: expected at least 1 value, got []"),
        ("train.compile=maybe", "train.compile: expected true or false, or 'auto', got 'maybe'"),
        ("train.lr=.nan", "train.lr: expected a finite number, got nan"),
        ("train.warmup=-1", "train.warmup: expected at least 0, got -1"),
        ("train.micro_rows=few", "train.micro_rows: expected a whole number, got 'few'"),
        ("scorer.name=", "scorer: which scorer? give a name: pii, presidio"),
        ("capabilities=[glue]", "capabilities.0: expected settings, such as {name: glue}, got 'glue'"),
        ("redteam.attacker.server=http://x", "redteam.attacker: which attacker? give a name: evolution, local, server"),
        ("grid={train.lr: [fast]}", "grid: train.lr: expected a number, got 'fast'"),
        ("finetune={lrr: 1}", "finetune.lrr: unknown key (did you mean 'lr'?)"),
        ("train_for.mle.lr=fast", "train_for.mle.lr: expected a number, got 'fast'"),
        ("only=[mlee]", "only: no objective 'mlee' (did you mean 'mle'?)"),
    ],
)
def test_a_mistake_in_an_override_is_blamed_on_the_command_line(setting, message):
    found = mistake(["demo", setting])
    assert re.match(r"the command line(: | has \d problems:\n)", found)
    assert f"\n  {message}" in found or f": {message}" in found
    assert "demo has" not in found


def test_what_a_file_hid_is_not_blamed_on_the_command_line_alone(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: demo\nheldout: 3\nonly: [mel]\n")
    file = str(tmp_path / "mine.yaml")
    found = mistake([file, "heldout=0.1"])
    assert found.startswith(f"{file} with the command line: only: no objective")


def test_a_file_of_another_form_is_one_message(tmp_path):
    cases = {"only: 5": "only: expected a list", "presets: 5\npreset: x": "presets: expected settings"}
    for text, message in cases.items():
        (tmp_path / "odd.yaml").write_text(text)
        assert message in mistake(["demo", str(tmp_path / "odd.yaml")])
    assert mistake(["paper-pii", "mle", "preset=[a]"]).startswith("preset '[a]' is not one of the recipe's")


def test_a_bad_member_is_not_also_a_missing_one():
    found = mistake(["demo", "scorer={name: combination, scorers: [{name: pepp8}, {name: pii}]}"])
    assert len(found.splitlines()) == 1
    assert "unknown scorer 'pepp8'" in found
    assert "scorer.scorers: expected at least 2 values" in mistake(
        ["demo", "scorer={name: combination, scorers: [{name: pii}]}"]
    )


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
    with pytest.raises(ConfigError, match="train_for.mlee: no objective 'mlee' .did you mean 'mle'"):
        load_recipe(["demo", "train_for.mlee.lr=1"])


@pytest.mark.parametrize(
    "setting, message",
    [
        ("seeds=[-1]", "seeds"),
        ("scenarios.unconditional.num_samples=true", "expected a whole number"),
        ("scenarios.unconditional.top_p=1e-320", "top_p"),
        ("train.betas=[1.5, 2]", "train.betas"),
        ("train.report_to=[x", "not valid YAML"),
    ],
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


def test_a_setting_of_another_level_is_named():
    from phf.recipes.recipe import TrainStage

    with pytest.raises(ConfigError, match=r"lr: unknown key \(did you mean train.lr\?\)"):
        load([], ["model=tiny", "train.tokens=1e4", "lr=1"], TrainStage)
