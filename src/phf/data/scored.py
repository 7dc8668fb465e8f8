"""TODO."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from phf.core import store
from phf.core.config import did_you_mean
from phf.core.types import Rejected, ScoredDocument
from phf.data.readers import rows_of

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


def text_hash(rows: Sequence[ScoredDocument]) -> str:
    """Hash of the segments alone, whatever their scores (hex, 128 bits)."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(len(row.texts).to_bytes(4, "little"))
        for text in row.texts:
            data = text.encode()
            digest.update(len(data).to_bytes(4, "little") + data)
    return digest.hexdigest()


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
