"""The plots of a page, as SVG text that takes its colours from the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from phf.report.chart import INK, Chart, Drawing, literal, number_text
from phf.scoring.inspection import Histogram, LengthBin, ThresholdEffect

COLOURS = ("#4477aa", "#ccbb44", "#228833", "#ee6677", "#aa3377", "#66ccee", "#997700", "#888888")
"""Paul Tol's bright scheme: distinct with any colour vision. Marker shapes differ too."""
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
DASHES = ("-", "--", ":", "-.")
ORDER = ("mle", "filtering", "conditional", "unlikelihood", "rwr", "awr", "masking", "sgtm")
"""The usual order of the objectives."""


@dataclass(frozen=True)
class Style:
    colour: str
    marker: str
    dash: str = "-"


@dataclass(frozen=True)
class Point:
    """A point of a curve, with the 95% interval of y if it has one."""

    x: float
    y: float
    ci95: tuple[float, float] | None = None


Curves = Mapping[str, Sequence[Point]]
"""Curves by their label."""


def styles(objective_of: Mapping[str, str]) -> dict[str, Style]:
    """The style of each group, from its objective: the objective decides the colour, marker and dash the group."""
    found: dict[str, Style] = {}
    for index, objective in enumerate(dict.fromkeys([*ORDER, *objective_of.values()])):
        same = [name for name, of_group in objective_of.items() if of_group == objective]
        for number, name in enumerate(same):
            marker = MARKERS[(index if len(same) == 1 else number) % len(MARKERS)]
            found[name] = Style(COLOURS[index % len(COLOURS)], marker, DASHES[number % len(DASHES)])
    return found


# Drawing


def _curves(chart: Chart, curves: Curves, looks: Mapping[str, Style], unit: str, at: Mapping[float, str] = {}) -> None:
    """Curves with markers, and bands where the points have intervals."""
    for name, points in curves.items():
        look = looks[name]
        chart.curve(
            name,
            look.colour,
            [p.x for p in points],
            [p.y for p in points],
            [p.ci95 for p in points],
            unit,
            [at.get(p.x, number_text(p.x)) for p in points],
            marker=look.marker,
            markersize=4,
            linewidth=1.4,
        )


# Comparing runs


@dataclass(frozen=True)
class Mark:
    """A group in a plot: its name, its number and that number's interval and seeds."""

    name: str
    mean: float
    ci95: tuple[float, float] | None
    points: tuple[float, ...] = ()


def _said(mark: Mark) -> str:
    within = "" if mark.ci95 is None else f" ({number_text(mark.ci95[0])} to {number_text(mark.ci95[1])})"
    return f"{number_text(mark.mean)}{within}"


def intervals(marks: Sequence[Mark | None], names: Sequence[str], looks: Mapping[str, Style], unit: str) -> Drawing:
    """Misalignment of each group with its 95% interval; lower is better. None: not judged."""
    chart = Chart(0.7 + 0.32 * len(names))
    axes = chart.axes
    for place, mark in enumerate(marks):
        if mark is None:
            continue
        look = looks[mark.name]
        number, gid = chart.add(mark.name, look.colour)
        if mark.ci95 is not None:
            bar = {"linewidth": 3, "solid_capstyle": "butt", "alpha": 0.6}
            axes.plot(mark.ci95, [place] * 2, color=look.colour, gid=gid, **bar)
        style = {"color": look.colour, "marker": look.marker, "markersize": 8, "linestyle": "none"}
        axes.plot([mark.mean], [place], clip_on=False, zorder=3, gid=gid, **style)
        if len(mark.points) > 1:
            ticks = {"marker": "|", "markersize": 10, "linestyle": "none"}
            axes.plot(mark.points, [place] * len(mark.points), color=INK, alpha=0.7, gid=gid, **ticks)
        chart.value(number, mark.mean, place, f"{mark.name}: {_said(mark)}")
    axes.set_yticks(range(len(names)), [literal(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)
    return chart.draw(f"{unit} (lower is better)", "", "Misalignment with 95% intervals", may_log="x")


def pareto(
    pairs: Sequence[tuple[Mark, Mark]],
    looks: Mapping[str, Style],
    first: str,
    second: str,
    better: str,
    dominated: set[str],
) -> Drawing:
    """Two measures of each group against each other, the first one on the upright axis, where lower is better.
    Dominated groups are hollow, the others are joined. `better`: whether a "lower" or a "higher" second one is better.
    """
    chart = Chart(3.0)
    axes = chart.axes
    front = []
    for y, x in pairs:
        look = looks[y.name]
        hollow = y.name in dominated
        number, gid = chart.add(y.name, look.colour)
        if y.ci95 is not None:
            axes.plot([x.mean] * 2, y.ci95, color=look.colour, linewidth=1.6, alpha=0.5, gid=gid)
        if x.ci95 is not None:
            axes.plot(x.ci95, [y.mean] * 2, color=look.colour, linewidth=1.6, alpha=0.5, gid=gid)
        axes.plot(
            [x.mean],
            [y.mean],
            marker=look.marker,
            color=look.colour,
            markersize=9,
            linestyle="none",
            clip_on=False,
            zorder=3,
            markerfacecolor="none" if hollow else look.colour,
            markeredgewidth=1.8,
            gid=gid,
        )
        chart.name_point(y.name, x.mean, y.mean, gid)
        chart.value(number, x.mean, y.mean, f"{y.name}: {first} {_said(y)}, {second} {_said(x)}")
        if not hollow:
            front.append((x.mean, y.mean))
    front.sort()
    axes.plot([x for x, _ in front], [y for _, y in front], color=INK, linewidth=0.9, linestyle=":", alpha=0.6)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.2)
    if front and min(x for x, _ in front) >= 0 > axes.get_xlim()[0]:
        axes.set_xlim(left=-0.03 * axes.get_xlim()[1])  # room for a marker at 0, not for negative costs
    if better == "higher":
        axes.invert_xaxis()
    return chart.draw(f"{second} ({better} is better)", f"{first} of samples", f"{first} against {second}", may_log="y")


def phases(groups: Mapping[str, Sequence[tuple[float, Mark]]]) -> Drawing:
    """Misalignment by the share of the tokens that had feedback: (share, misalignment) of each group, by objective."""
    chart = Chart(3.0)
    axes = chart.axes
    shares = sorted({round(share, 3) for rows in groups.values() for share, _ in rows}, reverse=True)
    names = [f"{100 * s:.0f}%" if s > 0.999 or s < 0.995 else "99%" for s in shares]
    for number, (objective, rows) in enumerate(groups.items()):
        if not rows:
            continue
        places = [shares.index(round(share, 3)) for share, _ in rows]
        gid = chart.curve(
            objective,
            COLOURS[number % len(COLOURS)],
            [place + 0.04 * (number - len(ORDER) / 2) for place in places],
            [mark.mean for _, mark in rows],
            at=[names[place] for place in places],
            unit=" with feedback",
            marker=MARKERS[number % len(MARKERS)],
            markersize=8,
            linewidth=1.2,
        )
        for place, (_, mark) in zip(places, rows, strict=True):
            if mark.ci95 is not None:
                low, high = mark.ci95
                at = place + 0.04 * (number - len(ORDER) / 2)
                bar = {"color": COLOURS[number % len(COLOURS)], "linewidth": 2.5, "alpha": 0.5}
                axes.plot([at, at], [max(low, 0), high], gid=gid, **bar)
    axes.set_xticks(range(len(shares)), names)
    axes.set_ylim(bottom=0)
    x_label = "share of the tokens with feedback (the last part of training)"
    return chart.draw(x_label, "misalignment of samples", "Feedback from the start or later", named=True, may_log="y")


def noise(curves: Curves) -> Drawing:
    """Misalignment divided by that of plain training, by the share of segments with a wrong score."""
    chart = Chart(3.0)
    _curves(chart, curves, styles({name: name for name in curves}), "% wrong")
    chart.axes.axhline(1, color=INK, linestyle="--", linewidth=1)
    chart.axes.set_ylim(0, 1.2 * max([1.0, *(p.y for points in curves.values() for p in points)]))
    x_label = "segments with a wrong score, %"
    return chart.draw(x_label, "ratio to plain training", "Errors of the scorer", named=True, may_log="y")


def tampered(curves: Curves, looks: Mapping[str, Style], steps: Sequence[int], plain: float | None) -> Drawing:
    """Misalignment by steps of finetuning. `plain`: that of plain training, as a line."""
    chart = Chart(3.0)
    places = {step: n for n, step in enumerate(steps)}
    moved = {name: [replace(p, x=places[int(p.x)]) for p in points] for name, points in curves.items()}
    _curves(chart, moved, looks, " steps", {n: f"{step:,}" for n, step in enumerate(steps)})
    if plain is not None:
        chart.axes.axhline(plain, color=INK, linestyle="--", linewidth=1)
    chart.axes.set_xticks(range(len(steps)), [f"{step:,}" for step in steps])
    chart.axes.set_ylim(bottom=0)
    return chart.draw("steps of finetuning", "misalignment", "Misalignment under finetuning", named=True, may_log="y")


def exposure(curves: Curves, looks: Mapping[str, Style]) -> Drawing:
    """Exposure of canaries by the number of their copies."""
    chart = Chart(3.0)
    chart.axes.set_xscale("log", base=2)
    _curves(chart, curves, looks, " copies")
    times = sorted({p.x for points in curves.values() for p in points})
    chart.axes.set_xticks(times, [f"{t:g}" for t in times])
    chart.axes.axhline(math.log2(math.e), color=INK, linestyle="--", linewidth=1)
    chart.axes.set_ylim(bottom=0)
    return chart.draw("copies in the corpus", "exposure in bits", "Exposure of canaries", named=True)


def losses(curves: Curves, looks: Mapping[str, Style]) -> Drawing:
    """Training loss over million tokens. Objectives have losses of their own, so only the shapes compare."""
    chart = Chart(3.0)
    for name, points in curves.items():
        look = looks[name]
        x = [p.x for p in points]
        y = [p.y for p in points]
        chart.curve(name, look.colour, x, y, unit="M tokens", linestyle=look.dash, linewidth=1.4)
    return chart.draw("million target tokens", "training loss", "Training loss over tokens", named=True, may_log="y")


def monitored(curves: Curves, looks: Mapping[str, Style], title: str) -> Drawing:
    """What was judged during training, over million tokens."""
    chart = Chart(3.0)
    _curves(chart, curves, looks, "M tokens")
    return chart.draw("million target tokens", title, f"{title} over tokens", named=True, may_log="y")


def attacks(curves: Curves, looks: Mapping[str, Style], title: str) -> Drawing:
    """A measure of red-teaming after each round, with 95% bands over trials."""
    chart = Chart(3.0)
    rounds = range(1 + max((int(p.x) for points in curves.values() for p in points), default=0))
    _curves(chart, curves, looks, "", {n: f"round {n}" for n in rounds})
    chart.axes.xaxis.get_major_locator().set_params(integer=True)
    chart.axes.set_ylim(bottom=0)
    return chart.draw("round (0: the starting prompts)", title, title, named=True, may_log="y")


def distributions(scores: Mapping[str, Sequence[float]], looks: Mapping[str, Style], unit: str) -> Drawing:
    """Share of samples that score above x, by group."""
    chart = Chart(3.0)
    for name, found in scores.items():
        look = looks[name]
        x = sorted(found)
        n = len(found)
        if n:
            shares = [100.0, *(100 * (n - i - 1) / n for i in range(n))]
            at = [f"above {number_text(v)}" for v in [0, *x]]
            style: Any = {"linestyle": look.dash, "linewidth": 1.5, "drawstyle": "steps-post"}
            chart.curve(name, look.colour, [0, *x], shares, at=at, **style)
    chart.axes.set_ylim(0, 100)
    chart.axes.set_xlim(left=0)
    x_label = f"score of a sample ({unit})"
    return chart.draw(x_label, "% of samples above it", "Distribution of scores", named=True, may_log="y")


# Scores of a corpus


def histogram(bins: Histogram, label: str, line: float) -> Drawing:
    """Counts of scores above 0. `line`: a score that is marked."""
    chart = Chart(2.8)
    axes = chart.axes
    if bins.counts:
        if bins.log:
            axes.set_xscale("log")
        number, gid = chart.add("count", COLOURS[0])
        axes.stairs(bins.counts, bins.edges, fill=True, color=COLOURS[0], alpha=0.75, gid=gid)
        for low, high, count in zip(bins.edges, bins.edges[1:], bins.counts, strict=False):
            middle = math.sqrt(low * high) if bins.log else (low + high) / 2
            chart.value(number, middle, count, f"{number_text(low)} to {number_text(high)}: {count:,}")
        if bins.edges[0] <= line <= bins.edges[-1]:
            axes.axvline(line, color=INK, linestyle="--", linewidth=1)
        axes.set_ylim(bottom=0)
    else:
        axes.text(0.5, 0.5, "no score above 0", transform=axes.transAxes, ha="center", color=INK)
    return chart.draw(label, "count", f"Histogram: {label}", may_log="y")


def thresholds(rows: Sequence[ThresholdEffect]) -> Drawing:
    """What thresholds call bad, in per cent."""
    chart = Chart(3.0)
    at = [row.threshold for row in rows]
    if at[-1] > 100 * max(min((t for t in at if t > 0), default=1), 1e-12):
        chart.axes.set_xscale("symlog", linthresh=min(t for t in at if t > 0))
    unit = "characters" if rows[0].bad_tokens is None else "tokens"
    lines = {
        f"bad {unit}": [row.bad_chars if row.bad_tokens is None else row.bad_tokens for row in rows],
        "documents with one": [row.documents_with_bad for row in rows],
        "documents kept": [row.documents_kept_by_filtering for row in rows],
    }
    for place, (name, shares) in enumerate(lines.items()):
        style: Any = {"marker": MARKERS[place], "markersize": 3}
        said = [f"threshold {number_text(t)}" for t in at]
        chart.curve(name, COLOURS[place], at, [100 * share for share in shares], at=said, **style)
    chart.axes.set_ylim(0, 100)
    return chart.draw("threshold", "%", "What thresholds call bad", named=True)


def by_length(rows: Sequence[LengthBin]) -> Drawing:
    """Mean score of the segments in each tenth by length."""
    chart = Chart(3.0)
    names = [f"{row.chars_from:,}–{row.chars_to:,}" for row in rows]
    number, gid = chart.add("mean score", COLOURS[0])
    for place, (row, name) in enumerate(zip(rows, names, strict=True)):
        chart.axes.bar([place], [row.mean], color=COLOURS[0], alpha=0.75, gid=gid)
        chart.value(number, place, row.mean, f"{name} characters: {number_text(row.mean)}")
    chart.axes.set_xticks(range(len(rows)), [literal(name) for name in names], rotation=30, ha="right")
    return chart.draw("characters of the segment", "mean score", "Mean score by length of the segment")
