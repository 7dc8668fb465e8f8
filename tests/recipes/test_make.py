"""`phf make`: from a wish to a report, with a judge that answers by a rule, and again without asking anything twice."""

from __future__ import annotations

import json

import pytest

from helpers import TINY_LLAMA, phf_inside, rule_judge, tiny_texts, write_jsonl
from phf.core.config import ConfigError, parse_yaml
from phf.recipes.make import make

SMALL = [
    "tokenizer.vocab_size=300",
    f"model.config={json.dumps(TINY_LLAMA)}",
    "train.tokens=3e3",
    "train.context=32",
    "train.compile=false",
    "train.save_every=null",
    "monitor=null",
    "kl.num_samples=4",
    "kl.max_tokens=8",
    "scenarios.unconditional={num_samples: 8, max_tokens: 8, min_tokens: 1}",
    "scenarios.bad_token={num_samples: 4, max_tokens: 8, min_tokens: 1, control: bad}",
]


@pytest.fixture
def place(tmp_path):
    """(folder with a corpus, the judge, the command up to its settings)."""
    write_jsonl(tmp_path / "t.jsonl", tiny_texts(120))
    with rule_judge() as server:
        judge = f"--server {server.url} --model rule"
        command = ["make", "no links", "out", *f"--corpus t.jsonl --n 250 {judge}".split()]
        yield tmp_path, server, command


def test_a_wish_becomes_a_report(place):
    folder, server, command = place
    ran = phf_inside(*command, *SMALL, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    asked = len(server.asked)
    assert asked == 250
    out = folder / "out"
    assert "to train: the same command with --train, or phf run out/recipe.yaml tokenizer.vocab_size=300" in ran.stdout
    assert not (out / "run" / "mle-s0").exists()  # it stops before training, with the cost
    assert "hours of training" in ran.stdout
    audited = json.loads((out / "run" / "scored" / "audit.json").read_text())
    assert audited["labelled"] <= 75  # only labels that the fit did not see
    assert audited["auc"] > 0.9
    held = (out / "scorer" / "heldout.jsonl").read_text().splitlines()
    assert 30 < len(held) < 75
    ran = phf_inside(*command, *SMALL, "--train", cwd=folder)
    assert ran.returncode == 0, ran.stderr
    assert len(server.asked) == asked
    assert (out / "run" / "report.html").exists()
    assert {run["objective"] for run in json.loads((out / "run" / "results.json").read_text())["runs"]} == {
        "mle",
        "filtering",
        "conditional",
        "unlikelihood",
    }


def test_the_rubric_and_the_recipe_may_be_edited(place):
    folder, server, command = place
    ran = phf_inside(*command, *SMALL, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    recipe = folder / "out" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("title: no links", "title: mine"))
    rubric = folder / "out" / "rubric.md"
    rubric.write_text("Is there a link?\n- 0: no\n- 1: hm\n- 2: yes\nBad from: 1\n")
    ran = phf_inside(*command, *SMALL, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    assert len(server.asked) == 500  # another question
    assert parse_yaml(recipe.read_text(), "r")["title"] == "mine"
    assert (folder / "out" / "labels" / "labels.old-1").is_dir()
    assert "labels from 1 on mean bad" in ran.stdout


def test_a_corpus_with_hardly_any_bad_text_says_what_to_do(place):
    folder, _, command = place
    write_jsonl(folder / "t.jsonl", [f"line {n}\n" for n in range(300)])
    ran = phf_inside(*command, cwd=folder)
    assert ran.returncode == 2
    assert "are good; both classes are needed. Label more texts (--n)" in ran.stderr


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["make", "", "out", "--corpus", "t.jsonl", "--by-hand"], "an argument is empty"),
        (["make", " ", "out", "--corpus", "t.jsonl", "--by-hand"], "say in a few words"),
        (["make", "no links", "out", "--by-hand"], "--corpus: name the texts"),
        (["make", "no links", "out", "--corpus", "t.jsonl"], "who labels?"),
        (["make", "no links", "full", "--corpus", "t.jsonl", "--by-hand"], "was not made by `phf make`"),
        (["make", "no links", "old", "--corpus", "t.jsonl", "--by-hand"], "made with another wish (no data)"),
        (["make", "no data", "old", "--corpus", "t.jsonl", "--by-hand"], "made with another corpus"),
        (["make", "no links", "t.jsonl", "--corpus", "t.jsonl", "--by-hand"], "is a file"),
    ],
)
def test_mistakes(tmp_path, arguments, said):
    write_jsonl(tmp_path / "t.jsonl", tiny_texts(5))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    (tmp_path / "old").mkdir()
    made = {"wish": "no data", "corpus": {"name": "jsonl", "path": "other"}, "segmenter": {"name": "lines"}}
    (tmp_path / "old" / "made.json").write_text(json.dumps(made))
    ran = phf_inside(*arguments, cwd=tmp_path)
    assert ran.returncode == 2
    assert said in ran.stderr
    assert not (tmp_path / "out").exists()


def test_an_impossible_plan_is_found_before_labels_are_paid_for(place):
    folder, server, command = place
    huge = json.dumps(TINY_LLAMA | {"hidden_size": 200_000, "intermediate_size": 800_000, "num_hidden_layers": 100})
    ran = phf_inside(*command, *SMALL, f"model.config={huge}", cwd=folder)
    assert ran.returncode == 2
    assert "this recipe cannot run here" in ran.stderr
    assert not server.asked


def test_an_empty_wish_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="in a few words"):
        make(" ", tmp_path / "o", None, None, [])
