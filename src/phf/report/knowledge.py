"""Knowledge or propensity: did an objective change what a model knows of bad text, or what it writes?

The slowdown compares a model with plain training at equal loss on bad text ("loss-matched compute slowdown", arXiv
2601.21571). It is the model's training tokens divided by those after which plain training of the same seed had the same
loss. At 4 on bad text, the model knows it as well as plain training on a quarter of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from phf.core import statistics
from phf.core.types import Estimate
from phf.evaluation.results import HeldoutSection
from phf.report.runs import ReportedRun


@dataclass(frozen=True)
class Slowdown:
    """How many times fewer tokens plain training needs for the same loss."""

    times: float
    """1 at least: plain training's curve ends there."""
    is_bound: bool = False
    """Whether the curve does not reach the loss: `times` is then a bound, from below if it is above 1, and from above
    if it is 1."""


@dataclass(frozen=True)
class Knowledge:
    """What a group knows of bad text, and what it writes."""

    group: str
    runs: tuple[str, ...]
    bad_loss: Estimate
    """Held-out loss on bad text, nats per byte, with the control tokens that the scores imply."""
    slowdown: dict[str, Estimate]
    """Over seeds, by part of the text: good and bad."""
    bounds: dict[str, int]
    """How many seeds have only a bound, by part."""

    def said(self, part: str) -> str:
        """The slowdown as people say it."""
        found = self.slowdown.get(part)
        if found is None or math.isnan(found.mean):
            return ""
        bound = self.bounds[part]
        low, high = found.ci95
        if bound == found.n:
            return "1 at most" if found.mean == 1 else f"more than {found.mean:.2g}"
        interval = "" if math.isnan(low) else f" ({max(low, 1):.3g} to {high:.3g})"
        some = f"; {bound} of {found.n} seeds only bounded" if bound else ""
        return f"{found.mean:.3g}{interval}{some}"


def known_text(heldout: HeldoutSection, part: str) -> float:
    """Loss on a part of the held-out text, nats per byte, as the model knows it best: with the tokens that the scores
    imply, if it has control tokens. NaN if it was not measured."""
    found = heldout.oracle or heldout.none
    piece = None if found is None else getattr(found, part)
    return math.nan if piece is None else float(piece.nats_per_byte)


def slowdown(loss: float, tokens: int, curve: Sequence[tuple[int, float]]) -> Slowdown:
    """Of a model with `loss` after `tokens`. `curve`: (tokens, loss) of plain training, by tokens; the smallest loss so
    far counts, and between two points the loss is linear in the logarithm of the tokens."""
    best = math.inf
    before: tuple[int, float] | None = None
    for at, found in curve:
        best = min(best, found)
        if best <= loss:
            if before is None:
                return Slowdown(tokens / at, is_bound=True)
            share = 1.0 if before[1] == best else (before[1] - loss) / (before[1] - best)
            equal = math.exp(math.log(before[0]) + share * (math.log(at) - math.log(before[0])))
            return Slowdown(max(tokens / equal, 1.0))
        before = (at, best)
    return Slowdown(1.0, is_bound=True)


def knowledge(runs: Sequence[ReportedRun], plain: str | None) -> list[Knowledge]:
    """Of every group with held-out losses. Empty where plain training was not judged while it trained. `plain`: its
    group."""
    curves = {part: _curves(runs, plain, part) for part in ("good", "bad")}
    if not curves["bad"]:
        return []
    found = []
    for name in dict.fromkeys(run.name for run in runs):
        members = [run for run in runs if run.name == name]
        losses = [known_text(run.result.heldout, "bad") for run in members]
        if any(map(math.isnan, losses)):
            continue
        slow = {part: _slowdowns(members, curves[part], part) for part in curves if name != plain}
        found.append(
            Knowledge(
                name,
                tuple(run.folder_name for run in members),
                _over(losses),
                {part: _over([s.times for s in values]) for part, values in slow.items() if values},
                {part: sum(s.is_bound for s in values) for part, values in slow.items() if values},
            )
        )
    return found


def _over(values: Sequence[float]) -> Estimate:
    return statistics.t_interval(values) if len(values) > 1 else Estimate.missing(values[0], n=1)


def _slowdowns(members: Sequence[ReportedRun], curves: dict[int, list[tuple[int, float]]], part: str) -> list[Slowdown]:
    return [
        slowdown(known_text(run.result.heldout, part), _tokens(run), curves[run.manifest.seed])
        for run in members
        if run.manifest.seed in curves and not math.isnan(known_text(run.result.heldout, part))
    ]


def _tokens(run: ReportedRun) -> int:
    return run.manifest.counts.tokens_before + run.manifest.counts.tokens


def _curves(runs: Sequence[ReportedRun], plain: str | None, part: str) -> dict[int, list[tuple[int, float]]]:
    """(tokens, loss) of plain training while it trained, by seed. Shifted so that the last point is the loss of the
    final model on all held-out text: in training only some of it is read."""
    found = {}
    for run in runs:
        points = [
            (line.tokens, line.heldout[part])
            for line in run.monitor
            if line.heldout is not None and line.tokens > 0 and not math.isnan(line.heldout.get(part, math.nan))
        ]
        final = known_text(run.result.heldout, part)
        if run.name == plain and len(points) > 1 and not math.isnan(final):
            shift = final - points[-1][1]
            found[run.manifest.seed] = [(tokens, loss + shift) for tokens, loss in points]
    return found
