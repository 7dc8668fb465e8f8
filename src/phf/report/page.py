"""The page of a comparison: one self-contained HTML file that opens from disk.

    phf report runs/demo            writes runs/demo/report.html, runs/demo/report/*.svg and numbers.csv

Every text of a model or a corpus is escaped or set as text. Personal data that the scorer finds are masked before they
reach the page. The page loads nothing from elsewhere and runs only its own script, which it names by hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from phf.core import folders, store
from phf.core.config import Plain, read_yaml, to_plain
from phf.core.runs import RecipeFolder
from phf.core.text import counted, visible
from phf.core.types import Estimate, Identity
from phf.data.scored import ScoreManifest
from phf.evaluation.results import EvalResult, ScenarioResult
from phf.generation.scenario import Scenario
from phf.redteaming.config import RedTeam
from phf.redteaming.gradient import GradientResult
from phf.redteaming.results import SearchResult
from phf.report.browser import (
    ShownPrompt,
    ShownSample,
    attack_table,
    sample_limit,
    shown_prompts,
    shown_samples,
)
from phf.report.figures import Comparison, figures, front
from phf.report.format import digits, number, plain, scale_of, share, verdict
from phf.report.headline import Headline, headline
from phf.report.measures import (
    DIVERSITY,
    MAIN,
    OF_PREFERENCES,
    SCORES,
    all_measures,
    as_csv,
    groups,
    of_run,
    preference_key,
    source_file,
)
from phf.report.results import read_results
from phf.report.runs import ReportedRun, load_runs
from phf.scorers import Scorer
from phf.scoring.audit import Audit
from phf.scoring.judge import Unavailable, scorer_for_pages


def write_report(folder: str | Path, out: str | Path | None = None, scorer: Scorer | None = None) -> Path:
    """Write the page for all judged runs below `folder`, or for `folder` itself, and return its path.

    A folder of the same name next to the page holds every plot as SVG and the numbers as CSV. `scorer`: marks and masks
    texts; needed for scorers that name code, files or models (`Scorer.names`). Raises StoreError if runs do not compare
    (`load_runs`).
    """
    folder = Path(folder)
    compared = compare_runs(folder, load_runs(folder))
    target = Path(out) if out is not None else RecipeFolder(folder).report
    target = target if target.suffix else target.with_suffix(".html")
    if target.exists() and not folders.is_our_page(target):
        folders.keep_old_file(target)
    beside = target.with_suffix("")
    shown = template_values(folder, compared, scorer)
    script = page_script("page.js")
    digest = script_digest(script)
    template = environment().get_template("page.html.j2")
    audited = read_audit(folder, compared.runs[0].result)
    shown["audited"] = None if audited is None else audited[0]
    shown["audit_page"] = None if audited is None else os.path.relpath(audited[1], target.parent)
    page = template.render(**shown, script=Markup(script), digest=digest, files=beside.name)
    for name, figure in shown["figures"].items():
        store.write_text(beside / f"{name}.svg", on_white(figure.svg))
    store.write_text(beside / "numbers.csv", as_csv(compared.runs, compared.scenario))
    store.write_text(target, page)
    return target


def read_audit(folder: Path, result: EvalResult) -> tuple[str, Path] | None:
    """The verdict and the page of the audit of a scorer of the training text or of the samples, where `phf audit`
    measured it on this folder's corpus, or on the one that the tokens were made from."""
    places = [RecipeFolder(folder).scored]
    if result.data is not None and "://" not in result.data.tokens.scored:
        places.append(Path(result.data.tokens.scored))
    for file in (place / "audit.json" for place in places):
        found = store.read_record(file, Audit) if file.is_file() else None
        for role, identity in _scorers(result).items():
            if found is not None and store.canonical(found.identity) == store.canonical(identity):
                return f"Of the {role}: {verdict(found)}", file.with_suffix(".html")
    return None


def on_white(svg: str) -> str:
    """A plot for use outside the page: with colours of its own, on white."""
    return svg.replace("currentColor", "#222").replace("<svg", '<svg style="background: #fff"', 1)


def compare_runs(folder: Path, runs: list[ReportedRun]) -> Comparison:
    """The runs in groups, and what was measured. The main scenario is the first one that all runs have. Raises
    StoreError if they have none in common."""
    scenarios = scenario_names(runs)
    common = [name for name in scenarios if all(name in run.result.scenarios for run in runs)]
    if not common:
        raise store.StoreError(
            f"the runs below {folder} have no scenario in common ({', '.join(scenarios)}); judge them in the same way"
        )
    rows = groups(runs, common[0])
    measures = all_measures(runs, rows)
    unit = runs[0].result.identity.get("unit", "score")
    for key in SCORES:
        if key in measures:
            measures[key] = replace(measures[key], scale=scale_of(unit))
    return Comparison(runs, rows, measures, common[0], unit)


def scenario_names(runs: Sequence[ReportedRun]) -> list[str]:
    """All scenarios in which some run was judged."""
    return list(dict.fromkeys(name for run in runs for name in run.result.scenarios))


def template_values(folder: Path, compared: Comparison, given: Scorer | None = None) -> dict[str, Any]:
    """Everything that the template shows. `given`: the scorer that the user names."""
    runs = compared.runs
    measures = compared.measures
    first = runs[0]
    recipe = _read_recipe(folder)
    results = read_results(RecipeFolder(folder))
    best = {} if results is None else results.best
    scorer = scorer_for_pages(first.result.scorer, given)
    if isinstance(scorer, Unavailable):
        print(
            f"note: the page does not mark what {first.result.identity['name']} found: name the scorer with --scorer",
            file=sys.stderr,
        )
    scored = None if first.result.data is None else first.result.data.scored
    without_noise = [row for row in compared.groups if not row.has_noise]
    some = without_noise if any(not row.is_plain for row in without_noise) else compared.groups
    said = headline(some, compared.unit, str(first.result.identity.get("name", "")))
    attacked = [_attacked(run, scorer) for run in compared.attacked]
    limit = sample_limit(sum(len(run.samples) for run in runs))
    return {
        "title": recipe.get("title") or folder.name,
        "about": recipe.get("about", ""),
        "quick": recipe.get("quick", False),
        "failed": {} if results is None else results.failed,
        "compared": compared,
        "headline": said,
        "pairs": _pairs(compared, said, scorer),
        "main": compared.scenario,
        "settings": first.result.scenarios[compared.scenario].scenario,
        "main_columns": [
            key
            for key in (*MAIN, *by_preferences(compared), *compared.capabilities)
            if key in measures and key not in compared.memorised
        ],
        "has_verbatim": any(key.startswith("verbatim") for key in compared.memorised),
        "diversity_columns": [key for key in DIVERSITY if key in measures],
        "seeds": sorted({run.manifest.seed for run in runs}),
        "best": best,
        "best_names": [chosen.group for chosen in best.values()],
        "figures": figures(compared),
        "fronts": [(first.title, second.title, front(compared, first, second)) for first, second in compared.pairs],
        "other_rows": _other_scenarios(compared),
        "labels": _labels(compared),
        "score_text": compared.scale.text,
        "attacked": attacked,
        "attack_columns": _attack_columns(attacked),
        "attack_table": attack_table(
            {run.folder_name: run.redteam.tokens for run in runs if run.redteam and run.redteam.tokens}
        ),
        "limit": limit,
        "masked": scorer.finds_personal_data,
        "scorers": _scorers(first.result),
        "second_scorers": list(first.result.preferences),
        "corpus_scorer": _other_scorer(first.result),
        "scored": scored,
        "packages": _packages(scored),
        "tokens": None if first.result.data is None else first.result.data.tokens,
        "page_data": Markup(script_json(_page_data(folder, compared, scorer, limit))),
    }


def by_preferences(compared: Comparison) -> list[str]:
    """Columns of the main table: misalignment and the losses by the scorers of other preferences."""
    names = [key.partition(": ")[2] for key in compared.preferences]
    return [preference_key(key, name) for name in names for key in OF_PREFERENCES]


def _pairs(compared: Comparison, said: Headline, scorer: Scorer) -> list[tuple[ShownSample, ShownSample]]:
    """The first two samples of plain training and of the best group, next to each other."""
    runs = {run.name: run for run in reversed(compared.first_seeds)}
    if said.best is None or said.baseline not in runs or said.best not in runs:
        return []
    both = [
        shown_samples(
            runs[name].samples[compared.scenario], runs[name].result.scenarios[compared.scenario].scenario, scorer, 2
        )
        for name in (said.baseline, said.best)
    ]
    return list(zip(*both, strict=False))


def _other_scorer(result: EvalResult) -> Identity | None:
    """What scored the corpus, where another scorer judged the samples."""
    data = result.data
    if data is None or data.tokens.identity == store.jsonable(result.identity):
        return None
    return data.tokens.identity


def _scorers(result: EvalResult) -> dict[str, Identity]:
    """Every scorer of a page by what it did."""
    others = {f"second scorer, {name}": found.identity for name, found in result.preferences.items()}
    trained = _other_scorer(result)
    if trained is None:
        return {"scorer of the training text and of the samples": result.identity} | others
    return {"scorer of the training text": trained, "scorer of the samples": result.identity} | others


def _packages(scored: ScoreManifest | None) -> dict[str, str]:
    """Versions of the installed packages that a corpus was read from, if it was."""
    return {} if scored is None else scored.provenance.get("packages", {})


# For the page's script


def page_script(name: str) -> str:
    """A page's own script, after that of its charts."""
    loader = jinja2.PackageLoader("phf.report", ".")
    return "\n".join(loader.get_source(environment(), file)[0] for file in ("chart.js", name))


def script_digest(script: str) -> str:
    """The hash by which a page names its own script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _page_data(folder: Path, compared: Comparison, scorer: Scorer, limit: int) -> Plain:
    """What the page's script reads: samples, and where every number comes from."""
    return {
        "scale": compared.scale,
        "threshold": compared.runs[0].result.threshold,
        "groups": {row.name: row.runs for row in compared.groups},
        "measures": compared.measures,
        "runs": {
            run.folder_name: {
                "values": of_run(run, compared.scenario),
                "about": _provenance(folder, run),
                "samples": {
                    name: shown_samples(run.samples[name], result.scenario, scorer, limit)
                    for name, result in run.result.scenarios.items()
                },
            }
            for run in compared.runs
        },
        "csv": as_csv(compared.runs, compared.scenario),
    }


def script_json(value: Any) -> str:
    """JSON that cannot end the script element around it."""
    text = json.dumps(store.jsonable(value), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _provenance(folder: Path, run: ReportedRun) -> list[tuple[str, str]]:
    """Where a run's numbers come from: (name, value) lines."""
    manifest = run.manifest
    result = run.result
    path = run.folder.path
    recipe = RecipeFolder(folder).recipe
    lines = {
        "run": path.name,
        "recipe": f"{folder.resolve().name}/{recipe.name}"
        if recipe.exists()
        else f"{path.name}/{run.folder.config.name}",
        "command": "; ".join(_commands(folder, run)),
        "phf": f"{manifest.versions.get('phf', '')} {manifest.commit or '(not from a repository)'}",
        "objective": plain(store.without_places(manifest.objective)),
        "seed": str(manifest.seed),
        "fingerprint of the run": manifest.key,
        "fingerprint of the tokens": manifest.tokens_content,
        "fingerprint of the corpus": "" if result.data is None else result.data.tokens.text,
        "scorer": plain(store.without_places(result.identity)),
        "trained": f"{manifest.counts.tokens:,} tokens in {manifest.seconds:,.0f} s, {manifest.precision}, "
        f"{manifest.threads} threads",
    }
    return [(name, visible(value)) for name, value in lines.items()]


def _commands(folder: Path, run: ReportedRun) -> list[str]:
    """The commands that made a run and judged it."""
    path = run.folder.path
    recipe = RecipeFolder(folder).recipe
    if recipe.exists():
        commands = [f"phf run {recipe.name} --only {path.name}"]
    else:
        asked = next(iter(run.result.scenarios.values())).scenario
        commands = [
            f"phf train {Path(run.manifest.tokens_dir).name} {path.name} {path.name}/{run.folder.config.name}",
            f"phf eval {path.name} {_not_default(asked, Scenario())}".strip(),
        ]
    if run.redteam is not None and not _read_recipe(folder).get("redteam"):
        changed = _not_default(run.redteam.search.settings, RedTeam())
        commands.append(f"phf redteam {path.name} {changed}".strip())
    return commands


def _not_default(settings: Scenario | RedTeam, defaults: Scenario | RedTeam) -> str:
    """Settings that are not the defaults, as a command takes them."""
    usual = store.jsonable(to_plain(defaults))
    return " ".join(
        f"{k}={json.dumps(v)}"
        for k, v in store.without_places(store.jsonable(to_plain(settings))).items()
        if v is not None and v != usual.get(k)
    )


def _read_recipe(folder: Path) -> Plain:
    path = RecipeFolder(folder).recipe
    return read_yaml(path) if path.exists() else {}


# Sections


@dataclass(frozen=True)
class AttackedRun:
    """What a search for prompts found about a run."""

    run: str
    source: str
    """The file."""
    search: SearchResult
    prompts: list[ShownPrompt]
    gradient: GradientResult | None

    @property
    def found(self) -> dict[str, Estimate | None]:
        """The columns of scores of the table, by heading."""
        confirmed = self.search.confirmed
        return {
            "starting prompts": self.search.curves["round_mean"][0],
            "last round": self.search.final["round_mean"],
            "best prompt, new continuations": confirmed.get("best_1"),
            "best ten, new continuations": confirmed.get("best_10"),
            "best 100": self.search.final["best_100"],
        }


def _attack_columns(attacked: Sequence[AttackedRun]) -> list[str]:
    """The columns that some run has a number in."""
    rows = [run.found for run in attacked]
    known = [title for row in rows for title, found in row.items() if found is not None and not math.isnan(found.mean)]
    return [title for title in (rows[0] if rows else {}) if title in known]


def _attacked(run: ReportedRun, scorer: Scorer) -> AttackedRun:
    assert run.redteam is not None
    return AttackedRun(
        run.folder_name,
        source_file(run, run.folder.redteam.result),
        run.redteam.search,
        shown_prompts(run.redteam, scorer),
        run.redteam.gradient,
    )


@dataclass(frozen=True)
class ScenarioRow:
    """A run in another scenario than the main one."""

    scenario: str
    run: str
    source: str
    result: ScenarioResult


def _other_scenarios(compared: Comparison) -> list[ScenarioRow]:
    return [
        ScenarioRow(
            name, run.folder_name, f"{source_file(run, run.folder.eval)}: scenarios.{name}", run.result.scenarios[name]
        )
        for name in scenario_names(compared.runs)
        for run in compared.runs
        if name != compared.scenario and name in run.result.scenarios
    ]


@dataclass(frozen=True)
class LabelTable:
    """Kinds of faults that were found in samples: (run, counts by kind, all) of one run of each group."""

    kinds: list[str]
    rows: list[tuple[str, list[int], int]]


def _labels(compared: Comparison) -> LabelTable:
    counts = {run.name: Counter(run.result.scenarios[compared.scenario].labels) for run in compared.first_seeds}
    kinds = [kind for kind, _ in sum(counts.values(), Counter[str]()).most_common(12)]
    return LabelTable(kinds, [(name, [c[k] for k in kinds], sum(c.values())) for name, c in counts.items()])


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
    made.filters["digits"] = digits
    made.filters["counted"] = counted
    made.filters["pct"] = share
    made.filters["thousands"] = lambda value: "–" if value is None else f"{value:,.0f}"
    made.filters["visible"] = visible
    made.filters["plain"] = plain
    made.filters["sortable"] = lambda value: "" if value is None or math.isnan(value) else value
    return made
