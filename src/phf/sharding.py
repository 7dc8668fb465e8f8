"""Weights, gradients and optimizer state divided over processes (FSDP2), and whole again in checkpoints. Floor 4.

Checkpoints are those of a run that is not sharded, so that either goes on from the other's. A whole tensor is put
together one at a time, on every process (a collective operation), and kept by those that ask for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from phf.config import ConfigError
from phf.model import PHFModel


def shard(model: PHFModel, device: torch.device, compiled: bool = False) -> None:
    """Divide `model` over all processes (in place): every decoder block by itself, the rest (embeddings, tied or not, and
    the value head) with the wrapper, whose forward reads them. `compiled`: compile the blocks.

    Raises ConfigError where transformers does not say what a decoder block of the model is.
    """
    names = set(model.lm._no_split_modules or ())
    blocks = [module for module in model.lm.modules() if type(module).__name__ in names]
    if not blocks:
        raise ConfigError(
            f"train.shard: {type(model.lm).__name__} does not say which of its modules are decoder blocks"
        )
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in blocks:
        if compiled:
            block.compile(dynamic=False)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def whole(tensor: Any, keep: bool = True) -> Any:
    """A sharded tensor put together, on the CPU (None unless `keep`); anything else as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if keep else None


def state_of(model: nn.Module, keep: bool = True) -> dict[str, Any]:
    """The state of `model` with whole tensors; tied ones stay one."""
    state = model.state_dict(keep_vars=True)
    once = {id(tensor): whole(tensor.detach(), keep) for tensor in state.values()}
    return {name: once[id(tensor)] for name, tensor in state.items()}


def optimizer_state(optimizer: torch.optim.Optimizer, keep: bool = True) -> dict[str, Any]:
    """What `optimizer.state_dict()` would be if nothing were sharded."""
    found = optimizer.state_dict()
    return found | {
        "state": {i: {k: whole(v, keep) for k, v in state.items()} for i, state in found["state"].items()},
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The other way round."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parts = {
        i: {k: _like(v, parameters[i]) if v.ndim else v for k, v in of.items()} for i, of in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": parts})


def _like(tensor: Tensor, sharded: Any) -> Tensor:
    """This process's part of a whole tensor, divided as `sharded` is."""
    if not isinstance(sharded, DTensor):
        return tensor
    here = tensor.to(sharded.device)
    return distribute_tensor(here, sharded.device_mesh, sharded.placements, src_data_rank=None)
