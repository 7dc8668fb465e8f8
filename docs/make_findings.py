"""Write the tables of docs/findings.md from benchmarks/results: python docs/make_findings.py

field.json and noise.json are `results.json` of `phf run field` and `phf run noise`. after.json is what
benchmarks/after_release.py gathers from `phf run after`. audit_other_source.json is by the benchmark of that name.
Intervals are Student's over seeds. Losses are differences from MLE's run of the same seed, because seeds share order
and initial weights.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phf.core import store
from phf.core.statistics import ratio_interval, t_interval
from phf.core.types import Estimate

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "findings.md"
PLAIN = "mle"


def number(found: Estimate, digits: int, scale: float = 1.0, sign: bool = False, least: float = -math.inf) -> str:
    """A mean with its interval, where there are seeds enough. `least`: what no value can be below."""
    form = f"{'+' if sign else ''}.{digits}f"
    mean = format(found.mean * scale, form)
    if math.isnan(found.ci95[0]):
        return mean
    low, high = (format(max(end * scale, least), form) for end in found.ci95)
    return f"{mean} ({low} to {high})"


def rows(results: dict[str, Any]) -> list[str]:
    """The rows of the table, by misalignment."""
    groups: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for run in results["runs"]:
        groups[run["group"]][run["seed"]] = run
    base = groups[PLAIN]
    lines = []
    for name, runs in groups.items():
        seeds = sorted(runs.keys() & base.keys())
        own = [runs[s]["misalignment"]["mean"] for s in seeds]
        plain = [base[s]["misalignment"]["mean"] for s in seeds]
        ratio = ratio_interval(own, plain)
        good = t_interval([runs[s]["heldout"]["good"] - base[s]["heldout"]["good"] for s in seeds])
        bad = t_interval([runs[s]["heldout"]["bad"] - base[s]["heldout"]["bad"] for s in seeds])
        kl = [runs[s]["kl"]["forward"]["nats_per_text"]["mean"] for s in seeds if runs[s].get("kl")]
        bleu = t_interval([runs[s]["self_bleu_5"] for s in seeds])
        beams = [
            r["scenarios"]["safe_beam"]["misalignment"]["mean"] for r in runs.values() if "safe_beam" in r["scenarios"]
        ]
        known = [runs[s]["understanding"] for s in seeds if runs[s].get("understanding") is not None]
        attacked = [runs[s]["attacked"]["best_10"]["mean"] for s in seeds if runs[s].get("attacked")]
        inserted = [runs[s]["exposure"]["inserted"] / runs[s]["tokens"] for s in seeds]
        cells = [
            name,
            number(t_interval(own), 2, 1000, least=0.0),
            "1" if name == PLAIN else number(ratio, 3),
            number(good, 3, sign=True)
            if name != PLAIN
            else number(t_interval([base[s]["heldout"]["good"] for s in seeds]), 3),
            number(bad, 3, sign=True)
            if name != PLAIN
            else number(t_interval([base[s]["heldout"]["bad"] for s in seeds]), 3),
            number(t_interval(kl), 0) if kl and name != PLAIN else "",
            number(bleu, 3),
            number(t_interval(beams), 2, 1000, least=0.0) if beams else "",
            number(t_interval(attacked), 1, 1000, least=0.0) if attacked else "",
            number(t_interval(known), 3) if known else "",
            f"{100 * sum(inserted) / len(inserted):.1f}%",
            str(len(seeds)),
        ]
        lines.append((sum(own) / len(own), f"| {' | '.join(cells)} |"))
    return [line for _, line in sorted(lines)]


def table() -> str:
    head = [
        "objective",
        "PII per 1,000 characters",
        "ratio to MLE",
        "loss on good text, from MLE",
        "loss on bad text, from MLE",
        "KL",
        "Self-BLEU-5",
        "PII with SafeBeam",
        "best ten attacks",
        "knows bad text",
        "inserted",
        "seeds",
    ]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *rows(store.read_json(RESULTS / "field.json"))]
    return "\n".join(lines)


def noise_table(name: str = "noise") -> str:
    """Misalignment divided by MLE's, by objective and errors of the scorer."""
    runs = store.read_json(RESULTS / f"{name}.json")["runs"]
    plain = {run["seed"]: run["misalignment"]["mean"] for run in runs if run["objective"] == PLAIN}
    found: dict[str, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run["objective"] != PLAIN:
            found[run["objective"]][float(run["settings"]["train.scorer_noise"])].append(run)
    levels = sorted(next(iter(found.values())))
    quality = [_quality(found, level) for level in levels]
    head = ["wrong scores", *(f"{100 * level:g}%" for level in levels)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {name} | {' | '.join(f'{100 * q[n]:.0f}%' for q in quality)} |" for n, name in enumerate(QUALITY)]
    for objective, by_level in found.items():
        ratios = []
        for level in levels:
            own = {run["seed"]: run["misalignment"]["mean"] for run in by_level[level]}
            base = [plain[seed] for seed in own]
            samples = sum(run["misalignment"]["n"] for run in by_level[level])
            found_ratio = ratio_interval(list(own.values()), base)
            ratios.append(number(found_ratio, 2) if found_ratio.mean else f"none in {samples:,} samples")
        lines.append(f"| {objective} | {' | '.join(ratios)} |")
    return "\n".join(lines)


QUALITY = ("precision", "recall")


def _quality(found: dict[str, dict[float, list[dict[str, Any]]]], level: float) -> tuple[float, float]:
    """Precision and recall of the scores that objectives saw, mean over seeds."""
    counts = [run["noise"] for by_level in found.values() for run in by_level[level] if run.get("noise")]
    if not counts:
        return 1.0, 1.0
    precision, recall = (sum(c[name] for c in counts) / len(counts) for name in QUALITY)
    return precision, recall


def after_table() -> str:
    """What is left after release, by objective: rows are what was measured."""
    groups = store.read_json(RESULTS / "after.json")["groups"]
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("PII per 1,000 characters", lambda g: _estimate(g["misalignment"], 2, 1000)),
        ("in the worst context", lambda g: _estimate(g.get("worst_context"), 2, 1000)),
        ("after prompts of a gradient search for bad text", lambda g: _estimate(g.get("gradient_text"), 2, 1000)),
        ("what these prompts add to ordinary use", lambda g: _difference(g.get("gradient_text_gain"), 2, 1000)),
        ("after its prompts for the bad token", lambda g: _estimate(g.get("gradient_role"), 2, 1000)),
        ("best prompt of the search from these", lambda g: _estimate(g.get("best_1_after_gradient"), 2, 1000)),
        ("half-life under finetuning on bad text", lambda g: _part(g, "tamper", "bad")),
        ("half-life under finetuning on good text", lambda g: _part(g, "tamper", "good")),
        *[
            (f"gain over MLE {when}, {how}", functools.partial(_gain, stage=stage, template=template))
            for stage, when in (("before", "before tuning"), ("sft", "after SFT"), ("dpo", "after SFT and DPO"))
            for template, how in (("nothing", "from nothing"), ("same", "in its template"), ("other", "in another"))
        ],
        ("held-out loss on good text, nats per byte", lambda g: _estimate(g["loss"]["good"], 3)),
        ("held-out loss on bad text with its true tokens, nats per byte", lambda g: _estimate(g["loss"]["bad"], 3)),
        ("slowdown on bad text", lambda g: _part(g, "slowdown", "bad")),
        ("slowdown on good text", lambda g: _part(g, "slowdown", "good")),
        ("AUC of a probe for bad text", lambda g: _estimate(g["capabilities"].get("probe AUC"), 3, most=1.0)),
        ("AUC by its own control tokens", lambda g: _estimate(g.get("understanding"), 3, most=1.0)),
        ("exposure of bad secrets, bits", lambda g: _estimate(g["capabilities"].get("canaries exposure of bad"), 1)),
        ("exposure of good secrets, bits", lambda g: _estimate(g["capabilities"].get("canaries exposure of good"), 1)),
        *[
            (f"training text repeated word for word: {what}", functools.partial(_verbatim, what=what))
            for what in ("bad", "bad, held out", "good", "good, held out", "bad, bad token")
        ],
        ("bad secrets extracted", lambda g: _estimate(g["capabilities"].get("canaries extracted bad"), 2, most=1.0)),
    ]
    lines = [f"| | {' | '.join(groups)} |", f"|{'---|' * (len(groups) + 1)}"]
    for title, cell in rows:
        cells = [cell(group) for group in groups.values()]
        if any(cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _estimate(found: dict[str, Any] | None, digits: int, scale: float = 1.0, most: float = math.inf) -> str:
    if found is None or found["mean"] is None:
        return ""
    mean = f"{found['mean'] * scale:.{digits}f}"
    if found["ci95"][0] is None:
        return mean if found["mean"] else "none found"
    low, high = (min(max(end * scale, 0.0), most) for end in found["ci95"])
    return f"{mean} ({low:.{digits}f} to {high:.{digits}f})"


def _difference(found: dict[str, Any] | None, digits: int, scale: float) -> str:
    if found is None or found["ci95"][0] is None:
        return ""
    mean, low, high = (f"{value * scale:+.{digits}f}" for value in (found["mean"], *found["ci95"]))
    return f"{mean} ({low} to {high})"


def _part(group: dict[str, Any], what: str, part: str) -> str:
    found: str = group[what].get(part, {}).get("said", "")
    return found


def _verbatim(group: dict[str, Any], what: str) -> str:
    return _estimate(group["capabilities"].get(f"verbatim {what}"), 3, most=1.0)


def _gain(group: dict[str, Any], stage: str, template: str) -> str:
    rows = [row for row in group["persist"] if (row["stage"], row["template"]) == (stage, template)]
    gain = rows[0]["gain"] if rows else None
    if gain is None or gain["mean"] is None:
        return ""
    low, high = gain["ci95"]
    interval = "" if low is None else f" ({100 * low:.0f}% to {100 * high:.0f}%)"
    return f"{100 * gain['mean']:.0f}%{interval}"


def audit_table() -> str:
    """A scorer on the source that it was fitted to, and on another one."""
    found = store.read_json(RESULTS / "audit_other_source.json")
    own = found["held_out"]
    half = own["at"]["0.5"]
    other = next(row for row in found["at"] if row["threshold"] == found["threshold"])
    head = ["", "texts", "bad", "AUC", "precision", "recall"]
    rows = [
        [
            "held out from its own source",
            f"{own['n']:,}",
            f"{own['bad']:,}",
            _auc(own),
            _share(half["precision"], half["precision_ci95"]),
            _share(half["recall"], half["recall_ci95"]),
        ],
        [
            "another source",
            f"{found['other_source']['texts']:,}",
            f"{found['other_source']['bad']:,}",
            _auc(found["other_source"]),
            _share(other["precision"]["mean"], other["precision"]["ci95"]),
            _share(other["recall"]["mean"], other["recall"]["ci95"]),
        ],
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _auc(found: dict[str, Any]) -> str:
    low, high = found["auc_ci95"]
    return f"{found['auc']:.3f} ({low:.3f} to {high:.3f})"


def _share(mean: float, ci95: list[float]) -> str:
    low, high = ci95
    return f"{100 * mean:.0f}% ({100 * low:.0f}% to {100 * high:.0f}%)"


def times_table() -> str:
    found = store.read_json(RESULTS / "command_times.json")
    after = store.read_json(RESULTS / "after.json")["groups"]["mle"]["seconds"]
    rows = [(re.sub(r"^([\w-]+)", r"`phf \1`", name), seconds) for name, seconds in found["seconds"].items()]
    rows += [
        ("training a run of `phf run after`", after["training"]["mean"]),
        ("`phf tamper` of it", after["tampering"]["mean"]),
    ]
    return "\n".join(["| command | seconds |", "|---|---|", *(f"| {name} | {seconds:.0f} |" for name, seconds in rows)])


def page(text: str) -> str:
    """The page with its tables written again."""
    for name, made in (
        ("field", table),
        ("noise", noise_table),
        ("noise-sgtm", functools.partial(noise_table, "noise_sgtm")),
        ("after", after_table),
        ("audit", audit_table),
        ("times", times_table),
    ):
        before, start, rest = text.partition(f"<!-- {name}: start -->")
        _, end, after = rest.partition(f"<!-- {name}: end -->")
        text = f"{before}{start}\n\n{made()}\n\n{end}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
