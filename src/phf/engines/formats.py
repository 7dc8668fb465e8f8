"""The files that training engines read: token ids with a score, a mask and a weight for each token, by document.

- `flat`: ids, scores, mask, weights and ends of documents, each an array of its own for `numpy.fromfile`.
- `megatron`: .bin and .idx of Megatron-LM's indexed dataset, the same for the weights.
- `neox`: the same, with a parallel dataset of labels in which masked tokens are -100 (train_label_data_paths).
- `olmo`: ids and boolean masks as OLMo-core's numpy datasets read them (paths, label_mask_paths).
- `datatrove`: .ds, .ds.index and .ds.loss of datatrove's tokenized files, which Nanotron reads too.

Sources: Megatron-LM core/datasets/indexed_dataset.py; GPT-NeoX docs, "train_label_data_paths"; OLMo-core
data/numpy_dataset.py; datatrove pipeline/tokens/tokenizer.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from phf.core import store

Format = Literal["flat", "megatron", "neox", "olmo", "datatrove"]
MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_TYPES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
"""Codes of types in Megatron's index."""
MASKED = -100
"""The label of a token that adds no loss."""


@dataclass(frozen=True)
class Shard:
    """Consecutive documents of an edited stream, one entry per token."""

    ids: np.ndarray
    """uint16 or uint32."""
    score: np.ndarray
    """Score of each token, float16; NaN: not judged."""
    learned: np.ndarray
    """Whether the token is a target that the objective counts, bool."""
    weight: np.ndarray
    """Weight of -log p of each target, float32; 0 where it does not count."""
    unlikelihood: np.ndarray | None
    """Weight of -log(1 - p), float32; None where it is 0 everywhere."""
    ends: np.ndarray
    """Exclusive end of each document, int64."""


def write_flat(stem: Path, shard: Shard) -> list[Path]:
    arrays = {
        "tokens": shard.ids,
        "scores": shard.score,
        "mask": shard.learned.astype(np.uint8),
        "weights": shard.weight,
        "ends": shard.ends,
    }
    if shard.unlikelihood is not None:
        arrays["unlikelihood"] = shard.unlikelihood
    return [_write(stem.with_name(f"{stem.name}.{name}.bin"), array) for name, array in arrays.items()]


def write_megatron(stem: Path, shard: Shard) -> list[Path]:
    ids = _megatron_ids(shard.ids)
    return [*_indexed(stem, ids, shard.ends), *_indexed(_with(stem, "weights"), shard.weight, shard.ends)]


def write_neox(stem: Path, shard: Shard) -> list[Path]:
    labels = np.where(shard.learned, shard.ids.astype(np.int32), MASKED).astype(np.int32)
    ids = _megatron_ids(shard.ids)
    return [*_indexed(stem, ids, shard.ends), *_indexed(_with(stem, "labels"), labels, shard.ends)]


def write_olmo(stem: Path, shard: Shard) -> list[Path]:
    return [_write(stem.with_suffix(".npy"), shard.ids), _write(_with(stem, "mask").with_suffix(".npy"), shard.learned)]


def write_datatrove(stem: Path, shard: Shard) -> list[Path]:
    files = {".ds": shard.ids, ".ds.index": shard.ends.astype(np.uint64), ".ds.loss": shard.learned}
    return [_write(stem.with_name(stem.name + ending), array) for ending, array in files.items()]


WRITERS: dict[str, Callable[[Path, Shard], list[Path]]] = {
    "flat": write_flat,
    "megatron": write_megatron,
    "neox": write_neox,
    "olmo": write_olmo,
    "datatrove": write_datatrove,
}


def _with(stem: Path, what: str) -> Path:
    return stem.with_name(f"{stem.name}-{what}")


def _write(path: Path, array: np.ndarray) -> Path:
    with store.written_aside(path) as aside:
        array.tofile(aside)
    return path


def _megatron_ids(ids: np.ndarray) -> np.ndarray:
    """Ids in a type that Megatron's index knows."""
    return ids if ids.dtype == np.uint16 else ids.astype(np.int32)


def _indexed(stem: Path, values: np.ndarray, ends: np.ndarray) -> list[Path]:
    """A Megatron indexed dataset in which each document is one sequence: `values` in .bin, and in .idx the magic, the
    version, the type, the numbers of sequences and documents, lengths, places in bytes, and documents."""
    lengths = np.diff(ends, prepend=0).astype(np.int32)
    places = (ends - lengths) * values.dtype.itemsize
    head = MAGIC + struct.pack("<QBQQ", 1, MEGATRON_TYPES[values.dtype.name], len(lengths), len(lengths) + 1)
    index = stem.with_name(stem.name + ".idx")
    written = _write(stem.with_name(stem.name + ".bin"), values)
    with store.written_aside(index) as aside, open(aside, "wb") as out:
        out.write(head)
        for array in (lengths, places.astype(np.int64), np.arange(len(lengths) + 1, dtype=np.int64)):
            out.write(array.tobytes())
    return [written, index]
