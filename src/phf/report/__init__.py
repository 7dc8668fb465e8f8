"""The page: what a comparison of runs found, self-contained, opens from disk. Floor 6.

    phf report runs/demo            writes runs/demo/report.html

Every text of a model or a corpus is escaped; personal data that the scorer found (mail addresses, numbers, handles) is
masked on the page. Nothing on it is loaded from elsewhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from pydantic import TypeAdapter

from phf import metrics, store
from phf.evaluate import scored_text
from phf.report import plots
from phf.sample import Scenario, read_samples
from phf.scorers import AnyScorer, Scorer
from phf.trainer import read_metrics
from phf.types import Span

UNMASKED = ("url", "match", "word")
"""Labels whose text is shown as it is; PEP8's codes (a letter and digits) too."""
SAMPLES_SHOWN = 12
ORDER = ("mle", "filtering", "conditional", "unlikelihood", "masking", "rwr", "awr")


def write_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page for all judged runs below `folder` (or of `folder` itself) and return its path."""
    folder = Path(folder)
    runs = load_runs(folder)
    page = environment().get_template("page.html.j2").render(**context(folder, runs))
    target = Path(out) if out is not None else folder / "report.html"
    store.write_text(target, page)
    return target


def load_runs(folder: Path) -> list[dict[str, Any]]:
    """Judged runs: manifest, eval.json, training metrics and samples; in the order in which objectives are told.

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
        judged = store.read_json(place / "eval.json")
        runs.append(
            {
                "name": re.sub(r"-s\d+$", "", place.name),
                "folder": place,
                "manifest": store.read_manifest(place, "train"),
                "eval": judged,
                "curve": read_metrics(place / "metrics.jsonl"),
                "samples": {name: read_samples(place / "samples" / f"{name}.jsonl") for name in judged["scenarios"]},
            }
        )
    for what in ("tokens_content", "identity", "threshold"):
        if len({store.canonical(run["eval"][what]) for run in runs}) > 1:
            raise store.StoreError(
                f"the runs below {folder} differ in {what}, so their numbers do not compare; give one page to each group"
            )
    rank = {name: i for i, name in enumerate(ORDER)}
    return sorted(
        runs,
        key=lambda r: (rank.get(r["manifest"]["objective"].get("name"), len(rank)), r["name"], r["manifest"]["seed"]),
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
    names = list(dict.fromkeys(run["name"] for run in runs))
    rows = [_row(run, main) for run in runs]
    recipe = _read_recipe(folder)
    data = runs[0]["eval"]["data"]
    tokens_manifest, scored_manifest = data["tokens"], data["scored"]
    scorer: Scorer = TypeAdapter(AnyScorer).validate_python(runs[0]["eval"]["scorer"])
    by_objective = [_objective_row(name, [r for r in rows if r["name"] == name], rows) for name in names]
    shown = [run for run in runs if run["manifest"]["seed"] == runs[0]["manifest"]["seed"]]
    return {
        "title": recipe.get("title") or folder.name,
        "about": recipe.get("about", ""),
        "quick": recipe.get("quick", False),
        "unit": runs[0]["eval"]["identity"].get("unit", "score"),
        "scorer": runs[0]["eval"]["identity"],
        "main": main,
        "settings": runs[0]["eval"]["scenarios"][main]["scenario"],
        "rows": rows,
        "objectives": by_objective,
        "seeds": sorted({r["seed"] for r in rows}),
        "others": _other_scenarios(runs, scenarios[1:]),
        "further": _further(runs, main),
        "misalignment_plot": Markup(plots.intervals(by_objective, runs[0]["eval"]["identity"].get("unit", "score"))),
        "tradeoff_plot": Markup(plots.tradeoff(by_objective)),
        "loss_plot": Markup(plots.curves([(r["name"], r["curve"]) for r in shown])),
        "labels": _labels(shown, main),
        "columns": [{"name": run["name"], "samples": _shown_samples(run, main, scorer)} for run in shown],
        "other_samples": [
            {"name": f"{run['name']} ({scenario})", "samples": _shown_samples(run, scenario, scorer)}
            for scenario in scenarios[1:]
            for run in shown
            if scenario in run["samples"]
        ],
        "data": scored_manifest,
        "tokens": tokens_manifest,
        "packages": len((scored_manifest.get("provenance") or {}).get("packages", {})),
        "runs": runs,
        "versions": runs[0]["manifest"]["versions"],
    }


def _read_recipe(folder: Path) -> dict[str, Any]:
    from phf.config import read_yaml

    path = folder / "recipe.yaml"
    return read_yaml(path) if path.exists() else {}


def _row(run: Mapping[str, Any], main: str) -> dict[str, Any]:
    judged, manifest = run["eval"]["scenarios"][main], run["manifest"]
    heldout = run["eval"]["heldout"].get("good") or run["eval"]["heldout"].get("none") or {}
    speeds = [line["tokens_per_s"] for line in run["curve"] if line.get("tokens_per_s")]
    return {
        "name": run["name"],
        "seed": manifest["seed"],
        "judged": judged,
        "misalignment": judged["misalignment"],
        "good": heldout.get("good") or {},
        "bad": heldout.get("bad") or {},
        "counts": manifest["counts"],
        "tokens_per_s": sorted(speeds)[len(speeds) // 2] if speeds else None,
        "seconds": manifest["seconds"],
    }


def _objective_row(
    name: str, rows: Sequence[Mapping[str, Any]], everything: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One objective over its seeds; the ratio to MLE is over seeds that both have."""
    means = [r["misalignment"]["mean"] for r in rows]
    one = rows[0]["misalignment"]
    if len(rows) > 1:
        over = metrics.t_interval([float("nan") if m is None else m for m in means]).to_json()
    else:
        over = one
    mle = {r["seed"]: r["misalignment"]["mean"] for r in everything if r["name"] == "mle"}
    pairs = [(r["misalignment"]["mean"], mle[r["seed"]]) for r in rows if r["seed"] in mle]
    ratio = (
        metrics.ratio_interval([a or 0 for a, _ in pairs], [b or 0 for _, b in pairs]).to_json()
        if name != "mle"
        else None
    )

    def mean(key: str) -> float | None:
        values = [r[key].get("nats_per_byte") for r in rows]
        return sum(values) / len(values) if values and None not in values else None

    return {
        "name": name,
        "n_seeds": len(rows),
        "misalignment": over,
        "points": means,
        "ratio": ratio,
        "good": mean("good"),
        "bad": mean("bad"),
        "good_ci": rows[0]["good"].get("ci95") if len(rows) == 1 else None,
        "bad_segments": _average(r["judged"]["bad_segments"] for r in rows),
        "distinct_2": _average(r["judged"]["distinct_2"] for r in rows),
        "mean_chars": _average(r["judged"]["mean_chars"] for r in rows),
        "unjudged": sum(r["judged"]["unjudged"] for r in rows),
        "empty": sum(r["judged"]["empty"] for r in rows),
        "samples": sum(r["judged"]["samples"] for r in rows),
        "tokens_per_s": _average(r["tokens_per_s"] for r in rows),
        "tokens": rows[0]["counts"]["tokens"],
        "text_tokens": rows[0]["counts"]["text_tokens"],
        "epochs": rows[0]["counts"]["epochs"],
    }


def _average(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _further(runs: Sequence[Mapping[str, Any]], main: str) -> dict[str, Any]:
    """The measures beyond the first table, for each run."""
    titles = list(dict.fromkeys(_capability_title(c) for run in runs for c in run["eval"].get("capabilities", [])))
    rows = []
    for run in runs:
        judged, found = run["eval"]["scenarios"][main], run["eval"]
        capabilities = {_capability_title(c): c for c in found.get("capabilities", [])}
        knows = (found.get("understanding") or {}).get("likelihood_ratio")
        rows.append(
            {
                "name": run["name"],
                "seed": run["manifest"]["seed"],
                "hit": judged["hit_rate"],
                "worst": judged["expected_max"]["25"]["mean"],
                "tail": judged["quantiles"].get("0.99"),
                "self_bleu": judged["self_bleu_5"],
                "repetition": judged["repetition_4"]["mean"],
                "kl": found["kl"]["forward"]["nats_per_text"] if found.get("kl") else None,
                "understanding": knows if knows and knows["auc"] is not None else None,
                "capabilities": [headline(capabilities[t]) if t in capabilities else "–" for t in titles],
            }
        )
    return {
        "rows": rows,
        "kl": any(r["kl"] for r in rows),
        "understanding": any(r["understanding"] for r in rows),
        "capabilities": titles,
    }


def _capability_title(capability: Mapping[str, Any]) -> str:
    """Its name and, where one name stands for several, what tells them apart."""
    settings = capability["settings"]
    return " ".join(
        [capability["name"], *([settings["task"]] if "task" in settings else []), *settings.get("tasks", [])]
    )


def headline(capability: Mapping[str, Any]) -> str:
    """A capability's main numbers with their intervals."""
    found = [(n, v) for n, v in capability.items() if isinstance(v, Mapping) and "ci95" in v]
    shown = found if capability["name"] == "lm-eval" else found[:1]
    return "; ".join(f"{number(v['mean'], 3)} ({number(v['ci95'][0], 3)} to {number(v['ci95'][1], 3)}) {n}" for n, v in shown) or "–"  # fmt: skip


def _other_scenarios(runs: Sequence[Mapping[str, Any]], scenarios: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {**run["eval"]["scenarios"][name], "scenario": name, "run": run["name"], "seed": run["manifest"]["seed"]}
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


def _shown_samples(run: Mapping[str, Any], scenario: str, scorer: Scorer) -> list[dict[str, Any]]:
    settings = Scenario(**run["eval"]["scenarios"][scenario]["scenario"] | {"score_prompt": False})
    shown = []
    for item in run["samples"].get(scenario, [])[:SAMPLES_SHOWN]:
        judged = scored_text(item, settings, scorer)
        masked, spans = mask(item.text, scorer), _spans(judged, scorer)
        rest = Markup('<span class="cut">{}</span>').format(visible(masked[len(judged) :]))
        shown.append({"html": marked(masked[: len(judged)], spans or []) + rest, "score": item.score, "id": item.id})
    return shown


def _spans(text: str, scorer: Scorer) -> list[Span] | None:
    """What the scorer finds, or None where it cannot judge."""
    if not text:
        return []
    try:
        return scorer.spans(text)
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception:  # as everywhere: a text that a scorer fails on is not judged
        return None


def mask(text: str, scorer: Scorer) -> str:
    """`text` with the letters and digits of personal data replaced; of all of it where the scorer cannot say."""
    spans = _spans(text, scorer)
    hidden = [Span(0, len(text), "not judged")] if spans is None else [s for s in spans if is_masked(s.label)]
    for span in hidden:
        found = "".join("•" if c.isalnum() else c for c in text[span.start : span.end])
        text = text[: span.start] + found + text[span.end :]
    return text


def is_masked(label: str) -> bool:
    """Whether what a span covers is hidden: anything personal. Links and coding style are shown."""
    is_code = len(label) == 4 and label[0] in "EWCN" and label[1:].isdigit()
    return not is_code and label not in UNMASKED


def marked(text: str, spans: Sequence[Span]) -> Markup:
    """`text` as HTML with `spans` marked and line ends kept. All of it escaped."""
    pieces: list[Markup] = []
    at = 0
    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        if span.start < at:  # several faults at one place: the first says it
            continue
        end = max(span.end, min(span.start + 1, len(text)))
        pieces.append(escape(visible(text[at : span.start])))
        pieces.append(Markup('<mark title="{}">{}</mark>').format(visible(span.label), visible(text[span.start : end])))
        at = end
    pieces.append(escape(visible(text[at:])))
    return Markup("").join(pieces)


def visible(text: str) -> str:
    """Control characters and lone surrogates by their picture, so that they can neither hide nor break the page."""
    return "".join(
        c if c in "\n\t" or (ord(c) >= 32 and not 0x7F <= ord(c) < 0xA0 and not 0xD800 <= ord(c) < 0xE000) else "\ufffd"
        for c in text
    )


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
    made.filters["pct"] = lambda v, digits=1: "–" if v is None or v != v else f"{100 * v:.{digits}f}%"
    made.filters["thousands"] = lambda v: "–" if v is None else f"{v:,.0f}"
    made.filters["visible"] = visible
    made.filters["plain"] = plain
    return made
