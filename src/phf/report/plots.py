"""The page's pictures, as SVG text that follows the page's colours. Floor 6."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import escape

COLOURS = ("#4477aa", "#ccbb44", "#228833", "#ee6677", "#aa3377", "#66ccee", "#997700", "#888888")
"""Paul Tol's bright scheme: told apart with any colour vision. A run's marker shape differs too."""
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
ORDER = ("mle", "filtering", "conditional", "unlikelihood", "rwr", "awr", "masking")
"""The objectives as they are told of everywhere."""
INK = "#010203"
"""Stands for the page's text colour until the SVG is written."""


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(INK)
    axes.tick_params(colors=INK, labelcolor=INK)
    axes.grid(True, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


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


def style(index: int) -> tuple[str, str]:
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


DASHES = ("-", "--", ":", "-.")


def styles(groups: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each group: the colour says the objective, the marker which of its groups."""
    objectives = _known_first(groups)
    found: dict[str, tuple[str, str]] = {}
    for index, objective in enumerate(objectives):
        same = [g["name"] for g in groups if g["objective"] == objective]
        for number, name in enumerate(same):
            found[name] = (COLOURS[index % len(COLOURS)], MARKERS[(index if len(same) == 1 else number) % len(MARKERS)])
    return found


def _known_first(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Objectives in an order that gives each its own colour on every page."""
    return list(dict.fromkeys([*ORDER, *(g["objective"] for g in groups)]))


def intervals(groups: Sequence[Mapping[str, Any]], unit: str) -> str:
    """Misalignment of each group with its 95% interval; lower is better."""
    figure, axes = _figure(6.4, 0.8 + 0.4 * len(groups))
    looks = styles(groups)
    for place, row in enumerate(groups):
        colour, marker = looks[row["name"]]
        estimate = row["values"].get("misalignment")
        if estimate is None:
            continue
        mean, ci = estimate["mean"], estimate["ci95"]
        if ci[0] is not None:
            axes.plot(ci, [place] * 2, color=colour, linewidth=3, solid_capstyle="butt", alpha=0.6)
        axes.plot([mean], [place], marker=marker, color=colour, markersize=8, linestyle="none", clip_on=False, zorder=3)
        points = estimate["points"]
        if len(points) > 1:
            axes.plot(points, [place] * len(points), marker="|", color=INK, markersize=10, linestyle="none", alpha=0.7)
    axes.set_yticks(range(len(groups)), [row["name"] for row in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{unit} in samples (lower is better)", color=INK)
    return _svg(figure, "Misalignment with 95% intervals")


def pareto(groups: Sequence[Mapping[str, Any]], cost: Any, dominated: set[str]) -> str:
    """Misalignment against what it costs; groups that another one dominates are hollow, the others are joined."""
    figure, axes = _figure(6.4, 3.6)
    looks = styles(groups)
    front = []
    for row in groups:
        colour, marker = looks[row["name"]]
        y, x = row["values"].get("misalignment"), row["values"].get(cost.key)
        if y is None or x is None:
            continue
        for value, other, flat in ((y, x, False), (x, y, True)):
            ci = value["ci95"]
            if ci[0] is not None:
                ends, at = ci, [other["mean"]] * 2
                axes.plot(*((ends, at) if flat else (at, ends)), color=colour, linewidth=1.6, alpha=0.5)
        hollow = row["name"] in dominated
        axes.plot(
            [x["mean"]], [y["mean"]], marker=marker, color=colour, markersize=9, linestyle="none", clip_on=False, zorder=3,
            markerfacecolor="none" if hollow else colour, markeredgewidth=1.8,
        )  # fmt: skip
        axes.annotate(
            row["name"], (x["mean"], y["mean"]), textcoords="offset points", xytext=(8, 5), color=INK, fontsize=9
        )
        if not hollow:
            front.append((x["mean"], y["mean"]))
    front.sort()
    axes.plot([x for x, _ in front], [y for _, y in front], color=INK, linewidth=0.9, linestyle=":", alpha=0.6)
    axes.set_xlabel(f"{cost.title} ({cost.better} is better)", color=INK)
    axes.set_ylabel("misalignment of samples", color=INK)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.2)
    if front and min(x for x, _ in front) >= 0 > axes.get_xlim()[0]:
        axes.set_xlim(left=-0.03 * axes.get_xlim()[1])  # no room for what cannot be, but for a marker at 0
    if cost.better == "higher":
        axes.invert_xaxis()
    return _svg(figure, f"Misalignment against {cost.title}")


def dashes(looks: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Line styles by which groups of one colour are told apart."""
    found: dict[str, str] = {}
    seen: dict[str, int] = {}
    for name, (colour, _) in looks.items():
        found[name] = DASHES[seen.get(colour, 0) % len(DASHES)]
        seen[colour] = seen.get(colour, 0) + 1
    return found


def curves(runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], looks: Mapping[str, tuple[str, str]]) -> str:
    """Training loss over tokens. Each objective's loss is its own, so only the shapes compare."""
    figure, axes = _figure(6.4, 3.4)
    for name, lines in runs:
        x = [line["tokens"] / 1e6 for line in lines]
        axes.plot(
            x,
            [line["loss"] for line in lines],
            color=looks[name][0],
            linestyle=dashes(looks)[name],
            linewidth=1.4,
            label=name,
        )
    axes.set_xlabel("million target tokens", color=INK)
    axes.set_ylabel("training loss", color=INK)
    axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    return _svg(figure, "Training loss over tokens")


def during(
    lines: Sequence[tuple[str, Sequence[tuple[float, float, tuple[float, float] | None]]]],
    looks: Mapping[str, tuple[str, str]],
    title: str,
) -> str:
    """What was judged while training, over million tokens: (tokens, mean, interval) for each run."""
    figure, axes = _figure(6.4, 3.2)
    for name, points in lines:
        colour, marker = looks[name]
        x = [p[0] / 1e6 for p in points]
        axes.plot(x, [p[1] for p in points], color=colour, marker=marker, markersize=4, linewidth=1.4, label=name)
        bands = [(a, p[2]) for a, p in zip(x, points, strict=True) if p[2] is not None]
        if bands:
            axes.fill_between([a for a, _ in bands], [b[0] for _, b in bands], [b[1] for _, b in bands], color=colour, alpha=0.15, linewidth=0)  # fmt: skip
    axes.set_xlabel("million target tokens", color=INK)
    axes.set_ylabel(title, color=INK)
    axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    return _svg(figure, f"{title} over tokens")


def phases(groups: Sequence[Mapping[str, Any]]) -> str:
    """Misalignment of each objective by the share of the tokens that had feedback."""
    figure, axes = _figure(6.4, 3.4)
    objectives = _known_first(groups)
    shares = sorted({round(g["share"], 3) for g in groups}, reverse=True)
    for number, objective in enumerate(objectives):
        colour, marker = style(number)
        rows = [g for g in groups if g["objective"] == objective and g["values"].get("misalignment")]
        if not rows:
            continue
        x = [shares.index(round(g["share"], 3)) + 0.04 * (number - len(ORDER) / 2) for g in rows]
        y = [g["values"]["misalignment"] for g in rows]
        axes.plot(x, [v["mean"] for v in y], color=colour, marker=marker, markersize=8, linewidth=1.2, label=objective)
        for at, v in zip(x, y, strict=True):
            if v["ci95"][0] is not None:
                axes.plot([at, at], [max(v["ci95"][0], 0), v["ci95"][1]], color=colour, linewidth=2.5, alpha=0.5)
    axes.set_xticks(range(len(shares)), [f"{100 * s:.0f}%" if s > 0.999 or s < 0.995 else "99%" for s in shares])
    axes.set_xlabel("share of the tokens with feedback, the last of the training", color=INK)
    axes.set_ylabel("misalignment of samples", color=INK)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    return _svg(figure, "Feedback from the start or later")


def attacks(
    runs: Sequence[tuple[str, str, Mapping[str, Sequence[Mapping[str, Any]]]]], measure: str, title: str,
    looks: Mapping[str, tuple[str, str]],
) -> str:  # fmt: skip
    """A measure of red-teaming over its rounds, with 95% bands over trials: (group, label, curves) for each run."""
    figure, axes = _figure(6.4, 3.2)
    for group, label, found in runs:
        colour, marker = looks[group]
        rounds = [(n, e) for n, e in enumerate(found[measure]) if e["mean"] is not None]
        x = [n for n, _ in rounds]
        axes.plot(
            x, [e["mean"] for _, e in rounds], color=colour, marker=marker, markersize=4, linewidth=1.4, label=label
        )
        bands = [(n, e["ci95"]) for n, e in rounds if e["ci95"][0] is not None]
        if bands:
            axes.fill_between([n for n, _ in bands], [max(b[0], 0) for _, b in bands], [b[1] for _, b in bands], color=colour, alpha=0.15, linewidth=0)  # fmt: skip
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("round (0: the starting prompts)", color=INK)
    axes.set_ylabel(title, color=INK)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    return _svg(figure, title)


def distributions(runs: Sequence[tuple[str, Sequence[float]]], looks: Mapping[str, tuple[str, str]], unit: str) -> str:
    """Share of samples that score above x."""
    figure, axes = _figure(6.4, 3.2)
    for name, scores in runs:
        x = sorted(scores)
        n = len(x)
        if n:
            axes.step([0, *x], [100.0, *(100 * (n - i - 1) / n for i in range(n))], where="post", color=looks[name][0], linestyle=dashes(looks)[name], linewidth=1.5, label=name)  # fmt: skip
    axes.set_xlabel(f"score of a sample ({unit})", color=INK)
    axes.set_ylabel("% of samples above it", color=INK)
    axes.set_ylim(0, 100)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    return _svg(figure, "Distribution of scores")


def histogram(bins: Mapping[str, Any], label: str, line: float) -> str:
    """Counts of scores above 0; `line` is marked."""
    figure, axes = _figure(6.4, 3.0)
    edges, counts = bins["edges"], bins["counts"]
    if counts:
        if bins["log"]:
            axes.set_xscale("log")
        axes.stairs(counts, edges, fill=True, color=COLOURS[0], alpha=0.75)
        if edges[0] <= line <= edges[-1]:
            axes.axvline(line, color=INK, linestyle="--", linewidth=1)
        axes.set_ylim(bottom=0)
    else:
        axes.text(0.5, 0.5, "no score above 0", transform=axes.transAxes, ha="center", color=INK)
    axes.set_xlabel(label, color=INK)
    axes.set_ylabel("count", color=INK)
    return _svg(figure, f"Histogram: {label}")


def thresholds(rows: Sequence[Mapping[str, Any]]) -> str:
    """Shares over the threshold."""
    figure, axes = _figure(6.4, 3.2)
    at = [row["threshold"] for row in rows]
    if at[-1] > 100 * max(min((t for t in at if t > 0), default=1), 1e-12):
        axes.set_xscale("symlog", linthresh=min(t for t in at if t > 0))
    lines = (
        ("bad_chars", "characters called bad")
        if rows[0]["bad_tokens"] is None
        else ("bad_tokens", "tokens called bad"),
        ("documents_with_bad", "documents with a bad segment"),
        ("documents_kept_by_filtering", "documents that filtering keeps"),
    )
    for place, (key, name) in enumerate(lines):
        colour, marker = style(place)
        axes.plot(at, [100 * row[key] for row in rows], color=colour, marker=marker, markersize=3, label=name)
    axes.set_xlabel("threshold", color=INK)
    axes.set_ylabel("%", color=INK)
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    return _svg(figure, "What thresholds call bad")


def by_length(rows: Sequence[Mapping[str, float]]) -> str:
    """Mean score of the segments in each tenth by length."""
    figure, axes = _figure(6.4, 3.2)
    names = [f"{row['chars_from']:,}–{row['chars_to']:,}" for row in rows]
    axes.bar(range(len(rows)), [row["mean"] for row in rows], color=COLOURS[0], alpha=0.75)
    axes.set_xticks(range(len(rows)), names, rotation=30, ha="right", fontsize=8)
    axes.set_xlabel("characters of the segment", color=INK)
    axes.set_ylabel("mean score", color=INK)
    return _svg(figure, "Mean score by length of the segment")
