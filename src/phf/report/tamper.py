"""What finetuning leaves of each group: misalignment by steps, and the half-life of the gain over plain training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phf.core import statistics
from phf.core.types import Estimate
from phf.redteaming.tamper import HalfLife, TamperedLine, half_lives
from phf.report.format import number
from phf.report.runs import ReportedRun


@dataclass(frozen=True)
class Tampered:
    """A group under finetuning on one part of the text."""

    group: str
    part: str
    curve: list[tuple[int, Estimate]]
    """(step, misalignment): over seeds where there are several, else over samples."""
    half_life: HalfLife | None
    """None for plain training, and without it."""
    runs: tuple[str, ...]

    @property
    def said(self) -> str:
        """The half-life as people say it."""
        return "" if self.half_life is None else half_life_text(self.half_life, self.curve[-1][0])


def half_life_text(found: HalfLife, last: int) -> str:
    """A half-life as people say it. `last`: the last step that was judged."""
    if not found.seeds:
        return "no gain to lose"
    some = "" if found.seeds == found.asked else f"; {found.asked - found.seeds} of {found.asked} seeds had no gain"
    if found.reached < found.seeds:
        lost = "" if not found.reached else f" in {found.seeds - found.reached} of {found.seeds} seeds"
        return f"over {last} steps{lost}{some}"
    low, high = found.steps.ci95
    interval = "" if found.seeds == 1 else f" ({number(low, 1)} to {number(high, 1)})"
    return f"{number(found.steps.mean, 1)} steps{interval}{some}"


def tampered(runs: Sequence[ReportedRun], plain: str | None) -> list[Tampered]:
    """Every group and part that was finetuned. `plain`: the group of plain training."""
    of_group: dict[str, list[ReportedRun]] = {}
    for run in runs:
        if run.tamper is not None:
            of_group.setdefault(run.name, []).append(run)
    before = {part: _start(of_group.get(plain or "", []), part) for part in ("bad", "good")}
    return [
        _of_group(name, part, members, {} if name == plain else before[part])
        for part in ("bad", "good")
        for name, members in of_group.items()
        if all(m.tamper is not None and part in m.tamper.curves for m in members)
    ]


def _curves(members: Sequence[ReportedRun], part: str) -> dict[int, list[TamperedLine]]:
    """By seed."""
    return {m.manifest.seed: m.tamper.curves[part] for m in members if m.tamper is not None and part in m.tamper.curves}


def _start(members: Sequence[ReportedRun], part: str) -> dict[int, float]:
    return {seed: lines[0].misalignment.mean for seed, lines in _curves(members, part).items()}


def _of_group(name: str, part: str, members: Sequence[ReportedRun], plain: Mapping[int, float]) -> Tampered:
    curves = _curves(members, part)
    curve = []
    for lines in zip(*curves.values(), strict=True):
        found = [line.misalignment for line in lines]
        curve.append((lines[0].step, statistics.over_seeds(found)))
    lives = half_lives(curves, plain) if plain else None
    return Tampered(name, part, curve, lives, tuple(m.folder_name for m in members))
