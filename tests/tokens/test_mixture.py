"""Mixtures: how often documents of each group are read."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from helpers import train_tiny, whole_block
from phf.core.config import ConfigError
from phf.data.readers import Jsonl
from phf.data.segment import Lines
from phf.scorers import Regex
from phf.scoring.score import score_corpus
from phf.tokens import store as store_module
from phf.tokens.mixture import Mixture
from phf.tokens.store import TokenStore, tokenize_corpus
from phf.tokens.tokenizer import TrainBPE
from phf.training.config import MixtureConfig

KINDS = ("wiki", "web", "books", None)


@pytest.fixture
def tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "BLOCK_SEGMENTS", (3, 3))  # many blocks
    rng = np.random.default_rng(0)
    rows = [{"text": f"document {n}\n"} | ({"kind": k} if (k := KINDS[rng.integers(4)]) else {}) for n in range(300)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score_corpus(Jsonl(str(tmp_path / "t.jsonl")), Lines(), Regex("1"), tmp_path / "scored")
    tokenize_corpus(tmp_path / "scored", TrainBPE(300), tmp_path / "tokens", heldout=0.2, columns=["kind"])
    return TokenStore.open(tmp_path / "tokens"), [row.get("kind") for row in rows]


@pytest.mark.parametrize("seed", range(5))
def test_counts_are_exact_to_one_document_and_blocks_can_be_made_alone(tokens, seed):
    store, kinds = tokens
    times = {"wiki": 2.25, "web": 0.5, "books": 0.0}
    mixture = Mixture(store, "kind", times, 1.0, store.tokenizer, seed)
    found = np.concatenate([mixture.times(store.block(k)) for k in reversed(range(store.num_blocks))][::-1])
    np.testing.assert_array_equal(found, mixture.times(whole_block(store)))
    train = ~store.heldout_D
    assert (found[~train] == 0).all()
    for kind in KINDS:
        mine = train & np.array([k == kind for k in kinds])
        expected = times.get(kind, 1.0)
        assert set(found[mine]) <= {math.floor(expected), math.ceil(expected)}
        assert abs(found[mine].sum() - expected * mine.sum()) < 1


def test_a_value_that_no_document_has_is_an_error(tokens):
    store, _ = tokens
    with pytest.raises(ConfigError, match=r"no document has kind='wikki' \(did you mean 'wiki'"):
        Mixture(store, "kind", {"wikki": 1}, 1.0, store.tokenizer, 0)


def test_a_run_reads_what_its_mixture_says(tokens, tmp_path):
    store, _ = tokens
    plain = train_tiny(store.path, tmp_path / "plain", steps=2)
    only = MixtureConfig("kind", {"wiki": 1}, other=0)
    run = train_tiny(store.path, tmp_path / "wiki", steps=2, mixture=only)
    assert run.key != plain.key
    assert run.counts.epochs > 2 * plain.counts.epochs  # a quarter of the text
