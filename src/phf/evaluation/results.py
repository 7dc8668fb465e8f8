"""What judging finds: the records in `eval.json` and `monitor.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import pydantic

from phf.core import store
from phf.core.config import Plain
from phf.core.runs import RunFolder
from phf.core.statistics import AUC
from phf.core.types import Estimate, Identity, Number
from phf.data.scored import ScoreManifest
from phf.generation.scenario import Scenario
from phf.tokens.store import TokensManifest

Interval = tuple[Number, Number]
"""A 95% interval."""


@dataclass(frozen=True, kw_only=True)
class ScenarioResult:
    """Samples of a scenario and their scores. `intervals` has the intervals of the plain numbers, by name."""

    misalignment: Estimate
    """Mean score; lower is better."""
    expected_max: dict[str, Estimate]
    """Expected largest score of k samples, by k. With several samples per prompt: per prompt, then averaged."""
    hit_rate: Estimate
    """Share of samples with a score above the threshold."""
    segments: int
    """Judged segments of all samples."""
    quantiles: dict[str, float]
    """Of the samples' scores."""
    labels: dict[str, int]
    """Kinds of faults, and how often they were found."""
    samples: int
    """Number of samples."""
    empty: int
    """Samples without text."""
    unjudged: int
    """Samples that could not be judged. They are left out."""
    cut_short: int
    """Samples that ended at the end of the model's context."""
    failures: dict[str, int]
    """Samples on which the scorer failed, by reason."""
    compile_rate: Number | None = None
    """Share of samples that are Python without a syntax error; null for other scorers than PEP8."""
    repetition_4: Estimate
    """Share of a sample's 4-grams that occurred earlier in the sample."""
    scenario: Scenario
    """How the samples were drawn."""
    mean_chars: Number
    """Mean length in characters."""
    distinct_1: Number
    """Share of distinct words among those of all samples."""
    entropy_1: Number
    """Of the words of all samples, in nats."""
    distinct_2: Number
    """Share of distinct pairs of words among those of all samples."""
    entropy_2: Number
    """Of the pairs of words, in nats."""
    self_bleu_5: Number
    """Self-BLEU-5 of words: how much samples resemble each other."""
    self_bleu_5_characters: Number
    """Self-BLEU-5 of characters, as the reference implementation computes it."""
    bad_segments: Number
    """Share of the judged segments with a score above the threshold."""
    mean_tokens: Number
    """Mean length in text tokens."""
    finished: Number
    """Share of samples that ended with end-of-text."""
    intervals: dict[str, Interval]
    """95% intervals of the plain numbers, by name."""
    precision: str | None = None
    """Of the weights while sampling: bf16 or fp32."""
    distinct_1_within: Number | None = None
    """Mean over samples of the share of distinct words within a sample; null in results of earlier versions."""
    distinct_2_within: Number | None = None
    """The same of pairs of words."""


@dataclass(frozen=True)
class HeldoutSlice:
    """Loss on a part of the held-out text. Control tokens and end-of-text are context: they add no loss."""

    nats_per_byte: Number
    """Mean of -log p, in nats per byte of UTF-8 text."""
    bits_per_byte: Number
    """The same in bits."""
    bytes: int
    """Bytes of text."""
    tokens: int
    """Tokens of text."""
    documents: int
    """Documents with such text."""
    ci95: Interval | None
    """Of nats_per_byte, over documents."""
    parts: list[tuple[Number, int]] | None = None
    """Loss in nats and bytes of the documents in parts, which are the same for all models: for the difference of two
    models on the same text. null in results of earlier versions."""


@dataclass(frozen=True)
class HeldoutLoss:
    """Loss on all held-out segments, on the good and on the bad ones."""

    all: HeldoutSlice
    """All segments."""
    good: HeldoutSlice
    """Judged segments with a score up to the threshold."""
    bad: HeldoutSlice
    """Judged segments with a score above the threshold."""

    def nats(self) -> dict[str, float]:
        """Nats per byte by part."""
        return {part: getattr(self, part).nats_per_byte for part in ("all", "good", "bad")}


@dataclass(frozen=True)
class Foresight(AUC):
    """p(bad token) at the start of a segment as a classifier of bad segments, and its means. p(bad token) is p(bad) /
    (p(good) + p(bad))."""

    mean_p_bad_before_good: float | None
    """Mean p(bad token) before good segments."""
    mean_p_bad_before_bad: float | None
    """Mean p(bad token) before bad segments."""


@dataclass(frozen=True)
class Understanding:
    """Whether a model with control tokens still knows bad text. AUC: 0.5 is chance, 1 perfect."""

    likelihood_ratio: AUC
    """By log p(segment | bad token) - log p(segment | good token)."""
    foresight: Foresight
    """By p(bad token) where the segment starts."""
    segments: int
    """Held-out segments that were read and judged."""
    bad_segments: int
    """Those with a score above the threshold."""


@dataclass(frozen=True)
class HeldoutSection:
    """Held-out loss, by the control tokens before the segments. Models without control tokens have `none` only."""

    none: HeldoutLoss | None = None
    """Without control tokens."""
    oracle: HeldoutLoss | None = None
    """With the tokens that the scores imply."""
    good: HeldoutLoss | None = None
    """With the good token before every segment."""

    @property
    def main(self) -> HeldoutLoss | None:
        """The loss that compares with other models: with the good token if there is one."""
        return self.good or self.none

    @property
    def main_name(self) -> str:
        return "good" if self.good else "none"


@dataclass(frozen=True)
class HeldoutResult(HeldoutSection):
    """Everything that reading held-out text measures."""

    understanding: Understanding | None = None


@dataclass(frozen=True)
class Divergence:
    """A KL divergence, with intervals over texts."""

    nats_per_text: Estimate
    """Mean per text."""
    nats_per_byte: Estimate
    """Sum over texts divided by their bytes."""


@dataclass(frozen=True, kw_only=True)
class LocalReference:
    """What identifies a reference that was loaded from a folder or the Hub."""

    path: str
    """As the settings name it."""
    weights: str
    """Hash of the weights."""
    vocabulary: str
    """Fingerprint of the tokenizer's vocabulary."""
    control_tokens: dict[str, int]
    """Always empty: a reference is a plain LM."""
    start: int
    """Id of the token that starts a text."""
    segmenter: Plain | None
    """How its texts are cut."""


@dataclass(frozen=True, kw_only=True)
class ServedReference:
    """What identifies a reference on a server."""

    server: str
    """Address."""
    model: str
    """The model's name on the server."""


ReferenceIdentity = LocalReference | ServedReference


@dataclass(frozen=True, kw_only=True)
class KLResult:
    """KL divergences from a reference LM. Lower is nearer."""

    reference: ReferenceIdentity
    """What identifies the reference."""
    num_samples: int
    """Texts."""
    max_tokens: int
    """Length limit of a text, in tokens."""
    finished: float
    """Share of the reference's texts that ended before the limit."""
    forward: Divergence
    """KL(reference || model); with the good token before every segment of models that have it."""
    oracle: Divergence | None = None
    """The same with the tokens that the scorer implies."""
    oracle_bad_segments: int | None = None
    """Segments that got the bad token in `oracle`."""
    reverse: Divergence | None = None
    """KL(model || reference)."""


@dataclass(frozen=True)
class CapabilityResult(store.Flat):
    """What a capability measured. In files, `estimates` and `details` are at the level of name and settings."""

    name: str
    settings: Plain
    estimates: dict[str, Estimate]
    """Numbers with an interval; the first one is the capability's main number."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further facts: sizes, history, and the like."""

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "settings": self.settings, **self.estimates, **self.details}

    @classmethod
    def fold(cls, value: Any) -> Any:
        """The nested form of what `as_json` wrote."""
        if not isinstance(value, Mapping) or "estimates" in value:
            return value
        rest = {k: v for k, v in value.items() if k not in ("name", "settings")}
        estimates = {k: v for k, v in rest.items() if isinstance(v, Mapping) and "ci95" in v}
        details = {k: v for k, v in rest.items() if k not in estimates}
        found = {"name": value.get("name", ""), "settings": value.get("settings", {})}
        return found | {"estimates": estimates, "details": details}

    @property
    def main(self) -> dict[str, Estimate]:
        """The main numbers: the first one, or all of lm-eval's tasks and of what is memorised."""
        all_of_them = self.name in ("lm-eval", "canaries", "verbatim")
        return self.estimates if all_of_them else dict(list(self.estimates.items())[:1])


AnyCapabilityResult = Annotated[
    CapabilityResult,
    pydantic.BeforeValidator(CapabilityResult.fold),
    pydantic.WithJsonSchema(
        {
            "type": "object",
            "description": "What a capability measured. Estimates and details are at the level of name and settings.",
            "properties": {"name": {"type": "string"}, "settings": {"type": "object"}},
            "required": ["name", "settings"],
            "additionalProperties": True,
        }
    ),
]


def _none_if_empty(value: Any) -> Any:
    return value or None


@dataclass(frozen=True, kw_only=True)
class OtherScores:
    """What another scorer says about the samples of a scenario."""

    misalignment: Estimate
    """Mean score."""
    hit_rate: Estimate
    """Share of samples above that scorer's threshold."""
    bad_segments: Estimate
    """Share of the samples' segments above it."""
    unjudged: int
    """Samples that could not be judged."""
    labels: dict[str, int]
    """Kinds of faults and their number."""


@dataclass(frozen=True, kw_only=True)
class PreferenceResult:
    """What the scorer of another preference says about the same samples and held-out text."""

    identity: Identity
    """The scorer that judged."""
    scorer: Plain
    """The scorer's settings."""
    threshold: float
    """Scores above it are bad."""
    scenarios: dict[str, OtherScores]
    """By name of the scenario."""
    heldout: HeldoutSection
    """Held-out loss, good and bad by this scorer."""
    understanding: Understanding | None = None
    """null unless this scorer's scores chose the control tokens."""


@dataclass(frozen=True)
class DataSection:
    """Manifests of the data that a run was trained on, so that a report does not depend on where they are."""

    tokens: TokensManifest
    """Manifest of the token store."""
    scored: Annotated[ScoreManifest | None, pydantic.BeforeValidator(_none_if_empty)]
    """null if the scored corpus was not found."""


@dataclass(frozen=True, kw_only=True)
class JudgedModel:
    """What `eval.json` says about the model."""

    run: str
    """Name of the run, or the model as it was named."""
    objective: Plain | None = None
    """Settings of the run's objective; null for models that were not trained here."""
    seed: int | None = None
    """The run's seed."""
    tokens: int | None = None
    """Targets of the run."""
    tokens_content: str | None = None
    """Fingerprint of the run's token store."""
    data: DataSection | None = None
    """null for models that were not trained here."""
    revision: str | None = None
    """Revision of a model on the Hub."""


@dataclass(frozen=True, kw_only=True)
class EvalResult(JudgedModel):
    """`eval.json`: everything that was judged of a model."""

    key: str
    """Fingerprint of the model and of all settings."""
    identity: Identity
    """The scorer that judged."""
    scorer: Plain
    """The scorer's settings."""
    threshold: float
    """Scores above it are bad."""
    scenarios: dict[str, ScenarioResult]
    """Results by name of the scenario."""
    understanding: Understanding | None
    """null for models without control tokens, and if no held-out text was read."""
    heldout: HeldoutSection
    """Held-out loss by the control tokens before the segments."""
    skipped: list[str]
    """Scenarios that need control tokens, which the model does not have."""
    kl: KLResult | None
    """null if no reference was given."""
    capabilities: list[AnyCapabilityResult]
    """In the order of the settings."""
    failed: dict[str, str] = field(default_factory=dict)
    """Capabilities that could not be measured, and why. The same command tries them again."""
    preferences: dict[str, PreferenceResult] = field(default_factory=dict)
    """By name: the other preferences by whose scorers the samples were judged."""
    seconds: dict[str, float]
    """Time of each part."""


def read_eval(folder: RunFolder) -> EvalResult | None:
    """What was judged of a run or model; None if nothing was. Raises StoreError for a damaged file."""
    return store.read_record(folder.eval, EvalResult) if folder.eval.exists() else None


@dataclass(frozen=True, kw_only=True)
class MonitorLine(store.Flat):
    """A line of `monitor.jsonl`: the model in training, judged after `tokens` targets. The main numbers of the first
    scenario are repeated at the top level. The file leaves out what was not measured."""

    step: int
    """Steps so far."""
    tokens: int
    """Targets so far."""
    heldout: dict[str, Number] | None = None
    """Held-out loss in nats per byte on all, good and bad text."""
    misalignment: Estimate | None = None
    """Mean score of the first scenario's samples."""
    bad_segments: Number | None = None
    """Share of their segments above the threshold."""
    unjudged: int | None = None
    """Samples that could not be judged."""
    mean_chars: Number | None = None
    """Mean length of a sample in characters."""
    scenarios: dict[str, ScenarioResult] | None = None
    """Results by name of the scenario."""
    kl: KLResult | None = None
    """KL divergences from the reference."""
    capabilities: list[AnyCapabilityResult] | None = None
    """In the order of the settings."""
    seconds: float = 0.0
    """Time that judging took."""

    def as_json(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if v is not None}
