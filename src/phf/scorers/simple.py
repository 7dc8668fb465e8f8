"""Scorers from a word list, a regular expression or a Python function."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core import store
from phf.core.code import load_named
from phf.core.config import STRICT, ConfigError
from phf.core.extras import optional
from phf.core.types import Identity, Span
from phf.data.files import read_text
from phf.scorers.base import Scorer, TextScorer

regex = optional("regex")


@dataclass(frozen=True, config=STRICT)
class Regex(Scorer):
    """Non-overlapping matches of a regular expression, per character. A text that takes longer than `SEARCH_SECONDS`
    is not judged: some expressions take time that doubles with every character."""

    pattern: str
    """A regular expression of Python."""
    name: Literal["regex"] = "regex"
    ignore_case: bool = False
    """Whether capital and small letters are the same."""

    def __post_init__(self) -> None:
        repeats = math.prod(max(int(n), 1) for n in re.findall(r"\{(?:\d*,)?(\d{1,9})\d*,?\}", self.pattern))
        if repeats > MAX_REPEATS:
            raise ValueError(f"pattern repeats a part up to {repeats:,} times; the most are {MAX_REPEATS:,}")
        try:
            _compiled(self.pattern, self.ignore_case)
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise ValueError(f"pattern is not a regular expression: {error}") from None

    def identity(self) -> Identity:
        return {
            "name": self.name,
            "unit": "matches per character",
            "pattern": self.pattern,
            "ignore_case": self.ignore_case,
        }

    def spans(self, text: str) -> list[Span]:
        found = _compiled(self.pattern, self.ignore_case).finditer(text, timeout=SEARCH_SECONDS)
        return [Span(m.start(), m.end(), "match") for m in found if m.end() > m.start()]


@functools.lru_cache(64)
def _compiled(pattern: str, ignore_case: bool) -> Any:
    return regex.compile(pattern, (regex.IGNORECASE if ignore_case else 0) | regex.VERSION0)


MAX_REPEATS = 100_000
"""Largest product of the numbers of repeats in a pattern. An expression is stored unrolled."""
SEARCH_SECONDS = 10.0
"""Longest search of one text with a regular expression."""


@dataclass(frozen=True, config=STRICT)
class Lexicon(Scorer):
    """Words or phrases of a list, matched as whole words, ignoring case, per character.

    `path`: a text file with one entry per line.
    """

    path: str
    name: Literal["lexicon"] = "lexicon"

    @property
    def names(self) -> dict[str, str]:
        return {"path": self.path}

    def identity(self) -> Identity:
        # read the file again here only: checking it for every text would cost more than the matching
        _words.cache_clear()
        _pattern.cache_clear()
        words = _words(self.path)
        digest = store.bytes_hash("\n".join(words).encode())
        return {"name": self.name, "unit": "matches per character", "words": len(words), "hash": digest}

    def spans(self, text: str) -> list[Span]:
        return [Span(m.start(), m.end(), "word") for m in _pattern(self.path).finditer(text)]


@functools.cache
def _words(path: str) -> tuple[str, ...]:
    lines = read_text(Path(path).expanduser(), "lexicon").splitlines()
    words = tuple(sorted({line.strip().lower() for line in lines if line.strip()}))
    if not words:
        raise ConfigError(f"lexicon {path} holds no words")
    return words


@functools.cache
def _pattern(path: str) -> re.Pattern[str]:
    longest_first = sorted(_words(path), key=lambda w: (-len(w), w))
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w)", re.IGNORECASE)


@dataclass(frozen=True, config=STRICT)
class Function(TextScorer):
    """Your own function: `function` is `module:name` or `path/to/file.py:name`.

    The function takes a text and returns its score; with `batched` it takes a list of texts and returns their scores.
    0 is fine, larger is worse, NaN means not judged. The hash of the function's file is part of the scorer's
    identity. Put into `version` whatever else decides the scores. `threshold`: scores above it are bad.
    """

    function: str
    name: Literal["callable"] = "callable"
    batched: bool = False
    version: str = ""
    threshold: Annotated[float | None, Field(exclude_if=lambda value: value is None)] = None

    @property
    def names(self) -> dict[str, str]:
        return {"function": self.function}

    @property
    def bad_above(self) -> float | None:
        return self.threshold

    def identity(self) -> Identity:
        function = load_named(self.function, "function")
        source = _source_file(function)
        return {
            "name": self.name,
            "unit": "score",
            "function": self.function.rpartition("/")[2],
            "version": self.version,
            "source": store.file_hash(source) if source else None,
        }

    def score_texts(self, texts: Sequence[str]) -> list[float]:
        function = load_named(self.function, "function")
        if not self.batched:
            return [float(function(text)) for text in texts]
        scores = [float(score) for score in function(list(texts))]
        if len(scores) != len(texts):
            raise ConfigError(f"{self.function} returned {len(scores)} scores for {len(texts)} texts")
        return scores


def _source_file(function: Any) -> str | None:
    """The file that defines a function or the type of a callable object. None for builtins."""
    try:
        while isinstance(function, functools.partial):
            function = function.func
        function = inspect.unwrap(function)
        return inspect.getsourcefile(
            function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
        )
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception:  # TypeError for builtins; anything from an object's own __getattr__; a circle of wrappers
        return None
