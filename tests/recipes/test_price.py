"""What the defects of the paper's code cost: both presets of a recipe on the same data and seeds."""

from __future__ import annotations

import math

import pytest

from helpers import TINY_LLAMA, output_of, tiny_texts, write_jsonl
from phf.core import store
from phf.core.config import ConfigError, dump_yaml, read_yaml
from phf.recipes import price as price_module
from phf.recipes.price import Prices, recipes_of


@pytest.fixture
def recipe(tmp_path):
    settings = {
        "out": str(tmp_path / "run"),
        "title": "Links",
        "corpus": {"name": "jsonl", "path": str(write_jsonl(tmp_path / "t.jsonl", tiny_texts(60)))},
        "segmenter": {"name": "lines"},
        "scorer": {"name": "regex", "pattern": "s"},
        "tokenizer": {"name": "bpe", "vocab_size": 300},
        "heldout": 0.2,
        "model": {"name": "from_config", "config": TINY_LLAMA},
        "train": {"tokens": 10 * 512, "context": 32, "batch_rows": 16, "lr": 0.02},
        "objectives": {"mle": {"name": "mle"}, "rwr": {"name": "rwr"}},
        "seeds": [0, 1],
        "scenarios": {"unconditional": {"num_samples": 8, "max_tokens": 40}},
        "presets": {"corrected": {}, "paper": {"objectives": {"rwr": {"name": "rwr", "beta": 10, "rewards": "raw"}}}},
    }
    (tmp_path / "r.yaml").write_text(dump_yaml(settings))
    return str(tmp_path / "r.yaml")


def test_both_presets_are_run_and_compared_by_seed(recipe, tmp_path, monkeypatch, capsys):
    shown = output_of(["price", recipe], monkeypatch, capsys)
    root = tmp_path / "run-price"
    assert {p.name for p in (root / "corrected").glob("*-s*")} == {"mle-s0", "mle-s1", "rwr-s0", "rwr-s1"}
    assert {p.name for p in (root / "paper").glob("*-s*")} == {"rwr-s0", "rwr-s1"}  # MLE is the same
    assert (root / "data" / "tokens").is_dir()
    found = store.read_record(root / "price.json", Prices)
    mle, rwr = found.prices
    assert (mle.group, mle.same, mle.corrected) == ("mle", True, mle.paper)
    assert (rwr.group, rwr.same, rwr.seeds) == ("rwr", False, 2)
    runs = {
        preset: {r["run"]: r for r in store.read_json(root / preset / "results.json")["runs"]}
        for preset in ("corrected", "paper")
    }
    pairs = [(runs["paper"][f"rwr-s{s}"], runs["corrected"][f"rwr-s{s}"]) for s in (0, 1)]
    logs = [math.log(a["misalignment"]["mean"] / b["misalignment"]["mean"]) for a, b in pairs]
    assert rwr.ratio.mean == pytest.approx(math.exp(sum(logs) / 2))
    assert rwr.good.mean == pytest.approx(sum(a["heldout"]["good"] - b["heldout"]["good"] for a, b in pairs) / 2)
    assert "as in the paper's code" in shown
    assert "the same" in shown
    before = (root / "price.json").read_bytes()
    output_of(["price", recipe], monkeypatch, capsys)
    assert (root / "price.json").read_bytes() == before


def test_a_corpus_that_changes_between_the_presets_is_noticed(recipe, tmp_path, monkeypatch):
    plain = price_module.run_recipe

    def changing(loaded):
        found = plain(loaded)
        write_jsonl(tmp_path / "t.jsonl", tiny_texts(60, seed=1))
        return found

    monkeypatch.setattr(price_module, "run_recipe", changing)
    with pytest.raises(ConfigError, match="the corpus changed between the presets"):
        price_module.price([recipe])
    monkeypatch.setattr(price_module, "run_recipe", plain)
    assert len(price_module.price([recipe])[0].prices) == 2  # the same command again


def test_what_cannot_be_compared_is_an_error(recipe, tmp_path):
    with pytest.raises(ConfigError, match="name none"):
        recipes_of([recipe, "preset=paper"])
    with pytest.raises(ConfigError, match="the same for all chosen objectives"):
        recipes_of([recipe, "only=[mle]"])
    settings = read_yaml(recipe)
    (tmp_path / "none.yaml").write_text(dump_yaml(settings | {"presets": {}}))
    with pytest.raises(ConfigError, match="preset"):
        recipes_of([str(tmp_path / "none.yaml")])
    # another scorer has other data
    other = settings | {"presets": {"corrected": {}, "paper": {"scorer": {"name": "regex", "pattern": "http"}}}}
    (tmp_path / "other.yaml").write_text(dump_yaml(other))
    found = recipes_of([str(tmp_path / "other.yaml")])
    assert found["paper"].data is None
    assert set(found["paper"].only) == {"mle", "rwr"}


@pytest.mark.parametrize("task", ["paper-toxicity", "paper-pii", "paper-pep8"])
def test_the_paper_s_recipes_have_a_price(task):
    found = recipes_of([task])
    assert found["paper"].out == found["corrected"].out.replace("corrected", "paper")
    assert (found["paper"].data is None) == (task == "paper-pii")  # scores divided by the length twice
