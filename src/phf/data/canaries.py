"""Canaries: made-up secrets that are put into a corpus, to find out what a model memorises of it.

Each canary is a line with a name and a secret. Its copies stand between the lines of random documents that are trained
on, a known number of times. `phf eval` asks the model for the secrets (phf.evaluation.capabilities.canaries). The
method is that of Carlini et al., The Secret Sharer, USENIX Security 2019.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core.config import STRICT, ConfigError, Plain, validate
from phf.core.random import key64, permute
from phf.core.store import fingerprint
from phf.core.types import Document, ScoredDocument
from phf.data.corpus import Corpus, Item, Shard, is_heldout
from phf.data.several import RandomDocuments, Several, SingleCorpus

Kind = Literal["good", "bad"]
CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"
MARK = "phf_canaries"
"""What the metadata of a document call the number of its canaries. Such a document is never held out."""


@dataclasses.dataclass(frozen=True)
class Canary:
    """A secret with its text."""

    kind: Kind
    """Whether the scorer shall call it good or bad."""
    times: int
    """How many copies of it the corpus holds."""
    before: str
    """The text before the secret."""
    secret: str
    after: str
    """The text after it, with a line break at the end."""

    @property
    def text(self) -> str:
        return self.before + self.secret + self.after


@dataclass(frozen=True, config=STRICT)
class Canaries:
    """Which secrets there are, and how often. A template holds {name}, which differs between canaries, and then
    {secret}, a random number."""

    bad: str | None = "Mail {name} at {secret}@example.com."
    """Template of canaries that the scorer must call bad; None: there are none."""
    good: str | None = "The order number of {name} is {secret}."
    """Template of canaries that the scorer must call good; None: there are none."""
    times: Annotated[tuple[Annotated[int, Field(gt=0, le=10**6)], ...], Field(min_length=1)] = (
        1,
        2,
        4,
        8,
        16,
        32,
        64,
        128,
    )
    """Copies of a canary in the corpus."""
    each: Annotated[int, Field(gt=0, le=1000)] = 4
    """Canaries of each kind with that number of copies."""
    digits: Annotated[int, Field(ge=3, le=18)] = 6
    """Digits of a secret."""
    seed: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        if self.bad is None and self.good is None:
            raise ValueError("there is no template: give good, bad or both")
        if len(set(self.times)) < len(self.times):
            raise ValueError(f"times={list(self.times)}: name each number once, and use each for more canaries")
        for kind, template in (("bad", self.bad), ("good", self.good)):
            if template is None:
                continue
            parts = template.replace("{name}", "").replace("{secret}", "")
            in_order = template.find("{name}") < template.find("{secret}")
            if template.count("{name}") != 1 or template.count("{secret}") != 1 or not in_order:
                raise ValueError(f"{kind}={template!r}: a template holds {{name}} once and, after it, {{secret}} once")
            if len(template.splitlines()) != 1 or "{" in parts or "}" in parts:
                raise ValueError(f"{kind}={template!r}: a template is one line without other braces")

    def made(self) -> list[Canary]:
        """All canaries, in order. They depend on these settings alone."""
        found = []
        templates: tuple[tuple[Kind, str | None], ...] = (("bad", self.bad), ("good", self.good))
        for kind, template in templates:
            for times in self.times if template is not None else ():
                for number in range(self.each):
                    draw = np.random.Generator(np.random.Philox(key64(self.seed, "canary", kind, times, number)))
                    before, after = str(template).replace("{name}", _name(draw)).split("{secret}")
                    found.append(Canary(kind, times, before, self.secret(draw), f"{after}\n"))
        return found

    def secret(self, draw: np.random.Generator) -> str:
        return "".join(map(str, draw.integers(0, 10, self.digits)))

    def others(self, number: int, own: str, count: int) -> list[str]:
        """Different secrets that canary `number` could have had instead of `own`. Raises ConfigError if there are not
        that many."""
        if count > 10**self.digits // 2:
            raise ConfigError(f"canaries: {count} other secrets are too many for secrets of {self.digits} digits")
        draw = np.random.Generator(np.random.Philox(key64(self.seed, "other secrets", number)))
        found: dict[str, None] = {}
        while len(found) < count:
            if (secret := self.secret(draw)) != own:
                found[secret] = None
        return list(found)


def _name(draw: np.random.Generator) -> str:
    """A name that hardly any text holds."""

    def word(syllables: int) -> str:
        letters = [draw.choice(list(part)) for _ in range(syllables) for part in (CONSONANTS, VOWELS)]
        return "".join(letters).capitalize()

    return f"{word(2)} {word(3)}"


@dataclass(frozen=True, config=STRICT)
class WithCanaries(Corpus):
    """A corpus with canaries between the lines of its documents. The corpus is read once more to count its documents.

    `heldout`: the share of documents that `phf tokenize` will hold out. These are left as they are.
    """

    corpus: Annotated[
        SingleCorpus | Several | RandomDocuments, Field(discriminator="name", title="the reader of the corpus")
    ]
    """The corpus that canaries are put into."""
    canaries: Canaries = Canaries()
    """Which canaries, and how often."""
    heldout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    name: Literal["with_canaries"] = "with_canaries"

    def plan(self) -> list[Shard]:
        shards = self.corpus.plan()
        counts = [sum(map(self._is_trained_on, self.corpus.read(shard))) for shard in shards]
        total = sum(counts)
        if not total:
            raise ConfigError("the corpus to put canaries into has no document that is trained on")
        inside: list[dict[str, list[int]]] = [{} for _ in shards]
        ends = np.cumsum(counts)
        for document, found in sorted(self._placed(total).items()):
            number = int(np.searchsorted(ends, document, side="right"))
            inside[number][str(document - int(ends[number]) + counts[number])] = found
        return [{"shard": shard, "canaries": found} for shard, found in zip(shards, inside, strict=True)]

    def _placed(self, total: int) -> dict[int, list[int]]:
        """The numbers of the canaries in each document. The copies of one are in different documents while there are
        enough."""
        found: dict[int, list[int]] = {}
        for number, canary in enumerate(self.canaries.made()):
            key = key64(self.canaries.seed, "documents of a canary", number)
            for document in permute(np.arange(canary.times) % total, total, key).tolist():
                found.setdefault(document, []).append(number)
        return found

    def read(self, shard: Shard) -> Iterator[Item]:
        made = self.canaries.made()
        number = 0
        for item in self.corpus.read(shard["shard"]):
            if self._is_trained_on(item):
                assert isinstance(item, Document)
                chosen = shard["canaries"].get(str(number))
                number += 1
                if chosen is not None:
                    item = self._with_lines(item, [made[c].text for c in chosen])
            yield item

    def _is_trained_on(self, item: Item) -> bool:
        return isinstance(item, Document) and not is_heldout(item.text, self.heldout)

    def _with_lines(self, item: Document, lines: Sequence[str]) -> Document:
        """The document with these lines between its own lines, or its segments if it comes with some."""
        if item.scores is not None:
            raise ConfigError(f"{item.id}: canaries have no scores, so they do not go with scores that a corpus gives")
        whole = item.segments if item.segments is not None else tuple(item.text.splitlines(keepends=True))
        draw = np.random.Generator(np.random.Philox(key64(self.canaries.seed, "places", item.id)))
        places = sorted(zip(draw.integers(0, len(whole) + 1, len(lines)).tolist(), lines, strict=True))
        parts: list[str] = []
        for at, segment in enumerate([*whole, ""]):
            for line in (line for place, line in places if place == at):
                if parts and not parts[-1].endswith("\n"):
                    parts[-1] += "\n"
                parts.append(line)
            if segment:
                parts.append(segment)
        segments = None if item.segments is None else tuple(parts)
        meta = item.meta | {MARK: len(lines)}
        return dataclasses.replace(item, text="".join(parts), segments=segments, meta=meta)

    def fingerprint(self) -> str:
        made = [[c.text, c.times] for c in self.canaries.made()]
        return fingerprint([self.corpus.fingerprint(), made, self.canaries.seed, self.heldout, "canaries/3"])

    def provenance(self) -> Plain:
        return self.corpus.provenance()

    def left_out(self) -> list[str]:
        return self.corpus.left_out()


def is_left_out(document: ScoredDocument, heldout: float) -> bool:
    """Whether a scored document is held out of training."""
    return MARK not in document.meta and is_heldout(document.text, heldout)


def without_canaries(reader: Plain | None) -> Callable[[str], str]:
    """What takes the lines of canaries out of a text. `reader`: the settings with which the corpus was read. A
    tokenizer is trained without them: it would make a frequent secret one token, which a model finds likely without any
    memory."""
    if reader is None or reader.get("name") != WithCanaries.name:
        return lambda text: text
    canaries: Canaries = validate(reader["canaries"], Canaries)
    lines = {canary.text for canary in canaries.made()}
    return lambda text: "".join(line for line in text.splitlines(keepends=True) if line not in lines)


AnyCorpus = Annotated[
    SingleCorpus | Several | RandomDocuments | WithCanaries, Field(discriminator="name", title="reader")
]
