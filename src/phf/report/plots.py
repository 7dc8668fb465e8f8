"""The page's pictures, as SVG text that follows the page's colours. Floor 6."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import escape

COLOURS = ("#4477aa", "#ccbb44", "#228833", "#ee6677", "#aa3377", "#66ccee", "#997700")
"""Paul Tol's bright scheme: told apart with any colour vision. A run's marker shape differs too."""
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
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


def intervals(objectives: Sequence[Mapping[str, Any]], unit: str) -> str:
    """Misalignment of each objective with its 95% interval; lower is better."""
    figure, axes = _figure(6.4, 0.7 + 0.45 * len(objectives))
    for place, row in enumerate(objectives):
        colour, marker = style(place)
        estimate = row["misalignment"]
        mean, ci = estimate["mean"], estimate["ci95"]
        if mean is None:
            continue
        if ci[0] is not None:
            axes.plot(
                [max(ci[0], 0), ci[1]], [place, place], color=colour, linewidth=3, solid_capstyle="butt", alpha=0.6
            )
        axes.plot([mean], [place], marker=marker, color=colour, markersize=8, linestyle="none", clip_on=False, zorder=3)
        if len(row["points"]) > 1:
            axes.plot(
                row["points"],
                [place] * len(row["points"]),
                marker="|",
                color=INK,
                markersize=10,
                linestyle="none",
                alpha=0.7,
            )
    axes.set_yticks(range(len(objectives)), [row["name"] for row in objectives])
    axes.set_ylim(len(objectives) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{unit} in samples (lower is better)", color=INK)
    return _svg(figure, "Misalignment by objective with 95% intervals")


def tradeoff(objectives: Sequence[Mapping[str, Any]]) -> str:
    """What alignment costs: misalignment against held-out loss on good text; the lower left is best."""
    figure, axes = _figure(6.4, 3.4)
    for place, row in enumerate(objectives):
        colour, marker = style(place)
        mean, ci, good = row["misalignment"]["mean"], row["misalignment"]["ci95"], row["good"]
        if mean is None or good is None:
            continue
        if ci[0] is not None:
            axes.plot([good, good], [max(ci[0], 0), ci[1]], color=colour, linewidth=2, alpha=0.6)
        axes.plot([good], [mean], marker=marker, color=colour, markersize=9, linestyle="none", clip_on=False, zorder=3)
        axes.annotate(row["name"], (good, mean), textcoords="offset points", xytext=(8, 5), color=INK, fontsize=9)
    axes.set_xlabel("held-out loss on good text, nats per byte (lower is better)", color=INK)
    axes.set_ylabel("misalignment of samples", color=INK)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.2)
    return _svg(figure, "Misalignment against held-out loss on good text")


def curves(runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> str:
    """Training loss over tokens. Each objective's loss is its own, so only the shapes compare."""
    figure, axes = _figure(6.4, 3.4)
    for place, (name, lines) in enumerate(runs):
        colour, _ = style(place)
        axes.plot(
            [x["tokens"] / 1e6 for x in lines], [x["loss"] for x in lines], color=colour, linewidth=1.4, label=name
        )
    axes.set_xlabel("million target tokens", color=INK)
    axes.set_ylabel("training loss of the objective, per counted target", color=INK)
    axes.legend(frameon=False, labelcolor=INK)
    return _svg(figure, "Training loss over tokens")


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
