"""PEP8: pycodestyle violations per character.

Exactly pycodestyle's default checks with its default ignore list. The user's configuration files are never read. The
whole document is checked, and each violation counts on its line, as in the paper's code.
"""

from __future__ import annotations

import platform
import tokenize
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

from pydantic.dataclasses import dataclass

from phf.core.config import STRICT
from phf.core.extras import naming_extras, optional
from phf.core.types import Identity, Span
from phf.scorers.base import Scorer, scores_by_position

pycodestyle = optional("pycodestyle")


@dataclass(frozen=True, config=STRICT)
class PEP8(Scorer):
    """Violations per character. A syntax error counts as pycodestyle's E901 or E902. A text on which pycodestyle itself
    fails is not judged."""

    name: Literal["pep8"] = "pep8"

    @property
    def judges_code(self) -> bool:
        return True

    def identity(self) -> Identity:
        return {
            "name": self.name,
            "unit": "violations per character",
            "package": "pycodestyle",
            "version": pycodestyle.__version__,
            "python": ".".join(platform.python_version_tuple()[:2]),  # pycodestyle uses its tokenizer
            "ignore": pycodestyle.DEFAULT_IGNORE,
        }

    def spans(self, text: str) -> list[Span]:
        """One span per violation, from its column to the end of its line, labelled with its code."""
        found = []
        for start, column, line, code in _violations(text):
            end = start + len(line.rstrip("\r\n"))
            found.append(Span(min(start + column, end), end, code))
        return sorted(found, key=lambda s: (s.start, s.label))

    def judge_segments(self, segments: Sequence[str]) -> tuple[list[float], Counter[str]]:
        found = [(start, code) for start, _, _, code in _violations("".join(segments))]
        return (
            scores_by_position(segments, [Span(start, start, code) for start, code in found]),
            Counter(code for _, code in found),
        )

    def without_cut(self, text: str) -> str:
        """The text up to its last complete statement. An open bracket or string at the end (E901) comes from the
        truncation; a syntax error before the end does not."""
        lines = _lines(text)
        ends = [0, *accumulate(len(line) for line in lines)]
        end = 0
        try:
            for token in tokenize.generate_tokens(iter([*lines, ""]).__next__):
                if token.type == tokenize.NEWLINE and token.string:
                    end = ends[min(token.end[0], len(lines))]
        except tokenize.TokenError as error:  # "EOF in multi-line statement", "unexpected EOF in multi-line string"
            return (
                text[:end]
                if "EOF" in str(error) or "unterminated triple-quoted" in str(error)
                else super().without_cut(text)
            )
        except SyntaxError:
            return super().without_cut(text)
        return text[:end]


def _lines(text: str) -> list[str]:
    """Split after each newline only: "\\x0c" and U+2028 do not end a line of Python."""
    lines = text.split("\n")
    return [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def _violations(text: str) -> list[tuple[int, int, str, str]]:
    """(start of the line in `text`, column, the line, code) of every violation."""
    with naming_extras("the scorer 'pep8'"):
        from phf.scorers._pycodestyle import Checker, Report, options
    lines = _lines(text)
    starts = [0, *accumulate(len(line) for line in lines)]
    report = Report(options())
    if lines:
        Checker([line.replace("\r\n", "\n") for line in lines], options(), report).check_all()
    found = []
    for row, column, code in report.found:
        row = min(max(row, 1), len(lines))  # an error at the end of the file is reported one line below the last
        found.append((starts[row - 1], column, lines[row - 1], code))
    return found
