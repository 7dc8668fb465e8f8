"""Numbers and values as text, for tables in pages and in the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phf.core.types import Estimate
from phf.evaluation.results import CapabilityResult
from phf.scorers.fitted import LearningCurve
from phf.scoring.audit import Audit

MISSING = "–"
"""Shown if there is no number."""


def number(value: float | None, digits: int = 4) -> str:
    """A number with `digits` decimals. Smaller numbers than that shows are in scientific notation. NaN and None are a
    dash."""
    if value is None or math.isnan(value):
        return MISSING
    if value != 0 and abs(value) < 10**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def three(value: float) -> str:
    """A number with three digits that count: 12.3, 0.00123."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-4:
        return f"{value:.1e}"
    return f"{value:,.{max(2 - math.floor(math.log10(abs(value))), 0)}f}"


@dataclass(frozen=True)
class Scale:
    """How a page shows scores: times `factor`, in `unit`."""

    factor: float
    unit: str

    def text(self, score: float | None) -> str:
        return MISSING if score is None or math.isnan(score) else three(self.factor * score)


def scale_of(unit: str) -> Scale:
    """Scores per character are shown per 1,000 characters."""
    if "per character" in unit or "/char" in unit:
        return Scale(1000.0, unit.replace("per character", "per 1,000 characters").replace("/char", "/1,000 chars"))
    return Scale(1.0, unit)


def digits(value: float | None, significant: int = 3) -> str:
    """A number with `significant` digits at most."""
    return MISSING if value is None or math.isnan(value) else f"{value:.{significant}g}"


def share(value: float | None, digits: int = 1) -> str:
    """A share in per cent."""
    if value is None or math.isnan(value):
        return MISSING
    if 0 < 100 * value < 0.5 * 10**-digits:
        return f"<{10**-digits:.{digits}f}%"
    return f"{round(100 * value, digits) + 0.0:.{digits}f}%"  # adding 0 makes -0 a 0


def with_interval(estimate: Estimate, digits: int) -> str:
    """A mean with its 95% interval: "0.012 (0.010 to 0.014)"."""
    low, high = estimate.ci95
    return f"{number(estimate.mean, digits)} ({number(low, digits)} to {number(high, digits)})"


def headline(capability: CapabilityResult) -> str:
    """A capability's main numbers with their intervals."""
    return "; ".join(f"{with_interval(value, 3)} {name}" for name, value in capability.main.items()) or MISSING


def share_with_interval(estimate: Estimate) -> str:
    """A share with its 95% interval: "66.7% (50.1% to 80.2%)"."""
    low, high = estimate.ci95
    return f"{share(estimate.mean)} ({share(low)} to {share(high)})"


def verdict(audit: Audit) -> str:
    """An audit of a scorer in two sentences."""
    row = audit.main
    return (
        f"Of the segments that score above {audit.threshold:.6g}, {share_with_interval(row.precision)} are bad. "
        f"That is {share_with_interval(row.recall)} of all bad segments, and dropping them would also drop "
        f"{share_with_interval(row.clean_discarded)} of the good ones. In brackets: 95% intervals."
    )


def as_noise(audit: Audit) -> str:
    """The errors that an audit found, as a setting of training."""
    row = audit.main
    return f"train.scorer_noise={{missed: {row.bad_kept.mean:.3g}, false_alarms: {row.clean_discarded.mean:.3g}}}"


SMALL_GAIN = 0.01
"""A gain in AUC for twice the labels that is hardly worth them."""


def curve_text(curve: LearningCurve) -> str:
    """Whether more labels would help."""
    sizes = ", ".join(f"{point.texts:,}" for point in curve.points)
    areas = ", ".join(number(point.auc, 3) for point in curve.points)
    low, high = curve.gain.ci95
    if low > 0 and high > SMALL_GAIN:
        said = "more labels would help"
    elif high <= SMALL_GAIN:
        said = "more labels would hardly help"
    else:
        said = "too few held-out texts to say whether more labels would help"
    gain = f"{curve.gain.mean:+.3f} ({low:+.3f} to {high:+.3f})"
    return f"AUC with {sizes} texts: {areas}; the last step gave {gain}: {said}"


def plain(value: Any) -> str:
    """Plain data, such as settings, as one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return str(value)
