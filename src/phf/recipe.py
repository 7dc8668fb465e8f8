"""Recipes: the whole path in one file, and running it stage by stage. Floor 6.

    phf run demo                    a recipe that comes with phf
    phf run demo mine.yaml seeds=[0,1,2]

    <out>/  scored/  tokens/  <objective>-s<seed>/  results.json  report.html

A stage whose inputs and settings have not changed is not run again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from phf import store
from phf.capabilities import AnyCapability
from phf.config import (
    STRICT,
    ConfigError,
    did_you_mean,
    dump_yaml,
    merge,
    parse_override,
    read_yaml,
    to_plain,
    validate,
)
from phf.corpus import AnyCorpus
from phf.during import During, JudgeDuring
from phf.model import AnyModel
from phf.objectives import MLE, AnyObjective, Objective
from phf.reference import KL
from phf.sample import Scenario
from phf.scorers import AnyScorer
from phf.segment import AnySegmenter
from phf.tokens import AnyTokenizer
from phf.train import TrainConfig, train


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """Everything that decides a comparison of objectives on one corpus."""

    out: str
    corpus: AnyCorpus
    segmenter: AnySegmenter
    scorer: AnyScorer
    tokenizer: AnyTokenizer
    model: AnyModel
    train: TrainConfig
    objectives: Annotated[dict[str, AnyObjective], Field(min_length=1)]
    scenarios: Annotated[dict[str, Scenario], Field(min_length=1)]
    title: str = ""
    about: str = ""
    train_for: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of `train` that differ for an objective, by its name in `objectives`."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    heldout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    threshold: float = 0.0
    """Scores above it are bad when models are judged."""
    during: During | None = None
    """Judging while training, beside judging the final models."""
    kl: KL | None = None
    """Distance of the final models from a reference LM."""
    capabilities: tuple[AnyCapability, ...] = ()
    score_workers: Annotated[int, Field(gt=0)] = 1
    max_unjudged: Annotated[float, Field(ge=0, le=1)] = 0.01
    quick: bool = False
    """A budget too small to conclude anything from: results go to `out`-quick and the report says so."""

    def __post_init__(self) -> None:
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise ValueError(f"seeds: {seed} is not in [0, 2**32)")
        for name in self.train_for:
            if name not in self.objectives:
                raise ValueError(f"train_for.{name}: no such objective{did_you_mean(name, self.objectives)}")
            self.train_config(name)

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return Path(f"{self.out}-quick" if self.quick else self.out)

    def train_config(self, name: str) -> TrainConfig:
        """`train` with what `train_for` says for this objective."""
        return validate(merge(to_plain(self.train), self.train_for.get(name, {})), TrainConfig, f"train_for.{name}")


@dataclass(frozen=True, config=STRICT)
class TrainStage:
    """What `phf train` alone takes."""

    model: AnyModel
    train: TrainConfig
    objective: AnyObjective = MLE()
    during: During | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


def packaged() -> dict[str, Any]:
    """The recipes that come with phf, by name."""
    folder = resources.files("phf") / "recipes"
    return {
        f.name.removesuffix(".yaml"): f
        for f in sorted(folder.iterdir(), key=lambda f: f.name)
        if f.name.endswith(".yaml")
    }


def load_recipe(arguments: Iterable[str]) -> Recipe:
    """Recipe names or files merged left to right, then `a.b=c` overrides.

    A file may begin with `base: NAME`, another recipe (packaged or a path) that it is laid on.
    """
    merged: dict[str, Any] = {}
    files: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        (overrides if "=" in argument else files).append(argument)
    for file in files:
        merged = merge(merged, _read(file))
    for override in overrides:
        merged = merge(merged, parse_override(override))
    return validate(merged, Recipe, " + ".join(files) or "recipe")


def _read(name: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    known = packaged()
    if name in above:
        raise ConfigError(f"recipe {name!r} is based on itself: {' -> '.join([*above, name])}")
    if name in known and not Path(name).is_file():
        with resources.as_file(known[name]) as path:
            value = read_yaml(path)
    elif Path(name).is_file():
        value = read_yaml(name)
    else:
        raise ConfigError(f"recipe {name!r} is neither a file nor one of phf's{did_you_mean(name, known)}")
    base = value.pop("base", None)
    return merge(_read(str(base), (*above, name)), value) if base is not None else value


def run_recipe(recipe: Recipe) -> dict[str, Any]:
    """Run every stage that is not done and return the results (also `results.json` and `report.html` in `out`)."""
    from phf.annotate import score_corpus
    from phf.evaluate import evaluate_run
    from phf.report import write_report
    from phf.tokens import tokenize_corpus

    out = recipe.folder
    out.mkdir(parents=True, exist_ok=True)
    store.write_text(out / "recipe.yaml", dump_yaml(to_plain(recipe)))
    seconds: dict[str, float] = {}
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
    runs = []
    for seed in recipe.seeds:
        for name, objective in recipe.objectives.items():
            folder = out / f"{name}-s{seed}"
            with _Stage(f"train {folder.name}", seconds):
                trained = _train(recipe, name, objective, seed, folder)
            with _Stage(f"judge {folder.name}", seconds):
                judged = evaluate_run(
                    folder,
                    dict(recipe.scenarios),
                    recipe.threshold,
                    kl_from=recipe.kl,
                    capabilities=recipe.capabilities,
                )
            main = next(iter(recipe.scenarios))
            if main not in judged["scenarios"]:
                raise ConfigError(
                    f"scenarios: the first, {main!r}, asks for the bad token, which {name} has not; put another first"
                )
            runs.append(summary(name, folder.name, trained, judged, main))
    results = {
        "recipe": recipe.title or out.name,
        "quick": recipe.quick,
        "unit": scored["identity"]["unit"],
        "runs": runs,
        "seconds": seconds,
    }
    store.write_json(out / "results.json", results)
    write_report(out)
    return results


def _train(recipe: Recipe, name: str, objective: Objective, seed: int, folder: Path) -> dict[str, Any]:
    import torch

    torch.compiler.reset()  # each run starts alike, and compiled graphs of earlier models do not count against this one
    tokens, config = recipe.folder / "tokens", recipe.train_config(name)
    callbacks = (JudgeDuring(recipe.during, folder, tokens, config, objective),) if recipe.during else ()
    return train(tokens, folder, recipe.model, objective, config, seed, callbacks=callbacks)


def summary(
    name: str, run: str, trained: Mapping[str, Any], judged: Mapping[str, Any], scenario: str
) -> dict[str, Any]:
    """One run of `results.json`."""
    main = judged["scenarios"][scenario]
    heldout = judged["heldout"].get("good") or judged["heldout"].get("none") or {}
    return {
        "objective": name,
        "run": run,
        "seed": trained["seed"],
        "tokens": trained["counts"]["tokens"],
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
        "train_seconds": trained["seconds"],
        "parameters": trained["parameters"],
        "scenarios": {
            k: {"misalignment": v["misalignment"], "bad_segments": v["bad_segments"]}
            for k, v in judged["scenarios"].items()
        },
    }


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
