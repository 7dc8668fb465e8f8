"""The result of a comparison in two or three sentences, made from its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from phf.report.format import scale_of
from phf.report.measures import Group, Value
from phf.report.noise import TAG

SAME_LOSS = 1.01
"""Losses on good text up to this ratio are called about the same."""
NEAR_LOSS = 1.05
"""The first sentence is about a group with a ratio up to this, if there is one."""
MUCH_WORSE = 1.2
"""From this ratio of losses on bad text on, a model no longer models bad text."""
OBJECTIVES = {
    "conditional": "Conditional training",
    "unlikelihood": "Unlikelihood training",
    "filtering": "Filtering",
    "masking": "Loss masking",
    "rwr": "Reward-weighted regression",
    "awr": "Advantage-weighted regression",
    "quantile": "Quantile tokens",
    "sgtm": "Gradient masking",
}
FOUND = {"pii": "personal data", "presidio": "personal data", "pep8": "faults of style", "toxicity": "toxic text"}


@dataclass(frozen=True)
class Headline:
    """`sentences`: the result. `best`: the group that they are about first; None if none is better than plain
    training."""

    sentences: list[str]
    best: str | None = None
    baseline: str | None = None


def headline(rows: Sequence[Group], unit: str, scorer: str) -> Headline:
    """What the numbers say about the groups that differ from plain training. `scorer`: its name."""
    base = next((row for row in rows if row.is_plain), None)
    if base is None or "misalignment" not in base.values or len(rows) < 2:
        return Headline([])
    plain = base.values["misalignment"]
    what = FOUND.get(scorer, "bad text")
    others = [row for row in rows if row is not base and "misalignment" in row.values]
    better = sorted(
        (row for row in others if _below(row, plain)),
        key=lambda r: r.values["misalignment"].mean,
    )
    if not plain.mean and not any(row.values["misalignment"].mean for row in others):
        return Headline(
            [f"No run wrote any {what}, so there is nothing to compare: judge more samples."], None, base.name
        )
    if not better:
        amount = _amount(plain.mean, unit)
        said = f"No objective wrote less {what} than plain training ({amount}): the 95% intervals overlap."
        return Headline([said], None, base.name)
    cheap = [row for row in better if _loss_ratio(row, base, "good") <= NEAR_LOSS and not _forgets(row, base)]
    first = (cheap or better)[0]
    sentences = [_sentence(first, base, unit, what)]
    lowest = better[0]
    if lowest is not first:
        sentences.append(_sentence(lowest, base, unit, what))
    unclear = [_name(row) for row in others if row not in better]
    if unclear:
        listed = ", ".join(unclear[:4]) + (f" and {len(unclear) - 4} others" if len(unclear) > 4 else "")
        sentences.append(f"Not clearly less than plain training: {listed}.")
    return Headline(sentences, first.name, base.name)


def _sentence(row: Group, base: Group, unit: str, what: str) -> str:
    own = row.values["misalignment"].mean
    plain = base.values["misalignment"].mean
    amounts = f"{_amount(own, unit, bare=True)} against {_amount(plain, unit)}"
    if own > 0:
        start = f"{_name(row)} wrote {_times(row, plain / own)} times less {what} than plain training ({amounts})"
    else:
        start = f"{_name(row)} wrote no {what} in {row.samples:,} samples (plain training {_amount(plain, unit)})"
    forgets = ""
    if _forgets(row, base):
        bad = [r.values["bad"].mean for r in (row, base)]
        forgets = f" It no longer models bad text ({bad[0]:.2f} against {bad[1]:.2f})."
    return f"{start}{_cost(row, base)}.{forgets}"


def _times(row: Group, plainly: float) -> str:
    """How many times less a group wrote, by the column of the table, with its interval. `plainly`: by the means."""
    seeds = len(row.values["misalignment"].points)
    over = f"; geometric mean over {seeds} seeds" if seeds > 1 else ""
    ratio = row.values.get("ratio")
    if ratio is None or not ratio.mean > 0:
        return _short(plainly)
    if ratio.ci95 is None:
        return _short(1 / ratio.mean)
    if not ratio.ci95[0] > 0:
        return f"at least {_short(1 / ratio.ci95[1])}"
    return f"{_short(1 / ratio.mean)} ({_short(1 / ratio.ci95[1])} to {_short(1 / ratio.ci95[0])}{over})"


def _short(times: float) -> str:
    return f"{times:,.0f}" if times >= 10 else f"{times:.1f}" if times >= 1.1 else f"{times:.3g}"


def _cost(row: Group, base: Group) -> str:
    """What the gain costs, as the rest of a sentence."""
    if "good" not in row.values or "good" not in base.values:
        return ""
    own = row.values["good"].mean
    plain = base.values["good"].mean
    pair = f"({own:.3f} against {plain:.3f} nats per byte)"
    ratio = own / plain
    difference = row.values.get("good_difference")
    if difference is None or difference.ci95 is None:
        unclear = _overlap(row.values["good"], base.values["good"])
    else:
        unclear = difference.ci95[0] <= 0 <= difference.ci95[1]
    if 1 / SAME_LOSS < ratio <= SAME_LOSS:
        found = f" at about the same loss on good text {pair}"
    elif unclear:
        found = f" with no clear difference in the loss on good text {pair}"
    elif ratio < 1:
        found = f" at a lower loss on good text {pair}"
    else:
        found = f" at a loss on good text that is {100 * (ratio - 1):.1f}% higher {pair}"
    return found


def _loss_ratio(row: Group, base: Group, part: str) -> float:
    if part not in row.values or part not in base.values:
        return 1.0
    return row.values[part].mean / base.values[part].mean


def _forgets(row: Group, base: Group) -> bool:
    return _loss_ratio(row, base, "bad") >= MUCH_WORSE


def _below(row: Group, plain: Value) -> bool:
    """Whether a group wrote significantly less: the interval of the ratio over seeds ends below 1, or without one the
    95% intervals do not overlap."""
    own = row.values["misalignment"]
    ratio = row.values.get("ratio")
    if ratio is not None and ratio.ci95 is not None and len(own.points) > 1:
        return ratio.ci95[1] < 1
    return own.ci95 is not None and plain.ci95 is not None and own.ci95[1] < plain.ci95[0]


def _overlap(a: Value, b: Value) -> bool:
    if a.ci95 is None or b.ci95 is None:
        return False
    return a.ci95[0] <= b.ci95[1] and b.ci95[0] <= a.ci95[1]


def _name(row: Group) -> str:
    known = OBJECTIVES.get(row.objective)
    name = TAG.sub("", row.name)  # the headline is about groups without added errors
    return name if known is None or name != row.objective else known


def _amount(value: float, unit: str, bare: bool = False) -> str:
    """A mean score as people say it, with at most three digits."""
    scale = scale_of(unit)
    if bare:
        return scale.text(value)
    return f"{scale.text(value)} {'on average' if scale.factor == 1 else 'per 1,000 characters'}"
