"""The optimizer: AdamW, or Muon for the matrices of the trunk and AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from phf.training.config import TrainConfig


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
    ) -> None:
        """`matrices`, `others`: groups of parameters with their `weight_decay`; those without a parameter do not
        count. Raises ValueError if there is none."""
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
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


def make_muon(model: nn.Module, lm: Any, config: TrainConfig, decays: Iterable[str]) -> MuonAdamW:
    """Muon for the matrices of the LM's trunk, AdamW for embeddings, the output layer, vectors, the value head, and
    experts that are kept in one tensor of three dimensions. `decays`: names of the parameters with weight decay."""
    apart = {id(p) for m in lm.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    apart |= {id(p) for p in lm.get_output_embeddings().parameters()}
    decays = set(decays)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim == 2 and id(parameter) not in apart
            groups.setdefault((is_matrix, name in decays), []).append(parameter)

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
    )
