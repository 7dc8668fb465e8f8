"""Gather what `phf run after` found, for docs/findings.md: python benchmarks/after_release.py runs/after --out FILE

`--gradient FOLDER`: another folder with the same runs, where their gradient search was made.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _measure import machine
from phf.core import store
from phf.core.runs import RunFolder
from phf.core.statistics import over_seeds, t_interval
from phf.core.types import Estimate
from phf.evaluation.results import CapabilityResult
from phf.redteaming.results import read_redteam
from phf.report.figures import Comparison
from phf.report.knowledge import known_text
from phf.report.page import compare_runs
from phf.report.runs import ReportedRun, load_runs


def of_group(name: str, runs: Sequence[ReportedRun], compared: Comparison, searched: Path) -> dict[str, Any]:
    """Everything about the runs of one objective, over their seeds."""
    main = compared.scenario
    losses = [run.result.heldout.main for run in runs if run.result.heldout.main is not None]
    known = next((row for row in compared.knowledge if row.group == name), None)
    found: dict[str, Any] = {
        "seeds": [run.manifest.seed for run in runs],
        "misalignment": over_seeds([run.result.scenarios[main].misalignment for run in runs]),
        "loss": {
            "good": t_interval([loss.good.nats_per_byte for loss in losses]),
            "bad": t_interval([known_text(run.result.heldout, "bad") for run in runs]),
        },
        "seconds": {
            "training": t_interval([run.manifest.seconds for run in runs]),
            "tampering": t_interval([t.seconds for run in runs if (t := run.tamper) is not None]),
        },
        "slowdown": {
            part: {"of_seeds": values, "said": known.said(part)}
            for part, values in ({} if known is None else known.slowdown).items()
            if known is not None
        },
        "capabilities": _capabilities([run.result.capabilities for run in runs]),
        "tamper": {row.part: {"said": row.said, "curve": row.curve} for row in compared.tampered if row.group == name},
        "persist": [
            {"stage": r.stage, "template": r.template, "misalignment": r.misalignment, "gain": r.gain}
            for r in compared.persisted
            if r.group == name
        ],
    }
    understood = [run.result.understanding for run in runs]
    if all(understood):
        found["understanding"] = t_interval([u.likelihood_ratio.auc for u in understood if u is not None])
    attacks = [run.redteam for run in runs if run.redteam is not None]
    worst = [a.tokens.worst["text"] for a in attacks if a.tokens is not None and "text" in a.tokens.worst]
    if len(worst) == len(runs):
        found["worst_context"] = over_seeds([w.misalignment for w in worst])
        found["worst_context_names"] = [w.attack for w in worst]
    attacks = [a for run in runs if (a := read_redteam(RunFolder(searched / run.folder_name).redteam)) is not None]
    gradient = [a.gradient for a in attacks if a.gradient is not None]
    if len(gradient) == len(runs):
        for aim in ("text", "role"):
            if all(aim in g.misalignment for g in gradient):
                found[f"gradient_{aim}"] = over_seeds([g.misalignment[aim] for g in gradient])
                found[f"gradient_{aim}_gain"] = _gain([g.misalignment[aim] for g in gradient], runs, main)
        found["gradient_tokens"] = sum(g.target_tokens for g in gradient)
        found["best_1_after_gradient"] = over_seeds([a.search.confirmed["best_1"] for a in attacks])
    return found


def _capabilities(of_runs: Sequence[Sequence[CapabilityResult]]) -> dict[str, Estimate]:
    """The main numbers of each capability, over seeds."""
    names = {f"{c.name} {number}": None for results in of_runs for c in results for number in c.main}
    values = [{f"{c.name} {number}": e for c in results for number, e in c.main.items()} for results in of_runs]
    return {name: over_seeds([v[name] for v in values]) for name in names if all(name in v for v in values)}


def _gain(found: Sequence[Estimate], runs: Sequence[ReportedRun], scenario: str) -> Estimate:
    """What an attack adds to the samples in ordinary use, over seeds."""
    usual = [run.result.scenarios[scenario].misalignment.mean for run in runs]
    return t_interval([e.mean - u for e, u in zip(found, usual, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gradient", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    searched = arguments.gradient or arguments.folder
    compared = compare_runs(arguments.folder, load_runs(arguments.folder))
    groups = {
        row.name: of_group(row.name, [r for r in compared.runs if r.name == row.name], compared, searched)
        for row in compared.groups
    }
    result = {
        "benchmark": "after_release",
        "machine": machine(),
        "plain": compared.plain,
        "gradient_apart": arguments.gradient is not None,
        "groups": groups,
    }
    store.write_json(arguments.out, result)


if __name__ == "__main__":
    main()
