"""Drawing tokens: nucleus sampling by rejection, and the fast copy of a model for sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from helpers import TINY_LLAMA
from phf.core.config import ConfigError
from phf.generation.decoding import draw, guide, uniform
from phf.generation.fast_copy import CACHE_STEP, TESTED_FAMILIES, WHOLE_CACHE, GrowingLayer, fast_copy


def expected_distribution(logits, temperature, top_p, top_k):
    """Nucleus sampling by the definition, in float64: keep tokens whose likelier tokens have a mass below top_p."""
    p = torch.softmax(logits.double() / temperature, -1).numpy()
    if top_k is not None:
        p = np.where(p >= np.sort(p)[::-1][top_k - 1], p, 0)
        p /= p.sum()
    kept = np.array([p[i] if p[p > p[i]].sum() < top_p else 0.0 for i in range(len(p))])
    return kept / kept.sum()


@pytest.mark.parametrize("size", [20, 150])  # less than a block of tokens; three blocks, the last not full
@pytest.mark.parametrize(
    "temperature, top_p, top_k",
    [(1.0, 1.0, None), (0.7, 0.9, None), (1.3, 0.5, None), (1.0, 0.05, None), (0.7, 0.9, 5), (1.0, 1.0, 3)],
)
def test_draws_have_exactly_the_nucleus_distribution(temperature, top_p, top_k, size):
    """Chi-square over 200,000 draws: the statistic of k tokens has mean at most k and a variance of 2k."""
    n = 200_000
    logits = torch.randn(size, generator=torch.Generator().manual_seed(1)) * 2
    ids = np.arange(n)
    tokens = draw(
        logits.expand(n, -1), temperature, top_p, top_k, lambda attempts: uniform(7, ids, 0, attempts)
    ).numpy()
    expected = expected_distribution(logits, temperature, top_p, top_k) * n
    counts = np.bincount(tokens, minlength=size)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi2 = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert chi2 < kept.sum() + 5 * np.sqrt(2 * kept.sum())


def test_the_sorted_fallback_has_the_same_distribution(monkeypatch):
    monkeypatch.setattr("phf.generation.decoding.MAX_REJECTIONS", 1)
    test_draws_have_exactly_the_nucleus_distribution(0.7, 0.9, None, 150)


def test_the_nucleus_is_that_of_transformers():
    from transformers import TopPLogitsWarper

    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 3
    theirs = torch.isfinite(TopPLogitsWarper(0.9)(None, logits.clone()))[0].numpy()
    np.testing.assert_array_equal(expected_distribution(logits[0], 1.0, 0.9, None) > 0, theirs)


EDGES = st.sampled_from([0.0, 2.0**-53, 0.5, 1 - 2.0**-53])


@given(
    st.lists(st.one_of(st.floats(-40, 40), st.just(float("-inf"))), min_size=1, max_size=200),
    st.one_of(EDGES, st.floats(0, 1, exclude_max=True)),
    st.sampled_from([0.01, 0.5, 0.9, 1.0]),
)
@settings(max_examples=200, deadline=None)
def test_only_tokens_of_the_nucleus_are_drawn_even_for_extreme_random_numbers(logits, u, top_p):
    logits_V = torch.tensor(logits)
    if torch.isinf(logits_V).all():
        logits_V[0] = 0.0
    token = draw(logits_V.expand(3, -1), 1.0, top_p, None, lambda attempts: np.full((3, len(attempts)), u))
    assert (token == token[0]).all()
    assert torch.isfinite(logits_V[token[0]])
    p = torch.softmax(logits_V.double(), 0)
    assert p[p > p[token[0]] * (1 + 1e-5)].sum() < top_p + 1e-5


@pytest.mark.parametrize("rejections", [25, 1])  # by rejection, by sorting
def test_equally_likely_tokens_are_kept_or_dropped_together(rejections, monkeypatch):
    monkeypatch.setattr("phf.generation.decoding.MAX_REJECTIONS", rejections)
    logits = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, -5.0])  # 0.40, four of 0.15
    ids = np.arange(4000)
    tokens = draw(logits.expand(4000, -1), 1.0, 0.5, None, lambda attempts: uniform(3, ids, 0, attempts))
    assert set(tokens.tolist()) == {0, 1, 2, 3, 4}


def test_guidance_keeps_banned_tokens_banned():
    good = torch.randn(2, 8)
    bad = torch.randn(2, 8)
    good[:, 3] = bad[:, 3] = good[:, 5] = float("-inf")
    guided = guide(good, bad, 2.0, 6, 7)
    assert torch.isneginf(guided[:, [3, 5]]).all()
    assert torch.isfinite(guided[:, [0, 1, 2, 4, 6, 7]]).all()


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_logits_are_an_error(broken):
    logits = torch.zeros(4, 100)
    logits[2, 7] = broken
    with pytest.raises(ConfigError, match="NaN or infinite"):
        draw(logits, 1.0, 0.9, None, lambda attempts: np.zeros((4, len(attempts))))


FAMILIES = {
    "llama": TINY_LLAMA,
    "grouped": TINY_LLAMA | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {
        "model_type": "gpt_neox",
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    },
    "qwen2": TINY_LLAMA | {"model_type": "qwen2"},
}


def test_every_family_with_a_fast_copy_is_tested():
    assert {config["model_type"] for config in FAMILIES.values()} == TESTED_FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("padded", [False, True])
def test_the_fast_copy_gives_the_logits_of_the_model(name, dtype, tolerance, padded):
    """Token by token through the growing cache, past its first step, with rows removed on the way."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{"initializer_range": 0.1} | FAMILIES[name])).eval()
    assert lm.config._attn_implementation == "sdpa"
    copy = fast_copy(lm, dtype)
    assert copy.config._attn_implementation == WHOLE_CACHE
    ids_NT = torch.randint(0, 300, (5, CACHE_STEP + 20))
    attend_NT = torch.ones_like(ids_NT)
    if padded:
        attend_NT[1, :3] = 0
    position_NT = (attend_NT.cumsum(1) - 1).clamp(min=0)
    kept = torch.tensor([0, 1, 3])
    cache = DynamicCache(config=lm.config)
    heads = getattr(lm.config, "num_key_value_heads", lm.config.num_attention_heads)
    wide = (
        len(ids_NT) * heads * CACHE_STEP * (lm.config.hidden_size // lm.config.num_attention_heads) * 4
    )  # bytes of one step
    cache.layers = [GrowingLayer(wide) for _ in cache.layers]
    with torch.inference_mode():
        whole_NTV = lm(input_ids=ids_NT, attention_mask=attend_NT, position_ids=position_NT).logits
        begin = 4
        for end in range(begin, ids_NT.shape[1] + 1):
            if end == CACHE_STEP - 2:
                cache.batch_select_indices(kept)
                ids_NT, attend_NT, position_NT, whole_NTV = (
                    x[kept] for x in (ids_NT, attend_NT, position_NT, whole_NTV)
                )
            new = slice(0 if end == begin else end - 1, end)
            out = copy(
                input_ids=ids_NT[:, new],
                attention_mask=attend_NT[:, :end] if padded else None,
                position_ids=position_NT[:, new],
                past_key_values=cache,
                use_cache=True,
            )
            difference = (out.logits[:, -1].float() - whole_NTV[:, end - 1]).abs().max()
            assert difference < tolerance * whole_NTV.abs().max(), end
            assert cache.layers[0].keys.dtype == (torch.float32 if end <= CACHE_STEP else dtype)


def test_tied_weights_stay_tied_and_nothing_else_is_shared_with_training():
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_LLAMA | {"tie_word_embeddings": True}))
    copy = fast_copy(lm, torch.bfloat16)
    assert copy.get_output_embeddings().weight is copy.get_input_embeddings().weight
    assert copy.base_model.rotary_emb.inv_freq.dtype == torch.float32
    mine = {p.data_ptr() for p in lm.parameters()}
    assert not mine & {p.data_ptr() for p in copy.parameters()}
    assert all(p.requires_grad for p in lm.parameters())
