"""A chart as SVG text that takes its colours from the page, with its values in it.

matplotlib draws, and phf adds what it lacks. A circle over every value has a title, which browsers show when the
pointer is there. Everything of one series has a class (s0, s1, ...), so that a page can hide it. There may be a second
drawing on a logarithmic axis. Names at the ends of lines keep clear of each other.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from markupsafe import Markup, escape

INK = "#010203"
"""Stands for the page's text colour until the SVG is written."""
WIDTH = 4.5
"""Inches. At the width that pages give a chart, letters of `FONT` points are at least 11 pixels high."""
FONT = 11.2
MANY = 10
"""Series from which on names stand in a legend, not at the lines."""
LONG = 22
"""Letters of a name from which on names stand in a legend too."""
LABEL = 36
"""Letters of a line of the label below a chart."""
MOST_VALUES = 80
"""Values of a series with a circle, at most."""
LOG_FROM = 5
"""A logarithmic axis is offered where the largest value is this many times the smallest above 0."""
HIT = 7
"""Radius of the circle over a value, in points."""

Axis = Literal["x", "y"]


@dataclass(frozen=True)
class Drawing:
    """A finished chart. `log`: the same on a logarithmic axis. `series`: (name, colour) of what can be hidden."""

    svg: str
    log: str | None = None
    series: tuple[tuple[str, str], ...] = ()

    @property
    def html(self) -> Markup:
        """The chart on a page. `chart.js` makes its parts work."""
        log = "" if self.log is None else f'<div class="log" hidden>{self.log}</div>'
        shown = self.series if len(self.series) > 1 else ()
        buttons = [
            f'<button type="button" class="series" aria-pressed="true" data-series="{n}">'
            f'<i style="background:{colour}"></i>{escape(name)}</button>'
            for n, (name, colour) in enumerate(shown)
        ]
        if self.log is not None:
            buttons.append('<button type="button" class="scale" aria-pressed="false">log scale</button>')
        legend = f'<div class="legend" hidden>{"".join(buttons)}</div>' if buttons else ""
        return Markup(f'<div class="chart" tabindex="0"><div class="linear">{self.svg}</div>{log}</div>{legend}')


@dataclass
class Chart:
    """A chart that is being drawn on `axes`."""

    height: float
    axes: Any = field(init=False)
    figure: Any = field(init=False)
    series: list[tuple[str, str]] = field(default_factory=list)
    values: list[tuple[int, float, float, str]] = field(default_factory=list)
    ends: list[tuple[int, float]] = field(default_factory=list)
    beside: list[Any] = field(default_factory=list)
    """Names at points."""

    def __post_init__(self) -> None:
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(WIDTH, self.height), layout="constrained")
        self.axes = self.figure.subplots()
        self.axes.spines[["top", "right"]].set_visible(False)
        for spine in self.axes.spines.values():
            spine.set_color(INK)
        self.axes.tick_params(colors=INK, labelcolor=INK, labelsize=FONT)
        self.axes.grid(True, alpha=0.25, linewidth=0.6)
        self.axes.set_axisbelow(True)

    def add(self, name: str, colour: str) -> tuple[int, str]:
        """A series: its number, and the id of everything that is drawn for it."""
        self.series.append((name, colour))
        return len(self.series) - 1, f"phf-s{len(self.series) - 1}"

    def value(self, series: int, x: float, y: float, said: str) -> None:
        """A value that is shown where the pointer is."""
        if math.isfinite(x) and math.isfinite(y):
            self.values.append((series, x, y, said))

    def name_point(self, name: str, x: float, y: float, gid: str) -> None:
        """A name at a point. It moves up where another one is."""
        style = {"textcoords": "offset points", "color": INK, "fontsize": FONT, "gid": gid}
        self.beside.append(self.axes.annotate(literal(name), (x, y), xytext=(8, 5), **style))

    def curve(
        self,
        name: str,
        colour: str,
        x: Sequence[float],
        y: Sequence[float],
        bands: Sequence[tuple[float, float] | None] | None = None,
        unit: str = "",
        at: Sequence[str] | None = None,
        **style: Any,
    ) -> str:
        """A line with its values, and a band where `bands` has intervals. `at`: what the values of x are called.
        Returns the id of everything that is drawn for it."""
        number, gid = self.add(name, colour)
        self.axes.plot(x, y, color=colour, label=literal(name), gid=gid, **style)
        bands = [None] * len(x) if bands is None else bands
        banded = [(a, *band) for a, band in zip(x, bands, strict=True) if band is not None]
        if banded:
            places, low, high = zip(*banded, strict=True)
            self.axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0, gid=gid)
        step = max(1, math.ceil(len(x) / MOST_VALUES))
        for n in range(0, len(x), step):
            band = bands[n]
            within = "" if band is None else f" ({number_text(band[0])} to {number_text(band[1])})"
            where = number_text(x[n]) if at is None else at[n]
            self.value(number, x[n], y[n], f"{name}, {where}{unit}: {number_text(y[n])}{within}")
        if len(x):
            self.ends.append((number, y[-1]))
        return gid

    def draw(self, x: str, y: str, label: str, named: bool = False, may_log: Axis | None = None) -> Drawing:
        """The finished chart, with the axes labelled. `named`: lines have names. `may_log`: the axis that may be
        logarithmic."""
        self.axes.set_xlabel(literal("\n".join(textwrap.wrap(x, LABEL))), color=INK, fontsize=FONT)
        self.axes.set_ylabel(literal(y), color=INK, fontsize=FONT)
        names: list[Any] = []
        if named and (len(self.series) > MANY or max(len(name) for name, _ in self.series) > LONG):
            shown = self.axes.legend(frameon=False, labelcolor=INK, fontsize=5, ncols=2)
            shown.set_in_layout(False)  # a legend higher than the plot would leave no room for it
            shown.set_gid("phf-names")  # pages have the names below the chart
        elif named and self.ends:
            names = self._name_lines()
        linear = self._svg(label, names)
        log = None
        above = [] if may_log is None else self._above_zero(may_log)
        if above and max(above) >= LOG_FROM * min(above):  # it would show more
            getattr(self.axes, f"set_{may_log}lim")(min(above) / 2, max(above) * 2)
            getattr(self.axes, f"set_{may_log}scale")("log", nonpositive="clip")
            log = self._svg(f"{label}, logarithmic", names)
        series = tuple(self.series) if named or len(self.series) > 1 else ()
        return Drawing(linear, log, series)

    def _above_zero(self, axis: Axis) -> list[float]:
        """The values along an axis that a logarithm has."""
        return [value for _, x, y, _ in self.values if (value := x if axis == "x" else y) > 0]

    def _name_lines(self) -> list[Any]:
        longest = max(len(self.series[number][0]) for number, _ in self.ends)
        room = (0.58 * FONT * longest + 6) / 72 / WIDTH
        self.figure.get_layout_engine().set(rect=(0, 0, 1 - room, 1))
        names = []
        for number, y in self.ends:
            name, colour = self.series[number]
            names.append(
                self.axes.annotate(
                    literal(name),
                    (1, y),
                    xycoords=("axes fraction", "data"),
                    xytext=(5, 0),
                    textcoords="offset points",
                    color=colour,
                    fontsize=FONT,
                    va="center",
                    annotation_clip=False,
                    gid=f"phf-s{number}",
                    in_layout=False,
                )
            )
        return names

    def _spread(self, names: Sequence[Any]) -> None:
        """Move names up and down until they keep clear of each other."""
        for name in names:
            name.set_position((5, 0))
        self.figure.draw_without_rendering()
        scale = 72 / self.figure.dpi
        bounds = self.axes.get_window_extent()
        low = bounds.y0 * scale + FONT / 2
        high = bounds.y1 * scale - FONT / 2
        bottom, top = sorted(self.axes.get_ylim())
        for name in names:  # what lies outside, such as 0 on a logarithmic axis, is named at the edge
            name.xy = (name.xy[0], min(max(name.xy[1], bottom), top))
        heights = [float(self.axes.transData.transform((1, name.xy[1]))[1]) * scale for name in names]
        order = {height: n for n, height in enumerate(sorted(heights))}  # which stays where several are at an edge
        wanted = [min(max(height, low), high) + 1e-3 * order[height] for height in heights]
        for n, height in enumerate(_apart(wanted, FONT * 1.15, low, high)):
            names[n].set_position((5, height - heights[n]))

    def _lift(self) -> None:
        """Move names at points up, from the lowest one on, until each has its place."""
        self.figure.draw_without_rendering()
        scale = 72 / self.figure.dpi
        taken: list[tuple[float, float, float]] = []
        found = [(name, *(float(v) * scale for v in self.axes.transData.transform(name.xy))) for name in self.beside]
        for name, x, y in sorted(found, key=lambda row: row[2]):
            if not (math.isfinite(x) and math.isfinite(y)):
                continue
            left = x + 8
            right = left + 0.58 * FONT * len(name.get_text())
            place = y + 5
            while any(abs(place - up) < FONT * 1.1 and left < b and a < right for a, b, up in taken):
                place += 1
            taken.append((left, right, place))
            name.set_position((8, place - y))

    def _svg(self, label: str, names: Sequence[Any]) -> str:
        import matplotlib

        if names:
            self._spread(names)
        if self.beside:
            self._lift()
        buffer = io.StringIO()
        options: Any = {"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif", "font.size": FONT}
        with matplotlib.rc_context(options):
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r'<svg height="[^"]*"', "<svg", svg, count=1)
        svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
        svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
        svg = re.sub(r'id="phf-(s\d+|names)"', r'class="\1"', svg)
        end = svg.rindex("</svg>")
        return (svg[:end] + self._circles() + svg[end:]).replace(INK, "currentColor")

    def _circles(self) -> str:
        """A circle over every value, with what is said there."""
        scale = 72 / self.figure.dpi
        high = self.figure.get_figheight() * 72
        found = []
        for series, x, y, said in self.values:
            at, up = (float(v) * scale for v in self.axes.transData.transform((x, y)))
            if math.isfinite(at) and math.isfinite(up) and 0 <= up <= high:
                found.append(
                    f'<circle class="hit s{series}" cx="{at:.1f}" cy="{high - up:.1f}" r="{HIT}" fill="none" '
                    f'pointer-events="all"><title>{escape(said)}</title></circle>'
                )
        return f'<g class="hits">{"".join(found)}</g>'


def _apart(wanted: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Places near the wanted ones that are at least so far from each other, not above `high` and not below `low`."""
    order = sorted(range(len(wanted)), key=lambda n: wanted[n])
    groups: list[tuple[float, int]] = []  # (middle, members)
    for n in order:
        groups.append((wanted[n], 1))
        while len(groups) > 1:
            (a, i), (b, j) = groups[-2:]
            if b - a >= least * (i + j) / 2:
                break
            groups[-2:] = [((a * i + b * j) / (i + j), i + j)]
    places = [middle + least * (k - (count - 1) / 2) for middle, count in groups for k in range(count)]
    found = dict(zip(order, places, strict=True))
    for k, n in enumerate(reversed(order)):
        found[n] = min(found[n], high - least * k)
    for k, n in enumerate(order):
        found[n] = max(found[n], low + least * k)
    return [found[n] for n in range(len(wanted))]


def literal(text: str) -> str:
    """`text` as matplotlib shows it unchanged: between two dollar signs it would read a formula."""
    return text.replace("$", r"\$")


def number_text(value: float) -> str:
    """A number with at most four digits that count."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
