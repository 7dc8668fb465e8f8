"""Readers: where documents come from. Floor 1.

A corpus is planned as shards (plain JSON values) that can be read independently and in any process. Reading a shard
yields a `Document` or, for a row that cannot be one, a `Rejected` with its reason: nothing is dropped in silence.

    corpus = Jsonl(path="data.jsonl")
    for shard in corpus.plan():
        for item in corpus.read(shard): ...
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import io
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core.config import STRICT, ConfigError, did_you_mean
from phf.core.store import TooDeep, as_path, file_hash, fingerprint, is_local, jsonable, parse_json, too_deep
from phf.core.types import Document, Rejected

Shard = dict[str, Any]
Item = Document | Rejected

DOCS_PER_SHARD = 512
SHARD_BYTES = 64 * 2**20
HASHED_WHOLE_BYTES = 64 * 2**20
TOO_DEEP = "nested too deeply"
_SURROGATE = re.compile("[\ud800-\udfff]")


def admit(id: str, text: Any, meta: dict[str, Any], max_chars: int) -> Item:
    """A document, or why the text cannot be one. NUL characters are text; lone surrogates are not (no UTF-8 form)."""
    if not isinstance(text, str):
        return Rejected(id, f"text is not a string but {type(text).__name__}")
    if not text:
        return Rejected(id, "empty text")
    if len(text) > max_chars:
        return Rejected(id, "longer than max_chars")
    if _SURROGATE.search(text):
        return Rejected(id, "lone surrogate")
    if too_deep(meta):
        return Rejected(id, TOO_DEEP)
    return Document(id.encode("utf-8", "backslashreplace").decode(), text, jsonable(meta))


def rows_of(table: Any) -> Iterator[dict[str, Any] | None]:
    """Rows of an Arrow table or batch; None for one whose bytes are not the UTF-8 that its type promises."""
    try:
        yield from table.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for number in range(table.num_rows):
        try:
            row = table.slice(number, 1).to_pylist()[0]
        except UnicodeDecodeError:
            row = None
        yield row


class Corpus:
    """Interface of a reader. A final class is a frozen dataclass whose fields are its configuration."""

    def plan(self) -> list[Shard]:
        """The shards, in order. Raises ConfigError if there is nothing to read."""
        raise NotImplementedError

    def read(self, shard: Shard) -> Iterator[Item]:
        """Documents and rejected rows of one shard, in order."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Changes when the content does: part of every later stage's key."""
        raise NotImplementedError

    def provenance(self) -> dict[str, Any]:
        """What a reader of the manifest wants to know of the source beyond its configuration."""
        return {}


def _files(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The file itself, or the files below a folder with one of the suffixes, sorted."""
    root = as_path(path)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise ConfigError(f"corpus path {path} does not exist")
    files = sorted(p for p in root.rglob("*") if p.is_file() and (not suffixes or p.name.endswith(suffixes)))
    if not files:
        raise ConfigError(f"no file ending in {' or '.join(suffixes) or 'anything'} below {path}")
    return files


def _file_mark(path: Path) -> list[Any]:
    """Name, size and content hash; files over 64 MiB are marked by their modification time instead of their content,
    files elsewhere by what their file system says identifies a version."""
    stat = path.stat()
    if not is_local(path):
        return [path.name, stat.st_size, str(path.fs.ukey(path.path))]  # type: ignore[attr-defined]
    return [path.name, stat.st_size, file_hash(path) if stat.st_size <= HASHED_WHOLE_BYTES else stat.st_mtime_ns]


def _chunks(count: int, size: int = DOCS_PER_SHARD) -> list[tuple[int, int]]:
    return [(start, min(start + size, count)) for start in range(0, count, size)]


@dataclass(frozen=True, config=STRICT)
class Folder(Corpus):
    """Text files below a folder, one document each. Files that are not UTF-8 are set aside."""

    path: str
    name: Literal["folder"] = "folder"
    suffixes: tuple[str, ...] = (".txt", ".md", ".rst", ".py")
    max_chars: Annotated[int, Field(gt=0)] = 10_000_000

    def plan(self) -> list[Shard]:
        return [{"start": a, "end": b} for a, b in _chunks(len(_files(self.path, self.suffixes)))]

    def read(self, shard: Shard) -> Iterator[Item]:
        root = as_path(self.path)
        for path in _files(self.path, self.suffixes)[shard["start"] : shard["end"]]:
            yield read_text_file(path, str(path.relative_to(root)) if path != root else path.name, self.max_chars)

    def fingerprint(self) -> str:
        root = as_path(self.path)
        return fingerprint([[str(f.relative_to(root)), *_file_mark(f)] for f in _files(self.path, self.suffixes)])


def read_text_file(path: Path, id: str, max_chars: int) -> Item:
    try:
        data = path.read_bytes()
    except OSError as error:
        return Rejected(id, f"cannot be read: {error.strerror}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Rejected(id, "not UTF-8")
    return admit(id, text, {"file": id}, max_chars)


@dataclass(frozen=True, config=STRICT)
class Jsonl(Corpus):
    """JSON lines: a file, or a folder of `.jsonl` files, one object a line with the text in `field`."""

    path: str
    name: Literal["jsonl"] = "jsonl"
    field: str = "text"
    id_field: str | None = None
    max_chars: Annotated[int, Field(gt=0)] = 10_000_000

    def plan(self) -> list[Shard]:
        shards = []
        for number, file in enumerate(_files(self.path, (".jsonl",))):
            shards += [{"file": number, "start": a, "end": b} for a, b in _chunks(file.stat().st_size, SHARD_BYTES)]
        if not shards:
            raise ConfigError(f"corpus {self.path} is empty")
        return shards

    def read(self, shard: Shard) -> Iterator[Item]:
        """Lines that *begin* in the shard's byte range."""
        file = _files(self.path, (".jsonl",))[shard["file"]]
        limit = 8 * self.max_chars  # bytes; a \uXXXX escape is 6 bytes a character
        with open_binary(file) as lines:
            lines.seek(max(shard["start"] - 1, 0))
            if shard["start"]:
                _skip_line(lines, limit)  # a line that began before this shard (empty where one ends exactly there)
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
        return fingerprint([_file_mark(f) for f in _files(self.path, (".jsonl",))])


def open_binary(path: Path) -> Any:
    """A file for reading, with `readline(limit)` wherever it lies (fsspec's own remote files read whole lines only)."""
    opened = path.open("rb")
    return opened if is_local(path) or isinstance(opened, io.BufferedIOBase) else io.BufferedReader(opened)  # type: ignore[type-var]


def _skip_line(lines: Any, limit: int) -> None:
    while (rest := lines.readline(limit)) and not rest.endswith(b"\n"):
        pass


@dataclass(frozen=True, config=STRICT)
class Parquet(Corpus):
    """Parquet: a file or a folder of them, the text in column `field`; one shard a row group.

    A column that holds lists of strings (the published scored data sets' `texts`) is joined to the document.
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
        for number, row in enumerate(rows_of(table)):
            if row is None:
                yield Rejected(f"{file.name}:{shard['row_group']}:{number}", "not UTF-8")
                continue
            id = str(row.get("id", f"{file.name}:{shard['row_group']}:{number}"))
            yield _item(row, self.field, id, self.max_chars)

    def fingerprint(self) -> str:
        return fingerprint([_file_mark(f) for f in _files(self.path, (".parquet",))])


def _item(row: dict[str, Any], field: str, id: str, max_chars: int) -> Item:
    """A row of a table. Segments (a list of strings) are joined and kept; lists beside them, which are about them, are
    not metadata of the document."""
    text, rest = row.get(field), {k: v for k, v in row.items() if k != field}
    if not isinstance(text, list) or not all(isinstance(t, str) for t in text):
        return admit(id, text, _plain_meta(rest), max_chars)
    item = admit(id, "".join(text), _plain_meta({k: v for k, v in rest.items() if not isinstance(v, list)}), max_chars)
    return item if isinstance(item, Rejected) else dataclasses.replace(item, segments=tuple(t for t in text if t))


def _part(total: int, number: int, of: int) -> int:
    """The size of part `number` when `total` is split over `of` as evenly as can be."""
    return total // of + (number < total % of)


def _plain_meta(row: dict[str, Any]) -> dict[str, Any]:
    """What JSON can hold; anything else by its `str`. What is too deep stays as it is, for `admit` to set it aside."""
    if too_deep(row):
        return row
    return json.loads(json.dumps(jsonable(row), default=str))  # type: ignore[no-any-return]


@dataclass(frozen=True, config=STRICT)
class HubDataset(Corpus):
    """A Hugging Face data set: a local folder (`save_to_disk` or data files) or a name on the Hub, whole or streamed.

    Streamed data sets are planned by their own shards; no code from the data set is run.
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
                raise ConfigError(f"data set {self.path} has no split {self.split!r}{did_you_mean(self.split, loaded)}")
            data = loaded[self.split] if isinstance(loaded, dict) else loaded
        else:
            try:
                data = datasets.load_dataset(
                    self.path, self.config, split=self.split, streaming=self.streaming, revision=self.revision
                )
            except (ValueError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
                raise ConfigError(f"data set {self.path} cannot be loaded: {error}") from None
        if data.column_names is not None and self.field not in data.column_names:
            raise ConfigError(
                f"data set {self.path} has no column {self.field!r}{did_you_mean(self.field, data.column_names)}"
            )
        return data

    def plan(self) -> list[Shard]:
        data = self._load()
        if self.streaming:
            return [{"shard": n, "of": data.num_shards} for n in range(data.num_shards)]
        count = len(data) if self.max_docs is None else min(len(data), self.max_docs)
        if count == 0:
            raise ConfigError(f"data set {self.path} split {self.split!r} is empty")
        return [{"start": a, "end": b} for a, b in _chunks(count, 16 * DOCS_PER_SHARD)]

    def read(self, shard: Shard) -> Iterator[Item]:
        data = self._load()
        if self.streaming:
            rows = data.shard(shard["of"], shard["shard"])
            rows = rows if self.max_docs is None else rows.take(_part(self.max_docs, shard["shard"], shard["of"]))
            prefix = f"{shard['shard']}:"
            start = 0
        else:
            rows, prefix, start = data.select(range(shard["start"], shard["end"])), "", shard["start"]
        for number, row in enumerate(rows, start):
            yield _item(row, self.field, str(row.get("id", f"{prefix}{number}")), self.max_chars)

    def fingerprint(self) -> str:
        if not self.streaming:
            data = self._load()
            return fingerprint([data._fingerprint, len(data)])
        local = Path(self.path).expanduser()
        if local.exists():
            return fingerprint([_file_mark(f) for f in _files(self.path, ())])
        import huggingface_hub

        return fingerprint([self.path, huggingface_hub.HfApi().dataset_info(self.path, revision=self.revision).sha])


@dataclass(frozen=True, config=STRICT)
class InstalledPackages(Corpus):
    """The descriptions (README texts) of the Python packages installed beside phf, from their `dist-info/METADATA`.

    Real text that every installation has, without network. `exclude`: package names left out (phf itself is).
    """

    name: Literal["installed_packages"] = "installed_packages"
    exclude: tuple[str, ...] = ("phf",)
    max_chars: Annotated[int, Field(gt=0)] = 10_000_000

    def _packages(self) -> list[tuple[str, str, str]]:
        """(normalised name, version, description), sorted by name; the first of two installations of one name."""
        found: dict[str, tuple[str, str, str]] = {}
        for dist in importlib.metadata.distributions():
            meta: Any = dist.metadata
            name = re.sub(r"[-_.]+", "-", str(meta["Name"] or "")).lower()
            if name and name not in self.exclude and name not in found:
                payload = meta.get_payload() or meta.get("Description") or ""
                found[name] = (name, str(meta["Version"]), payload if isinstance(payload, str) else "")
        return [found[name] for name in sorted(found)]

    def plan(self) -> list[Shard]:
        return [{"start": a, "end": b} for a, b in _chunks(len(self._packages()))]

    def read(self, shard: Shard) -> Iterator[Item]:
        for name, version, text in self._packages()[shard["start"] : shard["end"]]:
            # Undecodable bytes reach us as surrogates (email.message): the replacement character says so in the text.
            text = _SURROGATE.sub("\ufffd", text).replace("\r\n", "\n")
            yield admit(name, text, {"package": name, "version": version}, self.max_chars)

    def fingerprint(self) -> str:
        return fingerprint(
            [[n, v, hashlib.blake2b(t.encode("utf-8", "replace")).hexdigest()[:16]] for n, v, t in self._packages()]
        )

    def provenance(self) -> dict[str, Any]:
        return {"packages": {name: version for name, version, text in self._packages() if text}}


@dataclass(frozen=True, config=STRICT)
class StandardLibrary(Corpus):
    """The Python files of the running interpreter's standard library (installed packages left out)."""

    name: Literal["standard_library"] = "standard_library"
    max_files: Annotated[int, Field(gt=0)] | None = None
    max_chars: Annotated[int, Field(gt=0)] = 1_000_000

    def _paths(self) -> tuple[Path, list[Path]]:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(
            p for p in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(p.relative_to(root).parts)
        )
        return root, files[: self.max_files]

    def plan(self) -> list[Shard]:
        return [{"start": a, "end": b} for a, b in _chunks(len(self._paths()[1]), 128)]

    def read(self, shard: Shard) -> Iterator[Item]:
        root, files = self._paths()
        for path in files[shard["start"] : shard["end"]]:
            yield read_text_file(path, str(path.relative_to(root)), self.max_chars)

    def fingerprint(self) -> str:
        root, files = self._paths()
        return fingerprint([[str(p.relative_to(root)), file_hash(p)] for p in files])


@dataclass(frozen=True, config=STRICT)
class HubDatasets(Corpus):
    """Several Hugging Face data sets of one form, one after the other: the published scored Pile comes in 39."""

    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    name: Literal["datasets"] = "datasets"
    config: str | None = None
    split: str = "train"
    field: str = "text"
    streaming: bool = False
    max_chars: Annotated[int, Field(gt=0)] = 10_000_000

    def _each(self) -> list[HubDataset]:
        same = {k: getattr(self, k) for k in ("config", "split", "field", "streaming", "max_chars")}
        return [HubDataset(path, **same) for path in self.paths]

    def first(self) -> HubDataset:
        """The first of them, alone."""
        return self._each()[0]

    def plan(self) -> list[Shard]:
        return [{"dataset": n, "shard": shard} for n, each in enumerate(self._each()) for shard in each.plan()]

    def read(self, shard: Shard) -> Iterator[Item]:
        for item in self._each()[shard["dataset"]].read(shard["shard"]):
            yield dataclasses.replace(item, id=f"{shard['dataset']}:{item.id}")

    def fingerprint(self) -> str:
        return fingerprint([each.fingerprint() for each in self._each()])


AnyCorpus = Annotated[
    Folder | Jsonl | Parquet | HubDataset | HubDatasets | InstalledPackages | StandardLibrary,
    Field(discriminator="name"),
]


def from_path(text: str) -> dict[str, Any]:
    """The configuration of the reader that a path or reader name stands for, as the command line takes it."""
    named = {"installed_packages", "standard_library"}
    if text in named:
        return {"name": text}
    if text.startswith("hf://datasets/") and len(text.split("/")) == 5:  # a whole data set, as datasets loads it
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
