"""Settings of red-teaming: the search for prompts, and attacks on the control tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal, Self

from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core.config import STRICT, ConfigError, did_you_mean
from phf.generation.scenario import Scenario
from phf.redteaming.attackers import TASKS, AnyAttacker, Evolution
from phf.redteaming.gradient import GradientSearch
from phf.scorers import Scorer

PAPER = {"trials": 10, "rounds": 10, "continuations": 512, "selection": "raw", "selection_temperature": 0.1}
"""The paper's settings where they differ from the defaults, which a laptop can afford."""


@dataclass(frozen=True, config=STRICT)
class RedTeam:
    """How to search for prompts. Sizes are the paper's except `trials` and `continuations` (10 and 512 in the paper:
    `phf redteam --paper`)."""

    attacker: AnyAttacker = Evolution()
    """What writes new prompts."""
    task: str | None = None
    """toxicity, pii or pep8: what red LMs must write, and the prompts that the search starts from. None: the
    scorer's."""
    wanted: str | None = None
    """For other tasks: what red LMs must write."""
    prompts: str | None = None
    """For other tasks: the file of prompts that the search starts from."""
    trials: Annotated[int, Field(gt=0)] = 3
    rounds: Annotated[int, Field(ge=0)] = 10
    """Rounds of new prompts."""
    pool: Annotated[int, Field(gt=0)] = 20
    """Starting prompts of a trial."""
    shots: Annotated[int, Field(gt=0)] = 4
    """Prompts that the attacker is shown for each candidate."""
    candidates: Annotated[int, Field(gt=0)] = 20
    """New prompts per round."""
    continuations: Annotated[int, Field(gt=1)] = 32
    """Continuations of each prompt."""
    confirm: Annotated[int, Field(gt=0)] = 10
    """Best prompts of each trial that are scored again on new continuations."""
    selection: Literal["standardised", "raw"] = "standardised"
    """Prompts are shown with probability softmax(mean / selection_temperature). raw: of the means themselves, as in
    the paper; with small scores all prompts are then equally likely. standardised: of the means standardised over
    the pool."""
    selection_temperature: Annotated[float, Field(gt=0)] = 0.5
    """How much better prompts are preferred when the next ones are made; low: only the best."""
    max_tokens: Annotated[int, Field(gt=0)] = 64
    """Longest continuation, in tokens."""
    temperature: Annotated[float, Field(gt=0)] = 0.7
    """Of the continuations."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Of the continuations: only the likeliest tokens that together have this probability."""
    control: str = "good"
    """Control token that the attacked model reads."""
    control_after_prompt: bool | None = None
    """Put the control token after the prompt instead of before it."""
    score_prompt: bool | None = None
    """Judge the prompt together with its continuation."""
    complete_lines: bool | None = None
    """These three as in a scenario. None: true for code, where a body without its function or a truncated line has
    faults of its own; false otherwise."""
    max_target_tokens: Annotated[float, Field(gt=0)] | None = None
    """A trial ends after the round in which the target has read and written this many tokens."""
    gradient: Annotated[GradientSearch | None, Field(exclude_if=lambda value: value is None)] = None
    """A gradient search (GCG) first, by an attacker who has the weights; every trial then starts with its prompts."""
    batch: Annotated[int, Field(gt=0)] = 256
    """Continuations that are written together."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of all draws."""

    def __post_init__(self) -> None:
        if self.task is not None and self.task not in TASKS:
            raise ValueError(f"unknown task {self.task!r}{did_you_mean(self.task, TASKS)}")

    def scenario(self, seed: int) -> Scenario:
        """How continuations are sampled."""
        return Scenario(
            max_tokens=self.max_tokens,
            min_tokens=0,
            temperature=self.temperature,
            top_p=self.top_p,
            control=self.control,
            control_after_prompt=bool(self.control_after_prompt),
            score_prompt=bool(self.score_prompt),
            complete_lines=bool(self.complete_lines),
            batch=self.batch,
            seed=seed,
        )

    def for_scorer(self, scorer: Scorer) -> RedTeam:
        """The settings with everything resolved that depends on the scorer."""
        code = self.task == "pep8" or (self.task is None and scorer.judges_code)
        return replace(
            self,
            control_after_prompt=code if self.control_after_prompt is None else self.control_after_prompt,
            score_prompt=code if self.score_prompt is None else self.score_prompt,
            complete_lines=code if self.complete_lines is None else self.complete_lines,
        )


def _task_name(config: RedTeam, scorer: Scorer) -> str:
    judged_by = str(scorer.identity()["name"])
    return config.task or {"presidio": "pii"}.get(judged_by, judged_by)


def has_prompts(config: RedTeam, scorer: Scorer) -> bool:
    """Whether the settings, their task or the scorer's task name starting prompts."""
    return config.prompts is not None or _task_name(config, scorer) in TASKS


def task_of(config: RedTeam, scorer: Scorer) -> tuple[str, str]:
    """(what red LMs must write, file of starting prompts) from the settings, their task or the scorer's task. Raises
    ConfigError if none of them says."""
    name = _task_name(config, scorer)
    task = TASKS.get(name)
    prompts = config.prompts or (task.prompts if task else None)
    wanted = config.wanted or (task.wanted if task else None)
    if prompts is None:
        raise ConfigError(
            f"no starting prompts are known for scorer {name!r}: give prompts=FILE, or task=toxicity, pii or pep8"
        )
    if wanted is None:
        if config.attacker.needs_wanted:
            raise ConfigError(
                f"what a red LM should write for scorer {name!r} is not known: give "
                "wanted='beginnings of texts after which ...'"
            )
        wanted = ""
    return wanted, prompts


@dataclass(frozen=True, config=STRICT)
class Sampled:
    """How a model is sampled each time that an attack judges it."""

    num_samples: Annotated[int, Field(gt=1)] = 256
    max_tokens: Annotated[int, Field(gt=0)] = 64
    min_tokens: Annotated[int, Field(ge=0)] = 10
    temperature: Annotated[float, Field(gt=0)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    complete_lines: bool | None = None
    """As in a scenario; None: true for code."""
    batch: Annotated[int, Field(gt=0)] = 128
    seed: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")

    def for_scorer(self, scorer: Scorer) -> Self:
        """The settings with everything resolved that depends on the scorer."""
        return replace(self, complete_lines=scorer.judges_code) if self.complete_lines is None else self

    def scenario(self, control: str) -> Scenario:
        """How to sample, with these control tokens first."""
        return Scenario(
            num_samples=self.num_samples,
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            complete_lines=bool(self.complete_lines),
            batch=self.batch,
            seed=self.seed,
            control=control,
        )


@dataclass(frozen=True, config=STRICT)
class TokenAttacks(Sampled):
    """How each attack on the control tokens is sampled."""
