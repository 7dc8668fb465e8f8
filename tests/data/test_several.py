"""Several corpora as one, and a random part of a corpus."""

from __future__ import annotations

from collections import Counter

import pytest

from helpers import LINK, tiny_texts, train_tiny, write_jsonl
from phf.core.config import ConfigError, validate
from phf.core.types import Document
from phf.data.canaries import AnyCorpus
from phf.data.readers import Folder, Jsonl
from phf.data.segment import Lines
from phf.data.several import RandomDocuments, Several
from phf.objectives import MLE
from phf.scoring.score import score_corpus
from phf.tokens.store import tokenize_corpus
from phf.tokens.tokenizer import TrainBPE
from phf.training.config import MixtureConfig


def documents(corpus):
    return [d for shard in corpus.plan() for d in corpus.read(shard) if isinstance(d, Document)]


@pytest.fixture
def web(tmp_path):
    return Jsonl(str(write_jsonl(tmp_path / "web.jsonl", tiny_texts(40))))


def test_documents_say_from_which_corpus_they_are(web, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a note\n")
    both = validate(
        {
            "name": "several",
            "corpora": {
                "web": {"name": "jsonl", "path": web.path},
                "notes": {"name": "folder", "path": str(tmp_path / "notes")},
            },
        },
        AnyCorpus,
    )
    assert both == Several({"web": web, "notes": Folder(str(tmp_path / "notes"))})
    found = documents(both)
    assert [d.text for d in found] == [*tiny_texts(40), "a note\n"]
    assert Counter(d.meta["corpus"] for d in found) == {"web": 40, "notes": 1}
    assert len({d.id for d in found}) == 41
    assert found[-1].id == "notes:a.txt"
    assert both.fingerprint() != Several({"web": web}).fingerprint()


def test_a_mixture_reads_one_corpus_more_often(web, tmp_path):
    code = Jsonl(str(write_jsonl(tmp_path / "code.jsonl", tiny_texts(30, seed=5))))
    score_corpus(Several({"web": web, "code": code}), Lines(), LINK, tmp_path / "s")
    tokenize_corpus(tmp_path / "s", TrainBPE(300), tmp_path / "t", heldout=0.1, columns=["corpus"])
    mixed = train_tiny(
        tmp_path / "t", tmp_path / "r", MLE(), steps=2, mixture=MixtureConfig("corpus", {"code": 3, "web": 1})
    )
    assert mixed.counts.exposure["source"] > 0
    with pytest.raises(ConfigError, match="no document has corpus='cod'"):
        train_tiny(tmp_path / "t", tmp_path / "x", MLE(), steps=2, mixture=MixtureConfig("corpus", {"cod": 3}))


def test_a_sample_is_that_many_documents_of_all_parts(web, tmp_path):
    whole = {d.id for d in documents(web)}
    drawn = documents(RandomDocuments(web, 10, seed=1))
    assert len(drawn) == 10
    assert {d.id for d in drawn} < whole
    assert [d.id for d in documents(RandomDocuments(web, 10, seed=1))] == [d.id for d in drawn]
    assert {d.id for d in documents(RandomDocuments(web, 10, seed=2))} != {d.id for d in drawn}
    larger = {d.id for d in documents(RandomDocuments(web, 20, seed=1))}
    assert {d.id for d in drawn} < larger  # more of the same draw
    assert {d.id for d in documents(RandomDocuments(web, 1000))} == whole
    counts = Counter(d.id for seed in range(200) for d in documents(RandomDocuments(web, 10, seed=seed)))
    assert len(counts) == 40
    assert max(counts.values()) < 2 * min(counts.values()) + 30  # 50 each on average
    with pytest.raises(ConfigError, match="no document"):
        RandomDocuments(Jsonl(str(write_jsonl(tmp_path / "empty.jsonl", [""]))), 3).plan()
