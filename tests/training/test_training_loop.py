"""Training against a plain loop with every part of a step by hand; model families; the progress bar."""

from __future__ import annotations

import fcntl
import inspect
import json
import os
import struct
import subprocess
import sys
import termios

import accelerate
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, Trainer

from helpers import FAMILIES, TINY_LLAMA, TINY_MODEL, losses_of, metrics_of, train_config, train_tiny, weights_of
from phf.objectives import AWR, MLE, RWR, Conditional, LossInputs
from phf.tokens.store import TokenStore
from phf.training.batches import to_tensors
from phf.training.fused import log_probabilities
from phf.training.lm import FromConfig, build_lm
from phf.training.model import PHFModel
from phf.training.order import training_order
from phf.training.train import train
from phf.training.trainer import OVERRIDES, RELIES_ON, PHFTrainer

STEPS = 6
WARMUP = 2
LR = 1e-2
DECAY = 0.5
CLIP = 0.05


def by_hand(tokens, objective, seed):
    """The weights and each step's numbers of a plain loop.

    Full logits, a mean over counted targets, the gradient's norm clipped at CLIP, AdamW with decay of matrices only, a
    linear schedule.
    """
    objective = objective.fit(tokens.statistics)
    model = PHFModel(build_lm(TINY_MODEL, tokens.tokenizer, seed), objective)
    found = []
    order = training_order(tokens, objective, tokens.tokenizer, 32, seed)
    state = {name: [p, torch.zeros_like(p), torch.zeros_like(p)] for name, p in model.named_parameters()}
    for step in range(STEPS):
        batch = to_tensors(order.batch(16 * step, 16 * (step + 1)))
        out = model.lm(input_ids=batch["input_ids"], output_hidden_states=True)
        logp, log1mp = log_probabilities(out.logits, batch["targets"])
        value = None if model.value_head is None else model.value_head(out.hidden_states[-1])
        x = LossInputs(logp, log1mp, batch["scores"], batch["mask"], value)
        counted = objective.counted(batch["scores"], batch["mask"])
        loss = objective.loss(x).loss_sum / counted.sum()
        grads = dict(zip(state, torch.autograd.grad(loss, [p for p, _, _ in state.values()]), strict=True))
        norm = torch.sqrt(sum(g.double().square().sum() for g in grads.values()))
        lr = LR * (step / WARMUP if step < WARMUP else (STEPS - step) / (STEPS - WARMUP))
        with torch.no_grad():
            for name, (p, first, second) in state.items():
                g = grads[name] * min(1.0, CLIP / (float(norm) + 1e-6))
                if not name.endswith("bias") and "norm" not in name:
                    p -= lr * DECAY * p
                first.mul_(0.9).add_(0.1 * g)
                second.mul_(0.95).add_(0.05 * g * g)
                corrected = (second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
                p -= lr * first / (1 - 0.9 ** (step + 1)) / corrected
        numbers = {"loss": loss.item(), "lr": lr, "grad_norm": float(norm)}
        if isinstance(objective, RWR):
            w = torch.exp(objective.reward(batch["scores"][counted]) / objective.beta - objective.log_norm)
            numbers["effective_sample_share"] = float(w.sum() ** 2 / (w.numel() * (w**2).sum()))
        if value is not None and step > 1:  # in the first steps the head is still zero
            pair = value.detach()[counted], objective.reward(batch["scores"][counted])
            numbers["value_correlation"] = float(np.corrcoef(*pair)[0, 1])
        found.append(numbers)
    return model, found


@pytest.mark.parametrize("objective", [MLE(), RWR(), AWR()], ids=lambda o: o.name)
def test_a_run_is_what_a_plain_loop_computes(tokens, tokens_dir, tmp_path, objective):
    settings = train_config(STEPS, warmup=WARMUP / STEPS, lr=LR, weight_decay=DECAY, clip=CLIP, micro_rows=4)
    train(tokens_dir=tokens_dir, out=tmp_path / "r", model=TINY_MODEL, objective=objective, config=settings, seed=2)
    model, expected = by_hand(tokens, objective, seed=2)
    lines = metrics_of(tmp_path / "r")
    assert len(lines) == STEPS
    assert all(numbers["grad_norm"] > CLIP for numbers in expected)  # clipping matters
    for line, numbers in zip(lines, expected, strict=True):
        for name, value in numbers.items():
            assert line[name] == pytest.approx(value, rel=2e-3), name
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "model").state_dict()
    for name, value in model.lm.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"llama"}))
def test_every_family_is_trained_resumed_and_loaded(tokens_dir, tokens, tmp_path, family):
    model = FromConfig(FAMILIES[family])
    whole = train_tiny(tokens_dir, tmp_path / "whole", Conditional(), steps=8, model=model)
    train_tiny(tokens_dir, tmp_path / "parts", Conditional(), steps=8, model=model, stop_after=3)
    train_tiny(tokens_dir, tmp_path / "parts", Conditional(), steps=8, model=model)
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "parts")
    assert whole.counts.steps == 8
    losses = losses_of(tmp_path / "whole")
    assert losses[-1] < losses[0] - 0.3
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    assert lm.config.model_type == model.config["model_type"]
    ids = torch.from_numpy(tokens.tokens[:32].astype(np.int64)).unsqueeze(0)
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(lm(ids).logits[0, :-1], ids[0, 1:]).item()
    assert nll < np.log(len(tokens.tokenizer)) - 0.2  # the saved weights are the trained ones


def test_activation_checkpointing_changes_no_loss(tokens_dir, tmp_path):
    for again in (False, True):
        train_tiny(tokens_dir, tmp_path / str(again), steps=5, gradient_checkpointing=again)
    plain, checkpointed = (losses_of(tmp_path / str(again)) for again in (False, True))
    assert checkpointed == pytest.approx(plain, rel=1e-5)


def test_skipped_tokens_are_the_first_of_the_order(tokens_dir, tmp_path):
    still = {"lr": 1e-30, "weight_decay": 0}
    train_tiny(tokens_dir, tmp_path / "all", steps=6, **still)
    order = training_order(TokenStore.open(tokens_dir), MLE(), None, 32, 0)
    train_tiny(tokens_dir, tmp_path / "late", steps=2, skip_tokens=order.source_at(4 * 16), **still)
    every, late = (losses_of(tmp_path / n) for n in ("all", "late"))
    assert late == pytest.approx(every[4:], rel=1e-6)
    assert late != pytest.approx(every[:2], rel=1e-6)


def test_a_bar_with_rate_and_time_left_on_a_terminal_and_nothing_elsewhere(tokens_dir, tmp_path, capfd):
    (tmp_path / "m.yaml").write_text(json.dumps({"model": {"name": "from_config", "config": TINY_LLAMA}}))

    def command(out):
        settings = ["train.tokens=20480", "train.context=32", "train.batch_rows=16", "train.precision=fp32"]
        return [
            sys.executable,
            "-m",
            "phf",
            "train",
            str(tokens_dir),
            str(tmp_path / out),
            str(tmp_path / "m.yaml"),
            *settings,
        ]

    train_tiny(tokens_dir, tmp_path / "elsewhere")
    assert capfd.readouterr().err == "model: llama, 10,000 parameters\n"
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    shown = subprocess.Popen(command("shown"), stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    output = b""
    try:
        while part := os.read(ours, 4096):
            output += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert shown.wait() == 0
    assert b"training: 100%" in output
    assert b"tok/s" in output
    assert b"loss=" in output


def test_the_table_of_overrides_fits_this_transformers():
    """Each method that `PHFTrainer` overrides is in the table, and takes the parameters written there."""
    overridden = {name for name in vars(PHFTrainer) if callable(getattr(Trainer, name, None))}
    assert set(OVERRIDES) == overridden - {"__init__"}
    for name, override in OVERRIDES.items():
        assert list(inspect.signature(getattr(Trainer, name)).parameters) == override.parameters.split(), name
        assert override.why


@pytest.mark.parametrize("name", RELIES_ON)
def test_what_training_relies_on_is_still_in_transformers(name):
    modules = (transformers.trainer, transformers.training_args, transformers.trainer_callback, accelerate.accelerator)
    assert any(name in inspect.getsource(module) for module in modules)
