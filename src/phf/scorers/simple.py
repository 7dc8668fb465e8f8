"""Scorers from a list of words or a regular expression: matches per character. Floor 2."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from phf.config import STRICT, ConfigError
from phf.scorers.base import Scorer
from phf.types import Span


@dataclass(frozen=True, config=STRICT)
class Regex(Scorer):
    """Non-overlapping matches of a pattern per character."""

    pattern: str
    name: Literal["regex"] = "regex"
    ignore_case: bool = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern is not a regular expression: {error}") from None

    def identity(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": "matches per character",
            "pattern": self.pattern,
            "ignore_case": self.ignore_case,
        }

    def spans(self, text: str) -> list[Span]:
        pattern = re.compile(self.pattern, re.IGNORECASE if self.ignore_case else 0)
        return [Span(m.start(), m.end(), "match") for m in pattern.finditer(text) if m.end() > m.start()]


@dataclass(frozen=True, config=STRICT)
class Lexicon(Scorer):
    """Words or phrases of a list, found as whole words whatever their case; matches per character.

    `path`: a text file with one entry a line.
    """

    path: str
    name: Literal["lexicon"] = "lexicon"

    def identity(self) -> dict[str, Any]:
        words = _words(self.path)
        digest = hashlib.blake2b("\n".join(words).encode(), digest_size=16).hexdigest()
        return {"name": self.name, "unit": "matches per character", "words": len(words), "hash": digest}

    def spans(self, text: str) -> list[Span]:
        return [Span(m.start(), m.end(), "word") for m in _pattern(self.path).finditer(text)]


@functools.cache
def _words(path: str) -> tuple[str, ...]:
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read lexicon {path}: {error.strerror}") from None
    words = tuple(sorted({line.strip().lower() for line in lines if line.strip()}))
    if not words:
        raise ConfigError(f"lexicon {path} holds no words")
    return words


@functools.cache
def _pattern(path: str) -> re.Pattern[str]:
    longest_first = sorted(_words(path), key=lambda w: (-len(w), w))
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w)", re.IGNORECASE)
