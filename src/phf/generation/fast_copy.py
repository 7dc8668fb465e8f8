"""A copy of an LM that samples faster: lower precision, joined layers, a cache that grows in place.

For a small model on a CPU most of a step is memory traffic and calls. The copy of a tested family joins layers that
read the same input and calls fewer modules. It writes keys and values into the cache without copying the cache, and
attends over the whole cache with dense products.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

TESTED_FAMILIES = {"llama", "gpt2", "gpt_neox", "qwen2"}
"""Model types whose copy has been tested against the model, token by token."""
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that read the same input and are computed by one product."""
WHOLE_CACHE = "phf_whole_cache"
"""Name of the attention that reads the cache as a whole, with the positions that are not written yet."""
CACHE_STEP = 32
"""Positions by which the key-value cache grows."""
FLOAT32_CACHE_BYTES = 4 << 20
"""Size of a layer's keys in float32 up to which attention over them is faster than over half as many bytes in
bfloat16."""


class GrowingLayer(DynamicLayer):
    """A layer of the key-value cache that grows in place. A step writes its own keys and values. It does not copy the
    earlier ones, which would take most of the time of a small model's step.

    Keys and values are views into larger buffers. The buffers are float32 while each takes at most `float32_bytes`.
    """

    length = 0

    def __init__(self, float32_bytes: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.float32_bytes = float32_bytes

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [torch.empty(0)] * 2
        end = self.length + key_states.shape[-2]
        for n, states in enumerate((key_states, value_states)):
            if self.buffers[n].dim() != 4 or self.buffers[n].shape[-2] < end:
                size = -(-(end + 1) // CACHE_STEP) * CACHE_STEP
                shape = (*states.shape[:2], size, states.shape[-1])
                dtype = torch.float32 if math.prod(shape) * 4 <= self.float32_bytes else states.dtype
                grown = states.new_zeros(shape, dtype=dtype)
                if self.length:
                    grown[:, :, : self.length] = self.buffers[n][:, :, : self.length]
                self.buffers[n] = grown
            self.buffers[n][:, :, self.length : end] = states
        self.length = end
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)


def fast_copy(lm: Any, dtype: torch.dtype) -> Any:
    """A copy of `lm` that is only good for sampling, with its float32 weights rounded to `dtype`. Buffers, such as
    the frequencies of positions, stay as they are.

    In the copy of a tested family, layers that read the same input are joined. Most layers are no longer among
    `modules()` and `parameters()`. On a CPU, attention reads the buffers of a GrowingLayer as a whole.
    """
    rounded = {
        id(p): nn.Parameter(p.detach().to(dtype), requires_grad=False)
        for p in lm.parameters()
        if p.dtype == torch.float32
    }
    made = copy.deepcopy(lm, rounded)
    rounded.clear()
    if lm.config.model_type not in TESTED_FAMILIES:
        return made
    for module in list(made.modules()):
        for names in JOINED:
            layers = [getattr(module, name, None) for name in names]
            if all(type(layer) is nn.Linear and layer.bias is None and _is_plain(layer) for layer in layers):
                joined = _Joined([layer.weight for layer in layers if layer is not None])
                for n, name in enumerate(names):
                    _put(module, name, partial(joined.part, n))
        for name, layer in list(module.named_children()):
            if type(layer).__name__.endswith("RMSNorm") and _is_plain(layer):
                _put(module, name, _RMSNorm(layer.weight, layer.variance_epsilon))
            elif type(layer) is nn.ModuleList:  # slicing a ModuleList makes a new one
                _put(module, name, list(layer))
    if lm.device.type == "cpu" and made.config._attn_implementation == "sdpa":
        made.config._attn_implementation = WHOLE_CACHE
    return made


def _is_plain(layer: nn.Module) -> bool:
    return not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


def _put(module: nn.Module, name: str, function: Any) -> None:
    """Put something that is not a module in the place of one."""
    delattr(module, name)
    setattr(module, name, function)


class _RMSNorm:
    """x / sqrt(mean(x^2) + e) * w in half the operations, rounded once: |x|^2 is D times the mean, and hypot(a, b)^2 is
    a^2 + b^2."""

    def __init__(self, weight_D: Tensor, epsilon: float) -> None:
        D = len(weight_D)
        self.weight_D = weight_D.float() * D**0.5
        self.epsilon = torch.tensor((D * epsilon) ** 0.5, device=weight_D.device)

    def __call__(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        y: Tensor = x / torch.hypot(norm, self.epsilon) * self.weight_D
        return y.to(x.dtype)


class _Joined:
    """Several linear layers as one. The last result is kept until all its parts have been read."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weight = torch.cat(list(weights))
        self.sizes = [len(weight) for weight in weights]
        self.read: Tensor | None = None
        self.parts: tuple[Tensor, ...] = ()

    def part(self, n: int, x: Tensor) -> Tensor:
        if self.read is not x:
            self.read = x
            self.parts = F.linear(x, self.weight).split_with_sizes(self.sizes, -1)
        part = self.parts[n]
        if n == len(self.sizes) - 1:
            self.read = None
            self.parts = ()
        return part


def _whole_cache_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one new position on a CPU, by products of whole dense matrices. Keys that are not written yet get no
    weight. A product with a part of the buffer would copy that part first, and the fused kernel takes twice as long.

    query [N, H, 1, D]; key, value [N, K, T, D] with K a divisor of H. Everything else goes to `sdpa_attention_forward`.
    """
    (N, H, new, D) = query.shape
    (K, written) = key.shape[1:3]
    keys = _buffer(key)
    values = _buffer(value)
    if new != 1 or keys is None or values is None or keys.shape != values.shape:
        key = key.to(query.dtype)
        value = value.to(query.dtype)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    dtype = query.dtype
    query = (query.to(keys.dtype) * (D**-0.5 if scaling is None else scaling)).view(N, K, H // K, D)
    weight_NKGT = torch.matmul(query, keys.transpose(2, 3))
    if attention_mask is not None:
        mask = attention_mask[..., :written]
        if mask.dtype == torch.bool:
            weight_NKGT[..., :written].masked_fill_(~mask, float("-inf"))
        else:
            weight_NKGT[..., :written] += mask
    weight_NKGT[..., written:] = float("-inf")
    return torch.matmul(torch.softmax(weight_NKGT, -1), values).view(N, 1, H, D).to(dtype), None


def _buffer(states: Tensor) -> Tensor | None:
    """The whole buffer [N, H, S, D] of which `states` is a view of the first positions, or None if it is no such
    view. Positions that are not written yet hold 0: a weight of 0 times NaN would be NaN."""
    N, H, T, D = states.shape
    size = states.stride(1) // D if D else 0
    dense = (H * size * D, size * D, D, 1)
    if states.stride() != dense or size < T or states.storage_offset():
        return None
    if states.untyped_storage().nbytes() < N * dense[0] * states.itemsize:
        return None
    return states.as_strided((N, H, size, D), dense)


AttentionInterface.register(WHOLE_CACHE, _whole_cache_attention)
AttentionMaskInterface.register(WHOLE_CACHE, sdpa_mask)
