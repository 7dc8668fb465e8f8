"""The fused loss: hidden states and output embeddings to an objective's value and gradients. Floor 4.

Chunk by chunk over targets, without ever holding [targets, vocabulary]: memory is O(chunk x vocabulary). Inside a
chunk autograd differentiates the objective with respect to log p, log(1-p) and value; the way from there to hidden
states and embeddings is done by hand. With a = dL/dlog p, b = dL/dlog(1-p), q the softmax over the *other* words:

    dL/dlogit_target = d,   dL/dlogit_j = -d q_j,   d = a (1-p) - b p

which is c (onehot - softmax) with c = a - b p/(1-p) (Welleck et al. 2020, appendix), written so that nothing
overflows for p -> 1. Likewise log p and log(1-p) both come from the log-sum-exp over the other words, never from one
another: a float32 log p rounds to 0 for p -> 1 and takes log(1-p) and its gradient with it.

Models that scale or cap their logits (`LogitShape`) multiply dL/dlogit by the shape's slope.

Legend: N targets (B x T), C targets in a chunk, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phf.core.config import ConfigError
from phf.objectives import LossInputs, LossOutputs, Objective

CHUNK_NUMBERS = {"cpu": 2**24, "cuda": 2**30}
"""Default size of a chunk: C x V numbers (64 MiB in float32 on a CPU, where a factor of 4 either way is no better; on a GPU
2 GiB in bfloat16, since a chunk takes some dozens of operations and one pass over the embeddings' gradient, however small
it is, and indices stay below 2**31)."""
CHUNK_SHARE = 128
"""And on a GPU at most one number for so many bytes of its memory."""
UNCOMPILED = 4
"""And where the elementwise parts are not compiled, so many times less: a number takes up to 24 bytes then, not 6."""
CHUNK_TARGETS = 512
"""And on a CPU at most so many targets, however small the vocabulary: more would cost memory and gain nothing."""
TILE = 128
"""On a GPU chunks are a multiple of so many targets, as the tiles of its matrix products are."""
MULTIPLE = 64
"""On a GPU the vocabulary is padded to a multiple of it: matrix products are slow where rows are of odd length (GPT-2's of
50,257)."""
WORDS = 2048
"""On a CPU gradients are made for so many words at a time: what is added up then stays in the cache."""


@dataclass(frozen=True)
class LogitShape:
    """What a model does to its logits after the output layer: z -> cap tanh(scale z / cap), or scale z without a cap
    (Gemma 2, arXiv 2408.00118, caps; Cohere's and Granite's scale)."""

    scale: float = 1.0
    cap: float | None = None

    @property
    def plain(self) -> bool:
        return self.scale == 1 and self.cap is None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def slope(self, shaped: Tensor) -> Tensor | float:
        """Derivative, from the shaped logits."""
        return self.scale if self.cap is None else self.scale * (1 - (shaped / self.cap) ** 2)


PLAIN = LogitShape()


def log_probabilities(logits_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor]:
    """log p and log(1 - p) of the targets, the plain way: differentiable by autograd, any float type.

    The reference that the fused kernel is tested against; also what `unfused_loss` uses.
    """
    target_C1 = target_C.unsqueeze(-1)
    at_target = logits_CV.gather(-1, target_C1).squeeze(-1)
    return _two_logs(at_target, logits_CV.scatter(-1, target_C1, float("-inf")).logsumexp(-1))


def _two_logs(at_target: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """log p and log(1 - p) from the target's logit and the log-sum-exp over the other words."""
    zero = torch.zeros_like(others)
    return -torch.logaddexp(zero, others - at_target), -torch.logaddexp(zero, at_target - others)


def unfused_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    score_N: Tensor,
    mask_N: Tensor,
    value_N: Tensor | None,
    objective: Objective,
    shape: LogitShape = PLAIN,
) -> LossOutputs:
    """The same as `fused_loss` over full logits, by autograd: slow, obvious, for tests and for checking one's own."""
    logits_NV = torch.nn.functional.linear(hidden_ND, weight_VD, bias_V)
    logits_NV = shape(logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float())
    logp_N, log1mp_N = log_probabilities(logits_NV, target_N)
    return objective.loss(LossInputs(logp_N, log1mp_N, score_N, mask_N, value_N))


def _split(logits_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log p, log(1-p), e, sum): e = exp(logit - max) over the other words, `sum` their sum, and e at the target minus
    that sum, so that e times -d / sum is dL/dlogits. Overwrites nothing."""
    target_C1 = target_C.unsqueeze(1)
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    at_target_C = logits_CV.gather(1, target_C1).squeeze(1).to(wide)
    e_CV = logits_CV.to(wide, copy=True).scatter_(1, target_C1, float("-inf"))
    top_C1 = e_CV.amax(1, keepdim=True)
    e_CV.sub_(top_C1).exp_()
    sum_C = e_CV.sum(1)
    e_CV.scatter_(1, target_C1, -sum_C.unsqueeze(1))
    return *_two_logs(at_target_C, top_C1.squeeze(1) + sum_C.log()), e_CV, sum_C


def _logits_grad(e_CW: Tensor, factor_C: Tensor, slope_CW: Tensor | None, dtype: torch.dtype) -> Tensor:
    """dL/dlogits of some words of a chunk, in the type of the matrix products that follow. Overwrites `e_CW`."""
    e_CW.mul_(factor_C.unsqueeze(1))
    if slope_CW is not None:
        e_CW.mul_(slope_CW)
    return e_CW.to(dtype)


def _statistics(logits_CV: Tensor, target_C: Tensor, words: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log p, log(1-p), max, sum of exp(logit - max)), the latter over the other words: `_split` without a float32 tensor of
    the size of the logits, once the compiler has made one pass of it. Columns from `words` on are padding."""
    out_CV, _ = _outside(logits_CV, target_C, words)
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    at_target_C = logits_CV.gather(1, target_C.unsqueeze(1)).squeeze(1).to(wide)
    others_CV = logits_CV.to(wide).masked_fill(out_CV, float("-inf"))
    top_C1 = others_CV.amax(1, keepdim=True)
    sum_C = (others_CV - top_C1).exp().sum(1, keepdim=True).squeeze(1)  # as inductor knows a softmax of one pass
    return *_two_logs(at_target_C, top_C1.squeeze(1) + sum_C.log()), top_C1, sum_C


def _padded_grad(
    logits_CV: Tensor, target_C: Tensor, words: int, top_C1: Tensor, sum_C: Tensor, factor_C: Tensor,
    slope_CV: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """dL/dlogits behind `_statistics`, 0 in padding. Exponentials are computed again, not kept."""
    out_CV, hit_CV = _outside(logits_CV, target_C, words)
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    e_CV = (logits_CV.to(wide) - top_C1).exp().masked_fill(out_CV, 0.0)
    grad_CV = torch.where(hit_CV, -sum_C.unsqueeze(1), e_CV) * factor_C.unsqueeze(1)
    return (grad_CV if slope_CV is None else grad_CV * slope_CV).to(dtype)


def _outside(logits_CV: Tensor, target_C: Tensor, words: int) -> tuple[Tensor, Tensor]:
    """Where a column is the target or padding, and where it is the target."""
    column_V = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    hit_CV = column_V == target_C.unsqueeze(1)
    return hit_CV | (column_V >= words), hit_CV


def _is_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


class _Fused(torch.autograd.Function):
    """Gradients are computed in the forward pass, while a chunk's softmax is at hand, and scaled in the backward."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        value_N: Tensor | None,
        target_N: Tensor,
        score_N: Tensor,
        mask_N: Tensor,
        objective: Objective,
        chunk: int,
        dtype: torch.dtype,
        scale: Tensor | float,
        sums: dict[str, Tensor],
        compiled: bool,
        shape: LogitShape,
    ) -> Tensor:
        needs = ctx.needs_input_grad
        wide = torch.promote_types(dtype, torch.float32)
        vocab_size, gpu = len(weight_VD), _is_gpu(weight_VD)
        padding = -vocab_size % MULTIPLE if gpu else 0
        weight = weight_VD.detach().to(dtype)
        bias = None if bias_V is None else bias_V.detach().to(dtype)
        if padding:
            weight = torch.nn.functional.pad(weight, (0, 0, 0, padding))
            bias = None if bias is None else torch.nn.functional.pad(bias, (0, padding))
        grad_hidden = torch.empty_like(hidden_ND) if needs[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs[1] else None
        grad_bias = (
            torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if bias_V is not None and needs[2] else None
        )
        grad_value = torch.zeros_like(value_N) if value_N is not None and needs[3] else None
        loss = torch.zeros((), dtype=wide, device=hidden_ND.device)
        threshold = getattr(objective, "threshold", 0.0)
        bad_above = 0.0 if isinstance(threshold, str) else threshold
        blocks = [slice(None)] if gpu else [slice(w, w + WORDS) for w in range(0, vocab_size, WORDS)]
        for start in range(0, len(target_N), chunk):
            part = slice(start, start + chunk)
            hidden, target_C = hidden_ND[part].detach().to(dtype), target_N[part]
            logits = torch.nn.functional.linear(hidden, weight, bias)
            slope: Tensor | float = 1.0  # of the whole chunk, or [C, V]
            if not shape.plain:
                logits = shape(logits.to(wide))
                slope = shape.slope(logits)
            if gpu:
                statistics = _maybe_compiled(_statistics, compiled)
                logp, log1mp, top_C1, sum_C = statistics(logits, target_C, vocab_size)
            else:
                split = _maybe_compiled(_split, compiled)
                logp, log1mp, logits, sum_C = split(logits, target_C)  # exponentials from here on
            with torch.enable_grad():
                logp, log1mp = logp.requires_grad_(), log1mp.requires_grad_()
                value = None if value_N is None else value_N[part].detach().to(wide).requires_grad_()
                out = objective.loss(LossInputs(logp, log1mp, score_N[part], mask_N[part], value))
            loss += out.loss_sum.detach()
            for name, metric in out.metrics.items():
                sums[name] = sums.get(name, 0) + metric.detach()
            if not out.loss_sum.requires_grad or not any(needs):
                if grad_hidden is not None:
                    grad_hidden[part] = 0
                continue
            wanted = [logp, log1mp] if value is None else [logp, log1mp, value]
            grads = torch.autograd.grad(out.loss_sum, wanted, allow_unused=True)
            a, b = (torch.zeros_like(logp) if g is None else g for g in grads[:2])
            d = a * log1mp.detach().exp() - b * logp.detach().exp()
            push = d.abs()
            sums["push"] = sums.get("push", 0) + push.sum()
            sums["push_bad"] = sums.get("push_bad", 0) + torch.where(score_N[part] > bad_above, push, 0.0).sum()
            factor_C, slope_CV = -d / sum_C * scale, None
            if isinstance(slope, Tensor):
                slope_CV = slope
            elif slope != 1:
                factor_C = factor_C * slope
            if gpu:
                grad_of = _maybe_compiled(_padded_grad, compiled)
                logits = grad_of(logits, target_C, vocab_size, top_C1, sum_C, factor_C, slope_CV, dtype)
            part_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
            for some in blocks:
                here = None if slope_CV is None else slope_CV[:, some]
                grad_logits = logits if gpu else _logits_grad(logits[:, some], factor_C, here, dtype)
                if grad_hidden is not None:
                    part_hidden += grad_logits @ weight[some]
                if grad_weight is not None:
                    grad_weight[some] += grad_logits.T @ hidden
                if grad_bias is not None:
                    grad_bias[some] += grad_logits.sum(0, dtype=wide)
            del logits, grad_logits
            if grad_hidden is not None:
                grad_hidden[part] = part_hidden
            if grad_value is not None and grads[2] is not None:
                grad_value[part] = (grads[2] * scale).to(grad_value.dtype)
        if padding:
            grad_weight, grad_bias = (None if g is None else g[:vocab_size] for g in (grad_weight, grad_bias))
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, grad_value)
        ctx.weight_dtype = weight_VD.dtype
        return loss * scale

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:  # type: ignore[override]
        found = list(ctx.saved_tensors)
        if _is_gpu(grad_loss) or grad_loss != 1:  # (asking a GPU would wait for it)
            found = [None if g is None else g * grad_loss.to(g.dtype) for g in found]
        hidden, weight, bias, value = found
        weight, bias = (None if g is None else g.to(ctx.weight_dtype) for g in (weight, bias))
        return (hidden, weight, bias, value, *[None] * 10)


def default_chunk(vocab_size: int, gpu_memory: int | None = None, compiled: bool = False) -> int:
    """Targets at a time, at most: on a CPU, or on a GPU with so many bytes of memory."""
    if gpu_memory is None:
        return min(max(CHUNK_NUMBERS["cpu"] // vocab_size, 1), CHUNK_TARGETS)
    numbers = min(CHUNK_NUMBERS["cuda"], gpu_memory // CHUNK_SHARE) // (1 if compiled else UNCOMPILED)
    return max(numbers // vocab_size // TILE, 1) * TILE


def pick_chunk(targets: int, vocab_size: int, gpu_memory: int | None = None, compiled: bool = False) -> int:
    """Chunks of equal size, since a small rest would cost as much as a whole one."""
    parts = max(-(-targets // default_chunk(vocab_size, gpu_memory, compiled)), 1)
    chunk = -(-targets // parts) or 1
    return chunk if gpu_memory is None else -(-chunk // TILE) * TILE


def _memory_of(tensor: Tensor) -> int | None:
    return torch.cuda.get_device_properties(tensor.device).total_memory if tensor.device.type == "cuda" else None


def fused_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    score_N: Tensor,
    mask_N: Tensor,
    value_N: Tensor | None,
    objective: Objective,
    chunk: int | None = None,
    dtype: torch.dtype | None = None,
    compiled: bool = False,
    shape: LogitShape = PLAIN,
    scale: Tensor | float = 1.0,
) -> LossOutputs:
    """Value (a sum over targets) and metrics of `objective`, differentiable once with respect to hidden states,
    embeddings, bias and value (a graph that is kept may hand out the same tensors again: change none in place). Beside the
    objective's own metrics, where gradients are wanted: `push`, the sum of |dL/dlogit_target|, and `push_bad`, the part
    of it from segments that score above the objective's threshold (0 where it has none).

    `chunk`: targets at a time (default: `pick_chunk`). `dtype`: of the matrix products (default: that of the hidden
    states); everything else is float32 (float64 for float64). `compiled`: compile the elementwise parts. `shape`: what the
    model does to its logits after the output layer. `scale`: what value and gradients (not metrics) are multiplied by;
    cheaper here than behind, where gradients of the size of the embeddings would be.
    """
    vocab_size = weight_VD.shape[0]
    if vocab_size < 2:
        raise ValueError("a vocabulary of at least 2 words is needed for log(1 - p)")
    if chunk is None:
        chunk = pick_chunk(len(target_N), vocab_size, _memory_of(hidden_ND), compiled)
    sums: dict[str, Tensor] = {}
    with torch.autocast(hidden_ND.device.type, enabled=False):
        loss = _Fused.apply(
            hidden_ND, weight_VD, bias_V, value_N, target_N, score_N, mask_N, objective, chunk, dtype or hidden_ND.dtype, scale, sums, compiled, shape
        )  # fmt: skip
    return LossOutputs(loss, sums)


def check_objective(objective: Objective) -> None:
    """Raise ConfigError unless `objective` is a sum over targets that copes with unjudged ones, on a small example.

    Done before training with an objective that is not ours: one that looks across targets (a mean, a sort) would
    silently be another objective for every chunk size.
    """
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 4, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(11, 4, generator=g, dtype=torch.float64)
    target = torch.randint(0, 11, (23,), generator=g)
    score = torch.tensor([0.0, 0.25, 0.5, 1.0, float("nan")])[torch.randint(0, 5, (23,), generator=g)]
    mask = torch.rand(23, generator=g) < 0.8
    value = None if objective.value is None else -torch.rand(23, generator=g, dtype=torch.float64)
    whole = unfused_loss(hidden, weight, None, target, score, mask, value, objective).loss_sum
    parts = fused_loss(hidden, weight, None, target, score, mask, value, objective, chunk=5).loss_sum
    name = type(objective).__name__
    if not torch.isfinite(whole):
        raise ConfigError(
            f"objective {name}: the loss is {whole.item()} where some scores are NaN; leave such targets out"
        )
    slow, fast = (torch.autograd.grad(out, hidden)[0] for out in (whole, parts))
    if not (torch.allclose(whole, parts, rtol=1e-8) and torch.allclose(slow, fast, rtol=1e-6, atol=1e-9)):
        raise ConfigError(
            f"objective {name}: not a sum over targets (cutting the targets into chunks changes it); return sums, not means"
        )


_compiled: dict[Callable[..., Any], Callable[..., Any]] = {}


def _maybe_compiled(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    if not compiled:
        return function
    if function not in _compiled:
        _compiled[function] = torch.compile(function, dynamic=False)
    return _compiled[function]
