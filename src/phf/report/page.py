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

from phf.core import store
from phf.core.config import to_plain
from phf.core.runs import is_run, read_metrics
from phf.generation.sample import read_samples
from phf.generation.scenario import Scenario
from phf.redteaming.search import RedTeam
from phf.report import plots
from phf.report.browser import attack_rows, attack_table, masks, most_samples, samples_of, visible
from phf.report.figures import _figures
from phf.report.format import interval, measured, number, plain, share
from phf.report.measures import DIVERSITY, MAIN, RATIO, Measure, all_measures, as_csv, groups, of_run
from phf.scorers import AnyScorer, Scorer


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
    from phf.core.config import read_yaml

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
