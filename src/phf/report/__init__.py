"""The page: what a comparison of runs found, self-contained, opens from disk. Floor 6.

    phf report runs/demo            writes runs/demo/report.html, runs/demo/report/*.svg and numbers.csv

Every text of a model or a corpus is escaped or set as text; personal data that the scorer found (mail addresses, numbers,
handles) is masked before it gets there. Nothing on the page is loaded from elsewhere, and only its own script, known by
its hash, may run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from pydantic import TypeAdapter

from phf import store
from phf.config import to_plain
from phf.evaluate import is_run
from phf.redteam import RedTeam
from phf.report import plots
from phf.report.browser import attack_rows, attack_table, is_masked, mask, masks, most_samples, samples_of, visible
from phf.report.measures import (
    DIVERSITY,
    MAIN,
    RATIO,
    Measure,
    all_measures,
    as_csv,
    dominated,
    groups,
    of_run,
)
from phf.sample import Scenario, read_samples
from phf.scorers import AnyScorer, Scorer
from phf.trainer import read_metrics

__all__ = ["environment", "headline", "is_masked", "load_runs", "mask", "number", "visible", "write_report"]

COSTS = ("kl", "good")
"""What alignment may cost: misalignment is drawn against each, and against every capability."""


def write_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page for all judged runs below `folder` (or of `folder` itself) and return its path. Beside it a folder of
    the same name with every plot as SVG and the numbers as CSV."""
    folder = Path(folder)
    runs = load_runs(folder)
    shown = context(folder, runs)
    target = Path(out) if out is not None else folder / "report.html"
    target = target if target.suffix else target.with_suffix(".html")
    beside = target.with_suffix("")
    script = jinja2.PackageLoader("phf.report", ".").get_source(environment(), "page.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = (
        environment()
        .get_template("page.html.j2")
        .render(**shown, script=Markup(script), digest=digest, files=beside.name)
    )
    for name, figure in shown["figures"].items():
        store.write_text(beside / f"{name}.svg", as_file(figure["svg"]))
    store.write_text(beside / "numbers.csv", shown["csv"])
    store.write_text(target, page)
    return target


def as_file(svg: str) -> str:
    """A plot outside the page: on white."""
    return svg.replace("currentColor", "#222").replace("<svg", '<svg style="background: #fff"', 1)


def load_runs(folder: Path) -> list[dict[str, Any]]:
    """Judged runs: manifest, eval.json, training metrics, samples, what attacks found; in the order in which objectives are
    told.

    Of a recipe's folder, the runs that its `results.json` names; of any other, all. Raises StoreError if they were
    trained on different tokens or judged by different scorers: their numbers do not compare.
    """
    if (folder / "eval.json").exists():
        places = [folder]
    elif (folder / "results.json").exists():
        places = [folder / run["run"] for run in store.read_json(folder / "results.json")["runs"]]
    else:
        places = sorted(p.parent for p in folder.glob("*/eval.json") if ".old-" not in p.parent.name)
    if not places:
        raise store.StoreError(f"{folder} holds no judged run (eval.json); run `phf eval` on its runs first")
    runs = []
    for place in places:
        if not is_run(place):
            print(f"note: {place} was not trained here, so it is not on the page", file=sys.stderr)
            continue
        judged = store.read_json(place / "eval.json")
        attacked, watched = place / "redteam" / "redteam.json", place / "during.jsonl"
        runs.append(
            {
                "name": re.sub(r"-s\d+$", "", place.name),  # runs of one name differ in the seed only
                "folder": place,
                "manifest": store.read_manifest(place, "train"),
                "eval": judged,
                "curve": read_metrics(place / "metrics.jsonl"),
                "during": read_metrics(watched) if watched.exists() else [],
                "redteam": store.read_json(attacked) if attacked.exists() else None,
                "samples": {name: read_samples(place / "samples" / f"{name}.jsonl") for name in judged["scenarios"]},
            }
        )
    if not runs:
        raise store.StoreError(f"{folder} holds no judged run that was trained here")
    _tell_apart(runs)
    for what in ("tokens_content", "identity", "threshold"):
        if len({store.canonical(run["eval"][what]) for run in runs}) > 1:
            raise store.StoreError(
                f"the runs below {folder} differ in {what}, so their numbers do not compare; give one page to each group"
            )
    _check_alike(folder, runs)
    rank = {name: i for i, name in enumerate(plots.ORDER)}

    def place_of(run: Mapping[str, Any]) -> tuple[Any, ...]:
        counts = run["manifest"]["counts"]
        objective = run["manifest"]["objective"].get("name")
        return (
            counts.get("tokens_before", 0),
            rank.get(objective, len(rank)),
            run["name"],
            run["manifest"]["seed"],
        )

    return sorted(runs, key=place_of)


def _tell_apart(runs: Sequence[dict[str, Any]]) -> None:
    """Runs of one name that differ in more than the seed go by their folders' names."""
    for name in {run["name"] for run in runs}:
        same = [run for run in runs if run["name"] == name]
        settings = {store.canonical([r["manifest"]["objective"].get("name"), r["manifest"]["train"]]) for r in same}
        if len({r["manifest"]["seed"] for r in same}) < len(same) or len(settings) > 1:
            for run in same:
                run["name"] = run["folder"].name


def _check_alike(folder: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """Raise StoreError where runs were sampled, measured or attacked in different ways under one name."""

    def alike(what: str, found: Sequence[Any]) -> None:
        if len({store.canonical(f) for f in found}) > 1:
            raise store.StoreError(
                f"the runs below {folder} differ in {what}, so their numbers do not compare; judge them alike, or give one page to each"
            )

    scenarios = {name for run in runs for name in run["eval"]["scenarios"]}
    for name in sorted(scenarios):
        kept = [run["eval"]["scenarios"][name]["scenario"] for run in runs if name in run["eval"]["scenarios"]]
        alike(f"how scenario {name!r} was sampled", [{k: v for k, v in s.items() if k != "batch"} for s in kept])
    measured = [run["eval"]["kl"] for run in runs if run["eval"].get("kl")]
    alike("the reference of KL", [[k["reference"], k["num_samples"], k["max_tokens"]] for k in measured])
    attacked = [run["redteam"] for run in runs if run["redteam"]]
    left = ("batch",)
    alike(
        "how they were attacked",
        [{k: v for k, v in a["search"]["settings"].items() if k not in left} for a in attacked],
    )


def context(folder: Path, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that the template shows."""
    scenarios = list(dict.fromkeys(name for run in runs for name in run["eval"]["scenarios"]))
    common = [name for name in scenarios if all(name in run["eval"]["scenarios"] for run in runs)]
    if not common:
        raise store.StoreError(
            f"the runs below {folder} have no scenario in common ({', '.join(scenarios)}); judge them alike"
        )
    main = common[0]
    scenarios = [main, *(name for name in scenarios if name != main)]
    recipe, found = _read_recipe(folder), _read_results(folder)
    data = runs[0]["eval"]["data"]
    tokens_manifest, scored_manifest = data["tokens"], data["scored"]
    identity = runs[0]["eval"]["identity"]
    unit = identity.get("unit", "score")
    scorer: Scorer = TypeAdapter(AnyScorer).validate_python(runs[0]["eval"]["scorer"])
    rows, known = groups(runs, main), all_measures(runs, main)
    if any("ratio" in row["values"] for row in rows):
        known["ratio"] = RATIO
    first_seed = [next(run for run in runs if run["name"] == row["name"]) for row in rows]  # of each group one
    capabilities = [key for key, m in known.items() if m.about == "capability"]
    figures, fronts = _figures(rows, known, capabilities, runs, first_seed, main, unit)
    attacked = [run for run in runs if run["redteam"]]
    return {
        "title": recipe.get("title") or folder.name,
        "about": recipe.get("about", ""),
        "quick": recipe.get("quick", False),
        "unit": unit,
        "scorer": identity,
        "main": main,
        "settings": runs[0]["eval"]["scenarios"][main]["scenario"],
        "groups": rows,
        "known": known,
        "main_columns": [k for k in (*MAIN, *capabilities) if k in known],
        "diversity_columns": [k for k in DIVERSITY if k in known],
        "seeds": sorted({run["manifest"]["seed"] for run in runs}),
        "best": found.get("best", {}),
        "best_names": [chosen["group"] for chosen in found.get("best", {}).values()],
        "failed": found.get("failed", {}),
        "others": _other_scenarios(runs, scenarios[1:]),
        "figures": figures,
        "fronts": fronts,
        "labels": _labels(first_seed, main),
        "attacked": [_attacked(run, scorer) for run in attacked],
        "attack_table": attack_table(attacked),
        "most": most_samples(sum(len(run["samples"]) for run in runs)),
        "masked": masks(scorer),
        "page_data": Markup(_json(_page_data(folder, runs, rows, known, main, scorer) | {"csv": as_csv(runs, main)})),
        "csv": as_csv(runs, main),
        "data": scored_manifest,
        "tokens": tokens_manifest,
        "packages": len((scored_manifest.get("provenance") or {}).get("packages", {})),
        "runs": runs,
        "versions": runs[0]["manifest"]["versions"],
    }


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


def _page_data(
    folder: Path, runs: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], known: Mapping[str, Measure],
    main: str, scorer: Scorer,
) -> dict[str, Any]:  # fmt: skip
    """What the page's script works with: samples, and where every number comes from."""
    return {
        "unit": runs[0]["eval"]["identity"].get("unit", "score"),
        "threshold": runs[0]["eval"]["threshold"],
        "groups": {row["name"]: row["runs"] for row in rows},
        "measures": {k: {"title": m.title, "about": m.about, "digits": m.digits, "percent": m.percent} for k, m in known.items()},
        "runs": {
            run["folder"].name: {
                "values": store.jsonable(of_run(run, main)),
                "about": _provenance(folder, run),
                "samples": samples_of(run, scorer, most_samples(sum(len(r["samples"]) for r in runs))),
            }
            for run in runs
        },
    }  # fmt: skip


def _provenance(folder: Path, run: Mapping[str, Any]) -> list[list[str]]:
    """Where a run's numbers come from, as lines of a name and a value."""
    manifest, judged = run["manifest"], run["eval"]
    data = judged["data"]
    recipe = folder / "recipe.yaml"
    commands = [f"phf run {recipe} --only {run['folder'].name}"]
    if not recipe.exists():
        asked = next(iter(judged["scenarios"].values()))["scenario"]
        commands = [
            f"phf train {manifest['tokens_dir']} {run['folder']} {run['folder']}/config.yaml",
            f"phf eval {run['folder']} {_changed(asked, to_plain(Scenario()))}".strip(),
        ]
    if run["redteam"] and not (recipe.exists() and _read_recipe(folder).get("redteam")):
        changed = _changed(run["redteam"]["search"]["settings"], to_plain(RedTeam()))
        commands.append(f"phf redteam {run['folder']} {changed}".strip())
    lines = [
        ["run", str(run["folder"])],
        ["recipe", str(recipe) if recipe.exists() else f"{run['folder']}/config.yaml"],
        ["command", "; ".join(commands)],
        ["phf", f"{manifest['versions'].get('phf', '')} {manifest.get('commit') or '(not from a repository)'}"],
        ["objective", plain(manifest["objective"])],
        ["seed", str(manifest["seed"])],
        ["run's fingerprint", manifest["key"]],
        ["tokens' fingerprint", manifest["tokens_content"]],
        ["corpus's fingerprint", str(data["tokens"].get("text", ""))],
        ["scorer", plain(judged["identity"])],
        ["trained", f"{manifest['counts']['tokens']:,} tokens in {manifest['seconds']:,.0f} s, {manifest['precision']}, {manifest['threads']} threads"],
    ]  # fmt: skip
    return [[name, visible(value)] for name, value in lines]


def _changed(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Settings that are not the defaults, as a command takes them."""
    return " ".join(
        f"{k}={json.dumps(v)}"
        for k, v in settings.items()
        if v is not None and store.jsonable(v) != store.jsonable(defaults.get(k))
    )


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(store.jsonable(value), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _read_recipe(folder: Path) -> dict[str, Any]:
    from phf.config import read_yaml

    path = folder / "recipe.yaml"
    return read_yaml(path) if path.exists() else {}


def _read_results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    return store.read_json(path) if path.exists() else {}


def _attacked(run: Mapping[str, Any], scorer: Scorer) -> dict[str, Any]:
    search = run["redteam"]["search"]
    return {
        "run": run["folder"].name,
        "folder": str(run["folder"]),
        "final": search["final"],
        "confirmed": search["confirmed"],
        "budget": search["budget"],
        "start": search["curves"]["round_mean"][0],
        "settings": search["settings"],
        "starts": search.get("starting_prompts"),
        "prompts": attack_rows(run["redteam"], scorer),
    }


def headline(capability: Mapping[str, Any]) -> str:
    """A capability's main numbers with their intervals."""
    found = [(n, v) for n, v in capability.items() if isinstance(v, Mapping) and "ci95" in v]
    shown = found if capability["name"] == "lm-eval" else found[:1]
    return "; ".join(f"{number(v['mean'], 3)} ({number(v['ci95'][0], 3)} to {number(v['ci95'][1], 3)}) {n}" for n, v in shown) or "–"  # fmt: skip


def _other_scenarios(runs: Sequence[Mapping[str, Any]], scenarios: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {**run["eval"]["scenarios"][name], "scenario": name, "run": run["folder"].name, "folder": str(run["folder"])}
        for name in scenarios
        for run in runs
        if name in run["eval"]["scenarios"]
    ]


def _labels(runs: Sequence[Mapping[str, Any]], main: str) -> dict[str, Any]:
    """Kinds of faults found in samples, by run."""
    counts = {run["name"]: Counter(run["eval"]["scenarios"][main]["labels"]) for run in runs}
    total = sum(counts.values(), Counter())
    kinds = [kind for kind, _ in total.most_common(12)]
    return {"kinds": kinds, "rows": [(name, [c[k] for k in kinds], sum(c.values())) for name, c in counts.items()]}


def plain(value: Any) -> str:
    """A value of a manifest as one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return str(value)


def number(value: float | None, digits: int = 4) -> str:
    """A number for a table; an en dash where there is none."""
    if value is None or value != value:
        return "–"
    if value != 0 and abs(value) < 10**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def share(value: float | None, digits: int = 1) -> str:
    """A share in per cent."""
    return "–" if value is None or value != value else f"{100 * value:.{digits}f}%"


def measured(value: Mapping[str, Any], measure: Measure) -> str:
    """A measure's mean as text."""
    return (share if measure.percent else number)(value["mean"], measure.digits)


def interval(value: Mapping[str, Any], measure: Measure) -> str:
    """Its 95% interval as text."""
    show = share if measure.percent else number
    return " to ".join(show(end, measure.digits) for end in value["ci95"])


def environment() -> jinja2.Environment:
    """The templates of this folder, with autoescape and the filters that they use."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("phf.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["num"] = number
    made.filters["pct"] = share
    made.filters["thousands"] = lambda v: "–" if v is None else f"{v:,.0f}"
    made.filters["visible"] = visible
    made.filters["plain"] = plain
    made.filters["measured"] = measured
    made.filters["interval"] = interval
    return made
