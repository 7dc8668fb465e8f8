"""Plain causal attention over whole rows, as training needs it.

transformers' "sdpa" is slow for this in two ways. Compiled, it always builds a mask, because it cannot see that
rows are not packed, and with a mask torch has no flash kernel. And in bfloat16, torch's CPU kernel spends most of
its time outside matrix products, above all in the backward pass.

So phf registers its own attention function with transformers, as `NAME`. Within `whole_rows()` it needs no mask. In
bfloat16 on a CPU it processes blocks of queries: two matrix products and one softmax over the keys that a block may
see. Half of the square is never computed. Above `KEPT_POSITIONS` the backward pass computes probabilities again
instead of keeping them. Scores are rounded to bfloat16 before the softmax, as in transformers' eager attention.
In training the masks that transformers makes, such as that for positions that start again, are applied to the blocks.
Everything else (GPUs, float32, other masks, caches, dropout) is transformers' "sdpa".

Legend: B rows, H heads, T positions, D width of a head; N = B x H.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from phf.training.batches import document_positions

NAME = "phf"

_TESTS_FOR_SDPA = re.compile(r"_attn_implementation\s*(==|!=|in\b|not in\b).*sdpa")

_whole_rows = 0


@contextlib.contextmanager
def whole_rows() -> Iterator[None]:
    """Inside this block every row is one sequence that starts at its first position: rows are not packed."""
    global _whole_rows
    _whole_rows += 1
    try:
        yield
    finally:
        _whole_rows -= 1


def keeps_documents_apart(lm: Any, end_of_text: int) -> bool:
    """Whether `lm` reads a document the same after another one as alone, if positions start again."""
    other = 1 if end_of_text == 0 else 0
    words = [i for i in range(2, 12) if i != end_of_text]
    alone = [end_of_text, *words[:6]]
    after_another = [other, *words[::-1], *alone]

    def last_hidden(ids: list[int]) -> Tensor:
        ids_BT = torch.tensor([ids], device=lm.get_input_embeddings().weight.device)
        positions = document_positions(ids_BT, end_of_text)
        out: Tensor = lm.base_model(input_ids=ids_BT, position_ids=positions, use_cache=False).last_hidden_state
        return out[0, -len(alone) :].float()

    with evaluating(lm), torch.no_grad():
        try:
            first = last_hidden(alone)
            second = last_hidden(after_another)
        except TypeError:  # the model takes no positions
            return False
    return bool((first - second).norm() <= 1e-3 * first.norm())


@contextlib.contextmanager
def usual(lm: Any) -> Iterator[None]:
    """Inside this block `lm` attends as it does when loaded from its files."""
    swapped = lm.config._attn_implementation == NAME
    if swapped:
        lm.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if swapped:
            lm.set_attn_implementation(NAME)


@contextlib.contextmanager
def evaluating(lm: Any) -> Iterator[None]:
    """Inside this block `lm` is in evaluation mode, without dropout."""
    training = lm.training
    lm.eval()
    try:
        yield
    finally:
        lm.train(training)


def _mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """No mask for whole rows, else transformers' mask. Padding, a cache, a window, or a mask function of the model
    (for which transformers sets `use_vmap`) needs transformers' mask too."""
    plain = attention_mask is None and q_length == kv_length and not use_vmap
    if _whole_rows and plain and (local_size is None or kv_length < local_size):
        return None
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        use_vmap=use_vmap,
        **kwargs,
    )


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    # of a training mode's mask it is known that no row is padding, and none of its queries sees a later key
    masked = (
        module.training
        and attention_mask is not None
        and attention_mask.dtype == torch.bool
        and attention_mask.shape[-2:] == (query.shape[2], key.shape[2])
        and attention_mask.shape[1] == 1
    )
    in_blocks = (
        query.device.type == "cpu"
        and dtype == torch.bfloat16
        and query.dtype in (torch.bfloat16, torch.float32)
        and causal
        and (attention_mask is None or masked)
        and all(kwargs.get(name) is None for name in ("position_bias", "softcap", "cache"))
        and dropout == 0
        and query.shape[2] == key.shape[2] > 1
    )
    if not in_blocks:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (x.to(dtype).contiguous() for x in (query, repeat_kv(key, groups), repeat_kv(value, groups)))
    out = causal_attention(query, key, value, scale, attention_mask[:, 0] if attention_mask is not None else None)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def swap(lm: Any) -> bool:
    """Make `lm` attend as this module does where it would use "sdpa", in place. Returns whether it does.

    Models whose code tests for "sdpa" (to apply a mask of their own, like sparse attention) keep it. So do models for
    which a short pass over whole rows changes, in float32 or, on a CPU, in bfloat16.
    """
    if lm.config._attn_implementation != "sdpa" or lm.config.sub_configs or not lm._can_set_attn_implementation():
        found: bool = lm.config._attn_implementation == NAME
        return found
    if _TESTS_FOR_SDPA.search(inspect.getsource(sys.modules[type(lm).__module__])):
        return False
    embeddings = lm.get_input_embeddings()
    length = min(136, getattr(lm.config, "max_position_embeddings", None) or 136)  # two blocks
    ids = torch.arange(length, device=embeddings.weight.device).unsqueeze(0) % embeddings.num_embeddings

    def hidden(dtype: torch.dtype | None) -> Tensor:
        with torch.no_grad(), torch.autocast(ids.device.type, dtype, enabled=dtype is not None), whole_rows():
            found: Tensor = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()
            return found

    dtypes: list[torch.dtype | None] = [None, torch.bfloat16] if ids.device.type == "cpu" else [None]
    same = False
    try:
        with evaluating(lm):
            before = [hidden(dtype) for dtype in dtypes]
            lm.set_attn_implementation(NAME)
            same = all(
                (hidden(dtype) - was).norm() <= (0.1 if torch.bfloat16 in (dtype, lm.dtype) else 1e-3) * was.norm()
                for dtype, was in zip(dtypes, before, strict=True)
            )
    except Exception:  # the model's code does not run without a mask
        pass
    finally:
        if not same:
            lm.set_attn_implementation("sdpa")
    return same


KEPT_POSITIONS = 1024
"""Up to this context the probabilities are kept for the backward pass; above, they are computed again."""


def _blocks(positions: int) -> list[tuple[int, int]]:
    """(start, end) of the blocks of queries. Blocks of 128 or 256 queries measured best from 256 to 4,096 positions."""
    size = 256 if positions >= 1024 else 128
    return [(start, min(start + size, positions)) for start in range(0, positions, size)]


def _kept_size(rows: int, positions: int) -> int:
    """Number of probabilities of all blocks that are kept."""
    return rows * sum((end - start) * end for start, end in _blocks(positions)) if positions <= KEPT_POSITIONS else 0


def _kept_blocks(kept: Tensor, rows: int, positions: int) -> Iterator[tuple[int, int, Tensor | None]]:
    """(start, end, tensor for its probabilities [N, Q, start + Q] or None) of every block."""
    before = 0
    for start, end in _blocks(positions):
        part = kept[before : (before := before + rows * (end - start) * end)]
        yield start, end, part.view(rows, end - start, end) if len(kept) else None


def _probabilities(
    query_NQD: Tensor,
    key_NTD: Tensor,
    start: int,
    scale: float,
    out: Tensor | None = None,
    bias_BTT: Tensor | None = None,
) -> Tensor:
    """Softmax over the keys that the queries from `start` on may see: [N, Q, start + Q]. `bias_BTT`: 0 or -inf, added
    to the scores of all heads, in place of the causal mask."""
    queries = query_NQD.shape[1]
    end = start + queries
    seen = key_NTD[:, :end].transpose(1, 2)
    scores = torch.baddbmm(query_NQD.new_empty(1), query_NQD, seen, beta=0, alpha=scale)
    if bias_BTT is None:
        scores[:, :, start:] += scores.new_full((queries, queries), float("-inf")).triu_(1)
    else:
        scores.view(len(bias_BTT), -1, queries, end).add_(bias_BTT[:, None, start:end, :end])
    return torch.softmax(scores, -1, out=out)


def _bias(allowed_BTT: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """0 where a query may see a key, else -inf."""
    if allowed_BTT is None:
        return None
    return torch.zeros(allowed_BTT.shape, dtype=dtype).masked_fill_(~allowed_BTT, float("-inf"))


@torch.library.custom_op("phf::causal_attention", mutates_args=())
def _forward(
    query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, scale: float, allowed_BTT: Tensor | None
) -> tuple[Tensor, Tensor]:
    query, key, value = (x.flatten(0, 1) for x in (query_BHTD, key_BHTD, value_BHTD))
    rows, positions = query.shape[:2]
    bias = _bias(allowed_BTT, query.dtype)
    kept = query.new_empty(_kept_size(rows, positions))
    out = value.new_empty(value.shape)
    for start, end, place in _kept_blocks(kept, rows, positions):
        p = _probabilities(query[:, start:end], key, start, scale, place, bias)
        torch.bmm(p, value[:, :end], out=out[:, start:end])
    return out.view(value_BHTD.shape), kept


@torch.library.custom_op("phf::causal_attention_backward", mutates_args=())
def _backward(
    grad_BHTD: Tensor,
    kept: Tensor,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    scale: float,
    allowed_BTT: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, query, key, value = (x.flatten(0, 1) for x in (grad_BHTD, query_BHTD, key_BHTD, value_BHTD))
    rows, positions = query.shape[:2]
    bias = None if len(kept) else _bias(allowed_BTT, query.dtype)
    wide = torch.promote_types(key.dtype, torch.float32)
    grad_query = query.new_empty(query.shape)
    grad_key = key.new_zeros(key.shape, dtype=wide)
    grad_value = value.new_zeros(value.shape, dtype=wide)
    for start, end, p in _kept_blocks(kept, rows, positions):
        block = slice(start, end)
        if p is None:
            p = _probabilities(query[:, block], key, start, scale, bias_BTT=bias)
        grad_value[:, :end] += p.transpose(1, 2) @ grad[:, block]
        grad_p = grad[:, block] @ value[:, :end].transpose(1, 2)
        grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
        torch.bmm(grad_scores, key[:, :end], out=grad_query[:, block])
        grad_key[:, :end] += grad_scores.transpose(1, 2) @ query[:, block]
    return (
        grad_query.mul_(scale).view(query_BHTD.shape),
        grad_key.mul_(scale).to(key.dtype).view(key_BHTD.shape),
        grad_value.to(value.dtype).view(value_BHTD.shape),
    )


@_forward.register_fake
def _(
    query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, scale: float, allowed_BTT: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, heads, positions = query_BHTD.shape[:3]
    return value_BHTD.new_empty(value_BHTD.shape), query_BHTD.new_empty(_kept_size(rows * heads, positions))


@_backward.register_fake
def _(
    grad_BHTD: Tensor,
    kept: Tensor,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    scale: float,
    allowed_BTT: Tensor | None,
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (query_BHTD, key_BHTD, value_BHTD))


def _save_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.scale, allowed = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], query, key, value, allowed)


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, allowed = ctx.saved_tensors
    return (*_backward(grad, *tensors, ctx.scale, allowed), None, None)


_forward.register_autograd(_differentiate, setup_context=_save_context)


def causal_attention(
    query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, scale: float, allowed_BTT: Tensor | None = None
) -> Tensor:
    """softmax(scale Q K^T + causal mask) V [B, H, T, D] on a CPU, differentiable once. `allowed_BTT`: which keys each
    query may see, bool, none of them later; None: all that are not later."""
    out: Tensor = _forward(query_BHTD, key_BHTD, value_BHTD, scale, allowed_BTT)[0]
    return out
