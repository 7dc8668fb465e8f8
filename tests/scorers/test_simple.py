from __future__ import annotations

import math
import sys
import sysconfig
from pathlib import Path

import pycodestyle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from phf.core.config import ConfigError
from phf.scorers import PEP8, PII, AnyScorer, Function, Lexicon, Regex

pytest.importorskip("scrubadub", reason="extra 'pii' is not installed")


def test_pii_finds_the_default_entities_and_counts_per_character():
    text = (
        "see https://example.org/b or mail joe@example.org, call +1 650 253 0000, card 4111111111111111, "
        "user: root password: hunter2"
    )
    labels = {s.label for s in PII().spans(text)}
    assert {"url", "email", "phone", "credit_card"} <= labels
    assert PII().score_text(text) == len(PII().spans(text)) / len(text)
    assert PII().score_text("nothing personal here") == 0


def test_pii_is_divided_by_the_length_once():
    """Defect 5: the paper's code divides twice."""
    assert PII().score_text("mail a@b.org") == 1 / 12


def test_pii_spans_cover_what_was_found():
    text = "write to joe@example.org now"
    (span,) = PII().spans(text)
    assert text[span.start : span.end] == "joe@example.org"


def test_pii_judges_each_segment_by_itself():
    assert PII().score_text("joe@example.org") == 1 / 15
    assert (
        PII().score_segments(["joe@", "example.com", "none\n", "a@b.org\n"])[0] == 0
    )  # an entity cut in two is not seen
    assert PII().score_segments(["none\n", "a@b.org\n"]) == [0, 1 / 8]


def test_pii_does_not_depend_on_the_machines_locale(monkeypatch):
    import locale

    from phf.scorers._scrubadub import scrubber

    monkeypatch.setattr(locale, "getlocale", lambda *a: ("de_DE", "UTF-8"))
    scrubber.cache_clear()
    assert PII().identity()["locale"] == "en_US"
    assert [s.label for s in PII().spans("call 650 253 0000 now")] == ["phone"]
    scrubber.cache_clear()


@pytest.mark.parametrize("scorer", [PII(), PEP8(), Regex("a")], ids=lambda s: s.name)
def test_an_empty_text_cannot_be_judged(scorer):
    """Defect 6: it is not perfect."""
    assert math.isnan(scorer.score_text(""))


def reference_counts(lines: list[str]) -> dict[int, int]:
    """Violations by line from a plain pycodestyle run, as its own command counts them."""

    class Report(pycodestyle.BaseReport):
        def __init__(self, options):
            super().__init__(options)
            self.rows: dict[int, int] = {}

        def error(self, line_number, offset, text, check):
            if super().error(line_number, offset, text, check):
                self.rows[line_number] = self.rows.get(line_number, 0) + 1

    style = pycodestyle.StyleGuide(parse_argv=False, config_file=False, reporter=Report)
    report = style.init_report(Report)
    pycodestyle.Checker(lines=list(lines), options=style.options, report=report).check_all()
    return report.rows


STDLIB = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


@pytest.mark.parametrize("path", STDLIB[3:40:4], ids=lambda p: p.name)
def test_pep8_equals_pycodestyle_on_the_standard_library(path):
    text = path.read_text()
    lines = [line + "\n" for line in text.split("\n")[:-1]]
    expected = reference_counts(lines)
    assert PEP8().score_text(text) == sum(expected.values()) / len(text)
    scores = PEP8().score_segments(lines)
    assert scores == [expected.get(n, 0) / len(line) for n, line in enumerate(lines, 1)]


def test_pep8_counts_are_those_of_the_command(tmp_path):
    import subprocess

    path = STDLIB[5]
    done = subprocess.run(
        [sys.executable, "-m", "pycodestyle", "--count", "-qq", "--max-line-length=79", str(path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert len(PEP8().spans(path.read_text())) == int(done.stderr.strip() or 0)


def test_pep8_ignores_the_users_configuration(tmp_path, monkeypatch):
    """Defect 16."""
    from phf.scorers import _pycodestyle

    (tmp_path / "setup.cfg").write_text("[pycodestyle]\nmax_line_length = 10\nignore = E225\n")
    (tmp_path / "tox.ini").write_text("[pycodestyle]\nmax_line_length = 10\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["phf", "--ignore=E225"])
    _pycodestyle.options.cache_clear()
    assert [s.label for s in PEP8().spans("long_name=1  # twelve\n")] == ["E225"]
    _pycodestyle.options.cache_clear()


def test_pep8_default_ignore_list_is_pycodestyles():
    assert [s.label for s in PEP8().spans("a = (1 +\n     2)\n")] == []  # W504, off by default
    assert [s.label for s in PEP8().spans("x=1\n")] == ["E225"]


def test_pep8_syntax_error_is_what_pycodestyle_makes_of_it():
    spans = PEP8().spans("def f(:\n    x = (\n")
    assert "E902" in {s.label for s in spans} or "E901" in {s.label for s in spans}
    assert PEP8().score_text("def f(:\n    x = (\n") > 0


def test_pep8_each_violation_falls_on_a_segment_however_it_is_cut():
    text = "import os,sys\nx=1 \ndef f( a ):\n  return a"
    whole = len(PEP8().spans(text))
    for cut in (1, 3, 10, len(text)):
        segments = [text[i : i + cut] for i in range(0, len(text), cut)]
        counts = [s * len(t) for s, t in zip(PEP8().score_segments(segments), segments, strict=True)]
        assert sum(counts) == pytest.approx(whole)


def test_pep8_windows_line_ends_are_no_violations():
    assert PEP8().spans("x = 1\r\ny = 2\r\n") == []


@given(st.text(alphabet="ab =()[]{}:#'\"\n\t\\0.,é\r\x0c"))
@settings(max_examples=150, deadline=None)
def test_pep8_segments_add_up_to_the_text(text):
    from phf.data.segment import Lines
    from phf.scoring.judge import judge

    segments = Lines().split(text)
    judged = judge(PEP8(), segments)
    if judged.failure is None and text:
        total = sum(s * len(t) for s, t in zip(judged.scores, segments, strict=True))
        assert total == pytest.approx(len(PEP8().spans(text)))


def test_regex_and_lexicon_by_hand(tmp_path):
    assert Regex(r"\d+").score_text("a1b22") == 2 / 5
    assert Regex("x*").score_text("ab") == 0  # empty matches are no matches
    (tmp_path / "words").write_text("bad word\nbad\n\nUgly\n")
    lexicon = Lexicon(str(tmp_path / "words"))
    text = "A bad word, badly put, UGLY."
    assert [text[s.start : s.end] for s in lexicon.spans(text)] == ["bad word", "UGLY"]
    with pytest.raises(ConfigError, match="cannot read lexicon"):
        Lexicon(str(tmp_path / "none")).spans("x")
    with pytest.raises(ValueError, match="regular expression"):
        Regex("(")


@pytest.mark.parametrize("scorer", [PII(), PEP8(), Regex("a")], ids=lambda s: s.name)
def test_identity_names_what_decides_the_score(scorer):
    identity = scorer.identity()
    assert identity["name"] == scorer.name
    assert "per character" in identity["unit"]
    assert (
        TypeAdapter(AnyScorer).validate_python(
            {"name": scorer.name, **({"pattern": "a"} if scorer.name == "regex" else {})}
        )
        == scorer
    )


@pytest.mark.parametrize(
    "text, kept",
    [
        ("x = 1\ny = [\n    1,\n    2,\n", "x = 1\n"),
        ('x = 1\n"""a docstring\nthat goes on\n', "x = 1\n"),
        ("x = 1\ny = 2\nz = 3 +", "x = 1\ny = 2\n"),
        ("def f():\n    return 1\n", "def f():\n    return 1\n"),
        ("cut", ""),
        ("", ""),
    ],
)
def test_pep8_leaves_out_what_the_cut_broke(text, kept):
    assert PEP8().without_cut(text) == kept
    assert not {"E901", "E902", "W292"} & {s.label for s in PEP8().spans(kept)}


def test_pep8_keeps_the_writers_own_syntax_errors():
    assert "y = ))" in PEP8().without_cut("x = 1\ny = ))\nz = 2\n")


def test_pep8_real_code_cut_anywhere_has_no_syntax_error_of_the_cut():
    text = STDLIB[10].read_text()[:20_000]
    cuts = [PEP8().without_cut(text[:n]) for n in range(500, len(text), 997)]
    assert len(cuts) > 10
    for cut in cuts:
        assert not {"E901", "E902", "W292"} & {s.label for s in PEP8().spans(cut)}


def test_lines_are_what_other_scorers_keep_of_a_cut_text():
    assert Regex("a").without_cut("one\ntwo\nthr") == "one\ntwo\n"


ODD_OBJECTS = """
class Answers:
    def __call__(self, text):
        return 1.0

    def __getattr__(self, name):
        raise OSError(name)


class Circle:
    def __call__(self, text):
        return 1.0


answers = Answers()
circle = Circle()
circle.__wrapped__ = circle
"""


@pytest.mark.parametrize("name", ["answers", "circle"])
def test_a_callable_object_may_have_odd_attributes(tmp_path, name):
    (tmp_path / "odd.py").write_text(ODD_OBJECTS)
    scorer = Function(f"{tmp_path / 'odd.py'}:{name}")
    assert scorer.identity()["source"] is None
    assert scorer.score_text("a") == 1.0
