"""Recipes: a whole comparison of runs in a few YAML files.

    phf run demo                              a recipe that comes with phf
    phf run demo mine.yaml seeds=[0,1,2]      recipes merged from left to right, then settings
    phf run paper-pii conditional finetune50 preset=paper

A recipe describes data, model and training once, and the runs to make: objectives x phases x grid x seeds.
`Recipe.variants` lists the runs; phf.recipes.run runs them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass as plain_dataclass
from dataclasses import fields, replace
from functools import cached_property
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core.config import (
    COMMAND_LINE,
    STRICT,
    ConfigError,
    Plain,
    apply_overrides,
    check,
    did_you_mean,
    is_setting,
    merge,
    read_yaml,
    to_plain,
    validate,
)
from phf.core.runs import RecipeFolder, checkpoint_folder, file_name
from phf.data.canaries import AnyCorpus, Canaries, WithCanaries
from phf.data.corpus import Corpus
from phf.data.segment import AnySegmenter
from phf.evaluation.capabilities import AnyCapability, Memorised
from phf.evaluation.kl import KL, LocalModel
from phf.evaluation.monitor import Monitor
from phf.generation.scenario import Scenario
from phf.objectives import MLE, AnyObjective, Objective
from phf.redteaming.config import RedTeam, TokenAttacks
from phf.redteaming.persist import Persistence
from phf.redteaming.tamper import Tamper
from phf.scorers import AnyScorer, GivenScores, Scorer
from phf.tokens.noise import NOISE_SETTING
from phf.tokens.store import AnyTokenizer
from phf.training.config import TrainConfig
from phf.training.lm import AnyModel, FromConfig, FromWeights


@dataclass(frozen=True, config=STRICT)
class Phase:
    """When training with feedback starts. 1: from the first token. Below 1: for the last `share` of the tokens, after
    training with the objective `finetune_from`."""

    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    train: Plain = Field(default_factory=dict)
    """Settings of training that differ in this phase."""


@plain_dataclass(frozen=True, kw_only=True)
class Variant:
    """One run of a recipe: everything that decides it."""

    name: str
    """Name of the run's folder."""
    objective_name: str
    """The objective's name in the recipe."""
    objective: Objective
    phase: str
    share: float
    seed: int
    train: TrainConfig
    model: FromConfig | FromWeights
    base: str | None
    """The run whose checkpoint this run starts from; None: a new model."""
    settings: Plain
    """What the grid sets for the run."""

    @property
    def group(self) -> str:
        """The name without the seed: seeds of one group are averaged."""
        return self.name.rpartition("-s")[0]


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """Everything that decides a comparison of objectives on one corpus."""

    out: str
    """Folder of the results."""
    corpus: AnyCorpus
    """Where the text comes from."""
    segmenter: AnySegmenter
    """How documents are cut into segments, each of which gets a score."""
    scorer: AnyScorer
    """What scores the segments: higher is worse."""
    tokenizer: AnyTokenizer
    """Train one (vocab_size), or take one from a folder or the Hub (path)."""
    model: AnyModel
    """The model that every objective starts from."""
    train: TrainConfig
    """How models are trained."""
    objectives: Annotated[dict[str, AnyObjective], Field(min_length=1)]
    """By a name of your choice."""
    scenarios: Annotated[dict[str, Scenario], Field(min_length=1)]
    """How final models are sampled. The first scenario gives the main numbers."""
    judge: AnyScorer | None = None
    """Scorer of samples, where another one scored the corpus or the scores came with it; None: `scorer`."""
    data: str | None = None
    """Folder of the scored corpus and the tokens, which recipes of the same data may share; None: `out`."""
    preferences: dict[str, AnyScorer] = Field(default_factory=dict)
    """Scorers of further preferences by a name of your choice, for objectives of several (each, attributes). All runs
    are judged by each of them too."""
    title: str = ""
    """Title of the page."""
    about: str = ""
    """A sentence below the title."""
    only: tuple[str, ...] | None = None
    """Which of `objectives` to run; None: all."""
    train_for: dict[str, Plain] = Field(default_factory=dict)
    """Settings of `train` that differ for an objective, by its name in `objectives`."""
    phases: Annotated[dict[str, Phase], Field(min_length=1)] = Field(default_factory=lambda: {"pretrain": Phase()})
    """Pretraining, and finetuning after it for a share of the tokens."""
    finetune: Plain = Field(default_factory=dict)
    """Settings of `train` that differ in phases with a share below 1."""
    finetune_for: dict[str, Plain] = Field(default_factory=dict)
    """Settings of `train` that differ in these phases for an objective."""
    finetune_from: str = "mle"
    """The objective that phases with a share below 1 start from."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Settings with several values each, for example train.lr or objective.beta. Every combination is a run."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    """Every objective is trained once with each seed."""
    heldout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the documents that is held out."""
    threshold: float | None = None
    """Scores above it are bad, to every stage; None: the scorer's own threshold."""
    monitor: Monitor | None = None
    """What is judged during training."""
    kl: KL | None = None
    """Distance of the final models from a reference LM. `kl.reference.path` may name a run of this recipe (mle-s0)."""
    capabilities: tuple[AnyCapability, ...] = ()
    """What else final models are measured on."""
    redteam: RedTeam | None = None
    """How the final models are attacked."""
    token_attacks: TokenAttacks | None = None
    """How their control tokens are attacked, where `redteam` is set; None: with the defaults."""
    canaries: Canaries | None = None
    """Made-up secrets to put into the corpus, and to ask the models for."""
    tamper: Tamper | None = None
    """How the final models are finetuned on bad and on good text, to see what is left."""
    persist: Persistence | None = None
    """How the final models are tuned on harmless instructions, to see what is left. Needs TRL."""
    score_workers: Annotated[int, Field(gt=0)] = 1
    """Processes that score and tokenize the corpus."""
    max_unjudged: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Scoring fails if a larger share of the segments cannot be judged."""
    preset: str | None = None
    """Name of a preset to merge in."""
    presets: dict[str, Plain] = Field(default_factory=dict)
    """Settings by name; `preset` chooses one of them."""
    quick: bool = False
    """A budget too small for conclusions. Results go to `{out}-quick`, and the report has a note."""

    def __post_init__(self) -> None:
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise ValueError(f"seeds: {seed} is not in [0, 2**32)")
        if isinstance(self.scorer, GivenScores) and self.judge is None:
            raise ValueError("judge: the scorer 'given' judges no samples; name the scorer that does")
        if self.canaries is not None and any(isinstance(c, Memorised) for c in self.capabilities):
            raise ValueError("canaries: they are measured without being named under capabilities; leave that one out")
        if self.canaries is not None and isinstance(self.corpus, WithCanaries):
            raise ValueError("canaries: the corpus is read with canaries already; leave one of the two out")
        self._check_names()
        self._check_objectives()
        self._check_training()
        self._check_first_scenario()
        self._check_grid()
        names = [v.name for v in self.variants]
        repeated = sorted({n for n in names if names.count(n) > 1})
        if repeated:
            raise ValueError(f"two runs would be named {', '.join(repeated)}")

    def _check_names(self) -> None:
        """Raise ConfigError for names that cannot be names of files, and so could leave the recipe's folder."""
        monitored = {} if self.monitor is None else self.monitor.scenarios
        for name in (*self.objectives, *self.scenarios, *self.phases, *monitored, *self.preferences):
            file_name(name)

    def _check_objectives(self) -> None:
        """Raise ValueError if a setting names an objective that the recipe does not have."""
        named = [(f"{field}.{name}", name) for field in ("train_for", "finetune_for") for name in getattr(self, field)]
        named += [("only", name) for name in self.only or ()]
        if any(p.share < 1 for p in self.phases.values()):
            named.append(("finetune_from", self.finetune_from))
        for where, name in named:
            if name not in self.objectives:
                raise ValueError(f"{where}: no objective {name!r}{did_you_mean(name, self.objectives)}")

    def _check_training(self) -> None:
        """Raise ValueError for settings of training that are wrong wherever they apply."""
        layers = {f"phases.{name}.train": phase.train for name, phase in self.phases.items()}
        layers["finetune"] = self.finetune
        for field in ("train_for", "finetune_for"):
            layers |= {f"{field}.{name}": layer for name, layer in getattr(self, field).items()}
        if self.train.budget == "source" and any(phase.share < 1 for phase in self.phases.values()):
            raise ValueError(
                "train.budget: with source text, where a phase with a share below 1 starts is not known before its "
                "starting run has ended; use train.budget=targets"
            )
        for where, layer in layers.items():
            for path, message in check(merge(to_plain(self.train), layer), TrainConfig)[1] if layer else ():
                if path and path[0] in layer:
                    raise ValueError(f"{where}.{'.'.join(path)}: {message}")

    def _check_first_scenario(self) -> None:
        first, scenario = next(iter(self.scenarios.items()))
        for name in self.chosen:
            if (why := scenario.lacks(self.objectives[name].control)) is not None:
                raise ValueError(f"scenarios: {first!r}, the first, must suit all: {name} {why}")

    def _check_grid(self) -> None:
        for path, values in self.grid.items():
            if not values:
                raise ValueError(f"grid: {path} has no values")
            kind = path.split(".")[0]
            depth = path.count(".")
            if kind not in ("train", "objective", "objectives") or depth != (2 if kind == "objectives" else 1):
                raise ValueError(
                    f"grid: {path!r} is none of train.SETTING, objective.SETTING and objectives.NAME.SETTING"
                )
            if not any(self._applies(path, name) for name in self.chosen):
                raise ValueError(f"grid: {path!r} applies to none of {', '.join(self.chosen)}")

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return Path(f"{self.out}-quick" if self.quick else self.out)

    @property
    def files(self) -> RecipeFolder:
        """The files in `folder`, and those of the data."""
        data = None if self.data is None else Path(f"{self.data}-quick" if self.quick else self.data)
        return RecipeFolder(self.folder, data)

    @property
    def read_from(self) -> Corpus:
        """The reader of the corpus, with the canaries."""
        if self.canaries is None:
            return self.corpus
        assert not isinstance(self.corpus, WithCanaries)
        return WithCanaries(self.corpus, self.canaries, self.heldout)

    @property
    def measured(self) -> tuple[AnyCapability, ...]:
        """The capabilities, with what the models memorised of the canaries. Probes and verbatim read the
        recipe's own text."""
        own = () if self.canaries is None else (Memorised(self.canaries),)
        tokens = str(self.files.tokens)
        return (*(capability.of_text(tokens) for capability in self.capabilities), *own)

    @property
    def samples_by(self) -> Scorer:
        """The scorer of samples."""
        return self.scorer if self.judge is None else self.judge

    @property
    def chosen(self) -> list[str]:
        """Names of the objectives that run."""
        return [name for name in self.objectives if self.only is None or name in self.only]

    @cached_property
    def variants(self) -> list[Variant]:
        """The runs. A run that other runs start from or are compared with comes before them."""
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
        references = self._references(found)
        first = references | {v.base for v in found if v.name in references}
        return sorted(found, key=lambda v: v.name not in first)

    def _references(self, variants: Iterable[Variant]) -> set[str]:
        """Paths of the references of KL divergences and of objectives."""
        asked = (self.kl, self.monitor.kl if self.monitor is not None else None)
        found = {kl.reference.path for kl in asked if kl is not None and isinstance(kl.reference, LocalModel)}
        return found | {m for v in variants if (m := v.objective.reference_model) is not None}

    @cached_property
    def reference_runs(self) -> set[str]:
        """The runs of this recipe that are references of KL divergences or of objectives."""
        return {v.name for v in self.variants} & self._references(self.variants)

    # Building the variants

    def _applies(self, path: str, name: str) -> bool:
        """Whether a path of the grid is a setting of an objective or of training that changes anything for it."""
        kind, *middle, setting = path.split(".")
        if kind == "train":
            return path != NOISE_SETTING or self.objectives[name].uses_scores
        known = {f.name for f in fields(self.objectives[name])} - {"name"}
        return setting in known and (kind == "objective" or middle == [name])

    def _combinations(self, name: str) -> Iterator[Plain]:
        """The combinations of the grid's values for an objective."""
        paths = [path for path in self.grid if self._applies(path, name)]
        for values in itertools.product(*(self.grid[p] for p in paths)):
            yield dict(zip(paths, values, strict=True))

    def _base(self, seed: int) -> Variant:
        """The plain run of the objective that finetuning starts from."""
        name = self.finetune_from
        train = self._train(name, {}, self._pretraining(), keeps_milestones=True)
        return Variant(
            name=f"{name}-s{seed}",
            objective_name=name,
            objective=self.objectives[name],
            phase="pretrain",
            share=1.0,
            seed=seed,
            train=train,
            model=self.model,
            base=None,
            settings={},
        )

    def _pretraining(self) -> list[Plain]:
        return [self.phases["pretrain"].train] if "pretrain" in self.phases else []

    def _train(
        self, name: str, settings: Mapping[str, Any], over: Iterable[Mapping[str, Any]], keeps_milestones: bool = False
    ) -> TrainConfig:
        """Settings of training: the recipe's, the objective's, `over`, the grid's, each over the ones before.

        `keeps_milestones`: with the checkpoints that finetuning starts from. They are at whole steps, so that the same
        checkpoints are the same settings.
        """
        merged = merge(to_plain(self.train), self.train_for.get(name, {}))
        for layer in over:
            merged = merge(merged, layer)
        merged |= {path.split(".")[1]: value for path, value in settings.items() if path.startswith("train.")}
        if not self.objectives[name].uses_scores:
            merged["scorer_noise"] = None
        config: TrainConfig = _checked(merged, TrainConfig, "train", settings)
        shares = sorted({p.share for p in self.phases.values() if p.share < 1}, reverse=True)
        if keeps_milestones:
            asked = [*config.milestones, *((1 - share) * config.total_tokens for share in shares)]
            steps = replace(config, milestones=tuple(asked)).milestone_steps
            config = replace(config, milestones=tuple(float(s * config.step_tokens) for s in sorted(steps)))
        return config

    def _variant(self, name: str, phase_name: str, seed: int, settings: Plain) -> Variant:
        phase = self.phases[phase_name]
        own = {path.split(".")[-1]: value for path, value in settings.items() if not path.startswith("train.")}
        objective: Any = _checked(
            merge(to_plain(self.objectives[name]), own), AnyObjective, f"objectives.{name}", settings
        )
        tags = [re.sub(r"[^\w.+-]", "_", f"{path.split('.')[-1]}{_as_tag(value)}") for path, value in settings.items()]
        if phase.share == 1:
            is_base = name == self.finetune_from and phase_name == "pretrain" and not settings
            train = self._train(name, settings, [phase.train], keeps_milestones=is_base)
            folder = "-".join([name, *([phase_name] if phase_name != "pretrain" else []), *tags, f"s{seed}"])
            return Variant(
                name=folder,
                objective_name=name,
                objective=objective,
                phase=phase_name,
                share=1.0,
                seed=seed,
                train=train,
                model=self.model,
                base=None,
                settings=settings,
            )
        start = self._base(seed)
        left_at = (1 - phase.share) * start.train.total_tokens
        (step,) = replace(start.train, milestones=(left_at,)).milestone_steps
        seen = step * start.train.step_tokens
        rest = {"tokens": max(start.train.total_tokens - seen, 1)}
        layers = [rest | {"milestones": []}, self.finetune, self.finetune_for.get(name, {}), phase.train]
        train = self._train(name, settings, layers)
        folder = "-".join([name, phase_name, *tags, f"s{seed}"])
        model = FromWeights(str(checkpoint_folder(self.files.run(start.name).checkpoints, step)))
        return Variant(
            name=folder,
            objective_name=name,
            objective=objective,
            phase=phase_name,
            share=phase.share,
            seed=seed,
            train=train,
            model=model,
            base=start.name,
            settings=settings,
        )


def _as_tag(value: Any) -> str:
    """A value of the grid in the names of runs."""
    if isinstance(value, Mapping):
        return "".join(f"-{k}{v}" for k, v in value.items())
    if isinstance(value, str) and value.endswith(".json"):  # the file of an audit
        return "-" + re.sub(r"\W", "_", "_".join([*Path(value).parts[-2:-1], Path(value).stem]))
    return str(value)


def _checked(value: Any, type_: Any, prefix: str, grid: Mapping[str, Any]) -> Any:
    """`value` as a `type_`. Raises ValueError with the first problem. `grid`: what the grid sets in `value`."""
    found, problems = check(value, type_)
    if problems:
        path, message = problems[0]
        raise ValueError(f"{'grid: ' if grid else ''}{'.'.join([prefix, *path])}: {message}")
    return found


@dataclass(frozen=True, config=STRICT)
class TrainStage:
    """Settings of `phf train`."""

    model: AnyModel
    train: TrainConfig
    objective: AnyObjective = MLE()
    monitor: Monitor | None = None
    scorer: AnyScorer | None = None
    """How `monitor` judges samples; None: by the corpus's own scorer."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


# Loading


def packaged() -> dict[str, Traversable]:
    """The recipes that come with phf, by name."""
    folder = resources.files("phf") / "recipes"
    return {
        f.name.removesuffix(".yaml"): f
        for f in sorted(folder.iterdir(), key=lambda f: f.name)
        if f.name.endswith(".yaml")
    }


def load_recipe(arguments: Iterable[str]) -> Recipe:
    """The recipe that arguments describe: names or files merged from left to right, then the preset that they name,
    then `a.b=c` overrides.

    A file may have `base: NAME`, another recipe (a packaged one or a path) that the file is merged into. Raises
    ConfigError that lists every problem with its path.
    """
    arguments = list(arguments)
    files = [a for a in arguments if not is_setting(a)]
    overrides = [a for a in arguments if is_setting(a)]
    merged: Plain = {}
    only: list[str] = []
    for file in files:
        value = _read(file)
        if value.keys() == {"only"} and isinstance(value["only"], list):  # several such files: all their objectives
            only += value["only"]
            value = {"only": only}
        merged = merge(
            merged, _of_parts(value, merged) if value.get("quick") is True and "corpus" not in value else value
        )
    settings = apply_overrides({}, overrides)
    preset = settings.get("preset", merged.get("preset"))
    if preset is not None and (merged.get("presets") or "preset" in settings):  # else it is merged in already
        known = merged.get("presets") or {}
        if not isinstance(known, Mapping):
            raise ConfigError(f"presets: expected settings by name, got {known!r}")
        if not isinstance(preset, str) or preset not in known:
            raise ConfigError(f"preset {preset!r} is not one of the recipe's{did_you_mean(str(preset), known)}")
        merged = merge(merged, known[preset])
    return validate(merge(merged, settings), Recipe, " + ".join(files) or COMMAND_LINE, before=merged)


def _of_parts(overlay: Plain, base: Mapping[str, Any]) -> Plain:
    """The settings of an overlay for the parts that the recipe `base` has: nothing is judged or attacked that it leaves
    out, or sets to null."""
    parts = {"monitor", "redteam", "tamper", "persist"}
    kept = {k: v for k, v in overlay.items() if not (base.get(k, "") is None or (base and k in parts - set(base)))}
    for part in ("scenarios", "monitor"):
        inner = kept.get(part)
        own = base.get(part)
        if isinstance(inner, dict) and isinstance(own, Mapping):
            names = inner if part == "scenarios" else inner.get("scenarios", {})
            has = own if part == "scenarios" else own.get("scenarios") or {}
            fewer = {n: v for n, v in names.items() if has.get(n) is not None}
            kept[part] = fewer if part == "scenarios" else inner | {"scenarios": fewer}
    return kept


def _read(name: str, above: tuple[str, ...] = ()) -> Plain:
    """A recipe's settings, merged into those of its base. `above`: the recipes whose bases led here."""
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
    if base is None:
        return value
    below = _read(str(base), (*above, name))
    if "corpus" in value or "scorer" in value:  # what the base says of itself is not true of other data
        below = {k: v for k, v in below.items() if k not in ("title", "about")}
    return merge(below, value)
