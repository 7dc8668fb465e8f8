from __future__ import annotations

import shutil

import pytest
import torch

from helpers import FAMILIES, GPT2, TINY_LLAMA, UNTIED, tiny_texts
from phf.core import folders
from phf.core.config import ConfigError
from phf.core.runs import COMPLETE, TrainManifest
from phf.generation.loaded import LoadedModel
from phf.objectives import AWR, MLE, Conditional, LossInputs, Unlikelihood
from phf.tokens.tokenizer import train_bpe
from phf.training.fused import LogitShape, log_probabilities
from phf.training.lm import FromConfig, FromWeights, add_control_embeddings, build_lm, save_lm
from phf.training.model import PHFModel, ValueHead
from phf.training.probe import logit_shape, num_parameters


@pytest.fixture
def tokenizer():
    return train_bpe(tiny_texts(), 300)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("objective", [MLE(), Unlikelihood(0.0), AWR(rewards="raw")], ids=lambda o: o.name)
def test_forward_is_the_loss_over_the_models_own_logits(tokenizer, family, objective):
    lm = build_lm(FromConfig(FAMILIES[family]), tokenizer, seed=0)
    wrapper = PHFModel(lm, objective, chunk=5)
    g = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(0, 300, (2, 3, 9), generator=g)
    scores = torch.rand(3, 9, generator=g).round()
    mask = torch.rand(3, 9, generator=g) < 0.8
    if wrapper.value_head is not None:
        torch.nn.init.normal_(wrapper.value_head.weight)
    out = wrapper(ids, targets, scores, mask)
    logits = lm(input_ids=ids).logits
    hidden = lm.base_model(input_ids=ids).last_hidden_state
    value = None if wrapper.value_head is None else -torch.sigmoid(hidden @ wrapper.value_head.weight)
    expected = (
        objective.loss(LossInputs(*log_probabilities(logits, targets), scores, mask, value)).loss_sum / mask.sum()
    )
    torch.testing.assert_close(out["loss"], expected, rtol=1e-4, atol=1e-5)
    fast = torch.autograd.grad(out["loss"], [p for p in wrapper.parameters() if p.requires_grad], allow_unused=True)
    slow = torch.autograd.grad(expected, [p for p in wrapper.parameters() if p.requires_grad], allow_unused=True)
    for a, b in zip(fast, slow, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_start_at_the_mean_of_the_output_embeddings(tokenizer, family):
    lm = build_lm(FromConfig(FAMILIES[family]), tokenizer, seed=0)
    mean = lm.get_output_embeddings().weight.detach().mean(0)
    before = lm.get_output_embeddings().weight.detach().clone()
    ids = add_control_embeddings(lm, tokenizer, ["<|good|>", "<|bad|>"], seed=0)
    after = lm.get_output_embeddings().weight.detach()
    assert ids == [300, 301]
    assert after.shape[0] == 302
    torch.testing.assert_close(after[:300], before)
    noise = (after[300:] - mean) / 0.01
    assert 0.3 < noise.std() < 2
    assert lm.get_input_embeddings().weight.shape[0] == 302
    tied = lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
    assert tied == bool(lm.config.tie_word_embeddings)
    assert torch.isfinite(lm(input_ids=torch.tensor([[300, 301]])).logits).all()


def test_a_padded_vocabulary_has_the_rows_already(tokenizer):
    lm = build_lm(FromConfig(TINY_LLAMA), tokenizer, seed=0)
    lm.resize_token_embeddings(320)
    ids = add_control_embeddings(lm, tokenizer, ["<|good|>", "<|bad|>"], seed=0)
    assert ids == [300, 301]
    assert lm.get_output_embeddings().weight.shape[0] == 320
    mean = lm.get_output_embeddings().weight[:300].mean(0)
    assert ((lm.get_output_embeddings().weight[300:302] - mean).abs() < 0.06).all()


def test_finetuning_keeps_trained_control_tokens(tokenizer, tmp_path):
    lm = build_lm(FromConfig(TINY_LLAMA), tokenizer, seed=0)
    add_control_embeddings(lm, tokenizer, ["<|good|>", "<|bad|>"], seed=0)
    lm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = build_lm(FromWeights(str(tmp_path)), tokenizer, seed=5)
    before = again.get_output_embeddings().weight.detach().clone()
    assert add_control_embeddings(again, tokenizer, ["<|good|>", "<|bad|>"], seed=5) == [300, 301]
    assert torch.equal(again.get_output_embeddings().weight, before)


def test_the_seed_decides_the_weights_and_leaves_the_global_stream(tokenizer):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build_lm(FromConfig(TINY_LLAMA), tokenizer, seed=0).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    second = build_lm(FromConfig(TINY_LLAMA), tokenizer, seed=0).state_dict()
    other = build_lm(FromConfig(TINY_LLAMA), tokenizer, seed=1).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_dropout_is_off_by_default(tokenizer):
    assert build_lm(FromConfig(GPT2), tokenizer, seed=0).config.resid_pdrop == 0
    assert build_lm(FromConfig({**GPT2, "resid_pdrop": 0.1}), tokenizer, seed=0).config.resid_pdrop == 0.1


@pytest.mark.parametrize(
    "config, message",
    [
        ({"hidden_size": 8}, "needs model_type"),
        ({**TINY_LLAMA, "hiden_size": 8}, r"llama has no setting hiden_size \(did you mean 'hidden_size'\?\)"),
        ({"model_type": "lama"}, r"unknown model type 'lama' \(did you mean 'llama'\?\)$"),
        ({"model_type": "zzzzzz"}, "unknown model type 'zzzzzz'$"),
        ({"model_type": ["llama"]}, "unknown model type"),
        ({**TINY_LLAMA, "hidden_act": "foo"}, "model.config: .*foo"),
        ({**TINY_LLAMA, "initializer_range": 5.0}, "initializer_range"),
        ({**TINY_LLAMA, "max_position_embeddings": 16}, "train.context=32: the model has 16 positions"),
    ],
)
def test_wrong_model_settings_are_errors(tokenizer, config, message):
    with pytest.raises(ConfigError, match=message):
        build_lm(FromConfig(config), tokenizer, seed=0, context=32)


def test_weights_may_be_given_another_config(tokenizer, tmp_path):
    save_lm(build_lm(FromConfig({**GPT2, "resid_pdrop": 0.1}), tokenizer, seed=0), tmp_path)
    kept, off = (build_lm(FromWeights(str(tmp_path), config=c), tokenizer, seed=0) for c in ({}, {"resid_pdrop": 0}))
    assert (kept.config.resid_pdrop, off.config.resid_pdrop) == (0.1, 0)
    assert off.transformer.h[0].mlp.dropout.p == 0
    torch.testing.assert_close(off.state_dict(), kept.state_dict(), rtol=0, atol=0)
    for config, message in (
        ({"resid_drop": 0}, r"has no setting resid_drop \(did you mean 'resid_pdrop'"),
        ({"save_pretrained": 0}, "has no setting save_pretrained"),
        ({"resid_pdrop": "x"}, "resid_pdrop"),
        ({"n_layer": 3}, r"does not match its weights \(transformer.h.2.attn.c_attn.bias, .*, \.\.\.\)"),
        ({"n_layer": 1}, "does not match its weights"),
        ({"tie_word_embeddings": False}, r"does not match its weights \(lm_head.weight\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_lm(FromWeights(str(tmp_path), config=config), tokenizer, seed=0)


def test_missing_weights_are_an_error(tokenizer, tmp_path):
    """transformers would initialize missing weights at random."""
    lm = build_lm(FromConfig({**TINY_LLAMA, "tie_word_embeddings": False}), tokenizer, seed=0)
    state = {name: tensor for name, tensor in lm.state_dict().items() if name != "lm_head.weight"}
    save_lm(lm, tmp_path, state)
    with pytest.raises(ConfigError, match=r"weights are missing \(lm_head.weight\)"):
        build_lm(FromWeights(str(tmp_path)), tokenizer, seed=0)


def test_missing_models_are_errors_at_once(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "runs" / "half" / "checkpoints" / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    (checkpoint / COMPLETE).write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    for path, message in (
        ("runs/half", "no config.json.*the run is not finished; its newest checkpoint is checkpoints/checkpoint-20"),
        ("runs/helf", "model runs/helf: not a local folder, and "),
        ("./runs/helf", "not a local folder, and not a name on the Hub"),
        (str(tmp_path), "Unrecognized model"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_lm(FromWeights(path), tokenizer, seed=0)


SHAPED = {
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0},
}


@pytest.mark.parametrize("family", SHAPED)
def test_models_that_scale_or_cap_their_logits(tokenizer, family):
    lm = build_lm(FromConfig({**TINY_LLAMA, "model_type": family, **SHAPED[family]}), tokenizer, seed=0)
    assert (
        logit_shape(lm)
        == {"gemma2": LogitShape(1, 3.0), "cohere": LogitShape(0.25), "granite": LogitShape(1 / 8)}[family]
    )
    with torch.no_grad():  # large logits, so that the cap matters
        lm.get_output_embeddings().weight *= 100
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    scores = torch.where(torch.arange(8) % 3 == 0, 1.0, 0.0).repeat(2, 1)
    logits = lm(input_ids=ids[:, :-1]).logits
    logp, log1mp = log_probabilities(logits, ids[:, 1:])
    objective = Unlikelihood(0.0)
    mask = torch.ones(2, 8, dtype=torch.bool)
    plain = objective.loss(LossInputs(logp, log1mp, scores, mask)).loss_sum / 16
    ours = PHFModel(lm, objective)(ids[:, :-1], ids[:, 1:], scores, mask)["loss"]
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    own = lm.get_input_embeddings().weight
    for a, b in zip(torch.autograd.grad(ours, own), torch.autograd.grad(plain, own), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))
    loaded = LoadedModel(lm=lm, tokenizer=tokenizer, control_ids={}, path=family, shape=logit_shape(lm))
    hidden = lm.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(loaded.logits(hidden), lm(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", SHAPED)
def test_the_logits_of_half_precision_weights_are_known_too(tokenizer, family):
    lm = build_lm(FromConfig({**TINY_LLAMA, "model_type": family, **SHAPED[family]}), tokenizer, seed=0)
    assert logit_shape(lm.to(torch.bfloat16)) == logit_shape(lm.float())
    with torch.no_grad():
        lm.get_output_embeddings().weight.zero_()  # these logits do not show a factor
    assert (
        logit_shape(lm)
        == {"gemma2": LogitShape(1, 3.0), "cohere": LogitShape(0.25), "granite": LogitShape(1 / 8)}[family]
    )
    with torch.no_grad():
        lm.get_output_embeddings().weight[3, 0] = float("nan")
    with pytest.raises(ConfigError, match="its weights are broken"):
        logit_shape(lm)


def test_a_model_that_calls_parts_of_its_trunk(tokenizer):
    opt = {
        "model_type": "opt",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 32,
        "word_embed_proj_dim": 16,
    }
    lm = build_lm(FromConfig({**opt, "max_position_embeddings": 64}), tokenizer, seed=0)
    assert logit_shape(lm) == LogitShape()


def test_a_model_whose_config_does_not_describe_its_logits_is_refused(tokenizer):
    """Even where the logits of a new model are too small to matter yet."""
    lm = build_lm(FromConfig({**TINY_LLAMA, "model_type": "gemma2", **SHAPED["gemma2"]}), tokenizer, seed=0)
    assert lm(input_ids=torch.arange(9).unsqueeze(0)).logits.abs().max() < 0.5
    forward = lm.forward
    lm.config.final_logit_softcapping, cap = None, lm.config.final_logit_softcapping

    def capped(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = cap * torch.tanh(out.logits / cap)
        return out

    lm.forward = capped
    with pytest.raises(ConfigError, match="does not know"):
        logit_shape(lm)


def test_a_model_of_another_tokenizer_is_refused(tokenizer, tmp_path):
    build_lm(FromConfig(TINY_LLAMA), train_bpe(["a"], 257), seed=0).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has 257 rows of embeddings, but its tokenizer has ids up to 299"):
        build_lm(FromWeights(str(tmp_path)), tokenizer, seed=0)


def test_value_heads_start_at_their_definitions():
    hidden = torch.randn(2, 3, 4)
    assert (ValueHead(4, "linear")(hidden) == 0).all()
    assert (ValueHead(4, "negative_sigmoid")(hidden) == -0.5).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ValueHead(4, "linear")(hidden).dtype == torch.float32


def test_the_value_loss_reaches_the_trunk_only_if_it_shall(tokenizer):
    batch = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "targets": torch.tensor([[6, 7, 8]]),
        "scores": torch.tensor([[0.0, 1.0, 0.5]]),
        "mask": torch.ones(1, 3, dtype=torch.bool),
    }
    for reaches in (True, False):
        objective = AWR(alpha=0.0, reward_mean=0.0, reward_std=1.0, reaches_trunk=reaches)
        wrapper = PHFModel(build_lm(FromConfig(TINY_LLAMA), tokenizer, seed=0), objective)
        torch.nn.init.normal_(wrapper.value_head.weight)
        wrapper(**batch)["loss"].backward()
        of_trunk = [p.grad for p in wrapper.lm.parameters() if p.grad is not None]
        assert any((grad != 0).any() for grad in of_trunk) == reaches
        assert (wrapper.value_head.weight.grad != 0).any()
    fixed = PHFModel(build_lm(FromConfig(TINY_LLAMA), tokenizer, seed=0), AWR(fixed_value=0.0, rewards="raw"))
    assert fixed.value_head is None
    fixed(**batch)["loss"].backward()


def test_value_head_has_its_own_file(tokenizer, tmp_path):
    wrapper = PHFModel(build_lm(FromConfig(TINY_LLAMA), tokenizer, seed=0), AWR())
    torch.nn.init.normal_(wrapper.value_head.weight)
    wrapper.save_value_head(tmp_path)
    other = PHFModel(build_lm(FromConfig(TINY_LLAMA), tokenizer, seed=0), AWR())
    other.load_value_head(tmp_path)
    assert torch.equal(other.value_head.weight, wrapper.value_head.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["value_head.safetensors"]


def test_parameters_are_counted_once(tokenizer):
    tied = build_lm(FromConfig(TINY_LLAMA), tokenizer, seed=0)
    untied = build_lm(FromConfig(UNTIED), tokenizer, seed=0)
    assert num_parameters(untied) - num_parameters(tied) == 300 * 16
    assert num_parameters(untied, embeddings=False) == num_parameters(tied, embeddings=False)


def test_control_names_of_the_objective_are_the_models(tokenizer):
    assert Conditional(good="<+>", bad="<->").control_tokens == ("<+>", "<->")


def test_a_swapped_gelu_is_the_same_function(tokenizer):
    """transformers' formula in float64, values and gradients; and every one of a GPT-2 is swapped."""
    from transformers.activations import NewGELUActivation

    from phf.training.lm import swap_gelu

    found = []
    for function in (NewGELUActivation(), torch.nn.GELU(approximate="tanh")):
        x = torch.linspace(-12, 12, 999, dtype=torch.float64, requires_grad=True)
        out = function(x)
        found.append((out.detach(), *torch.autograd.grad(out.sum(), x)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    lm = build_lm(FromConfig(GPT2), tokenizer, seed=0)
    before = lm(torch.arange(9).unsqueeze(0)).logits
    assert swap_gelu(lm) == 2
    assert not any(isinstance(m, NewGELUActivation) for m in lm.modules())
    torch.testing.assert_close(lm(torch.arange(9).unsqueeze(0)).logits, before)


def test_gpt2s_transposed_layers_are_swapped_and_saved_as_they_were(tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    from phf.training.lm import load_lm_weights, save_lm, swap_conv1d

    lm = build_lm(FromConfig(GPT2), tokenizer, seed=0)
    ids = torch.arange(20).unsqueeze(0)
    before = lm(input_ids=ids).logits
    state = {k: v.clone() for k, v in lm.state_dict().items()}
    assert swap_conv1d(lm) == 8  # four in each of two blocks
    torch.testing.assert_close(lm(input_ids=ids).logits, before)
    save_lm(lm, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(plain.state_dict()[k], v) for k, v in state.items())
    other = build_lm(FromConfig(GPT2), tokenizer, seed=1)
    swap_conv1d(other)
    load_lm_weights(other, tmp_path)
    assert torch.equal(other(input_ids=ids).logits, lm(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_activation_checkpointing_and_autocast_change_only_what_they_should(tokenizer, family):
    ids = torch.arange(18).reshape(2, 9)
    scores = torch.rand(2, 9).round()
    mask = torch.ones(2, 9, dtype=torch.bool)
    grads = []
    for checkpointing, autocast in ((False, None), (True, None), (True, torch.bfloat16)):
        lm = build_lm(FromConfig(FAMILIES[family]), tokenizer, seed=0)
        if checkpointing:
            lm.activation_checkpointing_enable()
        wrapper = PHFModel(lm, Unlikelihood(0.0), autocast=autocast).train()
        wrapper(ids, ids, scores, mask)["loss"].backward()
        grads.append(torch.cat([p.grad.flatten() for p in wrapper.parameters()]))
    torch.testing.assert_close(grads[1], grads[0])
    assert grads[2].dtype == torch.float32
    assert (grads[2] - grads[0]).norm() < 0.05 * grads[0].norm()


def test_autocast_around_the_wrapper_is_autocast_in_it(tokenizer):
    """As a Trainer's bf16 or a loop of somebody's own asks for it."""
    scores = torch.tensor([0.0, 1.0, 1.0] * 6).reshape(2, 9)
    ids = torch.arange(18).reshape(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    losses = []
    for inner, outer in ((torch.bfloat16, False), (None, True), (None, False)):
        wrapper = PHFModel(build_lm(FromConfig(TINY_LLAMA), tokenizer, seed=0), Unlikelihood(0.0), autocast=inner)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outer):
            losses.append(wrapper(ids, ids, scores, mask)["loss"].item())
    assert losses[0] == losses[1] != losses[2]


def test_trained_control_tokens_keep_their_embeddings(tokens_dir, tmp_path):
    """Continuing from a model with control tokens, on a token store whose tokenizer does not have them."""
    from phf.generation.loaded import load_model
    from phf.objectives import Conditional
    from phf.release import export
    from phf.training.lm import FromWeights
    from phf.training.model import trained_control_tokens
    from phf.training.train import TrainConfig, train

    settings = TrainConfig(tokens=20 * 512, context=32, batch_rows=16, lr=1e-2, precision="fp32")
    train(
        tokens_dir=tokens_dir,
        out=tmp_path / "first",
        model=FromConfig(TINY_LLAMA),
        objective=Conditional(),
        config=settings,
    )
    first = load_model(tmp_path / "first")
    assert trained_control_tokens(tmp_path / "first") == {
        "<|good|>": first.control_ids["good"],
        "<|bad|>": first.control_ids["bad"],
    }
    export(tmp_path / "first", tmp_path / "release")
    shutil.copytree(tmp_path / "first" / "model", tmp_path / "copied")
    for start in ("first", "release", "copied"):
        still = TrainConfig(tokens=512, context=32, batch_rows=16, lr=1e-30, precision="fp32", weight_decay=0)
        train(
            tokens_dir=tokens_dir,
            out=tmp_path / f"from-{start}",
            model=FromWeights(str(tmp_path / start)),
            objective=Conditional(),
            config=still,
        )
        then = load_model(tmp_path / f"from-{start}")
        rows = sorted(first.control_ids.values())
        before, after = (m.lm.get_input_embeddings().weight[rows] for m in (first, then))
        torch.testing.assert_close(after, before)
        manifest = folders.read_manifest(tmp_path / f"from-{start}", TrainManifest)
        assert manifest.counts.tokens_before == 20 * 512
