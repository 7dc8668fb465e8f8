"""Selective gradient masking: bad text trains one part of the model alone, which is removed."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from helpers import TINY_LLAMA, losses_of, metrics_of, train_config, train_tiny, weights_of
from phf.core.config import ConfigError
from phf.core.runs import complete_checkpoints
from phf.engines.export import export_tokens
from phf.generation.fast_copy import fast_copy
from phf.objectives import MLE, SGTM
from phf.objectives.base import Removable
from phf.training.lm import FromConfig, new_config
from phf.training.model import PHFModel
from phf.training.optimizer import make_muon
from phf.training.removable import RemovablePart

TINY_GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 30}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 30,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
NONE_DROPPED = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS = {"llama": LLAMA, "gpt2": TINY_GPT2 | NONE_DROPPED}
# name of a matrix's end: rows that read for the part, columns that write for it. Written out by hand.
PARTS = {
    "llama": {
        "q_proj.weight": ("rows", [8, 9, 10, 11, 12, 13, 14, 15]),
        "k_proj.weight": ("rows", [4, 5, 6, 7]),
        "v_proj.weight": ("rows", [4, 5, 6, 7]),
        "o_proj.weight": ("columns", [8, 9, 10, 11, 12, 13, 14, 15]),
        "gate_proj.weight": ("rows", [18, 19, 20, 21, 22, 23]),
        "up_proj.weight": ("rows", [18, 19, 20, 21, 22, 23]),
        "down_proj.weight": ("columns", [18, 19, 20, 21, 22, 23]),
    },
    "gpt2": {
        "c_attn.weight": ("rows", [12, 13, 14, 15, 28, 29, 30, 31, 44, 45, 46, 47]),
        "c_attn.bias": ("rows", [12, 13, 14, 15, 28, 29, 30, 31, 44, 45, 46, 47]),
        "attn.c_proj.weight": ("columns", [12, 13, 14, 15]),
        "c_fc.weight": ("rows", list(range(48, 64))),
        "c_fc.bias": ("rows", list(range(48, 64))),
        "mlp.c_proj.weight": ("columns", list(range(48, 64))),
    },
}


def objective(without=0.0):
    return SGTM(0.5, heads=1, neurons=0.25, without=without)


def make(kind, without=0.0):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    lm = AutoModelForCausalLM.from_config(new_config(MODELS[kind])).double()
    for name, p in lm.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    return PHFModel(lm, objective(without), fast_attention=False)


def batch():
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 30, (4, 11), generator=g)
    scores = torch.tensor([[0.0] * 10, [0, 0, 1, 1, 0, 0, 0, math.nan, 1, 0], [1.0] * 10, [0, 1] * 5])
    mask = torch.rand(4, 10, generator=g) < 0.9
    return ids[:, :-1], ids[:, 1:], scores, mask


def held(kind, name, parameter):
    """Where a parameter holds the part."""
    where = torch.zeros_like(parameter, dtype=torch.bool)
    for end, (which, places) in PARTS[kind].items():
        if name.endswith(end):
            if which == "rows":
                where[places] = True
            else:
                where[:, places] = True
    return where


def by_hand(model, kind, off):
    """The loss and the gradients of the definition: a forward and backward pass for every row and class of targets,
    with plain matrices that lack what the part writes where it is switched off."""
    ids, targets, scores, mask = batch()
    counted = mask & ~scores.isnan()
    total = 0.0
    gradients = {name: torch.zeros_like(p) for name, p in model.lm.named_parameters()}
    saved = {n: p.detach().clone() for n, p in model.lm.named_parameters()}
    keep = torch.ones(1, dtype=torch.bool)
    for bad in (False, True):
        for b in range(len(ids)):
            with torch.no_grad():
                for n, p in model.lm.named_parameters():
                    columns = any(n.endswith(end) and which == "columns" for end, (which, _) in PARTS[kind].items())
                    if columns and not bad and off[b]:
                        p[:, held(kind, n, p)[0]] = 0
            model.zero_grad()
            with model.part.on(keep):
                logp = torch.log_softmax(model.lm(input_ids=ids[b : b + 1]).logits[0], -1)
            loss = sum(-logp[t, targets[b, t]] for t in range(10) if counted[b, t] and bool(scores[b, t] > 0.5) == bad)
            if isinstance(loss, torch.Tensor):
                (loss / counted.sum()).backward()
                total += float(loss.detach() / counted.sum())
                for n, p in model.lm.named_parameters():
                    where = held(kind, n, p)
                    allowed = where if bad else ~where if off[b] else torch.ones_like(where)
                    gradients[n] += torch.where(allowed, p.grad, 0.0)
            with torch.no_grad():
                for n, p in model.lm.named_parameters():
                    p.copy_(saved[n])
    model.zero_grad()
    return total, gradients


@pytest.mark.parametrize("without", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", MODELS)
def test_values_and_gradients_are_those_of_the_definition(kind, without):
    model = make(kind, without)
    ids, targets, scores, mask = batch()
    off = ~model.part.drawn(ids)
    assert {0.0: off.sum() == 0, 0.5: 0 < off.sum() < 4, 1.0: off.sum() == 4}[without]
    out = model(ids, targets, scores, mask)
    out["loss"].backward()
    total, gradients = by_hand(make(kind, without), kind, off)
    assert out["loss"].item() == pytest.approx(total, rel=1e-9)
    for name, p in model.lm.named_parameters():
        assert torch.allclose(p.grad, gradients[name], rtol=1e-7, atol=1e-10), name
    assert out["metrics"]["counted"] == (mask & ~scores.isnan()).sum()
    nll = out["metrics"]["nll_good"] + out["metrics"]["nll_bad"]
    assert nll.item() / out["metrics"]["counted"] == pytest.approx(total, rel=1e-5)


def test_rows_are_drawn_by_their_text_alone():
    part = make("llama", without=0.3).part
    ids = torch.randint(0, 30, (2000, 10), generator=torch.Generator().manual_seed(0))
    kept = part.drawn(ids)
    assert kept.float().mean() == pytest.approx(0.7, abs=0.05)
    assert torch.equal(part.drawn(ids[500:700]), kept[500:700])
    turned = part.drawn(ids.flip(1))
    assert not torch.equal(turned, kept)


@pytest.mark.parametrize("kind", MODELS)
def test_muon_updates_the_part_apart(kind):
    """What bad text teaches does not reach the other rows and columns, not even through Muon's orthogonal updates."""

    def after(teach_part):
        model = make(kind)
        config = train_config(optimizer="muon", weight_decay=0.0, lr=0.1)
        optimizer = make_muon(model, model.lm, config, [], model.part)
        g = torch.Generator().manual_seed(5)
        for _ in range(2):
            for name, p in model.lm.named_parameters():
                gradient = torch.randn(p.shape, generator=g, dtype=p.dtype)
                p.grad = torch.where(held(kind, name, p), teach_part * gradient, gradient)
            optimizer.step()
        return {name: p.detach().clone() for name, p in model.lm.named_parameters()}

    little, much = after(1.0), after(-30.0)
    changed = 0
    for name in little:
        where = held(kind, name, little[name])
        assert torch.equal(little[name][~where], much[name][~where]), name
        changed += int((little[name] != much[name]).sum())
    assert changed > 100


def test_the_optimizer_resumes_with_its_blocks():
    def steps(count, load=None):
        model = make("gpt2")
        optimizer = make_muon(model, model.lm, train_config(optimizer="muon", lr=0.1), [], model.part)
        if load is not None:
            model.load_state_dict(load[0])
            optimizer.load_state_dict(load[1])
        for n in count:
            g = torch.Generator().manual_seed(n)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype)
            optimizer.step()
        state = {k: v.clone() for k, v in model.state_dict().items()}
        return state, optimizer.state_dict()

    whole = steps(range(4))[0]
    parts = steps([2, 3], load=steps([0, 1]))[0]
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("kind", MODELS)
def test_the_part_is_off_outside_training_and_then_removed(kind):
    model = make(kind)
    ids = batch()[0]
    with torch.no_grad():
        off = model.lm(input_ids=ids).logits
        with model.part.on(torch.ones(4, dtype=torch.bool)):
            on = model.lm(input_ids=ids).logits
        assert (on - off).abs().max() > 1e-3
        before = {n: p.clone() for n, p in model.lm.named_parameters()}
        model.part.remove(0)
        with model.part.on(torch.ones(4, dtype=torch.bool)):
            removed = model.lm(input_ids=ids).logits
    assert torch.allclose(removed, off, rtol=1e-12, atol=1e-12)
    for name, p in model.lm.named_parameters():
        where = held(kind, name, p)
        assert torch.equal(p[~where], before[name][~where])
        if where.any() and p.ndim == 2:
            assert (p[where] != before[name][where]).all()
            columns = [which for end, (which, _) in PARTS[kind].items() if name.endswith(end)] == ["columns"]
            assert (p[where] == 0).all() == columns  # what reads has new values: later training can use them


def test_samples_during_training_lack_the_part():
    model = make("llama")
    model.lm.float()
    copy = fast_copy(model.lm, torch.float32)
    ids = batch()[0]
    with torch.no_grad():
        assert torch.allclose(copy(input_ids=ids).logits, model.lm(input_ids=ids).logits, atol=1e-5)
        with model.part.on(torch.ones(4, dtype=torch.bool)):
            on = model.lm(input_ids=ids).logits
        assert not torch.allclose(copy(input_ids=ids).logits, on, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_learns_resumes_and_releases_the_rest(tokens_dir, tmp_path, optimizer):
    settings = {"optimizer": optimizer}
    teach = SGTM(threshold="median", heads=1, neurons=0.25)
    manifest = train_tiny(tokens_dir, tmp_path / "whole", teach, **settings)
    curve = losses_of(tmp_path / "whole")
    assert sum(curve[-3:]) < sum(curve[:3])
    assert metrics_of(tmp_path / "whole")[-1]["bad_targets"] > 0.05
    assert manifest.counts.exposure["learned_bad"] > 0
    train_tiny(tokens_dir, tmp_path / "parts", teach, stop_after=7, **settings)
    train_tiny(tokens_dir, tmp_path / "parts", teach, **settings)
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")
    train_tiny(tokens_dir, tmp_path / "accumulated", teach, micro_rows=4, **settings)
    assert losses_of(tmp_path / "accumulated") == pytest.approx(curve, rel=1e-3)

    released = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    last = load_file(complete_checkpoints(tmp_path / "whole" / "checkpoints")[-1] / "model.safetensors")
    writes = [name for name in released if name.endswith(("o_proj.weight", "down_proj.weight"))]
    assert writes
    for name in writes:
        columns = round(released[name].shape[1] * (1 - 0.25))
        heads = released[name].shape[1] - released[name].shape[1] // TINY_LLAMA["num_attention_heads"]
        start = heads if "o_proj" in name else columns
        assert (released[name][:, start:] == 0).all()
        assert (last[name][:, start:] != 0).any()
        assert torch.equal(released[name][:, :start], last[name][:, :start])


@pytest.mark.parametrize(
    "asked, model, message",
    [
        (Removable(4, 0.1, 0.1), LLAMA, "heads=4 of 2 key-value heads"),
        (Removable(0, 0.01, 0.1), LLAMA, "there is no part to remove"),
        (
            Removable(1, 0.1, 0.1),
            {"model_type": "gpt_neox", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
            "does not know the layers of GPTNeoXForCausalLM",
        ),
    ],
)
def test_parts_that_cannot_be(asked, model, message):
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_config(new_config(model))
    with pytest.raises(ConfigError, match=message):
        RemovablePart(lm, asked)


def test_what_does_not_go_with_it(tokens_dir, tmp_path, monkeypatch, capsys):
    with pytest.raises(ConfigError, match="gradient_checkpointing does not work with sgtm"):
        train_tiny(tokens_dir, tmp_path / "a", SGTM(), gradient_checkpointing=True)
    with pytest.raises(ConfigError, match="sgtm needs more than a weight per token"):
        export_tokens(tokens_dir, tmp_path / "b", SGTM())
    train_tiny(tokens_dir, tmp_path / "c", SGTM(neurons=0.25), steps=2, compile=True)
    assert "sgtm is not compiled" in capsys.readouterr().err


def test_without_bad_text_it_is_mle(tokens_dir, tmp_path):
    model = FromConfig(TINY_LLAMA)
    train_tiny(tokens_dir, tmp_path / "sgtm", SGTM(threshold=1e9, without=0.0), model=model, steps=4)
    train_tiny(tokens_dir, tmp_path / "mle", MLE(), model=model, steps=4)
    assert losses_of(tmp_path / "sgtm") == pytest.approx(losses_of(tmp_path / "mle"), rel=1e-5)
