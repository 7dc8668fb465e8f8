"""Causal attention in blocks against plain attention in float64; and that it is used where, and only where, it may be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from conftest import TINY_LLAMA, tiny_texts
from phf import attention
from phf.model import FromConfig, PHFModel, build_lm, save_lm
from phf.objectives import MLE
from phf.tokens import train_bpe
from test_model import FAMILIES


def plain(query, key, value, scale):
    """softmax(scale Q K^T + causal mask) V, by autograd."""
    scores = scale * query @ key.transpose(-1, -2)
    later = torch.ones(query.shape[-2], query.shape[-2], dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(later, float("-inf")), -1) @ value


def both(shape, value_width, dtype, scale, seed=0):
    """(value, gradients) of ours in `dtype` and of the plain formula in float64, on the same numbers."""
    g = torch.Generator().manual_seed(seed)
    shapes = [shape, shape, (*shape[:3], value_width), (*shape[:3], value_width)]
    numbers = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]
    found = []
    for function, of in ((attention.causal_attention, dtype), (plain, torch.float64)):
        leaves = [x.to(of).requires_grad_() for x in numbers[:3]]
        out = function(*leaves, scale)
        found.append((out.detach(), *torch.autograd.grad(out, leaves, numbers[3].to(of))))
    return found


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 300), st.integers(1, 9), st.integers(1, 9), st.floats(0.01, 3)
)
def test_values_and_gradients_are_those_of_the_formula(rows, heads, positions, width, value_width, scale):
    ours, exact = both((rows, heads, positions, width), value_width, torch.float64, scale)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("positions", [127, 128, 129, 256, 1024, attention.KEEP + 1, 1300])
def test_at_the_edges_of_blocks_and_where_probabilities_are_no_longer_kept(positions):
    ours, exact = both((1, 2, positions, 4), 4, torch.float64, 0.5)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("positions", [200, attention.KEEP + 76])
def test_in_bfloat16_it_is_near(positions):
    ours, exact = both((2, 2, positions, 16), 16, torch.bfloat16, 0.25)
    for a, b in zip(ours, exact, strict=True):
        assert (a.double() - b).norm() < 0.02 * b.norm()


def test_torch_finds_the_operations_well_formed():
    query, key, value = (torch.randn(2, 2, 130, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    found = torch.library.opcheck(torch.ops.phf.causal_attention.default, (query, key, value, 0.5), test_utils=tests)
    assert set(found.values()) == {"SUCCESS"}


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(tiny_texts(), 300)


def batch(rows=3, positions=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids, targets = torch.randint(0, 300, (2, rows, positions), generator=g)
    return ids, targets, torch.zeros(rows, positions), torch.ones(rows, positions, dtype=torch.bool)


def count(monkeypatch):
    calls = []
    known = attention.causal_attention
    monkeypatch.setattr(attention, "causal_attention", lambda *args: calls.append(args[0].shape) or known(*args))
    return calls


GROUPED = {**TINY_LLAMA, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("family", [*FAMILIES, "grouped"])
def test_a_model_trains_as_with_transformers_own(tokenizer, family, monkeypatch):
    """In bfloat16 in blocks, in float32 by transformers' own kernel: the loss and its gradients stay what they were."""
    calls = count(monkeypatch)
    settings_ = (FAMILIES | {"grouped": GROUPED})[family]
    for dtype, near, blocks in ((torch.bfloat16, 0.03, 2), (None, 1e-5, 0)):
        found = []
        for quick in (True, False):
            lm = build_lm(FromConfig(settings_), tokenizer, seed=0)
            model = PHFModel(lm, MLE(), dtype, quick_attention=quick)
            assert lm.config._attn_implementation == (attention.NAME if quick else "sdpa")
            calls.clear()
            loss = model(*batch())["loss"]
            assert len(calls) == (blocks if quick else 0)  # one a layer
            loss.backward()
            found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
        (loss, grads), (usual, usual_grads) = found
        torch.testing.assert_close(loss, usual, rtol=near / 10, atol=0)
        total = torch.stack([g.norm() for g in usual_grads.values()]).norm()
        for name, grad in grads.items():
            assert (grad - usual_grads[name]).norm() <= near * total, name


@pytest.mark.parametrize("compiled", [False, True])
def test_rows_need_no_mask_also_when_compiled(tokenizer, compiled, monkeypatch):
    """transformers makes a mask whenever its model is compiled, and with a mask there is no flash attention."""
    masks = []
    known = attention.sdpa_attention_forward

    def look(module, query, key, value, mask, *args, **kwargs):
        masks.append(mask)
        return known(module, query, key, value, mask, *args, **kwargs)

    monkeypatch.setattr(attention, "sdpa_attention_forward", look)
    lm = build_lm(FromConfig(TINY_LLAMA), tokenizer, seed=0)
    model = PHFModel(lm, MLE())
    masks.clear()
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    trunk = lm.base_model.forward
    if compiled:
        lm.base_model.forward = torch.compile(trunk, backend=backend)
    ids, *rest = batch()
    loss = model(ids, *rest)["loss"]
    lm.base_model.forward = trunk
    assert masks == [None, None]
    assert bool(graphs) == compiled
    monkeypatch.undo()
    torch.testing.assert_close(loss, model(ids, *rest)["loss"], rtol=1e-5, atol=0)


def test_a_window_is_kept(tokenizer):
    """Rows longer than a model's window are cut by it; shorter ones need no mask."""
    mistral = {**TINY_LLAMA, "model_type": "mistral", "sliding_window": 16}
    for positions, cut in ((15, False), (16, False), (17, True), (40, True)):
        found = []
        for quick in (True, False):
            lm = build_lm(FromConfig(mistral), tokenizer, seed=0)
            with torch.no_grad():
                for p in lm.parameters():  # so that it matters what is attended to
                    p.mul_(20 if p.ndim == 2 else 1)
            model = PHFModel(lm, MLE(), quick_attention=quick)
            found.append(model(*batch(positions=positions))["loss"].detach())
        torch.testing.assert_close(*found, rtol=1e-5, atol=0)
        lm.config.sliding_window = None
        whole = PHFModel(lm, MLE(), quick_attention=False)(*batch(positions=positions))["loss"].detach()
        assert torch.isclose(whole, found[0], rtol=1e-5, atol=0) != cut


def test_a_model_whose_attention_is_more_than_causal_keeps_its_own(tokenizer, monkeypatch):
    lm = build_lm(FromConfig(TINY_LLAMA), tokenizer, seed=0)
    known = lm.base_model.forward

    def sees_everything(input_ids, **kwargs):
        mask = torch.ones(len(input_ids), 1, input_ids.shape[1], input_ids.shape[1], dtype=torch.bool)
        if attention._whole_rows:
            mask = None
        return known(input_ids=input_ids, attention_mask=mask, **kwargs)

    monkeypatch.setattr(lm.base_model, "forward", sees_everything)
    assert not attention.swap(lm)
    assert lm.config._attn_implementation == "sdpa"
    gemma = build_lm(FromConfig({**TINY_LLAMA, "model_type": "gemma2", "head_dim": 8}), tokenizer, seed=0)
    assert not attention.swap(gemma)
    assert gemma.config._attn_implementation == "eager"


def test_padding_caches_and_dropout_are_left_to_transformers(tokenizer, monkeypatch):
    lm = build_lm(FromConfig(TINY_LLAMA), tokenizer, seed=0).to(torch.bfloat16).eval()
    usual = build_lm(FromConfig(TINY_LLAMA), tokenizer, seed=0).to(torch.bfloat16).eval()
    assert attention.swap(lm)
    calls = count(monkeypatch)
    ids = batch()[0]
    padded = torch.ones_like(ids)
    padded[1, :7] = 0
    with torch.no_grad():
        assert torch.equal(lm(ids, attention_mask=padded).logits, usual(ids, attention_mask=padded).logits)
        caches = [usual(ids[:, :20], use_cache=True).past_key_values for _ in range(2)]
        found = [m(ids[:, 20:25], past_key_values=c).logits for m, c in zip((lm, usual), caches, strict=True)]
        assert torch.equal(*found)
    for layer in lm.modules():
        if hasattr(layer, "attention_dropout"):
            layer.attention_dropout = 0.5
    lm.train()(ids)
    assert not calls


def test_inside_usual_a_model_attends_as_it_will_when_loaded(tokenizer, tmp_path, monkeypatch):
    lm = build_lm(FromConfig(TINY_LLAMA), tokenizer, seed=0)
    PHFModel(lm, MLE())
    save_lm(lm, tmp_path)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    calls = count(monkeypatch)
    ids = batch()[0]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with attention.usual(lm):
            assert torch.equal(lm(ids).logits, loaded(ids).logits)
        assert not calls
        lm(ids)
    assert len(calls) == 2
