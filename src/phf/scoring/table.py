"""All scores of a corpus in memory, and its documents by number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from phf.core import store
from phf.core.progress import Progress
from phf.core.types import Rejected, ScoredDocument
from phf.data.scored import ScoredCorpus, read_table


class Table:
    """Scores and lengths of all segments of a scored corpus, and where each document is."""

    def __init__(self, corpus: ScoredCorpus) -> None:
        scores = []
        chars = []
        counts = []
        files = []
        rows = []
        for number, file in enumerate(Progress(corpus.files, desc="reading", unit="file")):
            if corpus.preference is None:
                table = read_table(file, ["texts", "scores"])
                given = table["scores"]
            else:
                table = read_table(file, ["texts"])
                given = read_table(corpus.added_file(number))["scores"]
            try:
                flat, length, size, row = _segments(*(_lists(file, c) for c in (table["texts"], given)))
            except pa.ArrowInvalid:
                raise store.StoreError(f"{file}: a score is not a number") from None
            scores.append(flat)
            chars.append(length)
            counts.append(size)
            rows.append(row)
            files.append(np.full(len(row), number, np.int32))
        self.score_S = np.concatenate(scores)
        self.chars_S = np.concatenate(chars)
        self.counts_D = np.concatenate(counts)
        """Segments of each document."""
        self.file_D = np.concatenate(files)
        self.row_D = np.concatenate(rows)
        """Row of the document in its file."""
        self.doc_S = np.repeat(np.arange(len(self.counts_D)), self.counts_D)
        judged_S = ~np.isnan(self.score_S)
        sums = np.bincount(self.doc_S[judged_S], self.score_S[judged_S].astype(np.float64), len(self.counts_D))
        with np.errstate(invalid="ignore", divide="ignore"):
            self.mean_D = sums / np.bincount(self.doc_S[judged_S], minlength=len(self.counts_D))
        self.max_D = np.full(len(self.counts_D), -np.inf)
        np.maximum.at(self.max_D, self.doc_S[judged_S], self.score_S[judged_S])
        self.max_D[np.isinf(self.max_D)] = np.nan
        self.chars_D = np.bincount(self.doc_S, self.chars_S, len(self.counts_D))


def _lists(file: Path, column: Any) -> Any:
    """A column as one array of lists; a column without any value has empty ones. Raises StoreError for others."""
    kind = column.type
    if pa.types.is_null(kind):
        return pa.nulls(len(column), pa.list_(pa.string()))
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise store.StoreError(f"{file}: a row's texts and scores must be lists, one item per segment, not {kind}")
    return column.combine_chunks()


def _segments(texts: Any, scores: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of the usable rows: scores and characters of every segment, number of segments of each row, and the rows'
    numbers."""
    size = pc.list_value_length(texts)
    other = pc.list_value_length(scores)
    usable = pc.fill_null(pc.and_(pc.equal(size, other), pc.greater(size, 0)), False)
    owner = pc.list_parent_indices(texts).to_numpy(zero_copy_only=False)
    is_bytes = pa.types.is_binary(texts.type.value_type) or pa.types.is_large_binary(texts.type.value_type)
    length = pc.binary_length if is_bytes else pc.utf8_length
    chars_of = pc.fill_null(length(pc.list_flatten(texts)), 0).to_numpy(zero_copy_only=False)
    has_text = np.bincount(owner, weights=chars_of, minlength=len(texts)) > 0  # a row of empty segments is no document
    usable = pc.and_(usable, pa.array(has_text))
    row = np.flatnonzero(usable.to_numpy(zero_copy_only=False))
    texts = texts.filter(usable)
    scores = scores.filter(usable)
    flat = pc.fill_null(pc.list_flatten(scores).cast(pa.float32()), math.nan).to_numpy(zero_copy_only=False)
    chars = pc.fill_null(length(pc.list_flatten(texts)), 0).to_numpy(zero_copy_only=False)
    flat = np.where(np.isinf(flat), np.float32(math.nan), flat)
    sizes = pc.list_value_length(texts).to_numpy(zero_copy_only=False)
    return flat, chars.astype(np.int64), sizes.astype(np.int64), row


def read_documents(corpus: ScoredCorpus, table: Table, documents: Sequence[int]) -> dict[int, ScoredDocument]:
    """Documents by their number in the table. Each file that holds one of them is read once."""
    found: dict[int, ScoredDocument] = {}
    for number in sorted({int(table.file_D[d]) for d in documents}):
        rows = {int(table.row_D[d]): d for d in documents if table.file_D[d] == number}
        for row, item in enumerate(corpus.read(corpus.files[number], keep_empty=True)):
            if row in rows and not isinstance(item, Rejected):
                found[rows[row]] = item
            if row >= max(rows):
                break
    return found
