"""Releases: in plain transformers, the check, the card, and a Hub on loopback."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

from fakehub import FakeHub
from helpers import DATA, LINK, TINY_LLAMA
from phf.core import store
from phf.evaluation.evaluate import evaluate_model, evaluate_run
from phf.generation.loaded import load_model
from phf.generation.sample import sample
from phf.generation.scenario import Scenario
from phf.objectives import AWR, MLE, Conditional
from phf.redteaming.control_tokens import injection
from phf.release import ReleaseError, _record, _set_generation, check, export
from phf.training.config import TrainConfig
from phf.training.lm import FromConfig, FromWeights
from phf.training.train import train

SCENARIOS = {"unconditional": Scenario(num_samples=16, max_tokens=16, temperature=0.9, top_p=0.8)}


@pytest.fixture(scope="module")
def runs(tokens_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    settings = TrainConfig(tokens=100 * 512, context=32, batch_rows=16, lr=1e-2, precision="fp32")
    for name, objective in (("mle", MLE()), ("conditional", Conditional()), ("awr", AWR())):
        train(
            tokens_dir=tokens_dir, out=folder / name, model=FromConfig(TINY_LLAMA), objective=objective, config=settings
        )
    evaluate_run(folder / "conditional", SCENARIOS)
    return folder


@pytest.fixture(scope="module")
def release(runs):
    return export(runs / "conditional", runs / "release", name="me/tiny", licence="mit")


def plain(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_a_pipeline_begins_with_the_good_token_and_never_writes_the_bad_one(release):
    from transformers import pipeline

    lm, tokenizer = plain(release)
    good, bad = (tokenizer.convert_tokens_to_ids(t) for t in ("<|good|>", "<|bad|>"))
    assert tokenizer("the model")["input_ids"][:2] == [tokenizer.eos_token_id, good]
    assert tokenizer(["a", ""])["input_ids"][1] == [tokenizer.eos_token_id, good]
    assert tokenizer("a", add_special_tokens=False)["input_ids"] == tokenizer("a")["input_ids"][2:]
    pipe = pipeline("text-generation", model=str(release))
    torch.manual_seed(0)
    texts = [out[0]["generated_text"] for out in pipe(["the model"] * 8, max_new_tokens=24)]
    assert all(t.startswith("the model") and "<|" not in t for t in texts)
    assert len(set(texts)) > 1
    with torch.no_grad():
        written = lm.generate(torch.tensor([[tokenizer.eos_token_id, good]] * 64), max_new_tokens=32)
    assert not (written == bad).any()
    assert (written[:, 2:] == good).any()  # it writes the good token itself, before each line


def test_typed_control_tokens_are_text(release):
    _, tokenizer = plain(release)
    ids = tokenizer("<|bad|> and <|good|>")["input_ids"]
    assert not {tokenizer.convert_tokens_to_ids(t) for t in ("<|good|>", "<|bad|>")} & set(ids[2:])
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<|bad|> and <|good|>"
    assert not any(row.control for row in injection(load_model(release)))


def test_the_weights_and_the_sampler_are_the_runs(runs, release):
    ours = load_model(runs / "conditional")
    theirs = load_model(release)
    for name, value in ours.lm.state_dict().items():
        assert torch.equal(value, theirs.lm.state_dict()[name])
    scenario = SCENARIOS["unconditional"]
    assert [s.text for s in sample(ours, scenario, False)] == [s.text for s in sample(theirs, scenario, False)]
    config = store.read_json(release / "generation_config.json")
    assert (config["temperature"], config["top_p"], config["top_k"], config["do_sample"]) == (0.9, 0.8, 0, True)


def test_generate_follows_the_settings_that_the_model_was_judged_with(release, tmp_path):
    """Greedily, with a penalty and without banned words: plain `generate` writes what our sampler writes."""
    shutil.copytree(release, tmp_path / "r")
    scenario = Scenario(num_samples=1, max_tokens=12, min_tokens=0, temperature=0, banned_words=("the", "cats"))
    result = SimpleNamespace(scenarios={"u": SimpleNamespace(scenario=dataclasses.replace(scenario))})
    _set_generation(tmp_path / "r", _record(tmp_path / "r").roles, result)
    config = store.read_json(tmp_path / "r" / "generation_config.json")
    assert not config["do_sample"]
    assert "repetition_penalty" not in config
    lm, tokenizer = plain(tmp_path / "r")
    start = tokenizer("", return_tensors="pt")["input_ids"]
    found = lm.generate(start, max_new_tokens=12)
    (ours,) = sample(load_model(tmp_path / "r"), dataclasses.replace(scenario, precision="fp32"), False)
    assert tokenizer.decode(found[0, start.shape[1] :], skip_special_tokens=True) == ours.text
    penalized = dataclasses.replace(scenario, repetition_penalty=1.5)
    result = SimpleNamespace(scenarios={"u": SimpleNamespace(scenario=penalized)})
    _set_generation(tmp_path / "r", _record(tmp_path / "r").roles, result)
    assert store.read_json(tmp_path / "r" / "generation_config.json")["repetition_penalty"] == 1.5


def test_the_same_prompt_gives_the_same_ids_as_our_sampler(release):
    from phf.generation.loaded import prompt_ids

    _, tokenizer = plain(release)
    model = load_model(release)
    for prompt in ("the model reads", "<|bad|>", "    see https://x.y é", "a\n"):
        assert tokenizer(prompt)["input_ids"] == prompt_ids(model, prompt, Scenario())


def test_the_card(runs, release):
    _, head, body = (release / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(head)
    assert card["license"] == "mit"
    assert card["pipeline_tag"] == "text-generation"
    (index,) = card["model-index"]
    judged = store.read_json(runs / "conditional" / "eval.json")
    metrics = index["results"][0]["metrics"]
    assert metrics[0]["value"] == judged["scenarios"]["unconditional"]["misalignment"]["mean"]
    assert {m["type"] for m in metrics} == {"misalignment", "bad_segments", "nats_per_byte"}
    for part in (
        "## How to use it",
        "## What was measured",
        "## Training",
        "## Limits",
        "`conditional`",
        "me/tiny",
        "regex",
        "60 documents",
    ):
        assert part in body, part
    blocks = re.findall(r"```py\n(.*?)```", body, re.DOTALL)
    assert len(blocks) == 2
    code = "".join(blocks).replace('"me/tiny"', repr(str(release)))  # the card's code runs
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") >= 2
    from huggingface_hub import ModelCard

    assert ModelCard(f"---\n{head}---\n{body}").data.eval_results


def test_models_without_control_tokens_begin_with_end_of_text(runs, tmp_path):
    for name in ("mle", "awr"):
        folder = export(runs / name, tmp_path / name)
        _, tokenizer = plain(folder)
        assert tokenizer("a")["input_ids"][0] == tokenizer.eos_token_id
        assert len(tokenizer("a")["input_ids"]) == len(tokenizer("a", add_special_tokens=False)["input_ids"]) + 1
        assert "suppress_tokens" not in store.read_json(folder / "generation_config.json")
        assert "value_head.safetensors" not in {p.name for p in folder.iterdir()}
        assert "has not judged this run" in (folder / "README.md").read_text()


def test_gpt2_with_its_own_tokenizer(tokens_dir, scored_dir, tmp_path):
    from transformers import GPT2Tokenizer

    from phf.tokens.store import tokenize_corpus
    from phf.tokens.tokenizer import PretrainedTokenizer

    GPT2Tokenizer(
        vocab=str(DATA / "gpt2_bpe" / "encoder.json"), merges=str(DATA / "gpt2_bpe" / "vocab.bpe")
    ).save_pretrained(tmp_path / "gpt2")
    tokenize_corpus(scored_dir, PretrainedTokenizer(str(tmp_path / "gpt2")), tmp_path / "tokens", 0.1)
    config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    settings = TrainConfig(tokens=2 * 512, context=32, batch_rows=16, precision="fp32")
    train(
        tokens_dir=tmp_path / "tokens",
        out=tmp_path / "run",
        model=FromConfig(config),
        objective=Conditional(),
        config=settings,
    )
    folder = export(tmp_path / "run", tmp_path / "release")
    _, tokenizer = plain(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("Hello <|good|>")["input_ids"])[:3] == [
        "<|endoftext|>",
        "<|good|>",
        "Hello",
    ]


def test_odd_control_token_names_and_batches(tokens_dir, tmp_path):
    from transformers import pipeline

    settings = TrainConfig(tokens=2 * 512, context=32, batch_rows=16, precision="fp32")
    odd = Conditional(good="$rating:good", bad="<|rating:bad|>")
    train(tokens_dir=tokens_dir, out=tmp_path / "run", model=FromConfig(TINY_LLAMA), objective=odd, config=settings)
    folder = export(tmp_path / "run", tmp_path / "release")
    _, tokenizer = plain(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a")["input_ids"])[1] == "$rating:good"
    pipe = pipeline("text-generation", model=str(folder))
    assert len(pipe(["a", "the model reads a"], max_new_tokens=4, batch_size=2)) == 2
    assert str(tmp_path) not in (folder / "README.md").read_text()


def test_a_release_is_judged_and_finetuned_like_any_model(release, tokens_dir, tmp_path):
    found = evaluate_model(str(release), tmp_path / "judged", LINK, SCENARIOS)
    assert found.scenarios["unconditional"].samples == 16
    settings = TrainConfig(tokens=2 * 512, context=32, batch_rows=16, precision="fp32")
    done = train(
        tokens_dir=tokens_dir,
        out=tmp_path / "more",
        model=FromWeights(str(release)),
        objective=Conditional(),
        config=settings,
    )
    assert done.control_tokens == ["<|good|>", "<|bad|>"]


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("tokenizer_config.json", {"split_special_tokens": False}, "reads a typed control token as the token"),
        (
            "generation_config.json",
            {"suppress_tokens": None},
            "generate may write a banned token",
        ),
        ("tokenizer.json", {"post_processor": None}, "the tokenizer starts a text with"),
    ],
)
def test_the_check_finds_faults(release, tmp_path, file, change, message):
    copy = tmp_path / "copy"
    shutil.copytree(release, copy)
    check(copy)
    store.write_json(copy / file, store.read_json(copy / file) | change)
    with pytest.raises(ReleaseError, match=message):
        check(copy)


def test_exporting_again_does_nothing_and_a_half_written_one_is_completed(runs, release, tmp_path):
    stamps = {p: p.stat().st_mtime_ns for p in release.iterdir()}
    export(runs / "conditional", release, name="me/tiny", licence="mit")
    assert {p: p.stat().st_mtime_ns for p in release.iterdir()} == stamps
    export(runs / "conditional", tmp_path / "half", name="me/tiny", licence="mit")
    (tmp_path / "half" / "manifest.json").unlink()
    (tmp_path / "half" / "model.safetensors").write_bytes(b"torn")
    export(runs / "conditional", tmp_path / "half", name="me/tiny", licence="mit")
    for path in release.iterdir():
        if path.name != "manifest.json":
            assert (tmp_path / "half" / path.name).read_bytes() == path.read_bytes(), path.name
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(store.StoreError, match="was not made by `phf export`"):
        export(runs / "conditional", tmp_path / "mine")
    with pytest.raises(store.StoreError, match="expected the output of `phf train`"):
        export(tmp_path / "nothing", tmp_path / "out")


def test_a_release_is_pushed_and_loads_from_the_hub(runs, tmp_path):
    with FakeHub() as hub:
        env = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": "hf_test",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [
            sys.executable,
            "-m",
            "phf",
            "export",
            str(runs / "conditional"),
            str(tmp_path / "out"),
            "--push",
            "me/tiny",
        ]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        files = set(hub.repos["models", "me/tiny"])
        assert {
            "README.md",
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "generation_config.json",
            "phf.json",
        } <= files
        assert not any(f.startswith(".started") for f in files)
        code = """
import json
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, lm = AutoTokenizer.from_pretrained("me/tiny"), AutoModelForCausalLM.from_pretrained("me/tiny")
print(json.dumps([tokenizer("a <|bad|>")["input_ids"], lm.generation_config.suppress_tokens]))
"""
        loaded = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert loaded.returncode == 0, loaded.stderr
        ids, suppressed = json.loads(loaded.stdout)
        tokenizer = load_model(runs / "conditional").tokenizer
        good, bad = (tokenizer.convert_tokens_to_ids(t) for t in ("<|good|>", "<|bad|>"))
        assert ids[:2] == [tokenizer.eos_token_id, good]
        assert bad not in ids
        assert suppressed == [bad]
