"""The six objectives of the paper, and loss masking.

Definitions: Korbak et al., "Pretraining Language Models with Human Preferences" (ICML 2023), section 2. Legend: B rows,
T targets, S segments, D documents.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core.config import STRICT, ConfigError
from phf.core.types import Block, Edit, Insertions
from phf.objectives.base import BAD, GOOD, LossInputs, LossOutputs, Objective, ValueShape
from phf.objectives.tensors import Tensor, torch
from phf.tokens.statistics import Statistics, Unit

Threshold = float | Literal["median", "auto"]
"""A score; the scorer's own threshold (auto: 0 for scorers that count, 0.5 for probabilities); or the median over the
training part of the store. That is the median of documents' means for filtering, of scores of tokens for a loss that
reads them, else of segments."""

FEW = 0.05
"""A threshold that keeps a smaller share of the documents, or more than all but this share, is suspicious."""
RARE = 1e-4
"""So is one above which there is a smaller share of the tokens."""
MAX_WEIGHT = 1000.0
"""AWR clips its weights at this value (Korbak et al. 2023, appendix)."""


@dataclass(frozen=True, config=STRICT)
class MLE(Objective):
    """Maximum likelihood: sum_t -log p_t."""

    name: Literal["mle"] = "mle"

    @property
    def uses_scores(self) -> bool:
        return False


@dataclass(frozen=True, config=STRICT)
class AtThreshold(Objective):
    """What objectives share that call segments with a score above `threshold` bad."""

    threshold: Threshold = "auto"
    """Scores above it are bad. auto: the scorer's own (0 for scorers that count, 0.5 for probabilities). median: that
    of the segments, or of the tokens for a loss that reads their scores."""
    unit: ClassVar[Unit] = "segments"
    """Whose scores are compared with the threshold."""

    @property
    def bad_above(self) -> float | None:
        return resolved(self.threshold)

    def fit(self, statistics: Statistics) -> Objective:
        return dataclasses.replace(self, threshold=resolve(self.threshold, statistics, self.unit))

    def remarks(self, statistics: Statistics) -> list[str]:
        limit = np.float32(number(self.threshold))
        bad = statistics.mean(lambda score: (score.astype(np.float32) > limit).astype(np.float64), self.unit)
        said = f"{bad:.2%} of the judged training tokens score above the threshold {number(self.threshold):g}"
        return [said if RARE < bad < 1 - FEW else f"warning: {said}; does it fit the scorer's scale?"]


@dataclass(frozen=True, config=STRICT)
class Filtering(AtThreshold):
    """MLE on the documents whose mean score is at most `threshold`. A document without a judged segment is left out."""

    threshold: Threshold = "median"
    unit: ClassVar[Unit] = "documents"
    name: Literal["filtering"] = "filtering"

    def remarks(self, statistics: Statistics) -> list[str]:
        kept = statistics.share_at_most(number(self.threshold), self.unit)
        said = f"filtering keeps {kept:.1%} of the training documents (mean score at most {number(self.threshold):g})"
        return [said if FEW <= kept <= 1 - FEW else f"warning: {said}; does the threshold fit the scorer's scale?"]

    def edit(self, block: Block, seed: int) -> Edit:
        return Edit(times_D=at_most(block.doc_mean_D().astype(np.float32), self.threshold))


@dataclass(frozen=True, config=STRICT)
class Conditional(AtThreshold):
    """MLE on text with a control token before each segment.

    The token is `good` where the score is at most `threshold`, and `bad` where it is larger or the segment was not
    judged. A share `drop` of the control tokens is left out at random, so the model also learns to write without them.
    Control tokens are ordinary targets. Sample with the good token as prefix and the bad token banned.
    """

    drop: Annotated[float, Field(ge=0, le=1)] = 0.01
    good: str = GOOD
    bad: str = BAD
    name: Literal["conditional"] = "conditional"

    def __post_init__(self) -> None:
        if not self.good or not self.bad or self.good == self.bad:
            raise ValueError("good and bad must be two different, non-empty token names")

    @property
    def roles(self) -> dict[str, str]:
        return {"good": self.good, "bad": self.bad}

    def edit(self, block: Block, seed: int) -> Edit:
        piece_S = np.where(at_most(block.score_S, self.threshold), 0, 1)
        piece_S[block.uniform_S(seed, "drop control tokens") < self.drop] = -1
        piece_S[block.tokens_S == 0] = -1
        return Edit(insertions=Insertions.before(piece_S))


@dataclass(frozen=True, config=STRICT)
class ByThreshold(AtThreshold):
    """Objectives whose loss treats good and bad targets differently. Unjudged targets do not count."""

    unit: ClassVar[Unit] = "tokens"

    def counted(self, score_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return mask_BT & ~score_BT.isnan()

    def _good(self, x: LossInputs) -> tuple[Tensor, Tensor]:
        """Masks (bool) of the counted targets in good and in bad segments."""
        counted_BT = self.counted(x.score_BT, x.mask_BT)
        good_BT = x.score_BT <= number(self.threshold)
        return counted_BT & good_BT, counted_BT & ~good_BT


@dataclass(frozen=True, config=STRICT)
class Unlikelihood(ByThreshold):
    """sum_{score <= threshold} -log p_t + alpha sum_{score > threshold} -log(1 - p_t) (Welleck et al. 2020).

    `by: score` computes both terms for every target, weighted by 1 - score and by score, whatever the threshold. The
    paper's code does this where its threshold is 0 (PII and PEP8). With small scores it is close to MLE.
    """

    alpha: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the unlikelihood of bad targets."""
    by: Literal["threshold", "score"] = "threshold"
    """Whether targets are bad by `threshold`, or weigh by their score."""
    name: Literal["unlikelihood"] = "unlikelihood"

    def weights(self, score_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        counted_BT = self.counted(score_BT, mask_BT)
        if self.by == "score":
            bad_BT = score_BT.nan_to_num(nan=0.0)
            return torch.where(counted_BT, 1 - bad_BT, 0.0), torch.where(counted_BT, self.alpha * bad_BT, 0.0)
        good_BT = score_BT <= number(self.threshold)
        zero_BT = torch.zeros_like(score_BT)
        return torch.where(counted_BT & good_BT, 1.0, zero_BT), torch.where(counted_BT & ~good_BT, self.alpha, zero_BT)

    def loss(self, x: LossInputs) -> LossOutputs:
        good_BT, bad_BT = self._good(x)
        if self.by == "score":
            return self._by_score(x, bad_BT)
        nll_BT = torch.where(good_BT, -x.logp_BT, 0.0)
        unlikelihood_BT = torch.where(bad_BT, -x.log1mp_BT, 0.0)
        metrics = {
            "nll_good": nll_BT.detach().sum(),
            "unlikelihood_bad": unlikelihood_BT.detach().sum(),
            "bad_targets": bad_BT.sum(),
        }
        return LossOutputs(nll_BT.sum() + self.alpha * unlikelihood_BT.sum(), metrics)

    def _by_score(self, x: LossInputs, bad_BT: Tensor) -> LossOutputs:
        counted_BT = self.counted(x.score_BT, x.mask_BT)
        score_BT = x.score_BT.nan_to_num(nan=0.0)
        nll_BT = torch.where(counted_BT, -x.logp_BT, 0.0)
        unlikelihood_BT = torch.where(counted_BT, -x.log1mp_BT, 0.0)
        loss = ((1 - score_BT) * nll_BT + self.alpha * score_BT * unlikelihood_BT).sum()
        metrics = {
            "nll": nll_BT.detach().sum(),
            "score": torch.where(counted_BT, score_BT, 0.0).sum(),
            "bad_targets": bad_BT.sum(),
        }
        return LossOutputs(loss, metrics)


@dataclass(frozen=True, config=STRICT)
class Masking(ByThreshold):
    """MLE in which the targets of bad segments do not count: they are read but not learned (SLUNG, arXiv
    2505.03052)."""

    name: Literal["masking"] = "masking"

    def counted(self, score_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return mask_BT & (score_BT <= number(self.threshold))  # false for NaN

    def loss(self, x: LossInputs) -> LossOutputs:
        nll_BT = torch.where(self.counted(x.score_BT, x.mask_BT), -x.logp_BT, 0.0)
        return LossOutputs(nll_BT.sum(), {"nll_good": nll_BT.detach().sum()})


Rewards = Literal["standardised", "raw"]


@dataclass(frozen=True, config=STRICT)
class _ByReward(Objective):
    """Objectives weighted by reward.

    `rewards`: "raw" is -score, as in the paper, where the weights then hardly differ. "standardised" subtracts the mean
    reward of the training targets and divides by their standard deviation.
    """

    beta: Annotated[float, Field(gt=0)] = 1.0
    """How strongly advantages change weights: weights are exp(advantage / beta)."""
    rewards: Rewards = "standardised"
    reward_mean: float | None = None
    """Mean that is subtracted from rewards; None: that of the corpus."""
    reward_std: float | None = None
    """Spread that rewards are divided by; None: that of the corpus."""

    def fit(self, statistics: Statistics) -> Objective:
        if self.rewards == "raw":
            return self
        mean, std = statistics.moments()
        if math.isnan(mean):
            raise ConfigError(f"{self.name}: no training segment was judged, so there are no rewards to standardise")
        if std == 0:
            raise ConfigError(
                f"{self.name}: all training segments have the same score, so rewards cannot be standardised; "
                "use rewards: raw, or another scorer"
            )
        return dataclasses.replace(self, reward_mean=-mean, reward_std=std)

    def reward(self, score_BT: Tensor) -> Tensor:
        """Reward of each target. 0 if the score is NaN; such targets do not count."""
        reward_BT = -score_BT.nan_to_num(nan=0.0)
        if self.rewards == "standardised":
            if self.reward_mean is None or self.reward_std is None:
                raise ValueError("standardised rewards need the corpus's statistics: call fit(statistics) first")
            reward_BT = (reward_BT - self.reward_mean) / self.reward_std
        return reward_BT

    def counted(self, score_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return mask_BT & ~score_BT.isnan()


@dataclass(frozen=True, config=STRICT)
class RWR(_ByReward):
    """Reward-weighted regression: sum_t exp(R/beta) -log p_t.

    With standardised rewards the weights are normalized to mean 1 over the training targets of the store, so that beta
    does not change the step size. `log_norm` is the logarithm of the normalizer.
    """

    beta: Annotated[float, Field(gt=0)] = 0.5
    """How strongly rewards change weights: weights are exp(reward / beta)."""
    log_norm: float = 0.0
    name: Literal["rwr"] = "rwr"

    def fit(self, statistics: Statistics) -> Objective:
        fitted: Any = super().fit(statistics)
        if self.rewards == "raw":
            return self

        def log_weight(score: np.ndarray) -> np.ndarray:
            found: np.ndarray = (-score - fitted.reward_mean) / fitted.reward_std / fitted.beta
            return found

        top = float(log_weight(np.array(statistics.smallest())))
        log_norm = top + math.log(statistics.mean(lambda score: np.exp(log_weight(score) - top)))
        return RWR(**dataclasses.asdict(fitted) | {"log_norm": log_norm})

    def remarks(self, statistics: Statistics) -> list[str]:
        def log_weight(score: np.ndarray) -> np.ndarray:
            reward = self.reward(torch.from_numpy(score))
            return np.asarray((reward / self.beta - self.log_norm).clamp(-300, 300))

        mean = statistics.mean(lambda score: np.exp(log_weight(score)))
        square = statistics.mean(lambda score: np.exp(2 * log_weight(score)))
        share = mean**2 / square
        said = f"the effective sample size of the weights is {share:.2%} of the training tokens"
        if share < 0.01:
            return [f"warning: {said}: a few segments decide everything; raise beta"]
        return [f"warning: {said}: they hardly differ; lower beta" if share > 0.9999 else said]

    def weights(self, score_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        counted_BT = self.counted(score_BT, mask_BT)
        w_BT = torch.where(counted_BT, (self.reward(score_BT) / self.beta - self.log_norm).exp(), 0.0)
        return w_BT, torch.zeros_like(w_BT)

    def loss(self, x: LossInputs) -> LossOutputs:
        counted_BT = self.counted(x.score_BT, x.mask_BT)
        w_BT, _ = self.weights(x.score_BT, x.mask_BT)
        nll_BT = torch.where(counted_BT, -x.logp_BT, 0.0)
        return LossOutputs((w_BT * nll_BT).sum(), weight_metrics(w_BT, counted_BT, nll_BT))


@dataclass(frozen=True, config=STRICT)
class AWR(_ByReward):
    """Advantage-weighted regression:
    alpha sum_t exp((R - V_t)/beta) -log p_t + (1 - alpha) sum_t (V_t - R)^2.

    V is detached in the weight, weights are clipped at `max_weight`, and the value loss reaches the trunk. Both terms
    are means over the same targets. V = -sigmoid(w.h) with raw rewards, as in the paper, and V = w.h + b with
    standardised ones. With a `fixed_value` there is no value head, and the first term alone.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the weighted -log p in the loss; the rest is the loss of the value head."""
    max_weight: Annotated[float, Field(gt=0, exclude_if=lambda value: value == MAX_WEIGHT)] = MAX_WEIGHT
    """Larger weights count as this."""
    head: Annotated[ValueShape | None, Field(exclude_if=lambda value: value is None)] = None
    """Shape of V: linear (w.h + b) or negative_sigmoid (-sigmoid(w.h)). None: the one of the rewards."""
    reaches_trunk: Annotated[bool, Field(exclude_if=lambda value: value)] = True
    """Whether the value loss trains the LM too."""
    fixed_value: Annotated[float | None, Field(exclude_if=lambda value: value is None)] = None
    """V for every target, also 0, instead of a value head."""
    name: Literal["awr"] = "awr"

    def __post_init__(self) -> None:
        if self.fixed_value is not None and (self.head is not None or not self.reaches_trunk):
            raise ValueError("fixed_value: there is no value head, so leave out head and reaches_trunk")

    @property
    def value(self) -> ValueShape | None:
        if self.fixed_value is not None:
            return None
        return self.head or ("negative_sigmoid" if self.rewards == "raw" else "linear")

    @property
    def value_reaches_trunk(self) -> bool:
        return self.reaches_trunk

    def weights(self, score_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        if self.fixed_value is None:
            raise ValueError("the weights of AWR depend on its value head")
        counted_BT = self.counted(score_BT, mask_BT)
        w_BT = self.alpha * self._weight(self.reward(score_BT), self.fixed_value, counted_BT)
        return w_BT, torch.zeros_like(w_BT)

    def _weight(self, reward_BT: Tensor, value_BT: Tensor | float, counted_BT: Tensor) -> Tensor:
        log_w_BT = (reward_BT - value_BT) / self.beta
        return torch.where(counted_BT, log_w_BT.clamp(max=math.log(self.max_weight)).exp(), 0.0)

    def loss(self, x: LossInputs) -> LossOutputs:
        counted_BT = self.counted(x.score_BT, x.mask_BT)
        reward_BT = self.reward(x.score_BT)
        nll_BT = torch.where(counted_BT, -x.logp_BT, 0.0)
        if self.fixed_value is not None:
            w_BT = self._weight(reward_BT, self.fixed_value, counted_BT)
            return LossOutputs(self.alpha * (w_BT * nll_BT).sum(), weight_metrics(w_BT, counted_BT, nll_BT))
        if x.value_BT is None:
            raise ValueError("AWR needs the value head's prediction (value_BT)")
        w_BT = self._weight(reward_BT, x.value_BT.detach(), counted_BT)
        value_loss_BT = torch.where(counted_BT, (x.value_BT - reward_BT) ** 2, 0.0)
        # squares in float64 where the device has it: the spread of values may be far smaller than their mean
        wide = torch.float32 if reward_BT.device.type == "mps" else torch.float64
        value = torch.where(counted_BT, x.value_BT.detach(), 0.0).to(wide)
        reward = torch.where(counted_BT, reward_BT, 0.0).to(wide)
        metrics = weight_metrics(w_BT, counted_BT, nll_BT) | {
            "value_loss": value_loss_BT.detach().sum(),
            "value": value.sum(),
            "value_sq": value.square().sum(),
            "reward": reward.sum(),
            "reward_sq": reward.square().sum(),
            "value_reward": (value * reward).sum(),
        }
        return LossOutputs(self.alpha * (w_BT * nll_BT).sum() + (1 - self.alpha) * value_loss_BT.sum(), metrics)


def resolved(threshold: Threshold) -> float | None:
    return None if isinstance(threshold, str) else threshold


def number(threshold: Threshold) -> float:
    if isinstance(threshold, str):
        raise ValueError(f"threshold {threshold!r} depends on the corpus: call fit(statistics) first")
    return threshold


def at_most(score: np.ndarray, threshold: Threshold) -> np.ndarray:
    """score <= threshold in float32, as scores are stored. False for NaN."""
    return score.astype(np.float32) <= np.float32(number(threshold))


def resolve(threshold: Threshold, statistics: Statistics, unit: Unit = "segments") -> float:
    """A threshold as a number. `unit`: what the median is over. Scores of tokens are stored in float16: a threshold for
    them is not below what it would be as such a score."""
    if threshold != "median":
        limit = statistics.bad_above if threshold == "auto" else float(threshold)
        return max(limit, float(np.float16(limit))) if unit == "tokens" and statistics.of_tokens else limit
    median = statistics.median(unit)
    if math.isnan(median):
        raise ConfigError("threshold: median needs judged segments, and no training segment was judged")
    return float(np.float32(median))


def weight_metrics(w_BT: Tensor, counted_BT: Tensor, nll_BT: Tensor) -> dict[str, Tensor]:
    """Sums for the effective sample size, (sum w)^2 / (n sum w^2) (Kish 1965)."""
    return {"nll": nll_BT.detach().sum(), "weight": w_BT.detach().sum(), "weight_sq": w_BT.detach().square().sum()}
