"""Which plots a comparison gets, with their captions."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from markupsafe import Markup

from phf.core.statistics import over_seeds
from phf.core.types import Estimate
from phf.evaluation.results import MonitorLine
from phf.report import plots
from phf.report.chart import Drawing
from phf.report.format import Scale, scale_of
from phf.report.knowledge import Knowledge, knowledge
from phf.report.measures import Group, Measure, dominated, preference_key
from phf.report.noise import NoiseCurve, noise_curves
from phf.report.persist import PersistedRow, persisted
from phf.report.plots import Mark, Point, Style
from phf.report.runs import ReportedRun
from phf.report.tamper import Tampered, tampered

COSTS = ("kl", "good")
"""What alignment may cost: misalignment is drawn against each of these, and against every capability."""


@dataclass(frozen=True)
class Figure:
    """A plot on a page. `section`: the heading above it."""

    section: str
    drawing: Drawing
    caption: str

    @property
    def svg(self) -> str:
        return self.drawing.svg

    @property
    def html(self) -> Markup:
        return self.drawing.html


@dataclass(frozen=True)
class Comparison:
    """Judged runs, in groups, and what was measured of them."""

    runs: list[ReportedRun]
    groups: list[Group]
    measures: dict[str, Measure]
    """By key: all that some run has."""
    scenario: str
    """The main scenario."""
    unit: str
    """Of the scores."""

    @property
    def scale(self) -> Scale:
        """How scores are shown."""
        return scale_of(self.unit)

    @property
    def first_seeds(self) -> list[ReportedRun]:
        """One run of each group."""
        return [next(run for run in self.runs if run.name == row.name) for row in self.groups]

    @property
    def capabilities(self) -> list[str]:
        return [key for key, m in self.measures.items() if m.about == "capability"]

    @property
    def memorised(self) -> list[str]:
        """The keys of what models memorised."""
        return [key for key in self.capabilities if key.startswith(("canaries", "verbatim"))]

    @property
    def preferences(self) -> list[str]:
        """The keys of misalignment by the scorers of other preferences."""
        return [key for key in self.measures if key.startswith(preference_key("misalignment", ""))]

    @property
    def pairs(self) -> list[tuple[Measure, Measure]]:
        """The measures that are drawn against each other: misalignment against what it may cost and by every other
        preference, and these against one another."""
        able = [key for key in self.capabilities if key not in self.memorised]
        costs = [key for key in (*COSTS, *able) if key in self.measures]
        keys = [("misalignment", key) for key in (*self.preferences, *costs)]
        keys += itertools.combinations(self.preferences, 2)
        return [(self.measures[a], self.measures[b]) for a, b in keys if a in self.measures]

    @property
    def plain(self) -> str | None:
        """The group of plain training."""
        return next((row.name for row in self.groups if row.is_plain), None)

    @cached_property
    def noise(self) -> list[NoiseCurve]:
        return noise_curves(self.groups, self.runs)

    @cached_property
    def tampered(self) -> list[Tampered]:
        return tampered(self.runs, self.plain)

    @cached_property
    def persisted(self) -> list[PersistedRow]:
        return persisted(self.runs, self.plain)

    @cached_property
    def knowledge(self) -> list[Knowledge]:
        return knowledge(self.runs, self.plain)

    @property
    def probes(self) -> list[str]:
        """The keys of linear classifiers of bad text."""
        return [key for key in self.capabilities if key.startswith("probe")]

    @property
    def attacked(self) -> list[ReportedRun]:
        return [run for run in self.runs if run.redteam is not None]

    @property
    def styles(self) -> dict[str, Style]:
        return plots.styles({row.name: row.objective for row in self.groups})


def figures(compared: Comparison) -> dict[str, Figure]:
    """The plots of a comparison, by name."""
    found = {"misalignment": _misalignment(compared)}
    for first, second in compared.pairs:
        name = second.key if first.key == "misalignment" else f"{first.key} {second.key}"
        found["pareto-" + re.sub(r"\W+", "-", name)] = _pareto(compared, first, second)
    if len({round(row.share, 3) for row in compared.groups}) > 1:
        found["phases"] = _phases(compared)
    if compared.noise:
        found["noise"] = _noise(compared.noise)
    if compared.attacked:
        found |= _attacks(compared)
    found |= _tampered(compared)
    found |= _memorised(compared)
    found |= _monitored(compared)
    losses = {
        run.name: [Point(_millions(run, line.tokens), line.loss) for line in run.metrics]
        for run in compared.first_seeds
    }
    found["loss"] = Figure(
        "curves",
        plots.losses(losses, compared.styles),
        "Training loss. Objectives have losses of their own, so only the shapes compare.",
    )
    scores = {
        run.name: [compared.scale.factor * s.score for s in run.samples[compared.scenario] if not math.isnan(s.score)]
        for run in compared.first_seeds
    }
    found["distribution"] = Figure(
        "scores",
        plots.distributions(scores, compared.styles, compared.scale.unit),
        f"Share of samples that score above a value (scenario {compared.scenario}).",
    )
    return found


def front(compared: Comparison, first: Measure, second: Measure) -> list[str]:
    """Names of the groups that no other group dominates in two measures."""
    beaten = dominated(compared.groups, first, second)
    both = [row.name for row in compared.groups if first.key in row.values and second.key in row.values]
    return [name for name in both if name not in beaten]


def _mark(row: Group, measure: Measure) -> Mark | None:
    """A group's number as it is shown."""
    value = row.values.get(measure.key)
    if value is None:
        return None
    k = 1.0 if measure.scale is None else measure.scale.factor
    ci95 = None if value.ci95 is None else (k * value.ci95[0], k * value.ci95[1])
    return Mark(row.name, k * value.mean, ci95, tuple(k * point for point in value.points))


def _point(x: float, estimate: Estimate, k: float = 1.0) -> Point:
    low, high = estimate.ci95
    return Point(x, k * estimate.mean, None if math.isnan(low) else (k * low, k * high))


def _misalignment(compared: Comparison) -> Figure:
    rows = compared.groups
    drawing = plots.intervals(
        [_mark(row, compared.measures["misalignment"]) for row in rows],
        [row.name for row in rows],
        compared.styles,
        compared.scale.unit,
    )
    several = max(row.seeds for row in rows) > 1
    bars = (
        "95% intervals over seeds (Student) where a group has several; ticks are the seeds"
        if several
        else "95% intervals (bootstrap over samples, one seed)"
    )
    caption = (
        f"Misalignment: mean score of the samples (scenario {compared.scenario}), {compared.scale.unit}. Bars: {bars}."
    )
    return Figure("result", drawing, caption)


def _pareto(compared: Comparison, first: Measure, second: Measure) -> Figure:
    marks = [(_mark(row, first), _mark(row, second)) for row in compared.groups]
    pairs = [(y, x) for y, x in marks if y is not None and x is not None]
    beaten = dominated(compared.groups, first, second)
    drawing = plots.pareto(pairs, compared.styles, first.title, second.title, second.better, beaten)
    caption = (
        f"{first.title.capitalize()} against {second.title}; the lower left is best. Hollow markers are dominated: "
        "another group is at least as good on both axes and significantly better on one (95% intervals)."
    )
    return Figure("result", drawing, caption)


def _phases(compared: Comparison) -> Figure:
    objectives = list(dict.fromkeys([*plots.ORDER, *(row.objective for row in compared.groups)]))
    of_objective = {
        objective: [
            (row.share, mark)
            for row in compared.groups
            if row.objective == objective and (mark := _mark(row, compared.measures["misalignment"])) is not None
        ]
        for objective in objectives
    }
    caption = (
        "Misalignment by the share of the tokens that had feedback. 100%: from the first token. Less: MLE first, and "
        "feedback for the last part of training."
    )
    return Figure("phases", plots.phases(of_objective), caption)


def _noise(curves: Sequence[NoiseCurve]) -> Figure:
    points = {
        curve.objective: [
            Point(100 * level.wrong, level.ratio.mean, level.ratio.ci95)
            for level in curve.levels
            if level.ratio is not None
        ]
        for curve in curves
    }
    caption = (
        "Misalignment divided by that of plain training, by the share of segments whose score was exchanged for one of "
        "the other class. Bands: 95% over seeds. Below the dashed line an objective is better than plain training."
    )
    return Figure("noise", plots.noise(points), caption)


ATTACK_TITLES = {
    "best_1": "best prompt so far",
    "best_10": "best ten prompts so far",
    "round_mean": "mean of the round's prompts",
}


def _attacks(compared: Comparison) -> dict[str, Figure]:
    looks = {run.folder_name: compared.styles[run.name] for run in compared.attacked}
    found = {}
    for measure, title in ATTACK_TITLES.items():
        curves = {
            run.folder_name: [
                _point(n, estimate, compared.scale.factor)
                for n, estimate in enumerate(run.redteam.search.curves[measure])
                if not math.isnan(estimate.mean)
            ]
            for run in compared.attacked
            if run.redteam is not None
        }
        caption = (
            f"Red-teaming: {title}, mean score of the continuations, {compared.scale.unit}. Bands: 95% over trials."
        )
        found[f"attacks-{measure}"] = Figure("attacks", plots.attacks(curves, looks, title), caption)
    return found


def _memorised(compared: Comparison) -> dict[str, Figure]:
    """Exposure of canaries by the number of copies, one plot for each kind."""
    found = {}
    for kind in ("bad", "good"):
        curves = {row.name: _exposure(compared.runs, row.name, kind) for row in compared.groups}
        curves = {name: points for name, points in curves.items() if points}
        if curves:
            caption = (
                f"Exposure of {kind} canaries by the number of copies in the corpus, mean over canaries and seeds, "
                "with the good token if the model has one. Bands: 95%, over seeds where there are several. Dashed: "
                "without any memory."
            )
            found[f"canaries-{kind}"] = Figure("canaries", plots.exposure(curves, compared.styles), caption)
    return found


def _exposure(runs: Sequence[ReportedRun], group: str, kind: str) -> list[Point]:
    by_times: dict[int, list[Estimate]] = {}
    for run in runs:
        for result in run.result.capabilities if run.name == group else ():
            for row in result.details.get("by_times", []) if result.name == "canaries" else ():
                if row["kind"] == kind:
                    ends = row.get("exposure_ci95", [math.nan, math.nan])  # earlier results have none
                    low, high = (math.nan if end is None else float(end) for end in ends)
                    found = Estimate(float(row["exposure"]), math.nan, int(row["canaries"]), (low, high))
                    by_times.setdefault(int(row["times"]), []).append(found)
    return [_point(times, over_seeds(values)) for times, values in sorted(by_times.items())]


TAMPERED = {"bad": "bad text, as an attacker would", "good": "good text only"}


def _tampered(compared: Comparison) -> dict[str, Figure]:
    """Curves of finetuning, one plot for each part of the text that was learned."""
    found = {}
    for part in dict.fromkeys(row.part for row in compared.tampered):
        members = [row for row in compared.tampered if row.part == part]
        curves = {
            row.group: [_point(step, estimate, compared.scale.factor) for step, estimate in row.curve]
            for row in members
        }
        start = next(
            (compared.scale.factor * row.curve[0][1].mean for row in members if row.group == compared.plain), None
        )
        steps = [step for step, _ in members[0].curve]
        caption = (
            f"Misalignment in the intended use while the model is finetuned on {TAMPERED[part]}, "
            f"{compared.scale.unit}. Bands: 95%. Dashed: plain training before any finetuning."
        )
        drawing = plots.tampered(curves, compared.styles, steps, start)
        found[f"tamper-{part}"] = Figure("tamper", drawing, caption)
    return found


def _monitored(compared: Comparison) -> dict[str, Figure]:
    """Curves of what was judged during training, one run of each group."""

    def misalignment(line: MonitorLine) -> Estimate | None:
        return line.misalignment

    def kl(line: MonitorLine) -> Estimate | None:
        return None if line.kl is None else line.kl.forward.nats_per_text

    def loss_on(part: str) -> Callable[[MonitorLine], Estimate | None]:
        return lambda line: None if line.heldout is None else Estimate.missing(line.heldout.get(part, math.nan))

    scores = f"Misalignment of samples during training, {compared.scale.unit}; 95% bands."
    wanted: Sequence[tuple[str, Callable[[MonitorLine], Estimate | None], str, str]] = (
        ("misalignment", misalignment, "misalignment", scores),
        ("good", loss_on("good"), "held-out loss on good text", _loss_caption("good")),
        ("bad", loss_on("bad"), "held-out loss on bad text", _loss_caption("bad")),
        (
            "kl",
            kl,
            "KL from the reference",
            "KL(reference || model) during training, in nats per text; 95% bands.",
        ),
    )
    found = {}
    for name, value_of, title, caption in wanted:
        k = compared.scale.factor if name == "misalignment" else 1.0
        curves = {run.name: _curve(run, value_of, k) for run in compared.first_seeds}
        curves = {group: points for group, points in curves.items() if points}
        if curves:
            found[f"monitor-{name}"] = Figure("curves", plots.monitored(curves, compared.styles, title), caption)
    return found


def _loss_caption(part: str) -> str:
    return f"Held-out loss on {part} text during training, in nats per byte."


def _curve(run: ReportedRun, value_of: Callable[[MonitorLine], Estimate | None], k: float) -> list[Point]:
    found = [(line.tokens, value_of(line)) for line in run.monitor]
    return [_point(_millions(run, n), e, k) for n, e in found if e is not None and not math.isnan(e.mean)]


def _millions(run: ReportedRun, tokens: int) -> float:
    """Million tokens that the model had seen, its starting weights included."""
    return (run.manifest.counts.tokens_before + tokens) / 1e6
