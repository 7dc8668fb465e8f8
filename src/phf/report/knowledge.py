"""Knowledge or propensity: did an objective change what a model knows of bad text, or what it writes?

The slowdown compares a model with plain training at equal loss on bad text ("loss-matched compute slowdown", arXiv
2601.21571). It is the model's training tokens divided by those after which plain training of the same seed had the same
loss. At 4 on bad text, the model knows it as well as plain training on a quarter of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from phf.core import statistics
from phf.core.types import Estimate
from phf.evaluation.results import HeldoutSection
from phf.report.runs import ReportedRun


@dataclass(frozen=True)
class Slowdown:
    """How many times fewer tokens plain training needs for the same loss."""

    times: float
    bound: Literal["", "more than", "at most"] = ""
    """What `times` is where plain training's curve does not reach the loss."""


@dataclass(frozen=True)
class Knowledge:
    """What a group knows of bad text, and what it writes."""

    group: str
    runs: tuple[str, ...]
    bad_loss: Estimate
    """Held-out loss on bad text, nats per byte, with the control tokens that the scores imply."""
    slowdown: dict[str, list[Slowdown]]
    """Of each seed, by part of the text: good and bad."""

    def mean(self, part: str) -> Estimate | None:
        """The slowdown over seeds, as a geometric mean; None where some seed has only a bound."""
        found = self.slowdown.get(part, [])
        if not found or any(one.bound for one in found):
            return None
        if len(found) == 1:
            return Estimate.missing(found[0].times, n=1)
        return statistics.ratio_interval([one.times for one in found], [1.0] * len(found))

    def said(self, part: str) -> str:
        """The slowdown as people say it."""
        found = self.slowdown.get(part, [])
        mean = self.mean(part)
        if mean is not None:
            low, high = mean.ci95
            return f"{mean.mean:.3g}" + ("" if math.isnan(low) else f" ({low:.3g} to {high:.3g})")
        kinds = {one.bound for one in found}
        times = [one.times for one in found]
        if kinds == {"more than"}:
            return f"more than {min(times):.3g}"
        if kinds == {"at most"}:
            return f"at most {max(times):.3g}"
        return ", ".join(f"{one.bound} {one.times:.3g}".strip() for one in found)


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
                return Slowdown(tokens / at, "" if best == loss else "more than")
            share = 1.0 if before[1] == best else (before[1] - loss) / (before[1] - best)
            equal = math.exp(math.log(before[0]) + share * (math.log(at) - math.log(before[0])))
            return Slowdown(tokens / equal)
        before = (at, best)
    return Slowdown(tokens / curve[-1][0], "at most")


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
                statistics.t_interval(losses),
                {part: values for part, values in slow.items() if values},
            )
        )
    return found


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
