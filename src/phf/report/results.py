"""`results.json`: the runs of a recipe in short, and which settings are best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from phf.core import statistics, store
from phf.core.config import Plain
from phf.core.runs import NoiseCounts, RecipeFolder
from phf.core.types import Estimate, Number
from phf.evaluation.results import AnyCapabilityResult, Interval, KLResult
from phf.tokens.noise import NOISE_SETTING


@dataclass(frozen=True)
class ScenarioSummary:
    misalignment: Estimate
    """Mean score of the samples."""
    bad_segments: Number
    """Share of the segments above the threshold."""


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A run of a recipe. Numbers of samples are those of the recipe's first scenario."""

    objective: str
    """Its name in the recipe."""
    run: str
    """The run's folder."""
    group: str
    """The run's name without the seed."""
    phase: str
    """Name of the phase."""
    share: float
    """Share of the tokens with feedback."""
    settings: Plain
    """What the grid sets."""
    seed: int
    """The run's seed."""
    tokens: int
    """Targets of the run."""
    tokens_before: int
    """Targets that the starting weights had seen."""
    text_tokens: int
    """Number of targets that are text."""
    epochs: float
    """Source tokens that the training order passed, divided by those of the training part."""
    exposure: Plain = field(default_factory=dict)
    """How much text was read and learned from, by class."""
    misalignment: Estimate
    """Mean score of the samples."""
    hit_rate: Estimate
    """Share of the samples above the threshold."""
    bad_segments: Number
    """Share of the samples' segments above the threshold."""
    unjudged: int
    """Samples that were not judged."""
    empty: int
    """Samples without text."""
    mean_chars: Number
    """Mean length of a sample in characters."""
    distinct_2: Number
    """Share of distinct pairs of words."""
    self_bleu_5: Number
    """How much samples resemble each other."""
    expected_max: dict[str, Estimate]
    """Expected largest score of k samples, by k."""
    kl: KLResult | None
    """KL divergences from the reference."""
    capabilities: list[AnyCapabilityResult]
    """In the order of the settings."""
    heldout: dict[str, Number]
    """Held-out loss in nats per byte on good, bad and all text; with the good token if the model has one."""
    heldout_good_ci95: Interval | None
    """95% interval of the loss on good text."""
    train_seconds: float
    """Time in training steps."""
    parameters: int
    """Parameters of the LM."""
    scenarios: dict[str, ScenarioSummary]
    """Main numbers by name of the scenario."""
    understanding: Number | None = None
    """AUC of bad against good held-out segments, by the control token that makes them more likely; null without
    control tokens of good and bad."""
    noise: NoiseCounts | None = None
    """Errors that were added to the scores; null: none."""
    attacked: dict[str, Estimate] = field(default_factory=dict)
    """Mean score of new continuations of the best prompts that red-teaming found: best_1, best_10."""


BEST_RULE = (
    "Among the settings of one objective and phase, keep those whose held-out loss on good text is not significantly "
    "above the lowest (95% intervals overlap). The best of them has the lowest misalignment."
)


@dataclass(frozen=True)
class BestSettings:
    """The best group of an objective and phase, by `BEST_RULE`."""

    group: str
    """The best group."""
    candidates: list[str]
    """Groups that the rule keeps."""
    rule: str
    """How it was chosen."""
    heldout_good: dict[str, Number]
    """Held-out loss on good text, by group."""


@dataclass(frozen=True, kw_only=True)
class RecipeResults:
    """`results.json`."""

    recipe: str
    """The recipe's title."""
    quick: bool
    """Whether the budget is too small for conclusions."""
    unit: str
    """Unit of the scores."""
    runs: list[RunSummary]
    """One entry per finished run."""
    best: dict[str, BestSettings]
    """By objective and phase, where the recipe has several settings."""
    failed: dict[str, str]
    """Why runs failed, by run."""
    seconds: dict[str, float]
    """Time of each stage of this call."""


def read_results(folder: RecipeFolder) -> RecipeResults | None:
    """The results of a recipe; None if there are none. Raises StoreError for a damaged file."""
    return store.read_record(folder.results, RecipeResults) if folder.results.exists() else None


def best_settings(runs: Sequence[RunSummary]) -> dict[str, BestSettings]:
    """The best group of each objective and phase that has several, by `BEST_RULE`."""
    kinds: dict[str, dict[str, list[RunSummary]]] = {}
    for run in runs:
        kind = f"{run.objective} {run.phase}"
        if NOISE_SETTING in run.settings:  # with errors of one size: otherwise having none would be best
            kind += f", scorer_noise {run.settings[NOISE_SETTING]}"
        kinds.setdefault(kind, {}).setdefault(run.group, []).append(run)
    found = {}
    for kind, groups in kinds.items():
        losses = {group: _heldout_loss(members) for group, members in groups.items()}
        known = {group: loss for group, loss in losses.items() if not math.isnan(loss.mean)}
        if len(groups) < 2 or not known:
            continue
        limit = min(known.values(), key=lambda loss: loss.mean).ci95[1]
        candidates = [group for group, loss in known.items() if loss.ci95[0] <= limit]
        ranked = sorted((_mean_misalignment(groups[group]), known[group].mean, group) for group in candidates)
        found[kind] = BestSettings(
            group=ranked[0][2],
            candidates=candidates,
            rule=BEST_RULE,
            heldout_good={group: loss.mean for group, loss in known.items()},
        )
    return found


def _heldout_loss(members: Sequence[RunSummary]) -> Estimate:
    """Held-out loss on good text, over seeds if there are several."""
    values = [run.heldout.get("good", math.nan) for run in members]
    if any(map(math.isnan, values)):
        return Estimate.missing()
    if len(values) > 1:
        return statistics.t_interval(values)
    interval = members[0].heldout_good_ci95
    if interval is None or math.isnan(interval[0]):
        interval = (values[0], values[0])
    return Estimate(values[0], math.nan, 1, interval)


def _mean_misalignment(members: Sequence[RunSummary]) -> float:
    """Infinite if a run has none."""
    values = [run.misalignment.mean for run in members]
    return math.inf if any(map(math.isnan, values)) else sum(values) / len(values)
