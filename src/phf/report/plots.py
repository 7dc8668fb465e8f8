"""The plots of a page, as SVG text that takes its colours from the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import escape

from phf.core.types import Estimate
from phf.scoring.inspection import Histogram, LengthBin, ThresholdEffect

COLOURS = ("#4477aa", "#ccbb44", "#228833", "#ee6677", "#aa3377", "#66ccee", "#997700", "#888888")
"""Paul Tol's bright scheme: distinct with any colour vision. Marker shapes differ too."""
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
DASHES = ("-", "--", ":", "-.")
ORDER = ("mle", "filtering", "conditional", "unlikelihood", "rwr", "awr", "masking", "sgtm")
"""The usual order of the objectives."""
MANY = 10
"""Entries of a legend from which on it is small and in two columns."""
INK = "#010203"
"""Stands for the page's text colour until the SVG is written."""


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


def _axes(width: float, height: float) -> tuple[Any, Any]:
    """(figure, axes) of matplotlib, without its global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(INK)
    axes.tick_params(colors=INK, labelcolor=INK)
    axes.grid(True, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def literal(text: str) -> str:
    """`text` as matplotlib shows it unchanged: between two dollar signs it would read a formula."""
    return text.replace("$", r"\$")


def _svg(figure: Any, label: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<svg height="[^"]*"', "<svg", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    return svg.replace(INK, "currentColor")


def _finish(figure: Any, axes: Any, x: str, y: str, label: str, legend: bool = False) -> str:
    """The SVG, with the axes labelled."""
    axes.set_xlabel(literal(x), color=INK)
    axes.set_ylabel(literal(y), color=INK)
    if legend:
        many = len(axes.get_legend_handles_labels()[1]) > MANY
        shown = axes.legend(frameon=False, labelcolor=INK, fontsize=5 if many else 8, ncols=2 if many else 1)
        shown.set_in_layout(not many)  # a legend higher than the plot would leave no room for it
    return _svg(figure, label)


def _curves(axes: Any, curves: Curves, looks: Mapping[str, Style]) -> None:
    """Curves with markers, and bands where the points have intervals."""
    for name, points in curves.items():
        look = looks[name]
        x = [p.x for p in points]
        style = {"color": look.colour, "marker": look.marker, "markersize": 4, "linewidth": 1.4}
        axes.plot(x, [p.y for p in points], label=literal(name), **style)
        banded = [(p.x, *p.ci95) for p in points if p.ci95 is not None]
        if banded:
            at, low, high = zip(*banded, strict=True)
            axes.fill_between(at, low, high, color=look.colour, alpha=0.15, linewidth=0)


# Comparing runs


@dataclass(frozen=True)
class Mark:
    """A group in a plot: its name, its number and that number's interval and seeds."""

    name: str
    mean: float
    ci95: tuple[float, float] | None
    points: tuple[float, ...] = ()


def intervals(marks: Sequence[Mark | None], names: Sequence[str], looks: Mapping[str, Style], unit: str) -> str:
    """Misalignment of each group with its 95% interval; lower is better. None: not judged."""
    figure, axes = _axes(6.4, 0.8 + 0.4 * len(names))
    for place, mark in enumerate(marks):
        if mark is None:
            continue
        look = looks[mark.name]
        if mark.ci95 is not None:
            axes.plot(mark.ci95, [place] * 2, color=look.colour, linewidth=3, solid_capstyle="butt", alpha=0.6)
        style = {"color": look.colour, "marker": look.marker, "markersize": 8, "linestyle": "none"}
        axes.plot([mark.mean], [place], clip_on=False, zorder=3, **style)
        if len(mark.points) > 1:
            ticks = {"marker": "|", "markersize": 10, "linestyle": "none"}
            axes.plot(mark.points, [place] * len(mark.points), color=INK, alpha=0.7, **ticks)
    axes.set_yticks(range(len(names)), [literal(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)
    return _finish(figure, axes, f"{unit} in samples (lower is better)", "", "Misalignment with 95% intervals")


def pareto(
    pairs: Sequence[tuple[Mark, Mark]],
    looks: Mapping[str, Style],
    first: str,
    second: str,
    better: str,
    dominated: set[str],
) -> str:
    """Two measures of each group against each other, the first one on the upright axis, where lower is better.
    Dominated groups are hollow, the others are joined. `better`: whether a "lower" or a "higher" second one is better.
    """
    figure, axes = _axes(6.4, 3.6)
    front = []
    for y, x in pairs:
        look = looks[y.name]
        hollow = y.name in dominated
        if y.ci95 is not None:
            axes.plot([x.mean] * 2, y.ci95, color=look.colour, linewidth=1.6, alpha=0.5)
        if x.ci95 is not None:
            axes.plot(x.ci95, [y.mean] * 2, color=look.colour, linewidth=1.6, alpha=0.5)
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
        )
        offset = {"textcoords": "offset points", "xytext": (8, 5)}
        axes.annotate(literal(y.name), (x.mean, y.mean), color=INK, fontsize=9, **offset)
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
    return _finish(figure, axes, f"{second} ({better} is better)", f"{first} of samples", f"{first} against {second}")


def phases(groups: Mapping[str, Sequence[tuple[float, Mark]]]) -> str:
    """Misalignment by the share of the tokens that had feedback: (share, misalignment) of each group, by objective."""
    figure, axes = _axes(6.4, 3.4)
    shares = sorted({round(share, 3) for rows in groups.values() for share, _ in rows}, reverse=True)
    for number, (objective, rows) in enumerate(groups.items()):
        if not rows:
            continue
        colour = COLOURS[number % len(COLOURS)]
        marker = MARKERS[number % len(MARKERS)]
        x = [shares.index(round(share, 3)) + 0.04 * (number - len(ORDER) / 2) for share, _ in rows]
        y = [mark.mean for _, mark in rows]
        axes.plot(x, y, color=colour, marker=marker, markersize=8, linewidth=1.2, label=literal(objective))
        for at, (_, mark) in zip(x, rows, strict=True):
            if mark.ci95 is not None:
                low, high = mark.ci95
                axes.plot([at, at], [max(low, 0), high], color=colour, linewidth=2.5, alpha=0.5)
    axes.set_xticks(range(len(shares)), [f"{100 * s:.0f}%" if s > 0.999 or s < 0.995 else "99%" for s in shares])
    axes.set_ylim(bottom=0)
    x_label = "share of the tokens with feedback (the last part of training)"
    return _finish(figure, axes, x_label, "misalignment of samples", "Feedback from the start or later", legend=True)


def noise(curves: Curves) -> str:
    """Misalignment divided by that of plain training, by the share of segments with a wrong score."""
    figure, axes = _axes(6.4, 3.4)
    _curves(axes, curves, styles({name: name for name in curves}))
    axes.axhline(1, color=INK, linestyle="--", linewidth=1)
    axes.set_ylim(0, 1.2 * max([1.0, *(p.y for points in curves.values() for p in points)]))
    x_label = "segments with a wrong score, %"
    return _finish(figure, axes, x_label, "ratio to plain training", "Errors of the scorer", legend=True)


def tampered(curves: Curves, looks: Mapping[str, Style], steps: Sequence[int], plain: float | None) -> str:
    """Misalignment by steps of finetuning. `plain`: that of plain training, as a line."""
    figure, axes = _axes(6.4, 3.2)
    places = {step: n for n, step in enumerate(steps)}
    at = {name: [replace(p, x=places[int(p.x)]) for p in points] for name, points in curves.items()}
    _curves(axes, at, looks)
    if plain is not None:
        axes.axhline(plain, color=INK, linestyle="--", linewidth=1)
    axes.set_xticks(range(len(steps)), [f"{step:,}" for step in steps])
    axes.set_ylim(bottom=0)
    return _finish(figure, axes, "steps of finetuning", "misalignment", "Misalignment under finetuning", legend=True)


def exposure(curves: Curves, looks: Mapping[str, Style]) -> str:
    """Exposure of canaries by the number of their copies."""
    figure, axes = _axes(6.4, 3.2)
    axes.set_xscale("log", base=2)
    _curves(axes, curves, looks)
    times = sorted({p.x for points in curves.values() for p in points})
    axes.set_xticks(times, [f"{t:g}" for t in times])
    axes.axhline(math.log2(math.e), color=INK, linestyle="--", linewidth=1)
    axes.set_ylim(bottom=0)
    return _finish(figure, axes, "copies in the corpus", "exposure in bits", "Exposure of canaries", legend=True)


def losses(curves: Curves, looks: Mapping[str, Style]) -> str:
    """Training loss over million tokens. Objectives have losses of their own, so only the shapes compare."""
    figure, axes = _axes(6.4, 3.4)
    for name, points in curves.items():
        look = looks[name]
        style = {"color": look.colour, "linestyle": look.dash, "linewidth": 1.4}
        axes.plot([p.x for p in points], [p.y for p in points], label=literal(name), **style)
    return _finish(figure, axes, "million target tokens", "training loss", "Training loss over tokens", legend=True)


def monitored(curves: Curves, looks: Mapping[str, Style], title: str) -> str:
    """What was judged during training, over million tokens."""
    figure, axes = _axes(6.4, 3.2)
    _curves(axes, curves, looks)
    return _finish(figure, axes, "million target tokens", title, f"{title} over tokens", legend=True)


def attacks(runs: Sequence[tuple[str, Sequence[Estimate]]], looks: Mapping[str, Style], title: str) -> str:
    """A measure of red-teaming after each round, with 95% bands over trials: (label, estimates) of each run."""
    figure, axes = _axes(6.4, 3.2)
    curves = {label: [p for n, e in enumerate(found) if (p := _round(n, e)) is not None] for label, found in runs}
    _curves(axes, curves, looks)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    return _finish(figure, axes, "round (0: the starting prompts)", title, title, legend=True)


def _round(number: int, estimate: Estimate) -> Point | None:
    low, high = estimate.ci95
    if math.isnan(estimate.mean):
        return None
    return Point(number, estimate.mean, None if math.isnan(low) else (max(low, 0), high))


def distributions(scores: Mapping[str, Sequence[float]], looks: Mapping[str, Style], unit: str) -> str:
    """Share of samples that score above x, by group."""
    figure, axes = _axes(6.4, 3.2)
    for name, found in scores.items():
        look = looks[name]
        x = sorted(found)
        n = len(found)
        if n:
            shares = [100.0, *(100 * (n - i - 1) / n for i in range(n))]
            style = {"color": look.colour, "linestyle": look.dash, "linewidth": 1.5}
            axes.step([0, *x], shares, where="post", label=literal(name), **style)
    axes.set_ylim(0, 100)
    axes.set_xlim(left=0)
    x_label = f"score of a sample ({unit})"
    return _finish(figure, axes, x_label, "% of samples above it", "Distribution of scores", legend=True)


# Scores of a corpus


def histogram(bins: Histogram, label: str, line: float) -> str:
    """Counts of scores above 0. `line`: a score that is marked."""
    figure, axes = _axes(6.4, 3.0)
    if bins.counts:
        if bins.log:
            axes.set_xscale("log")
        axes.stairs(bins.counts, bins.edges, fill=True, color=COLOURS[0], alpha=0.75)
        if bins.edges[0] <= line <= bins.edges[-1]:
            axes.axvline(line, color=INK, linestyle="--", linewidth=1)
        axes.set_ylim(bottom=0)
    else:
        axes.text(0.5, 0.5, "no score above 0", transform=axes.transAxes, ha="center", color=INK)
    return _finish(figure, axes, label, "count", f"Histogram: {label}")


def thresholds(rows: Sequence[ThresholdEffect]) -> str:
    """What thresholds call bad, in per cent."""
    figure, axes = _axes(6.4, 3.2)
    at = [row.threshold for row in rows]
    if at[-1] > 100 * max(min((t for t in at if t > 0), default=1), 1e-12):
        axes.set_xscale("symlog", linthresh=min(t for t in at if t > 0))
    unit = "characters" if rows[0].bad_tokens is None else "tokens"
    lines = {
        f"bad {unit}": [row.bad_chars if row.bad_tokens is None else row.bad_tokens for row in rows],
        "documents with a bad segment": [row.documents_with_bad for row in rows],
        "documents that filtering keeps": [row.documents_kept_by_filtering for row in rows],
    }
    for place, (name, shares) in enumerate(lines.items()):
        style = {"color": COLOURS[place], "marker": MARKERS[place], "markersize": 3}
        axes.plot(at, [100 * share for share in shares], label=literal(name), **style)
    axes.set_ylim(0, 100)
    return _finish(figure, axes, "threshold", "%", "What thresholds call bad", legend=True)


def by_length(rows: Sequence[LengthBin]) -> str:
    """Mean score of the segments in each tenth by length."""
    figure, axes = _axes(6.4, 3.2)
    names = [f"{row.chars_from:,}–{row.chars_to:,}" for row in rows]
    axes.bar(range(len(rows)), [row.mean for row in rows], color=COLOURS[0], alpha=0.75)
    axes.set_xticks(range(len(rows)), [literal(name) for name in names], rotation=30, ha="right", fontsize=8)
    x_label = "characters of the segment"
    return _finish(figure, axes, x_label, "mean score", "Mean score by length of the segment")
