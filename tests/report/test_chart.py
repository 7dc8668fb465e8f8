"""Charts: their values under the pointer and by keyboard, lines that can be hidden, names that keep clear."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from helpers import BROWSER
from phf.report import plots
from phf.report.chart import Chart, _apart, number_text
from phf.report.page import environment, page_script
from phf.report.plots import Mark, Point, Style

LOOKS = {name: Style(colour, "o") for name, colour in (("mle", "#4477aa"), ("conditional", "#228833"))}
CURVES = {
    "mle": [Point(0, 0.2, (0.1, 0.3)), Point(1, 0.4), Point(2, 0.5)],
    "conditional": [Point(0, 0.02), Point(1, 0.01), Point(2, 0.49)],
}


def titles(svg: str) -> list[str]:
    return [t.text for t in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}title") if t.text]


def test_every_value_has_its_title_and_its_series():
    drawn = plots.monitored(CURVES, LOOKS, "misalignment")
    assert titles(drawn.svg) == [
        "mle, 0M tokens: 0.2 (0.1 to 0.3)",
        "mle, 1M tokens: 0.4",
        "mle, 2M tokens: 0.5",
        "conditional, 0M tokens: 0.02",
        "conditional, 1M tokens: 0.01",
        "conditional, 2M tokens: 0.49",
    ]
    assert drawn.series == (("mle", "#4477aa"), ("conditional", "#228833"))
    for n in (0, 1):  # the line, its band, its name and its values
        assert len(re.findall(rf'class="s{n}"', drawn.svg)) == (3 if n == 0 else 2)
        assert len(re.findall(rf'class="hit s{n}"', drawn.svg)) == 3
    assert 'id="phf-' not in drawn.svg


def test_circles_are_where_the_values_are():
    chart = Chart(3.0)
    number, gid = chart.add("a", "#000000")
    chart.axes.plot([0, 10], [0, 100], gid=gid)
    chart.axes.set_xlim(0, 10)
    chart.axes.set_ylim(0, 100)
    for x, y in ((0, 0), (5, 50), (10, 100)):
        chart.value(number, x, y, "v")
    svg = chart.draw("x", "y", "label").svg
    circles = [(float(x), float(y)) for x, y in re.findall(r'<circle class="hit s0" cx="([\d.]+)" cy="([\d.]+)"', svg)]
    path = re.search(r'class="s0">\s*<path d="M ([\d.]+) ([\d.]+)\s*L ([\d.]+) ([\d.]+)', svg)
    ends = [float(v) for v in path.groups()]
    assert circles[0] == pytest.approx(ends[:2], abs=0.1)
    assert circles[2] == pytest.approx(ends[2:], abs=0.1)
    assert circles[1] == pytest.approx([(ends[0] + ends[2]) / 2, (ends[1] + ends[3]) / 2], abs=0.1)


def test_a_logarithmic_axis_is_offered_where_it_shows_more():
    assert plots.monitored(CURVES, LOOKS, "x").log is not None
    even = {"mle": [Point(0, 1.0), Point(1, 1.2)]}
    assert plots.monitored(even, LOOKS, "x").log is None
    zeros = {"mle": [Point(0, 0.0), Point(1, 0.1), Point(2, 2.0)], "conditional": [Point(0, 0.0), Point(2, 0.0)]}
    drawn = plots.monitored(zeros, LOOKS, "x")
    assert len(titles(drawn.svg)) == 5
    assert [t for t in titles(drawn.log) if not t.endswith(": 0")] == ["mle, 1M tokens: 0.1", "mle, 2M tokens: 2"]


def test_names_stay_in_the_picture_where_a_line_reaches_0():
    """On a logarithmic axis 0 lies far below, and the name of its line at the edge."""
    looks = {name: Style("#4477aa", "o") for name in ("mle", "masking", "unlikelihood", "sgtm")}
    curves = {
        "mle": [Point(1, 3.0), Point(10, 12.0)],
        "masking": [Point(1, 0.2), Point(10, 0.0)],
        "unlikelihood": [Point(1, 0.0), Point(10, 0.0)],
        "sgtm": [Point(1, 1e-5), Point(10, 2e-5)],
    }
    drawn = plots.monitored(curves, looks, "misalignment")
    assert drawn.log is not None
    for svg in (drawn.svg, drawn.log):
        height = float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg)[1])
        texts = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
        found = {text.text: float(text.get("y")) for text in texts if text.text in looks}
        assert set(found) == set(looks)
        assert all(8 < y < height for y in found.values()), found  # none is cut at the top
        assert sorted(looks, key=found.__getitem__)[:2] == ["mle", "sgtm"]  # the others end at 0


def test_a_chart_of_many_lines_has_no_names_at_them():
    many = {f"run-{n}": [Point(0, n), Point(1, n + 1)] for n in range(1, 14)}
    looks = {name: Style("#4477aa", "o") for name in many}
    assert 'class="names"' in plots.monitored(many, looks, "x").svg  # a small legend, which pages hide
    assert 'class="names"' not in plots.monitored(CURVES, LOOKS, "x").svg


@given(st.lists(st.floats(0, 200), min_size=1, max_size=12))
def test_names_keep_clear_and_stay_inside(wanted):
    found = _apart(wanted, 12, 0, 200)
    order = sorted(range(len(wanted)), key=lambda n: (found[n], n))
    assert [wanted[n] for n in order] == sorted(wanted)
    assert all(b - a >= 12 - 1e-6 for a, b in itertools.pairwise(sorted(found)))
    assert min(found) >= -1e-6
    assert max(found) <= max(200, 12 * (len(wanted) - 1)) + 1e-6
    apart = sorted(wanted)
    if all(b - a >= 12 for a, b in itertools.pairwise(apart)):
        assert found == pytest.approx(wanted)


def test_names_at_points_do_not_cover_each_other():
    points = [
        (Mark(name, y, None), Mark(name, x, None)) for name, x, y in (("aaaa", 1, 1), ("bbbb", 1.01, 1.02), ("c", 3, 5))
    ]
    looks = {name: Style("#4477aa", "o") for name in ("aaaa", "bbbb", "c")}
    svg = plots.pareto(points, looks, "first", "second", "lower", set()).svg
    heights = [float(re.search(rf' y="([\d.]+)"[^>]*>{name}</text>', svg)[1]) for name in ("aaaa", "bbbb")]
    assert abs(heights[0] - heights[1]) > 10


def test_numbers_have_at_most_four_digits():
    assert [number_text(v) for v in (0.0123461, 12345.6, 1.5, 0.0)] == ["0.01235", "12,346", "1.5", "0"]


def test_names_are_text():
    marks = [Mark('<script>"a"</script>', 1.0, (0.5, 1.5)), Mark("b", 20.0, None)]
    looks = {mark.name: Style("#4477aa", "o") for mark in marks}
    drawn = plots.intervals(marks, [mark.name for mark in marks], looks, "unit")
    assert "<script>" not in drawn.html
    assert titles(drawn.svg)[0] == '<script>"a"</script>: 1 (0.5 to 1.5)'
    assert titles(drawn.log)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1400])
def test_a_chart_in_a_browser(tmp_path, width):
    from playwright.sync_api import sync_playwright

    drawn = plots.monitored(CURVES, LOOKS, "misalignment")
    plain = environment().from_string(
        "{% extends \"base.html.j2\" %}{% block csp %}; script-src 'unsafe-inline'{% endblock %}"
        '{% block body %}<div class="plots"><figure>{{ chart }}</figure><figure>{{ chart }}</figure></div>'
        "{% endblock %}"
        "{% block scripts %}<script>{{ script }}</script>{% endblock %}"
    )
    script = page_script("inspect.js").partition('"use strict";\n// The slider')[0]
    (tmp_path / "page.html").write_text(plain.render(chart=drawn.html, script=Markup(script)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto((tmp_path / "page.html").as_uri())
        chart = page.locator(".chart").first
        page.locator(".linear .hit").nth(1).hover()
        assert page.locator("#tip").inner_text() == "mle, 1M tokens: 0.4"
        chart.focus()
        page.keyboard.press("Escape")
        assert page.locator("#tip").is_hidden()
        page.keyboard.press("ArrowLeft")
        assert page.locator("#tip").inner_text() == "conditional, 2M tokens: 0.49"
        page.keyboard.press("ArrowRight")
        assert page.locator("#tip").inner_text() == "mle, 0M tokens: 0.2 (0.1 to 0.3)"
        legend = page.locator(".legend").first
        legend.get_by_text("conditional").click()
        assert legend.get_by_text("conditional").get_attribute("aria-pressed") == "false"
        assert chart.locator(".linear .s1:visible").count() == 0
        assert chart.locator(".linear .s0:visible").count() > 0
        legend.get_by_text("log scale").click()
        assert chart.locator(".log").is_visible()
        assert chart.locator(".linear").is_hidden()
        assert chart.locator(".log .s1:visible").count() == 0  # what is hidden stays hidden
        sizes = page.locator(".chart svg text:visible").evaluate_all(
            "all => all.map(t => { const m = t.getScreenCTM();"
            " return parseFloat(getComputedStyle(t).fontSize) * Math.hypot(m.a, m.b); })"
        )
        assert min(sizes) >= 10.9
        assert problems == []
        browser.close()
