"""The judged runs of a folder, checked to be comparable."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phf.core import folders, store
from phf.core.config import Plain, to_plain
from phf.core.runs import RecipeFolder, RunFolder, TrainManifest, is_run
from phf.core.types import Sample
from phf.evaluation.monitor import read_monitor
from phf.evaluation.results import EvalResult, MonitorLine, read_eval
from phf.generation.sample import read_samples
from phf.generation.scenario import Scenario
from phf.redteaming.config import RedTeam
from phf.redteaming.persist import PersistResult, read_persist
from phf.redteaming.results import RedTeamResult, read_redteam
from phf.redteaming.tamper import TamperResult, read_tamper
from phf.report.plots import ORDER
from phf.report.results import read_results
from phf.training.metrics import MetricsLine, read_metrics


@dataclass(frozen=True)
class ReportedRun:
    """A judged run with everything that a page shows of it."""

    name: str
    """Name of the run's group: runs of one name differ in the seed only."""
    folder: RunFolder
    manifest: TrainManifest
    result: EvalResult
    metrics: list[MetricsLine]
    monitor: list[MonitorLine]
    redteam: RedTeamResult | None
    """None: not attacked."""
    samples: dict[str, list[Sample]]
    """By scenario."""
    tamper: TamperResult | None = None
    """None: not finetuned after training."""
    persist: PersistResult | None = None
    """None: not tuned on instructions."""

    @property
    def folder_name(self) -> str:
        return self.folder.path.name


def load_runs(folder: Path) -> list[ReportedRun]:
    """The judged runs of a folder, objectives in their usual order.

    In a recipe's folder these are the runs that `results.json` names, in any other folder all runs. Raises StoreError
    if runs do not compare: trained on different tokens, judged by different scorers, or sampled differently.
    """
    places = _judged_folders(folder)
    if not places:
        raise store.StoreError(f"{folder} holds no judged run (eval.json); run `phf eval` on its runs first")
    runs = []
    for place in places:
        if is_run(place):
            runs.append(_load(RunFolder(place)))
        else:
            print(f"note: {place} was not trained here, so it is not on the page", file=sys.stderr)
    if not runs:
        raise store.StoreError(f"{folder} holds no judged run that was trained here")
    runs = _alike_finetuned(_distinguish(runs))
    _check_comparable(folder, runs)
    rank = {name: i for i, name in enumerate(ORDER)}

    def place_of(run: ReportedRun) -> tuple[int, int, str, int]:
        position = rank.get(run.manifest.objective_name, len(rank))
        return (run.manifest.counts.tokens_before, position, run.name, run.manifest.seed)

    return sorted(runs, key=place_of)


def _judged_folders(folder: Path) -> list[Path]:
    if RunFolder(folder).eval.exists():
        return [folder]
    files = RecipeFolder(folder)
    results = read_results(files)
    return files.judged() if results is None else [files.run(run.run).path for run in results.runs]


def _load(folder: RunFolder) -> ReportedRun:
    result = read_eval(folder)
    if result is None:
        raise store.StoreError(f"{folder.path} has not been judged; run `phf eval` on it first")
    old = folder.earlier_monitor
    if old.exists() and not folder.monitor.exists():
        print(
            f"note: {old} is not shown: an earlier version wrote it in another form",
            file=sys.stderr,
        )
    return ReportedRun(
        name=re.sub(r"-s\d+$", "", folder.path.name),
        folder=folder,
        manifest=folders.read_manifest(folder.path, TrainManifest),
        result=result,
        metrics=read_metrics(folder.metrics),
        monitor=read_monitor(folder.monitor) if folder.monitor.exists() else [],
        redteam=read_redteam(folder.redteam),
        samples={name: read_samples(folder.samples(name)) for name in result.scenarios},
        tamper=read_tamper(folder),
        persist=read_persist(folder),
    )


def _distinguish(runs: Sequence[ReportedRun]) -> list[ReportedRun]:
    """Name runs after their folders where runs of one name differ in more than the seed."""
    mixed = set()
    for name in {run.name for run in runs}:
        same = [run.manifest for run in runs if run.name == name]
        settings = {
            store.canonical([m.objective_name, {k: v for k, v in m.train.items() if k != "tokens"}]) for m in same
        }
        if len({m.seed for m in same}) < len(same) or len(settings) > 1 or not equal_budgets(same):
            mixed.add(name)
    return [replace(run, name=run.folder_name) if run.name in mixed else run for run in runs]


def _alike_finetuned(runs: list[ReportedRun]) -> list[ReportedRun]:
    """The runs without what `phf tamper` or `phf persist` found, with a note, if that was not tried in the same way on
    all of them."""
    tampered = {
        store.canonical([to_plain(t.settings), t.on, t.identity, t.threshold])
        for run in runs
        if (t := run.tamper) is not None
    }
    if len(tampered) > 1:
        _note_ways("tamper")
        runs = [replace(run, tamper=None) for run in runs]
    persisted = {
        store.canonical([to_plain(p.settings), p.identity, p.threshold])
        for run in runs
        if (p := run.persist) is not None
    }
    if len(persisted) > 1:
        _note_ways("persist")
        runs = [replace(run, persist=None) for run in runs]
    return runs


def _note_ways(command: str) -> None:
    print(
        f"note: phf {command} was run in different ways on the runs, so its results are not shown; run it on all with "
        "the same settings",
        file=sys.stderr,
    )


def equal_budgets(manifests: Sequence[TrainManifest]) -> bool:
    """Whether runs had the same budget: of targets, or of source text. With equal source text, what a seed inserts or
    drops changes the number of targets."""
    if len({m.counts.tokens for m in manifests}) == 1:
        return True
    source = [float(m.counts.exposure.get("source", 0)) for m in manifests]
    return min(source) > 0.99 * max(source) > 0


def _check_comparable(folder: Path, runs: Sequence[ReportedRun]) -> None:
    """Raise StoreError if runs were trained, sampled, measured or attacked in different ways."""

    def same(what: str, found: Sequence[Any], advice: str) -> None:
        if len({store.canonical(f) for f in found}) > 1:
            raise store.StoreError(
                f"the runs below {folder} differ in {what}, so their numbers do not compare; {advice}"
            )

    results = [run.result for run in runs]
    apart = "write one page for each group"
    judged_on = [r.tokens_content if r.data is None else r.data.tokens.content for r in results]
    same("their tokens", judged_on, apart)
    same("their scorer", [r.identity for r in results], apart)
    same("their threshold", [r.threshold for r in results], apart)
    alike = "judge them in the same way, or write one page for each"
    for name in sorted({name for r in results for name in r.scenarios}):
        kept = [r.scenarios[name].scenario for r in results if name in r.scenarios]
        same(f"how scenario {name!r} was sampled", [_without_batch(s) for s in kept], alike)
    kls = [r.kl for r in results if r.kl is not None]
    same("the reference of KL", [[k.reference, k.num_samples, k.max_tokens] for k in kls], alike)
    attacked = [run.redteam.search.settings for run in runs if run.redteam is not None]
    same("how they were attacked", [_without_batch(s) for s in attacked], alike)


def _without_batch(settings: Scenario | RedTeam) -> Plain:
    """Settings without the batch size, which changes no result."""
    return {k: v for k, v in to_plain(settings).items() if k != "batch"}
