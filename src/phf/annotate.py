"""Score a corpus: corpus -> segments -> scores -> Parquet. Floor 2.

    phf score README.jsonl scored/ --scorer pii --segmenter lines

`scored/` holds one Parquet file a shard with the columns of the published scored data sets (texts, scores, avg_score,
num_sents, meta, id) and a manifest. A shard is written aside, renamed and then marked (`part-00000.json`, its counts):
a rerun does what has no mark, so any interruption costs at most the shards that were being written.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import math
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
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter
from tqdm import tqdm

from phf import store
from phf.config import ConfigError, did_you_mean, to_plain
from phf.corpus import AnyCorpus, Corpus, rows_of
from phf.device import num_cpus
from phf.scorers import AnyScorer, Scorer
from phf.segment import AnySegmenter, Given, Segmenter
from phf.types import Rejected, ScoredDocument

Job = tuple[dict[str, Any], dict[str, Any], str]
"""One shard of work: configurations, which shard, and the path without ending of what it makes. Plain JSON values."""

Executor = Callable[[Sequence[Job], str], None]
"""Runs shards somewhere else: (jobs, folder that they write into). Returns when they are done."""

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
BATCH_CHARS = 1_000_000
"""Characters handed to a scorer at a time."""


class ScoringError(RuntimeError):
    """Too much of the corpus could not be judged, or a worker died."""


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


def text_hash(rows: Sequence[ScoredDocument]) -> str:
    """Hash of the segments alone, whatever their scores (hex, 128 bits)."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(len(row.texts).to_bytes(4, "little"))
        for text in row.texts:
            data = text.encode()
            digest.update(len(data).to_bytes(4, "little") + data)
    return digest.hexdigest()


def judge_documents(
    scorer: Scorer, documents: Sequence[Sequence[str]]
) -> list[tuple[list[float], str | None, Counter[str]]]:
    """`judge` of several documents, all at once where the scorer is quicker so. Where that fails, each by itself, so that
    one document that cannot be judged does not take others with it."""
    if len(documents) > 1 and type(scorer).judge_documents is not Scorer.judge_documents:
        try:
            given = scorer.judge_documents(documents)
        except (KeyboardInterrupt, MemoryError, ConfigError):
            raise
        except Exception:
            given = None
        if given is not None:
            return [_checked(scores, labels, len(d)) for d, (scores, labels) in zip(documents, given, strict=True)]
    return [judge(scorer, segments) for segments in documents]


def judge(scorer: Scorer, segments: Sequence[str]) -> tuple[list[float], str | None, Counter[str]]:
    """Scores of a document's segments, why it failed if it did (then all are NaN), and the kinds of faults found.
    Infinite scores are failures.

    This and `judge_documents` are the places where a scorer's exception is caught: it becomes NaN and a counted reason,
    never a score. A mistake in the scorer's settings is raised.
    """
    try:
        scores, labels = scorer.judge_segments(segments)
    except (KeyboardInterrupt, MemoryError, ConfigError):
        raise
    except Exception as error:
        return [math.nan] * len(segments), type(error).__name__, Counter()
    return _checked(scores, labels, len(segments))


def _checked(given: Sequence[float], labels: Counter[str], count: int) -> tuple[list[float], str | None, Counter[str]]:
    scores = [float(s) for s in given]
    if len(scores) != count:
        raise ScoringError(f"scorer gave {len(scores)} scores for {count} segments")
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
    with store.written_aside(path) as aside:
        pq.write_table(table, aside, row_group_size=ROWS_PER_GROUP, compression="zstd")


def write_scores(path: Path, rows: Sequence[ScoredDocument]) -> None:
    """The scores of another scorer, row by row as in the file that they belong to."""
    table = pa.table(
        {"id": [row.id for row in rows], "scores": [list(row.scores) for row in rows]},
        schema=pa.schema({"id": pa.string(), "scores": pa.list_(pa.float32())}),
    )
    with store.written_aside(path) as aside:
        pq.write_table(table, aside, row_group_size=ROWS_PER_GROUP, compression="zstd")


class ScoredCorpus:
    """A scored corpus: what `phf score` wrote, or any folder of Parquet files with `texts` and `scores` (the published
    scored data sets are such folders), on disk or at `hf://`, `s3://` and the like.

    `preference`: read these scores (added by `phf score --add`) instead of its own.
    """

    def __init__(self, path: str | Path, preference: str | None = None) -> None:
        self.path = store.as_path(path)
        if (self.path / store.MANIFEST).exists() or (self.path / ".started.json").exists():
            self.manifest: dict[str, Any] = store.read_manifest(self.path, "score")
            if "text" not in self.manifest or "segmenter" not in self.manifest:
                raise store.StoreError(
                    f"{path} holds scores beside a corpus, or is older than this phf; give the corpus"
                )
            self.files = [self.path / f"part-{n:05d}.parquet" for n in range(self.manifest["parts"])]
        else:
            if self.path.is_dir():
                found = (f for f in self.path.rglob("*.parquet") if "scores" not in f.relative_to(self.path).parts[:-1])
                self.files = sorted(found, key=str)
            else:
                self.files = [self.path]
            if not self.files or not all(f.is_file() for f in self.files):
                raise store.StoreError(f"{path} is neither the output of `phf score` nor a folder of Parquet files")
            marks = store.fingerprint([[f.name, f.stat().st_size, store.file_hash(f)] for f in self.files])
            self.manifest = {
                "stage": "score",
                "content": marks,
                "text": marks,
                "identity": {"name": "unknown"},
                "scorer": None,
            }
        for file in self.files:
            try:
                missing = {"texts", "scores"} - set(read_schema(file).names)
            except pa.ArrowInvalid:
                raise store.StoreError(f"{file} is not a Parquet file; give the output of `phf score`") from None
            if missing:
                raise store.StoreError(f"{file} has no column {' and '.join(sorted(missing))}: it is not scored data")
        self.main: str = self.manifest["identity"]["name"]  # the name of the corpus's own scores is its scorer's
        self.preference = None if preference == self.main else preference
        if self.preference is not None:
            kept = ("parts", "stage", "key", "rejected")
            self.manifest = self.manifest | {k: v for k, v in self.added(self.preference).items() if k not in kept}

    @property
    def text(self) -> str:
        """Fingerprint of the segments, whatever their scores."""
        return str(self.manifest["text"])

    def preferences(self) -> list[str]:
        """Names of the scores there are: its own, then those added."""
        folder = self.path / "scores"
        added = sorted(p.name for p in folder.iterdir() if (p / store.MANIFEST).exists()) if folder.is_dir() else []
        return [self.main, *added]

    def added(self, name: str) -> dict[str, Any]:
        """The manifest of scores added by `phf score --add`, which must belong to the text as it is now."""
        folder = self.path / "scores" / name
        if not folder.is_dir():
            raise store.StoreError(f"{self.path} has no scores named {name!r}{did_you_mean(name, self.preferences())}")
        manifest = store.read_manifest(folder, "score")
        if manifest["text"] != self.text:
            raise store.StoreError(f"{folder} scores another text than {self.path} holds now; add the scores again")
        return manifest

    def read(self, file: Path, keep_empty: bool = False) -> Iterator[ScoredDocument | Rejected]:
        """Documents of one of `files`, in order; rows that are no scored document are set aside with the reason.

        `keep_empty`: keep segments without text, so that scores stay aligned to the file's own.
        """
        scores = None
        if self.preference is not None:
            number = self.files.index(file)
            table = read_table(self.path / "scores" / self.preference / f"part-{number:05d}.parquet")
            scores = table["scores"].to_pylist()
        with file.open("rb") as opened:
            parquet = pq.ParquetFile(opened)
            columns = [name for name in ("id", "texts", "scores", "meta") if name in parquet.schema_arrow.names]
            number = 0
            for batch in parquet.iter_batches(ROWS_PER_GROUP, columns=columns):
                for row in rows_of(batch):
                    id = f"{file.name}:{number}"
                    if row is None:
                        yield Rejected(id, "not UTF-8")
                    else:
                        if scores is not None and scores[number]:
                            row["scores"] = scores[number]
                        yield self._document(row, id, keep_empty)
                    number += 1

    @staticmethod
    def _document(row: dict[str, Any], default_id: str, keep_empty: bool) -> ScoredDocument | Rejected:
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
        pairs = [
            (t, math.nan if s is None or math.isinf(s) else s)
            for t, s in zip(texts, scores, strict=True)
            if t or keep_empty
        ]
        return ScoredDocument(id, tuple(t for t, _ in pairs), tuple(s for _, s in pairs), _meta(row.get("meta")))


def _meta(value: Any) -> dict[str, Any]:
    """Metadata of a row: ours is JSON text, the published data sets' a structure."""
    if not isinstance(value, str):
        return value if isinstance(value, dict) else {}
    try:
        parsed = store.parse_json(value)
    except ValueError:
        return {"meta": value}
    return parsed if isinstance(parsed, dict) else {} if parsed is None else {"meta": value}


def read_schema(file: Path) -> Any:
    with file.open("rb") as opened:
        return pq.read_schema(opened)


def read_table(file: Path, columns: list[str] | None = None) -> Any:
    with file.open("rb") as opened:
        return pq.read_table(opened, columns=columns)
