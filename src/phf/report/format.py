"""TODO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phf.report.measures import Measure


def headline(capability: Mapping[str, Any]) -> str:
    """A capability's main numbers with their intervals."""
    found = [(n, v) for n, v in capability.items() if isinstance(v, Mapping) and "ci95" in v]
    shown = found if capability["name"] == "lm-eval" else found[:1]
    return "; ".join(f"{number(v['mean'], 3)} ({number(v['ci95'][0], 3)} to {number(v['ci95'][1], 3)}) {n}" for n, v in shown) or "–"  # fmt: skip


def plain(value: Any) -> str:
    """A value of a manifest as one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return str(value)


def number(value: float | None, digits: int = 4) -> str:
    """A number for a table; an en dash where there is none."""
    if value is None or value != value:
        return "–"
    if value != 0 and abs(value) < 10**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def share(value: float | None, digits: int = 1) -> str:
    """A share in per cent."""
    return "–" if value is None or value != value else f"{100 * value:.{digits}f}%"


def measured(value: Mapping[str, Any], measure: Measure) -> str:
    """A measure's mean as text."""
    return (share if measure.percent else number)(value["mean"], measure.digits)


def interval(value: Mapping[str, Any], measure: Measure) -> str:
    """Its 95% interval as text."""
    show = share if measure.percent else number
    return " to ".join(show(end, measure.digits) for end in value["ci95"])
