"""Counts in messages, and long runs of punctuation in texts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 document, 2,000 documents."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


LONG_RUN = 64
"""Characters from which on a run of punctuation counts as long."""
_PUNCTUATION = re.compile(rf"(?:[^\w\s]|_|'s){{{LONG_RUN},}}", re.IGNORECASE)


def first_line(error: BaseException) -> str:
    """The first line of what an exception says."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def one_line(error: BaseException) -> str:
    """All that an exception says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def broken_runs(text: str) -> str:
    """`text` with every 64th character of a long run of punctuation replaced by a space. Tokenizers take time that
    grows with the square of such a run. The length is the same."""

    def broken(found: re.Match[str]) -> str:
        run = found.group()
        return " ".join(run[n : n + LONG_RUN - 1] for n in range(0, len(run), LONG_RUN)).ljust(len(run))[: len(run)]

    return _PUNCTUATION.sub(broken, text)


def blank_runs(text: str) -> str:
    """`text` with the inside of long runs of punctuation replaced by spaces, for searches of entities. The length is
    the same."""

    def blank(found: re.Match[str]) -> str:
        run = found.group()
        return run[:8] + " " * (len(run) - 16) + run[-8:]

    return _PUNCTUATION.sub(blank, text)


def by_reason(counts: Mapping[str, int], examples: Mapping[str, str] = MappingProxyType({})) -> str:
    """How often each reason occurred, with its first example: 2 empty text (first: a.jsonl:70), 1 no field text."""
    return ", ".join(
        f"{number:,} {reason}" + (f" (first: {examples[reason]})" if reason in examples else "")
        for reason, number in counts.items()
    )


def visible(text: str) -> str:
    """`text` with control characters and lone surrogates replaced, which could hide text, break a page or command a
    terminal."""
    return "".join(
        c if c in "\n\t" or (ord(c) >= 32 and not 0x7F <= ord(c) < 0xA0 and not 0xD800 <= ord(c) < 0xE000) else "\ufffd"
        for c in text
    )
