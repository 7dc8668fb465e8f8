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
-score and exists only in this package. Legend: B rows, T targets, S segments, D documents, I insertions.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from pydantic.dataclasses import dataclass

from phf.core.config import STRICT
from phf.core.types import Block, Edit, Piece, Roles
from phf.objectives.tensors import Tensor, torch
from phf.tokens.statistics import Statistics

GOOD = "<|good|>"
BAD = "<|bad|>"
HIDDEN = "<|hidden|>"


ValueShape = Literal["linear", "negative_sigmoid"]
"""Of a value head: w.h + b, or -sigmoid(w.h)."""


@dataclasses.dataclass(frozen=True)
class Removable:
    """A part of each layer that bad text trains and that is removed from the finished model.

    `heads`: key-value heads, with the queries that read them. `neurons`: share of the MLP's. `without`: share of the
    rows whose good targets are learned with the part switched off.
    """

    heads: int
    neurons: float
    without: float


@dataclasses.dataclass(frozen=True)
class LossInputs:
    """Tensors of one common shape, one entry per target.

    `logp_BT`: log p(target). `log1mp_BT`: log(1 - p(target)). Both come from the logits. `score_BT`: score of the
    target's segment, float32, NaN for not judged. `mask_BT`: False where there is no target. `value_BT`: predicted
    reward, for objectives with a value head. `progress`: share of the training that is done, in [0, 1]. `phase_BT`:
    phase of the schedule that each target belongs to, for schedules. `reference_BT`: log-probability of the target
    under the objective's reference model, NaN where it is not known. An objective with several `preferences` gets
    `score_BT` with one more dimension, for these.
    """

    logp_BT: Tensor
    log1mp_BT: Tensor
    score_BT: Tensor
    mask_BT: Tensor
    value_BT: Tensor | None = None
    progress: float = 0.0
    phase_BT: Tensor | None = None
    reference_BT: Tensor | None = None


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
    def roles(self) -> dict[str, str]:
        """Control tokens by role, in order: {"good": name, "bad": name}, for example. Empty without any."""
        return {}

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Names of the control tokens."""
        return tuple(self.roles.values())

    @property
    def conditions_on(self) -> tuple[str, ...]:
        """The roles whose tokens go before what the model shall write. All other roles are banned then."""
        return ("good",) if "good" in self.roles else ()

    @property
    def worst(self) -> tuple[str, ...]:
        """The roles whose tokens ask for bad text."""
        return ("bad",) if "bad" in self.roles else ()

    @property
    def control(self) -> Roles:
        """The control tokens with their roles."""
        return Roles(self.roles, self.conditions_on, self.worst)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What `edit` inserts. `Insertions.piece_I` holds places in this tuple."""
        return tuple(Piece(name, control=True) for name in self.control_tokens)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the corpus that `edit` inserts, in any phase."""
        pieces = [piece for member, _ in self.timeline for piece in member.pieces]
        return tuple(dict.fromkeys(piece.column for piece in pieces if piece.column is not None))

    @property
    def hidden_token(self) -> str | None:
        """The control token that replaces what `edit` hides."""
        return self.roles.get("hidden")

    @property
    def timeline(self) -> tuple[tuple[Objective, float | None], ...]:
        """The objectives of a schedule, and the share of the training until which each applies; None: to the end."""
        return ((self, None),)

    @property
    def preferences(self) -> tuple[str, ...] | None:
        """The preferences of the store whose scores `loss` gets, in order. None: the one that training chose."""
        return None

    @property
    def reads(self) -> tuple[str, ...]:
        """All preferences of the store that `edit` or `loss` read by name."""
        return self.preferences or ()

    @property
    def uses_scores(self) -> bool:
        """Whether the scores change anything."""
        return True

    @property
    def reference_model(self) -> str | None:
        """The reference model whose log-probabilities `loss` gets, as a path."""
        return None

    @property
    def removable(self) -> Removable | None:
        """The part of the model that bad targets train alone, if any."""
        return None

    def with_reference(self, path: str) -> Objective:
        """The objective with its reference model at another path."""
        return self

    @property
    def value(self) -> ValueShape | None:
        """The value head that `loss` needs, if any."""
        return None

    @property
    def value_reaches_trunk(self) -> bool:
        """Whether the gradient of the value head reaches the LM."""
        return True

    def fit(self, statistics: Statistics) -> Objective:
        """The objective with everything that depends on the corpus resolved to numbers."""
        return self

    def remarks(self, statistics: Statistics) -> list[str]:
        """What a user should know about the fitted objective on this text: how much a threshold keeps, how much weights
        differ. A remark that starts with "warning" is about a setting that hardly fits the scores."""
        return []

    def edit(self, block: Block, seed: int) -> Edit:
        """What happens to a block of the token stream. Random draws depend on `seed` and global numbers only
        (`Block.uniform_S`)."""
        return Edit()

    def counted(self, score_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The targets that the loss is a mean over (bool). Losses that read scores leave unjudged targets out."""
        return mask_BT

    def weights(self, score_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of -log p and of -log(1 - p) of each target in the loss; 0 where it does not count. Objectives
        with another loss do not have them."""
        weight_BT = self.counted(score_BT, mask_BT).to(score_BT.dtype)
        return weight_BT, torch.zeros_like(weight_BT)

    def loss(self, x: LossInputs) -> LossOutputs:
        """Sum of the loss over counted targets."""
        nll_BT = torch.where(x.mask_BT, -x.logp_BT, 0.0)
        return LossOutputs(nll_BT.sum(), {"nll": nll_BT.detach().sum()})


def count_targets(objective: Objective, score_BT: Tensor, mask_BT: Tensor, phase_BT: Tensor | None = None) -> Tensor:
    """`Objective.counted`, for a schedule each phase's own."""
    if phase_BT is None:
        return objective.counted(score_BT, mask_BT)
    counted_BT = torch.zeros_like(mask_BT)
    for number, (member, _) in enumerate(objective.timeline):
        here_BT = phase_BT == number
        counted_BT |= here_BT & member.counted(score_BT, mask_BT & here_BT)
    return counted_BT
