"""What is found out about a model before it is trained."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tokenizers import decoders, normalizers
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import TINY_LLAMA, train_tiny
from phf.core.config import ConfigError, validate
from phf.core.types import Roles
from phf.generation.loaded import load_model
from phf.tokens.start import ReleaseError, try_start
from phf.tokens.tokenizer import add_control_tokens, train_bpe
from phf.training.lm import MODELS, AnyModel, FromConfig, FromWeights, build_lm, save_lm
from phf.training.probe import check_causal, logit_shape, num_parameters

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["some text to train on"] * 20, 300)


@pytest.mark.parametrize(
    "config",
    [
        {
            "model_type": "gemma3_text",
            **TINY,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "use_bidirectional_attention": True,
        },
        {"model_type": "bert", **TINY, "is_decoder": False},
    ],
)
def test_a_model_that_sees_later_tokens_is_refused(tokenizer, config):
    with pytest.raises(ConfigError, match="sees later tokens"):
        build_lm(FromConfig(config), tokenizer, seed=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "qwen2", "opt", "mamba", "gemma3_text", "olmo2"])
def test_causal_models_pass_in_training_mode_and_stay_in_it(tokenizer, kind):
    known = {**TINY, "n_embd": 32, "n_layer": 2, "n_head": 2, "head_dim": 16, "num_key_value_heads": 2, "ffn_dim": 64,
             "word_embed_proj_dim": 32, "state_size": 4}  # fmt: skip
    names = set(AutoConfig.for_model(kind).to_dict()) | set(AutoConfig.for_model(kind).attribute_map)
    lm = build_lm(FromConfig({"model_type": kind, **{k: v for k, v in known.items() if k in names}}), tokenizer, seed=0)
    lm.train()
    check_causal(lm)
    assert lm.training


def test_a_model_without_a_cache_is_refused_before_training(tokens_dir, tmp_path):
    config = {"model_type": "openai-gpt", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    with pytest.raises(ConfigError, match="no key-value cache, which phf needs to sample and judge"):
        train_tiny(tokens_dir, tmp_path / "r", steps=1, model=FromConfig(config))
    assert not (tmp_path / "r").exists()


def test_a_model_that_cannot_fit_is_refused_before_it_is_built(tokenizer):
    with pytest.raises(ConfigError, match=r"6,\d{3},\d{3},\d{3} parameters; training it takes at least 1\d\d GB"):
        build_lm(FromConfig({"model_type": "llama"}), tokenizer, seed=0)


@pytest.mark.parametrize("name, millions", [("tiny", 1), ("small", 26), ("gpt2", 86)])
def test_models_have_names(tokenizer, name, millions):
    assert validate(name, AnyModel) == FromConfig(MODELS[name])
    deeper = validate({"name": name, "config": {"attention_dropout": 0.5}}, AnyModel)
    assert deeper == FromConfig(MODELS[name] | {"attention_dropout": 0.5})
    settings = {k: v for k, v in MODELS[name].items() if k != "model_type"}
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(MODELS[name]["model_type"], **settings))
    assert num_parameters(lm, embeddings=False) / 1e6 == pytest.approx(millions, rel=0.2)


def test_layers_between_trunk_and_output_are_applied(tokenizer):
    config = {"model_type": "modernbert-decoder", **TINY, "max_position_embeddings": 64}
    lm = build_lm(FromConfig(config), tokenizer, seed=0)  # its class must have a padding token, which nobody gave
    assert logit_shape(lm).scale == 1
    from phf.objectives import MLE
    from phf.training.model import PHFModel

    ids = torch.arange(24).reshape(2, 12) % 300
    with torch.no_grad():
        logits = lm(input_ids=ids).logits
        found = PHFModel(lm, MLE())(ids, ids.roll(-1, 1), torch.zeros(2, 12), torch.ones(2, 12, dtype=torch.bool))[
            "loss"
        ]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten())
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=1e-5, atol=1e-6)


def test_the_vocabularies_decide_whether_a_store_fits_a_model(tmp_path):
    own = train_bpe(["some text to train on"] * 20, 265)
    other = train_bpe(["quite another text, with other pairs of letters"] * 20, 265)
    assert len(other) == len(own)
    save_lm(build_lm(FromConfig(TINY_LLAMA), own, seed=0), tmp_path)
    own.save_pretrained(str(tmp_path))
    build_lm(FromWeights(str(tmp_path)), own, seed=0)
    with pytest.raises(ConfigError, match="made with another tokenizer than model"):
        build_lm(FromWeights(str(tmp_path)), other, seed=0)
    lower = copy.deepcopy(own)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ConfigError, match="they cut texts differently"):
        build_lm(FromWeights(str(tmp_path)), lower, seed=0)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
            "Git LFS pointer",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100), "cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "cannot be read"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer .* cannot be read"),
        (lambda f: _edit(f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}), "quantised"),
        (
            lambda f: _edit(f / "config.json", model_type="new", auto_map={"AutoConfig": "c.C"}),
            "Python code that comes with it",
        ),
        (lambda f: _edit(f / "config.json", vocab_size=200), "model"),
        (lambda f: _own_code(f), "Python code that comes with it"),
        (lambda f: _edit(f / "config.json", _attn_implementation="kernels-community/x"), "asks for the attention"),
        (lambda f: _edit(f / "config.json", num_hidden_layers=-1), "num_hidden_layers is -1"),
        (lambda f: _edit(f / "config.json", max_position_embeddings=0), "max_position_embeddings is 0"),
    ],
)
def test_broken_models_are_one_message(tokenizer, tmp_path, change, message):
    save_lm(build_lm(FromConfig(TINY_LLAMA), tokenizer, seed=0), tmp_path)
    tokenizer.save_pretrained(str(tmp_path))
    change(tmp_path)
    with pytest.raises(ConfigError, match=message) as error:
        load_model(tmp_path)
    assert len(str(error.value)) < 600


def test_layers_that_are_not_known_between_trunk_and_output_are_refused(tokenizer):
    """A BERT with a decoder's mask has a transformation inside of its head."""
    lm = build_lm(FromConfig({"model_type": "bert", **TINY, "is_decoder": True}), tokenizer, seed=0)
    with pytest.raises(ConfigError, match="in a way that phf does not know"):
        logit_shape(lm)


def test_what_a_models_own_code_raises_is_one_message(tokenizer, monkeypatch):
    lm = build_lm(FromConfig(TINY_LLAMA), tokenizer, seed=0)
    monkeypatch.setattr(type(lm), "forward", lambda *args, **named: 1 / 0)
    for check in (check_causal, logit_shape):
        with pytest.raises(ConfigError, match="cannot run with its config: ZeroDivisionError"):
            check(lm)


def test_a_tokenizer_that_cannot_be_released_is_refused_before_training(tokenizer):
    roles = Roles({"good": "<|good|>", "bad": "<|bad|>"}, ("good",), ("bad",))
    broken = copy.deepcopy(tokenizer)
    for each in (tokenizer, broken):
        add_control_tokens(each, list(roles.tokens.values()))
    try_start(tokenizer, roles, "llama")
    broken.backend_tokenizer.decoder = decoders.Fuse()  # leaves the letters that stand for bytes
    with pytest.raises(ReleaseError, match="decodes the tokens"):
        try_start(broken, roles, "llama")


def _own_code(folder):
    (folder / "own.py").write_text("class Own: pass\n")
    _edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "own.Own"})


def _edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
