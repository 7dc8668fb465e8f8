"""The fast checker reports exactly what pycodestyle reports: on real code, on broken code, on soup."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pycodestyle
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from phf.scorers import _pycodestyle, pep8
from phf.scorers._pycodestyle import KNOWN_LOGICAL, KNOWN_PHYSICAL, Checker

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def outcome(checker: type, text: str) -> list[tuple[int, int, str]] | str:
    """Sorted violations, or the name of the exception that ended the check (then there is no score)."""
    report = _pycodestyle.Report(_pycodestyle.options())
    lines = [line.replace("\r\n", "\n") for line in pep8._lines(text)]
    try:
        checker(lines=lines, options=_pycodestyle.options(), report=report).check_all()
    except Exception as error:
        return type(error).__name__
    return sorted(report.found)


def assert_same(text: str) -> None:
    assert outcome(Checker, text) == outcome(pycodestyle.Checker, text)


def test_every_default_check_of_the_installed_version_is_known():
    """A check that is not known is always run, so results stay right; this says that the guards are complete."""
    options = _pycodestyle.options()
    assert {c[0] for c in options.logical_checks} <= KNOWN_LOGICAL
    assert {c[0] for c in options.physical_checks} == KNOWN_PHYSICAL


def python_files(step: int) -> list[Path]:
    return sorted(p for p in STDLIB.rglob("*.py") if "site-packages" not in p.parts)[::step]


@pytest.mark.parametrize("path", python_files(90), ids=lambda p: p.name)
def test_same_on_the_standard_library(path):
    assert_same(path.read_bytes().decode("utf-8", "replace"))


@pytest.mark.slow
def test_same_on_every_file_of_the_standard_library():
    files = python_files(1)
    assert len(files) > 500
    for path in files:
        assert_same(path.read_bytes().decode("utf-8", "replace"))


PIECES = [
    *("x", "l", "O", "I", "type", "lambda", "lambda: 0", "def f(a, l=1):", "class A (B):", "if", "else:", "elif"),
    *("for", "in", "not", "is", "and", "or", "None", "True", "return", "import os, sys", "from a import b"),
    *("except:", "try:", "async def g():", "@d", "@ d", "print", "yield", "await", "with", "as", "global l"),
    *("1", "0xf", "1e5", "1j", "'s'", '"\\d"', "r'\\d'", "f'{x!r:>{w}}'", "'''m\nn \n'''"),
    *(
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        ",",
        ";",
        ":",
        ".",
        "=",
        "==",
        "!=",
        "+",
        "-",
        "*",
        "**",
        "/",
        "//",
        "%",
        "<",
        ">>",
    ),
    *(":=", "->", "@", "~", "&", "...", "# c", "#c", "#!c", "  # noqa", "\\\n", "\n", "\n\n\n\n", " ", "  ", "    "),
    *("\t", "\x0c", "\xa0", "`", "$", "?", "é", "²", "x" * 80, "# " + "y" * 90, "\r\n"),
]


@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
@example("1if(x)else(y)\n")
@example("0xfor(x)\n")
@example("l=1;O = 2\n")
@example("f(a=1, *b, **c, d=-1, e =2)[-1, :-2]\n")
@example("def f(a: int=1, *, b=2, /):\n    return(a)\n")
@example("x = [\n    1,\n  2, \n     -3]\n")
@example("if(a and(b)or not(c)in d):pass\n")
@example("print(a, file=sys.stderr, end='')\nx = f(** k, *a)\n")
@settings(max_examples=1500, deadline=None)
def test_same_on_soup(text):
    assert_same(text)


SOURCE = (STDLIB / "textwrap.py").read_text()[:6000]


@given(st.integers(0, len(SOURCE)), st.integers(0, 400), st.integers(0, 30), st.sampled_from([*PIECES, ""]))
@settings(max_examples=400, deadline=None)
def test_same_on_damaged_code(start, length, cut, insert):
    """A piece of real code with some characters replaced."""
    piece = SOURCE[start : start + length + 100]
    middle = min(length // 2, len(piece))
    assert_same(piece[:middle] + insert + piece[middle + cut :])


def test_same_with_each_guarded_construct():
    path = Path(pycodestyle.__file__)
    assert_same(path.read_text())
    for function in vars(pycodestyle).values():  # the examples in its own docstrings: "E225: i=i+1"
        for line in (getattr(function, "__doc__", None) or "").splitlines():
            code, sep, example = line.strip().partition(": ")
            if sep and (code == "Okay" or code[:1] in "EW"):
                assert_same(example.replace(r"\n", "\n").replace(r"\t", "\t").replace(r"\s", " ") + "\n")


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="its tokenizer gives no error tokens")
def test_a_line_that_cannot_be_tokenised_takes_pycodestyles_own_path():
    assert "E225" in {code for _, _, code in outcome(Checker, "a = `b`\nx=1\n")}
    assert_same("a = `b`\nx=1\n")
