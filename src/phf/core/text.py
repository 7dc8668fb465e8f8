"""Counts in messages."""

from __future__ import annotations

from collections.abc import Mapping


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 document, 2,000 documents."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def by_reason(counts: Mapping[str, int]) -> str:
    """How often each reason occurred: 2 empty text, 1 no field text."""
    return ", ".join(f"{number:,} {reason}" for reason, number in counts.items())
