"""What must hold on a GPU too: the loss, flash attention, a run and its resumption, samples. Skipped without a GPU.

`PHF_TEST_DEVICE=cpu` runs these tests on a CPU, to check the tests themselves.
"""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from helpers import OBJECTIVE_GRID, TINY_LLAMA, loss_inputs, metrics_of, tiny_texts
from phf.generation.loaded import load_model
from phf.generation.sample import sample
from phf.generation.scenario import Scenario
from phf.objectives import AWR, MLE, Conditional, Unlikelihood
from phf.tokens.tokenizer import train_bpe
from phf.training.config import TrainConfig
from phf.training.fused import LogitShape, fused_loss, unfused_loss
from phf.training.lm import FromConfig, build_lm
from phf.training.model import PHFModel
from phf.training.train import train

DEVICE = os.environ.get("PHF_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU (torch.cuda finds none)"
)
WIDE = {**TINY_LLAMA, "hidden_size": 128, "intermediate_size": 256}
"""Heads of 64: flash attention does not take every width."""


@pytest.mark.parametrize("objective", OBJECTIVE_GRID, ids=lambda o: o.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_fused_loss_on_the_gpu_is_that_in_float64_on_the_cpu(objective, dtype, compiled):
    if compiled and objective.name not in ("mle", "unlikelihood", "awr"):
        pytest.skip("the compiled part is the same for all objectives")
    torch.compiler.reset()
    args = [x.detach() for x in loss_inputs(70, 33, 8)]
    found = []
    for device, kind in (("cpu", torch.float64), (DEVICE, dtype)):
        low = [x.to(dtype).to(kind) if x.dtype == torch.float64 else x for x in args]  # the same numbers on both sides
        hidden, weight, bias, target, score, mask, value = (x.to(device) for x in low)
        leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
        value = value.requires_grad_() if objective.value is not None else None
        if kind == torch.float64:
            out = unfused_loss(hidden, weight, bias, target, score, mask, value, objective)
        else:
            out = fused_loss(hidden, weight, bias, target, score, mask, value, objective, 32, compiled=compiled)
        grads = torch.autograd.grad(out.loss_sum, [*leaves, *([] if value is None else [value])], allow_unused=True)
        found.append([x.detach().double().cpu() for x in (out.loss_sum, *grads) if x is not None])
    near = 1e-4 if dtype == torch.float32 else 3e-2
    for here, there in zip(*found, strict=True):
        assert torch.isfinite(there).all()
        assert (there - here).norm() <= near * here.norm() + near


@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_of_a_large_vocabulary_in_chunks_of_the_usual_size(compiled):
    """GPT-2's 50,257 tokens (an odd number), no bias, capped logits."""
    torch.compiler.reset()
    hidden, weight, _, target, score, mask, _ = (x.detach().to(DEVICE) for x in loss_inputs(600, 50_257, 16))
    shape = LogitShape(0.5, 30.0)
    found = []
    for dtype, loss_of in ((torch.float64, unfused_loss), (torch.bfloat16, partial(fused_loss, compiled=compiled))):
        leaves = [x.to(torch.bfloat16).to(dtype).requires_grad_() for x in (hidden, weight)]
        out = loss_of(*leaves, None, target, score, mask, None, Unlikelihood(0.25), shape=shape).loss_sum
        found.append([x.detach().double() for x in (out, *torch.autograd.grad(out, leaves))])
    for exact, ours in zip(*found, strict=True):
        assert (ours - exact).norm() <= 2e-2 * exact.norm()


@pytest.mark.parametrize("compiled", [False, True])
def test_training_rows_go_through_flash_attention(compiled):
    """Only the flash kernel is allowed, and it does not take a mask."""
    tokenizer = train_bpe(tiny_texts(), 300)
    g = torch.Generator().manual_seed(0)
    ids, targets = (x.to(DEVICE) for x in torch.randint(0, 300, (2, 4, 64), generator=g))
    scores = torch.zeros(4, 64, device=DEVICE)
    mask = torch.ones(4, 64, dtype=torch.bool, device=DEVICE)
    torch.compiler.reset()
    lm = build_lm(FromConfig(WIDE), tokenizer, seed=0).to(DEVICE)
    model = PHFModel(lm, MLE(), torch.bfloat16, compile=compiled).to(DEVICE)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        loss = model(ids, targets, scores, mask)["loss"]
        loss.backward()
    plain = PHFModel(build_lm(FromConfig(WIDE), tokenizer, seed=0), MLE(), fast_attention=False)
    expected = plain(ids.cpu(), targets.cpu(), scores.cpu(), mask.cpu())["loss"]
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-2, atol=0)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    "objective, compiled",
    [(Conditional(), True), (Unlikelihood(0.0), False), (AWR(), False)],
    ids=lambda o: str(o)[:12],
)
def test_a_run_learns_resumes_and_is_sampled(tokens_dir, tmp_path, objective, compiled):
    settings = TrainConfig(
        30_720, context=32, batch_rows=16, micro_rows=8, lr=1e-2, log_every=5, save_every=7_680, compile=compiled
    )
    model = FromConfig(WIDE)
    train(tokens_dir=tokens_dir, out=tmp_path / "whole", model=model, objective=objective, config=settings)
    train(
        tokens_dir=tokens_dir, out=tmp_path / "again", model=model, objective=objective, config=settings, stop_after=25
    )
    train(tokens_dir=tokens_dir, out=tmp_path / "again", model=model, objective=objective, config=settings)
    whole, again = (metrics_of(tmp_path / run) for run in ("whole", "again"))
    assert [x["step"] for x in whole] == [x["step"] for x in again] == list(range(5, 61, 5))
    assert whole[-1]["loss"] < whole[0]["loss"]
    # not to the byte: a GPU may sum in any order
    assert [x["loss"] for x in again] == pytest.approx([x["loss"] for x in whole], rel=0.05, abs=0.02)
    loaded = load_model(tmp_path / "whole")
    assert loaded.lm.device.type == DEVICE
    texts = sample(loaded, Scenario(num_samples=8, max_tokens=16), progress=False)
    assert len(texts) == 8
