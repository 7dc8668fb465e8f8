"""Personally identifiable information (PII): entities per character, found by scrubadub or Presidio. Extra `pii`.

The paper's scorer counts scrubadub's entities (Korbak et al. 2023, section 4). Links and Twitter handles are among
scrubadub's default entities; in README texts they are nearly all of the hits. Every segment is judged by itself, so an
entity that spans two segments is missed (a user name on one line, the password on the next).

Finding people's names needs a language model: without `spacy_model` neither scorer finds them. docs/scoring.md has the
recall per kind of entity.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core.config import STRICT, ConfigError
from phf.core.extras import MissingPackage, needs
from phf.core.text import blank_runs
from phf.core.types import Identity, Span
from phf.scorers.base import Scorer


@dataclass(frozen=True, config=STRICT)
class PII(Scorer):
    """scrubadub's detectors for US English. Overlapping entities are merged, as scrubadub does.

    `detectors`: "default" is scrubadub's own set. "paper" adds Skype names, US addresses and dates of birth, where ages
    are counted on `reference_date`. `spacy_model` adds people and organizations (the paper: en_core_web_sm). `divide`:
    "twice" divides the number of entities by the square of the length, as the paper's script does; its thresholds and
    betas were made for such scores.
    """

    name: Literal["pii"] = "pii"
    detectors: Literal["default", "paper"] = "default"
    reference_date: datetime.date = datetime.date(2023, 1, 1)
    spacy_model: str | None = None
    divide: Annotated[Literal["once", "twice"], Field(exclude_if=lambda value: value == "once")] = "once"

    @property
    def names(self) -> dict[str, str]:
        return {} if self.spacy_model is None else {"spacy_model": self.spacy_model}

    @property
    def finds_personal_data(self) -> bool:
        return True

    def identity(self) -> Identity:
        packages = ["scrubadub", "phonenumbers"] + ["dateparser", "textblob", "pyap"] * (self.detectors == "paper")
        scrubber = self._scrubber()
        identity = {
            "name": self.name,
            "unit": "entities per character" if self.divide == "once" else "entities per square of characters",
            "locale": "en_US",
            "detectors": sorted(scrubber._detectors),
            "versions": {p: metadata.version(p) for p in packages},
        }
        if self.detectors == "paper":
            identity["reference_date"] = self.reference_date.isoformat()
        if self.spacy_model is not None:
            identity["spacy_model"] = _spacy_identity(self.spacy_model)
        return identity

    def _scrubber(self) -> Any:
        try:
            from phf.scorers._scrubadub import scrubber
        except ImportError as error:
            raise MissingPackage(f"the scorer 'pii' {needs(error.name)}") from None
        return scrubber(self.detectors, self.reference_date, self.spacy_model)

    def spans(self, text: str) -> list[Span]:
        return [Span(f.beg, f.end, _label(f)) for f in self._scrubber().iter_filth(text)]

    def score_text(self, text: str) -> float:
        score = super().score_text(text)
        return score if self.divide == "once" else score / len(text) if text else score

    def judge_segments(self, segments: Sequence[str]) -> tuple[list[float], Counter[str]]:
        scores, kinds = super().judge_segments(segments)
        if self.divide == "twice":
            scores = [score / len(s) if s else score for score, s in zip(scores, segments, strict=True)]
        return scores, kinds

    @property
    def judges_by_document(self) -> bool:
        return False


def _label(filth: Any) -> str:
    """The kind of an entity; the kinds of merged entities joined by "+"."""
    merged = getattr(filth, "filths", None)
    return "+".join(sorted({f.type for f in merged})) if merged else str(filth.type)


@functools.cache
def _spacy_identity(model: str) -> dict[str, str]:
    from phf.scorers._scrubadub import load_spacy

    nlp = load_spacy(model)
    digest = hashlib.blake2b(digest_size=16)
    for name, pipe in nlp.pipeline:
        # without the vocabulary: it grows with every text that is read
        digest.update(name.encode() + (pipe.to_bytes(exclude=["vocab"]) if hasattr(pipe, "to_bytes") else b""))
    return {
        "name": f"{nlp.meta['lang']}_{nlp.meta['name']}",
        "version": nlp.meta["version"],
        "hash": digest.hexdigest(),
    }


@dataclass(frozen=True, config=STRICT)
class Presidio(Scorer):
    """Microsoft Presidio's recognizers for English: entities per character. Overlapping entities count once.

    Without `spacy_model` only the pattern recognizers run, which need no network and no model. With one, people, places
    and organizations are found too. Entities with a confidence below `threshold` are left out. US driving licenses are
    always left out: their pattern matches nearly any number.
    """

    name: Literal["presidio"] = "presidio"
    entities: tuple[str, ...] | None = None
    """Kinds of personal data to look for, in Presidio's names."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.4
    spacy_model: str | None = None

    @property
    def names(self) -> dict[str, str]:
        return {} if self.spacy_model is None else {"spacy_model": self.spacy_model}

    @property
    def finds_personal_data(self) -> bool:
        return True

    def identity(self) -> Identity:
        identity = {
            "name": self.name,
            "unit": "entities per character",
            "entities": _entities(self.entities, self.spacy_model),
            "threshold": self.threshold,
            "versions": {p: metadata.version(p) for p in ("presidio-analyzer", "phonenumbers", "tldextract")},
        }
        if self.spacy_model is not None:
            identity["spacy_model"] = _spacy_identity(self.spacy_model)
        return identity

    def spans(self, text: str) -> list[Span]:
        entities = _entities(self.entities, self.spacy_model)
        analyzer = _analyzer(self.spacy_model)
        nlp = getattr(analyzer.nlp_engine, "nlp", None)
        loaded = (nlp or {}).get("en")
        vocabulary = contextlib.nullcontext() if loaded is None else loaded.memory_zone()
        with vocabulary:  # else every new word stays in memory for ever
            found = analyzer.analyze(blank_runs(text), language="en", entities=entities, score_threshold=self.threshold)
        return merge_spans(Span(f.start, f.end, f.entity_type.lower()) for f in found)


@functools.cache
def _entities(asked: tuple[str, ...] | None, spacy_model: str | None) -> list[str]:
    """The entities to look for, sorted. Raises ConfigError for an entity that Presidio does not know."""
    known = set(_analyzer(spacy_model).get_supported_entities(language="en"))
    if asked is None:
        return sorted(known - {"US_DRIVER_LICENSE"})
    unknown = sorted(set(asked) - known)
    if unknown:
        raise ConfigError(f"entities: Presidio does not know {', '.join(unknown)}; it knows {', '.join(sorted(known))}")
    return sorted(asked)


def merge_spans(spans: Iterable[Span]) -> list[Span]:
    """Overlapping spans merged into one, their labels joined by "+"."""
    merged: list[list[Span]] = []
    for span in sorted(spans, key=lambda s: (s.start, -s.end, s.label)):
        if merged and span.start < max(s.end for s in merged[-1]):
            merged[-1].append(span)
        else:
            merged.append([span])
    return [
        Span(
            group[0].start,
            max(s.end for s in group),
            "+".join(sorted({s.label for s in group})),
        )
        for group in merged
    ]


@functools.cache
def _analyzer(spacy_model: str | None) -> Any:
    try:
        import presidio_analyzer as presidio
        import tldextract
        from presidio_analyzer.nlp_engine import NerModelConfiguration, SpacyNlpEngine
    except ImportError as error:
        raise MissingPackage(f"the scorer 'presidio' {needs(error.name)}") from None
    import logging

    logging.getLogger("presidio-analyzer").setLevel(logging.ERROR)
    # By default tldextract downloads a list of domains at the first mail address. Use the list that it ships with.
    tldextract.tldextract.TLD_EXTRACTOR = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
    if spacy_model is None:
        from presidio_analyzer.nlp_engine.no_op_nlp_engine import NoOpNlpEngine

        engine: Any = NoOpNlpEngine(models=[{"lang_code": "en", "model_name": "none"}])
        engine.load()
    else:
        from phf.scorers._scrubadub import load_spacy

        engine = SpacyNlpEngine(
            models=[{"lang_code": "en", "model_name": spacy_model}], ner_model_configuration=NerModelConfiguration()
        )
        engine.nlp = {"en": load_spacy(spacy_model)}
    registry = presidio.RecognizerRegistry(supported_languages=["en"])
    registry.load_predefined_recognizers(languages=["en"], nlp_engine=engine)
    return presidio.AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=["en"])


@dataclass(frozen=True)
class Recall:
    """How many labelled entities a scorer finds."""

    n: int
    recall: float
    """Share of the entities of which at least one character was found."""


def recall_by_kind(scorer: Scorer, rows: Iterable[tuple[str, Iterable[Span]]]) -> dict[str, Recall]:
    """How many labelled entities a scorer finds, by kind. `rows`: (text, labelled spans)."""
    count: Counter[str] = Counter()
    hit: Counter[str] = Counter()
    for text, labelled in rows:
        found = scorer.spans(text)
        for span in labelled:
            count[span.label] += 1
            hit[span.label] += any(f.start < span.end and span.start < f.end for f in found)
    return {kind: Recall(count[kind], hit[kind] / count[kind]) for kind in sorted(count)}
