"""The linear probe on hidden states."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from helpers import train_tiny, write_jsonl
from phf.core.config import ConfigError
from phf.data.readers import Jsonl
from phf.data.segment import Given, Lines
from phf.evaluation.capabilities import Probe, Verbatim
from phf.evaluation.capabilities.probe import _hidden_means
from phf.evaluation.evaluate import evaluate_run
from phf.evaluation.heldout import corpus_of, in_tokens_of
from phf.generation.loaded import load_model
from phf.generation.scenario import Scenario
from phf.recipes.recipe import load_recipe
from phf.scorers import GivenScores, Regex
from phf.scoring.score import score_corpus
from phf.tokens.store import TokenStore


@pytest.fixture(scope="module")
def runs(tokens_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("probed")
    train_tiny(tokens_dir, out / "mle", steps=40)
    return out


@pytest.mark.parametrize("layer", [0.0, 0.5, 1.0])
def test_means_are_those_of_one_forward_pass_a_piece(runs, tokens_dir, layer):
    model = load_model(runs / "mle")
    tokens = TokenStore.open(tokens_dir)
    text = in_tokens_of(model, corpus_of(tokens), tokens, 500)
    found = np.stack(list(_hidden_means(model, text, layer, 17)))
    assert len(found) == len(text.score_S)
    number = 0
    for document, last in enumerate(text.doc_ends):
        first = int(text.doc_ends[document - 1]) if document else 0
        begin = int(text.seg_ends[first - 1]) if first else 0
        ids = text.tokens[begin : int(text.seg_ends[last - 1])].tolist()
        states = []
        for at in range(0, len(ids), 16):
            with torch.inference_mode():
                out = model.lm(torch.tensor([[model.start_id, *ids[at : at + 16]]]), output_hidden_states=True)
            states += list(out.hidden_states[round(layer * 2)][0, 1:].numpy())
        for end in text.seg_ends[first:last]:
            expected = np.mean(states[: int(end) - begin], axis=0)
            del states[: int(end) - begin]
            np.testing.assert_allclose(found[number], expected, rtol=1e-4, atol=1e-5)
            begin = int(end)
            number += 1


def test_bad_text_that_is_easy_to_see_is_known(runs, tokens_dir, scored_dir):
    model = load_model(runs / "mle")
    found = Probe(str(tokens_dir)).measure(model)
    assert found.estimates["AUC"].mean > 0.9
    assert found.estimates["AUC"].ci95[0] > 0.8
    assert 0.8 < found.details["balanced_accuracy"] <= 1
    assert Probe(str(scored_dir)).measure(model).estimates["AUC"].mean > 0.9


def test_scores_without_a_pattern_are_chance(runs, tmp_path):
    rng = np.random.default_rng(0)
    rows = [[f"the model reads line {rng.integers(10)}\n" for _ in range(8)] for _ in range(100)]
    lines = [{"text": row, "scores": rng.integers(0, 2, len(row)).tolist()} for row in rows]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    score_corpus(Jsonl(str(tmp_path / "t.jsonl")), Given(cut=Lines()), GivenScores(source="x"), tmp_path / "scored")
    low, high = Probe(str(tmp_path / "scored")).measure(load_model(runs / "mle")).estimates["AUC"].ci95
    assert low < 0.5 < high


def test_text_of_one_kind_and_a_missing_path_are_errors(runs, tmp_path):
    score_corpus(Jsonl(str(write_jsonl(tmp_path / "t.jsonl", ["a\n"] * 9))), Lines(), Regex("z"), tmp_path / "scored")
    with pytest.raises(ConfigError, match="good and bad segments in both halves"):
        Probe(str(tmp_path / "scored")).measure(load_model(runs / "mle"))
    with pytest.raises(ConfigError, match="give path"):
        Probe().measure(load_model(runs / "mle"))


def test_a_recipe_probes_with_its_own_text(runs, tokens_dir, tmp_path):
    recipe = load_recipe(["demo", "capabilities=[{name: probe}]", f"out={tmp_path}/run"])
    assert recipe.measured == (Probe(str(tmp_path / "run" / "tokens")),)
    result = evaluate_run(
        runs / "mle",
        {"plain": Scenario(num_samples=2, max_tokens=4, min_tokens=1)},
        heldout_tokens=200,
        capabilities=[Probe(), Verbatim(before=4, write=4)],
    )
    assert list(result.capabilities[0].main) == ["AUC"]
    assert [c.settings["path"] for c in result.capabilities] == [str(tokens_dir)] * 2  # a run's own text
