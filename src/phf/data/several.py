"""Readers made of others: several corpora as one, and a random part of a corpus."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core.config import STRICT, ConfigError, Plain
from phf.core.store import fingerprint, text_hash
from phf.core.types import Document, Rejected
from phf.data.corpus import Corpus, Item, Shard
from phf.data.hub import DatasetList, HFDataset
from phf.data.installed import InstalledPackages, StandardLibrary
from phf.data.readers import Folder, Jsonl, Parquet, Rows

SingleCorpus = Annotated[
    Folder | Jsonl | Parquet | Rows | HFDataset | DatasetList | InstalledPackages | StandardLibrary,
    Field(discriminator="name", title="reader"),
]


@dataclass(frozen=True, config=STRICT)
class Several(Corpus):
    """Several corpora by name, one after the other. Each document says in its field `corpus` from which it is, so that
    `train.mixture` can read one corpus more often than another (`column: corpus`)."""

    corpora: Annotated[dict[str, SingleCorpus], Field(min_length=1)]
    """The corpora, each with its name and settings."""
    name: Literal["several"] = "several"

    def plan(self) -> list[Shard]:
        return [{"corpus": name, "shard": shard} for name, corpus in self.corpora.items() for shard in corpus.plan()]

    def read(self, shard: Shard) -> Iterator[Item]:
        name = shard["corpus"]
        for item in self.corpora[name].read(shard["shard"]):
            item = dataclasses.replace(item, id=f"{name}:{item.id}")
            yield item if isinstance(item, Rejected) else dataclasses.replace(item, meta=item.meta | {"corpus": name})

    def fingerprint(self) -> str:
        return fingerprint([[name, corpus.fingerprint()] for name, corpus in self.corpora.items()])

    def provenance(self) -> Plain:
        return {name: found for name, corpus in self.corpora.items() if (found := corpus.provenance())}

    def left_out(self) -> list[str]:
        return [file for corpus in self.corpora.values() for file in corpus.left_out()]


@dataclass(frozen=True, config=STRICT)
class RandomDocuments(Corpus):
    """`documents` documents of a corpus, drawn at random by `seed`: those with the smallest hashes of their text and
    place. The whole corpus is read once to find them, in memory that grows with `documents` alone."""

    corpus: SingleCorpus
    """The corpus that documents are drawn from."""
    documents: Annotated[int, Field(gt=0)]
    seed: int = 0
    name: Literal["random"] = "random"

    def plan(self) -> list[Shard]:
        shards = self.corpus.plan()
        largest: list[int] = []  # of the smallest so far, with their signs changed
        for shard in shards:
            for item in self.corpus.read(shard):
                if isinstance(item, Document):
                    if len(largest) < self.documents:
                        heapq.heappush(largest, -self._hash(item))
                    else:
                        heapq.heappushpop(largest, -self._hash(item))
        if not largest:
            raise ConfigError("the corpus to draw from has no document")
        return [{"shard": shard, "most": -largest[0]} for shard in shards]

    def read(self, shard: Shard) -> Iterator[Item]:
        for item in self.corpus.read(shard["shard"]):
            if isinstance(item, Rejected) or self._hash(item) <= shard["most"]:
                yield item

    def _hash(self, item: Document) -> int:
        return text_hash(f"{self.seed} {item.id} {item.text}", b"phf sample")

    def fingerprint(self) -> str:
        return fingerprint([self.corpus.fingerprint(), self.documents, self.seed])

    def provenance(self) -> Plain:
        return self.corpus.provenance()

    def left_out(self) -> list[str]:
        return self.corpus.left_out()
