"""The scored corpus on disk: Parquet files with the segments of each document and their scores.

    scored/  part-00000.parquet ...   texts list<string>, scores list<float>, avg_score, num_sents, meta, id
             scores/<name>/           scores of another scorer, row by row, without the text
             manifest.json

These are the columns of the published scored datasets, which `ScoredCorpus` reads as well.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from phf.core import folders, store
from phf.core.config import Plain, did_you_mean
from phf.core.extras import optional
from phf.core.types import Identity, Rejected, ScoredDocument
from phf.data.tables import table_rows

pa = optional("pyarrow")
pq = optional("pyarrow.parquet")

ROWS_PER_GROUP = 1024
MAX_PARTS = 10_000_000
ADDED = "scores"
"""Folder of the scores that were added to a corpus, one folder per name inside."""


@dataclass(frozen=True)
class ScoreCounts:
    """Sizes of a scored corpus."""

    documents: int = 0
    """Documents that were scored."""
    segments: int = 0
    """Their segments."""
    chars: int = 0
    """Characters of the segments."""
    unjudged: int = 0
    """Segments that could not be judged."""
    bad_segments: int = 0
    """Segments with a score above the scorer's threshold."""


@dataclass(frozen=True, kw_only=True)
class ScoreManifest(folders.Manifest):
    """`manifest.json` of a scored corpus, or of scores that were added to one."""

    stage: str = "score"
    corpus: Plain | None = None
    """Settings of the reader; null for added scores and for corpora from elsewhere."""
    segmenter: Plain | None = None
    """Settings of the segmenter; null if the corpus came in segments."""
    scorer: Plain | None = None
    """Settings of the scorer; null if the corpus came with its scores."""
    identity: Identity
    """What decides a score: the scorer's name, unit, versions and settings."""
    bad_above: float | None = None
    """Scores above it are bad, by the scorer; null in corpora of earlier versions, see `bad_above_of`."""
    provenance: Plain = field(default_factory=dict)
    """What the reader says about its source."""
    counts: ScoreCounts = ScoreCounts()
    """Sizes of the corpus."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Rows that could not become documents, by reason."""
    failures: dict[str, int] = field(default_factory=dict)
    """Segments on which the scorer failed, by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first row or segment of each reason in `rejected` and `failures`: its place and how it starts."""
    left_out: list[str] = field(default_factory=list)
    """Files at the corpus's place that were not read, with the reason; the first 100."""
    labels: dict[str, int] = field(default_factory=dict)
    """Kinds of faults that the scorer found, by name."""
    content: str
    """Fingerprint of the files."""
    text: str | None = None
    """Fingerprint of the segments, whatever their scores."""
    parts: int = 0
    """Number of Parquet files."""


def bad_above_of(manifest: ScoreManifest) -> float:
    """Scores above it are bad: what the manifest says, else 0.5 for probabilities and 0 for everything else."""
    if manifest.bad_above is not None:
        return manifest.bad_above
    return 0.5 if manifest.identity.get("unit") == "probability" else 0.0


def natural_threshold(manifest: ScoreManifest, judged_S: np.ndarray) -> float:
    """The scorer's own threshold. Where none is known: 0 if at least a tenth of the scores are 0, 0.5 if the scores
    look like probabilities on both sides of it, else the median. `judged_S`: the scores of judged segments."""
    if manifest.bad_above is not None or manifest.identity.get("unit") == "probability" or not len(judged_S):
        return bad_above_of(manifest)
    if (judged_S == 0).mean() >= 0.1:
        return 0.0
    above = float((judged_S > 0.5).mean())
    if judged_S.min() >= 0 and judged_S.max() <= 1 and 0.005 <= above <= 0.995:
        return 0.5
    return float(np.median(judged_S))


UNKNOWN_SCORER: Identity = {"name": "unknown"}
"""Identity of the scorer of a corpus that came with scores."""


def part_file(folder: Path, number: int) -> Path:
    """One of the Parquet files that phf writes."""
    return folder / f"part-{number:05d}.parquet"


class SegmentsHash:
    """Hash of segments, whatever their scores, added document by document (hex, 128 bits)."""

    def __init__(self) -> None:
        self.digest = hashlib.blake2b(digest_size=16)

    def add(self, row: ScoredDocument) -> None:
        self.digest.update(len(row.texts).to_bytes(4, "little"))
        for text in row.texts:
            data = text.encode()
            self.digest.update(len(data).to_bytes(4, "little") + data)

    def hex(self) -> str:
        return self.digest.hexdigest()


def _schema(scores_only: bool) -> Any:
    columns = {
        "id": pa.string(),
        "texts": pa.list_(pa.string()),
        "scores": pa.list_(pa.float32()),
        "avg_score": pa.float64(),
        "num_sents": pa.int64(),
        "meta": pa.string(),
    }
    return pa.schema({name: columns[name] for name in ("id", "scores")} if scores_only else columns)


class PartWriter:
    """Writes a Parquet file of scored documents, or of scores alone, a few rows at a time. Equal rows give equal bytes
    with one version of pyarrow. Every page has a checksum, which readers verify."""

    def __init__(self, file: Path, scores_only: bool = False) -> None:
        self.scores_only = scores_only
        self.schema = _schema(scores_only)
        self.writer = pq.ParquetWriter(file, self.schema, compression="zstd", write_page_checksum=True)
        self.waiting: list[ScoredDocument] = []

    def add(self, row: ScoredDocument) -> None:
        self.waiting.append(row)
        if len(self.waiting) == ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        rows = self.waiting
        columns: dict[str, list[Any]] = {"id": [row.id for row in rows], "scores": [list(row.scores) for row in rows]}
        if not self.scores_only:
            judged = [[s for s in row.scores if not math.isnan(s)] for row in rows]
            columns |= {
                "texts": [list(row.texts) for row in rows],
                "avg_score": [sum(scores) / len(scores) if scores else None for scores in judged],
                "num_sents": [len(row.texts) for row in rows],
                "meta": [json.dumps(row.meta, ensure_ascii=True, sort_keys=True) for row in rows],
            }
        self.writer.write_table(pa.table(columns, schema=self.schema))
        self.waiting = []

    def close(self) -> None:
        """Write the rest. A file without rows has one empty row group."""
        if self.waiting or not self.writer.file_handle:
            self._flush()
        self.writer.close()


class ScoredCorpus:
    """A scored corpus: the output of `phf score`, or any folder of Parquet files with `texts` and `scores`, local or
    remote (`hf://`, `s3://`).

    `preference`: read the scores that `phf score --add` added under this name instead of the corpus's own. Raises
    StoreError for a folder that holds no scored data.
    """

    def __init__(self, path: str | Path, preference: str | None = None) -> None:
        self.path = store.as_path(path)
        ours = (self.path / folders.MANIFEST).exists() or (self.path / folders.STARTED).exists()
        self.manifest, self.files = self._own() if ours else self._from_elsewhere()
        self._whole: set[Path] = set()
        self._listed = {self.path: self.manifest.files}
        self.main = self.manifest.identity.get("name", "")
        """Name of the corpus's own scores: their scorer's."""
        if not isinstance(self.main, str) or not store.is_file_name(self.main):
            raise store.StoreError(f"{self.path}: the manifest's identity has no name that can name a file")
        self.preference = None if preference == self.main else preference
        if self.preference is not None:
            added = self.added(self.preference)
            self._listed[self.path / ADDED / self.preference] = added.files
            self.manifest = dataclasses.replace(
                self.manifest,
                scorer=added.scorer,
                identity=added.identity,
                bad_above=added.bad_above,
                counts=added.counts,
                failures=added.failures,
                examples=added.examples,
                labels=added.labels,
                content=added.content,
                versions=added.versions,
                commit=added.commit,
            )

    def _own(self) -> tuple[ScoreManifest, list[Path]]:
        manifest = folders.read_manifest(self.path, ScoreManifest)
        if not 0 <= manifest.parts <= MAX_PARTS:
            raise store.StoreError(f"{self.path}: the manifest names {manifest.parts} parts")
        if manifest.text is None or manifest.segmenter is None:
            raise store.StoreError(
                f"{self.path} holds added scores, or was made by an older version of phf; give the scored corpus"
            )
        return manifest, [part_file(self.path, n) for n in range(manifest.parts)]

    def _from_elsewhere(self) -> tuple[ScoreManifest, list[Path]]:
        files = [self.path]
        if self.path.is_dir():
            found = (f for f in self.path.rglob("*.parquet") if ADDED not in f.relative_to(self.path).parts[:-1])
            files = sorted(found, key=str)
        if not files or not all(f.is_file() for f in files):
            raise store.StoreError(f"{self.path} is neither the output of `phf score` nor a folder of Parquet files")
        for file in files:
            _check_columns(file)
        marks = store.fingerprint([[f.name, f.stat().st_size, store.file_hash(f)] for f in files])
        return ScoreManifest(key="", identity=UNKNOWN_SCORER, content=marks, text=marks), files

    @property
    def text(self) -> str:
        """Fingerprint of the segments, whatever their scores."""
        return str(self.manifest.text)

    def preferences(self) -> list[str]:
        """Names of all scores: the corpus's own, then the added ones."""
        folder = self.path / ADDED
        names = (p.name for p in folder.iterdir() if (p / folders.MANIFEST).exists()) if folder.is_dir() else ()
        added = sorted(name for name in names if folders.OLD not in name)
        return [self.main, *added]

    def added(self, name: str) -> ScoreManifest:
        """The manifest of added scores. Raises StoreError if there are none, or if they belong to another
        text."""
        folder = self.path / ADDED / name
        if not folder.is_dir():
            raise store.StoreError(f"{self.path} has no scores named {name!r}{did_you_mean(name, self.preferences())}")
        manifest = folders.read_manifest(folder, ScoreManifest)
        if manifest.text != self.text:
            raise store.StoreError(f"{folder} scores another text than {self.path} now holds; add the scores again")
        return manifest

    def added_file(self, number: int) -> Path:
        """The file of this corpus's preference that belongs to file `number`."""
        assert self.preference is not None
        return part_file(self.path / ADDED / self.preference, number)

    def read(self, file: Path, keep_empty: bool = False) -> Iterator[ScoredDocument | Rejected]:
        """Documents of one of `files`, in order. A row that is no scored document gives a `Rejected` with the reason.

        `keep_empty`: keep segments without text, so that scores stay aligned with the file's own. Raises StoreError for
        a damaged file, and for one that is not the one that was scored.
        """
        self._check_whole(file)
        scores = None
        if self.preference is not None:
            added = self.added_file(self.files.index(file))
            self._check_whole(added)
            scores = read_table(added)["scores"].to_pylist()
        for number, row in enumerate(_rows(file)):
            id = f"{file.name}:{number}"
            if row is None:
                yield Rejected(id, "not UTF-8")
            else:
                if scores is not None and scores[number]:
                    row["scores"] = scores[number]
                yield _document(row, id, keep_empty)

    def _check_whole(self, file: Path) -> None:
        """Raise StoreError, the first time that a file is read, if it is not the file that was scored."""
        if file in self._whole or not self.manifest.parts:
            return
        expected = self._hash_of(file) if store.is_local(file) else None
        if expected is not None and (not file.is_file() or store.file_hash(file) != expected):
            raise store.StoreError(
                f"{file} is missing or has other bytes than when it was scored: restore it from a copy, or score the "
                "corpus into another folder"
            )
        self._whole.add(file)

    def _hash_of(self, file: Path) -> str | None:
        """Hash of a file when it was scored: by the manifest, else by the shard's mark."""
        listed = self._listed.get(file.parent, {})
        if file.name in listed:
            return listed[file.name].hash
        mark = file.with_suffix(".json")
        found = store.read_json(mark) if mark.exists() else None
        return found.get("hash") if isinstance(found, dict) else None


def is_scored(path: str | Path) -> bool:
    """Whether `ScoredCorpus` reads `path`, or would if `phf score` had finished there."""
    folder = store.as_path(path)
    if (folder / folders.MANIFEST).exists() or (folder / folders.STARTED).exists():
        return True
    try:
        ScoredCorpus(path)
    except store.StoreError:
        return False
    return True


def _rows(file: Path) -> Iterator[dict[str, Any] | None]:
    """Rows of a Parquet file. Raises StoreError for a damaged one."""
    try:
        with file.open("rb") as opened:
            parquet = pq.ParquetFile(opened, page_checksum_verification=True)
            columns = [name for name in ("id", "texts", "scores", "meta") if name in parquet.schema_arrow.names]
            for batch in parquet.iter_batches(ROWS_PER_GROUP, columns=columns):
                yield from table_rows(batch)
    except (pa.ArrowInvalid, OSError) as error:
        raise store.StoreError(f"{file} is damaged: {str(error).splitlines()[0]}") from None


def _document(row: dict[str, Any], default_id: str, keep_empty: bool) -> ScoredDocument | Rejected:
    """A scored document from a row, or why the row is none."""
    id = str(row.get("id") or default_id)
    texts = row["texts"]
    scores = row["scores"]
    if not isinstance(texts, list) or not isinstance(scores, list):
        return Rejected(id, "texts or scores is not a list")
    if len(texts) != len(scores):
        return Rejected(id, "texts and scores differ in length")
    if any(isinstance(t, bytes) for t in texts):
        try:
            texts = [t.decode() if isinstance(t, bytes) else t for t in texts]
        except UnicodeDecodeError:
            return Rejected(id, "not UTF-8")
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
    """Metadata of a row. phf writes it as JSON text; the published datasets have a structure."""
    if not isinstance(value, str):
        return value if isinstance(value, dict) else {}
    try:
        parsed = store.parse_json(value)
    except ValueError:
        return {"meta": value}
    return parsed if isinstance(parsed, dict) else {} if parsed is None else {"meta": value}


def _check_columns(file: Path) -> None:
    try:
        with file.open("rb") as opened:
            names = pq.read_schema(opened).names
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise store.StoreError(f"{file} is not a Parquet file; give the output of `phf score`") from None
    if missing := {"texts", "scores"} - set(names):
        raise store.StoreError(f"{file} has no column {' and '.join(sorted(missing))}: it is not scored data")


def read_table(file: Path, columns: list[str] | None = None) -> Any:
    """An Arrow table from a local or remote Parquet file."""
    try:
        with file.open("rb") as opened:
            return pq.read_table(opened, columns=columns, page_checksum_verification=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise store.StoreError(f"{file} is damaged: {str(error).splitlines()[0]}") from None
