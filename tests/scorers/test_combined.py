"""Your own function as a scorer, and several scorers as one."""

from __future__ import annotations

import math
from typing import get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from phf.core.config import ConfigError, to_plain
from phf.scorers import PEP8, PII, SCORER_NAMES, AnyScorer, Combination, Function, Lexicon, Presidio, Regex
from phf.scorers.combined import SingleScorer
from phf.scoring.judge import judge

CODE = """
def shouting(text):
    return sum(c.isupper() for c in text) / len(text)

def all_at_once(texts):
    return [float(len(t)) for t in texts]

def too_few(texts):
    return []

def cannot(text):
    return float("nan")
"""


@pytest.fixture
def module(tmp_path):
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path / "mine.py"


def test_a_function_is_a_scorer(module):
    scorer = Function(f"{module}:shouting", version="1")
    assert scorer.score_segments(["ABcd", "", "x"])[0] == 0.5
    assert math.isnan(scorer.score_segments(["ABcd", "", "x"])[1])
    assert Function(f"{module}:all_at_once", batched=True).score_segments(["ab", "c"]) == [2, 1]
    assert judge(Function(f"{module}:cannot"), ["a"]).failure == "not a number"
    assert Function("math:sqrt").identity()["source"] is None
    identity = scorer.identity()
    assert (identity["function"], identity["version"]) == ("mine.py:shouting", "1")


def test_a_changed_file_is_another_scorer(module, tmp_path):
    other = tmp_path / "other" / "mine.py"
    other.parent.mkdir()
    other.write_text(CODE + "# changed\n")
    assert Function(f"{module}:shouting").identity()["source"] != Function(f"{other}:shouting").identity()["source"]


@pytest.mark.parametrize(
    "function, message",
    [
        ("nothing", "expected module:name"),
        ("no.such.module:f", "cannot import no.such.module"),
        ("math:sqroot", r"has no function 'sqroot' \(did you mean 'sqrt'\?\)"),
        ("/no/such/file.py:f", "there is no file"),
    ],
)
def test_a_function_that_is_not_there_is_said(function, message):
    with pytest.raises(ConfigError, match=message):
        Function(function).score_text("a")


def test_mistakes_of_the_function_are_errors_not_scores(module):
    with pytest.raises(ConfigError, match="returned 0 scores for 1 texts"):
        judge(Function(f"{module}:too_few", batched=True), ["a"])


def test_combinations_by_hand(tmp_path):
    (tmp_path / "words").write_text("bad\n")
    a = Regex(r"\d")
    b = Lexicon(str(tmp_path / "words"))
    segments = ["bad 1", "12", "fine"]
    assert Combination((a, b)).score_segments(segments) == [1 / 5, 2 / 2, 0]
    assert Combination((a, b), how="sum").score_segments(segments) == [2 / 5, 1, 0]
    weighted = Combination((a, b), how="sum", weights=(0.5, 10))
    assert weighted.score_segments(segments) == [0.5 / 5 + 10 / 5, 0.5, 0]
    assert weighted.score_text("bad 1") == 0.5 / 5 + 10 / 5
    assert [s.label for s in Combination((a, b)).spans("bad 1")] == ["word", "match"]
    assert judge(Combination((a, b)), segments).labels == {"match": 3, "word": 1}
    assert math.isnan(Combination((a, b)).score_segments([""])[0])


def test_where_one_cannot_judge_neither_can_the_combination(module):
    combined = Combination((Regex("a"), Function(f"{module}:cannot")))
    assert math.isnan(combined.score_segments(["a"])[0])
    assert combined.identity()["unit"] == "score"
    assert Combination((Regex("a"), Regex("b"))).identity()["unit"] == "matches per character"
    half = [Function(f"{module}:cannot", threshold=0.5)] * 2
    assert (
        Combination((Regex("a"), Regex("b"))).bad_above
        == Combination((Regex("a"), Regex("b")), how="sum").bad_above
        == 0
    )
    assert Combination(tuple(half)).bad_above == 0.5
    for unclear in (Combination(tuple(half), how="sum"), Combination((Regex("a"), half[0]))):
        assert unclear.bad_above is None


def test_combinations_are_checked_and_survive_a_manifest():
    with pytest.raises(ValidationError, match="1 given for 2 scorers"):
        Combination((Regex("a"), PEP8()), weights=(1.0,))
    with pytest.raises(ValidationError):
        Combination((Regex("a"),))
    combined = Combination((Regex("a"), PEP8()), how="sum", weights=(1.0, 2.0))
    assert TypeAdapter(AnyScorer).validate_python(to_plain(combined)) == combined
    assert combined.without_cut("x = 1\ny = (") == "x = 1\n"


def test_a_combination_is_of_the_kinds_of_its_parts():
    mixed = Combination((PII(), PEP8()))
    assert (mixed.judges_code, mixed.finds_personal_data) == (True, True)
    plain = Combination((Regex("a"), Regex("b")))
    assert (plain.judges_code, plain.finds_personal_data) == (False, False)
    assert {s.name for s in (PII(), PEP8(), Presidio()) if s.finds_personal_data} == {"pii", "presidio"}


def test_every_scorer_but_the_combination_can_be_combined():
    whole = {cls.name for cls in get_args(get_args(AnyScorer)[0])}
    assert set(SCORER_NAMES) == whole
    assert {cls.name for cls in get_args(SingleScorer)} == whole - {"combination", "given"}
