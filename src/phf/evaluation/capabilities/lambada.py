"""LAMBADA: the last word of a passage."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core import store
from phf.core.config import STRICT
from phf.core.statistics import mean_estimate, share_estimate
from phf.evaluation.capabilities.base import Capability, continuations, local_file, rows_of, split_after
from phf.evaluation.results import CapabilityResult
from phf.generation.loaded import LoadedModel


@dataclass(frozen=True, config=STRICT)
class Lambada(Capability):
    """Predicting the last word of a passage (Paperno et al. 2016): accuracy (every token of the word is the
    likeliest) and perplexity of the word.

    `path`: OpenAI's version as JSON lines or Parquet with `text`, local or on the Hub
    (hf://datasets/EleutherAI/lambada_openai/data/lambada_test_en.jsonl).
    """

    path: str
    name: Literal["lambada"] = "lambada"
    max_passages: Annotated[int, Field(gt=0)] | None = None
    """Largest number of passages to read; None: all."""
    batch: Annotated[int, Field(gt=0)] = 32
    """Texts that are computed together."""

    def inputs(self) -> list[str | None]:
        return [store.path_hash(local_file(self.path))]

    def check_inputs(self) -> None:
        rows_of(self.path, ["text"])

    def check(self, model: LoadedModel) -> None:
        self.check_inputs()

    def measure(self, model: LoadedModel) -> CapabilityResult:
        texts = [row["text"].rstrip() for row in rows_of(self.path, ["text"])][: self.max_passages]
        pairs = [split_after(model, text.rpartition(" ")[0], text) for text in texts]
        logp, right = continuations(model, pairs, self.batch)
        loss = mean_estimate(-logp)
        return self.result(
            {"accuracy": share_estimate(right)},
            perplexity=math.exp(min(loss.mean, 700)),
            perplexity_ci95=[math.exp(min(x, 700)) for x in loss.ci95],
            passages=len(texts),
        )
