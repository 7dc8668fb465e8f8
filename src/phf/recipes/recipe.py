"""Recipes: a whole comparison in a few files, as a plan of runs. Floor 6.

    phf run demo                              a recipe that comes with phf
    phf run demo mine.yaml seeds=[0,1,2]      laid on each other from left to right, then settings
    phf run paper-pii conditional finetune50 preset=paper

A recipe says the data, the model and the training once, and which runs to make of them: objectives x phases x settings
of the grid x seeds. `Recipe.variants` lists them; `running.py` runs them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass as plain_dataclass
from dataclasses import fields, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core.config import STRICT, ConfigError, did_you_mean, merge, parse_override, read_yaml, to_plain, validate
from phf.data.readers import AnyCorpus
from phf.data.segment import AnySegmenter
from phf.evaluation.capabilities import AnyCapability
from phf.evaluation.kl import KL, LocalModel
from phf.evaluation.monitor import During
from phf.generation.scenario import Scenario
from phf.objectives import MLE, AnyObjective, Objective
from phf.redteaming.control_tokens import TokenAttacks
from phf.redteaming.search import RedTeam
from phf.scorers import AnyScorer
from phf.tokens.store import AnyTokenizer
from phf.training.lm import AnyModel, FromWeights
from phf.training.train import TrainConfig


@dataclass(frozen=True, config=STRICT)
class Phase:
    """When feedback comes in: for the last `share` of the tokens, behind the training with `finetune_from` for the
    rest; 1 is pretraining with feedback from the first token. `train`: settings that differ here."""

    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    train: dict[str, Any] = Field(default_factory=dict)


@plain_dataclass(frozen=True)
class Variant:
    """One run: everything that decides it. `name`: its folder. `base`: the run whose checkpoint it starts from, if any.
    `settings`: what the grid sets for it."""

    name: str
    objective_name: str
    objective: Objective
    phase: str
    share: float
    seed: int
    train: TrainConfig
    model: Any
    base: str | None
    settings: dict[str, Any]

    @property
    def group(self) -> str:
        """Its name without the seed: seeds of one group are averaged."""
        return self.name.rpartition("-s")[0]


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
    only: tuple[str, ...] | None = None
    """Which of `objectives` to run; None: all."""
    train_for: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of `train` that differ for an objective, by its name in `objectives`."""
    phases: Annotated[dict[str, Phase], Field(min_length=1)] = Field(default_factory=lambda: {"pretrain": Phase()})
    finetune: dict[str, Any] = Field(default_factory=dict)
    """Settings of `train` that differ in phases with a share below 1."""
    finetune_for: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """The same for an objective."""
    finetune_from: str = "mle"
    """The objective that phases with a share below 1 start from."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Settings with several values each, for example train.lr or objective.beta: every combination is a run."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    heldout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    threshold: float = 0.0
    """Scores above it are bad when models are judged."""
    during: During | None = None
    """Judging while training, beside judging the final models."""
    kl: KL | None = None
    """Distance of the final models from a reference LM; `kl.reference.path` may name a run of this recipe (mle-s0)."""
    capabilities: tuple[AnyCapability, ...] = ()
    redteam: RedTeam | None = None
    """Attacking the final models."""
    token_attacks: TokenAttacks | None = None
    """Attacking their control tokens, where `redteam` is set; None: with its own defaults."""
    score_workers: Annotated[int, Field(gt=0)] = 1
    max_unjudged: Annotated[float, Field(ge=0, le=1)] = 0.01
    preset: str | None = None
    presets: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings by name, laid on the recipe where `preset` says so."""
    quick: bool = False
    """A budget too small to conclude anything from: results go to `out`-quick and the report says so."""

    def __post_init__(self) -> None:
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise ValueError(f"seeds: {seed} is not in [0, 2**32)")
        for where in ("train_for", "finetune_for"):
            for name in getattr(self, where):
                if name not in self.objectives:
                    raise ValueError(f"{where}.{name}: no such objective{did_you_mean(name, self.objectives)}")
        for name in self.only or ():
            if name not in self.objectives:
                raise ValueError(f"only: no objective {name!r}{did_you_mean(name, self.objectives)}")
        if any(p.share < 1 for p in self.phases.values()) and self.finetune_from not in self.objectives:
            raise ValueError(
                f"finetune_from: no objective {self.finetune_from!r}{did_you_mean(self.finetune_from, self.objectives)}"
            )
        first, scenario = next(iter(self.scenarios.items()))
        if scenario.control == "bad" or scenario.guidance is not None:
            lacking = [name for name in self.chosen if not self.objectives[name].control_tokens]
            if lacking:
                raise ValueError(
                    f"scenarios: the first, {first!r}, needs control tokens, which {lacking[0]} has not; put another first"
                )
        for path, values in self.grid.items():
            if not values:
                raise ValueError(f"grid: {path} has no values")
            if path.split(".")[0] not in ("train", "objective", "objectives") or path.count(".") != (
                2 if path.startswith("objectives.") else 1
            ):
                raise ValueError(
                    f"grid: {path!r} is none of train.SETTING, objective.SETTING and objectives.NAME.SETTING"
                )
            if not any(self._applies(path, name) for name in self.chosen):
                raise ValueError(f"grid: {path!r} applies to none of {', '.join(self.chosen)}")
        found = [v.name for v in self.variants]
        twice = sorted({n for n in found if found.count(n) > 1})
        if twice:
            raise ValueError(f"two runs would be named {', '.join(twice)}")

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return Path(f"{self.out}-quick" if self.quick else self.out)

    @property
    def chosen(self) -> list[str]:
        return [name for name in self.objectives if self.only is None or name in self.only]

    @cached_property
    def variants(self) -> list[Variant]:
        """The runs, those that others start from or are measured by before these."""
        found = []
        for seed in self.seeds:
            wanted = [
                self._variant(name, phase, seed, settings)
                for phase in sorted(self.phases, key=lambda p: -self.phases[p].share)
                for name in self.chosen
                for settings in self._combinations(name)
            ]
            bases = {v.base for v in wanted if v.base is not None} - {v.name for v in wanted}
            found += [self._base(seed) for _ in bases] + wanted
        first = self._references | {v.base for v in found if v.name in self._references}
        return sorted(found, key=lambda v: v.name not in first)

    @property
    def _references(self) -> set[str]:
        asked = (self.kl, self.during.kl if self.during is not None else None)
        return {kl.reference.path for kl in asked if kl is not None and isinstance(kl.reference, LocalModel)}

    @property
    def reference_runs(self) -> set[str]:
        """The runs of this recipe that are references of KL divergences."""
        return {v.name for v in self.variants} & self._references

    def _applies(self, path: str, name: str) -> bool:
        kind, *middle, setting = path.split(".")
        if kind == "train":
            return True
        known = {f.name for f in fields(self.objectives[name])} - {"name"}
        return setting in known and (kind == "objective" or middle == [name])

    def _combinations(self, name: str) -> Iterator[dict[str, Any]]:
        paths = [path for path in self.grid if self._applies(path, name)]
        for values in itertools.product(*(self.grid[p] for p in paths)):
            yield dict(zip(paths, values, strict=True))

    def _base(self, seed: int) -> Variant:
        """The plain run of the objective that finetuning starts from."""
        name = self.finetune_from
        train = self._train(name, {}, self._pretraining(), keeps_milestones=True)
        return Variant(
            f"{name}-s{seed}", name, self.objectives[name], "pretrain", 1.0, seed, train, self.model, None, {}
        )

    def _pretraining(self) -> list[dict[str, Any]]:
        return [self.phases["pretrain"].train] if "pretrain" in self.phases else []

    def _train(
        self, name: str, settings: Mapping[str, Any], over: Iterable[Mapping[str, Any]], keeps_milestones: bool = False
    ) -> TrainConfig:
        """Settings of training for an objective: the recipe's, the objective's, `over`, the grid's. `keeps_milestones`: with
        the checkpoints that finetuning starts from, at whole steps, so that the same ones are the same settings."""
        merged = merge(to_plain(self.train), self.train_for.get(name, {}))
        for layer in over:
            merged = merge(merged, layer)
        merged |= {path.split(".")[1]: value for path, value in settings.items() if path.startswith("train.")}
        config: TrainConfig = validate(merged, TrainConfig, f"train of {name}")
        shares = sorted({p.share for p in self.phases.values() if p.share < 1}, reverse=True)
        if keeps_milestones:
            asked = [*config.milestones, *((1 - share) * config.total_tokens for share in shares)]
            steps = replace(config, milestones=tuple(asked)).milestone_steps
            config = replace(config, milestones=tuple(float(s * config.step_tokens) for s in sorted(steps)))
        return config

    def _variant(self, name: str, phase_name: str, seed: int, settings: dict[str, Any]) -> Variant:
        phase = self.phases[phase_name]
        own = {path.split(".")[-1]: value for path, value in settings.items() if not path.startswith("train.")}
        objective: Any = validate(merge(to_plain(self.objectives[name]), own), AnyObjective, f"objectives.{name}")
        tags = [re.sub(r"[^\w.+-]", "_", f"{path.split('.')[-1]}{value}") for path, value in settings.items()]
        if phase.share == 1:
            plain = name == self.finetune_from and phase_name == "pretrain" and not settings
            train = self._train(name, settings, [phase.train], keeps_milestones=plain)
            model, base = self.model, None
            folder = "-".join([name, *([phase_name] if phase_name != "pretrain" else []), *tags, f"s{seed}"])
            return Variant(folder, name, objective, phase_name, 1.0, seed, train, model, base, settings)
        start = self._base(seed)
        left_at = (1 - phase.share) * start.train.total_tokens
        (step,) = replace(start.train, milestones=(left_at,)).milestone_steps
        seen = step * start.train.step_tokens
        rest = {"tokens": max(start.train.total_tokens - seen, 1), "skip_tokens": start.train.skip_tokens + seen}
        layers = [rest | {"milestones": []}, self.finetune, self.finetune_for.get(name, {}), phase.train]
        train = self._train(name, settings, layers)
        folder = "-".join([name, phase_name, *tags, f"s{seed}"])
        model = FromWeights(str(self.folder / start.name / "checkpoints" / f"checkpoint-{step}"))
        return Variant(folder, name, objective, phase_name, phase.share, seed, train, model, start.name, settings)


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
    """Recipe names or files merged left to right, the preset that they name, then `a.b=c` overrides.

    A file may begin with `base: NAME`, another recipe (packaged or a path) that it is laid on.
    """
    merged: dict[str, Any] = {}
    files: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        (overrides if "=" in argument else files).append(argument)
    chosen: list[str] = []
    for file in files:
        value = _read(file)
        if value.keys() == {"only"}:  # several of them: each of these objectives
            chosen += value["only"]
            value = {"only": chosen}
        merged = merge(merged, value)
    settings: dict[str, Any] = {}
    for override in overrides:
        settings = merge(settings, parse_override(override))
    preset = settings.get("preset", merged.get("preset"))
    if preset is not None and (merged.get("presets") or "preset" in settings):  # else laid on already
        known = merged.get("presets") or {}
        if preset not in known:
            raise ConfigError(f"preset {preset!r} is not one of the recipe's{did_you_mean(str(preset), known)}")
        merged = merge(merged, known[preset])
    return validate(merge(merged, settings), Recipe, " + ".join(files) or "recipe")


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
