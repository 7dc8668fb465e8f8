from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import LINK, folder_bytes, tiny_texts, write_jsonl
from phf.core import store
from phf.core.config import ConfigError
from phf.core.types import Rejected
from phf.data import readers as corpus
from phf.data.readers import Jsonl, Parquet
from phf.data.scored import ScoreCounts, ScoredCorpus
from phf.data.segment import Documents, Given, Lines, Sentences
from phf.scorers import Function, Lexicon, Regex, Scorer
from phf.scoring import score as annotate
from phf.scoring.judge import Judged, ScoringError, judge, judge_documents
from phf.scoring.score import add_scores, score_corpus
from phf.tokens import store as tokens
from phf.tokens.store import tokenize_corpus
from phf.tokens.tokenizer import TrainBPE


def test_scored_data_has_the_published_columns(scored_dir):
    table = pq.read_table(scored_dir / "part-00000.parquet")
    assert set(table.column_names) == {"texts", "scores", "avg_score", "num_sents", "meta", "id"}
    rows = table.to_pylist()
    assert ["".join(r["texts"]) for r in rows] == tiny_texts()
    for row in rows:
        assert row["num_sents"] == len(row["texts"]) == len(row["scores"])
        assert row["avg_score"] == pytest.approx(np.mean(row["scores"]), rel=1e-6)
        for text, score in zip(row["texts"], row["scores"], strict=True):
            assert score == np.float32(LINK.score_text(text))
    assert json.loads(rows[3]["meta"]) == {"n": 3}


def test_manifest_counts_everything(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a http://x.y\\nb"}\n{"text": ""}\nbroken\n')
    manifest = score_corpus(Jsonl(str(path)), Lines(), LINK, tmp_path / "s")
    assert manifest.counts == ScoreCounts(documents=1, segments=2, chars=14, unjudged=0, bad_segments=1)
    assert manifest.rejected == {"empty text": 1, "malformed JSON": 1}
    assert manifest.identity["name"] == "regex"
    assert manifest.labels == {"match": 1}


def test_a_finished_corpus_is_not_scored_again(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", tiny_texts(5))
    first = score_corpus(Jsonl(str(path)), Lines(), LINK, tmp_path / "s")
    monkeypatch.setattr(annotate, "score_shard", None)
    assert score_corpus(Jsonl(str(path)), Lines(), LINK, tmp_path / "s") == first


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "SHARD_BYTES", 2000)
    path = write_jsonl(tmp_path / "a.jsonl", tiny_texts(40))
    score_corpus(Jsonl(str(path)), Lines(), LINK, tmp_path / "one", workers=1)
    score_corpus(Jsonl(str(path)), Lines(), LINK, tmp_path / "two", workers=2)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")
    assert len(folder_bytes(tmp_path / "one")) > 3


WHERE = """
import os, time
def gpu(text):
    time.sleep(0.01)
    return float(os.environ.get("CUDA_VISIBLE_DEVICES", "-1").split(",")[0])
"""


@pytest.mark.parametrize("given, seen", [("3,5", {3.0, 5.0}), ("4", {4.0}), ("", {-1.0})])
def test_each_worker_gets_a_gpu_of_its_own(tmp_path, monkeypatch, given, seen):
    """As far as a machine without any can tell: which ones a worker may use, before torch is loaded."""
    monkeypatch.setattr(corpus, "SHARD_BYTES", 400)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    (tmp_path / "where.py").write_text(WHERE)
    if not given:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    path = write_jsonl(tmp_path / "a.jsonl", tiny_texts(60))
    score_corpus(Jsonl(str(path)), Lines(), Function(f"{tmp_path / 'where.py'}:gpu"), tmp_path / "s", workers=2)
    scored = ScoredCorpus(tmp_path / "s")
    assert {s for file in scored.files for d in scored.read(file) for s in d.scores} == seen


def test_a_scorer_that_names_its_device_keeps_it():
    assert annotate._names_device({"name": "toxicity", "device": "cuda:1"})
    assert annotate._names_device({"name": "combination", "scorers": [{"name": "regex"}, {"device": "cuda:1"}]})
    assert not annotate._names_device({"name": "toxicity", "device": "auto"})
    assert not annotate._names_device({"name": "regex"})


class Failing(Scorer):
    name = "failing"

    def judge_segments(self, segments):
        if "boom" in segments[0]:
            raise RecursionError
        return [float("inf") if "inf" in s else float("nan") if "nan" in s else 0.5 for s in segments], Counter()


def test_a_scorer_that_fails_gives_nan_and_a_reason_never_zero():
    """Defect 6."""
    assert judge(Failing(), ["fine"]) == Judged([0.5])
    failed = judge(Failing(), ["boom", "b"])
    assert np.isnan(failed.scores).all()
    assert failed.failure == "RecursionError"
    infinite = judge(Failing(), ["inf", "b"])
    assert np.isnan(infinite.scores[0])
    assert infinite.scores[1] == 0.5
    assert infinite.failure == "infinite score"
    assert judge(Failing(), ["nan"]).failure == "not a number"


def test_a_corpus_with_too_many_failures_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(type(LINK), "spans", lambda self, text: 1 / 0)
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    with pytest.raises(ScoringError, match=r"2 of 2 segments \(100.0%\) could not be judged.*ZeroDivisionError"):
        score_corpus(Jsonl(str(path)), Lines(), LINK, tmp_path / "s")
    assert not (tmp_path / "s" / "manifest.json").exists()
    manifest = score_corpus(Jsonl(str(path)), Lines(), LINK, tmp_path / "s", max_unjudged=1)
    assert manifest.counts.unjudged == 2
    assert manifest.failures == {"ZeroDivisionError": 2}
    assert pq.read_table(tmp_path / "s" / "part-00000.parquet")["avg_score"].to_pylist() == [None, None]


def test_a_corpus_without_a_usable_document_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ScoringError, match="no usable document.*empty text"):
        score_corpus(Jsonl(str(tmp_path / "a.jsonl")), Lines(), LINK, tmp_path / "s")


def test_a_full_disk_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", tiny_texts(5))

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(pq, "ParquetWriter", full_disk)
        with pytest.raises(OSError, match="No space left"):
            score_corpus(Jsonl(str(path)), Lines(), LINK, tmp_path / "s")
    assert not list((tmp_path / "s").glob("part-*"))
    assert score_corpus(Jsonl(str(path)), Lines(), LINK, tmp_path / "s").counts.documents == 5


SLOW = """
import sys, time
from phf.data import readers as corpus
from phf.scoring import score as annotate
corpus.SHARD_BYTES = 400
real = annotate.score_shard
def slow(job):
    time.sleep(0.2)
    return real(job)
annotate.score_shard = slow
from phf.scorers import Function, Regex
from phf.data.segment import Lines
annotate.score_corpus(corpus.Jsonl(sys.argv[1]), Lines(), Regex(r"https?://\\S+"), sys.argv[2])
"""


def test_kill_9_then_the_same_command_gives_the_same_bytes(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", tiny_texts(30))
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    command = [sys.executable, str(script), str(path)]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    process = subprocess.Popen([*command, str(tmp_path / "killed")])
    while not list((tmp_path / "killed").glob("part-00002.json")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    with pytest.raises(store.StoreError, match="did not finish"):
        ScoredCorpus(tmp_path / "killed")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("part-*.parquet")}
    subprocess.run([*command, str(tmp_path / "killed")], check=True)
    assert folder_bytes(tmp_path / "killed") == folder_bytes(tmp_path / "whole")
    assert all(
        (tmp_path / "killed" / n).stat().st_mtime_ns == t for n, t in before.items() if n <= "part-00002.parquet"
    )


WORKERS = """
import os, sys, time
from phf.data import readers as corpus
from phf.scoring import score as annotate
from phf.data.readers import Jsonl
from phf.scorers import Function
from phf.data.segment import Lines
import re
def slow(text):
    return 0.0 if re.match(r"(a|b|ab)*c", text) else 1.0
if __name__ == "__main__":
    corpus.SHARD_BYTES = 400
    annotate.score_corpus(Jsonl(sys.argv[1]), Lines(), Function(f"{__file__}:slow"), sys.argv[2], workers=2)
"""


def _children(pid: int) -> list[int]:
    import psutil

    return [p.pid for p in psutil.Process(pid).children() if "spawn_main" in " ".join(p.cmdline())]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_killed_workers_or_parent_end_the_run_at_once(tmp_path, victim):
    """A pattern that takes exponential time keeps the workers busy."""
    path = write_jsonl(tmp_path / "a.jsonl", ["ab" * 22 + "d"] * 20)
    (tmp_path / "w.py").write_text(WORKERS)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "w.py"), str(path), str(tmp_path / "s")], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while len(_children(process.pid)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = _children(process.pid)
    time.sleep(3)  # until they are busy
    os.kill(workers[0] if victim == "worker" else process.pid, signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    if victim == "worker":
        assert "run the same command again to resume" in stderr
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{w}") and open(f"/proc/{w}/stat").read().split()[2] != "Z" for w in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.1)


def test_published_scored_data_can_be_read(tmp_path):
    """A file with the columns of the published datasets and some rows that are not scored documents."""
    table = pa.table(
        {
            "texts": [["One.", " Two."], None, ["a"], ["", ""], ["b", ""], ["c"]],
            "meta": [{"pile_set_name": "x"}] * 6,
            "scores": [[0.1, None], [0.1], [0.1, 0.2], [0, 0], [0.5, 0.5], [float("inf")]],
            "avg_score": [0.1] * 6,
            "num_sents": [2] * 6,
        }
    )
    pq.write_table(table, tmp_path / "train.parquet")
    scored = ScoredCorpus(tmp_path)
    items = list(scored.read(scored.files[0]))
    assert [i.reason for i in items if isinstance(i, Rejected)] == [
        "texts or scores is not a list",
        "texts and scores differ in length",
        "empty text",
    ]
    good = [i for i in items if not isinstance(i, Rejected)]
    assert [i.texts for i in good] == [("One.", " Two."), ("b",), ("c",)]
    assert np.isnan(good[0].scores[1])
    assert np.isnan(good[2].scores[0])
    pq.write_table(table.drop(["scores"]), tmp_path / "train.parquet")
    with pytest.raises(store.StoreError, match="no column scores"):
        ScoredCorpus(tmp_path)


def test_metadata_that_is_not_a_mapping_is_kept(tmp_path):
    deep = "[" * 1500 + "]" * 1500
    metas = ['{"n": 1}', "no JSON", deep, "[1]"]
    table = pa.table({"texts": [["a"]] * 4, "meta": metas, "scores": [[0.5]] * 4})
    pq.write_table(table, tmp_path / "train.parquet")
    scored = ScoredCorpus(tmp_path)
    found = [item.meta for item in scored.read(scored.files[0])]
    assert found == [{"n": 1}, {"meta": "no JSON"}, {"meta": deep}, {"meta": "[1]"}]


def test_another_segmenter_is_another_corpus(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", tiny_texts(5))
    lines = score_corpus(Jsonl(str(path)), Lines(), LINK, tmp_path / "s")
    whole = score_corpus(Jsonl(str(path)), Documents(), LINK, tmp_path / "s")
    assert whole.counts.segments == 5 < lines.counts.segments
    assert whole.content != lines.content


def test_odd_published_rows_are_skipped(tmp_path):
    table = pa.table({"texts": pa.array([["a"], ["b"]]), "scores": pa.array([["high"], ["1"]])})
    pq.write_table(table, tmp_path / "a.parquet")
    scored = ScoredCorpus(tmp_path)
    assert [i.reason for i in scored.read(scored.files[0])] == ["a score is not a number"] * 2
    (tmp_path / "a.parquet").write_text("not parquet")
    with pytest.raises(store.StoreError, match="not a Parquet file"):
        ScoredCorpus(tmp_path)


class Batched(Failing):
    """Scores all documents at once, and fails on the whole batch if it fails on one document."""

    def judge_documents(self, documents):
        if any("boom" in s for d in documents for s in d):
            raise ValueError("one of them")
        return [([0.25] * len(d), Counter()) for d in documents]


def test_one_failing_document_does_not_affect_its_batch():
    judged = judge_documents(Batched(), [["fine"], ["boom"], ["fine", "too"]])
    assert judged[0] == Judged([0.5])
    assert judged[1].failure == "RecursionError"
    assert judged[2].scores == [0.5, 0.5]
    assert judge_documents(Batched(), [["fine"], ["x"]]) == [Judged([0.25])] * 2


def test_a_mistake_in_the_scorers_settings_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", tiny_texts(3))
    with pytest.raises(ConfigError, match="cannot read lexicon"):
        score_corpus(Jsonl(str(path)), Lines(), Lexicon(str(tmp_path / "none")), tmp_path / "s")


@pytest.fixture
def two_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "SHARD_BYTES", 4000)
    path = write_jsonl(tmp_path / "a.jsonl", tiny_texts(40))
    score_corpus(Jsonl(str(path)), Lines(), LINK, tmp_path / "s")
    return tmp_path / "s"


def test_scores_are_added_beside_the_text_row_by_row(two_shards):
    before = folder_bytes(two_shards)
    manifest = add_scores(two_shards, Regex("cats"), "cats", workers=2)
    assert folder_bytes(two_shards) == before
    own = ScoredCorpus(two_shards)
    cats = ScoredCorpus(two_shards, "cats")
    assert own.preferences() == ["regex", "cats"]
    assert len(own.files) > 1
    assert cats.manifest.identity["pattern"] == "cats"
    for file in own.files:
        for a, b in zip(own.read(file), cats.read(file), strict=True):
            assert a.texts == b.texts
            assert list(b.scores) == [np.float32(Regex("cats").score_text(t)) for t in b.texts]
    assert set(pq.read_schema(two_shards / "scores" / "cats" / "part-00000.parquet").names) == {"id", "scores"}
    assert manifest.counts.documents == 40
    assert add_scores(two_shards, Regex("cats"), "cats") == manifest


def test_added_scores_that_do_not_match_the_corpus_are_refused(two_shards, tmp_path):
    add_scores(two_shards, Regex("cats"), "cats")
    path = write_jsonl(tmp_path / "b.jsonl", tiny_texts(9, seed=1))
    with pytest.raises(store.StoreError, match="'regex' is the name of the corpus's own scores"):
        add_scores(two_shards, Regex("a"), "regex")
    with pytest.raises(store.StoreError, match="because it names a folder"):
        add_scores(two_shards, Regex("a"), "../x")
    with pytest.raises(store.StoreError, match=r"no scores named 'cat' \(did you mean 'cats'\?\)"):
        ScoredCorpus(two_shards, "cat")
    manifest = store.read_json(two_shards / "scores" / "cats" / "manifest.json")
    store.write_json(two_shards / "scores" / "cats" / "manifest.json", manifest | {"text": "other"})
    with pytest.raises(store.StoreError, match="scores another text"):
        ScoredCorpus(two_shards, "cats")
    score_corpus(Jsonl(str(path)), Lines(), LINK, two_shards)  # another corpus replaces this one and its added scores
    assert ScoredCorpus(two_shards).preferences() == ["regex"]


def test_adding_scores_is_resumed(two_shards, monkeypatch):
    real = annotate.score_shard

    def stops_after_one(job):
        if job.stem.endswith("00001"):
            raise KeyboardInterrupt
        return real(job)

    with monkeypatch.context() as m:
        m.setattr(annotate, "score_shard", stops_after_one)
        with pytest.raises(KeyboardInterrupt):
            add_scores(two_shards, Regex("cats"), "cats")
    assert ScoredCorpus(two_shards).preferences() == ["regex"]
    add_scores(two_shards, Regex("cats"), "cats")
    resumed = folder_bytes(two_shards / "scores" / "cats")
    import shutil

    shutil.rmtree(two_shards / "scores")
    add_scores(two_shards, Regex("cats"), "cats")
    assert folder_bytes(two_shards / "scores" / "cats") == resumed


def test_one_token_store_serves_every_preference(two_shards, tmp_path, monkeypatch):
    """Scoring again never tokenizes again."""
    first = tokenize_corpus(two_shards, TrainBPE(300), tmp_path / "t")
    add_scores(two_shards, Regex("cats"), "cats")
    monkeypatch.setattr(tokens, "run_job", None)
    second = tokenize_corpus(two_shards, TrainBPE(300), tmp_path / "t")
    assert list(second.scores) == ["regex", "cats"]
    assert (first.content, first.tokens) == (second.content, second.tokens)
    own = tokens.TokenStore.open(tmp_path / "t")
    cats = tokens.TokenStore.open(tmp_path / "t", "cats")
    assert own.manifest.identity["pattern"] != cats.manifest.identity["pattern"] == "cats"
    assert own.manifest.content != cats.manifest.content
    expected = [
        s for f in ScoredCorpus(two_shards).files for d in ScoredCorpus(two_shards, "cats").read(f) for s in d.scores
    ]
    np.testing.assert_array_equal(cats.score_S, np.array(expected, np.float32))
    with pytest.raises(store.StoreError, match=r"no scores named 'cat' \(did you mean 'cats'\?\)"):
        tokens.TokenStore.open(tmp_path / "t", "cat")
    # the same segments with scores in another folder: the tokens stay, and the store's own scores are now these
    score_corpus(Jsonl(str(tmp_path / "a.jsonl")), Lines(), Regex("dogs"), tmp_path / "dogs")
    third = tokenize_corpus(tmp_path / "dogs", TrainBPE(300), tmp_path / "t")
    assert third.identity["pattern"] == "dogs"
    assert third.tokens == first.tokens


def test_the_segments_of_a_corpus_can_be_kept(tmp_path):
    """A published dataset, scored again."""
    rows = {
        "texts": [["One. ", "Two."], ["x", "", "y"]],
        "scores": [[0.1, 0.2], [1, 2, 3]],
        "meta": [{"pile_set_name": "Pile-CC"}] * 2,
    }
    pq.write_table(pa.table(rows), tmp_path / "train.parquet")
    source = Parquet(str(tmp_path / "train.parquet"), field="texts")
    score_corpus(source, Given(), LINK, tmp_path / "s")
    scored = ScoredCorpus(tmp_path / "s")
    documents = list(scored.read(scored.files[0]))
    assert [d.texts for d in documents] == [("One. ", "Two."), ("x", "y")]
    assert documents[0].meta == {"meta": {"pile_set_name": "Pile-CC"}}


def test_scores_added_to_a_published_dataset(tmp_path):
    """Rows that are not documents keep their place, so that files stay aligned."""
    rows = {"texts": [["One.", " Two."], None, ["", "b"]], "scores": [[0.1, None], [0.1], [0.2, 0.3]]}
    pq.write_table(pa.table(rows), tmp_path / "train.parquet")
    add_scores(tmp_path, Regex("[Tb]"), "tb", max_unjudged=1)  # the empty segment is not judged
    both = ScoredCorpus(tmp_path), ScoredCorpus(tmp_path, "tb")
    assert len(both[0].files) == 1
    documents = [i for i in both[1].read(both[1].files[0]) if not isinstance(i, Rejected)]
    assert [(d.texts, d.scores) for d in documents] == [(("One.", " Two."), (0, np.float32(0.2))), (("b",), (1,))]


def test_remote_file_systems_work(tmp_path):
    """Corpus and output are in an object store in memory, which cannot rename and has no local paths."""
    from upath import UPath

    for n in range(2):
        write_jsonl(UPath("memory://bucket/corpus") / f"{n}.jsonl", tiny_texts(10, seed=n))
    source = Jsonl("memory://bucket/corpus")
    manifest = score_corpus(source, Lines(), LINK, "memory://bucket/scored")
    assert score_corpus(source, Lines(), LINK, "memory://bucket/scored") == manifest
    for n in range(2):
        write_jsonl(tmp_path / f"{n}.jsonl", tiny_texts(10, seed=n))
    local = score_corpus(Jsonl(str(tmp_path)), Lines(), LINK, tmp_path / "scored")
    assert (local.content, local.counts) == (manifest.content, manifest.counts)
    add_scores("memory://bucket/scored", Regex("cats"), "cats")
    assert ScoredCorpus("memory://bucket/scored").preferences() == ["regex", "cats"]
    assert tokenize_corpus("memory://bucket/scored", TrainBPE(300), tmp_path / "t").counts.documents == 20
    with pytest.raises(store.StoreError, match="--overwrite"):  # nothing can be moved aside there
        score_corpus(source, Documents(), LINK, "memory://bucket/scored")
    with pytest.raises(store.StoreError, match="also holds scores"):
        score_corpus(source, Documents(), LINK, "memory://bucket/scored", overwrite=True)
    score_corpus(source, Lines(), LINK, "memory://bucket/alone")
    changed = score_corpus(source, Documents(), LINK, "memory://bucket/alone", overwrite=True)
    assert changed.counts.segments == 20
    assert ScoredCorpus("memory://bucket/alone").manifest == changed
    with pytest.raises(store.StoreError, match="cannot open nowhere:// paths"):
        score_corpus(source, Lines(), LINK, "nowhere://x")
    with pytest.raises(ConfigError, match="does not exist"):
        Jsonl("memory://bucket/nothing").plan()


def test_another_version_of_the_library_that_cuts_texts_is_another_result(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "t.jsonl", ["One. Two."])
    corpus = Jsonl(str(tmp_path / "t.jsonl"))
    first = score_corpus(corpus, Sentences(), Regex("O"), tmp_path / "out")
    assert score_corpus(corpus, Sentences(), Regex("O"), tmp_path / "out") == first
    monkeypatch.setattr(Sentences, "libraries", {"spacy": "99"})
    again = score_corpus(corpus, Sentences(), Regex("O"), tmp_path / "out")
    assert again.key != first.key
    assert (tmp_path / "out.old-1" / "manifest.json").exists()
