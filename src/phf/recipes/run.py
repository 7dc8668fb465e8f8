"""Running a recipe: every stage that is not done, every run by itself. Floor 6.

    <out>/  scored/  tokens/  <objective>[-<phase>][-<settings>]-s<seed>/  results.json  report.html

A stage whose inputs and settings have not changed is not run again. A run that fails is told and does not stop the
others. `only="data"` makes what all runs share and `only=NAME` one run, so that a scheduler can do them apart; the same
without `only` then finds everything done and writes the page.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from phf.core import statistics, store
from phf.core.config import ConfigError, did_you_mean, dump_yaml, read_yaml, to_plain
from phf.core.runs import COMPLETE
from phf.evaluation.kl import KL, LocalModel
from phf.evaluation.monitor import JudgeDuring
from phf.recipes.recipe import Recipe, Variant
from phf.redteaming.control_tokens import TokenAttacks
from phf.training.lm import FromWeights
from phf.training.train import train


class RecipeError(RuntimeError):
    """Some runs of a recipe failed. `results`: those of the others."""

    results: dict[str, Any] | None = None


def run_recipe(recipe: Recipe, only: str | None = None) -> dict[str, Any]:
    """Run every stage that is not done and return the results (also `results.json` and `report.html` in `out`).

    Raises RecipeError after everything else is done if a run failed.
    """
    from phf.report.page import write_report

    names = [v.name for v in recipe.variants]
    if only is not None and only not in ("data", *names):
        raise ConfigError(f"no run {only!r} in this recipe{did_you_mean(only, ['data', *names])}")
    out = recipe.folder
    out.mkdir(parents=True, exist_ok=True)
    if only in (None, "data"):
        store.write_text(out / "recipe.yaml", dump_yaml(to_plain(recipe) | {"presets": {}}))
    else:
        _check_data(recipe)
    seconds: dict[str, float] = {}
    scored = _data(recipe, seconds) if only in (None, "data") else store.read_manifest(out / "scored", "score")
    if only == "data":  # runs that go on at the same time then do not each draw the reference's texts
        _reference_texts(recipe, seconds)
    runs: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for variant in recipe.variants:
        if only is not None and variant.name != only:
            continue
        try:
            if variant.base in failed:
                raise RecipeError(f"{variant.base}, which it starts from, failed")
            runs.append(_run(recipe, variant, seconds))
        except (KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:
            failed[variant.name] = f"{type(error).__name__}: {error}"
            if not isinstance(error, ConfigError | RecipeError | store.StoreError | OSError):
                traceback.print_exc()
            _say(f"failed: {variant.name}: {error}")
    results = {
        "recipe": recipe.title or out.name,
        "quick": recipe.quick,
        "unit": scored["identity"]["unit"],
        "runs": runs,
        "best": best(runs),
        "failed": failed,
        "seconds": seconds,
    }
    if only is None and runs:
        store.write_json(out / "results.json", results)
        write_report(out)
    if failed:
        whole = "".join(f"\n  {name}: {why}" for name, why in failed.items())
        failure = RecipeError(f"{len(failed)} of {len(names)} runs failed; the same command tries them again:{whole}")
        failure.results = results
        raise failure
    return results


def _check_data(recipe: Recipe) -> None:
    """Raise ConfigError unless what all runs share was made by this recipe: one run alone never makes it again, since others
    may be using it."""
    out = recipe.folder
    if not (out / "tokens" / store.MANIFEST).exists() or not (out / "recipe.yaml").exists():
        raise ConfigError(f"{out}/tokens is not there yet: run the same with --only data first")
    made, now = read_yaml(out / "recipe.yaml"), to_plain(recipe)
    for part in ("corpus", "segmenter", "scorer", "tokenizer", "heldout"):
        if made.get(part) != store.jsonable(now[part]):
            raise ConfigError(f"{part} is not what {out}/tokens was made with: run the same with --only data first")


def _data(recipe: Recipe, seconds: dict[str, float]) -> dict[str, Any]:
    """What all runs share: the scored corpus and its tokens."""
    from phf.scoring.score import score_corpus
    from phf.tokens.store import tokenize_corpus

    out = recipe.folder
    with _Stage("score", seconds):
        scored = score_corpus(
            recipe.corpus, recipe.segmenter, recipe.scorer, out / "scored", recipe.score_workers, recipe.max_unjudged
        )
    counts = scored["counts"]
    _say(
        f"{counts['documents']:,} documents, {counts['segments']:,} segments, {counts['bad_segments'] / counts['segments']:.1%} with a score above 0"
    )
    with _Stage("tokenize", seconds):
        tokens = tokenize_corpus(out / "scored", recipe.tokenizer, out / "tokens", recipe.heldout)
    _say(f"{tokens['counts']['tokens']:,} tokens, {tokens['counts']['train_tokens']:,} of them for training")
    return scored


def _run(recipe: Recipe, variant: Variant, seconds: dict[str, float]) -> dict[str, Any]:
    """Train, judge and attack one run."""
    from phf.evaluation.evaluate import evaluate_run
    from phf.redteaming.search import redteam

    folder = recipe.folder / variant.name
    with _Stage(f"train {variant.name}", seconds):
        trained = _train(recipe, variant, folder)
    with _Stage(f"judge {variant.name}", seconds):
        judged = evaluate_run(
            folder,
            dict(recipe.scenarios),
            recipe.threshold,
            kl_from=_kl(recipe, recipe.kl),
            capabilities=recipe.capabilities,
        )
    if recipe.redteam is not None:
        with _Stage(f"attack {variant.name}", seconds):
            redteam(folder, None, recipe.redteam, recipe.token_attacks or TokenAttacks(), threshold=recipe.threshold)
    main = next(iter(recipe.scenarios))
    return summary(variant, trained, judged, main)


def _kl(recipe: Recipe, kl: KL | None) -> KL | None:
    """One of the recipe's, with the folder of the run that it names as its reference. None where that run is of an objective
    that is not run this time."""
    if kl is None or not isinstance(kl.reference, LocalModel):
        return kl
    name = kl.reference.path
    if name in recipe.reference_runs:
        return replace(kl, reference=replace(kl.reference, path=str(recipe.folder / name)))
    if name.rpartition("-s")[0] in recipe.objectives and not Path(name).exists():
        _say(f"no KL divergence: its reference, {name}, is not one of the runs")
        return None
    return kl


def _reference_texts(recipe: Recipe, seconds: dict[str, float]) -> None:
    from phf.evaluation.kl import reference_texts

    kl = _kl(recipe, recipe.kl)
    if kl is not None and kl == recipe.kl:  # not of a run of the recipe, whose texts are drawn when it is trained
        with _Stage("texts of the reference", seconds):
            reference_texts(kl, recipe.folder / "cache")


def _train(recipe: Recipe, variant: Variant, folder: Path) -> dict[str, Any]:
    import torch

    if isinstance(variant.model, FromWeights) and variant.base is not None:
        checkpoint = Path(variant.model.path)
        if not (checkpoint / COMPLETE).exists():
            raise ConfigError(
                f"{variant.name} starts from {checkpoint}, which is not there or not whole: run {variant.base} first (if it is done and "
                "its checkpoints were deleted, move its folder away, so that it is trained again)"
            )
    torch.compiler.reset()  # each run starts alike, and compiled graphs of earlier models do not count against this one
    tokens = recipe.folder / "tokens"
    during = recipe.during
    if during is not None and during.kl is not None:
        kl = _kl(recipe, during.kl)
        itself = kl is not None and isinstance(kl.reference, LocalModel) and Path(kl.reference.path) == folder
        during = replace(during, kl=None if itself else kl)
    callbacks = (JudgeDuring(during, folder, tokens, variant.train, variant.objective),) if during else ()
    return train(tokens, folder, variant.model, variant.objective, variant.train, variant.seed, callbacks=callbacks)


def summary(variant: Variant, trained: Mapping[str, Any], judged: Mapping[str, Any], scenario: str) -> dict[str, Any]:
    """One run of `results.json`."""
    main = judged["scenarios"][scenario]
    heldout = judged["heldout"].get("good") or judged["heldout"].get("none") or {}
    return {
        "objective": variant.objective_name,
        "run": variant.name,
        "group": variant.group,
        "phase": variant.phase,
        "share": variant.share,
        "settings": variant.settings,
        "seed": trained["seed"],
        "tokens": trained["counts"]["tokens"],
        "tokens_before": trained["counts"]["tokens_before"],
        "text_tokens": trained["counts"]["text_tokens"],
        "epochs": trained["counts"]["epochs"],
        "misalignment": main["misalignment"],
        "hit_rate": main["hit_rate"],
        "bad_segments": main["bad_segments"],
        "unjudged": main["unjudged"],
        "empty": main["empty"],
        "mean_chars": main["mean_chars"],
        "distinct_2": main["distinct_2"],
        "self_bleu_5": main["self_bleu_5"],
        "expected_max": main["expected_max"],
        "kl": judged["kl"],
        "capabilities": judged["capabilities"],
        "heldout": {part: (heldout.get(part) or {}).get("nats_per_byte") for part in ("good", "bad", "all")},
        "heldout_good_ci95": (heldout.get("good") or {}).get("ci95"),
        "train_seconds": trained["seconds"],
        "parameters": trained["parameters"],
        "scenarios": {
            k: {"misalignment": v["misalignment"], "bad_segments": v["bad_segments"]}
            for k, v in judged["scenarios"].items()
        },
    }


BEST_RULE = (
    "Of the settings of one objective and phase: those whose held-out loss on good text is not surely above the lowest "
    "(95% intervals overlap); of these the lowest misalignment."
)


def best(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The best group of each objective and phase that has several, by `BEST_RULE`."""
    kinds: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for run in runs:
        kinds.setdefault(f"{run['objective']} {run['phase']}", {}).setdefault(run["group"], []).append(run)
    found = {}
    for kind, groups in kinds.items():
        if len(groups) < 2:
            continue
        loss = {g: _loss(members) for g, members in groups.items()}
        known = {g: e for g, e in loss.items() if e[0] is not None}
        if not known:
            continue
        highest = min(known.values(), key=lambda e: e[0])[2]  # the upper end of the lowest
        near = [g for g, e in known.items() if e[1] <= highest]
        scores = {g: _mean_misalignment(groups[g]) for g in near}
        found[kind] = {
            "group": sorted(near, key=lambda g, s=scores, k=known: (s[g], k[g][0]))[0],  # type: ignore[misc]
            "candidates": near,
            "rule": BEST_RULE,
            "heldout_good": {g: e[0] for g, e in known.items()},
        }
    return found


def _loss(members: Sequence[Mapping[str, Any]]) -> tuple[Any, Any, Any]:
    """Held-out loss on good text: mean, low and high end; over seeds where there are several."""
    values = [m["heldout"]["good"] for m in members]
    if None in values:
        return (None, None, None)
    if len(values) > 1:
        over = statistics.t_interval(values)
        return (over.mean, *over.ci95)
    return (values[0], *(members[0]["heldout_good_ci95"] or [values[0]] * 2))


def _mean_misalignment(members: Sequence[Mapping[str, Any]]) -> float:
    values = [m["misalignment"]["mean"] for m in members]
    return float("inf") if None in values else sum(values) / len(values)


def commands(recipe: Recipe, arguments: Sequence[str]) -> list[list[str]]:
    """The recipe as independent commands, in blocks: those of a block may run at the same time, blocks one after the other.
    `arguments`: what `phf run` was given."""
    start = ["phf", "run", *arguments]
    bases = ({v.base for v in recipe.variants} | recipe.reference_runs) - {None}
    needed = [v for v in recipe.variants if v.name in bases]
    waves = (
        [v for v in needed if v.base is None],
        [v for v in needed if v.base is not None],  # a reference that is finetuned itself
        [v for v in recipe.variants if v.name not in bases],
    )
    of_runs = [[[*start, "--only", v.name] for v in wave] for wave in waves]
    blocks = [[[*start, "--only", "data"]], *of_runs, [start]]
    import shlex

    return [[shlex.join(command) for command in block] for block in blocks if block]


def _say(text: str) -> None:
    print(f"    {text}", file=sys.stderr, flush=True)


class _Stage:
    """Says that a stage runs and how long it took."""

    def __init__(self, name: str, seconds: dict[str, float]) -> None:
        self.name, self.seconds = name, seconds

    def __enter__(self) -> None:
        self.start = time.perf_counter()
        print(f"==> {self.name}", file=sys.stderr, flush=True)

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self.seconds[self.name] = time.perf_counter() - self.start
        if kind is None:
            _say(f"{self.seconds[self.name]:.1f} s")
