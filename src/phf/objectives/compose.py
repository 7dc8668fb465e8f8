"""Objectives made of others: one per preference (`Each`), and one after the other (`Schedule`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core.config import STRICT
from phf.core.types import Block, Edit, Insertions, Piece
from phf.objectives.base import LossInputs, LossOutputs, Objective, ValueShape
from phf.objectives.family import Anchored, Annotate, Attributes, Hide, Quantile, Tag, Weights
from phf.objectives.paper import AWR, MLE, RWR, Conditional, Filtering, Masking, Unlikelihood, weight_metrics
from phf.objectives.tensors import Tensor, torch
from phf.tokens.statistics import Statistics

Weighing = MLE | Filtering | Conditional | Unlikelihood | Masking | RWR | Tag | Annotate | Quantile | Hide | Weights
Single = Weighing | AWR | Anchored | Attributes
"""Objectives that are not made of others and do not change during training."""
Composable = Annotated[Weighing, Field(discriminator="name", title="objective")]
"""Objectives of one preference whose loss is a weight of -log p and a weight of -log(1 - p) for each target."""


@dataclass(frozen=True, config=STRICT)
class Each(Objective):
    """An objective for each of several preferences of the store, all at once.

    Edits are merged in the order of `members`: a document is read as often as the product of its numbers says, pieces
    at one place stand in this order, and what any member hides is hidden. In the loss, weights multiply and
    unlikelihood terms add up. The roles of a member get its preference's name in front.
    """

    members: Annotated[dict[str, Composable], Field(min_length=1)]
    name: Literal["each"] = "each"

    def __post_init__(self) -> None:
        hidden = {m.hidden_token for m in self.members.values()} - {None}
        if len(hidden) > 1:
            raise ValueError(f"members hide by different tokens: {', '.join(sorted(map(str, hidden)))}")

    @property
    def preferences(self) -> tuple[str, ...]:
        return tuple(self.members)

    @property
    def roles(self) -> dict[str, str]:
        found = {}
        for preference, member in self.members.items():
            for role, token in member.roles.items():
                if role == "hidden":
                    found[role] = token
                else:
                    found[f"{preference}:{role}"] = _own_token(token, preference)
        return found

    @property
    def bad_above(self) -> float | None:
        """Of the member with control tokens, if there is one."""
        found = [member.bad_above for member in self.members.values() if member.conditions_on]
        return found[0] if len(found) == 1 else None

    @property
    def conditions_on(self) -> tuple[str, ...]:
        return tuple(f"{p}:{role}" for p, member in self.members.items() for role in member.conditions_on)

    @property
    def worst(self) -> tuple[str, ...]:
        return tuple(f"{p}:{role}" for p, member in self.members.items() for role in member.worst)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return tuple(
            dataclasses.replace(piece, text=_own_token(piece.text, preference)) if piece.control else piece
            for preference, member in self.members.items()
            for piece in member.pieces
        )

    def fit(self, statistics: Statistics) -> Objective:
        members: Any = {name: member.fit(statistics.of(name)) for name, member in self.members.items()}
        return dataclasses.replace(self, members=members)

    def remarks(self, statistics: Statistics) -> list[str]:
        found = [(name, remark) for name, m in self.members.items() for remark in m.remarks(statistics.of(name))]
        return [_about(name, remark) for name, remark in found]

    def edit(self, block: Block, seed: int) -> Edit:
        edits = []
        first = 0
        for preference, member in self.members.items():
            edits.append((member.edit(block.of(preference), seed), first))
            first += len(member.pieces)
        return merged_edit(edits)

    def counted(self, score_BT: Tensor, mask_BT: Tensor) -> Tensor:
        _, unlikelihood_BT, counted_BT = self._terms(score_BT, mask_BT)
        return counted_BT | (unlikelihood_BT > 0)

    def _terms(self, score_BTP: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The weights of -log p and -log(1 - p), and the targets that all members count."""
        weight_BT = mask_BT.to(score_BTP.dtype)
        unlikelihood_BT = torch.zeros_like(weight_BT)
        counted_BT = mask_BT
        for n, member in enumerate(self.members.values()):
            score_BT = score_BTP[..., n]
            w_BT, u_BT = member.weights(score_BT, mask_BT)
            weight_BT = weight_BT * w_BT
            unlikelihood_BT = unlikelihood_BT + u_BT
            counted_BT = counted_BT & member.counted(score_BT, mask_BT)
        return weight_BT, unlikelihood_BT, counted_BT

    def loss(self, x: LossInputs) -> LossOutputs:
        weight_BT, unlikelihood_BT, counted_BT = self._terms(x.score_BT, x.mask_BT)
        nll_BT = torch.where(counted_BT, -x.logp_BT, 0.0)
        not_BT = torch.where(unlikelihood_BT > 0, -x.log1mp_BT, 0.0)
        loss = (weight_BT * nll_BT).sum() + (unlikelihood_BT * not_BT).sum()
        metrics = weight_metrics(weight_BT, counted_BT, nll_BT) | {
            "unlikelihood_bad": not_BT.detach().sum(),
            "bad_targets": (unlikelihood_BT > 0).sum(),
        }
        return LossOutputs(loss, metrics)


def _about(name: str, remark: str) -> str:
    """A remark about one of several objectives."""
    warning = "warning: " if remark.startswith("warning: ") else ""
    return f"{warning}{name}: {remark.removeprefix('warning: ')}"


def _own_token(token: str, preference: str) -> str:
    """A control token's name for one preference: <|good|> becomes <|toxicity:good|>."""
    if token.startswith("<|") and token.endswith("|>"):
        return f"<|{preference}:{token[2:-2]}|>"
    return f"<|{preference}:{token}|>"


def merged_edit(edits: Sequence[tuple[Edit, int]]) -> Edit:
    """Several edits of one block as one. Each comes with the number of its first piece."""
    times_D = None
    hidden_T = None
    parts = []
    for edit, first in edits:
        if edit.times_D is not None:
            own = np.asarray(edit.times_D).astype(np.int64)
            times_D = own if times_D is None else times_D * own
        if edit.hidden_T is not None:
            hidden_T = edit.hidden_T if hidden_T is None else hidden_T | edit.hidden_T
        if edit.insertions is not None:
            parts.append(dataclasses.replace(edit.insertions, piece_I=edit.insertions.piece_I + first))
    return Edit(times_D, Insertions.merged(parts) if parts else None, hidden_T)


STAIRS = 10
"""Steps in which a number of an edit changes: an edit holds for a part of the training order."""


@dataclass(frozen=True, config=STRICT)
class PhaseOf:
    """A part of a schedule. `until`: share of the training at which it ends; None: the end. `ramp`: numbers of the
    objective that change linearly over the phase, as [first, last]. Those of the loss (alpha, beta) change in every
    step; those of the edit (drop, p), and RWR's beta, for which its weights are normalized, in ten equal steps.
    `fitted`: the objective of each of these steps, once they are fitted to a corpus."""

    objective: Annotated[Single, Field(discriminator="name", title="objective")]
    until: Annotated[float, Field(gt=0, le=1)] | None = None
    ramp: dict[Literal["alpha", "beta", "drop", "p"], tuple[float, float]] = Field(default_factory=dict)
    fitted: Annotated[tuple[RWR, ...], Field(exclude_if=lambda fitted: not fitted)] = ()

    def __post_init__(self) -> None:
        for name, ends in self.ramp.items():
            if not hasattr(self.objective, name):
                raise ValueError(f"{self.objective.name} has no number {name!r} to change")
            for end in ends:
                changed: dict[Any, Any] = {name: end}
                try:
                    dataclasses.replace(self.objective, **changed)
                except ValueError:
                    raise ValueError(f"ramp: {self.objective.name} cannot have {name}={end}") from None

    @property
    def stairs(self) -> list[Any]:
        """The objective of each of the phase's equal parts, which differ in numbers of the edit."""
        if self.fitted:
            return list(self.fitted)
        normalized = isinstance(self.objective, RWR) and self.objective.rewards == "standardised"
        names = ("drop", "p", *(["beta"] if normalized else []))
        ends = {name: pair for name, pair in self.ramp.items() if name in names}
        if not ends:
            return [self.objective]
        changes: list[dict[Any, Any]] = [
            {name: a + n / (STAIRS - 1) * (b - a) for name, (a, b) in ends.items()} for n in range(STAIRS)
        ]
        return [dataclasses.replace(self.objective, **change) for change in changes]


@dataclass(frozen=True, config=STRICT)
class Schedule(Objective):
    """Objectives one after the other in one run, each until a share of the training. A phase continues in the source
    text where the one before stopped. When to intervene: arXiv 2601.07087.

    Control tokens of all phases are there from the beginning.
    """

    phases: Annotated[tuple[PhaseOf, ...], Field(min_length=1)]
    """Objectives one after the other, each with `until`, its end as a share of the run."""
    name: Literal["schedule"] = "schedule"

    def __post_init__(self) -> None:
        ends = [p.until for p in self.phases]
        if sum(len(p.stairs) for p in self.phases) > 255:
            raise ValueError("too many phases")
        if ends[-1] not in (None, 1.0) or any(e is None for e in ends[:-1]):
            raise ValueError("every phase but the last needs `until`, and the last one none")
        shares = [e for e in ends[:-1] if e is not None]
        if shares != sorted(set(shares)):
            raise ValueError("`until` must rise from phase to phase")
        values = {p.objective.value for p in self.phases} - {None}
        if len(values) > 1:
            raise ValueError("phases need different value heads")
        if len({p.objective.value_reaches_trunk for p in self.phases if p.objective.value is not None}) > 1:
            raise ValueError("phases differ in value_reaches_trunk")
        if len({p.objective.reference_model for p in self.phases} - {None}) > 1:
            raise ValueError("phases need different reference models")
        tokens: dict[str, str] = {}
        for part in self.phases:
            for role, token in part.objective.roles.items():
                if tokens.setdefault(role, token) != token:
                    raise ValueError(f"role {role!r} has two tokens: {tokens[role]} and {token}")

    @property
    def timeline(self) -> tuple[tuple[Objective, float | None], ...]:
        found: list[tuple[Objective, float | None]] = []
        start = 0.0
        for part in self.phases:
            end = 1.0 if part.until is None else part.until
            stairs = part.stairs
            ends = [start + (n + 1) / len(stairs) * (end - start) for n in range(len(stairs) - 1)]
            found += zip(stairs, [*ends, part.until], strict=True)
            start = end
        return tuple(found)

    @property
    def bad_above(self) -> float | None:
        found = [limit for part in self.phases if (limit := part.objective.bad_above) is not None]
        return found[-1] if found else None

    @property
    def roles(self) -> dict[str, str]:
        return {role: token for part in self.phases for role, token in part.objective.roles.items()}

    @property
    def conditions_on(self) -> tuple[str, ...]:
        return self.phases[-1].objective.conditions_on

    @property
    def worst(self) -> tuple[str, ...]:
        return self.phases[-1].objective.worst

    @property
    def uses_scores(self) -> bool:
        return any(part.objective.uses_scores for part in self.phases)

    @property
    def reference_model(self) -> str | None:
        return next((m for part in self.phases if (m := part.objective.reference_model) is not None), None)

    def with_reference(self, path: str) -> Objective:
        changed: list[Any] = [part.objective.with_reference(path) for part in self.phases]
        parts = tuple(dataclasses.replace(p, objective=o) for p, o in zip(self.phases, changed, strict=True))
        return dataclasses.replace(self, phases=parts)

    @property
    def value(self) -> ValueShape | None:
        return next((part.objective.value for part in self.phases if part.objective.value is not None), None)

    @property
    def value_reaches_trunk(self) -> bool:
        return all(part.objective.value_reaches_trunk for part in self.phases)

    def fit(self, statistics: Statistics) -> Objective:
        parts = []
        for part in self.phases:
            fitted: Any = part.objective.fit(statistics)
            stairs: Any = ()
            if isinstance(fitted, RWR) and len(part.stairs) > 1:
                stairs = tuple(stair.fit(statistics) for stair in part.stairs)
            parts.append(dataclasses.replace(part, objective=fitted, fitted=stairs))
        return dataclasses.replace(self, phases=tuple(parts))

    def remarks(self, statistics: Statistics) -> list[str]:
        found = [(p.objective.name, remark) for p in self.phases for remark in p.objective.remarks(statistics)]
        return list(dict.fromkeys(_about(name, remark) for name, remark in found))

    def counted(self, score_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return self.phases[0].objective.counted(score_BT, mask_BT)

    def loss(self, x: LossInputs) -> LossOutputs:
        phase_BT = torch.zeros_like(x.mask_BT, dtype=torch.uint8) if x.phase_BT is None else x.phase_BT
        counts = [len(part.stairs) for part in self.phases]
        total = torch.zeros((), dtype=x.logp_BT.dtype, device=x.logp_BT.device)
        metrics: dict[str, Tensor] = {}
        start = 0.0
        for number, part in enumerate(self.phases):
            end = 1.0 if part.until is None else part.until
            share = min(max((x.progress - start) / max(end - start, 1e-9), 0.0), 1.0)
            first = sum(counts[:number])
            members: list[tuple[Objective, Tensor]] = [
                (stair, phase_BT == first + n) for n, stair in enumerate(part.fitted)
            ]
            if not members:
                changed: dict[Any, Any] = {name: a + share * (b - a) for name, (a, b) in part.ramp.items()}
                member = dataclasses.replace(part.objective, **changed) if changed else part.objective
                members = [(member, (phase_BT >= first) & (phase_BT < first + counts[number]))]
            for applies, here_BT in members:
                out = applies.loss(dataclasses.replace(x, mask_BT=x.mask_BT & here_BT))
                total = total + out.loss_sum
                for name, value in out.metrics.items():
                    metrics[name] = metrics[name] + value if name in metrics else value
            start = end
        return LossOutputs(total, metrics)
