"""The stages as functions: names, settings and objects, and what cannot be used."""

from __future__ import annotations

import pytest

import phf
from helpers import TINY_LLAMA, write_jsonl

TEXTS = ["see http://a.org/x for more\nfine line\nanother fine line\n"] * 40
SMALL = {"context": 16, "batch_rows": 4, "lr": 1e-2, "tokens": 640, "precision": "fp32"}
LINK = {"name": "regex", "pattern": "https?://"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("functions")
    phf.score(write_jsonl(folder / "t.jsonl", TEXTS), folder / "scored", scorer=LINK, segmenter=phf.Lines())
    phf.tokenize(folder / "scored", folder / "tokens", vocab_size=270, heldout=0.2)
    model = {"name": "from_config", "config": TINY_LLAMA}
    phf.train(folder / "tokens", folder / "runs" / "a", model, "conditional", **SMALL)
    phf.evaluate(folder / "runs" / "a", num_samples=4, max_tokens=12)
    return folder


def test_the_whole_way(place):
    assert (place / "runs" / "a" / "eval.json").exists()
    again = phf.train(place / "tokens", place / "runs" / "b", str(place / "runs" / "a" / "model"), phf.MLE(), **SMALL)
    assert again.model["name"] == "from_weights"
    given = phf.evaluate(place / "runs" / "a", {"mine": {"num_samples": 3, "max_tokens": 12}})
    assert list(given.scenarios) == ["mine"]
    assert len(phf.sample(place / "runs" / "a", phf.Scenario(num_samples=2, max_tokens=12), temperature=0.5)) == 2
    phf.evaluate(place / "runs" / "a", num_samples=4, max_tokens=12)
    sizes = {"trials": 1, "rounds": 1, "pool": 2, "candidates": 2, "continuations": 2, "confirm": 1, "shots": 1}
    prompts = write_jsonl(place / "prompts.jsonl", ["see", "fine"])
    attacked = phf.redteam(place / "runs" / "a", token_attacks=False, prompts=str(prompts), max_tokens=4, **sizes)
    assert attacked.tokens is None
    assert max(s.num_tokens for s in phf.sample(place / "runs" / "a", num_samples=2, max_tokens=3)) <= 3
    assert attacked.search.settings.trials == 1
    page = phf.report(place / "runs" / "a", place / "attacked.html").read_text()
    assert "1 trial of 1 round, with 2 candidates per round" in page
    assert "– to –" not in page
    assert "best 100" not in page  # two prompts have none
    assert phf.report(place / "runs" / "a", place / "page.html").exists()
    assert phf.report is not phf.write_report


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p: phf.score(3, p / "x"), "corpus: expected a path, a name, settings or a Corpus, got 3"),
        (lambda p: phf.score(p / "t.jsonl", p / "x", scorer=lambda s: 0.0), "a function is given by its place"),
        (lambda p: phf.score(p / "t.jsonl", p / "x", scorer=phf.PII), r"PII is a class; give an object, PII\(...\)"),
        (lambda p: phf.score(p / "t.jsonl", p / "x", worker=2), r"unknown setting 'worker' \(did you mean 'workers'"),
        (lambda p: phf.score(p / "t.jsonl", None), "out: expected a path, got None"),
        (lambda p: phf.tokenize(p / "scored", p / "x", vocab_size=10), "vocab_size"),
        (lambda p: phf.tokenize(p / "scored", p / "x", heldout="x"), "heldout"),
        (lambda p: phf.tokenize(p / "scored", p / "x", tokenizer=5), "tokenizer: expected a folder"),
        (lambda p: phf.train(p / "tokens", p / "x", model=3, tokens=1e3), "model"),
        (lambda p: phf.train(p / "tokens", p / "x", "tiny", phf.Conditional, tokens=1e3), "Conditional is a class"),
        (lambda p: phf.train(p / "tokens", p / "x", "tiny", config={"tokens": 1e3, "lrr": 1}), "unknown key"),
        (lambda p: phf.train(p / "tokens", p / "x", "tiny", seed="a", tokens=1e3), "seed"),
        (lambda p: phf.sample(None), "model: expected a path, got None"),
        (lambda p: phf.sample(p / "runs" / "a", {"num_sample": 2}), "num_sample"),
        (lambda p: phf.evaluate(p / "runs" / "a", threshold="a"), "threshold"),
        (lambda p: phf.evaluate(p / "runs" / "a", [phf.Scenario()]), "expected scenarios by name"),
        (lambda p: phf.evaluate(["a", "b"]), "run: expected a path"),
        (lambda p: phf.evaluate(p / "runs" / "a", capabilities="prob"), "unknown capability 'prob'"),
        (lambda p: phf.score(p / "t.jsonl", p / "x", workers="two"), "workers"),
        (lambda p: phf.score(p / "t.jsonl", p / "x", max_unjudged=2), "max_unjudged"),
        (lambda p: phf.tokenize(p / "scored", p / "x", columns=3), "columns"),
        (lambda p: phf.train(p / "tokens", p / "x", "tiny", stop_after="x", tokens=1e3), "stop_after"),
        (lambda p: phf.train(p / "tokens", p / "x", "tiny", callbacks=3, tokens=1e3), "callbacks: expected a list"),
        (lambda p: phf.evaluate(p / "runs" / "a", kl=3), "kl: expected settings"),
        (lambda p: phf.evaluate(p / "runs" / "a", capabilities=3), "capabilities: expected a list"),
        (lambda p: phf.redteam(p / "runs" / "a", config=3), "redteam: expected settings or a RedTeam, got 3"),
        (lambda p: phf.redteam(p / "runs" / "a", trails=1), "did you mean 'trials'"),
        (lambda p: phf.redteam(3), "model: expected a path"),
        (lambda p: phf.report(3), "folder: expected a path"),
        (lambda p: phf.export(3, 4), "run: expected a path"),
        (lambda p: phf.export(p / "runs" / "a", p / "x", name=4), "name: expected text"),
    ],
)
def test_what_cannot_be_used_is_one_error_and_changes_nothing(place, call, message):
    before = sorted(path.name for path in (place / "runs" / "a").iterdir())
    with pytest.raises(phf.ConfigError, match=message):
        call(place)
    assert sorted(path.name for path in (place / "runs" / "a").iterdir()) == before
    assert not (place / "x").exists()
