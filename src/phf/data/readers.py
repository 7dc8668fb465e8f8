"""Readers: where documents come from.

corpus = Jsonl(path="data.jsonl")
for shard in corpus.plan():
    for item in corpus.read(shard): ...
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core.config import STRICT, ConfigError, Plain, did_you_mean
from phf.core.store import TooDeep, as_path, fingerprint, is_local, jsonable, parse_json, too_deep
from phf.core.types import Rejected
from phf.data.corpus import (
    DOCS_PER_SHARD,
    SHARD_BYTES,
    TOO_DEEP,
    Corpus,
    Item,
    Shard,
    admit,
    chunks,
    file_mark,
    read_text_file,
    table_rows,
)
from phf.data.installed import InstalledPackages, StandardLibrary


def _files(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The file itself, or the sorted files below a folder that have one of the suffixes."""
    root = as_path(path)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise ConfigError(f"corpus path {path} does not exist")
    files = sorted(p for p in root.rglob("*") if p.is_file() and (not suffixes or p.name.endswith(suffixes)))
    if not files:
        raise ConfigError(f"no file ending in {' or '.join(suffixes) or 'anything'} below {path}")
    return files


@dataclass(frozen=True, config=STRICT)
class Folder(Corpus):
    """Text files below a folder, one document per file. Files that are not UTF-8 are skipped and counted."""

    path: str
    name: Literal["folder"] = "folder"
    suffixes: tuple[str, ...] = (".txt", ".md", ".rst", ".py")
    max_chars: Annotated[int, Field(gt=0)] = 10_000_000

    def plan(self) -> list[Shard]:
        return [{"start": a, "end": b} for a, b in chunks(len(_files(self.path, self.suffixes)))]

    def read(self, shard: Shard) -> Iterator[Item]:
        root = as_path(self.path)
        for path in _files(self.path, self.suffixes)[shard["start"] : shard["end"]]:
            yield read_text_file(path, str(path.relative_to(root)) if path != root else path.name, self.max_chars)

    def fingerprint(self) -> str:
        root = as_path(self.path)
        return fingerprint([[str(f.relative_to(root)), *file_mark(f)] for f in _files(self.path, self.suffixes)])


@dataclass(frozen=True, config=STRICT)
class Jsonl(Corpus):
    """JSON lines: a file or a folder of `.jsonl` files. Each line is an object with the text in `field`."""

    path: str
    name: Literal["jsonl"] = "jsonl"
    field: str = "text"
    id_field: str | None = None
    max_chars: Annotated[int, Field(gt=0)] = 10_000_000

    def plan(self) -> list[Shard]:
        shards = []
        for number, file in enumerate(_files(self.path, (".jsonl",))):
            shards += [{"file": number, "start": a, "end": b} for a, b in chunks(file.stat().st_size, SHARD_BYTES)]
        if not shards:
            raise ConfigError(f"corpus {self.path} is empty")
        return shards

    def read(self, shard: Shard) -> Iterator[Item]:
        """Lines that *start* in the shard's byte range."""
        file = _files(self.path, (".jsonl",))[shard["file"]]
        limit = 8 * self.max_chars  # in bytes; an escape like \u00e4 takes 6 bytes per character
        with open_binary(file) as lines:
            lines.seek(max(shard["start"] - 1, 0))
            if shard["start"]:
                _skip_line(lines, limit)  # a line that started before this shard (empty if a line ends exactly here)
            while (at := lines.tell()) < shard["end"]:
                line = lines.readline(limit)
                if not line:
                    break
                id = f"{file.name}:{at}"
                if len(line) == limit and not line.endswith(b"\n"):
                    _skip_line(lines, limit)
                    yield Rejected(id, "longer than max_chars")
                elif line.strip():
                    yield self._item(line, id)

    def _item(self, line: bytes, id: str) -> Item:
        try:
            row = parse_json(line)
        except UnicodeDecodeError:
            return Rejected(id, "not UTF-8")
        except TooDeep:
            return Rejected(id, TOO_DEEP)
        except ValueError:
            return Rejected(id, "malformed JSON")
        if not isinstance(row, dict):
            return Rejected(id, "not a JSON object")
        if self.field not in row:
            return Rejected(id, f"no field {self.field!r}")
        if self.id_field is not None:
            if row.get(self.id_field) is None:
                return Rejected(id, f"no field {self.id_field!r}")
            id = str(row[self.id_field])
        return admit(id, row[self.field], {k: v for k, v in row.items() if k != self.field}, self.max_chars)

    def fingerprint(self) -> str:
        return fingerprint([file_mark(f) for f in _files(self.path, (".jsonl",))])


def open_binary(path: Path) -> Any:
    """Open a file that has `readline(limit)` on any file system. fsspec's own remote files only read whole lines."""
    opened = path.open("rb")
    return opened if is_local(path) or isinstance(opened, io.BufferedIOBase) else io.BufferedReader(opened)


def _skip_line(lines: Any, limit: int) -> None:
    while (rest := lines.readline(limit)) and not rest.endswith(b"\n"):
        pass


@dataclass(frozen=True, config=STRICT)
class Parquet(Corpus):
    """Parquet: a file or a folder of files with the text in column `field`. Each row group is a shard.

    The text may be a list of strings (`texts` of the published scored datasets): joined they are the document.
    """

    path: str
    name: Literal["parquet"] = "parquet"
    field: str = "text"
    max_chars: Annotated[int, Field(gt=0)] = 10_000_000

    def plan(self) -> list[Shard]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        shards = []
        for number, file in enumerate(_files(self.path, (".parquet",))):
            try:
                with file.open("rb") as opened:
                    metadata = pq.read_metadata(opened)
            except pa.ArrowInvalid as error:
                raise ConfigError(f"{file} is not a Parquet file: {error}") from None
            names = metadata.schema.to_arrow_schema().names
            if self.field not in names:
                raise ConfigError(f"{file} has no column {self.field!r}{did_you_mean(self.field, names)}")
            shards += [{"file": number, "row_group": g} for g in range(metadata.num_row_groups)]
        if not shards:
            raise ConfigError(f"corpus {self.path} is empty")
        return shards

    def read(self, shard: Shard) -> Iterator[Item]:
        import pyarrow.parquet as pq

        file = _files(self.path, (".parquet",))[shard["file"]]
        with file.open("rb") as opened:
            table = pq.ParquetFile(opened).read_row_group(shard["row_group"])
        for number, row in enumerate(table_rows(table)):
            if row is None:
                yield Rejected(f"{file.name}:{shard['row_group']}:{number}", "not UTF-8")
                continue
            id = str(row.get("id", f"{file.name}:{shard['row_group']}:{number}"))
            yield _item(row, self.field, id, self.max_chars)

    def fingerprint(self) -> str:
        return fingerprint([file_mark(f) for f in _files(self.path, (".parquet",))])


def _item(row: dict[str, Any], field: str, id: str, max_chars: int) -> Item:
    """A document from a row of a table. A list of strings is joined and kept as the segments; other lists in the row
    describe the segments, so they are not metadata of the document."""
    text = row.get(field)
    rest = {k: v for k, v in row.items() if k != field}
    if not isinstance(text, list) or not all(isinstance(t, str) for t in text):
        return admit(id, text, _plain_meta(rest), max_chars)
    item = admit(id, "".join(text), _plain_meta({k: v for k, v in rest.items() if not isinstance(v, list)}), max_chars)
    return item if isinstance(item, Rejected) else dataclasses.replace(item, segments=tuple(t for t in text if t))


def _part(total: int, number: int, of: int) -> int:
    """The size of part `number` when `total` is split over `of` parts as evenly as possible."""
    return total // of + (number < total % of)


def _plain_meta(row: dict[str, Any]) -> dict[str, Any]:
    """The row as JSON data; other values become strings. A row that nests too deeply is left for `admit` to reject."""
    if too_deep(row):
        return row
    found: dict[str, Any] = json.loads(json.dumps(jsonable(row), default=str))
    return found


@dataclass(frozen=True, config=STRICT)
class HFDataset(Corpus):
    """A Hugging Face dataset: a local folder (`save_to_disk` or data files) or a name on the Hub, whole or streamed.

    The shards of a streamed dataset are its own. No code from the dataset runs.
    """

    path: str
    name: Literal["dataset"] = "dataset"
    config: str | None = None
    split: str = "train"
    field: str = "text"
    streaming: bool = False
    revision: str | None = None
    max_docs: Annotated[int, Field(gt=0)] | None = None
    max_chars: Annotated[int, Field(gt=0)] = 10_000_000

    def _load(self) -> Any:
        import datasets

        local = Path(self.path).expanduser()
        if (local / "state.json").exists() or (local / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(str(local))
            if isinstance(loaded, dict) and self.split not in loaded:
                raise ConfigError(f"dataset {self.path} has no split {self.split!r}{did_you_mean(self.split, loaded)}")
            data = loaded[self.split] if isinstance(loaded, dict) else loaded
        else:
            try:
                data = datasets.load_dataset(
                    self.path, self.config, split=self.split, streaming=self.streaming, revision=self.revision
                )
            except (ValueError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
                raise ConfigError(f"dataset {self.path} cannot be loaded: {error}") from None
        if data.column_names is not None and self.field not in data.column_names:
            raise ConfigError(
                f"dataset {self.path} has no column {self.field!r}{did_you_mean(self.field, data.column_names)}"
            )
        return data

    def plan(self) -> list[Shard]:
        data = self._load()
        if self.streaming:
            return [{"shard": n, "of": data.num_shards} for n in range(data.num_shards)]
        count = len(data) if self.max_docs is None else min(len(data), self.max_docs)
        if count == 0:
            raise ConfigError(f"dataset {self.path} split {self.split!r} is empty")
        return [{"start": a, "end": b} for a, b in chunks(count, 16 * DOCS_PER_SHARD)]

    def read(self, shard: Shard) -> Iterator[Item]:
        data = self._load()
        if self.streaming:
            rows = data.shard(shard["of"], shard["shard"])
            rows = rows if self.max_docs is None else rows.take(_part(self.max_docs, shard["shard"], shard["of"]))
            prefix = f"{shard['shard']}:"
            start = 0
        else:
            rows = data.select(range(shard["start"], shard["end"]))
            prefix = ""
            start = shard["start"]
        for number, row in enumerate(rows, start):
            yield _item(row, self.field, str(row.get("id", f"{prefix}{number}")), self.max_chars)

    def fingerprint(self) -> str:
        if not self.streaming:
            data = self._load()
            return fingerprint([data._fingerprint, len(data)])
        local = Path(self.path).expanduser()
        if local.exists():
            return fingerprint([file_mark(f) for f in _files(self.path, ())])
        import huggingface_hub

        return fingerprint([self.path, huggingface_hub.HfApi().dataset_info(self.path, revision=self.revision).sha])


@dataclass(frozen=True, config=STRICT)
class DatasetList(Corpus):
    """Several Hugging Face datasets of one form, one after the other. The published scored Pile comes in 39
    datasets."""

    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    name: Literal["datasets"] = "datasets"
    config: str | None = None
    split: str = "train"
    field: str = "text"
    streaming: bool = False
    max_chars: Annotated[int, Field(gt=0)] = 10_000_000

    def _each(self) -> list[HFDataset]:
        return [
            HFDataset(
                path,
                config=self.config,
                split=self.split,
                field=self.field,
                streaming=self.streaming,
                max_chars=self.max_chars,
            )
            for path in self.paths
        ]

    def first(self) -> HFDataset:
        """The first dataset alone."""
        return self._each()[0]

    def plan(self) -> list[Shard]:
        return [{"dataset": n, "shard": shard} for n, each in enumerate(self._each()) for shard in each.plan()]

    def read(self, shard: Shard) -> Iterator[Item]:
        for item in self._each()[shard["dataset"]].read(shard["shard"]):
            yield dataclasses.replace(item, id=f"{shard['dataset']}:{item.id}")

    def fingerprint(self) -> str:
        return fingerprint([each.fingerprint() for each in self._each()])


AnyCorpus = Annotated[
    Folder | Jsonl | Parquet | HFDataset | DatasetList | InstalledPackages | StandardLibrary,
    Field(discriminator="name", title="reader"),
]


def from_path(text: str) -> Plain:
    """Settings of the reader for a path, or for the name of a reader that needs no path."""
    named = {"installed_packages", "standard_library"}
    if text in named:
        return {"name": text}
    if (
        text.startswith("hf://datasets/") and len(text.split("/")) == 5
    ):  # a whole dataset, as the datasets library loads it
        return {"name": "dataset", "path": text.removeprefix("hf://datasets/")}
    path = as_path(text)
    if text.endswith(".jsonl"):
        return {"name": "jsonl", "path": text}
    if text.endswith(".parquet"):
        return {"name": "parquet", "path": text}
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return {"name": "dataset", "path": text}
        for suffix, reader in ((".parquet", "parquet"), (".jsonl", "jsonl")):
            if next(path.rglob(f"*{suffix}"), None) is not None:
                return {"name": reader, "path": text}
        return {"name": "folder", "path": text}
    if path.is_file():
        return {"name": "folder", "path": text, "suffixes": []}
    raise ConfigError(f"corpus {text!r} is neither a file, a folder nor a named corpus{did_you_mean(text, named)}")
