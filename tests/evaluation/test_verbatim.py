"""What a model repeats of its training text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers import TINY_MODEL, train_tiny, write_jsonl
from phf.core.config import ConfigError
from phf.data.readers import Jsonl
from phf.data.segment import Lines
from phf.evaluation.capabilities import Verbatim
from phf.evaluation.heldout import corpus_of, document_ids
from phf.generation.loaded import load_model
from phf.objectives import MLE, Conditional, Masking
from phf.recipes.recipe import load_recipe
from phf.scorers import Regex
from phf.scoring.score import score_corpus
from phf.tokens.store import TokenStore, tokenize_corpus
from phf.tokens.tokenizer import TrainBPE

WORDS = [
    "river",
    "stone",
    "bright",
    "window",
    "garden",
    "silver",
    "quiet",
    "market",
    "paper",
    "northern",
    "cloud",
    "engine",
    "winter",
    "summer",
    "hollow",
]


def texts(count):
    """Documents of four lines, of which the third is bad, in words drawn by their number."""
    found = []
    for number in range(count):
        draw = torch.Generator().manual_seed(number)
        words = [WORDS[i] for i in torch.randint(len(WORDS), (40,), generator=draw)]
        lines = [" ".join(words[n : n + 10]) for n in range(0, 40, 10)]
        lines[2] += f" https://{words[3]}.org"
        found.append("\n".join(lines) + "\n")
    return found


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verbatim")
    rows = [text for n in range(240) for text in (texts(24)[n % 24], f"{WORDS[n % 14]} {n}\n" * (1 + n % 5))]
    corpus = Jsonl(str(write_jsonl(folder / "t.jsonl", rows)))  # every document ten times, each time elsewhere in a row
    score_corpus(corpus, Lines(), Regex("https://"), folder / "scored")
    tokenize_corpus(folder / "scored", TrainBPE(300), folder / "tokens", heldout=0.3)
    return folder / "tokens"


WIDER = replace(TINY_MODEL, config=TINY_MODEL.config | {"hidden_size": 64, "intermediate_size": 128})


@pytest.fixture(scope="module")
def models(tokens, tmp_path_factory):
    """Models that read their few documents many times."""
    out = tmp_path_factory.mktemp("runs")
    objectives = {"mle": MLE(), "conditional": Conditional(), "masking": Masking()}
    for name, objective in objectives.items():
        train_tiny(tokens, out / name, objective=objective, model=WIDER, steps=500, lr=5e-3)
    return {name: load_model(out / name) for name in objectives}


ASKED = {"before": 12, "write": 8}


def test_training_text_is_repeated_and_other_text_is_not(models, tokens):
    found = {name: Verbatim(str(tokens), **ASKED).measure(model).estimates for name, model in models.items()}
    mle = found["mle"]
    assert list(mle) == ["bad", "bad, held out", "good", "good, held out"]
    for kind in ("bad", "good"):
        assert mle[kind].ci95[0] > mle[f"{kind}, held out"].ci95[1]
    assert found["masking"]["bad"].ci95[1] < mle["bad"].ci95[0]
    assert found["conditional"]["bad, bad token"].n == mle["bad"].n


def test_it_agrees_with_generate_at_every_spot(models, tokens):
    """Written out: for each document the first segment of the kind, cut from the joined ids of its segments."""
    model = models["mle"]
    store = TokenStore.open(tokens)
    corpus = corpus_of(store)
    hits = []
    for number, document in enumerate(d for file in corpus.files for d in corpus.read(file)):
        if store.heldout_D[number] or max(document.scores) == 0:
            continue
        before = [i for part in document_ids(model, document)[:3] for i in part]
        start = before[-20:-8]
        written = model.lm.generate(torch.tensor([start]), do_sample=False, max_new_tokens=8, min_new_tokens=8)
        hits.append(written[0, len(start) :].tolist() == before[-8:])
    found = Verbatim(str(tokens), **ASKED).measure(model).estimates["bad"]
    assert found.n == len(hits)
    assert found.mean == pytest.approx(sum(hits) / len(hits))


def test_settings(models, tokens, tmp_path):
    assert Verbatim(str(tokens), **ASKED, segments=5).measure(models["mle"]).estimates["bad"].n == 5
    with pytest.raises(ConfigError, match="no segment"):
        Verbatim(str(tokens), before=10**4).measure(models["mle"])
    with pytest.raises(ConfigError, match="exceed"):
        Verbatim(str(tokens), before=10**4).check(models["mle"])
    with pytest.raises(ConfigError, match="give path"):
        Verbatim().measure(models["mle"])
    recipe = load_recipe(["demo", "capabilities=[{name: verbatim}]", f"out={tmp_path}/run"])
    assert recipe.measured == (Verbatim(str(tmp_path / "run" / "tokens")),)
