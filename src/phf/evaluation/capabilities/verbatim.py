"""What a model repeats word for word of the text that it was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core.config import STRICT, ConfigError
from phf.core.statistics import share_estimate
from phf.core.types import Estimate, ScoredDocument
from phf.data.scored import ScoredCorpus
from phf.evaluation.capabilities.base import Capability, continuations
from phf.evaluation.heldout import corpus_of, document_ids
from phf.evaluation.results import CapabilityResult
from phf.generation.loaded import LoadedModel
from phf.tokens.store import TokenStore

LEAST = 4
"""Tokens of the shortest end of a segment that is asked for."""
PARTS = ("trained", "held out")
KINDS = ("bad", "good")
Spot = tuple[list[int], list[int]]
"""Token ids of a text, and those that follow it."""


@dataclass(frozen=True, config=STRICT)
class Verbatim(Capability):
    """Does greedy decoding repeat the training text word for word? The model reads `before` tokens of a document and
    has to write the last `write` tokens of a segment, or the whole of a shorter one (extraction as in Carlini et al.,
    Quantifying Memorization, ICLR 2023, with shorter texts). Held-out documents say how much of that any model of such
    text gets right.

    At most one good and one bad segment of a document is asked for. A model with control tokens reads its good token
    at the start, and for bad segments also its bad one. A run of less than one epoch has read a part of the documents.

    `path`: a token store; for a run it is the run's own if it is left out.
    """

    path: str | None = None
    name: Literal["verbatim"] = "verbatim"
    before: Annotated[int, Field(gt=0)] = 32
    write: Annotated[int, Field(ge=LEAST)] = 16
    segments: Annotated[int, Field(gt=0)] = 500
    """Segments of each kind, good and bad, trained on and held out. The first of the corpus are taken."""
    batch: Annotated[int, Field(gt=0)] = 128
    """Texts that are computed together."""

    def of_text(self, tokens: str) -> Self:
        return replace(self, path=tokens) if self.path is None else self

    def inputs(self) -> list[str | None]:
        return [None if self.path is None else self._store().manifest.content]

    def _store(self) -> TokenStore:
        if self.path is None:
            raise ConfigError("verbatim: give path=TOKENS, a token store")
        return TokenStore.open(self.path)

    def check(self, model: LoadedModel) -> None:
        self._store()
        if self.before + self.write + 2 > model.positions:
            raise ConfigError(f"verbatim: before={self.before} and write={self.write} exceed the model's context")

    def measure(self, model: LoadedModel) -> CapabilityResult:
        tokens = self._store()
        found = self._spots(model, corpus_of(tokens), tokens)
        estimates: dict[str, Estimate] = {}
        for kind in KINDS:
            for part in PARTS:
                spots = found[part, kind]
                name = kind if part == "trained" else f"{kind}, held out"
                if spots:
                    estimates[name] = self._repeated(model, spots, "good")
        if not estimates:
            raise ConfigError(f"verbatim: no segment of {self.path} has {self.before} tokens before its end")
        if model.worst and found["trained", "bad"]:
            estimates["bad, bad token"] = self._repeated(model, found["trained", "bad"], "bad")
        return self.result(estimates)

    def _repeated(self, model: LoadedModel, spots: Sequence[Spot], control: str) -> Estimate:
        """The share of spots where greedy decoding writes the text, with Wilson's interval."""
        start = model.ids_of(control)  # no start token: the text is from the middle of a document
        return share_estimate(continuations(model, [(start + b, w) for b, w in spots], self.batch)[1])

    def _spots(self, model: LoadedModel, corpus: ScoredCorpus, tokens: TokenStore) -> dict[tuple[str, str], list[Spot]]:
        """What to ask for, by whether the document was trained on and by the kind of the segment."""
        spots: dict[tuple[str, str], list[Spot]] = {(part, kind): [] for part in PARTS for kind in KINDS}
        limit = np.float32(tokens.bad_above)
        for number, document in enumerate(_documents(corpus)):
            part = PARTS[bool(tokens.heldout_D[number])]
            wanted = {kind for kind in KINDS if len(spots[part, kind]) < self.segments}
            if wanted:
                found = self._of_document(model, document, limit)
                for kind in wanted & found.keys():
                    spots[part, kind].append(found[kind])
            elif all(len(asked) >= self.segments for asked in spots.values()):
                break
        return spots

    def _of_document(self, model: LoadedModel, document: ScoredDocument, limit: np.float32) -> dict[str, Spot]:
        """The first segment of each kind with enough text before it, if there is one."""
        found: dict[str, Spot] = {}
        ids: list[int] = []
        for part, score in zip(document_ids(model, document), np.asarray(document.scores, np.float32), strict=True):
            ids += part
            write = min(self.write, len(part))
            if not np.isnan(score) and write >= LEAST and len(ids) - write >= self.before:
                found.setdefault(KINDS[int(score <= limit)], (ids[-write - self.before : -write], ids[-write:]))
        return found


def _documents(corpus: ScoredCorpus) -> Iterator[ScoredDocument]:
    for file in corpus.files:
        yield from (item for item in corpus.read(file) if isinstance(item, ScoredDocument))
