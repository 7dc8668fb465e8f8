"""How often documents are read in an epoch, by a column of the corpus: `{column: domain, times: {wiki: 2, web: 0.5}}`.

A whole number repeats each document. A fraction chooses every n-th document of the group from a random start, so counts
are exact to one document, and a block's documents depend on numbers that are known for each block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from phf.core.config import ConfigError, did_you_mean
from phf.core.random import key64
from phf.core.types import Block
from phf.tokens.store import TokenStore
from phf.tokens.tokenizer import encode_segments

CHUNK = 1 << 16
"""Documents that are read at a time."""
OTHER = 0
"""The group of documents with another value, or with none."""


class Mixture:
    """How often each document of a store is read. `times`: by value of the column. `other`: for all other documents.

    Holds one byte per document. Raises ConfigError for a value that no document has.
    """

    def __init__(
        self, tokens: TokenStore, column: str, times: Mapping[str, float], other: float, tokenizer: Any, seed: int
    ) -> None:
        self.times_G = np.array([other, *times.values()], np.float64)
        self.start_G = np.array(
            [key64(seed, "mixture", name) / 2**64 for name in (None, *times)]
        )  # where in its first step a group's choice starts
        self.group_D = _groups(tokens, column, list(times), tokenizer)
        missing = [name for n, name in enumerate(times, 1) if not (self.group_D == n).any()]
        if missing:
            raise ConfigError(
                f"train.mixture: no document has {column}={missing[0]!r}{_known(tokens, column, missing[0])}"
            )
        self.train_D = ~tokens.heldout_D
        starts = [tokens.block_documents(k)[0] for k in range(tokens.num_blocks)]
        self.first_D = np.array(starts, np.int64)
        counts = np.zeros((len(starts) + 1, len(self.times_G)), np.int64)
        for n, (first, last) in enumerate(zip(starts, [*starts[1:], len(self.group_D)], strict=True)):
            groups = self.group_D[first:last][self.train_D[first:last]]
            counts[n + 1] = counts[n] + np.bincount(groups, minlength=len(self.times_G))
        self.before_KG = counts
        """Training documents of each group before each block."""

    def times(self, block: Block) -> np.ndarray:
        """How often each document of a block is read; as the group of the document says."""
        first = block.first_document
        group_D = self.group_D[first : first + block.num_documents]
        k = int(np.searchsorted(self.first_D, first, side="right")) - 1
        found = np.zeros(block.num_documents, np.int64)
        for group in np.unique(group_D):
            mine = (group_D == group) & block.train_D
            rank = self.before_KG[k, group] + np.arange(int(mine.sum()))
            steps = self.start_G[group] + np.array([rank, rank + 1]) * self.times_G[group]
            found[mine] = np.diff(np.floor(steps).astype(np.int64), axis=0)[0]
        return found


def _groups(tokens: TokenStore, column: str, names: list[str], tokenizer: Any) -> np.ndarray:
    """The number of each document's value among `names`, from 1 on; 0 for any other."""
    if len(names) > 255:
        raise ConfigError("train.mixture.times: at most 255 values")
    wanted = [np.array(ids, np.int64) for ids in encode_segments(tokenizer, names)]
    ids, ends_D = tokens.column(column)
    groups = np.zeros(len(ends_D), np.uint8)
    for low in range(0, len(ends_D), CHUNK):
        ends = np.asarray(ends_D[low : low + CHUNK])
        first = int(ends_D[low - 1]) if low else 0
        starts = np.r_[first, ends[:-1]]
        part = np.asarray(ids[first : int(ends[-1])])
        for n, value in enumerate(wanted, 1):
            same = ends - starts == len(value)
            for position, token in enumerate(value):
                same[same] = part[starts[same] - first + position] == token
            groups[low : low + CHUNK][same] = n
    return groups


def _known(tokens: TokenStore, column: str, name: str) -> str:
    """The value of some document that is near `name`, or some values, for a message."""
    ids, ends_D = tokens.column(column)
    starts = np.r_[0, np.asarray(ends_D[:200])][: len(ends_D)]
    values = {
        tokens.tokenizer.decode(np.asarray(ids[a:b]).tolist(), clean_up_tokenization_spaces=False)
        for a, b in zip(starts, np.asarray(ends_D[:200]), strict=False)
    }
    return did_you_mean(name, values - {""})
