"""Score a corpus: corpus -> segments -> scores -> Parquet. Floor 2.

    phf score README.jsonl scored/ --scorer pii --segmenter lines

`scored/` holds one Parquet file a shard with the columns of the published scored data sets (texts, scores, avg_score,
num_sents, meta, id) and a manifest. A shard is written aside, renamed and then marked (`part-00000.json`, its counts):
a rerun does what has no mark, so any interruption costs at most the shards that were being written.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from tqdm import tqdm

from phf.core import store
from phf.core.config import to_plain
from phf.core.device import num_cpus
from phf.core.types import Rejected, ScoredDocument
from phf.data.readers import AnyCorpus, Corpus
from phf.data.scored import ScoredCorpus, text_hash, write_scored, write_scores
from phf.data.segment import AnySegmenter, Given, Segmenter
from phf.scorers import AnyScorer, Scorer
from phf.scoring.judge import ScoringError, judge_documents

Job = tuple[dict[str, Any], dict[str, Any], str]
"""One shard of work: configurations, which shard, and the path without ending of what it makes. Plain JSON values."""

Executor = Callable[[Sequence[Job], str], None]
"""Runs shards somewhere else: (jobs, folder that they write into). Returns when they are done."""
BATCH_CHARS = 1_000_000
"""Characters handed to a scorer at a time."""


class Submitted(RuntimeError):
    """The work was handed to a scheduler; the same command, once it has ended, finishes it."""


def score_corpus(
    corpus: Corpus,
    segmenter: Segmenter,
    scorer: Scorer,
    out: str | Path,
    workers: int = 1,
    max_unjudged: float = 0.01,
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Score `corpus` into directory `out` (a folder, or `s3://...` and the like) and return its manifest. Done already:
    returns at once.

    `executor` runs the shards elsewhere (phf.cluster); where it only hands them over, the manifest is written by a later
    call. Raises ScoringError if a worker dies (rerun to resume) or if more than `max_unjudged` of the segments, as a
    share, could not be judged; what `executor` raises, too.
    """
    source = {"corpus": to_plain(corpus), "segmenter": to_plain(segmenter), "scorer": to_plain(scorer)}
    key = store.fingerprint([source, corpus.fingerprint(), scorer.identity(), "scored/3"])
    out = store.as_path(out)
    if store.is_done(out, key):
        return store.read_manifest(out, "score")
    shards = corpus.plan()
    store.begin(out, "score", key, clean=executor is None)
    jobs = [(source, shard, str(out / f"part-{n:05d}")) for n, shard in enumerate(shards)]
    done = _finished(jobs, workers, max_unjudged, executor, out)
    return store.finish(out, "score", key, **source, identity=scorer.identity(), provenance=corpus.provenance(), **done)


def add_scores(
    scored: str | Path,
    scorer: Scorer,
    name: str,
    workers: int = 1,
    max_unjudged: float = 0.01,
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Score a scored corpus with another scorer, beside the scores that it has: `scores/<name>/` holds one file a shard
    with the same rows and no text. Returns the manifest of these scores; errors as `score_corpus`."""
    base = ScoredCorpus(scored)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise store.StoreError(f"name {name!r}: letters, digits, '_', '-' and '.' only, for it names a folder")
    if name == base.main:
        raise store.StoreError(f"{scored} has scores named {name!r} from the first; choose another name")
    out = base.path / "scores" / name
    source = {"base": str(base.path), "scorer": to_plain(scorer)}
    key = store.fingerprint([to_plain(scorer), base.text, scorer.identity(), "scores/1"])
    if store.is_done(out, key):
        return store.read_manifest(out, "score")
    store.begin(out, "score", key, clean=executor is None)
    jobs = [(source, {"base": n}, str(out / f"part-{n:05d}")) for n in range(len(base.files))]
    done = _finished(jobs, workers, max_unjudged, executor, out) | {"text": base.text}
    return store.finish(out, "score", key, scorer=to_plain(scorer), identity=scorer.identity(), **done)


def _finished(
    jobs: Sequence[Job], workers: int, max_unjudged: float, executor: Executor | None, out: Path
) -> dict[str, Any]:
    """What the manifest says of the shards, once all are done. Raises what `score_corpus` says."""
    done = {p.name for p in store.refresh(out).glob("part-*.json")}
    todo = [job for job in jobs if _mark(job).name not in done]
    if todo and executor is not None:
        executor(todo, str(out))
        store.refresh(out)
        todo = [job for job in todo if not _mark(job).exists()]
        if todo:
            raise ScoringError(f"{len(todo)} of {len(jobs)} shards are not done; run the same command again to resume")
    bar = tqdm(
        total=len(jobs), initial=len(jobs) - len(todo), desc="scoring", unit="shard", disable=None, file=sys.stderr
    )
    seen: Counter[str] = Counter()
    with bar:
        start = time.monotonic()
        for counts in _run(todo, min(workers, len(todo))):
            seen.update({k: counts[k] for k in ("chars", "unjudged")}, set_aside=sum(counts["rejected"].values()))
            rate = seen["chars"] / max(time.monotonic() - start, 1e-9)
            bar.set_postfix_str(
                f"{rate / 1e6:.2f} Mchar/s, not judged {seen['unjudged']}, set aside {seen['set_aside']}", refresh=False
            )
            bar.update()
    store.refresh(out)
    parts = [store.read_json(_mark(job)) for job in jobs]
    totals = _totals(parts)
    counts = totals["counts"]
    if counts["documents"] == 0:
        raise ScoringError(f"the corpus has no usable document; set aside: {totals['rejected']}")
    share = counts["unjudged"] / max(counts["segments"], 1)
    if share > max_unjudged:
        for job, part in zip(jobs, parts, strict=True):
            if part["failures"]:  # what failed may have been away for a while
                _mark(job).unlink()
        raise ScoringError(
            f"{counts['unjudged']} of {counts['segments']} segments ({share:.1%}) could not be judged, more than the "
            f"{max_unjudged:.1%} allowed (--max-unjudged): {totals['failures']}. The same command scores the shards with "
            "failures again"
        )
    return totals


def _mark(job: Job) -> Path:
    return store.as_path(job[2] + ".json")


def _totals(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The shards' counts added up, and fingerprints of what they wrote and of its text alone."""
    names = ("documents", "segments", "chars", "unjudged", "bad_segments")
    sums: dict[str, Counter[str]] = {"rejected": Counter(), "failures": Counter(), "labels": Counter()}
    for part in parts:
        for name, counter in sums.items():
            counter.update(part[name])
    return {
        "counts": {name: sum(p[name] for p in parts) for name in names},
        "rejected": dict(sorted(sums["rejected"].items())),
        "failures": dict(sorted(sums["failures"].items())),
        "labels": dict(sums["labels"].most_common()),
        "content": store.fingerprint([p["hash"] for p in parts]),
        "text": store.fingerprint([p["text"] for p in parts]),
        "parts": len(parts),
    }


def _run(jobs: Sequence[Job], workers: int) -> Iterator[dict[str, Any]]:
    if workers <= 1:
        yield from map(score_shard, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        workers, context, initializer=_begin_worker, initargs=(max(1, num_cpus() // workers),)
    ) as pool:
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


def _begin_worker(threads: int) -> None:
    """A worker has its share of the cores, and ends when its parent is killed instead of waiting for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # workers share the cores; read when numpy and torch are imported


def score_shard(job: Job) -> dict[str, Any]:
    """Score one shard: (configurations, shard, path without ending) -> its counts. Knows nothing of who runs it."""
    source, shard, stem = job
    scorer: Scorer = TypeAdapter(AnyScorer).validate_python(source["scorer"])
    tally = _Tally(scorer)
    if "base" in source:
        base = ScoredCorpus(source["base"])
        for row in base.read(base.files[shard["base"]], keep_empty=True):
            tally.add(row if isinstance(row, ScoredDocument) else ScoredDocument(row.id, (), ()))
        rows = tally.finish()
        path = store.as_path(stem + ".parquet")
        write_scores(path, rows)
    else:
        corpus: Corpus = TypeAdapter(AnyCorpus).validate_python(source["corpus"])
        segmenter: Segmenter = TypeAdapter(AnySegmenter).validate_python(source["segmenter"])
        for item in corpus.read(shard):
            if isinstance(item, Rejected):
                tally.rejected[item.reason] += 1
            else:
                texts = item.segments if isinstance(segmenter, Given) else segmenter.split(item.text)
                tally.add(ScoredDocument(item.id, tuple(texts or (item.text,)), (), item.meta))
        rows = tally.finish()
        path = store.as_path(stem + ".parquet")
        write_scored(path, rows)
    counts = tally.counts() | {"hash": store.file_hash(path), "text": text_hash(rows)}
    store.write_json(stem + ".json", counts)
    return counts


class _Tally:
    """Documents of a shard on their way through the scorer, a batch at a time, and what is counted of them."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.rows: list[ScoredDocument] = []
        self.waiting: list[ScoredDocument] = []
        self.waiting_chars = 0
        self.rejected: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.labels: Counter[str] = Counter()

    def add(self, document: ScoredDocument) -> None:
        self.waiting.append(document)
        self.waiting_chars += sum(map(len, document.texts))
        if self.waiting_chars >= BATCH_CHARS:
            self._flush()

    def _flush(self) -> None:
        judged = judge_documents(self.scorer, [d.texts for d in self.waiting])
        for document, (scores, failure, labels) in zip(self.waiting, judged, strict=True):
            self.labels.update(labels)
            if failure:
                self.failures[failure] += 1
            self.rows.append(dataclasses.replace(document, scores=tuple(scores)))
        self.waiting, self.waiting_chars = [], 0

    def finish(self) -> list[ScoredDocument]:
        self._flush()
        return self.rows

    def counts(self) -> dict[str, Any]:
        scores_S = np.array([s for row in self.rows for s in row.scores], dtype=np.float32)
        return {
            "documents": len(self.rows),
            "segments": len(scores_S),
            "chars": sum(len(t) for row in self.rows for t in row.texts),
            "unjudged": int(np.isnan(scores_S).sum()),
            "bad_segments": int((scores_S > 0).sum()),
            "rejected": dict(self.rejected),
            "failures": dict(self.failures),
            "labels": dict(self.labels),
        }
