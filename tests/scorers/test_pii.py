"""Personal data: the paper's set, fast and with equal findings, and Presidio."""

from __future__ import annotations

import datetime
import json
import random
import re
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phf.core.config import ConfigError
from phf.core.types import Span
from phf.scorers import PII, Presidio
from phf.scorers.pii import Recall, merge_spans, recall_by_kind

scrubadub = pytest.importorskip("scrubadub", reason="extra 'pii' is not installed")
pyap = pytest.importorskip("pyap", reason="extra 'pii' is not installed")

from phf.scorers import _scrubadub  # noqa: E402

TODAY = datetime.date.today()


def plain_scrubber():
    """scrubadub with the paper's detectors as they come, but for addresses (its own needs a C library)."""
    scrubber = scrubadub.Scrubber(locale="en_US")
    scrubber.add_detector(scrubadub.detectors.date_of_birth.DateOfBirthDetector(locale="en_US"))
    scrubber.add_detector(scrubadub.detectors.skype.SkypeDetector(locale="en_US"))

    class Ungated(_scrubadub.Addresses):
        def iter_filth(self, text, document_name=None):
            for address in pyap.parse(text, country="US"):
                for match in re.finditer(r"\b" + re.escape(address.full_address) + r"\b", text):
                    yield _scrubadub._filth(
                        scrubadub.filth.AddressFilth, self, match.start(), match.end(), text, document_name
                    )

    scrubber.add_detector(Ungated(locale="en_US"))
    return scrubber


def people(count: int) -> list[str]:
    """Sentences with personal data of made-up people."""
    rng = random.Random(0)
    words = ["river", "stone", "agreed", "that", "the", "train", "was", "late", "again"]
    filler = lambda: " ".join(rng.choices(words, k=rng.randint(2, 7)))  # noqa: E731
    makers = [
        lambda: f"I was born on {rng.randint(1, 28)} March {rng.randint(1930, 1999)}",
        lambda: f"date of birth: {rng.randint(1940, 1999)}-0{rng.randint(1, 9)}-1{rng.randint(0, 9)}",
        lambda: f"it happened on {rng.randint(1, 28)} March {rng.randint(1930, 1999)}",
        lambda: f"mail user{rng.randint(1, 999)}@example.org",
        lambda: f"call +1 650 253 0{rng.randint(100, 999)}",
        lambda: f"{rng.randint(10, 9999)} Main Street, Springfield, IL 6270{rng.randint(0, 9)}",
        lambda: f"add me on skype: xq{rng.randint(100, 999)}zork",
        lambda: f"see https://example.org/{rng.randint(1, 99)}",
        lambda: f"ssn 123-45-67{rng.randint(10, 99)}",
        filler,
    ]
    return [f"{filler()} {rng.choice(makers)()}. {filler()} {rng.choice(makers)()}\n" for _ in range(count)]


@pytest.mark.slow
def test_the_papers_set_finds_what_scrubadub_finds():
    """Gates and the pinned day change nothing, when the pinned day is today."""
    ours = PII(detectors="paper", reference_date=TODAY)
    theirs = plain_scrubber()
    kinds = set()
    for text in people(150):
        found = [(s.start, s.end) for s in ours.spans(text)]
        assert found == [(f.beg, f.end) for f in theirs.iter_filth(text)], text
        kinds |= {label for s in ours.spans(text) for label in s.label.split("+")}
    assert {"date_of_birth", "email", "phone", "address", "skype", "url", "social_security_number"} <= kinds


def test_dates_of_birth_do_not_depend_on_the_day_of_scoring():
    """Defect 16."""
    text = "She was born on 3 March 2006."
    assert [s.label for s in PII(detectors="paper", reference_date=datetime.date(2026, 1, 1)).spans(text)] == [
        "date_of_birth"
    ]
    assert PII(detectors="paper", reference_date=datetime.date(2020, 1, 1)).spans(text) == []
    assert PII(detectors="paper").spans("He was born ten years ago.") == []  # from the reference date, not from today
    assert PII(detectors="paper").identity()["reference_date"] == "2023-01-01"
    assert "reference_date" not in PII().identity()


PIECES = [
    *("12 ", "One ", "And ", "Main", " Street", ", ", "Springfield", " IL", " Ohio", " New York", " 62701"),
    *("\n", "  ", "PO Box 7", "Suite 5", " Ave", " west virginia", " xx"),
]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@settings(max_examples=400, deadline=None)
def test_the_address_gate_is_sound(text):
    if pyap.parse(text, country="US"):
        assert _scrubadub.may_hold_address(text)


def test_every_state_of_pyap_opens_the_gate():
    for state in [
        "OH",
        "Ohio",
        "new hampshire",
        "District of Columbia",
        "West Virginia",
        "Puerto Rico",
        "American Samoa",
    ]:
        text = f"225 Carpenter Street, Irving, {state} 75062"
        assert pyap.parse(text, country="US")
        assert _scrubadub.may_hold_address(text)
        assert "address" in PII(detectors="paper").spans(text)[0].label


def test_an_address_over_two_lines_is_found_where_it_stands():
    text = "Write to:\n225 E. John Carpenter Freeway,\nSuite 1500, Irving, Texas 75062\nThanks"
    (span,) = [s for s in PII(detectors="paper").spans(text) if "address" in s.label]
    assert text[span.start : span.end].startswith("225 E.")
    assert text[span.start : span.end].endswith("75062")


@pytest.fixture(scope="module")
def spacy_model(tmp_path_factory):
    """A pipeline with an entity ruler, in a folder as a trained model would be."""
    import spacy

    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("entity_ruler")
    patterns = [("PERSON", "Ada Lovelace"), ("ORG", "Acme"), ("GPE", "Paris"), ("PERSON", "Skype")]
    ruler.add_patterns([{"label": k, "pattern": p} for k, p in patterns])
    folder = tmp_path_factory.mktemp("spacy") / "model"
    nlp.to_disk(folder)
    return str(folder)


def test_people_and_organisations_by_a_spacy_model(spacy_model, tmp_path):
    text = "Ada Lovelace of Acme went to Paris and used Skype"
    scorer = PII(spacy_model=spacy_model)
    assert [text[s.start : s.end] for s in scorer.spans(text)] == ["Ada Lovelace", "Acme"]
    assert scorer.identity()["spacy_model"]["hash"]
    with pytest.raises(ConfigError, match="neither an installed spaCy model nor the folder of one"):
        PII(spacy_model=str(tmp_path / "none")).spans("a")
    import spacy

    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(ConfigError, match="finds no entities"):
        PII(spacy_model=str(tmp_path / "blank")).spans("a")


def test_presidio_finds_entities_and_merges_overlaps(monkeypatch):
    pytest.importorskip("presidio_analyzer", reason="extra 'pii' is not installed")

    def no_network(*args, **kwargs):
        raise AssertionError("Presidio must not look for the network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    text = "mail joe@example.org, card 4111111111111111, from 192.168.1.1"
    spans = Presidio().spans(text)
    assert [text[s.start : s.end] for s in spans] == ["joe@example.org", "4111111111111111", "192.168.1.1"]
    assert Presidio().score_text(text) == 3 / len(text)
    assert "email_address" in spans[0].label.split("+")
    assert [s.label for s in Presidio(entities=("EMAIL_ADDRESS",)).spans(text)] == ["email_address"]
    assert "US_DRIVER_LICENSE" not in Presidio().identity()["entities"]
    with pytest.raises(ConfigError, match="does not know EMAIL"):
        Presidio(entities=("EMAIL",)).spans("a")


def test_presidio_with_a_spacy_model(spacy_model):
    pytest.importorskip("presidio_analyzer", reason="extra 'pii' is not installed")
    spans = Presidio(spacy_model=spacy_model).spans("Ada Lovelace went home")
    assert [s.label for s in spans] == ["person"]


def test_overlapping_spans_become_one_labelled_by_all_kinds():
    spans = [Span(0, 5, "url"), Span(3, 12, "email"), Span(12, 14, "a"), Span(20, 22, "b"), Span(20, 22, "a")]
    assert merge_spans(spans) == [Span(0, 12, "email+url"), Span(12, 14, "a"), Span(20, 22, "a+b")]


def test_recall_by_kind_by_hand():
    rows = [("mail a@b.org", [Span(5, 12, "MAIL")]), ("Ada and b@c.org", [Span(0, 3, "NAME"), Span(8, 15, "MAIL")])]
    assert recall_by_kind(PII(), rows) == {"MAIL": Recall(2, 1.0), "NAME": Recall(1, 0.0)}


def test_settings_survive_a_manifest():
    from pydantic import TypeAdapter

    from phf.core.config import to_plain
    from phf.scorers import AnyScorer

    scorer = PII(detectors="paper", reference_date=datetime.date(2024, 2, 29))
    assert TypeAdapter(AnyScorer).validate_python(json.loads(json.dumps(to_plain(scorer)))) == scorer
