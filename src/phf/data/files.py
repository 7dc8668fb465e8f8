"""Files of rows and of text, in every form that phf reads: one reader for corpora, labels, prompts, word lists and test
sets.

The ending says the form, in lower or upper case: JSON lines, JSON, CSV, TSV, Parquet, or plain text. `.gz`, `.bz2`,
`.xz` and `.zst` after it are unpacked while reading. A byte order mark is not part of the text.
"""

from __future__ import annotations

import bz2
import collections
import csv
import dataclasses
import gzip
import io
import itertools
import json
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from phf.core.config import ConfigError, did_you_mean
from phf.core.folders import MANIFEST, STARTED, is_of_a_stage
from phf.core.store import TooDeep, as_path, is_local, parse_json
from phf.core.types import Rejected
from phf.data.tables import table_rows

PACKED = (".gz", ".bz2", ".xz", ".zst")
"""Endings of compressed files."""
ROW_FORMS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
"""Forms of files that hold rows, by ending."""
TEXT_ENDINGS = (".txt", ".md", ".rst", ".py")
"""Files of which each is one text."""
MAX_JSON_BYTES = 1 << 30
"""A `.json` file that holds one array is read as a whole, up to this size."""
TOO_DEEP = "nested too deeply"
MARK = b"\xef\xbb\xbf"
"""Byte order mark of UTF-8."""

Row = dict[str, Any]


class Damaged(Exception):
    """A compressed file that cannot be unpacked to its end."""


def ending(path: Path) -> str:
    """The ending that says a file's form, in lower case: `.jsonl` for `A.JSONL.gz`."""
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


def row_form(path: Path) -> str | None:
    """The form of a file of rows (jsonl, json, csv, tsv or parquet); None for any other file."""
    return ROW_FORMS.get(ending(path))


def is_packed(path: Path) -> bool:
    return path.name.lower().endswith(PACKED)


def hidden(path: Path) -> bool:
    """Whether a relative path names a hidden file, or one in a hidden folder. Editors and systems keep copies there."""
    return any(part.startswith(".") or part in ("__MACOSX", "__pycache__") for part in path.parts)


@dataclasses.dataclass(frozen=True)
class Found:
    """Files at a corpus's place."""

    read: list[Path]
    others: list[Path]
    """Files that the reader does not read."""
    hidden: list[Path]
    copies: list[Path]
    """Compressed files next to the same file unpacked."""


def find_files(path: str, wanted: Any) -> Found:
    """The file itself, or the sorted files below a folder for which `wanted` is true."""
    root = as_path(path)
    if root.is_file():
        return Found([root], [], [], [])
    if not root.is_dir():
        raise ConfigError(f"corpus path {path} does not exist")
    found = Found([], [], [], [])
    ours: dict[Path, bool] = {}
    for file in sorted(_files_below(root)):
        folder = file.parent
        if folder not in ours:
            ours[folder] = _is_stage(folder)
        if hidden(file.relative_to(root)) or (ours[folder] and file.suffix == ".json"):
            found.hidden.append(file)
        elif not file.is_file():
            found.others.append(file)
        else:
            (found.read if wanted(file) else found.others).append(file)
    copies = _copies(found.read)
    found.read[:] = [file for file in found.read if file not in copies]
    found.copies.extend(sorted(copies))
    return found


def _is_stage(folder: Path) -> bool:
    """Whether a folder holds the manifest of one of phf's stages: its other JSON files are no texts either."""
    try:
        manifest = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return is_of_a_stage(manifest)


def _copies(files: Sequence[Path]) -> set[Path]:
    """Compressed files that start like another file of the same name, unpacked or compressed in another way."""
    first: dict[Path, Path] = {}
    for file in sorted(files, key=is_packed):
        first.setdefault(file.with_suffix("") if is_packed(file) else file, file)
    copies = set()
    for file in filter(is_packed, files):
        original = first[file.with_suffix("")]
        if original != file and _start(original) == _start(file):
            copies.add(file)
    return copies


def _start(file: Path) -> bytes | None:
    """The first bytes of a file, unpacked; None if they cannot be read."""
    try:
        with open_bytes(file) as opened:
            return opened.read(COMPARED_BYTES)
    except (OSError, Damaged):
        return None


COMPARED_BYTES = 1 << 20
"""Of two files of one name, so much is compared."""


def _files_below(root: Path) -> Iterator[Path]:
    """Files below a folder, also below links to folders (each folder once), and links to nothing."""
    if not is_local(root):
        yield from (p for p in root.rglob("*") if p.is_file())
        return
    seen = set()
    for folder, inner, names in os.walk(root, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:
            inner.clear()
            continue
        seen.add(place)
        if folder != str(root) and {"pyvenv.cfg", STARTED} & set(names):  # a Python environment, a result of phf
            inner.clear()
            continue
        yield from (Path(folder) / name for name in names)


class _Unpacked(io.RawIOBase):
    """A decompressed stream. What its library raises for a damaged file becomes `Damaged`."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            read = getattr(self.stream, "read1", self.stream.read)  # what is there, before a damaged part is reached
            data = read(len(buffer))
        except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
            raise Damaged(str(error)) from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.stream.close()
        super().close()


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading, unpacked, on any file system. Has `readline(limit)`. Reading a damaged compressed file
    raises `Damaged`."""
    opened = path.open("rb")
    name = path.name.lower()
    if not name.endswith(PACKED):  # fsspec's own remote files only read whole lines
        buffered = is_local(path) or isinstance(opened, io.BufferedIOBase)
        return opened if buffered else io.BufferedReader(opened)
    stream: Any
    if name.endswith(".gz"):
        stream = gzip.GzipFile(fileobj=opened)
    elif name.endswith(".bz2"):
        stream = bz2.BZ2File(opened)
    elif name.endswith(".xz"):
        stream = lzma.LZMAFile(opened)
    else:
        import pyarrow as pa

        stream = pa.CompressedInputStream(opened, "zstd")
    return io.BufferedReader(_Unpacked(stream), 1 << 20)


# Text


def read_text(path: Path, what: str) -> str:
    """A file of UTF-8 text without its byte order mark. Raises ConfigError, which calls the file `what`, if it cannot
    be read."""
    try:
        with open_bytes(path) as file:
            return file.read().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error.strerror or error}") from None
    except Damaged as error:
        raise ConfigError(f"cannot read {what} {path}: the compressed file is damaged ({error})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{what} {path} is not UTF-8 text (byte {error.start}); save it as UTF-8, for example with "
            f"iconv -f latin1 -t utf-8"
        ) from None


# Rows


def line_row(line: bytes, id: str, wrap: str | None = None) -> Row | Rejected:
    """The JSON object in a line, or why the line holds none. `wrap`: a line that is a string counts as an object with
    this one field."""
    try:
        row = parse_json(line)
    except UnicodeDecodeError:
        return Rejected(id, "not UTF-8")
    except TooDeep:
        return Rejected(id, TOO_DEEP)
    except ValueError:
        return Rejected(id, "malformed JSON")
    if wrap is not None and isinstance(row, str):
        return {wrap: row}
    return row if isinstance(row, dict) else Rejected(id, "not a JSON object")


def json_lines(
    file: Path, name: str, limit: int, start: int = 0, stop: int | None = None, wrap: str | None = None
) -> Iterator[tuple[str, Row | Rejected]]:
    """(id, row) of the lines that *start* at the bytes [start, stop) of the unpacked file. A line of more than `limit`
    bytes is rejected without being held in memory. `name`: the file's, for ids."""
    with open_bytes(file) as lines:
        at = max(start - 1, 0)
        if start:
            lines.seek(at)
            at += _rest_of_line(lines, limit)  # of a line that started before; only its end if it ends exactly here
        while stop is None or at < stop:
            line = lines.readline(limit)
            if not line:
                return
            id = f"{name}:{at}"
            text = line.removeprefix(MARK) if at == 0 else line
            at += len(line)
            if len(line) == limit and not line.endswith(b"\n"):
                at += _rest_of_line(lines, limit)
                yield id, Rejected(id, "longer than max_chars")
            elif text.strip():
                yield id, line_row(text, id, wrap)


def _rest_of_line(lines: IO[bytes], limit: int) -> int:
    """Pass over the rest of a line and return its length in bytes."""
    length = 0
    while rest := lines.readline(limit):
        length += len(rest)
        if rest.endswith(b"\n"):
            break
    return length


def is_json_lines(file: Path) -> bool:
    """Whether a `.json` file holds a JSON object per line. Otherwise it holds one value over all its lines."""
    with open_bytes(file) as opened:
        first = b""
        while not first.strip():
            line = opened.readline(1 << 24)
            if not line:
                return True
            first = line.removeprefix(MARK)
        more = opened.readline(1 << 16).strip()
    if first.lstrip()[:1] == b"[":
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return bool(more) and first.strip() != b"{" and more[:1] == b"{"
    return True


def _json_rows(file: Path, name: str) -> Iterator[tuple[str, Row | Rejected]]:
    """Rows of a file with one JSON value: an array of objects, or one object."""
    with open_bytes(file) as opened:
        data = opened.read(MAX_JSON_BYTES + 1).removeprefix(MARK)
    if len(data) > MAX_JSON_BYTES:
        raise ConfigError(f"{file} is one JSON value of over 1 GiB; convert it to JSON lines: jq -c '.[]' {file.name}")
    try:
        value = parse_json(data)
    except UnicodeDecodeError:
        yield name, Rejected(name, "not UTF-8")
        return
    except ValueError as error:
        yield name, Rejected(name, TOO_DEEP if isinstance(error, TooDeep) else "malformed JSON")
        return
    for number, row in enumerate(value if isinstance(value, list) else [value]):
        id = f"{name}:{number}"
        yield id, row if isinstance(row, dict) else Rejected(id, "not a JSON object")


class _Lines:
    """Lines of an open file, with those that a CSV reader took for its current row."""

    def __init__(self, file: Iterator[str]) -> None:
        self.file = file
        self.taken: list[str] = []
        self.waiting: collections.deque[str] = collections.deque()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.waiting.popleft() if self.waiting else next(self.file)
        self.taken.append(line)
        return line

    def put_back(self) -> None:
        """Give the lines taken, but the first, again."""
        self.waiting.extendleft(reversed(self.taken[1:]))


def _table_rows(file: Path, name: str, form: str) -> Iterator[tuple[str, Row | Rejected]]:
    """Rows of a CSV or TSV file. A TSV has no quoting, like GLUE's files. A row with a stray quote costs its first line
    only: the quote may have run on over the rows after it. After one that runs to the end of the file, each line is a
    row."""
    csv.field_size_limit(2**31 - 1)
    options: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if form == "tsv" else {}
    with open_bytes(file) as opened:
        lines = _Lines(io.TextIOWrapper(opened, encoding="utf-8-sig", errors="surrogateescape", newline=""))
        rows = csv.DictReader(lines, strict=True, **options)
        names = rows.fieldnames
        _check_columns(file, names or [])
        alone = False
        for number in itertools.count():
            id = f"{name}:{number}"
            lines.taken.clear()
            try:
                row = next(rows, None)
            except csv.Error as error:
                alone |= "unexpected end" in str(error) and len(lines.taken) > 1
                row = _lenient(lines.taken, names, str(error))
                lines.put_back()
                rows = csv.DictReader(lines, names, strict=True, **options)
                if row is None:
                    yield id, Rejected(id, f"malformed CSV: {error}")
                if alone:
                    break
                if row is None:
                    continue
            if row is None:
                return
            yield id, _table_row(id, row)
        for later, line in enumerate(lines, number + 1):
            id = f"{name}:{later}"
            try:
                row = next(csv.DictReader([line], names, strict=True, **options), None)
            except csv.Error as error:
                yield id, Rejected(id, f"malformed CSV: {error}")
                continue
            if row is not None:
                yield id, _table_row(id, row)


def _table_row(id: str, row: Row) -> Row | Rejected:
    """A row, or why it cannot be one."""
    if None in row:
        return Rejected(id, "more fields than the header has")
    if any(isinstance(v, str) and not _is_utf8(v) for v in row.values()):
        return Rejected(id, "not UTF-8")
    return row


def _lenient(lines: Sequence[str], names: Sequence[str] | None, problem: str) -> Row | None:
    """A row on one line in which text follows a closing quote; None for any other row with a problem."""
    if len(lines) != 1 or "unexpected end" in problem:
        return None
    try:
        return next(csv.DictReader(lines, names), None)
    except csv.Error:
        return None


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any(0xDC80 <= ord(c) < 0xDD00 for c in text)


def rows(
    file: Path, name: str = "", limit: int = 1 << 27, wrap: str | None = None
) -> Iterator[tuple[str, Row | Rejected]]:
    """(id, row) of every row of a file that is not Parquet, in order. The end of a damaged compressed file is one
    rejected row. `name`: the file's, for ids."""
    name = name or file.name
    form = row_form(file) or "jsonl"
    count = 0
    try:
        if form in ("csv", "tsv"):
            found = _table_rows(file, name, form)
        elif form == "json" and not is_json_lines(file):
            found = _json_rows(file, name)
        else:
            found = json_lines(file, name, limit, wrap=wrap)
        for pair in found:
            yield pair
            count += 1
    except Damaged as error:
        yield name, Rejected(name, f"damaged compressed file, after {count:,} rows: {error}")


def header(file: Path) -> list[str] | None:
    """Names of the columns of a CSV or TSV file; None for other forms, whose rows name them. Raises ConfigError for a
    file without any."""
    form = row_form(file)
    if form not in ("csv", "tsv"):
        return None
    try:
        with open_bytes(file) as opened:
            text = io.TextIOWrapper(opened, encoding="utf-8-sig", errors="surrogateescape", newline="")
            quoting: Any = csv.QUOTE_NONE if form == "tsv" else csv.QUOTE_MINIMAL
            names = next(csv.reader(text, delimiter="\t" if form == "tsv" else ",", quoting=quoting), None)
    except (Damaged, csv.Error) as error:
        raise ConfigError(f"{file} is not a readable {form} file: {error}") from None
    if not names:
        raise ConfigError(f"{file} is empty")
    _check_columns(file, names)
    return names


def _check_columns(file: Path, names: Sequence[str]) -> None:
    """Raise ConfigError for a name that two columns have: only one of them could be read."""
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"{file} has two columns named {twice[0]!r}; rename one of them")


def read_rows(path: Path, columns: Sequence[str] = (), wrap: str | None = None) -> list[Row]:
    """All rows of a file of any form, for labels, prompts and test sets. Raises ConfigError for a file that is missing
    or has a form that is not read, for its first row that cannot be read, and where no row has one of `columns`.

    `wrap`: a line of JSON lines that is a string counts as an object with this one field.
    """
    if not path.is_file():
        what = "does not exist" if not path.exists() else "is a folder, not a file" if path.is_dir() else "is no file"
        raise ConfigError(f"{path} {what}")
    form = row_form(path)
    if form is None:
        raise ConfigError(
            f"{path}: expected a file ending in {', '.join(ROW_FORMS)}, perhaps with .gz, .bz2, .xz, .zst"
        )
    try:
        found = _parquet_rows(path) if form == "parquet" else list(_strict_rows(path, form, wrap))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    known = {name for row in found for name in row}
    for column in columns:
        if found and column not in known:
            raise ConfigError(f"{path} has no column {column!r}{did_you_mean(column, sorted(known))}")
    return found


def _strict_rows(path: Path, form: str, wrap: str | None) -> Iterator[Row]:
    """Rows of a file that is not Parquet. Raises ConfigError, with the place, for the first one that is none."""
    number = 0
    for id, row in rows(path, wrap=wrap):
        if isinstance(row, dict):
            number += 1
            yield row
            continue
        place = f", row {number}"
        if form in ("jsonl", "json") and ":" in id:
            with open_bytes(path) as file:  # a byte in JSON lines, a row in an array
                line = file.read(int(id.rpartition(":")[2])).count(b"\n") + 1
            place = f", line {line}" if form == "jsonl" or is_json_lines(path) else place
        raise ConfigError(f"{path}{place}: {row.reason}")


def _parquet_rows(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = list(table_rows(pq.read_table(path)))
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{path} is not a readable Parquet file: {error}") from None
    for number, row in enumerate(found):
        if row is None:
            raise ConfigError(f"{path}, row {number}: not UTF-8")
    return [row for row in found if row is not None]
