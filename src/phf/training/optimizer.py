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
        matrices: Iterable[nn.Parameter],
        decayed: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float,
        muon_lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        fused: bool = True,
    ) -> None:
        muon = torch.optim.Muon(list(matrices), lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        groups: list[dict[str, Any]] = [
            {"params": list(decayed), "weight_decay": weight_decay},
            {"params": list(others), "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=fused)
        self._parts: tuple[torch.optim.Optimizer, ...] = (adamw, muon)  # the first group's learning rate is logged
        super().__init__([group for part in self._parts for group in part.param_groups], {})
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
    """Muon for the matrices of the LM's trunk, AdamW for embeddings, the output layer, vectors and the value head.
    `decays`: names of the parameters with weight decay."""
    apart = {id(p) for m in lm.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    apart |= {id(p) for p in lm.get_output_embeddings().parameters()}
    decays = set(decays)
    matrices = []
    decayed = []
    others = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim == 2 and id(parameter) not in apart:
            matrices.append(parameter)
        elif name in decays:
            decayed.append(parameter)
        else:
            others.append(parameter)
    return MuonAdamW(
        matrices,
        decayed,
        others,
        lr=config.lr,
        muon_lr=config.lr if config.muon_lr is None else config.muon_lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
