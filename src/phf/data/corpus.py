"""What a reader is, and what readers share.

A reader plans its corpus as shards, plain JSON values that any process can read by themselves. Reading a shard yields a
`Document` per row or, for a row that cannot become one, a `Rejected` with the reason. Nothing is dropped silently.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phf.core.config import Plain
from phf.core.store import file_hash, is_local, jsonable, text_hash, too_deep
from phf.core.types import Document, Rejected
from phf.data.files import TOO_DEEP, Damaged, Row, open_bytes

Shard = dict[str, Any]
"""Which part of the corpus: numbers that only its reader understands."""
Item = Document | Rejected

DOCS_PER_SHARD = 512
SHARD_BYTES = 64 * 2**20
HASHED_WHOLE_BYTES = 64 * 2**20
"""Larger local files are identified by their modification time instead of their content."""
SURROGATE = re.compile("[\ud800-\udfff]")


def admit(id: str, text: Any, meta: dict[str, Any], max_chars: int) -> Item:
    """A document, or why the text cannot become one. NUL characters are allowed; lone surrogates are not: they have no
    UTF-8 form."""
    if not isinstance(text, str):
        return Rejected(id, f"text is not a string but {type(text).__name__}")
    if not text:
        return Rejected(id, "empty text")
    if len(text) > max_chars:
        return Rejected(id, "longer than max_chars")
    if SURROGATE.search(text):
        return Rejected(id, "lone surrogate")
    if too_deep(meta):
        return Rejected(id, TOO_DEEP)
    return Document(id.encode("utf-8", "backslashreplace").decode(), text, jsonable(meta))


class Corpus:
    """Interface of a reader. A subclass is a frozen dataclass; its fields are its settings."""

    def plan(self) -> list[Shard]:
        """The shards, in order. Raises ConfigError if there is nothing to read."""
        raise NotImplementedError

    def read(self, shard: Shard) -> Iterator[Item]:
        """Documents and rejected rows of one shard, in order."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Changes when the content does. It is part of the key of every later stage."""
        raise NotImplementedError

    def provenance(self) -> Plain:
        """What the manifest says about the source beyond the reader's settings."""
        return {}

    def left_out(self) -> list[str]:
        """Files at the corpus's place that it does not read, with the reason."""
        return []


def file_mark(path: Path) -> list[Any]:
    """What identifies a file: name, size, and content hash (local), modification time (local and large) or the version
    that a remote file system reports."""
    stat = path.stat()
    if not is_local(path):
        return [path.name, stat.st_size, str(path.fs.ukey(path.path))]  # type: ignore[attr-defined]
    return [path.name, stat.st_size, file_hash(path) if stat.st_size <= HASHED_WHOLE_BYTES else stat.st_mtime_ns]


def chunks(count: int, size: int = DOCS_PER_SHARD) -> list[tuple[int, int]]:
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def read_text_file(path: Path, id: str, max_chars: int) -> Item:
    try:
        with open_bytes(path) as file:
            data = file.read(4 * max_chars + 4)  # UTF-8 takes up to 4 bytes per character
    except OSError as error:
        return Rejected(id, f"cannot be read: {error.strerror}")
    except Damaged as error:
        return Rejected(id, f"damaged compressed file: {error}")
    if len(data) > 4 * max_chars + 3:
        return Rejected(id, "longer than max_chars")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Rejected(id, "not UTF-8")
    return admit(id, text, {"file": id}, max_chars)


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a document is held out, by a hash of its text. Equal documents are all held out or all trained on."""
    return text_hash(text, b"phf heldout") < fraction * 2**64


def own_id_or_place(own: Any, place: str) -> str:
    """A row's own id; its place where it has none."""
    return place if own is None else str(own)


def row_item(row: Row, field: str, id: str, max_chars: int) -> Item:
    """A document from a row of a table. A list of strings is joined and kept as the segments; other lists in the row
    describe the segments, so they are not metadata of the document."""
    text = row.get(field)
    scores = _given_scores(row)
    rest = {k: v for k, v in row.items() if k != field}
    if not isinstance(text, list) or not all(isinstance(t, str) for t in text):
        item = admit(id, text, _plain_meta(rest), max_chars)
        return item if isinstance(item, Rejected) else dataclasses.replace(item, scores=scores)
    item = admit(id, "".join(text), _plain_meta({k: v for k, v in rest.items() if not isinstance(v, list)}), max_chars)
    if isinstance(item, Rejected):
        return item
    if isinstance(scores, tuple) and len(scores) == len(text):
        scores = tuple(s for s, t in zip(scores, text, strict=True) if t)
    return dataclasses.replace(item, segments=tuple(t for t in text if t), scores=scores)


def _given_scores(row: Row) -> tuple[float, ...] | float | None:
    """The scores that a row comes with, if any: `scores`, a list of numbers, or `score`, a number. NaN: not judged."""

    def number(value: Any) -> float:
        return float(value) if value is not None and math.isfinite(value) else math.nan

    many = row.get("scores")
    if isinstance(many, list) and all(_is_number(s) or s is None for s in many):
        return tuple(number(s) for s in many)
    one = row.get("score")
    return number(one) if _is_number(one) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain_meta(row: Row) -> Row:
    """The row as JSON data; other values become strings. A row that nests too deeply is left for `admit` to reject."""
    if too_deep(row):
        return row
    found: Row = json.loads(json.dumps(jsonable(row), default=str))
    return found
