"""Weights, gradients and optimizer state divided over processes (FSDP2), and whole tensors in checkpoints.

Checkpoints are those of a run without sharding, so sharded and other runs resume from each other's. Whole tensors are
gathered one at a time on every process, a collective operation, and kept by the processes that need them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from phf.core.config import ConfigError
from phf.training.model import PHFModel


def shard(model: PHFModel, device: torch.device, compiled: bool = False) -> None:
    """Divide `model` over all processes, in place. `compiled`: compile the decoder blocks.

    Every decoder block is a unit of its own. Embeddings and value head belong to the wrapper's unit, because its
    forward pass reads them. With bfloat16, the backward pass keeps a bfloat16 copy of every block's weights unless
    activations are checkpointed. FSDP's own mixed precision would need the residual stream in bfloat16 too.

    Raises ConfigError if transformers does not name the decoder blocks, or if blocks share weights.
    """
    blocks = decoder_blocks(model.lm)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in blocks:
        if compiled:
            block.compile(dynamic=False)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def decoder_blocks(lm: Any) -> list[nn.Module]:
    """The outermost modules that transformers declares as not to be split."""
    names = set(lm._no_split_modules or ())
    found: dict[str, nn.Module] = {}
    for name, module in lm.named_modules():
        if type(module).__name__ in names and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    if not found:
        raise ConfigError(
            f"train.shard: {type(lm).__name__} does not declare its decoder blocks (_no_split_modules), so it "
            "cannot be sharded"
        )
    weights = [id(p) for block in found.values() for p in block.parameters()]
    if len(set(weights)) < len(weights):
        raise ConfigError(
            f"train.shard: decoder blocks of {type(lm).__name__} share weights, so they cannot be divided"
        )
    return list(found.values())


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def whole(tensor: Any, keep: bool = True) -> Any:
    """The whole tensor on the CPU, gathered if it is sharded; None unless `keep`. Other values are returned as they
    are."""
    if not isinstance(tensor, Tensor):
        return tensor
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.cpu() if keep else None


def state_of(model: nn.Module, keep: bool = True) -> dict[str, Any]:
    """The state dict of `model` with whole tensors. Tied tensors stay one tensor."""
    state = model.state_dict(keep_vars=True)
    once = {id(tensor): whole(tensor.detach(), keep) for tensor in state.values()}
    return {name: once[id(tensor)] for name, tensor in state.items()}


def optimizer_state(optimizer: torch.optim.Optimizer, keep: bool = True) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors."""
    found = optimizer.state_dict()
    return found | {
        "state": {i: {k: whole(v, keep) for k, v in state.items()} for i, state in found["state"].items()},
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `optimizer_state` returned, divided as the parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parts = {
        i: {k: _like(v, parameters[i]) if v.ndim else v for k, v in of.items()} for i, of in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": parts})


def _like(tensor: Tensor, sharded: Any) -> Tensor:
    """This process's part of a whole tensor, divided like `sharded`."""
    if not isinstance(sharded, DTensor):
        return tensor
    here = tensor.to(sharded.device)
    return distribute_tensor(here, sharded.device_mesh, sharded.placements, src_data_rank=None)
