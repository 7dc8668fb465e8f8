"""Score a corpus: corpus -> segments -> scores -> Parquet. Floor 2.

    phf score README.jsonl scored/ --scorer pii --segmenter lines

`scored/` holds one Parquet file a shard with the columns of the published scored data sets (texts, scores, avg_score,
num_sents, meta, id) and a manifest. A shard is written aside, renamed and then marked (`part-00000.json`, its counts):
a rerun does what has no mark, so any interruption costs at most the shards that were being written.
"""

from __future__ import annotations

import concurrent.futures
import json
import math
import multiprocessing
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter
from tqdm import tqdm

from phf import store
from phf.config import to_plain
from phf.corpus import AnyCorpus, Corpus, rows_of
from phf.scorers import AnyScorer, Scorer
from phf.segment import AnySegmenter, Segmenter
from phf.types import Rejected, ScoredDocument

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "texts": pa.list_(pa.string()),
        "scores": pa.list_(pa.float32()),
        "avg_score": pa.float64(),
        "num_sents": pa.int64(),
        "meta": pa.string(),
    }
)
ROWS_PER_GROUP = 1024


class ScoringError(RuntimeError):
    """Too much of the corpus could not be judged, or a worker died."""


def score_corpus(
    corpus: Corpus,
    segmenter: Segmenter,
    scorer: Scorer,
    out: str | Path,
    workers: int = 1,
    max_unjudged: float = 0.01,
) -> dict[str, Any]:
    """Score `corpus` into directory `out` and return its manifest. Done already: returns at once.

    Raises ScoringError if a worker dies (rerun to resume) or if more than `max_unjudged` of the segments, as a share,
    could not be judged.
    """
    source = {"corpus": to_plain(corpus), "segmenter": to_plain(segmenter), "scorer": to_plain(scorer)}
    key = store.fingerprint([source, corpus.fingerprint(), scorer.identity(), "scored/2"])
    out = Path(out)
    if store.is_done(out, key):
        return store.read_manifest(out, "score")
    shards = corpus.plan()
    store.begin(out, "score", key)
    jobs = [(source, shard, str(out / f"part-{n:05d}")) for n, shard in enumerate(shards)]
    todo = [job for job in jobs if not Path(job[2] + ".json").exists()]
    bar = tqdm(
        total=len(jobs), initial=len(jobs) - len(todo), desc="scoring", unit="shard", disable=None, file=sys.stderr
    )
    unjudged = 0
    with bar:
        for counts in _run(todo, min(workers, len(todo))):
            unjudged += counts["unjudged"]
            bar.set_postfix(chars=counts["chars"], unjudged=unjudged, refresh=False)
            bar.update()
    parts = [store.read_json(job[2] + ".json") for job in jobs]
    totals = {
        name: sum(p[name] for p in parts) for name in ("documents", "segments", "chars", "unjudged", "bad_segments")
    }
    rejected: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    for part in parts:
        rejected.update(part["rejected"])
        failures.update(part["failures"])
        labels.update(part["labels"])
    if totals["documents"] == 0:
        raise ScoringError(f"the corpus has no usable document; set aside: {dict(rejected)}")
    share = totals["unjudged"] / totals["segments"]
    if share > max_unjudged:
        raise ScoringError(
            f"{totals['unjudged']} of {totals['segments']} segments ({share:.1%}) could not be judged, more than the "
            f"{max_unjudged:.1%} allowed (--max-unjudged): {dict(failures)}"
        )
    return store.finish(
        out,
        "score",
        key,
        **source,
        identity=scorer.identity(),
        provenance=corpus.provenance(),
        counts=totals,
        rejected=dict(sorted(rejected.items())),
        failures=dict(sorted(failures.items())),
        labels=dict(labels.most_common()),
        content=store.fingerprint([p["hash"] for p in parts]),
        parts=len(parts),
    )


def _run(jobs: Sequence[tuple[dict[str, Any], dict[str, Any], str]], workers: int) -> Iterator[dict[str, Any]]:
    if workers <= 1:
        yield from map(score_shard, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_die_with_parent) as pool:
        try:
            for future in concurrent.futures.as_completed([pool.submit(score_shard, job) for job in jobs]):
                yield future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise ScoringError(
                "a scoring worker was killed (out of memory?); run the same command again to resume"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _die_with_parent() -> None:
    """A worker whose parent was killed ends instead of waiting for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def score_shard(job: tuple[dict[str, Any], dict[str, Any], str]) -> dict[str, Any]:
    """Score one shard: (configurations, shard, path without ending) -> its counts. Knows nothing of who runs it."""
    source, shard, stem = job
    corpus: Corpus = TypeAdapter(AnyCorpus).validate_python(source["corpus"])
    segmenter: Segmenter = TypeAdapter(AnySegmenter).validate_python(source["segmenter"])
    scorer: Scorer = TypeAdapter(AnyScorer).validate_python(source["scorer"])
    rows: list[ScoredDocument] = []
    rejected: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    for item in corpus.read(shard):
        if isinstance(item, Rejected):
            rejected[item.reason] += 1
            continue
        texts = segmenter.split(item.text)
        scores, failure, found = judge(scorer, texts)
        labels.update(found)
        if failure:
            failures[failure] += 1
        rows.append(ScoredDocument(item.id, tuple(texts), tuple(scores), item.meta))
    scores_S = np.array([s for row in rows for s in row.scores], dtype=np.float32)
    path = Path(stem + ".parquet")
    write_scored(path, rows)
    counts = {
        "documents": len(rows),
        "segments": len(scores_S),
        "chars": sum(len(t) for row in rows for t in row.texts),
        "unjudged": int(np.isnan(scores_S).sum()),
        "bad_segments": int((scores_S > 0).sum()),
        "rejected": dict(rejected),
        "failures": dict(failures),
        "labels": dict(labels),
        "hash": store.file_hash(path),
    }
    store.write_json(stem + ".json", counts)
    return counts


def judge(scorer: Scorer, segments: Sequence[str]) -> tuple[list[float], str | None, Counter[str]]:
    """Scores of a document's segments, why it failed if it did (then all are NaN), and the kinds of faults found.
    Infinite scores are failures.

    This is the one place where a scorer's exception is caught: it becomes NaN and a counted reason, never a score.
    """
    try:
        given, labels = scorer.judge_segments(segments)
        scores = [float(s) for s in given]
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        return [math.nan] * len(segments), type(error).__name__, Counter()
    if len(scores) != len(segments):
        raise ScoringError(f"scorer gave {len(scores)} scores for {len(segments)} segments")
    if any(math.isinf(s) for s in scores):
        return [math.nan if math.isinf(s) else s for s in scores], "infinite score", labels
    return scores, "not a number" if any(math.isnan(s) for s in scores) else None, labels


def write_scored(path: Path, rows: Sequence[ScoredDocument]) -> None:
    """One Parquet file, written aside and renamed. Equal rows give equal bytes (for one version of pyarrow)."""
    means = [[s for s in row.scores if not math.isnan(s)] for row in rows]
    table = pa.table(
        {
            "id": [row.id for row in rows],
            "texts": [list(row.texts) for row in rows],
            "scores": [list(row.scores) for row in rows],
            "avg_score": [sum(m) / len(m) if m else None for m in means],
            "num_sents": [len(row.texts) for row in rows],
            "meta": [json.dumps(row.meta, ensure_ascii=True, sort_keys=True) for row in rows],
        },
        schema=SCHEMA,
    )
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        pq.write_table(table, aside, row_group_size=ROWS_PER_GROUP, compression="zstd")
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


class ScoredCorpus:
    """A scored corpus on disk: what `phf score` wrote, or any folder of Parquet files with `texts` and `scores`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if (self.path / store.MANIFEST).exists() or (self.path / ".started.json").exists():
            self.manifest: dict[str, Any] = store.read_manifest(self.path, "score")
            self.files = [self.path / f"part-{n:05d}.parquet" for n in range(self.manifest["parts"])]
        else:
            self.files = sorted(self.path.rglob("*.parquet")) if self.path.is_dir() else [self.path]
            if not self.files or not all(f.is_file() for f in self.files):
                raise store.StoreError(f"{path} is neither the output of `phf score` nor a folder of Parquet files")
            marks = [[f.name, f.stat().st_size, store.file_hash(f)] for f in self.files]
            self.manifest = {
                "stage": "score",
                "content": store.fingerprint(marks),
                "identity": {"name": "unknown"},
                "scorer": None,
            }
        for file in self.files:
            try:
                missing = {"texts", "scores"} - set(pq.read_schema(file).names)
            except pa.ArrowInvalid:
                raise store.StoreError(f"{file} is not a Parquet file; give the output of `phf score`") from None
            if missing:
                raise store.StoreError(f"{file} has no column {' and '.join(sorted(missing))}: it is not scored data")

    def read(self, file: Path) -> Iterator[ScoredDocument | Rejected]:
        """Documents of one of `files`, in order; rows that are no scored document are set aside with the reason."""
        parquet = pq.ParquetFile(file)
        columns = [name for name in ("id", "texts", "scores") if name in parquet.schema_arrow.names]
        number = 0
        for batch in parquet.iter_batches(ROWS_PER_GROUP, columns=columns):
            for row in rows_of(batch):
                id = f"{file.name}:{number}"
                yield self._document(row, id) if row is not None else Rejected(id, "not UTF-8")
                number += 1

    @staticmethod
    def _document(row: dict[str, Any], default_id: str) -> ScoredDocument | Rejected:
        id = str(row.get("id") or default_id)
        texts, scores = row["texts"], row["scores"]
        if not isinstance(texts, list) or not isinstance(scores, list):
            return Rejected(id, "texts or scores is not a list")
        if len(texts) != len(scores):
            return Rejected(id, "texts and scores differ in length")
        if not all(isinstance(t, str) for t in texts):
            return Rejected(id, "a text is not a string")
        if not all(s is None or isinstance(s, int | float) for s in scores):
            return Rejected(id, "a score is not a number")
        if not any(texts):
            return Rejected(id, "empty text")
        pairs = [(t, math.nan if s is None or math.isinf(s) else s) for t, s in zip(texts, scores, strict=True) if t]
        return ScoredDocument(id, tuple(t for t, _ in pairs), tuple(s for _, s in pairs))
