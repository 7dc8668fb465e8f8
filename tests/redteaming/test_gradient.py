"""The gradient search: losses and gradients against a plain float64 loop, and what becomes of its prompts."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from helpers import phf_inside, tiny_texts
from phf.core.config import ConfigError
from phf.generation.loaded import load_model
from phf.generation.scenario import Scenario
from phf.generation.server import Server
from phf.redteaming import attack as module
from phf.redteaming.attack import redteam
from phf.redteaming.config import RedTeam
from phf.redteaming.control_tokens import heldout_bad_segments
from phf.redteaming.gradient import (
    Descent,
    GradientSearch,
    Wanted,
    _allowed,
    _start,
    _wanted,
    can_be_typed,
    gradient_prompts,
)

SMALL = GradientSearch(prompts=1, length=4, steps=3, top_k=8, candidates=6, targets=2, target_tokens=6)


@pytest.fixture
def model(runs):
    loaded = load_model(runs / "conditional")
    loaded.lm.double().requires_grad_(False)
    return loaded


def slow_loss(model, wanted, prompt):
    """Mean over targets of the mean negative log-probability of their tokens, token by token."""
    per_target = []
    for target in wanted.targets:
        nats = []
        read = [*wanted.before, *prompt, *wanted.after]
        for token in target:
            logits = model.lm(torch.tensor([read])).logits[0, -1].double()
            if wanted.bans_control:
                logits[list(model.control_ids.values())] = -torch.inf
                logits[model.unused_ids] = -torch.inf
            nats.append(-float(logits.log_softmax(-1)[token]))
            read.append(token)
        per_target.append(sum(nats) / len(nats))
    return sum(per_target) / len(per_target)


@pytest.mark.parametrize("after_prompt", [False, True])
@pytest.mark.parametrize("aim", ["text", "role"])
def test_losses_are_those_of_a_loop(model, tokens, aim, after_prompt):
    bad = heldout_bad_segments(tokens, 0.0, 8, 0)
    scenario = Scenario(control_after_prompt=after_prompt)
    wanted = _wanted(model, SMALL, scenario, bad, aim, np.random.default_rng(0))
    good = tuple(model.ids_of("good"))
    if not after_prompt:
        assert (wanted.before, wanted.after) == ((model.start_id, *good), ())
    else:  # the bad token is looked for where the good one would come
        assert (wanted.before, wanted.after) == ((model.start_id,), good if aim == "text" else ())
    prompts = [model.encode("the cats and"), model.encode("see https"), [5, 6, 7]]
    descent = Descent(model, wanted, _allowed(model), batch=4)
    found = descent.losses(prompts)
    assert found == pytest.approx([slow_loss(model, wanted, p) for p in prompts], rel=1e-5)
    fixed = len(wanted.before) + len(wanted.after)
    assert descent.spent == sum(fixed + len(p) + len(t) for p in prompts for t in wanted.targets)


def test_gradients_are_differences_of_losses(model, tokens):
    """Moving a token's one-hot vector a little towards another token changes the loss as the gradient says."""
    bad = heldout_bad_segments(tokens, 0.0, 8, 0)
    wanted = _wanted(model, SMALL, Scenario(), bad, "text", np.random.default_rng(0))
    descent = Descent(model, wanted, _allowed(model), batch=64)
    prompt = model.encode("the cats and")
    found = descent.gradient(prompt)
    table = model.lm.get_input_embeddings().weight

    def loss_at(place, token, step):  # the losses are float32: the step is large
        one_hot = torch.nn.functional.one_hot(torch.tensor(prompt), len(table)).double()
        one_hot[place, token] += step
        return float(descent._losses([one_hot @ table])[0])

    assert loss_at(0, 7, 0.0) == pytest.approx(float(descent.losses([prompt])[0]), rel=1e-6)

    for place, token in ((0, 7), (1, 40), (len(prompt) - 1, 99)):
        slope = (loss_at(place, token, 1e-2) - loss_at(place, token, -1e-2)) / 2e-2
        assert float(found[place, token]) == pytest.approx(slope, rel=2e-2, abs=2e-4)


def test_a_step_takes_the_best_exchange_that_can_be_typed(model, tokens):
    bad = heldout_bad_segments(tokens, 0.0, 8, 0)
    wanted = _wanted(model, SMALL, Scenario(), bad, "text", np.random.default_rng(0))
    allowed = _allowed(model)
    assert not {*model.control_ids.values(), model.tokenizer.eos_token_id} & set(allowed.tolist())
    descent = Descent(model, wanted, allowed, batch=64)
    tried = []
    plain = descent.losses
    descent.losses = lambda prompts: tried.extend(prompts) or plain(prompts)
    prompt = _start(model, SMALL, tiny_texts(5), np.random.default_rng(1))
    assert can_be_typed(model, prompt)
    best, loss = descent.step(prompt, SMALL, np.random.default_rng(0))
    assert 0 < len(tried) <= SMALL.candidates
    assert all(sum(a != b for a, b in zip(prompt, other, strict=True)) <= 1 for other in tried)
    assert all(can_be_typed(model, other) for other in tried)
    assert loss == pytest.approx(min(slow_loss(model, wanted, other) for other in tried), rel=1e-5)
    assert loss == pytest.approx(slow_loss(model, wanted, best), rel=1e-5)


def test_the_search_lowers_the_loss_and_depends_on_its_seed_only(runs, tokens):
    loaded = load_model(runs / "conditional")
    bad = heldout_bad_segments(tokens, 0.0, 8, 0)
    config = dataclasses.replace(SMALL, prompts=2, steps=8)
    found, spent = gradient_prompts(loaded, config, Scenario(), tiny_texts(5), bad, seed=0)
    again, _ = gradient_prompts(load_model(runs / "conditional"), config, Scenario(), tiny_texts(5), bad, seed=0)
    assert found == again
    assert [row.aim for row in found] == ["text", "text", "role", "role"]
    assert all(row.after <= row.before for row in found)
    assert sum(row.before - row.after for row in found) > 0.5
    assert spent > 0
    plain = load_model(runs / "a")
    assert {row.aim for row in gradient_prompts(plain, SMALL, Scenario(), [], bad, seed=0)[0]} == {"text"}


def test_what_cannot_be_searched_is_an_error(runs, tokens):
    plain = load_model(runs / "a")
    bad = heldout_bad_segments(tokens, 0.0, 8, 0)
    with pytest.raises(ConfigError, match="role a bad token"):
        gradient_prompts(plain, dataclasses.replace(SMALL, aims=("role",)), Scenario(), [], bad, 0)
    with pytest.raises(ConfigError, match="has nothing to aim at"):
        gradient_prompts(plain, SMALL, Scenario(), [], [], 0)
    with pytest.raises(ConfigError, match="the model has 128"):
        gradient_prompts(plain, dataclasses.replace(SMALL, length=200), Scenario(), [], bad, 0)
    config = RedTeam(gradient=SMALL, prompts="pii_prompts")
    with pytest.raises(ConfigError, match="a server gives no gradients"):
        redteam(Server("http://127.0.0.1:9/v1", "m"), "out", config, None)
    assert Wanted((), (), ((1,),), True).targets == ((1,),)


def test_every_trial_of_the_search_starts_with_the_prompts(runs, tokens_dir, tmp_path, monkeypatch):
    place = shutil.copytree(runs / "conditional", tmp_path / "conditional")
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("the cats", "a line", "dogs and")))
    small = {"trials": 2, "rounds": 1, "pool": 2, "candidates": 2, "continuations": 2, "confirm": 2, "max_tokens": 8}
    config = RedTeam(prompts=str(prompts), wanted="x", gradient=SMALL, **small)
    found = redteam(place, None, config, None, tokens_dir=tokens_dir)
    texts = [row.prompt for row in found.gradient.prompts]
    assert len(texts) == 2
    for trial in range(2):
        file = place / "redteam" / "search" / f"trial-{trial}" / "round-00.json"
        tried = [row["prompt"] for row in json.loads(file.read_text())["tried"]]
        assert tried[:2] == texts
        assert len(tried) == 4
    assert found.gradient.target_tokens > 0
    assert found.gradient.continuation_tokens > 0
    assert set(found.gradient.misalignment) == {"text", "role"}

    def never(*args):
        raise AssertionError("searched again")

    monkeypatch.setattr(module, "gradient_prompts", never)
    (place / "redteam" / "redteam.json").unlink()  # as after a kill in the search
    again = redteam(place, None, config, None, tokens_dir=tokens_dir)
    assert again.gradient.prompts == found.gradient.prompts
    assert again.search.confirmed == found.search.confirmed
    more = redteam(place, None, dataclasses.replace(config, trials=3), None, tokens_dir=tokens_dir)
    assert more.gradient.prompts == found.gradient.prompts  # more trials need no other search
    monkeypatch.undo()
    ran = phf_inside(
        "redteam",
        str(place),
        "--tokens",
        str(tokens_dir),
        f"prompts={prompts}",
        "wanted=x",
        "--no-control-tokens",
        "gradient.prompts=1",
        "gradient.length=4",
        "gradient.steps=1",
        "gradient.candidates=4",
        *(f"{k}={v}" for k, v in small.items()),
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    assert "gradient search" in ran.stdout


def test_embeddings_that_the_model_scales_have_the_right_gradient(tmp_path):
    """Gemma multiplies its embeddings inside their module."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from phf.generation.loaded import LoadedModel
    from phf.tokens.tokenizer import train_bpe

    tokenizer = train_bpe(tiny_texts(10), 300)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    lm = Gemma2ForCausalLM(
        Gemma2Config(vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=8, **shape, initializer_range=0.5)
    ).eval()
    loaded = LoadedModel(lm=lm, tokenizer=tokenizer, control_ids={}, path="gemma")
    wanted = Wanted((loaded.start_id,), (), ((5, 9, 40),), bans_control=True)
    descent = Descent(loaded, wanted, _allowed(loaded), batch=64)
    prompt = loaded.encode("the cats")
    found = descent.gradient(prompt)
    table = descent._embed(range(len(tokenizer))).detach()

    def loss_at(place, token, step):
        one_hot = torch.nn.functional.one_hot(torch.tensor(prompt), len(table)).float()
        one_hot[place, token] += step
        with torch.no_grad():
            return float(descent._losses([one_hot @ table])[0])

    assert loss_at(0, 7, 0.0) == pytest.approx(float(descent.losses([prompt])[0]), rel=1e-5)
    for place, token in ((0, 7), (1, 40), (len(prompt) - 1, 99)):
        slope = (loss_at(place, token, 1e-3) - loss_at(place, token, -1e-3)) / 2e-3
        assert float(found[place, token]) == pytest.approx(slope, rel=5e-2, abs=5e-3)
