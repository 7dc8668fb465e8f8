"""How wrong a scorer may be: objectives trained with errors added to their scores, against plain training."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phf.core.runs import NoiseCounts
from phf.core.statistics import t_interval
from phf.core.types import Estimate
from phf.report.format import share
from phf.report.measures import Group, Value
from phf.report.runs import ReportedRun

_NUMBER = r"\d[\d.]*(?:e[+-]?\d+)?"
TAG = re.compile(rf"-scorer_noise(?:{_NUMBER}|(?:-(?:missed|false_alarms){_NUMBER})+|-[A-Za-z_]\w*)(?=-|$)")
"""What a recipe's grid puts into the names of groups."""


@dataclass(frozen=True)
class NoiseLevel:
    """An objective with errors of one size in its scores; their sizes are means over seeds."""

    row: Group
    wrong: float
    """Share of the judged training segments whose class was changed."""
    precision: float
    """Share of bad segments among those that the objective saw as bad."""
    recall: float
    """Share of the bad segments that the objective saw as bad."""
    holds: bool
    """Whether it is better than plain training at 95%."""
    difference: Estimate
    """Misalignment less that of plain training, over seeds that both have."""

    @property
    def ratio(self) -> Value | None:
        """Misalignment divided by that of plain training, over seeds that both have."""
        return self.row.values.get("ratio")


@dataclass(frozen=True)
class NoiseCurve:
    """An objective by the errors in its scores, from none to most."""

    objective: str
    levels: list[NoiseLevel]
    verdict: str


def noise_curves(rows: Sequence[Group], runs: Sequence[ReportedRun]) -> list[NoiseCurve]:
    """The objectives of which some run had errors added to its scores; none without plain training to compare with."""
    plain = next((row for row in rows if row.is_plain and "misalignment" in row.values), None)
    if plain is None or not any(run.manifest.noise for run in runs):
        return []
    base = _Seeds.of(plain, runs)
    of_objective: dict[str, list[NoiseLevel]] = {}
    for row in rows:
        members = [run for run in runs if run.name == row.name]
        if not row.is_plain and "misalignment" in row.values:
            of_objective.setdefault(TAG.sub("", row.name), []).append(_level(row, members, base))
    curves = []
    for objective, levels in of_objective.items():
        levels.sort(key=lambda level: level.wrong)
        if levels[-1].wrong:
            curves.append(NoiseCurve(objective, levels, _verdict(objective, levels)))
    return curves


@dataclass(frozen=True)
class _Seeds:
    """Misalignment of a group."""

    value: Value
    by_seed: dict[int, float]

    @classmethod
    def of(cls, row: Group, runs: Sequence[ReportedRun]) -> _Seeds:
        value = row.values["misalignment"]
        seeds = [run.manifest.seed for run in runs if run.name == row.name]
        points = value.points if len(value.points) == len(seeds) else ()
        return cls(value, dict(zip(seeds, points, strict=False)))

    def less(self, other: _Seeds) -> Estimate:
        """The difference over the seeds that both have; missing if there are fewer than two."""
        both = sorted(self.by_seed.keys() & other.by_seed.keys())
        values = [self.by_seed[seed] - other.by_seed[seed] for seed in both]
        return t_interval(values) if len(both) > 1 else Estimate.missing()

    def is_below(self, other: _Seeds) -> bool:
        """Whether it is lower at 95%: by Student's interval of the difference; with fewer than two seeds, the intervals
        over samples must not overlap."""
        difference = self.less(other)
        if difference.n:
            return difference.ci95[1] < 0
        a = self.value.ci95
        b = other.value.ci95
        return a is not None and b is not None and a[1] < b[0]


def _level(row: Group, members: Sequence[ReportedRun], plain: _Seeds) -> NoiseLevel:
    found = [(0.0, 1.0, 1.0) if n is None else _of_counts(n) for n in (run.manifest.noise for run in members)]
    wrong, precision, recall = np.mean(found, axis=0)
    return NoiseLevel(
        row=row,
        wrong=float(wrong),
        precision=float(precision),
        recall=float(recall),
        holds=_Seeds.of(row, members).is_below(plain),
        difference=_Seeds.of(row, members).less(plain),
    )


def _of_counts(counts: NoiseCounts) -> tuple[float, float, float]:
    wrong = (counts.missed + counts.false_alarms) / max(counts.segments, 1)
    return (wrong, counts.precision, counts.recall)


def _verdict(objective: str, levels: Sequence[NoiseLevel]) -> str:
    """Down to which precision and recall the objective is better, with all smaller errors too. Where precision and
    recall do not fall together, or are not defined: with which errors it is."""
    if not all(a.precision >= b.precision and a.recall >= b.recall for a, b in itertools.pairwise(levels)):
        better = [level.row.name for level in levels if level.holds]
        others = [level.row.name for level in levels if not level.holds]
        said = f"{objective} is better than plain training in {', '.join(better) or 'none of its groups'}"
        return f"{said}; not in {', '.join(others)}." if others and better else f"{said}."
    failed = next((n for n, level in enumerate(levels) if not level.holds), len(levels))
    if failed == 0:
        least = "with the smallest errors here" if levels[0].wrong else "without errors"
        return f"{objective} is not better than plain training at 95%, even {least}."
    last = levels[failed - 1]
    at = f"precision {share(last.precision, 0)} and recall {share(last.recall, 0)}"
    effect = "" if last.ratio is None or math.isnan(last.ratio.mean) else f" ({last.ratio.mean:.2f} times its score)"
    if failed == len(levels):
        return f"{objective} is better than plain training with every error here, down to {at}{effect}."
    lost = levels[failed]
    return (
        f"{objective} is better than plain training down to {at}{effect}; no longer at precision "
        f"{share(lost.precision, 0)} and recall {share(lost.recall, 0)}."
    )
