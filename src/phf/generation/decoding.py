"""Writing one word: nucleus sampling without a sort, guidance, and a step of a small model at the memory's speed. Floor 5.

Nucleus sampling is by rejection (draw from p, keep the word if the mass of likelier words is below top_p): the same
distribution as sorting the vocabulary, without the sort, which is most of the time of `generate` on a CPU.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, LogitsProcessor
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from phf.core.config import ConfigError

REJECTIONS = 25
"""Draws before the exact sort takes over; with top_p 0.9 a word is refused at most one time in ten."""
TOGETHER = 4
"""Draws at a time, after the first."""
BELOW_ONE = 1 - 2.0**-52
"""Its product with any positive float64 is smaller than that."""
BLOCK = 64
"""Words whose probabilities are summed together before one of them is looked for."""
ROOM = 32
"""Positions by which the key-value cache grows."""
WIDE = 4 << 20
"""Bytes of a layer's keys in float32 up to which attention over them is quicker than over half as many in bfloat16."""


def draw(logits_NV: Tensor, temperature: float, top_p: float, top_k: int | None, uniforms: Any) -> Tensor:
    """One word for each row, by temperature, then top-k, then nucleus sampling with `top_p`.

    The nucleus is every word whose likelier words together have mass below `top_p`. `uniforms(attempts)` gives float64
    [N, attempts] in [0, 1). Exact: a refused word is drawn again; rows still refused after 25 draws are sorted. A word of
    probability 0 is never drawn. Raises ConfigError where the logits are not numbers.
    """
    p_NV = torch.softmax(logits_NV.float() / temperature, -1)
    if top_k is not None and top_k < p_NV.shape[1]:
        kth_N1 = p_NV.topk(top_k, -1).values[:, -1:]
        p_NV = torch.where(p_NV >= kth_N1, p_NV, 0.0)
        p_NV = p_NV / p_NV.sum(-1, keepdim=True)
    if p_NV.shape[1] % BLOCK:
        p_NV = F.pad(p_NV, (0, -p_NV.shape[1] % BLOCK))
    cdf_NB = F.pad(p_NV.unflatten(1, (-1, BLOCK)).sum(-1).double().cumsum(-1), (1, 0))
    if not math.isfinite(cdf_NB[:, -1].sum()):
        raise ConfigError("the model's logits are not numbers (NaN or infinite): its weights are broken")

    def uniforms_of(attempts: Sequence[int]) -> Tensor:
        return torch.from_numpy(uniforms(attempts)).to(p_NV.device)

    u_NK = uniforms_of(range(1 + TOGETHER))
    chosen_N, accepted_N = _attempt(p_NV, cdf_NB, top_p, u_NK[:, :1])
    open_N = torch.nonzero(~accepted_N).squeeze(1)
    for first in range(1, REJECTIONS, TOGETHER):
        if len(open_N) == 0:
            return chosen_N
        u_NK = (u_NK[:, 1:] if first == 1 else uniforms_of(range(first, first + TOGETHER)))[open_N]
        word_N, accepted_N = _attempt(p_NV[open_N], cdf_NB[open_N], top_p, u_NK)
        chosen_N[open_N[accepted_N]] = word_N[accepted_N]
        open_N = open_N[~accepted_N]
    if len(open_N):
        u_N1 = uniforms_of([REJECTIONS])[open_N]
        chosen_N[open_N] = _draw_sorted(p_NV[open_N], top_p, u_N1)
    return chosen_N


def _attempt(p_NV: Tensor, cdf_NB: Tensor, top_p: float, u_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The first of K words drawn from p that lies in the nucleus, for each row, and whether there is one.

    First a block of words is drawn, then the word in it. `cdf_NB`: the mass before each block, and all of it.
    """
    N, K = u_NK.shape
    target_NK = u_NK.clamp(max=BELOW_ONE) * cdf_NB[:, -1:]
    block_NK = torch.searchsorted(cdf_NB, target_NK, right=True) - 1
    inside_NKW = p_NV.unflatten(1, (-1, BLOCK)).gather(1, block_NK.unsqueeze(2).expand(-1, -1, BLOCK))
    inside_NKW = inside_NKW.double().cumsum(-1)
    left_NK = torch.minimum(target_NK - cdf_NB.gather(1, block_NK), inside_NKW[..., -1] * BELOW_ONE)  # sums' rounding
    place_NK = torch.searchsorted(inside_NKW, left_NK.unsqueeze(2), right=True).squeeze(2).clamp(max=BLOCK - 1)
    word_NK = block_NK * BLOCK + place_NK
    if top_p >= 1:
        return word_NK[:, 0], torch.ones(N, dtype=torch.bool, device=p_NV.device)
    own_NK = p_NV.gather(1, word_NK)
    # the sum of the probabilities above its own: a quotient is above 1 exactly where its numerator is the larger
    above_NKV = F.hardshrink(p_NV.unsqueeze(1) / own_NK.unsqueeze(2), 1.0)
    accepted_NK = above_NKV.sum(-1) * own_NK < top_p
    if K == 1:
        return word_NK[:, 0], accepted_NK[:, 0]
    first_N1 = accepted_NK.int().argmax(1, keepdim=True)
    return word_NK.gather(1, first_N1).squeeze(1), accepted_NK.any(1)


def _draw_sorted(p_NV: Tensor, top_p: float, u_N1: Tensor) -> Tensor:
    """Nucleus sampling by sorting: the same distribution, for the rows that rejection does not settle."""
    sorted_NV, order_NV = torch.sort(p_NV, dim=-1, descending=True, stable=True)
    before_NV = sorted_NV.cumsum(-1) - sorted_NV
    first_NV = F.pad(sorted_NV[:, 1:] != sorted_NV[:, :-1], (1, 0), value=True)
    # words that are equally likely stay or go together
    before_NV = torch.where(first_NV, before_NV, 0.0).cummax(-1).values
    kept_NV = torch.where(before_NV < top_p, sorted_NV, 0.0).double().cumsum(-1)
    rank_N1 = torch.searchsorted(kept_NV, u_N1 * kept_NV[:, -1:], right=True).clamp(max=p_NV.shape[1] - 1)
    return order_NV.gather(1, rank_N1).squeeze(1)


def guide(good_NV: Tensor, bad_NV: Tensor, strength: float, good_id: int, bad_id: int) -> Tensor:
    """Logits l_bad + g (l_good - l_bad). In the bad context the two control tokens stand for each other."""
    swapped_NV = bad_NV.clone()
    swapped_NV[:, [good_id, bad_id]] = bad_NV[:, [bad_id, good_id]]
    guided_NV = swapped_NV + strength * (good_NV - swapped_NV)
    return torch.where(torch.isneginf(good_NV), good_NV, guided_NV)  # what is banned stays banned


class GuidedDecoding(LogitsProcessor):
    """Guidance for plain `generate`: give it 2N prompts, the second half the first with the bad token in place of the
    good one, `do_sample=False` and this processor. It draws the words itself, so that both halves go on alike (by
    temperature and nucleus; temperature 0 takes the likeliest). The first N outputs are the samples."""

    def __init__(
        self, good_id: int, bad_id: int, strength: float, temperature: float = 0.7, top_p: float = 0.9, seed: int = 0
    ) -> None:
        if not 0 < top_p <= 1:
            raise ConfigError(f"top_p={top_p} is not in (0, 1]")
        self.good_id, self.bad_id, self.strength = good_id, bad_id, strength
        self.temperature, self.top_p = temperature, top_p
        self.generator = np.random.Generator(np.random.Philox(seed))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        good_NV, bad_NV = scores.float().chunk(2)
        guided_NV = guide(good_NV, bad_NV, self.strength, self.good_id, self.bad_id)
        guided_NV[:, [self.good_id, self.bad_id]] = float("-inf")
        if self.temperature == 0:
            word_N = guided_NV.argmax(-1)
        else:
            rows = len(guided_NV)
            word_N = draw(
                guided_NV,
                self.temperature,
                self.top_p,
                None,
                lambda attempts: self.generator.random((rows, len(attempts))),
            )
        chosen = torch.full_like(scores, float("-inf"))
        return chosen.scatter_(1, torch.cat([word_N, word_N]).unsqueeze(1), 0.0)


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of the key-value cache with room to grow: a step writes its own keys and values, and does not copy all those
    before, which for small models is most of the time of a step. Keys and values are views into the room, in float32 while
    that takes at most `wide` bytes of either."""

    length = 0

    def __init__(self, wide: int = 0) -> None:
        super().__init__()
        self.wide = wide

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = [torch.empty(0)] * 2
        end = self.length + key_states.shape[-2]
        for n, states in enumerate((key_states, value_states)):
            if self.room[n].dim() != 4 or self.room[n].shape[-2] < end:
                size = -(-(end + 1) // ROOM) * ROOM
                shape = (*states.shape[:2], size, states.shape[-1])
                dtype = torch.float32 if math.prod(shape) * 4 <= self.wide else states.dtype
                grown = states.new_zeros(shape, dtype=dtype)
                if self.length:
                    grown[:, :, : self.length] = self.room[n][:, :, : self.length]
                self.room[n] = grown
            self.room[n][:, :, self.length : end] = states
        self.length = end
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self.room = [room[indices] for room in self.room]
        self.keys, self.values = (room[:, :, : self.length] for room in self.room)


QUICK = {"llama", "gpt2", "gpt_neox", "qwen2"}
"""Model types whose quick copy has been tested against the model, word by word."""


JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that read the same input and are computed by one product."""
WHOLE_ROOM = "phf_whole_room"
"""Name of the attention that reads the whole room of the cache."""


def twin(lm: Any, dtype: torch.dtype) -> Any:
    """A copy of `lm` to sample from and for nothing else, its float32 weights rounded to `dtype`; buffers (positions'
    frequencies) stay as they are. Of the types in QUICK, layers that read the same input become one, most layers are no
    longer among `modules()` and `parameters()`, and on a CPU attention reads the room of a GrowingLayer as a whole."""
    rounded = {
        id(p): nn.Parameter(p.detach().to(dtype), requires_grad=False)
        for p in lm.parameters()
        if p.dtype == torch.float32
    }
    made = copy.deepcopy(lm, rounded)  # type: ignore[arg-type]
    rounded.clear()
    if lm.config.model_type not in QUICK:
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
            elif type(layer) is nn.ModuleList:  # to take a slice of one is to make another
                _put(module, name, list(layer))
    if lm.device.type == "cpu" and made.config._attn_implementation == "sdpa":
        made.config._attn_implementation = WHOLE_ROOM
    return made


def _is_plain(layer: nn.Module) -> bool:
    return not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


def _put(module: nn.Module, name: str, function: Any) -> None:
    """Something that is not a module in the place of one."""
    delattr(module, name)
    setattr(module, name, function)


class _RMSNorm:
    """x / sqrt(mean(x^2) + e) * w in half the steps, rounded once: |x|^2 is D times the mean, and hypot(a, b)^2 = a^2 + b^2."""

    def __init__(self, weight_D: Tensor, epsilon: float) -> None:
        D = len(weight_D)
        self.weight_D = weight_D.float() * D**0.5
        self.epsilon = torch.tensor((D * epsilon) ** 0.5, device=weight_D.device)

    def __call__(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        y: Tensor = x / torch.hypot(norm, self.epsilon) * self.weight_D
        return y.to(x.dtype)


class _Joined:
    """Several linear layers as one. What was computed last is kept until its parts have been asked for."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weight = torch.cat(list(weights))
        self.sizes = [len(weight) for weight in weights]
        self.read: Tensor | None = None
        self.parts: tuple[Tensor, ...] = ()

    def part(self, n: int, x: Tensor) -> Tensor:
        if self.read is not x:
            self.read, self.parts = x, F.linear(x, self.weight).split_with_sizes(self.sizes, -1)
        part = self.parts[n]
        if n == len(self.sizes) - 1:
            self.read, self.parts = None, ()
        return part


def _whole_room_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention of one new position, on a CPU: products of whole dense matrices, where keys that are not written yet get
    no weight. (A product with a part of the room would first copy that part; the fused kernel is half as quick.)
    query [N, H, 1, D]; key, value [N, K, T, D], K a divisor of H. All else is left to `sdpa_attention_forward`."""
    (N, H, new, D), (K, written) = query.shape, key.shape[1:3]
    keys, values = _room(key), _room(value)
    if new != 1 or keys is None or values is None or keys.shape != values.shape:
        key, value = key.to(query.dtype), value.to(query.dtype)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )  # type: ignore[no-any-return]
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


def _room(states: Tensor) -> Tensor | None:
    """The whole room [N, H, S, D] behind a view of its first positions (what is not written yet is 0, not just anything: no
    weight times NaN is NaN); None where `states` is not such a view."""
    N, H, T, D = states.shape
    size = states.stride(1) // D if D else 0
    dense = (H * size * D, size * D, D, 1)
    if states.stride() != dense or size < T or states.storage_offset() or states.untyped_storage().nbytes() < N * dense[0] * states.itemsize:  # fmt: skip
        return None
    return states.as_strided((N, H, size, D), dense)


AttentionInterface.register(WHOLE_ROOM, _whole_room_attention)
AttentionMaskInterface.register(WHOLE_ROOM, sdpa_mask)
