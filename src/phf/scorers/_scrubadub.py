"""scrubadub's detectors as the paper used them, but fast and independent of today's date. Extra `pii`.

`scrubber("default")` is scrubadub's own set. `scrubber("paper")` adds what the paper's code added: Skype names, dates
of birth, US addresses found by pyap and, with a spaCy model, people and organizations. The gates before slow
detectors never change what is found: each one tests a condition that the detector itself requires.
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Iterator
from typing import Any

import scrubadub
from scrubadub.detectors.base import Detector
from scrubadub.detectors.date_of_birth import DateOfBirthDetector
from scrubadub.detectors.skype import SkypeDetector
from scrubadub.filth import AddressFilth, DateOfBirthFilth, NameFilth, OrganizationFilth


@functools.cache
def scrubber(detectors: str, reference_date: datetime.date, spacy_model: str | None) -> Any:
    # The locale decides which phone numbers count. Without it scrubadub takes the machine's.
    made = scrubadub.Scrubber(locale="en_US")
    if detectors == "paper":
        made.add_detector(GatedSkype(locale="en_US"))
        made.add_detector(DatedBirths(reference_date, locale="en_US"))
        made.add_detector(Addresses(locale="en_US"))
    if spacy_model is not None:
        made.add_detector(SpacyEntities(spacy_model, locale="en_US"))
    return made


class GatedSkype(SkypeDetector):  # type: ignore[misc]
    """scrubadub's detector, which only looks around tokens that contain "skype"."""

    def iter_filth(self, text: str, document_name: str | None = None) -> Iterator[Any]:
        if "skype" in text.lower():
            yield from super().iter_filth(text, document_name)


class DatedBirths(DateOfBirthDetector):  # type: ignore[misc]
    """scrubadub's dates of birth with ages counted on a fixed day. scrubadub counts them today, so its scores change
    over the years. A date counts if the person is 18 to 100 years old and a word like "born" occurs at most two lines
    before or one line after the date. The slow dateparser only reads texts with such a word."""

    def __init__(self, reference_date: datetime.date, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reference = datetime.datetime.combine(reference_date, datetime.time())

    def iter_filth(self, text: str, document_name: str | None = None) -> Iterator[Any]:
        lowered = text.lower()
        if not any(word in lowered for word in self.context_words):
            return
        from dateparser.search import search_dates

        lines = text.split("\n")
        contexts = [
            " ".join(lines[max(n - self.context_before, 0) : n + self.context_after + 1]).lower()
            for n in range(len(lines))
        ]
        near = [any(word in context for word in self.context_words) for context in contexts]
        settings = {"RELATIVE_BASE": self.reference}
        for found, date in search_dates(text, languages=[self.language], settings=settings) or ():
            years = self.reference.year - date.year
            if found.startswith("+") or not DateOfBirthFilth.min_age_years <= years <= DateOfBirthFilth.max_age_years:
                continue
            if not any(is_near and found in line for is_near, line in zip(near, lines, strict=True)):
                continue
            for match in re.finditer(re.escape(found), text):
                yield _filth(DateOfBirthFilth, self, match.start(), match.end(), text, document_name)


class Addresses(Detector):  # type: ignore[misc]
    """US addresses found by pyap, as in the paper's code, which does not confirm them with libpostal."""

    name = "address"
    filth_cls = AddressFilth
    autoload = False

    def iter_filth(self, text: str, document_name: str | None = None) -> Iterator[Any]:
        if not may_hold_address(text):
            return
        import pyap

        seen = set()
        for address in pyap.parse(text, country="US"):
            found = address.full_address
            if "coverage" in found.lower() or found in seen:
                continue
            seen.add(found)
            # pyap joins lines by ", ", merges spaces and turns dashes into "-": match the same words in any layout
            words = [re.escape(w).replace(r"\-", "[-‐‑‒–—―]") for w in re.split(r"[\s,]+", found) if w]
            for match in re.finditer(r"\b" + r"[\s,]+".join(words) + r"(?!\w)", text):
                yield _filth(AddressFilth, self, match.start(), match.end(), text, document_name)


_STREET_NUMBER = re.compile(
    r"\d|and |one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|teen|twenty|thirty|forty|fifty|sixty"
    r"|seventy|eighty|ninety|hundred|thousand",
    re.IGNORECASE,
)


def may_hold_address(text: str) -> bool:
    """False only where pyap finds nothing. Its pattern requires a street number followed by a state; the shortest
    states are two capital letters, and "Ohio", "Iowa", "Utah" and "Guam"."""
    number = _STREET_NUMBER.search(text)
    return number is not None and _states().search(text, number.start()) is not None


@functools.cache
def _states() -> re.Pattern[str]:
    """Matches the beginning of every state in pyap's pattern, so white space inside a name does not matter."""
    from pyap.source_US import data

    names = re.sub(r"\[(\w)\w\]", r"\1", re.sub(r"#.*", "", data.region1))
    words = re.findall(r"[A-Z][A-Z\\ ]+", names.upper().replace("(?P<REGION1>", ""))
    first = {w.replace("\\", " ").split()[0] for w in words if w.strip("\\ ")}
    short = sorted(w for w in first if len(w) == 2)
    long = sorted(w.capitalize() for w in first if len(w) > 2)
    return re.compile("|".join(short) + "|(?i:" + "|".join(long) + ")")


class SpacyEntities(Detector):  # type: ignore[misc]
    """People and organizations found by a spaCy model (its name or folder)."""

    name = "spacy"
    autoload = False
    kinds = {"PERSON": NameFilth, "PER": NameFilth, "ORG": OrganizationFilth}  # noqa: RUF012

    def __init__(self, model: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.nlp = load_spacy(model)

    def iter_filth(self, text: str, document_name: str | None = None) -> Iterator[Any]:
        for entity in self.nlp(text).ents:
            kind = self.kinds.get(entity.label_)
            if kind is not None and entity.text.lower() != "skype":
                yield _filth(kind, self, entity.start_char, entity.end_char, text, document_name)


@functools.cache
def load_spacy(model: str) -> Any:
    """A spaCy pipeline by name or folder, reduced to the parts that find entities."""
    import spacy

    from phf.core.config import ConfigError

    try:
        nlp = spacy.load(model, exclude=["parser", "lemmatizer", "attribute_ruler", "tagger"])
    except OSError as error:
        raise ConfigError(
            f"spacy_model {model!r} is neither an installed spaCy model nor the folder of one ({error}); "
            "install one, for example: python -m spacy download en_core_web_sm"
        ) from None
    if not {"ner", "entity_ruler", "span_ruler"} & set(nlp.pipe_names):
        raise ConfigError(f"spacy_model {model!r} finds no entities: its parts are {', '.join(nlp.pipe_names)}")
    return nlp


def _filth(kind: Any, detector: Any, start: int, end: int, text: str, document_name: str | None) -> Any:
    return kind(
        beg=start,
        end=end,
        text=text[start:end],
        detector_name=detector.name,
        document_name=document_name,
        locale=detector.locale,
    )
