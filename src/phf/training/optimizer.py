"""The optimizer: AdamW, or Muon for the matrices of the trunk and AdamW for everything else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from phf.training.config import TrainConfig
from phf.training.removable import RemovablePart


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of a matrix as a parameter of its own: columns or rows that get an update of their own."""

    view: nn.Parameter
    whole: nn.Parameter
    dim: int
    start: int

    @classmethod
    def of(cls, whole: nn.Parameter, dim: int, start: int, stop: int) -> Block:
        return cls(nn.Parameter(whole.detach().narrow(dim, start, stop - start)), whole, dim, start)

    def take_gradient(self) -> None:
        gradient = self.whole.grad
        self.view.grad = (
            gradient if gradient is None else gradient.narrow(self.dim, self.start, self.view.shape[self.dim])
        )


class MuonAdamW(torch.optim.Optimizer):
    """Muon for some parameters and AdamW for the others, as one optimizer with one state, so that schedulers and
    checkpoints work as with any other.

    Muon: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/), as `torch.optim.Muon` has it. Its updates are
    scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that both use learning rates and weight decay
    of the same size.
    """

    def __init__(
        self,
        matrices: Iterable[dict[str, Any]],
        others: Iterable[dict[str, Any]],
        lr: float,
        muon_lr: float,
        betas: tuple[float, float],
        fused: bool = True,
        blocks: Sequence[Block] = (),
    ) -> None:
        """`matrices`, `others`: groups of parameters with their `weight_decay`; those without a parameter do not
        count. `blocks`: the parameters that are blocks of others. Raises ValueError if there is no parameter."""
        self._blocks = tuple(blocks)
        adamw, muon = ([group for group in groups if group["params"]] for groups in (others, matrices))
        parts: list[torch.optim.Optimizer] = []
        if adamw:  # first, because the first group's learning rate is logged
            parts.append(torch.optim.AdamW(adamw, lr=lr, betas=betas, fused=fused))
        if muon:
            parts.append(torch.optim.Muon(muon, lr=muon_lr, adjust_lr_fn="match_rms_adamw"))
        self._parts = tuple(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the parts use this optimizer's groups and state."""
        first = 0
        for part in self._parts:
            count = len(part.param_groups)
            part.param_groups = self.param_groups[first : first + count]
            part.state = self.state
            first += count

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for block in self._blocks:
            block.take_gradient()
        for part in self._parts:
            part.step()
        for block in self._blocks:
            block.view.grad = None
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


def make_muon(
    model: nn.Module, lm: Any, config: TrainConfig, decays: Iterable[str], part: RemovablePart | None = None
) -> MuonAdamW:
    """Muon for the matrices of the LM's trunk, AdamW for embeddings, the output layer, vectors, the value head, and
    experts that are kept in one tensor of three dimensions. `decays`: names of the parameters with weight decay.
    Muon's update of a matrix mixes its rows, so a matrix that holds some of a removable `part` is updated in blocks."""
    apart = {id(p) for m in lm.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    apart |= {id(p) for p in lm.get_output_embeddings().parameters()}
    decays = set(decays)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    blocks: list[Block] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim == 2 and id(parameter) not in apart
            inside = part.blocks(parameter) if is_matrix and part is not None else []
            made = [Block.of(parameter, *place) for place in inside]
            blocks += made
            groups.setdefault((is_matrix, name in decays), []).extend([b.view for b in made] or [parameter])

    def of(is_matrix: bool) -> list[dict[str, Any]]:
        return [
            {"params": groups.get((is_matrix, decayed), []), "weight_decay": config.weight_decay if decayed else 0.0}
            for decayed in (True, False)
        ]

    return MuonAdamW(
        of(True),
        of(False),
        lr=config.lr,
        muon_lr=config.lr if config.muon_lr is None else config.muon_lr,
        betas=config.betas,
        blocks=blocks,
    )
