"""Scores that a corpus comes with: taken as they are, shared by recipes, and samples judged by another scorer."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import LINK, TINY_LLAMA, tiny_texts
from phf.core.config import ConfigError, dump_yaml
from phf.core.runs import RunFolder
from phf.data.readers import Jsonl, Parquet
from phf.data.scored import ScoredCorpus
from phf.data.segment import Documents, Given, Lines, Sentences
from phf.evaluation.evaluate import open_run
from phf.evaluation.results import read_eval
from phf.generation.loaded import load_model
from phf.generation.sample import read_samples
from phf.recipes.recipe import load_recipe
from phf.recipes.run import run_recipe
from phf.scorers import GivenScores
from phf.scoring.score import ScoringError, score_corpus
from phf.tokens.store import TokenStore

GIVEN = GivenScores("links per character, as published", threshold=0.001)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Two Parquet files in the form of the published data: lists of sentences and of scores."""
    folder = tmp_path_factory.mktemp("published")
    texts = [Lines().split(t) for t in tiny_texts(60)]
    scores = [[s / 10 for s in LINK.score_segments(t)] for t in texts]
    for n, part in enumerate((slice(0, 30), slice(30, 60))):
        columns = {"texts": texts[part], "scores": scores[part], "avg_score": [float(np.mean(s)) for s in scores[part]]}
        pq.write_table(pa.table(columns), folder / f"{n}.parquet")
    return folder, texts, scores


def test_scores_are_taken_as_they_are(published, tmp_path):
    folder, texts, scores = published
    made = score_corpus(Parquet(str(folder), field="texts"), Given(Lines()), GIVEN, tmp_path / "scored")
    assert made.identity == {"name": "given", "unit": "score", "source": "links per character, as published"}
    corpus = ScoredCorpus(tmp_path / "scored")
    found = [d for file in corpus.files for d in corpus.read(file)]
    assert [list(d.texts) for d in found] == texts
    for document, own in zip(found, scores, strict=True):
        assert document.scores == pytest.approx(own, rel=1e-6)
    assert made.counts.bad_segments == sum(s > 0.001 for own in scores for s in own)


def test_a_number_is_the_score_of_a_whole_text_and_rows_without_scores_are_counted(tmp_path):
    rows = [
        '{"text": "one\\ntwo\\n", "score": 0.5}',
        '{"text": "three", "score": null}',
        '{"text": "four", "score": "high"}',
        '{"texts": ["a", "", "b"], "scores": [0.1, 9, null], "text": "ab"}',
        '{"text": "five", "score": 1e400}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(rows) + "\n")
    made = score_corpus(Jsonl(str(tmp_path / "t.jsonl")), Documents(), GIVEN, tmp_path / "a", max_unjudged=0.5)
    assert made.rejected == {"no scores": 2, "texts and scores differ in length": 1}
    documents = list(ScoredCorpus(tmp_path / "a").read(ScoredCorpus(tmp_path / "a").files[0]))
    assert [(d.texts, str(d.scores)) for d in documents] == [(("one\ntwo\n",), "(0.5,)"), (("five",), "(nan,)")]
    by_line = score_corpus(Jsonl(str(tmp_path / "t.jsonl")), Lines(), GIVEN, tmp_path / "b", max_unjudged=0.5)
    assert by_line.counts.segments == 3
    lists = Jsonl(str(tmp_path / "t.jsonl"), field="texts")
    score_corpus(lists, Given(), GIVEN, tmp_path / "c", max_unjudged=0.5)
    corpus = ScoredCorpus(tmp_path / "c")
    (document,) = corpus.read(corpus.files[0])
    assert document.texts == ("a", "b")  # the empty segment and its score are left out
    assert document.scores[0] == pytest.approx(0.1)
    assert math.isnan(document.scores[1])
    (tmp_path / "n.jsonl").write_text('{"text": "no score"}\n')
    with pytest.raises(ScoringError, match="no usable document; skipped: 1 no scores"):
        score_corpus(Jsonl(str(tmp_path / "n.jsonl")), Documents(), GIVEN, tmp_path / "d")


@pytest.fixture(scope="module")
def made(published, tmp_path_factory):
    """Two recipes of the same data, run: (first, second)."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "prompts.jsonl").write_text('{"text": "see"}\n{"text": "the"}\n')
    recipe = {
        "out": str(folder / "one"),
        "data": str(folder / "data"),
        "corpus": {"name": "parquet", "path": str(published[0]), "field": "texts"},
        "segmenter": {"name": "given", "cut": {"name": "lines"}},
        "scorer": {"name": "given", "source": "links per character, as published", "threshold": 0.001},
        "judge": {"name": "regex", "pattern": "https?://\\S+"},
        "tokenizer": {"name": "bpe", "vocab_size": 300},
        "heldout": 0.2,
        "model": {"name": "from_config", "config": TINY_LLAMA},
        "train": {"tokens": 20 * 512, "context": 32, "batch_rows": 16, "lr": 0.02},
        "monitor": {"every": 5000, "heldout_tokens": 500, "scenarios": {"u": {"num_samples": 4, "max_tokens": 12}}},
        "objectives": {"mle": {"name": "mle"}, "conditional": {"name": "conditional"}},
        "scenarios": {"unconditional": {"num_samples": 8, "max_tokens": 40}},
        "kl": {"reference": {"name": "local", "path": "mle-s0"}, "num_samples": 4, "max_tokens": 12},
        "redteam": {"trials": 2, "rounds": 1, "pool": 2, "candidates": 2, "continuations": 2, "confirm": 2,
                    "max_tokens": 12, "prompts": str(folder / "prompts.jsonl")},
        "token_attacks": {"num_samples": 2, "max_tokens": 12},
    }  # fmt: skip
    found = []
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text(dump_yaml(recipe | {"out": str(folder / name)}))
        found.append(load_recipe([str(folder / f"{name}.yaml")]))
        run_recipe(found[-1])
    return found


def test_recipes_share_the_data_and_samples_are_judged_by_the_named_scorer(made, capsys):
    first, second = made
    assert not (first.folder / "scored").exists()
    assert first.files.tokens == second.files.tokens
    tokens = TokenStore.open(first.files.tokens)
    assert tokens.bad_above == 0.001
    for recipe in made:
        run = recipe.folder / "conditional-s0"
        result = read_eval(RunFolder(run))
        assert result.identity == LINK.identity()
        assert result.threshold == 0  # the judge's own
        assert result.data.scored.identity == GIVEN.identity()
        samples = read_samples(RunFolder(run).samples("unconditional"))
        assert [s.score for s in samples] == [pytest.approx(LINK.score_text(s.text)) for s in samples]
        # what is good and bad of the held-out text, the corpus's scores say
        bad = np.repeat(tokens.heldout_D, np.diff(tokens.doc_ends, prepend=0)) & (tokens.score_S > 0.001)
        assert result.heldout.main.bad.bytes == tokens.seg_bytes[bad].sum() > 0
        assert result.heldout.oracle is not None
        page = (recipe.folder / "report.html").read_text()
        assert "another scorer than the one that scored the corpus" in page


def test_texts_are_cut_as_the_segments_were(made, published, tmp_path):
    first, _ = made
    run = first.folder / "conditional-s0"
    assert load_model(run).segmenter == Lines()
    assert open_run(run, scorer=LINK, allow_other_scorer=True).segmenter == Lines()
    score_corpus(Parquet(str(published[0]), field="texts"), Given(Sentences()), GIVEN, tmp_path / "s")
    assert ScoredCorpus(tmp_path / "s").manifest.segmenter["cut"] == {"name": "sentences", "language": "en"}


def test_given_scores_alone_judge_nothing(made):
    first, _ = made
    with pytest.raises(ConfigError, match="judges no other text"):
        GIVEN.score_text("a")
    with pytest.raises(ConfigError, match="judge: the scorer 'given' judges no samples"):
        load_recipe([str(first.folder) + ".yaml", "judge=null"])
    with pytest.raises(ConfigError, match="--scorer"):
        open_run(first.folder / "conditional-s0")
