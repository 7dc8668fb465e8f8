"""The interface of an objective.

An objective is a frozen dataclass whose fields are its hyper-parameters. It never sees logits. Every member of the
family is a function of the target's log-probability, the score of the target's segment, a mask and perhaps a
predicted value. So one fused kernel (phf.training.fused) computes them all, a user's own included:

    @dataclass(frozen=True)
    class Focal(Objective):
        def loss(self, x):
            nll = torch.where(self.counted(x.score_BT, x.mask_BT), -(1 - x.logp_BT.exp()) ** 2 * x.logp_BT, 0.0)
            return LossOutputs(nll.sum(), {})

Losses and metrics are sums over targets; the trainer divides by the global number of counted targets. A reward is
-score and exists only in this package. Legend: B rows, T targets, S segments, D documents.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from phf.core.config import STRICT
from phf.core.types import Edit, SegmentTable

GOOD = "<|good|>"
BAD = "<|bad|>"
ROLES = ("good", "bad")
"""The roles of an objective's control tokens, in order."""


@dataclasses.dataclass(frozen=True)
class LossInputs:
    """Tensors of one common shape, one entry per target.

    `logp_BT`: log p(target). `log1mp_BT`: log(1 - p(target)). Both come from the logits. `score_BT`: score of the
    target's segment, float32, NaN for not judged. `mask_BT`: False where there is no target. `value_BT`: predicted
    reward, for objectives with a value head.
    """

    logp_BT: Tensor
    log1mp_BT: Tensor
    score_BT: Tensor
    mask_BT: Tensor
    value_BT: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class LossOutputs:
    """Sums over targets: splitting the targets into chunks changes nothing. `loss_sum` is a scalar."""

    loss_sum: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True, config=STRICT)
class Objective:
    """Interface. A subclass overrides `loss`, `edit`, or both."""

    @property
    def name(self) -> str:
        """The objective's name in recipes and reports. phf's own objectives have it as a field."""
        return type(self).__name__

    @property
    def bad_above(self) -> float | None:
        """Scores above it are bad to this objective. None: the objective draws no line between good and bad."""
        return None

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Names of the control tokens that `edit` inserts. `Edit.control_S` holds their positions in this tuple."""
        return ()

    @property
    def roles(self) -> dict[str, str]:
        """Control tokens by role: {"good": name, "bad": name}, or empty."""
        return dict(zip(ROLES, self.control_tokens, strict=False))

    @property
    def value(self) -> Literal["linear", "negative_sigmoid"] | None:
        """The value head that `loss` needs, if any."""
        return None

    def fit(self, table: SegmentTable) -> Objective:
        """The objective with everything that depends on the corpus resolved to numbers."""
        return self

    def edit(self, table: SegmentTable, seed: int) -> Edit:
        """What happens to the token stream. Random draws depend on `seed` and the segment only."""
        return Edit()

    def counted(self, score_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The targets that the loss is a mean over (bool). Losses that read scores leave unjudged targets out."""
        return mask_BT

    def loss(self, x: LossInputs) -> LossOutputs:
        """Sum of the loss over counted targets."""
        nll_BT = torch.where(x.mask_BT, -x.logp_BT, 0.0)
        return LossOutputs(nll_BT.sum(), {"nll": nll_BT.detach().sum()})
