"""TODO."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from phf.core.config import STRICT
from phf.core.types import Edit, SegmentTable

GOOD, BAD = "<|good|>", "<|bad|>"


@dataclasses.dataclass(frozen=True)
class LossInputs:
    """Aligned to targets; any common shape. `logp_BT`: log p(target), `log1mp_BT`: log(1 - p(target)), both computed
    from the logits; `score_BT`: float32 score of the target's segment (NaN: not judged); `mask_BT`: False where there
    is no target; `value_BT`: predicted reward, for objectives that need one."""

    logp_BT: Tensor
    log1mp_BT: Tensor
    score_BT: Tensor
    mask_BT: Tensor
    value_BT: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class LossOutputs:
    """Sums over targets, so that cutting the targets into chunks changes nothing. `loss_sum` is a scalar."""

    loss_sum: Tensor
    metrics: dict[str, Tensor]


Threshold = float | Literal["median"]
"""A score, or the median over the training part of the store (of documents' means for filtering, else of segments)."""


@dataclass(frozen=True, config=STRICT)
class Objective:
    """Interface. A subclass overrides `loss`, `edit`, or both."""

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Names of the control tokens that `edit` inserts; `Edit.control_S` numbers them."""
        return ()

    @property
    def value(self) -> Literal["linear", "negative_sigmoid"] | None:
        """The value head that `loss` needs, if any."""
        return None

    def fit(self, table: SegmentTable) -> Objective:
        """The objective with everything that depends on the corpus's statistics resolved to numbers."""
        return self

    def edit(self, table: SegmentTable, seed: int) -> Edit:
        """What happens to the token stream. Random draws depend on `seed` and the segment only."""
        return Edit()

    def counted(self, score_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Which targets the loss is a mean over (bool). Losses that read scores leave unjudged targets out."""
        return mask_BT

    def loss(self, x: LossInputs) -> LossOutputs:
        """Sum of the loss over counted targets."""
        nll_BT = torch.where(x.mask_BT, -x.logp_BT, 0.0)
        return LossOutputs(nll_BT.sum(), {"nll": nll_BT.detach().sum()})
