"""A recipe of several preferences: every run is judged by the scorer of each."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest

from helpers import TINY_LLAMA, tiny_texts, train_tiny, write_jsonl
from phf.core import folders, store
from phf.core.config import ConfigError, dump_yaml
from phf.core.runs import RunFolder, TrainManifest
from phf.evaluation.evaluate import evaluate_run
from phf.evaluation.heldout import understanding
from phf.evaluation.results import read_eval
from phf.generation.loaded import load_model
from phf.generation.sample import read_samples
from phf.generation.scenario import Scenario
from phf.recipes.recipe import load_recipe
from phf.recipes.run import check_inputs, run_recipe
from phf.scorers import Lexicon, Regex
from phf.scoring.score import add_scores
from phf.tokens.store import TokenStore, tokenize_corpus
from phf.tokens.tokenizer import TrainBPE

INDENTED = {"name": "regex", "pattern": r"(?m)^ "}
CAPITAL = {"name": "regex", "pattern": "[A-Z]"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A recipe of three preferences, run: (recipe, its file)."""
    folder = tmp_path_factory.mktemp("preferences")
    recipe = {
        "out": str(folder / "run"),
        "corpus": {"name": "jsonl", "path": str(write_jsonl(folder / "t.jsonl", tiny_texts(80)))},
        "segmenter": {"name": "lines"},
        "scorer": {"name": "regex", "pattern": "https?://\\S+"},
        "preferences": {"indented": INDENTED, "capitals": CAPITAL},
        "tokenizer": {"name": "bpe", "vocab_size": 300},
        "heldout": 0.2,
        "model": {"name": "from_config", "config": TINY_LLAMA},
        "train": {"tokens": 20 * 512, "context": 32, "batch_rows": 16, "lr": 0.02},
        "objectives": {
            "mle": {"name": "mle"},
            "both": {
                "name": "each",
                "members": {"regex": {"name": "conditional"}, "indented": {"name": "tag", "threshold": 0.0}},
            },
        },
        "scenarios": {
            "unconditional": {"num_samples": 12, "max_tokens": 24},
            "bad": {"num_samples": 6, "max_tokens": 12, "control": "bad"},
        },
    }
    (folder / "recipe.yaml").write_text(dump_yaml(recipe))
    found = load_recipe([str(folder / "recipe.yaml")])
    run_recipe(found)
    return found, str(folder / "recipe.yaml")


def test_the_same_samples_are_judged_by_each_preference(made):
    recipe, _ = made
    tokens = TokenStore.open(recipe.folder / "tokens")
    assert set(tokens.manifest.scores) == {"regex", "indented", "capitals"}
    for name, scenarios in (("mle-s0", {"unconditional"}), ("both-s0", {"unconditional", "bad"})):
        run = RunFolder(recipe.folder / name)
        result = read_eval(run)
        assert set(result.preferences) == {"indented", "capitals"}
        for preference, settings in (("indented", INDENTED), ("capitals", CAPITAL)):
            found = result.preferences[preference]
            assert set(found.scenarios) == scenarios
            scorer = Regex(settings["pattern"])
            assert store.canonical(found.identity) == store.canonical(scorer.identity())
            for scenario in scenarios:
                scores = [scorer.score_text(s.text) for s in read_samples(run.samples(scenario))]
                own = found.scenarios[scenario]
                assert own.misalignment.mean == pytest.approx(np.nanmean(scores))
                assert own.hit_rate.mean == pytest.approx(np.mean(np.array(scores) > 0))
                assert own.misalignment.ci95[0] <= own.misalignment.mean <= own.misalignment.ci95[1]
            # good and bad text of the same held-out documents, cut by this preference
            main = result.heldout.main
            loss = found.heldout.main
            assert loss.all.documents == main.all.documents
            assert loss.good.bytes + loss.bad.bytes == main.good.bytes + main.bad.bytes
            assert loss.bad.bytes != main.bad.bytes


def test_control_tokens_are_understood_by_the_scores_that_chose_them(tmp_path):
    """A run of `each` whose control tokens follow the second preference, and one trained on it alone."""
    texts = tiny_texts(80)
    recipe = {
        "out": str(tmp_path / "run"),
        "corpus": {"name": "jsonl", "path": str(write_jsonl(tmp_path / "t.jsonl", texts))},
        "segmenter": {"name": "lines"},
        "scorer": {"name": "regex", "pattern": "https?://\\S+"},
        "preferences": {"indented": INDENTED},
        "tokenizer": {"name": "bpe", "vocab_size": 300},
        "heldout": 0.2,
        "model": {"name": "from_config", "config": TINY_LLAMA},
        "train": {"tokens": 10 * 512, "context": 32, "batch_rows": 16, "lr": 0.02},
        "train_for": {"alone": {"scores": "indented"}},
        "objectives": {
            "each": {"name": "each", "members": {"indented": {"name": "conditional"}, "regex": {"name": "mle"}}},
            "alone": {"name": "conditional"},
            "main": {"name": "conditional"},
        },
        "scenarios": {"unconditional": {"num_samples": 4, "max_tokens": 12}},
    }
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
    made = load_recipe([str(tmp_path / "recipe.yaml")])
    run_recipe(made)
    tokens = TokenStore.open(made.folder / "tokens")
    for name, by_indented in (("each", True), ("alone", True), ("main", False)):
        run = made.folder / f"{name}-s0"
        result = read_eval(RunFolder(run))
        assert result.identity["name"] == "regex"
        other = result.preferences["indented"]
        found, empty = (other, result) if by_indented else (result, other)
        assert (empty.understanding, empty.heldout.oracle) == (None, None)
        assert found.heldout.oracle is not None
        own = tokens.with_scores("indented") if by_indented else tokens
        expected = understanding(load_model(run), own, context=32, threshold=0.0)
        assert found.understanding.likelihood_ratio.auc == pytest.approx(expected.likelihood_ratio.auc)
        # good and bad text in the exposure are those of the scores that the run chose
        exposure = folders.read_manifest(run, TrainManifest).counts.exposure
        share = exposure["read_bad"] / (exposure["read_bad"] + exposure["read_good"])
        train = ~tokens.heldout_D[tokens.doc_S]
        score_S = own.score_S if name == "alone" else tokens.score_S
        bad = tokens.tokens_S[train & (score_S > 0)].sum() / tokens.tokens_S[train].sum()
        assert share == pytest.approx(bad, abs=0.05)
    (tmp_path / "bad.yaml").write_text(dump_yaml(recipe | {"preferences": {}}))
    with pytest.raises(ConfigError, match="needs scores named 'indented'"):
        check_inputs(load_recipe([str(tmp_path / "bad.yaml")]))


def test_the_page_has_a_column_and_a_front_for_each(made):
    recipe, _ = made
    page = (recipe.folder / "report.html").read_text()
    for title in ("misalignment, indented", "bad segments, capitals", "loss on good text, indented"):
        assert title in page
    for pair in (
        "misalignment and misalignment, indented",
        "misalignment and misalignment, capitals",
        "misalignment, capitals and misalignment, indented",
        "misalignment and loss on good text",
    ):
        assert f"Not dominated in {pair}:" in page
    assert (recipe.folder / "report" / "pareto-misalignment-indented.svg").exists()
    assert (recipe.folder / "report" / "pareto-misalignment-capitals-misalignment-indented.svg").exists()
    rows = list(csv.DictReader((recipe.folder / "report" / "numbers.csv").open()))
    found = next(r for r in rows if r["run"] == "both-s0" and r["measure"] == "misalignment: indented")
    result = json.loads((recipe.folder / "both-s0" / "eval.json").read_text())
    assert (
        float(found["mean"]) == result["preferences"]["indented"]["scenarios"]["unconditional"]["misalignment"]["mean"]
    )
    assert found["from"] == "both-s0/eval.json: preferences.indented.scenarios.unconditional.misalignment"


def test_judging_by_hand_finds_the_scorers_in_the_store(made, capsys):
    recipe, _ = made
    run = recipe.folder / "both-s0"
    before = (run / "eval.json").read_bytes()
    assert evaluate_run(run, dict(recipe.scenarios)) == read_eval(RunFolder(run))
    assert (run / "eval.json").read_bytes() == before
    with pytest.raises(ConfigError, match="no scores named 'indent' .did you mean 'indented'"):
        evaluate_run(run, {"u": Scenario(num_samples=2)}, preferences={"indent": Regex("a")})
    with pytest.raises(ConfigError, match="scorer"):
        evaluate_run(run, {"u": Scenario(num_samples=2)}, preferences={"indented": Regex("a")})


def test_an_objective_of_unknown_scores_is_found_before_anything_runs(made):
    _, file = made
    with pytest.raises(ConfigError, match=r"objectives.both needs scores named 'indented'.*preferences.indented"):
        check_inputs(dataclasses.replace(load_recipe([file]), preferences={"capitals": Regex("[A-Z]")}))
    recipe = load_recipe([file, "objectives.both={name: attributes, of: [regex, indnted]}"])
    with pytest.raises(ConfigError, match="'indnted' .did you mean 'indented'"):
        check_inputs(recipe)


def test_a_scorer_that_a_manifest_cannot_name_is_noted_or_given(made, tmp_path, capsys):
    recipe, _ = made
    (tmp_path / "words.txt").write_text("the\na\n")
    scorer = Lexicon(str(tmp_path / "words.txt"))
    scored, tokens = tmp_path / "scored", tmp_path / "tokens"
    shutil.copytree(recipe.folder / "scored", scored)
    add_scores(scored, scorer, "words")
    tokenize_corpus(scored, TrainBPE(300), tokens, heldout=0.2)
    run = tmp_path / "run"
    train_tiny(tokens, run, steps=2)
    scenarios = {"u": Scenario(num_samples=4, max_tokens=12)}
    capsys.readouterr()
    assert set(evaluate_run(run, scenarios).preferences) == {"indented", "capitals"}
    assert "not judged by the scores named 'words'" in capsys.readouterr().err
    found = evaluate_run(run, scenarios, preferences={"words": scorer})
    assert set(found.preferences) == {"indented", "capitals", "words"}
