"""The parts of an evaluation: one measurement each, on any loaded model.

An `Evaluation` says what is measured and how samples are judged. `evaluate` runs its parts on a finished model and
keeps each part's result; `monitor` runs the same parts on the model in training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phf.core import store
from phf.core.config import Plain, to_plain
from phf.core.runs import RunFolder
from phf.core.types import Identity
from phf.data.segment import Segmenter
from phf.evaluation.capabilities.base import Capability
from phf.evaluation.heldout import heldout_section
from phf.evaluation.judge import judge_again, judge_samples
from phf.evaluation.kl import KL, ReferenceTexts, kl, kl_scenario, reference_hash, text_rows
from phf.evaluation.results import AnyCapabilityResult, HeldoutResult, KLResult, OtherScores, ScenarioResult
from phf.generation.loaded import LoadedModel, check_room, precision_of, prompt_ids
from phf.generation.sample import read_samples, sample, write_samples
from phf.generation.scenario import Scenario, prompts_path, scenario_prompts
from phf.scorers import Scorer
from phf.tokens.store import TokenStore

SAFE_BEAM = "safe beam/3"
"""Version of the search, which decides its samples."""


@dataclass(frozen=True)
class Judging:
    """How texts are judged."""

    scorer: Scorer | None
    """None: only what needs no scorer is measured."""
    segmenter: Segmenter
    """How samples are cut into segments: as the corpus was."""
    threshold: float = 0.0
    """Scores above it are bad."""
    control_threshold: float | None = None
    """Segments with a score above it had the bad token in training; None: what the model's record says, else that of
    the corpus."""
    corpus_threshold: float | None = None
    """Where another scorer scored the corpus: scores of the corpus above it are bad; None: `threshold`."""

    def identity(self) -> Identity | None:
        """The scorer's identity."""
        return None if self.scorer is None else self.scorer.identity()

    @property
    def of_corpus(self) -> float:
        """Scores of the corpus above it are bad."""
        return self.threshold if self.corpus_threshold is None else self.corpus_threshold

    def control_limit(self, model: LoadedModel) -> float:
        """Segments of the corpus with a score above it had the bad token in training."""
        known = (self.control_threshold, model.threshold, self.of_corpus)
        return next(limit for limit in known if limit is not None)

    def control_limit_here(self, model: LoadedModel) -> float:
        """The same for scores of `scorer`."""
        return self.control_limit(model) if self.corpus_threshold is None else self.threshold


@dataclass(frozen=True)
class HeldoutText:
    """Held-out text in the tokens of a model."""

    tokens: TokenStore
    context: int
    """Tokens that are read together."""
    max_tokens: int
    """Tokens to read at most."""


@dataclass(frozen=True)
class Heldout:
    """Which held-out text to read."""

    text: Callable[[LoadedModel], HeldoutText]
    settings: Any
    """Plain data that decides the text."""
    brief: bool = False
    """Measure only the loss that compares with other models, not its understanding of bad text."""


@dataclass(frozen=True)
class Part:
    """One measurement."""

    name: str
    result: Any
    """The type of what `measure` returns."""
    settings: Callable[[], Any]
    """Plain data: everything but the model that decides the result."""
    measure: Callable[[LoadedModel], Any]
    check: Callable[[LoadedModel], None] = lambda model: None
    """Raises ConfigError for problems that can be found before anything is measured."""
    needs: Scenario | None = None
    """The scenario whose control tokens the part needs."""
    written: Path | None = None
    """A file that `measure` writes."""


@dataclass(frozen=True)
class Evaluation:
    """What is measured of a model."""

    folder: RunFolder
    """Where samples and texts of references go."""
    judging: Judging
    scenarios: dict[str, Scenario] = field(default_factory=dict)
    heldout: Heldout | None = None
    kl: KL | None = None
    reference: ReferenceTexts | None = None
    """Texts of the reference of `kl`; None: drawn, or read from the cache."""
    capabilities: Sequence[Capability] = ()
    trained_on: str | None = None
    """The preference that the model was trained on, where it is not the main one."""
    preferences: Mapping[str, Judging] = field(default_factory=dict)
    """How the samples are judged once more, by name of a preference of the store."""
    samples_prefix: str = ""
    """Goes before the names of the files of samples."""
    progress: bool = True

    def parts(self) -> dict[str, Part]:
        """The measurements, by name."""
        parts = [self._scenario(name) for name in self.scenarios]
        parts += [self._again(name, other) for name in self.scenarios for other in self.preferences]
        if self.heldout is not None:
            parts.append(self._heldout(self.heldout))
            parts += [self._heldout(self.heldout, other) for other in self.preferences]
        if self.kl is not None:
            parts.append(self._kl(self.kl))
        parts += [self._capability(c, n) for n, c in enumerate(self.capabilities)]
        return {part.name: part for part in parts}

    def key(self, model_key: str) -> str:
        """Fingerprint of the model and of everything that decides the results."""
        judging = self.judging
        everything = [
            {name: to_plain(s) for name, s in self.scenarios.items()},
            judging.threshold,
            judging.identity(),
            None if self.heldout is None else self.heldout.settings,
            to_plain(judging.segmenter),
            None if self.kl is None else self._kl_settings(self.kl),
            [[to_plain(c), c.inputs()] for c in self.capabilities],
        ]
        if any(s.safe_beam is not None for s in self.scenarios.values()):
            everything.append(SAFE_BEAM)
        if judging.corpus_threshold is not None:
            everything.append(judging.corpus_threshold)
        if self.preferences:
            everything.append({name: [j.threshold, j.identity()] for name, j in self.preferences.items()})
        prompts = {n: _prompts_hash(s) for n, s in self.scenarios.items() if s.prompts is not None}
        return store.fingerprint([model_key, everything, prompts, "eval/5"])

    def _scenario(self, name: str) -> Part:
        scenario = self.scenarios[name]
        judging = self.judging
        written = self._samples(name)

        def settings() -> Any:
            return _scenario_settings(scenario, judging)

        def measure(model: LoadedModel) -> ScenarioResult:
            assert judging.scorer is not None
            drawn = sample(model, scenario, progress=self.progress)
            samples, result = judge_samples(drawn, scenario, judging.scorer, judging.segmenter, judging.threshold)
            write_samples(written, samples)
            return dataclasses.replace(result, precision=precision_of(model, scenario))

        def check(model: LoadedModel) -> None:
            check_room(model.positions, scenario, [prompt_ids(model, p, scenario) for p in scenario_prompts(scenario)])

        return Part(
            scenario_part(name),
            ScenarioResult,
            settings,
            measure,
            check,
            needs=scenario,
            written=written,
        )

    def _samples(self, scenario: str) -> Path:
        return self.folder.samples(f"{self.samples_prefix}{scenario}")

    def _again(self, name: str, preference: str) -> Part:
        """The samples of a scenario, judged by the scorer of another preference."""
        scenario = self.scenarios[name]
        judging = self.preferences[preference]

        def settings() -> Any:
            return [_scenario_settings(scenario, self.judging), judging.identity(), judging.threshold]

        def measure(model: LoadedModel) -> OtherScores:
            assert judging.scorer is not None
            samples = read_samples(self._samples(name))
            return judge_again(samples, scenario, judging.scorer, judging.segmenter, judging.threshold)

        return Part(again_part(name, preference), OtherScores, settings, measure, needs=scenario)

    def _heldout(self, heldout: Heldout, preference: str | None = None) -> Part:
        """The held-out text, with the segments called good and bad by the main scorer or that of a preference."""
        judging = self.judging if preference is None else self.preferences[preference]

        def measure(model: LoadedModel) -> HeldoutResult:
            text = heldout.text(model)
            if preference is not None and preference not in text.tokens.manifest.scores:
                return HeldoutResult()  # text in tokens of the model's own has the main scores only
            # what the control tokens tell apart are the good and the bad segments of one preference
            own = model.of_preference or self.trained_on or text.tokens.preference
            return heldout_section(
                model,
                text.tokens if preference is None else text.tokens.with_scores(preference),
                context=text.context,
                threshold=judging.of_corpus,
                max_tokens=text.max_tokens,
                control_threshold=judging.control_limit(model),
                brief=heldout.brief or own != (preference or text.tokens.preference),
            )

        def settings() -> Any:
            mine = [heldout.settings, judging.of_corpus]
            if self.trained_on is not None:
                mine.append(self.trained_on)
            return mine if preference is None else [*mine, preference, judging.identity()]

        return Part(heldout_part(preference), HeldoutResult, settings, measure)

    def _kl_settings(self, config: KL) -> Any:
        judging = self.judging
        others = {name: [how.identity(), how.threshold] for name, how in self.preferences.items()}
        return [
            to_plain(config),
            to_plain(judging.segmenter),
            reference_hash(config),
            judging.identity(),
            judging.control_threshold,
            judging.threshold,
            *([self.trained_on, others] if others else []),
        ]

    def _kl(self, config: KL) -> Part:
        judging = self.judging
        reference = self.reference

        def measure(model: LoadedModel) -> KLResult:
            own = self.preferences.get(model.of_preference or self.trained_on or "", judging)
            limit = own.control_limit_here(model)
            return kl(
                model,
                config,
                judging.segmenter,
                self.folder.cache,
                scorer=own.scorer,
                threshold=limit,
                reference=reference,
            )

        def check(model: LoadedModel) -> None:
            if reference is not None:
                text_rows(model, reference.texts, reference.finished, judging.segmenter)
            if config.reverse:
                kl_scenario(model, config)

        return Part("kl", KLResult, lambda: self._kl_settings(config), measure, check)

    def _capability(self, capability: Capability, number: int) -> Part:
        def settings() -> Plain | list[Any]:
            return [to_plain(capability), capability.inputs()]

        return Part(
            capability_part(capability, number), AnyCapabilityResult, settings, capability.measure, capability.check
        )


def scenario_part(name: str) -> str:
    """Name of the part of a scenario."""
    return f"scenario-{name}"


def again_part(name: str, preference: str) -> str:
    """Name of the part that judges the samples of a scenario by another preference."""
    return f"{scenario_part(name)}-by-{preference}"


def heldout_part(preference: str | None = None) -> str:
    """Name of the part that reads held-out text."""
    return "heldout" if preference is None else f"heldout-by-{preference}"


def capability_part(capability: Capability, number: int) -> str:
    """Name of the part of a capability, the `number`-th of an evaluation."""
    return f"{type(capability).__name__}{number}"


def _scenario_settings(scenario: Scenario, judging: Judging) -> Any:
    """What decides the samples of a scenario and their scores."""
    cut = to_plain(judging.segmenter)
    version = [] if scenario.safe_beam is None else [SAFE_BEAM]
    return [to_plain(scenario), judging.threshold, judging.identity(), cut, _prompts_hash(scenario), *version]


def _prompts_hash(scenario: Scenario) -> str | None:
    return None if scenario.prompts is None else store.path_hash(prompts_path(scenario.prompts))
