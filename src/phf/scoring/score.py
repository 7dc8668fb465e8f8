"""Score a corpus: corpus -> segments -> scores -> Parquet.

    phf score README.jsonl scored/ --scorer pii --segmenter lines

`scored/` holds one Parquet file per shard (phf.data.scored) and a manifest. A shard is written aside, renamed and then
marked by `part-00000.json` with its counts. A rerun scores only the shards without a mark, so an interruption costs at
most the shards that were being written.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from phf.core import folders, store
from phf.core.config import Plain, to_plain
from phf.core.device import gpus
from phf.core.progress import Progress
from phf.core.text import by_reason, counted
from phf.core.types import Document, PhfError, Rejected, ScoredDocument
from phf.core.workers import WorkerKilled, in_workers
from phf.data.canaries import AnyCorpus
from phf.data.corpus import Corpus, Shard
from phf.data.scored import (
    ADDED,
    PartWriter,
    ScoreCounts,
    ScoredCorpus,
    ScoreManifest,
    SegmentsHash,
    part_file,
)
from phf.data.segment import AnySegmenter, Segmenter, segments_of
from phf.scorers import AnyScorer, GivenScores, Scorer
from phf.scoring.judge import Judged, ScoringError, judge_documents, shown

BATCH_CHARS = 1_000_000
"""Characters given to a scorer at a time."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One shard of work. It is sent as JSON to other processes and machines."""

    scorer: Plain
    stem: str
    """Path of the shard's files without their endings."""
    corpus: Plain | None = None
    segmenter: Plain | None = None
    shard: Shard = field(default_factory=dict)
    """Which part of `corpus` to score."""
    base: str | None = None
    """A scored corpus: add scores to it instead of reading `corpus`."""
    base_file: int = 0
    """Which file of `base` to score."""
    key: str | None = None
    """Key of the stage that asked for this work; None: not checked. A job that a scheduler starts late must not write
    into a folder that belongs to other settings by then."""

    @property
    def mark(self) -> Path:
        """Written last: the shard is done, with these counts."""
        return store.as_path(self.stem + ".json")

    @property
    def output(self) -> Path:
        return store.as_path(self.stem + ".parquet")


Executor = Callable[[Sequence[Any], str], None]
"""Runs jobs somewhere else: (jobs, folder that they write into). Returns when they are done."""


@dataclass(frozen=True, kw_only=True)
class ShardCounts:
    """`part-00000.json`: what was counted in one shard."""

    documents: int
    segments: int
    chars: int
    unjudged: int
    bad_segments: int
    rejected: dict[str, int]
    failures: dict[str, int]
    labels: dict[str, int]
    examples: dict[str, str] = field(default_factory=dict)
    """First row or segment of each reason in `rejected` and `failures`."""
    hash: str
    """Of the Parquet file."""
    text: str
    """Of the segments, whatever their scores."""


class Submitted(PhfError, RuntimeError):
    """The work was handed to a scheduler. Once that work has ended, the same command finishes the stage."""

    exit_code = 75  # EX_TEMPFAIL: not an error, but the next stage must wait
    label = "submitted"


def score_corpus(
    corpus: Corpus,
    segmenter: Segmenter,
    scorer: Scorer,
    out: str | Path,
    workers: int = 1,
    max_unjudged: float = 0.01,
    executor: Executor | None = None,
    overwrite: bool = False,
) -> ScoreManifest:
    """Score `corpus` into folder `out` (local, or `s3://...` and the like) and return its manifest. Returns at once
    if the folder is done already.

    What other settings wrote into `out` is moved to `out.old-N` first. On an object store it is an error, unless
    `overwrite`. `executor` runs the shards elsewhere (phf.scoring.cluster). If it only submits them, it raises
    `Submitted`, and a later call writes the manifest. Raises ScoringError if a worker dies (run again to resume), and
    if more than the share `max_unjudged` of the segments could not be judged.
    """
    source = {"corpus": to_plain(corpus), "segmenter": to_plain(segmenter), "scorer": to_plain(scorer)}
    earlier = store.fingerprint([source, corpus.fingerprint(), scorer.identity(), "scored/3"])
    cut_by = segmenter.libraries
    key = store.fingerprint([earlier, cut_by]) if cut_by else earlier
    out = store.as_path(out)
    if folders.is_done(out, key) or folders.is_done(out, earlier):  # of a version that did not note its libraries
        folders.done_before(out)
        return folders.read_manifest(out, ScoreManifest)
    segmenter.split("One. Two.")  # a language that cannot be cut here is an error before anything starts
    shards = corpus.plan()
    left_out = corpus.left_out()
    _print_left_out(left_out)
    stage = ScoreManifest.stage
    with folders.stage_folder(out, stage, key, shared=executor is not None, overwrite=overwrite):
        jobs = [Job(**source, shard=shard, stem=_stem(out, n), key=key) for n, shard in enumerate(shards)]
        parts = _run_jobs(jobs, workers, executor, out)
        made = _manifest(key, scorer, parts)
        _check_judged(made, max_unjudged, jobs, parts)
        manifest = dataclasses.replace(
            made,
            corpus=source["corpus"],
            segmenter=source["segmenter"],
            provenance=corpus.provenance(),
            left_out=left_out[:MAX_LEFT_OUT],
            files=_file_marks(jobs, parts),
        )
        return folders.finish(out, manifest)


MAX_LEFT_OUT = 100
"""Files that a manifest names as not read."""


def _print_left_out(files: Sequence[str]) -> None:
    if files:
        more = f", and {len(files) - 3:,} more" if len(files) > 3 else ""
        print(f"note: {counted(len(files), 'file')} not read: {', '.join(files[:3])}{more}", file=sys.stderr)


def add_scores(
    scored: str | Path,
    scorer: Scorer,
    name: str,
    workers: int = 1,
    max_unjudged: float = 0.01,
    executor: Executor | None = None,
    overwrite: bool = False,
) -> ScoreManifest:
    """Score a scored corpus with another scorer and keep the new scores next to the old ones: `scores/<name>/` holds
    one file per shard with the same rows and no text. Returns the manifest of the added scores; errors as
    `score_corpus`."""
    base = ScoredCorpus(scored)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or folders.OLD in name:
        raise store.StoreError(
            f"name {name!r}: letters, digits, '_', '-' and '.' only, and not {folders.OLD!r}, because it names a folder"
        )
    if name == base.main:
        raise store.StoreError(f"{name!r} is the name of the corpus's own scores; choose another name")
    out = base.path / ADDED / name
    plain = to_plain(scorer)
    key = store.fingerprint([plain, base.text, scorer.identity(), "scores/1"])
    if folders.is_done(out, key):
        folders.done_before(out)
        return folders.read_manifest(out, ScoreManifest)
    stage = ScoreManifest.stage
    with folders.stage_folder(out, stage, key, shared=executor is not None, overwrite=overwrite):
        jobs = [
            Job(scorer=plain, base=str(base.path), base_file=n, stem=_stem(out, n), key=key)
            for n in range(len(base.files))
        ]
        parts = _run_jobs(jobs, workers, executor, out)
        manifest = _manifest(key, scorer, parts)
        _check_judged(manifest, max_unjudged, jobs, parts)
        files = _file_marks(jobs, parts)
        return folders.finish(out, dataclasses.replace(manifest, text=base.text, files=files))


def _file_marks(jobs: Sequence[Job], parts: Sequence[ShardCounts]) -> dict[str, folders.FileMark]:
    """Size and hash of every shard's file. The hash was taken when the shard was written."""
    return {
        job.output.name: folders.FileMark(job.output.stat().st_size, part.hash)
        for job, part in zip(jobs, parts, strict=True)
    }


def _stem(out: Path, number: int) -> str:
    return str(part_file(out, number)).removesuffix(".parquet")


def _run_jobs(jobs: Sequence[Job], workers: int, executor: Executor | None, out: Path) -> list[ShardCounts]:
    """Run the jobs that are not done and return the counts of all. Errors as `score_corpus`."""
    done = {p.name for p in store.refresh(out).glob("part-*.json")}
    todo = [job for job in jobs if job.mark.name not in done]
    if todo and executor is not None:
        executor(todo, str(out))
        store.refresh(out)
        todo = [job for job in todo if not job.mark.exists()]
        if todo:
            raise ScoringError(f"{len(todo)} of {len(jobs)} shards are not done; run the same command again to resume")
    bar = Progress(total=len(jobs), initial=len(jobs) - len(todo), desc="scoring", unit="shard")
    seen: Counter[str] = Counter()
    with bar:
        start = time.monotonic()
        for counts in _scored(todo, workers):
            seen.update(chars=counts.chars, unjudged=counts.unjudged, skipped=sum(counts.rejected.values()))
            rate = seen["chars"] / max(time.monotonic() - start, 1e-9)
            bar.set_postfix_str(
                f"{rate / 1e6:.2f} Mchar/s, not judged {seen['unjudged']}, skipped {seen['skipped']}", refresh=False
            )
            bar.update()
    store.refresh(out)
    return [store.read_record(job.mark, ShardCounts) for job in jobs]


def _manifest(key: str, scorer: Scorer, parts: Sequence[ShardCounts]) -> ScoreManifest:
    """The manifest of all shards together: their counts added up, the fingerprints of their files and of their text."""
    rejected, failures, labels = (
        sum((Counter(getattr(part, name)) for part in parts), Counter[str]())
        for name in ("rejected", "failures", "labels")
    )
    examples: dict[str, str] = {}
    for part in parts:
        examples = part.examples | examples
    return ScoreManifest(
        key=key,
        scorer=to_plain(scorer),
        identity=scorer.identity(),
        bad_above=scorer.bad_above,
        counts=ScoreCounts(
            documents=sum(p.documents for p in parts),
            segments=sum(p.segments for p in parts),
            chars=sum(p.chars for p in parts),
            unjudged=sum(p.unjudged for p in parts),
            bad_segments=sum(p.bad_segments for p in parts),
        ),
        rejected=dict(sorted(rejected.items())),
        failures=dict(sorted(failures.items())),
        examples={reason: examples[reason] for reason in sorted({*rejected, *failures}) if reason in examples},
        labels=dict(labels.most_common()),
        content=store.fingerprint([p.hash for p in parts]),
        text=store.fingerprint([p.text for p in parts]),
        parts=len(parts),
    )


def _check_judged(
    manifest: ScoreManifest, max_unjudged: float, jobs: Sequence[Job], parts: Sequence[ShardCounts]
) -> None:
    """Raise ScoringError if nothing was scored or too much was not judged. Shards with failures lose their mark."""
    counts = manifest.counts
    if counts.documents == 0:
        raise ScoringError(
            "the corpus has no usable document"
            + (
                f"; skipped: {by_reason(manifest.rejected, manifest.examples)}"
                if manifest.rejected
                else ": it is empty"
            )
        )
    share = counts.unjudged / max(counts.segments, 1)
    if share > max_unjudged:
        for job, part in zip(jobs, parts, strict=True):
            if part.failures:  # whatever failed may work next time
                job.mark.unlink()
        reasons = f": {by_reason(manifest.failures, manifest.examples)}" if manifest.failures else ""
        raise ScoringError(
            f"{counts.unjudged} of {counts.segments} segments ({share:.1%}) could not be judged, more than the "
            f"{max_unjudged:.1%} allowed (--max-unjudged){reasons}. The same command scores the shards with failures "
            "again"
        )


def _scored(jobs: Sequence[Job], workers: int) -> Iterator[ShardCounts]:
    """Score shards in this process or in `workers` others. Yields each shard's counts when it is done."""
    spread = gpus() if jobs and workers > 1 and not _names_device(jobs[0].scorer) else []
    try:
        yield from in_workers(score_shard, jobs, workers, spread)
    except WorkerKilled as error:
        raise ScoringError(str(error)) from None


def _names_device(settings: Any) -> bool:
    """Whether a scorer, or a part of a combination, has a device of the user's choice."""
    if isinstance(settings, dict):
        return settings.get("device", "auto") != "auto" or any(map(_names_device, settings.values()))
    return isinstance(settings, list) and any(map(_names_device, settings))


def score_plain(job: Plain) -> None:
    """`score_shard` of a job that was sent as JSON."""
    score_shard(Job(**job))


def score_shard(job: Job) -> ShardCounts:
    """Score one shard, write its files and return its counts. Raises StoreError if the folder does not wait
    for it any more."""
    _check_wanted(job)
    scorer: Scorer = TypeAdapter(AnyScorer).validate_python(job.scorer)
    with store.written_aside(job.output) as aside:
        tally = _Tally(scorer, PartWriter(aside, scores_only=job.base is not None))
        if job.base is not None:
            base = ScoredCorpus(job.base)
            for row in base.read(base.files[job.base_file], keep_empty=True):
                tally.add(row if isinstance(row, ScoredDocument) else ScoredDocument(row.id, (), ()))
        else:
            corpus: Corpus = TypeAdapter(AnyCorpus).validate_python(job.corpus)
            segmenter: Segmenter = TypeAdapter(AnySegmenter).validate_python(job.segmenter)
            for item in corpus.read(job.shard):
                found = item if isinstance(item, Rejected) else _unscored(item, segmenter, scorer)
                if isinstance(found, Rejected):
                    tally.reject(found)
                else:
                    tally.add(found)
        tally.finish()
        counts = tally.counts(hash=store.file_hash(aside))
        _check_wanted(job)
    store.write_json(job.mark, counts)
    return counts


def _unscored(item: Document, segmenter: Segmenter, scorer: Scorer) -> ScoredDocument | Rejected:
    """A document for the scorer, cut into segments. Scores that the corpus comes with are there already."""
    texts = segments_of(item, segmenter)
    if not isinstance(scorer, GivenScores):
        return ScoredDocument(item.id, texts, (), item.meta)
    if item.scores is None:
        return Rejected(item.id, "no scores")
    scores = item.scores if isinstance(item.scores, tuple) else (item.scores,) * len(texts)
    if len(scores) != len(texts):
        return Rejected(item.id, "texts and scores differ in length")
    return ScoredDocument(item.id, texts, scores, item.meta)


def _check_wanted(job: Job) -> None:
    if job.key is not None:
        folders.check_wanted(store.as_path(job.stem).parent, job.key)


class _Tally:
    """Passes the documents of a shard through the scorer and to the writer, a batch at a time, and counts."""

    def __init__(self, scorer: Scorer, writer: PartWriter) -> None:
        self.scorer = scorer
        self.limit = np.float32(scorer.bad_above or 0.0)
        self.writer = writer
        self.hash = SegmentsHash()
        self.waiting: list[ScoredDocument] = []
        self.waiting_chars = 0
        self.sizes: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.labels: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def reject(self, item: Rejected) -> None:
        self.rejected[item.reason] += 1
        self.examples.setdefault(item.reason, item.id)

    def add(self, document: ScoredDocument) -> None:
        self.waiting.append(document)
        self.waiting_chars += sum(map(len, document.texts))
        if self.waiting_chars >= BATCH_CHARS:
            self._flush()

    def _flush(self) -> None:
        if isinstance(self.scorer, GivenScores):
            judged = [Judged(list(d.scores)) for d in self.waiting]
        else:
            judged = judge_documents(self.scorer, [d.texts for d in self.waiting])
        for document, found in zip(self.waiting, judged, strict=True):
            self.labels.update(found.labels)
            for failure in found.failures:
                self.failures[failure.reason] += failure.count
                reason = f": {failure.message}" if failure.message else ""
                place = f"{document.id}, segment {failure.segment}: {shown(document.texts[failure.segment])}{reason}"
                self.examples.setdefault(failure.reason, place)
            self._write(dataclasses.replace(document, scores=tuple(found.scores)))
        self.waiting.clear()
        self.waiting_chars = 0

    def _write(self, row: ScoredDocument) -> None:
        scores_S = np.array(row.scores, dtype=np.float32)
        self.sizes["documents"] += 1
        self.sizes["segments"] += len(scores_S)
        self.sizes["chars"] += sum(map(len, row.texts))
        self.sizes["unjudged"] += int(np.isnan(scores_S).sum())
        self.sizes["bad"] += int((scores_S > self.limit).sum())
        self.hash.add(row)
        self.writer.add(row)

    def finish(self) -> None:
        self._flush()
        self.writer.close()

    def counts(self, hash: str) -> ShardCounts:
        return ShardCounts(
            documents=self.sizes["documents"],
            segments=self.sizes["segments"],
            chars=self.sizes["chars"],
            unjudged=self.sizes["unjudged"],
            bad_segments=self.sizes["bad"],
            rejected=dict(self.rejected),
            failures=dict(self.failures),
            labels=dict(self.labels),
            examples=self.examples,
            hash=hash,
            text=self.hash.hex(),
        )
