"""Readers: where documents come from.

corpus = Jsonl(path="data.jsonl")
for shard in corpus.plan():
    for item in corpus.read(shard): ...
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core.config import STRICT, ConfigError, Plain, did_you_mean
from phf.core.store import as_path, fingerprint
from phf.core.types import Rejected
from phf.data.corpus import (
    SHARD_BYTES,
    Corpus,
    Item,
    Shard,
    chunks,
    file_mark,
    own_id_or_place,
    read_text_file,
    row_item,
)
from phf.data.files import (
    PACKED,
    TEXT_ENDINGS,
    Row,
    ending,
    find_files,
    header,
    is_packed,
    json_lines,
    line_row,
    open_bytes,
    row_form,
    rows,
)
from phf.data.tables import ROWS_AT_ONCE, columns_to_read, table_rows

JSON_FORMS = ("jsonl", "json")
ALL_FORMS = ("jsonl", "json", "csv", "tsv", "parquet")
ABOUT_FILES = ("readme", "license", "licence", "notice", "changelog", "citation", "dataset_info", "checksum")
"""Beginnings of names of files that tell of a data set and are no part of it."""
ARCHIVES = (".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".zip", ".7z", ".rar", *(f".tar{packed}" for packed in PACKED))
"""Endings of files that hold many files."""


def _relative(path: str, file: Path) -> str:
    """The name of a file of a corpus: below its folder, or its own."""
    root = as_path(path)
    return file.name if file == root else file.relative_to(root).as_posix()


def _file(path: str, name: str) -> Path:
    """The file of a corpus with a name from `_relative`."""
    root = as_path(path)
    return root if root.is_file() else root / name


class _FileCorpus(Corpus):
    """What readers of files share. `path`: a file or a folder."""

    path: str
    max_chars: int

    def _wanted(self, file: Path) -> bool:
        raise NotImplementedError

    def _endings(self) -> str:
        """The endings of the files that are read, for messages."""
        raise NotImplementedError

    def _files(self) -> list[Path]:
        found = find_files(self.path, self._wanted)
        if found.read:
            return found.read
        seen = sorted({ending(f) or f.name for f in found.others})[:8]
        hint = f"; there are files ending in {', '.join(seen)}" if seen else ""
        raise ConfigError(f"no file ending in {self._endings()} below {self.path}{hint}")

    def fingerprint(self) -> str:
        return fingerprint([file_mark(f) for f in self._files()])

    def left_out(self) -> list[str]:
        found = find_files(self.path, self._wanted)
        names = [f"{_relative(self.path, f)} (hidden)" for f in found.hidden]
        names += [f"{_relative(self.path, f)} (a copy of {f.stem}, compressed)" for f in found.copies]
        return names + [
            f"{_relative(self.path, f)} ({f'not {self._endings()}' if f.exists() else 'a broken link'})"
            for f in found.others
        ]


@dataclass(frozen=True, config=STRICT)
class Folder(_FileCorpus):
    """Text files below a folder, one document per file, also compressed ones. Files that are not UTF-8 are skipped and
    counted."""

    path: str
    name: Literal["folder"] = "folder"
    suffixes: tuple[str, ...] = TEXT_ENDINGS
    """Endings of the files to read."""
    max_chars: Annotated[int, Field(gt=0)] = 10_000_000
    """Longest document that is read, in characters; longer ones are skipped and counted."""

    def _wanted(self, file: Path) -> bool:
        name = file.name.lower()
        for packed in PACKED:
            name = name.removesuffix(packed)
        return not self.suffixes or name.endswith(tuple(s.lower() for s in self.suffixes))

    def _endings(self) -> str:
        return " or ".join(self.suffixes) or "anything"

    def plan(self) -> list[Shard]:
        names = [_relative(self.path, f) for f in self._files()]
        return [{"files": names[a:b]} for a, b in chunks(len(names))]

    def read(self, shard: Shard) -> Iterator[Item]:
        for name in shard["files"]:
            yield read_text_file(_file(self.path, name), name, self.max_chars)

    def fingerprint(self) -> str:
        return fingerprint([[_relative(self.path, f), *file_mark(f)] for f in self._files()])


class _RowCorpus(_FileCorpus):
    """What readers of files of rows share. Each row is an object with the text in `field`."""

    field: str
    forms: ClassVar[tuple[str, ...]] = ALL_FORMS

    @property
    def _id_field(self) -> str | None:
        return getattr(self, "id_field", None)

    def _wanted(self, file: Path) -> bool:
        return row_form(file) in self.forms

    def _endings(self) -> str:
        return " or ".join(f".{form}" for form in self.forms)

    def _form(self, file: Path) -> str:
        """A file's form; the first of the reader's for a file whose ending does not say it."""
        form = row_form(file)
        return form if form in self.forms else self.forms[0]

    def plan(self) -> list[Shard]:
        shards: list[Shard] = []
        for file in self._files():
            name = _relative(self.path, file)
            form = self._form(file)
            if form == "parquet":
                shards += [{"file": name, "row_group": g} for g in range(_row_groups(file, self.field))]
            elif form == "jsonl" and not is_packed(file):
                size = file.stat().st_size
                shards += [{"file": name, "start": a, "end": b} for a, b in chunks(size, SHARD_BYTES)]
            elif file.stat().st_size:
                names = header(file)
                if names is not None and self.field not in names:
                    raise ConfigError(f"{file} has no column {self.field!r}{did_you_mean(self.field, names)}")
                shards.append({"file": name})
        if not shards:
            raise ConfigError(f"corpus {self.path} is empty")
        return shards

    def read(self, shard: Shard) -> Iterator[Item]:
        name = shard["file"]
        file = _file(self.path, name)
        form = self._form(file)
        limit = 8 * self.max_chars  # in bytes; an escape like \u00e4 takes 6 bytes per character
        if form == "parquet":
            yield from self._parquet(file, name, shard["row_group"])
            return
        found = (
            json_lines(file, name, limit, shard["start"], shard["end"]) if "start" in shard else rows(file, name, limit)
        )
        for id, row in found:
            if isinstance(row, Rejected):
                yield row
            elif self.field not in row:
                yield Rejected(id, f"no field {self.field!r}")
            else:
                yield self._document(row, id, own_id=self._id_field)

    def _parquet(self, file: Path, name: str, group: int) -> Iterator[Item]:
        """Rows of a row group: the text, the id and the metadata; no other column is read."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        own_id = self._id_field or "id"
        with file.open("rb") as opened:
            try:
                parquet = pq.ParquetFile(opened)
                schema = parquet.schema_arrow
                columns = columns_to_read(schema, self.field, own_id)
                number = 0
                for batch in parquet.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns):
                    for row in table_rows(batch, self.field):
                        id = f"{name}:{group}:{number}"
                        number += 1
                        if row is None:
                            yield Rejected(id, "not UTF-8")
                        else:
                            yield self._document(row, id, own_id if own_id in row else None)
            except (pa.ArrowInvalid, OSError) as error:
                yield Rejected(f"{name}:{group}", f"damaged Parquet file: {error}".splitlines()[0][:200])

    def _document(self, row: Row, id: str, own_id: str | None) -> Item:
        if own_id is not None:
            if row.get(own_id) is None and self._id_field is not None:
                return Rejected(id, f"no field {own_id!r}")
            id = own_id_or_place(row.get(own_id), id)
        return row_item(row, self.field, id, self.max_chars)


def _row_groups(file: Path, field: str) -> int:
    """Number of row groups of a Parquet file. Raises ConfigError if it has no column `field`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with file.open("rb") as opened:
            metadata = pq.read_metadata(opened)
        names = metadata.schema.to_arrow_schema().names
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise ConfigError(f"{file} is not a Parquet file: {str(error).splitlines()[0]}") from None
    if field not in names:
        raise ConfigError(f"{file} has no column {field!r}{did_you_mean(field, names)}")
    return int(metadata.num_row_groups)


@dataclass(frozen=True, config=STRICT)
class Jsonl(_RowCorpus):
    """JSON lines, or JSON: a file or a folder of such files, compressed or not. Each line, or each member of an array,
    is an object with the text in `field`."""

    path: str
    name: Literal["jsonl"] = "jsonl"
    field: str = "text"
    """Field with the text."""
    id_field: str | None = None
    """Field with the document's name; None: the file and its line."""
    max_chars: Annotated[int, Field(gt=0)] = 10_000_000
    """Longest document that is read, in characters; longer ones are skipped and counted."""

    forms: ClassVar[tuple[str, ...]] = JSON_FORMS


@dataclass(frozen=True, config=STRICT)
class Parquet(_RowCorpus):
    """Parquet: a file or a folder of files with the text in column `field`. Each row group is a shard.

    The text may be a list of strings (`texts` of the published scored datasets): joined they are the document. A column
    of bytes is read as UTF-8.
    """

    path: str
    name: Literal["parquet"] = "parquet"
    field: str = "text"
    """Field with the text."""
    max_chars: Annotated[int, Field(gt=0)] = 10_000_000
    """Longest document that is read, in characters; longer ones are skipped and counted."""

    forms: ClassVar[tuple[str, ...]] = ("parquet",)


@dataclass(frozen=True, config=STRICT)
class Rows(_RowCorpus):
    """Files of rows of any form, also mixed: JSON lines, JSON, CSV, TSV (compressed or not) and Parquet. `field`: the
    column with the text."""

    path: str
    name: Literal["rows"] = "rows"
    field: str = "text"
    """Field with the text."""
    id_field: str | None = None
    """Field with the document's name; None: the file and its row."""
    max_chars: Annotated[int, Field(gt=0)] = 10_000_000
    """Longest document that is read, in characters; longer ones are skipped and counted."""

    forms: ClassVar[tuple[str, ...]] = ALL_FORMS


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
    if path.name.lower().endswith(ARCHIVES) and path.is_file():
        raise ConfigError(f"{text} is an archive of files; unpack it, and give the folder")
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return {"name": "dataset", "path": text}
        return {"name": _folder_reader(text), "path": text}
    form = row_form(path)
    if form is not None and (path.is_file() or form in ("jsonl", "parquet")):
        return {"name": _rows_reader({form}), "path": text}
    if path.is_file():
        if ending(path) not in TEXT_ENDINGS:
            _check_is_text(path)
        return {"name": "folder", "path": text, "suffixes": []}
    raise ConfigError(f"corpus {text!r} is neither a file, a folder nor a named corpus{did_you_mean(text, named)}")


def _rows_reader(forms: Collection[str]) -> str:
    """Name of the reader for files of rows of these forms."""
    return "jsonl" if set(forms) <= set(JSON_FORMS) else "parquet" if set(forms) == {"parquet"} else "rows"


def _folder_reader(text: str) -> str:
    """Name of the reader for a folder. Raises ConfigError for a folder of both rows and texts."""
    found = find_files(text, lambda file: row_form(file) is not None or ending(file) in TEXT_ENDINGS)
    data = [f for f in found.read if not f.name.lower().startswith(ABOUT_FILES)]
    row_files = [f for f in data if row_form(f) is not None]
    texts = [f for f in data if row_form(f) is None]
    if row_files and texts:
        raise ConfigError(
            f"corpus {text} holds {len(row_files):,} files of rows ({row_files[0].name}) and {len(texts):,} of text "
            f"({texts[0].name}); say which to read: corpus.name=rows corpus.path={text} or corpus.name=folder "
            f"corpus.path={text}"
        )
    return _rows_reader({str(row_form(f)) for f in row_files}) if row_files else "folder"


def _check_is_text(path: Path) -> None:
    """Raise ConfigError for a file without a known ending that holds JSON lines."""
    with open_bytes(path) as file:
        line = file.readline(1 << 20)
    if b"\0" in line:
        raise ConfigError(f"{path} is not a text: it holds NUL bytes")
    rows_of_array = line.lstrip()[:1] == b"[" and b"{" in line[:100]
    if rows_of_array or (line.lstrip()[:1] == b"{" and isinstance(line_row(line, ""), dict)):
        raise ConfigError(
            f"{path} holds JSON lines, but its ending does not say so: rename it to .jsonl, or give corpus.name=jsonl "
            f"corpus.path={path} (to read it as one text: corpus.name=folder corpus.suffixes=[] corpus.path={path})"
        )
