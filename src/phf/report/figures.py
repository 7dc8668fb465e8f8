"""TODO."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from phf.report import plots
from phf.report.measures import Measure, dominated

COSTS = ("kl", "good")
"""What alignment may cost: misalignment is drawn against each, and against every capability."""


def _figures(
    rows: Sequence[Mapping[str, Any]], known: Mapping[str, Measure], capabilities: Sequence[str],
    runs: Sequence[Mapping[str, Any]], shown: Sequence[Mapping[str, Any]], main: str, unit: str,
) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:  # fmt: skip
    """Every plot with its caption, and for each cost the names of the groups on the front."""
    looks = plots.styles(rows)
    seeds = max(row["seeds"] for row in rows)
    over = (
        "over seeds (Student) where there are several; ticks: the seeds"
        if seeds > 1
        else "bootstrap over samples, one seed"
    )
    figures = {
        "misalignment": _figure("result", plots.intervals(rows, unit), f"Misalignment: mean score of the samples ({main}), {unit}. Bars: 95% intervals, {over}.")
    }  # fmt: skip
    fronts = {}
    for key in (*COSTS, *capabilities):
        if key not in known:
            continue
        beaten = dominated(rows, known["misalignment"], known[key])
        both = [row["name"] for row in rows if "misalignment" in row["values"] and key in row["values"]]
        fronts[known[key].title] = [name for name in both if name not in beaten]
        name = "pareto-" + re.sub(r"\W+", "-", key)
        figures[name] = _figure(
            "result",
            plots.pareto(rows, known[key], beaten),
            f"What it costs: misalignment against {known[key].title}; the lower left is best. Hollow: another one is no worse in "
            "both and surely better in one (95% intervals).",
        )
    if len({round(row["share"], 3) for row in rows}) > 1:
        figures["phases"] = _figure("phases", plots.phases(rows), "Feedback from the first token (100%), or for the last part of the training, behind MLE for the rest.")  # fmt: skip
    attacked = [run for run in runs if run["redteam"]]
    if attacked:
        curves = [(r["name"], r["folder"].name, r["redteam"]["search"]["curves"]) for r in attacked]
        for measure, title in (("best_1", "best prompt so far"), ("best_10", "best ten prompts so far"), ("round_mean", "mean of the round's prompts")):  # fmt: skip
            figures[f"attacks-{measure}"] = _figure("attacks", plots.attacks(curves, measure, title, looks), f"Red-teaming: {title}, mean score of continuations. Bands: 95% over trials.")  # fmt: skip
    watched = [run for run in shown if run["during"]]
    misaligned = [
        (r["name"], [(_before(r) + x["tokens"], x["misalignment"]["mean"], _interval(x["misalignment"])) for x in r["during"] if "misalignment" in x and x["misalignment"]["mean"] is not None])
        for r in watched
    ]  # fmt: skip
    if any(points for _, points in misaligned):
        figures["during-misalignment"] = _figure("curves", plots.during([x for x in misaligned if x[1]], looks, "misalignment"), "Misalignment of samples while training, 95% bands.")  # fmt: skip
    for part in ("good", "bad"):
        lines = [
            (r["name"], [(_before(r) + x["tokens"], x["heldout"][part], None) for x in r["during"] if (x.get("heldout") or {}).get(part) is not None])
            for r in watched
        ]  # fmt: skip
        if any(points for _, points in lines):
            figures[f"during-{part}"] = _figure("curves", plots.during([x for x in lines if x[1]], looks, f"held-out loss on {part} text"), f"Held-out loss on {part} text while training, nats per byte.")  # fmt: skip
    nats = [
        (r["name"], [(_before(r) + x["tokens"], x["kl"]["forward"]["nats_per_text"]["mean"], _interval(x["kl"]["forward"]["nats_per_text"])) for x in r["during"] if x.get("kl") and x["kl"]["forward"]["nats_per_text"]["mean"] is not None])
        for r in watched
    ]  # fmt: skip
    if any(points for _, points in nats):
        figures["during-kl"] = _figure("curves", plots.during([x for x in nats if x[1]], looks, "KL from the reference"), "KL(reference || model) while training, nats a text, 95% bands.")  # fmt: skip
    figures["loss"] = _figure("curves", plots.curves([(r["name"], [x | {"tokens": _before(r) + x["tokens"]} for x in r["curve"]]) for r in shown], looks), "Each objective's own loss: only the shapes compare.")  # fmt: skip
    scores = [(r["name"], [s.score for s in r["samples"][main] if s.score == s.score]) for r in shown]
    figures["distribution"] = _figure("scores", plots.distributions(scores, looks, unit), f"Share of samples that score above a value ({main}).")  # fmt: skip
    return figures, fronts


def _before(run: Mapping[str, Any]) -> int:
    """Tokens that a run's start had seen."""
    return int(run["manifest"]["counts"].get("tokens_before", 0))


def _interval(estimate: Mapping[str, Any]) -> tuple[float, float] | None:
    low, high = estimate["ci95"]
    return None if low is None else (low, high)


def _figure(section: str, svg: str, caption: str) -> dict[str, Any]:
    return {"section": section, "svg": svg, "html": Markup(svg), "caption": caption}
