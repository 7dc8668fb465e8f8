"""The fused loss against autograd over full logits: values and gradients over a grid, and a user's own objective."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import OBJECTIVE_GRID, loss_inputs
from phf.core.config import ConfigError
from phf.objectives import AWR, MLE, LossInputs, LossOutputs, Masking, Objective, Unlikelihood
from phf.training import fused
from phf.training.fused import LogitShape, check_objective, fused_loss, unfused_loss

NAN = float("nan")


@dataclasses.dataclass(frozen=True)
class Focal(Objective):
    """A user's own objective."""

    gamma: float = 2.0

    def loss(self, x: LossInputs) -> LossOutputs:
        one_minus_p = 1 - x.logp_BT.exp()
        return LossOutputs(torch.where(x.mask_BT, -(one_minus_p**self.gamma) * x.logp_BT, 0.0).sum(), {})


def compare(objective, args, chunk, rtol, with_bias=True):
    hidden, weight, bias, target, score, mask, value = args
    bias = bias if with_bias else None
    value = value if objective.value is not None else None
    leaves = [t for t in (hidden, weight, bias, value) if t is not None]
    slow = unfused_loss(hidden, weight, bias, target, score, mask, value, objective)
    fast = fused_loss(hidden, weight, bias, target, score, mask, value, objective, chunk)
    torch.testing.assert_close(fast.loss_sum, slow.loss_sum, rtol=rtol, atol=rtol)
    for name, metric in slow.metrics.items():
        # sums of functions of float32 scores, in another order
        torch.testing.assert_close(fast.metrics[name], metric.detach(), rtol=1e-5, atol=1e-6, check_dtype=False)
    grads = [torch.autograd.grad(out.loss_sum * 0.37, leaves, allow_unused=True) for out in (slow, fast)]
    for a, b in zip(*grads, strict=True):
        a = torch.zeros_like(b) if a is None else a
        assert torch.isfinite(b).all()
        torch.testing.assert_close(b, a, rtol=rtol, atol=rtol * max(1.0, float(a.abs().max())))


@pytest.mark.parametrize("objective", [*OBJECTIVE_GRID, Focal()], ids=repr)
@pytest.mark.parametrize(
    "n, v, d, chunk", [(1, 2, 1, 1), (13, 7, 3, 4), (64, 33, 8, 64), (50, 11, 4, 7), (20, 100, 6, 1000)]
)
def test_value_and_gradients_equal_the_plain_reference(objective, n, v, d, chunk):
    compare(objective, loss_inputs(n, v, d, seed=n), chunk, 1e-10)
    compare(objective, loss_inputs(n, v, d, seed=n + 1), chunk, 1e-10, with_bias=False)


@pytest.mark.parametrize("objective", [MLE(), Unlikelihood(0.0)], ids=repr)
@pytest.mark.parametrize("masked", [0.0, 1.0])
def test_all_and_no_targets_masked(objective, masked):
    compare(objective, loss_inputs(10, 5, 3, masked=masked), 4, 1e-10)


@given(st.integers(1, 30), st.integers(2, 20), st.integers(1, 40), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_chunking_changes_nothing(n, v, chunk, seed):
    args = loss_inputs(n, v, 4, seed=seed)
    whole = fused_loss(*args, Unlikelihood(0.25, alpha=0.5), n)
    parts = fused_loss(*args, Unlikelihood(0.25, alpha=0.5), chunk)
    torch.testing.assert_close(whole.loss_sum, parts.loss_sum, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVE_GRID, ids=lambda o: f"{o.name}")
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("scale", [1.0, 12.0, 40.0])
def test_gradients_are_right_for_p_near_zero_and_one_in_low_precision(objective, dtype, rtol, scale):
    """Confident logits, for which log(1 - p) from a rounded log p fails. The reference is float64 on the same
    numbers."""
    low = loss_inputs(64, 17, 8, dtype, scale)
    high = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in low]
    high[4] = low[4]
    value = (low[6].float(), high[6].float().double()) if objective.value else (None, None)
    fast = fused_loss(low[0], low[1], None, low[3], low[4], low[5], value[0], objective, 16)
    slow = unfused_loss(high[0], high[1], None, high[3], high[4], high[5], value[1], objective)
    got = torch.autograd.grad(fast.loss_sum, [low[0], low[1]])
    want = torch.autograd.grad(slow.loss_sum, [high[0], high[1]])
    for a, b in zip(got, want, strict=True):
        assert torch.isfinite(a).all()
        assert (a.double() - b).norm() <= rtol * max(1.0, scale / 10) * b.norm()


@pytest.mark.parametrize("objective", OBJECTIVE_GRID, ids=lambda o: f"{o.name}")
def test_gradcheck(objective):
    hidden, weight, bias, target, score, mask, value = loss_inputs(6, 5, 3)
    value = value.detach() if objective.value else None  # AWR stops its gradient on purpose
    assert torch.autograd.gradcheck(
        lambda h, w, b: fused_loss(h, w, b, target, score, mask, value, objective, 4).loss_sum, (hidden, weight, bias)
    )


@pytest.mark.parametrize("shape", [LogitShape(0.3), LogitShape(1.0, 2.0), LogitShape(2.5, 4.0)], ids=repr)
@pytest.mark.parametrize("objective", [o for o in OBJECTIVE_GRID if getattr(o, "alpha", 1)], ids=lambda o: f"{o.name}")
def test_scaled_and_capped_logits(objective, shape):
    hidden, weight, bias, target, score, mask, value = loss_inputs(23, 7, 3)
    value = value.detach() if objective.value else None
    args = (target, score, mask, value, objective)
    slow = unfused_loss(hidden, weight, bias, *args, shape=shape).loss_sum
    fast = fused_loss(hidden, weight, bias, *args, chunk=5, shape=shape).loss_sum
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    leaves = (hidden, weight, bias)
    for a, b in zip(torch.autograd.grad(fast, leaves), torch.autograd.grad(slow, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    plain = unfused_loss(hidden, weight, bias, *args).loss_sum
    assert abs((plain / slow).item() - 1) > 1e-3


def test_sums_over_many_chunks_are_kept_in_float32():
    """512 chunks in bfloat16: a sum of them in bfloat16 would be off by percents."""
    hidden, weight, bias, target, score, mask, _ = loss_inputs(4096, 9, 4, torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    got = fused_loss(hidden, weight, bias, target, score, mask, None, MLE(), chunk=8).loss_sum
    want = unfused_loss(*exact, target, score, mask, None, MLE()).loss_sum
    assert abs(got.item() / want.item() - 1) < 2e-3
    for a, b in zip(torch.autograd.grad(got, [weight, bias]), torch.autograd.grad(want, exact[1:]), strict=True):
        assert (a.double() - b).norm() < 6e-3 * b.norm()


@pytest.mark.parametrize("objective, above", [(MLE(), 0.0), (Masking(0.25), 0.25), (Unlikelihood(0.5), 0.5)])
def test_the_gradient_on_bad_segments_is_that_on_their_targets(objective, above):
    """sum |dL/dlogit_target| over all targets and over bad ones, by the objective's own threshold."""
    hidden, weight, bias, target, score, mask, _ = loss_inputs(40, 7, 3)
    logits = (hidden @ weight.T + bias).detach().requires_grad_()
    eye = torch.eye(7, dtype=torch.float64)
    loss = unfused_loss(logits, eye, None, target, score, mask, None, objective).loss_sum
    grad_abs = torch.autograd.grad(loss, logits)[0].gather(1, target[:, None]).squeeze(1).abs()
    metrics = fused_loss(hidden, weight, bias, target, score, mask, None, objective, 16).metrics
    torch.testing.assert_close(metrics["logit_grad_abs"], grad_abs.sum())
    torch.testing.assert_close(metrics["logit_grad_abs_bad"], grad_abs[score > above].sum())
    assert isinstance(objective, Masking) or metrics["logit_grad_abs_bad"] > 0


@pytest.mark.parametrize("block", [1, 4, 7, 100])
@pytest.mark.parametrize(
    "shape", [LogitShape(), LogitShape(0.5, 3.0), LogitShape(2.0)], ids=["plain", "capped", "scaled"]
)
def test_blocks_of_the_vocabulary_change_no_gradient(block, shape, monkeypatch):
    hidden, weight, bias, target, score, mask, value = loss_inputs(13, 9, 4)
    args = (target, score, mask, value, AWR(rewards="raw"))
    leaves = [hidden, weight, bias, value]
    whole = torch.autograd.grad(unfused_loss(hidden, weight, bias, *args, shape=shape).loss_sum, leaves)
    monkeypatch.setattr(fused, "VOCAB_ROWS_AT_ONCE", block)
    parts = torch.autograd.grad(fused_loss(hidden, weight, bias, *args, chunk=5, shape=shape).loss_sum, leaves)
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "shape", [LogitShape(), LogitShape(0.5, 3.0), LogitShape(2.0)], ids=["plain", "capped", "scaled"]
)
@pytest.mark.parametrize("objective", OBJECTIVE_GRID, ids=lambda o: o.name)
def test_the_gpu_code_with_a_padded_vocabulary(objective, shape, compiled, monkeypatch):
    """The code for GPUs gives the same on a CPU. Padding has probability 0, whatever the bias is."""
    if compiled and not (shape.cap and objective.name in ("unlikelihood", "awr")):
        pytest.skip("compiled for two objectives")
    hidden, weight, bias, target, score, mask, value = loss_inputs(23, 9, 4)
    value = value if objective.value is not None else None
    args = (target, score, mask, value, objective)
    leaves = [x for x in (hidden, weight, bias, value) if x is not None]
    slow = unfused_loss(hidden, weight, bias, *args, shape=shape)
    monkeypatch.setattr(fused, "_is_gpu", lambda tensor: True)
    torch.compiler.reset()
    monkeypatch.setattr(fused, "_compiled", {})
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    fast = fused_loss(hidden, weight, bias, *args, chunk=5, shape=shape, compiled=compiled)
    torch.testing.assert_close(fast.loss_sum, slow.loss_sum, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad(out.loss_sum * 0.37, leaves, allow_unused=True) for out in (slow, fast)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, torch.zeros_like(b) if a is None else a, rtol=1e-8, atol=1e-9)


SOFTMAX = """
import torch
from torch._inductor.fx_passes import post_grad
from phf.training.fused import _statistics

found = []
post_grad.prepare_softmax_extra_check = lambda match: found.append(match) or False
torch._inductor.config.force_disable_caches = True
torch.compile(_statistics)(torch.randn(4, 64), torch.arange(4), 60)
assert len(found) == 1, found
"""


@pytest.mark.slow
def test_the_compiler_recognizes_the_softmax_of_the_gpu_code():
    """The compiler makes one pass over the logits where it recognizes a softmax, and two elsewhere. Nothing may
    have been compiled before."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", SOFTMAX], check=True)


@given(
    targets=st.integers(1, 10**6),
    vocab_size=st.integers(2, 300_000),
    memory=st.one_of(st.none(), st.integers(2**30, 2**38)),
    compiled=st.booleans(),
)
def test_chunks_are_equal_and_not_too_large(targets, vocab_size, memory, compiled):
    most = fused.default_chunk(vocab_size, memory, compiled)
    chunk = fused.pick_chunk(targets, vocab_size, memory, compiled)
    assert 1 <= chunk <= most
    parts = -(-targets // chunk)
    assert parts <= -(-targets // most)  # no more than needed
    step = 1 if memory is None else fused.TILE
    assert chunk % step == 0
    assert chunk < -(-targets // parts) + parts + step  # of nearly equal size
    numbers = most * vocab_size
    if memory is None:
        assert most <= fused.CHUNK_TARGETS
        assert numbers <= max(fused.CHUNK_NUMBERS["cpu"], vocab_size)
    else:
        assert numbers <= max(fused.CHUNK_NUMBERS["cuda"], fused.TILE * vocab_size)
        # at most a twentieth of the memory
        assert numbers * (6 if compiled else 24) <= max(memory / 20, fused.TILE * vocab_size * 24)


@pytest.mark.parametrize("scale", [0.25, torch.tensor(3.0, dtype=torch.float64)])
def test_a_scale_multiplies_value_and_gradients_but_not_metrics(scale):
    hidden, weight, bias, target, score, mask, value = loss_inputs(13, 9, 4)
    args = (hidden, weight, bias, target, score, mask, value, AWR(rewards="raw"), 5)
    leaves = [hidden, weight, bias, value]
    plain = fused_loss(*args)
    scaled = fused_loss(*args, scale=scale)
    torch.testing.assert_close(scaled.loss_sum, plain.loss_sum * scale)
    assert {k: float(v) for k, v in scaled.metrics.items()} == {k: float(v) for k, v in plain.metrics.items()}
    expected = torch.autograd.grad(plain.loss_sum * scale, leaves)
    for a, b in zip(torch.autograd.grad(scaled.loss_sum, leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_are_added_to_existing_ones():
    """Where nothing multiplies its gradients, the loss returns its own tensors. Adding to them must not change what
    it keeps."""
    hidden, weight, bias, target, score, mask, _ = loss_inputs(13, 9, 4)
    out = fused_loss(hidden, weight, bias, target, score, mask, None, MLE(), 5).loss_sum
    out.backward(retain_graph=True)
    once = [x.grad.clone() for x in (hidden, weight, bias)]
    out.backward(retain_graph=True)
    out.backward()
    for x, g in zip((hidden, weight, bias), once, strict=True):
        torch.testing.assert_close(x.grad, 3 * g)


@pytest.mark.parametrize("targets", [0, 1, 511, 512, 513, 1500])
def test_chunks_have_equal_size_up_to_the_limit(targets, monkeypatch):
    sizes = []
    known = fused._split
    monkeypatch.setattr(fused, "_split", lambda logits, target: sizes.append(len(target)) or known(logits, target))
    hidden, weight, bias, target, score, mask, _ = loss_inputs(targets, 9, 4)
    fused_loss(hidden, weight, bias, target, score, mask, None, MLE()).loss_sum.backward()
    assert sum(sizes) == targets
    assert len(sizes) == -(-targets // fused.CHUNK_TARGETS)
    assert not sizes or max(sizes) - min(sizes) < len(sizes)


def test_autocast_outside_changes_nothing():
    args = loss_inputs(20, 9, 4, torch.float32)
    plain = fused_loss(*args, MLE(), 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fused_loss(*args, MLE(), 8)
    assert plain.loss_sum == inside.loss_sum


def test_backward_twice_gives_the_same_gradient():
    hidden, weight, bias, target, score, mask, _ = loss_inputs(6, 5, 3)
    out = fused_loss(hidden, weight, bias, target, score, mask, None, MLE(), 4).loss_sum
    first = torch.autograd.grad(out, [weight], retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(out, [weight])[0])


def test_memory_does_not_grow_with_targets_times_vocabulary():
    """No tensor larger than chunk x vocabulary (or the inputs themselves) is ever made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    hidden, weight, _, target, score, mask, _ = loss_inputs(512, 1000, 4, torch.float32)
    with Watch():
        fused_loss(hidden, weight, None, target, score, mask, None, Unlikelihood(0.0), chunk=16).loss_sum.backward()
    assert largest <= 16 * 1000


def test_a_vocabulary_of_one_token_is_refused():
    with pytest.raises(ValueError, match="at least 2 entries"):
        fused_loss(
            torch.zeros(1, 2),
            torch.zeros(1, 2),
            None,
            torch.zeros(1, dtype=torch.long),
            torch.zeros(1),
            torch.ones(1, dtype=torch.bool),
            None,
            MLE(),
        )


@dataclasses.dataclass(frozen=True)
class Mean(Objective):
    """Not a sum."""

    def loss(self, x: LossInputs) -> LossOutputs:
        return LossOutputs(-x.logp_BT.mean(), {})


@dataclasses.dataclass(frozen=True)
class Careless(Objective):
    """Counts unjudged targets."""

    def loss(self, x: LossInputs) -> LossOutputs:
        return LossOutputs(-(x.score_BT * x.logp_BT).sum(), {})


@pytest.mark.parametrize("objective", [*OBJECTIVE_GRID, Focal()], ids=repr)
def test_sound_objectives_pass_the_check(objective):
    assert check_objective(objective) is None


@pytest.mark.parametrize(
    "objective, message", [(Mean(), "return sums over targets"), (Careless(), "some scores are NaN")]
)
def test_unsound_objectives_are_refused(objective, message):
    with pytest.raises(ConfigError, match=message):
        check_objective(objective)
