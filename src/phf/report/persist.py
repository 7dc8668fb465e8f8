"""What harmless instruction tuning leaves of each group, next to plain training under the same tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from phf.core import statistics
from phf.core.types import Estimate
from phf.redteaming.persist import Persisted, PersistResult, kept_gain
from phf.report.format import share
from phf.report.runs import ReportedRun


@dataclass(frozen=True)
class PersistedRow:
    """A group at one stage, asked in one way."""

    group: str
    stage: str
    template: str
    misalignment: Estimate
    """Over seeds where there are several, else over samples."""
    gain: Estimate | None
    """Share of plain training's misalignment that is missing, of the same stage, template and seeds; None for plain
    training."""
    answer_loss: float
    runs: tuple[str, ...]

    @property
    def gain_text(self) -> str:
        """The gain as people say it."""
        return "" if self.gain is None else share(self.gain.mean, 0)

    @property
    def gain_interval(self) -> str:
        """Its 95% interval; empty where there is none."""
        if self.gain is None or math.isnan(self.gain.ci95[0]):
            return ""
        low, high = self.gain.ci95
        return f"{share(low, 0)} to {share(high, 0)}"


def persisted(runs: Sequence[ReportedRun], plain: str | None) -> list[PersistedRow]:
    """Every group, stage and template. `plain`: the group of plain training."""
    of_group: dict[str, dict[int, PersistResult]] = {}
    for run in runs:
        if run.persist is not None:
            of_group.setdefault(run.name, {})[run.manifest.seed] = run.persist
    base = of_group.get(plain or "", {})
    rows = []
    for name, members in of_group.items():
        for first in next(iter(members.values())).found:
            found = _of(members, first)
            if len(found) < len(members):
                continue
            own = [part.misalignment for part in found.values()]
            gain = None if name == plain else _gain(found, _of(base, first))
            loss = sum(part.answer_loss for part in found.values()) / len(found)
            folders = tuple(member.model for member in members.values())
            rows.append(
                PersistedRow(name, first.stage, first.template, statistics.over_seeds(own), gain, loss, folders)
            )
    return rows


def _of(members: dict[int, PersistResult], like: Persisted) -> dict[int, Persisted]:
    """The part of each seed at a stage, asked in a way."""
    found = {seed: member.of(like.stage, like.template) for seed, member in members.items()}
    return {seed: part for seed, part in found.items() if part is not None}


def _gain(own: dict[int, Persisted], base: dict[int, Persisted]) -> Estimate | None:
    both = [seed for seed in own if seed in base]
    if not both:
        return None
    return kept_gain([own[s].misalignment.mean for s in both], [base[s].misalignment.mean for s in both])
