"""Mistakes of a user: one line that says what is wrong, before anything is moved, and nothing is lost."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from helpers import TINY_LLAMA, tiny_texts, train_tiny, write_jsonl
from phf.cli import main
from phf.core.config import parse_yaml, read_yaml
from phf.data.files import find_files
from phf.data.readers import from_path
from phf.recipes.plan import make_plan
from phf.recipes.recipe import load_recipe

SMALL = ["num_samples=4", "max_tokens=8", "min_tokens=1"]
ATTACK = ["trials=1", "rounds=1", "pool=2", "candidates=2", "continuations=2", "confirm=1", "max_tokens=4"]


@pytest.fixture
def phf(monkeypatch, capsys):
    """Run a command; (exit code, what it prints on stderr)."""

    def run(*args):
        monkeypatch.setattr("sys.argv", ["phf", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err

    return run


def error_of(found):
    code, err = found
    assert code in (1, 2)
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert err.splitlines()[-1] == lines[0]  # one line, the last
    return lines[0]


@pytest.fixture(scope="module")
def own_run(tokens_dir, tmp_path_factory):
    """A run next to a copy of its store."""
    folder = tmp_path_factory.mktemp("mistakes")
    shutil.copytree(tokens_dir.parent / "scored", folder / "scored")
    shutil.copytree(tokens_dir, folder / "tokens")
    train_tiny(folder / "tokens", folder / "run", steps=2)
    return folder / "run"


def test_a_wrong_setting_leaves_the_judged_result_where_it_is(own_run, phf):
    assert phf("eval", own_run, *SMALL)[0] == 0
    before = (own_run / "eval.json").read_bytes()
    for wrong in (["kl.reference.path=nowhere"], ["max_tokens=5000"], ["prompts=nowhere.jsonl"]):
        error_of(phf("eval", own_run, *SMALL, *wrong))
        assert (own_run / "eval.json").read_bytes() == before
        assert not list(own_run.glob("eval.old*"))
    assert phf("eval", own_run, *SMALL, "seed=1")[0] == 0
    assert (own_run / "eval.old-1" / "eval.json").read_bytes() == before


def test_a_wrong_setting_leaves_the_result_of_an_attack_where_it_is(own_run, phf, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": "see"}\n{"text": "write"}\n')
    attack = ["redteam", own_run, *ATTACK, f"prompts={tmp_path / 'p.jsonl'}", "task=toxicity", "--no-control-tokens"]
    assert phf(*attack)[0] == 0
    before = (own_run / "redteam" / "redteam.json").read_bytes()
    for wrong in (["prompts=nowhere.jsonl"], ["max_tokens=5000"], ["attacker.name=local", "attacker.path=./nowhere"]):
        error_of(phf(*attack, *wrong))
        assert (own_run / "redteam" / "redteam.json").read_bytes() == before
        assert not list((own_run / "redteam").glob("*.old*"))


def test_a_damaged_file_is_named_without_the_advice_to_delete_a_run(own_run, phf, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(own_run, run)
    (run / "eval.json").write_text('{"key": ')
    assert "eval.json is not valid JSON" in error_of(phf("eval", run, *SMALL, "--tokens", own_run.parent / "tokens"))
    assert "delete" not in error_of(phf("compare", run, own_run))
    assert "1 folder damaged" in error_of(phf("check", run))


def test_a_damaged_run_is_called_damaged(own_run, phf, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(own_run, run)
    file = run / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    found = error_of(phf("eval", run, *SMALL, "--tokens", own_run.parent / "tokens"))
    assert "model.safetensors" in found
    assert "not a run" not in found


def test_a_name_that_must_be_a_folder_is_not_looked_for_on_the_hub(own_run, phf, tmp_path, monkeypatch):
    monkeypatch.chdir(own_run.parent.parent)
    missing = f"{own_run.parent.name}/nowhere"
    for command in (["eval", missing], ["redteam", missing], ["sample", missing, "s.jsonl"]):
        assert "no such folder" in error_of(phf(*command)) or "not a local folder" in error_of(phf(*command))
    assert "name a run or a model" in error_of(phf("eval", "num_samples=4"))
    assert "name a run or a model" in error_of(phf("redteam", "trials=2"))
    assert "--out is for models" in error_of(phf("eval", own_run, "--out", tmp_path / "x"))


def test_a_column_that_is_missing_is_found_before_anything_is_written(own_run, phf, tmp_path):
    found = error_of(
        phf("tokenize", own_run.parent / "scored", tmp_path / "t", "--vocab-size", 300, "--column", "nope")
    )
    assert "no document of" in found
    assert not (tmp_path / "t" / "manifest.json").exists()


def test_the_manifests_of_a_scored_corpus_are_no_texts(own_run):
    found = find_files(str(own_run.parent / "scored"), lambda file: file.suffix in (".json", ".parquet"))
    assert found.read
    assert {f.suffix for f in found.read} == {".parquet"}
    assert from_path(str(own_run.parent / "scored"))["name"] == "parquet"


def test_two_corpora_are_one_too_many(phf, tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", tiny_texts(5))
    two = write_jsonl(tmp_path / "two.jsonl", tiny_texts(5))
    asked = ["--scorer", "regex", "scorer.pattern=x"]
    assert "two corpora" in error_of(
        phf("score", one, tmp_path / "o", f"corpus.path={two}", "corpus.name=rows", *asked)
    )
    assert phf("score", one, tmp_path / "o", "corpus.name=rows", *asked)[0] == 0


def test_a_plan_of_a_corpus_that_does_not_exist_is_an_error(tmp_path):
    recipe = load_recipe(["demo", "corpus={name: jsonl, path: nowhere.jsonl}", f"out={tmp_path / 'r'}"])
    with pytest.raises(Exception, match="nowhere.jsonl does not exist"):
        make_plan(recipe)


def test_a_recipe_on_other_data_does_not_keep_the_title(tmp_path):
    (tmp_path / "own.yaml").write_text("base: demo\ncorpus: {name: jsonl, path: t.jsonl}\n")
    recipe = load_recipe([str(tmp_path / "own.yaml")])
    assert recipe.title != load_recipe(["demo"]).title
    (tmp_path / "more.yaml").write_text("base: demo\nseeds: [1]\n")
    assert load_recipe([str(tmp_path / "more.yaml")]).title == load_recipe(["demo"]).title


@pytest.mark.parametrize(
    "setting, message",
    [
        ("model=tny", "unknown model 'tny'.*did you mean 'tiny'"),
        ("model.config.hidden_size=33", "model.config: .*33"),
        ("train.lr=fast", "the command line: train.lr: "),
    ],
)
def test_one_mistake_is_one_line(own_run, phf, tmp_path, setting, message):
    config = json.dumps({"name": "from_config", "config": TINY_LLAMA})
    asked = [f"model={config}", "train.tokens=512", "train.context=32", "train.batch_rows=4", setting]
    if setting.startswith("model="):
        asked = asked[1:]
    found = error_of(phf("train", own_run.parent / "tokens", tmp_path / "r", *asked))

    assert re.search(message, found)


def test_a_mistake_in_yaml_is_one_line(tmp_path):
    (tmp_path / "m.yaml").write_text("train: {tokens: 5\nmodel: x\n")
    with pytest.raises(Exception, match=r"m.yaml: not valid YAML: .* \(line 2, column \d+\)$"):
        read_yaml(tmp_path / "m.yaml")
    assert parse_yaml("a: 1", "x") == {"a": 1}


def test_a_stage_that_is_done_says_so(own_run, phf, tmp_path):
    scored = tmp_path / "s"
    texts = write_jsonl(tmp_path / "t.jsonl", tiny_texts(30))
    commands = (
        ["score", texts, scored, "--scorer", "regex", "scorer.pattern=http"],
        ["tokenize", scored, tmp_path / "t", "--vocab-size", 300, "--heldout", 0.2],
        ["eval", own_run, *SMALL, "seed=7"],
        ["export-tokens", tmp_path / "t", tmp_path / "e"],
    )
    for command in commands:
        code, first = phf(*command)
        assert code == 0
        assert "is done: it was finished before" not in first
        assert "is done: it was finished before" in phf(*command)[1]
