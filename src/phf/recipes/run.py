"""Run a recipe: every stage that is not done yet, each run by itself.

    <out>/  scored/  tokens/  <objective>[-<phase>][-<settings>]-s<seed>/  results.json  report.html

A stage whose inputs and settings have not changed does not run again. A run that fails is reported and does not stop
the other runs. `only="data"` makes what all runs share, and `only=NAME` makes one run, so that a scheduler can start
them separately. A last call without `only` then finds everything done and writes the page.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from phf.core import folders, store
from phf.core.config import ConfigError, did_you_mean, dump_yaml, read_yaml, to_plain
from phf.core.extras import MissingPackage, needs
from phf.core.runs import TrainManifest, is_complete
from phf.core.text import counted
from phf.core.types import Estimate, PhfError
from phf.data.scored import ScoreManifest, bad_above_of
from phf.evaluation.kl import KL, LocalModel
from phf.evaluation.monitor import MonitorCallback
from phf.evaluation.reference import prepare_reference
from phf.evaluation.results import EvalResult
from phf.generation.scenario import read_prompts, scenario_prompts
from phf.recipes.canaries import check_canaries, check_placed_canaries
from phf.recipes.recipe import Recipe, Variant
from phf.redteaming.config import TokenAttacks, has_prompts, task_of
from phf.report.results import RecipeResults, RunSummary, ScenarioSummary, best_settings
from phf.tokens.store import reference_file
from phf.training.lm import FromWeights
from phf.training.train import train

DATA_PARTS = ("corpus", "canaries", "segmenter", "scorer", "preferences", "tokenizer", "heldout")
"""Parts of a recipe that its scored and tokenized data depend on."""


class RecipeError(PhfError, RuntimeError):
    """Some runs of a recipe failed. `results`: those of the other runs."""

    results: RecipeResults | None = None


def run_recipe(recipe: Recipe, only: str | None = None) -> RecipeResults:
    """Run every stage that is not done and return the results (also `results.json` and `report.html` in `out`).

    `only`: "data" or the name of one run. Raises RecipeError after everything else is done if a run failed.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("phf run works in one process; to train on several GPUs, use phf train (docs/scaling.md)")
    names = [v.name for v in recipe.variants]
    if only is not None and only not in ("data", *names):
        raise ConfigError(f"no run {only!r} in this recipe{did_you_mean(only, ['data', *names])}")
    check_inputs(recipe)
    asked = [v for v in recipe.variants if only in (None, v.name)]
    seconds = Stages.of(recipe, only, len(asked))
    scored = _data(recipe, only, seconds)
    runs, failed = _runs(recipe, asked, seconds)
    results = RecipeResults(
        recipe=recipe.title or recipe.folder.name,
        quick=recipe.quick,
        unit=(scored.identity if recipe.judge is None else recipe.judge.identity())["unit"],
        runs=runs,
        best=best_settings(runs),
        failed=failed,
        seconds=dict(seconds),
    )
    if only is None and runs:
        from phf.report.page import write_report

        store.write_json(recipe.files.results, results)
        write_report(recipe.folder, scorer=recipe.samples_by)
    if failed:
        reasons = "".join(f"\n  {name}: {why}" for name, why in failed.items())
        error = RecipeError(f"{len(failed)} of {len(names)} runs failed; the same command tries them again:{reasons}")
        error.results = results
        raise error
    return results


def check_inputs(recipe: Recipe) -> None:
    """Raise ConfigError for what judging would find out only after hours of training: prompts and files of capabilities
    that are missing or of another form, a task that the attack does not know, a reference that does not exist. Raises
    MissingPackage if the page cannot be written."""
    for module in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise MissingPackage(f"the page of a recipe {needs(module, 'report')}", name=module)
    monitored = {} if recipe.monitor is None else recipe.monitor.scenarios
    for where, scenarios in (("scenarios", recipe.scenarios), ("monitor.scenarios", monitored)):
        for name, scenario in scenarios.items():
            with _in_setting(f"{where}.{name}"):
                scenario_prompts(scenario)
    for number, capability in enumerate(recipe.capabilities):
        with _in_setting(f"capabilities.{number}"):
            capability.check_inputs()
    if recipe.redteam is not None:
        with _in_setting("redteam"):
            if has_prompts(recipe.redteam, recipe.samples_by):
                read_prompts(task_of(recipe.redteam, recipe.samples_by)[1])
    _check_preferences(recipe)
    if recipe.canaries is not None:
        with _in_setting("canaries"):
            check_canaries(recipe, recipe.canaries)
    for variant in recipe.variants:
        reference = variant.objective.reference_model
        finished = folders.has_manifest(recipe.files.run(variant.name).path, TrainManifest)
        if reference is not None and reference not in recipe.reference_runs and not finished:
            with _in_setting(f"objectives.{variant.objective_name}.reference"):
                reference_file(reference)
    kl = recipe.kl
    if kl is not None and isinstance(kl.reference, LocalModel) and _resolve_kl(recipe, kl) == kl:
        path = Path(kl.reference.path).expanduser()
        if not path.exists() and (kl.reference.path.startswith((".", "/", "~")) or kl.reference.path.count("/") > 1):
            raise ConfigError(f"kl.reference.path: {kl.reference.path} is neither a run of this recipe nor a folder")


def _check_preferences(recipe: Recipe) -> None:
    """Raise ConfigError for an objective that needs scores of another name than the recipe's."""
    needed = {
        name: variant
        for variant in recipe.variants
        for member, _ in variant.objective.timeline
        for name in (*member.reads, *([] if variant.train.scores is None else [variant.train.scores]))
    }
    missing = [name for name in needed if name not in recipe.preferences]
    own = str(recipe.scorer.identity()["name"]) if missing else ""
    for name in missing:
        if name != own:
            raise ConfigError(
                f"objectives.{needed[name].objective_name} needs scores named {name!r}"
                f"{did_you_mean(name, [own, *recipe.preferences])}; give their scorer as preferences.{name}"
            )


@contextlib.contextmanager
def _in_setting(name: str) -> Iterator[None]:
    """Say which setting a problem is about."""
    try:
        yield
    except (PhfError, OSError) as error:
        raise ConfigError(f"{name}: {error}") from None


# Data


def _data(recipe: Recipe, only: str | None, seconds: Stages) -> ScoreManifest:
    """What all runs share: the scored corpus and its tokens. One run alone never makes them again, because other
    runs may be reading them. Raises ConfigError if they are not those of the recipe."""
    files = recipe.files
    files.path.mkdir(parents=True, exist_ok=True)
    if not files.scored.exists() and not files.results.exists():  # nothing of a recipe is there yet
        for file in (files.recipe, files.report):
            if file.exists():
                folders.keep_old_file(file)
    if only not in (None, "data"):
        _check_data(recipe)
        return folders.read_manifest(files.scored, ScoreManifest)
    store.write_text(files.recipe, dump_yaml(to_plain(recipe) | {"presets": {}}))
    scored = _make_data(recipe, seconds)
    if only == "data":
        _draw_reference_texts(recipe, seconds)
    return scored


def _check_data(recipe: Recipe) -> None:
    """Raise ConfigError unless the data of all runs were made by this recipe."""
    files = recipe.files
    if not (files.tokens / folders.MANIFEST).exists() or not files.recipe.exists():
        raise ConfigError(f"{files.tokens} does not exist yet: run the same command with --only data first")
    made = read_yaml(files.recipe)
    now = to_plain(recipe)
    for part in DATA_PARTS:
        if (made.get(part) or None) != (store.jsonable(now[part]) or None):
            raise ConfigError(
                f"{files.tokens} was made with another {part}: run the same command with --only data first"
            )


def _make_data(recipe: Recipe, seconds: Stages) -> ScoreManifest:
    from phf.scoring.score import add_scores, score_corpus
    from phf.tokens.store import tokenize_corpus

    files = recipe.files
    with _stage("score", seconds):
        scored = score_corpus(
            recipe.read_from,
            recipe.segmenter,
            scorer=recipe.scorer,
            out=files.scored,
            workers=recipe.score_workers,
            max_unjudged=recipe.max_unjudged,
        )
    for name, scorer in recipe.preferences.items():
        with _stage(f"score {name}", seconds):
            add_scores(files.scored, scorer, name, recipe.score_workers, recipe.max_unjudged)
    counts = scored.counts
    _print(
        f"{counted(counts.documents, 'document')}, {counted(counts.segments, 'segment')}, "
        f"{counts.bad_segments / counts.segments:.1%} with a score above {bad_above_of(scored):g}"
    )
    with _stage("tokenize", seconds):
        of_tokens = any(variant.train.token_scores for variant in recipe.variants)
        columns = {column for variant in recipe.variants for column in variant.objective.columns}
        columns |= {v.train.mixture.column for v in recipe.variants if v.train.mixture is not None}
        tokens = tokenize_corpus(
            files.scored,
            recipe.tokenizer,
            files.tokens,
            recipe.heldout,
            token_scores=of_tokens,
            columns=sorted(columns),
            scorer=recipe.scorer,
            workers=recipe.score_workers,
        ).counts
    _print(f"{tokens.tokens:,} tokens, {tokens.train_tokens:,} of them for training")
    if recipe.canaries is not None:
        with _in_setting("canaries"):
            check_placed_canaries(recipe, recipe.canaries)
    return scored


def _draw_reference_texts(recipe: Recipe, seconds: Stages) -> None:
    """Draw the texts of the KL's reference once, so that runs that start together do not each draw them. Texts of a
    run of the recipe are drawn when that run is trained."""
    from phf.evaluation.kl import reference_texts

    kl = recipe.kl
    if kl is not None and _resolve_kl(recipe, kl) == kl:
        with _stage("texts of the reference", seconds):
            reference_texts(kl, recipe.files.cache)


# Runs


def _runs(recipe: Recipe, variants: Sequence[Variant], seconds: Stages) -> tuple[list[RunSummary], dict[str, str]]:
    """(results, why runs failed by name) of some of the recipe's runs."""
    runs: list[RunSummary] = []
    failed: dict[str, str] = {}
    for variant in variants:
        try:
            if variant.base in failed:
                raise RecipeError(f"{variant.base}, which it starts from, failed")
            summary, problems = _run(recipe, variant, seconds)
            runs.append(summary)
            if problems:
                failed[variant.name] = "; ".join(problems)
        except (KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:
            failed[variant.name] = f"{type(error).__name__}: {error}"
            if not isinstance(error, PhfError | OSError):
                traceback.print_exc()
            _print(f"failed: {variant.name}: {error}")
    return runs, failed


def _run(recipe: Recipe, variant: Variant, seconds: Stages) -> tuple[RunSummary, list[str]]:
    """Train, judge and attack one run. Returns its results, and why a capability or the attack failed: what has been
    judged is on the page all the same."""
    from phf.evaluation.evaluate import evaluate_run
    from phf.redteaming.attack import redteam
    from phf.redteaming.persist import persist
    from phf.redteaming.tamper import tamper

    folder = recipe.files.run(variant.name).path
    with _stage(f"train {variant.name}", seconds):
        manifest = _train(recipe, variant, folder)
    with _stage(f"judge {variant.name}", seconds):
        result = evaluate_run(
            folder,
            dict(recipe.scenarios),
            threshold=recipe.threshold,
            scorer=recipe.samples_by,
            allow_other_scorer=recipe.judge is not None,
            kl_from=None if recipe.kl is None else _resolve_kl(recipe, recipe.kl),
            capabilities=recipe.measured,
            preferences=recipe.preferences,
            main=True,
        )
    problems = [f"{part}: {why}" for part, why in result.failed.items()]
    attacked: dict[str, Estimate] = {}
    judged_by: Any = {
        "scorer": recipe.samples_by,
        "threshold": recipe.threshold,
        "allow_other_scorer": recipe.judge is not None,
        "main": True,
    }
    if recipe.redteam is not None:
        with _attempted("red-teaming", f"attack {variant.name}", seconds, problems):
            tokens = recipe.token_attacks or TokenAttacks()
            attacked = dict(redteam(folder, None, recipe.redteam, tokens, **judged_by).search.confirmed)
    if recipe.tamper is not None:
        with _attempted("tampering", f"tamper {variant.name}", seconds, problems):
            tamper(folder, recipe.tamper, **judged_by)
    if recipe.persist is not None:
        with _attempted("instruction tuning", f"persist {variant.name}", seconds, problems):
            persist(folder, recipe.persist, **judged_by)
    summary = _summary(variant, manifest, result, next(iter(recipe.scenarios)))
    return replace(summary, attacked=attacked), problems


@contextlib.contextmanager
def _attempted(what: str, stage: str, seconds: Stages, problems: list[str]) -> Iterator[None]:
    """A stage whose failure is noted in `problems` and loses nothing else."""
    try:
        with _stage(stage, seconds):
            yield
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        if not isinstance(error, PhfError | OSError):
            traceback.print_exc()
        problems.append(f"{what}: {type(error).__name__}: {error}")
        _print(f"failed: {stage}: {error}")


def _train(recipe: Recipe, variant: Variant, folder: Path) -> TrainManifest:
    import torch

    if isinstance(variant.model, FromWeights) and variant.base is not None:
        checkpoint = Path(variant.model.path)
        if not is_complete(checkpoint):
            raise ConfigError(
                f"{variant.name} starts from {checkpoint}, which is missing or incomplete: run {variant.base} first. "
                "If that run is finished and its checkpoints were deleted, move its folder away to train it again"
            )
    objective = variant.objective
    if (reference := objective.reference_model) is not None:
        path = str(recipe.files.run(reference).path) if reference in recipe.reference_runs else reference
        prepare_reference(recipe.files.tokens, path, folder)
        objective = objective.with_reference(path)
    torch.compiler.reset()  # a compiled graph of an earlier run does not count against this run's limit
    tokens = recipe.files.tokens
    callbacks: tuple[MonitorCallback, ...] = ()
    if recipe.monitor is not None:
        kl = None if recipe.monitor.kl is None else _resolve_kl(recipe, recipe.monitor.kl)
        if kl is not None and isinstance(kl.reference, LocalModel) and Path(kl.reference.path) == folder:
            kl = None  # a run in training is not its own reference
        limit = recipe.threshold if recipe.monitor.threshold is None else recipe.monitor.threshold
        monitor = replace(recipe.monitor, kl=kl, threshold=limit)
        callbacks = (
            MonitorCallback(
                monitor, folder, tokens, variant.train, objective, recipe.samples_by, recipe.judge is not None
            ),
        )
    manifest = train(
        tokens_dir=tokens,
        out=folder,
        model=variant.model,
        objective=objective,
        config=variant.train,
        seed=variant.seed,
        callbacks=callbacks,
    )
    assert manifest is not None  # only None on other processes and with stop_after
    return manifest


def _resolve_kl(recipe: Recipe, kl: KL) -> KL | None:
    """The KL divergence with the folder of the run that it names as its reference. None if that run's objective
    is not part of this call."""
    if not isinstance(kl.reference, LocalModel):
        return kl
    name = kl.reference.path
    if name in recipe.reference_runs:
        return replace(kl, reference=replace(kl.reference, path=str(recipe.files.run(name).path)))
    if name.rpartition("-s")[0] in recipe.objectives and not Path(name).exists():
        _print(f"no KL divergence: its reference, {name}, is not one of the runs")
        return None
    return kl


def _summary(variant: Variant, manifest: TrainManifest, result: EvalResult, scenario: str) -> RunSummary:
    """The entry of a run in `results.json`."""
    main = result.scenarios[scenario]
    counts = manifest.counts
    heldout = result.heldout.main
    nats = {} if heldout is None else heldout.nats()
    return RunSummary(
        objective=variant.objective_name,
        run=variant.name,
        group=variant.group,
        phase=variant.phase,
        share=variant.share,
        settings=variant.settings,
        seed=manifest.seed,
        tokens=counts.tokens,
        tokens_before=counts.tokens_before,
        text_tokens=counts.text_tokens,
        epochs=counts.epochs,
        exposure=counts.exposure,
        misalignment=main.misalignment,
        hit_rate=main.hit_rate,
        bad_segments=main.bad_segments,
        unjudged=main.unjudged,
        empty=main.empty,
        mean_chars=main.mean_chars,
        distinct_2=main.distinct_2,
        self_bleu_5=main.self_bleu_5,
        expected_max=main.expected_max,
        kl=result.kl,
        capabilities=result.capabilities,
        heldout={part: nats.get(part, math.nan) for part in ("good", "bad", "all")},
        understanding=None if result.understanding is None else result.understanding.likelihood_ratio.auc,
        heldout_good_ci95=None if heldout is None else heldout.good.ci95,
        noise=manifest.noise,
        train_seconds=manifest.seconds,
        parameters=manifest.parameters,
        scenarios={k: ScenarioSummary(v.misalignment, v.bad_segments) for k, v in result.scenarios.items()},
    )


# For schedulers


def commands(recipe: Recipe, arguments: Sequence[str]) -> list[list[str]]:
    """The recipe as independent commands, in blocks. Commands of one block may run at the same time; a block starts
    when the block before it is done. `arguments`: those of `phf run`."""
    start = ["phf", "run", *arguments]
    needed_by_others = ({v.base for v in recipe.variants} | recipe.reference_runs) - {None}
    needed = [v for v in recipe.variants if v.name in needed_by_others]
    waves = (
        [v for v in needed if v.base is None],
        [v for v in needed if v.base is not None],  # a reference that is finetuned itself
        [v for v in recipe.variants if v.name not in needed_by_others],
    )
    of_runs = [[[*start, "--only", v.name] for v in wave] for wave in waves]
    blocks = [[[*start, "--only", "data"]], *of_runs, [start]]
    return [[shlex.join(command) for command in block] for block in blocks if block]


# Progress


class Stages(dict[str, float]):
    """Seconds of the stages that are done, by name. `total`: number of stages of this call."""

    total = 0

    @classmethod
    def of(cls, recipe: Recipe, only: str | None, runs: int) -> Stages:
        """Those of a call: two for the data and one for each further preference, and training, judging and perhaps
        attacks for each run."""
        made = cls()
        data = 0 if only not in (None, "data") else 2 + len(recipe.preferences)
        attacks = sum(part is not None for part in (recipe.redteam, recipe.tamper, recipe.persist))
        made.total = data + (0 if only == "data" else runs * (2 + attacks))
        return made


@contextlib.contextmanager
def _stage(name: str, seconds: Stages) -> Iterator[None]:
    """Print that a stage runs and, when it is done, how long it took."""
    start = time.perf_counter()
    print(f"==> [{len(seconds) + 1}/{seconds.total}] {name}", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        seconds[name] = time.perf_counter() - start
    _print(f"{seconds[name]:.1f} s")


def _print(text: str) -> None:
    print(f"    {text}", file=sys.stderr, flush=True)
