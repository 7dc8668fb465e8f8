"""Columns of a corpus in a token store: text about each document, such as its address, as token ids.

tokens/  <column>.about.bin   ids, one document after the other      <column>.about_ends.bin   int64 per document
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phf.core import store
from phf.core.config import ConfigError, did_you_mean
from phf.core.folders import FileMark
from phf.core.types import ScoredDocument
from phf.data.scored import ScoredCorpus
from phf.tokens.tokenizer import encode_segments

BATCH = 256


def files_of(folder: Path, column: str) -> tuple[Path, Path]:
    """The files with a column's ids and their ends."""
    return folder / f"{column}.about.bin", folder / f"{column}.about_ends.bin"


def check_columns(corpus: ScoredCorpus, columns: Sequence[str]) -> None:
    """Raise ConfigError for a column that no document has, before anything takes long."""
    missing = list(dict.fromkeys(columns))
    for column in missing:
        if not store.is_file_name(column):
            raise ConfigError(f"column {column!r} cannot be the name of a file")
    seen: set[str] = set()
    documents = (d for file in corpus.files for d in corpus.read(file) if isinstance(d, ScoredDocument))
    while missing:
        document = next(documents, None)
        if document is None:
            hint = did_you_mean(missing[0], seen)
            raise ConfigError(f"no document of {corpus.path} has a column {missing[0]!r}{hint}")
        missing = [column for column in missing if document.meta.get(column) is None]
        if len(seen) < 100:
            seen |= document.meta.keys()


def write_column(corpus: ScoredCorpus, column: str, tokenizer: Any, dtype: np.dtype[Any], folder: Path) -> FileMark:
    """Write a column of a corpus into a store and return the mark of its ids."""
    ids_file, ends_file = files_of(folder, column)
    ends = []
    total = 0
    with store.written_aside(ids_file) as aside, open(aside, "wb") as out:
        documents = (d for file in corpus.files for d in corpus.read(file) if isinstance(d, ScoredDocument))
        batch: list[str] = []

        def flush() -> None:
            nonlocal total
            for ids in encode_segments(tokenizer, batch):
                out.write(np.array(ids, dtype).tobytes())
                total += len(ids)
                ends.append(total)
            batch.clear()

        for document in documents:
            value = document.meta.get(column)
            batch.append("" if value is None else str(value))
            if len(batch) == BATCH:
                flush()
        flush()
    with store.written_aside(ends_file) as aside:
        aside.write_bytes(np.array(ends, np.int64).tobytes())
    return FileMark(ids_file.stat().st_size, store.file_hash(ids_file))


def open_column(folder: Path, column: str, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """A column's ids and the exclusive end of each document's, memory-mapped."""
    ids_file, ends_file = files_of(folder, column)
    if not ids_file.exists() or not ends_file.exists():
        raise store.StoreError(f"{ids_file} is missing; run `phf tokenize` again with --column {column}")
    ids = np.memmap(ids_file, dtype, "r") if ids_file.stat().st_size else np.zeros(0, dtype)
    ends = np.memmap(ends_file, np.int64, "r") if ends_file.stat().st_size else np.zeros(0, np.int64)
    if len(ids) != (int(ends[-1]) if len(ends) else 0):
        raise store.StoreError(f"{ids_file} is damaged; run `phf tokenize` again into another folder")
    return ids, ends
