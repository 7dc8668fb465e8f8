"""The fused loss: from hidden states and output embeddings to an objective's value and gradients.

The targets are processed in chunks, so [targets, vocabulary] never exists: memory is O(chunk x vocabulary). Inside
a chunk, autograd differentiates the objective with respect to log p, log(1-p) and value. The step from there to
hidden states and embeddings is done by hand. With a = dL/dlog p, b = dL/dlog(1-p) and q the softmax over the
*other* tokens:

    dL/dlogit_target = d,   dL/dlogit_j = -d q_j,   d = a (1-p) - b p

This equals c (onehot - softmax) with c = a - b p/(1-p) (Welleck et al. 2020, appendix), written so that nothing
overflows for p -> 1. In the same way log p and log(1-p) both come from the log-sum-exp over the other tokens, never
from one another. A float32 log p rounds to 0 for p -> 1; log(1-p) and its gradient would be lost with it.

Models that scale or cap their logits (`LogitShape`) multiply dL/dlogit by the slope of the shape.

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
"""Default size of a chunk: C x V numbers. On a CPU this is 64 MiB in float32; a factor of 4 either way is no
better. On a GPU it is 2 GiB in bfloat16: a chunk takes dozens of operations and one pass over the embeddings'
gradient, however small it is, and indices stay below 2**31."""
GPU_BYTES_PER_NUMBER = 128
"""Bytes of a GPU's memory for each number of a chunk, at least."""
UNCOMPILED = 4
"""How many times smaller an uncompiled chunk is on a GPU: a number then takes up to 24 bytes instead of 6."""
CHUNK_TARGETS = 512
"""Targets in a chunk on a CPU, at most, however small the vocabulary: more costs memory and gains nothing."""
TILE = 128
"""On a GPU the targets of a chunk are a multiple of the tiles of its matrix products."""
MULTIPLE = 64
"""On a GPU the vocabulary is padded to a multiple: matrix products with rows of odd length are slow (GPT-2: 50,257)."""
VOCAB_ROWS_AT_ONCE = 2048
"""Entries of the vocabulary for which a CPU computes gradients at a time: the sums then stay in the cache."""


@dataclass(frozen=True)
class LogitShape:
    """What a model does to its logits after the output layer: z -> cap tanh(scale z / cap), or scale z without a cap.
    Gemma 2 caps (arXiv 2408.00118); Cohere and Granite scale."""

    scale: float = 1.0
    cap: float | None = None

    @property
    def plain(self) -> bool:
        return self.scale == 1 and self.cap is None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def slope(self, shaped: Tensor) -> Tensor | float:
        """Derivative of the shape, from the shaped logits."""
        return self.scale if self.cap is None else self.scale * (1 - (shaped / self.cap) ** 2)


PLAIN = LogitShape()


# The public functions


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
    phase_N: Tensor | None = None,
    progress: float = 0.0,
    reference_N: Tensor | None = None,
) -> LossOutputs:
    """Loss (a sum over targets) and metrics of `objective`.

    The loss can be differentiated once with respect to hidden states, embeddings, bias and value. A graph that is
    kept may return the same tensors again, so do not change gradients in place. With gradients, two
    metrics are added. `logit_grad_abs` is the sum of |dL/dlogit_target|. `logit_grad_abs_bad` is the part of it from
    segments with a score above the objective's `bad_above` (0 if it has none).

    `chunk`: targets at a time (default: `pick_chunk`). `dtype`: type of the matrix products (default: the hidden
    states'); everything else is float32, or float64 for float64. `compiled`: compile the elementwise parts.
    `shape`: what the model does to its logits after the output layer. `scale`: factor of loss and gradients, not of
    metrics; applying it later would cost a pass over gradients of the size of the embeddings. `phase_N`, `progress`,
    `reference_N`: as in `LossInputs`.

    Raises ValueError for a vocabulary of fewer than 2 entries: log(1 - p) needs another token.
    """
    vocab_size = weight_VD.shape[0]
    if vocab_size < 2:
        raise ValueError("log(1 - p) needs a vocabulary of at least 2 entries")
    if chunk is None:
        chunk = pick_chunk(len(target_N), vocab_size, _memory_of(hidden_ND), compiled)
    call = _Call(
        target_N=target_N,
        score_N=score_N,
        mask_N=mask_N,
        objective=objective,
        chunk=chunk,
        dtype=dtype or hidden_ND.dtype,
        compiled=compiled,
        shape=shape,
        scale=scale,
        phase_N=phase_N,
        progress=progress,
        reference_N=reference_N,
        metrics={},
    )
    with torch.autocast(hidden_ND.device.type, enabled=False):
        loss = _Fused.apply(hidden_ND, weight_VD, bias_V, value_N, call)  # type: ignore[no-untyped-call]
    return LossOutputs(loss, call.metrics)


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
    phase_N: Tensor | None = None,
    progress: float = 0.0,
    reference_N: Tensor | None = None,
) -> LossOutputs:
    """`fused_loss` over full logits by autograd: slow and obvious, for tests and for checking your own code."""
    logits_NV = torch.nn.functional.linear(hidden_ND, weight_VD, bias_V)
    logits_NV = shape(logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float())
    logp_N, log1mp_N = log_probabilities(logits_NV, target_N)
    return objective.loss(LossInputs(logp_N, log1mp_N, score_N, mask_N, value_N, progress, phase_N, reference_N))


def log_probabilities(logits_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor]:
    """log p and log(1 - p) of the targets in plain operations, differentiable by autograd, for any float type."""
    target_C1 = target_C.unsqueeze(-1)
    at_target = logits_CV.gather(-1, target_C1).squeeze(-1)
    return _two_logs(at_target, logits_CV.scatter(-1, target_C1, float("-inf")).logsumexp(-1))


def check_objective(objective: Objective) -> None:
    """Raise ConfigError unless `objective` is, on a small example, a sum over targets that leaves unjudged targets out.

    Training with a user's objective checks this first: a loss that mixes targets (a mean, a sort) would silently be
    another loss for every chunk size.
    """
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 4, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(11, 4, generator=g, dtype=torch.float64)
    target = torch.randint(0, 11, (23,), generator=g)
    score = torch.tensor([0.0, 0.25, 0.5, 1.0, float("nan")])[torch.randint(0, 5, (23,), generator=g)]
    if objective.preferences is not None:
        score = torch.stack([score.roll(n) for n in range(len(objective.preferences))], dim=-1)
    mask = torch.rand(23, generator=g) < 0.8
    value = None if objective.value is None else -torch.rand(23, generator=g, dtype=torch.float64)
    whole = unfused_loss(
        hidden, weight, bias_V=None, target_N=target, score_N=score, mask_N=mask, value_N=value, objective=objective
    ).loss_sum
    parts = fused_loss(
        hidden,
        weight,
        bias_V=None,
        target_N=target,
        score_N=score,
        mask_N=mask,
        value_N=value,
        objective=objective,
        chunk=5,
    ).loss_sum
    if not torch.isfinite(whole):
        raise ConfigError(
            f"objective {objective.name}: the loss is {whole.item()} where some scores are NaN; leave such targets out"
        )
    slow, fast = (torch.autograd.grad(out, hidden)[0] for out in (whole, parts))
    if not (torch.allclose(whole, parts, rtol=1e-8) and torch.allclose(slow, fast, rtol=1e-6, atol=1e-9)):
        raise ConfigError(
            f"objective {objective.name}: the loss changes when the targets are split into chunks; return sums over "
            "targets, not means"
        )


# Size of a chunk


def default_chunk(vocab_size: int, gpu_memory: int | None = None, compiled: bool = False) -> int:
    """The largest number of targets in a chunk, on a CPU or on a GPU with `gpu_memory` bytes."""
    if gpu_memory is None:
        return min(max(CHUNK_NUMBERS["cpu"] // vocab_size, 1), CHUNK_TARGETS)
    numbers = min(CHUNK_NUMBERS["cuda"], gpu_memory // GPU_BYTES_PER_NUMBER) // (1 if compiled else UNCOMPILED)
    return max(numbers // vocab_size // TILE, 1) * TILE


def pick_chunk(targets: int, vocab_size: int, gpu_memory: int | None = None, compiled: bool = False) -> int:
    """Chunks of equal size: a small last chunk would cost as much as a full one."""
    parts = max(-(-targets // default_chunk(vocab_size, gpu_memory, compiled)), 1)
    chunk = -(-targets // parts) or 1
    return chunk if gpu_memory is None else -(-chunk // TILE) * TILE


def _memory_of(tensor: Tensor) -> int | None:
    return torch.cuda.get_device_properties(tensor.device).total_memory if tensor.device.type == "cuda" else None


def _is_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


# The autograd function: one loop over chunks


@dataclass(frozen=True, kw_only=True)
class _Call:
    """The arguments of one call that have no gradient."""

    target_N: Tensor
    score_N: Tensor
    mask_N: Tensor
    objective: Objective
    chunk: int
    dtype: torch.dtype
    compiled: bool
    shape: LogitShape
    scale: Tensor | float
    phase_N: Tensor | None
    progress: float
    reference_N: Tensor | None
    metrics: dict[str, Tensor]
    """Sums over targets; filled by the call."""


class _Fused(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's softmax exists. The backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, value_N: Tensor | None, call: _Call
    ) -> Tensor:
        needs = ctx.needs_input_grad
        head = _Head.of(weight_VD, bias_V, call, needs[1], needs[2])
        objective = _ObjectiveOnChunks(call, value_N, wanted=any(needs), value_wanted=needs[3])
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs[0] else None
        chunk_gradient = _gpu_chunk if _is_gpu(weight_VD) else _cpu_chunk
        for start in range(0, len(call.target_N), call.chunk):
            part = slice(start, start + call.chunk)
            hidden_CD = hidden_ND[part].detach().to(call.dtype)
            grad_CD = chunk_gradient(head, hidden_CD, part, objective)
            if grad_hidden_ND is not None:
                grad_hidden_ND[part] = 0 if grad_CD is None else grad_CD
        ctx.save_for_backward(grad_hidden_ND, *head.gradients(), objective.grad_value_N)
        ctx.weight_dtype = weight_VD.dtype
        return objective.loss * call.scale

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        found = list(ctx.saved_tensors)
        if _is_gpu(grad_loss) or grad_loss != 1:  # comparing would wait for the GPU
            found = [None if g is None else g * grad_loss.to(g.dtype) for g in found]
        hidden, weight, bias, value = found
        weight, bias = (None if g is None else g.to(ctx.weight_dtype) for g in (weight, bias))
        return hidden, weight, bias, value, None


class _ObjectiveOnChunks:
    """The objective, chunk by chunk: adds up the loss and the metrics, and differentiates."""

    def __init__(self, call: _Call, value_N: Tensor | None, wanted: bool, value_wanted: bool) -> None:
        self.call = call
        self.value_N = value_N
        self.wanted = wanted
        self.wide = torch.promote_types(call.dtype, torch.float32)
        self.loss = torch.zeros((), dtype=self.wide, device=call.target_N.device)
        self.grad_value_N = torch.zeros_like(value_N) if value_N is not None and value_wanted else None
        bad_above = call.objective.bad_above
        self.bad_above = 0.0 if bad_above is None else bad_above

    def logit_gradient(self, part: slice, logp_C: Tensor, log1mp_C: Tensor) -> Tensor | None:
        """dL/dlogit of the targets of a chunk; None if no gradient is wanted or the loss has none."""
        call = self.call
        score_C = call.score_N[part]
        with torch.enable_grad():
            logp_C = logp_C.requires_grad_()
            log1mp_C = log1mp_C.requires_grad_()
            value_C = None if self.value_N is None else self.value_N[part].detach().to(self.wide).requires_grad_()
            phase_C = None if call.phase_N is None else call.phase_N[part]
            reference_C = None if call.reference_N is None else call.reference_N[part]
            out = call.objective.loss(
                LossInputs(logp_C, log1mp_C, score_C, call.mask_N[part], value_C, call.progress, phase_C, reference_C)
            )
        self.loss += out.loss_sum.detach()
        for name, metric in out.metrics.items():
            self._add(name, metric.detach())
        if not out.loss_sum.requires_grad or not self.wanted:
            return None
        inputs = [logp_C, log1mp_C] if value_C is None else [logp_C, log1mp_C, value_C]
        grads = torch.autograd.grad(out.loss_sum, inputs, allow_unused=True)
        a_C, b_C = (torch.zeros_like(logp_C) if g is None else g for g in grads[:2])
        d_C = a_C * log1mp_C.detach().exp() - b_C * logp_C.detach().exp()
        self._add("logit_grad_abs", d_C.abs().sum())
        bad_C = score_C > self.bad_above
        bad_C = bad_C if bad_C.ndim == 1 else bad_C[:, 0]
        self._add("logit_grad_abs_bad", torch.where(bad_C, d_C.abs(), 0.0).sum())
        if self.grad_value_N is not None and grads[2] is not None:
            self.grad_value_N[part] = (grads[2] * call.scale).to(self.grad_value_N.dtype)
        return d_C

    def _add(self, name: str, value: Tensor) -> None:
        self.call.metrics[name] = self.call.metrics.get(name, 0) + value


@dataclass(frozen=True)
class _Head:
    """The output layer in the type of the matrix products, and the sums of its gradients (None: not wanted). On a
    GPU the vocabulary is padded."""

    weight_VD: Tensor
    bias_V: Tensor | None
    grad_weight_VD: Tensor | None
    grad_bias_V: Tensor | None
    vocab_size: int
    """Entries without padding."""
    call: _Call

    @classmethod
    def of(cls, weight_VD: Tensor, bias_V: Tensor | None, call: _Call, weight_wanted: bool, bias_wanted: bool) -> _Head:
        vocab_size = len(weight_VD)
        padding = -vocab_size % MULTIPLE if _is_gpu(weight_VD) else 0
        weight = weight_VD.detach().to(call.dtype)
        bias = None if bias_V is None else bias_V.detach().to(call.dtype)
        if padding:
            weight = torch.nn.functional.pad(weight, (0, 0, 0, padding))
            bias = None if bias is None else torch.nn.functional.pad(bias, (0, padding))
        wide = torch.promote_types(call.dtype, torch.float32)
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if weight_wanted else None
        grad_bias = None
        if bias is not None and bias_wanted:
            grad_bias = torch.zeros(bias.shape, dtype=wide, device=weight.device)
        return cls(weight, bias, grad_weight, grad_bias, vocab_size, call)

    def logits(self, hidden_CD: Tensor) -> tuple[Tensor, Tensor | float]:
        """(shaped logits [C, V], slope of the shape: one number, or [C, V])."""
        logits_CV = torch.nn.functional.linear(hidden_CD, self.weight_VD, self.bias_V)
        if self.call.shape.plain:
            return logits_CV, 1.0
        logits_CV = self.call.shape(logits_CV.to(torch.promote_types(self.call.dtype, torch.float32)))
        return logits_CV, self.call.shape.slope(logits_CV)

    def factors(self, d_C: Tensor, sum_C: Tensor, slope: Tensor | float) -> tuple[Tensor, Tensor | None]:
        """What the exponentials are multiplied by for dL/dlogits: a factor per target, and the slope where it
        differs."""
        factor_C = -d_C / sum_C * self.call.scale
        if isinstance(slope, Tensor):
            return factor_C, slope
        return (factor_C if slope == 1 else factor_C * slope), None

    def add(self, grad_CV: Tensor, hidden_CD: Tensor, block: slice = slice(None)) -> Tensor:
        """Add dL/dlogits of a block of the vocabulary to the gradients. Returns the block's part of dL/dhidden [C,
        D]."""
        if self.grad_weight_VD is not None:
            self.grad_weight_VD[block] += grad_CV.T @ hidden_CD
        if self.grad_bias_V is not None:
            self.grad_bias_V[block] += grad_CV.sum(0, dtype=self.grad_bias_V.dtype)
        return grad_CV @ self.weight_VD[block]

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of weight and bias without padding."""
        weight = self.grad_weight_VD
        bias = self.grad_bias_V
        if len(self.weight_VD) > self.vocab_size:
            weight = None if weight is None else weight[: self.vocab_size]
            bias = None if bias is None else bias[: self.vocab_size]
        return weight, bias


# A chunk on a CPU: the exponentials are kept and multiplied in place, block by block of the vocabulary


def _cpu_chunk(head: _Head, hidden_CD: Tensor, part: slice, objective: _ObjectiveOnChunks) -> Tensor | None:
    """Adds a chunk's gradients to the head and returns dL/dhidden [C, D]; None if no gradient is wanted."""
    split = _maybe_compiled(_split, head.call.compiled)
    logits_CV, slope = head.logits(hidden_CD)
    logp_C, log1mp_C, e_CV, sum_C = split(logits_CV, head.call.target_N[part])
    del logits_CV  # as large as the exponentials
    d_C = objective.logit_gradient(part, logp_C, log1mp_C)
    if d_C is None:
        return None
    factor_C, slope_CV = head.factors(d_C, sum_C, slope)
    grad_CD = torch.zeros(hidden_CD.shape, dtype=objective.wide, device=hidden_CD.device)
    for start in range(0, head.vocab_size, VOCAB_ROWS_AT_ONCE):
        block = slice(start, start + VOCAB_ROWS_AT_ONCE)
        of_block = None if slope_CV is None else slope_CV[:, block]
        grad_CD += head.add(_logits_grad(e_CV[:, block], factor_C, of_block, head.call.dtype), hidden_CD, block)
    return grad_CD


def _split(logits_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log p, log(1-p), e, sum). e = exp(logit - max) over the other tokens and `sum` their sum; e at the target is
    -sum, so that e times -d / sum is dL/dlogits. The logits are not changed."""
    target_C1 = target_C.unsqueeze(1)
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    at_target_C = logits_CV.gather(1, target_C1).squeeze(1).to(wide)
    e_CV = logits_CV.to(wide, copy=True).scatter_(1, target_C1, float("-inf"))
    top_C1 = e_CV.amax(1, keepdim=True)
    e_CV.sub_(top_C1).exp_()
    sum_C = e_CV.sum(1)
    e_CV.scatter_(1, target_C1, -sum_C.unsqueeze(1))
    return *_two_logs(at_target_C, top_C1.squeeze(1) + sum_C.log()), e_CV, sum_C


def _logits_grad(e_CV: Tensor, factor_C: Tensor, slope_CV: Tensor | None, dtype: torch.dtype) -> Tensor:
    """dL/dlogits of a block of the vocabulary, in the type of the matrix products. Overwrites `e_CV`."""
    e_CV.mul_(factor_C.unsqueeze(1))
    if slope_CV is not None:
        e_CV.mul_(slope_CV)
    return e_CV.to(dtype)


# A chunk on a GPU: nothing of the size of the logits is kept in float32; the exponentials are computed twice


def _gpu_chunk(head: _Head, hidden_CD: Tensor, part: slice, objective: _ObjectiveOnChunks) -> Tensor | None:
    """As `_cpu_chunk`."""
    compiled = head.call.compiled
    target_C = head.call.target_N[part]
    logits_CV, slope = head.logits(hidden_CD)
    statistics = _maybe_compiled(_statistics, compiled)
    logp_C, log1mp_C, top_C1, sum_C = statistics(logits_CV, target_C, head.vocab_size)
    d_C = objective.logit_gradient(part, logp_C, log1mp_C)
    if d_C is None:
        return None
    factor_C, slope_CV = head.factors(d_C, sum_C, slope)
    gradient = _maybe_compiled(_padded_grad, compiled)
    grad_CV = gradient(logits_CV, target_C, head.vocab_size, top_C1, sum_C, factor_C, slope_CV, head.call.dtype)
    del logits_CV
    return head.add(grad_CV, hidden_CD).to(objective.wide)


def _statistics(logits_CV: Tensor, target_C: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log p, log(1-p), max, sum of exp(logit - max)), the last two over the other tokens. Compiled into one pass,
    this is `_split` without a float32 tensor of the size of the logits. Columns from `vocab_size` on are padding."""
    out_CV, _ = _outside(logits_CV, target_C, vocab_size)
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    at_target_C = logits_CV.gather(1, target_C.unsqueeze(1)).squeeze(1).to(wide)
    others_CV = logits_CV.to(wide).masked_fill(out_CV, float("-inf"))
    top_C1 = others_CV.amax(1, keepdim=True)
    sum_C = (others_CV - top_C1).exp().sum(1, keepdim=True).squeeze(1)  # the form in which inductor sees a softmax
    return *_two_logs(at_target_C, top_C1.squeeze(1) + sum_C.log()), top_C1, sum_C


def _padded_grad(
    logits_CV: Tensor,
    target_C: Tensor,
    vocab_size: int,
    top_C1: Tensor,
    sum_C: Tensor,
    factor_C: Tensor,
    slope_CV: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """dL/dlogits after `_statistics`, 0 in the padding. Computes the exponentials again."""
    out_CV, hit_CV = _outside(logits_CV, target_C, vocab_size)
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    e_CV = (logits_CV.to(wide) - top_C1).exp().masked_fill(out_CV, 0.0)
    grad_CV = torch.where(hit_CV, -sum_C.unsqueeze(1), e_CV) * factor_C.unsqueeze(1)
    return (grad_CV if slope_CV is None else grad_CV * slope_CV).to(dtype)


def _outside(logits_CV: Tensor, target_C: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """(whether a column is the target or padding, whether it is the target), bool [C, V]."""
    column_V = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    hit_CV = column_V == target_C.unsqueeze(1)
    return hit_CV | (column_V >= vocab_size), hit_CV


# Shared by both


def _two_logs(at_target: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """log p and log(1 - p) from the target's logit and the log-sum-exp over the other tokens."""
    zero = torch.zeros_like(others)
    return -torch.logaddexp(zero, others - at_target), -torch.logaddexp(zero, at_target - others)


_compiled: dict[Callable[..., Any], Callable[..., Any]] = {}


def _maybe_compiled(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    if not compiled:
        return function
    if function not in _compiled:
        _compiled[function] = torch.compile(function, dynamic=False)
    return _compiled[function]
