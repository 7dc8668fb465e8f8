"""Readers of Hugging Face datasets: one (`HFDataset`), or several of one form (`DatasetList`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core.config import STRICT, ConfigError, did_you_mean
from phf.core.store import fingerprint
from phf.core.types import Rejected
from phf.data.corpus import DOCS_PER_SHARD, Corpus, Item, Shard, chunks, file_mark, own_id_or_place, row_item
from phf.data.files import find_files
from phf.data.tables import ROWS_AT_ONCE, columns_to_read, table_rows


def _part(total: int, number: int, of: int) -> int:
    """The size of part `number` when `total` is split over `of` parts as evenly as possible."""
    return total // of + (number < total % of)


@dataclass(frozen=True, config=STRICT)
class HFDataset(Corpus):
    """A Hugging Face dataset: a local folder (`save_to_disk` or data files) or a name on the Hub, whole or streamed.

    The shards of a streamed dataset are its own. No code from the dataset runs.
    """

    path: str
    """Name on the Hub, or a folder."""
    name: Literal["dataset"] = "dataset"
    config: str | None = None
    """The data set's configuration, if it has several."""
    split: str = "train"
    """For example train."""
    field: str = "text"
    """Field with the text."""
    streaming: bool = False
    """Read over the network without a copy on disk."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    max_docs: Annotated[int, Field(gt=0)] | None = None
    """Largest number of documents to read; None: all."""
    max_chars: Annotated[int, Field(gt=0)] = 10_000_000
    """Longest document that is read, in characters; longer ones are skipped and counted."""

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
            except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
                raise ConfigError(f"dataset {self.path} cannot be loaded: {error}") from None
        if data.column_names is not None and self.field not in data.column_names:
            raise ConfigError(
                f"dataset {self.path} has no column {self.field!r}{did_you_mean(self.field, data.column_names)}"
            )
        return _metadata_only(data, self.field)

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
            data = data.shard(shard["of"], shard["shard"])
            data = data if self.max_docs is None else data.take(_part(self.max_docs, shard["shard"], shard["of"]))
            prefix = f"{shard['shard']}:"
            start = 0
        else:
            data = data.select(range(shard["start"], shard["end"]))
            prefix = ""
            start = shard["start"]
        for table in data.with_format("arrow").iter(ROWS_AT_ONCE):
            for row in table_rows(table, self.field):
                id = f"{prefix}{start}"
                start += 1
                yield (
                    Rejected(id, "not UTF-8")
                    if row is None
                    else row_item(row, self.field, own_id_or_place(row.get("id"), id), self.max_chars)
                )

    def fingerprint(self) -> str:
        if not self.streaming:
            data = self._load()
            return fingerprint([data._fingerprint, len(data)])
        local = Path(self.path).expanduser()
        if local.exists():
            return fingerprint([file_mark(f) for f in find_files(self.path, lambda file: True).read])
        import huggingface_hub

        return fingerprint([self.path, huggingface_hub.HfApi().dataset_info(self.path, revision=self.revision).sha])


def _metadata_only(data: Any, field: str) -> Any:
    """A dataset without the columns that are neither the text, nor the id, nor metadata."""
    if data.features is None:
        return data
    schema = data.features.arrow_schema
    kept = columns_to_read(schema, field, "id")
    return data if len(kept) == len(schema) else data.select_columns(kept)


@dataclass(frozen=True, config=STRICT)
class DatasetList(Corpus):
    """Several Hugging Face datasets of one form, one after the other. The published scored Pile comes in 39
    datasets."""

    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names on the Hub, or folders, one after the other."""
    name: Literal["datasets"] = "datasets"
    config: str | None = None
    """The data sets' configuration, if they have several."""
    split: str = "train"
    """For example train."""
    field: str = "text"
    """Field with the text."""
    streaming: bool = False
    """Read over the network without a copy on disk."""
    max_chars: Annotated[int, Field(gt=0)] = 10_000_000
    """Longest document that is read, in characters; longer ones are skipped and counted."""

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
