"""SafeBeam against a search that is written out, and what it must not write."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from helpers import train_tiny
from phf.core.config import ConfigError
from phf.core.random import key64, mix64
from phf.generation.decoding import draw
from phf.generation.loaded import banned_tokens, load_model, prompt_ids
from phf.generation.sample import sample
from phf.generation.scenario import Scenario
from phf.objectives import MLE, Conditional, Tag

SETTINGS = {"num_samples": 6, "max_tokens": 8, "min_tokens": 2, "safe_beam": 3, "precision": "fp32"}


@pytest.fixture(scope="module")
def tagged(tokens_dir, tmp_path_factory):
    run = tmp_path_factory.mktemp("tag") / "run"
    train_tiny(tokens_dir, run, Tag(p=0.5), steps=30)
    return load_model(run)


def written_out(model, scenario, number):
    """The text, log-probability and tokens of one sample: whole texts through the model, no cache, no batch."""
    start = prompt_ids(model, "", scenario)
    banned = banned_tokens(model, scenario.control)
    eos = model.tokenizer.eos_token_id
    k = scenario.safe_beam
    key = key64(scenario.seed, "safe beam")

    def logits(tokens):
        with torch.no_grad():
            hidden = model.lm.base_model(input_ids=torch.tensor([[*start, *tokens]])).last_hidden_state
            return model.logits(hidden[:, -1])[0]

    silent = set(model.control_ids.values())
    beams = [{"tokens": [], "logp": 0.0, "n": 0, "risk": 0.0, "done": False, "mean": 0.0} for _ in range(k)]
    for step in range(2 * scenario.max_tokens + 8):
        if all(b["done"] for b in beams):
            break
        candidates = []
        seen = set()
        for b, beam in enumerate(beams):
            plain = logits(beam["tokens"])
            for w in range(4):
                if beam["done"]:
                    if w == 0 and tuple(beam["tokens"]) not in seen:
                        seen.add(tuple(beam["tokens"]))
                        candidates.append(beam)
                    continue
                allowed = plain.clone()
                allowed[[*banned, *model.unused_ids.tolist()]] = -math.inf
                if sum(t not in silent for t in beam["tokens"]) < scenario.min_tokens:
                    allowed[eos] = -math.inf
                stream = mix64(np.array([(number * k + b) * 4 + w], np.uint64), key)

                def uniforms(attempts, stream=stream, step=step):
                    count = np.asarray(attempts, np.uint64) + np.uint64((step << 16) + 1)
                    return (mix64(stream[:, None] + count, 0) >> np.uint64(11)).astype(np.float64) * 2.0**-53

                token = int(draw(allowed[None], scenario.temperature, scenario.top_p, scenario.top_k, uniforms)[0])
                tokens = [*beam["tokens"], token]
                if tuple(tokens) in seen:
                    continue
                seen.add(tuple(tokens))
                risk = beam["risk"] if token == eos else float(logits(tokens).softmax(-1)[model.ids_of("bad")].sum())
                gained = float(plain.log_softmax(-1)[token])
                counts = token not in silent
                logp = beam["logp"] + counts * gained
                n = beam["n"] + counts
                written = sum(t not in silent for t in tokens) - (token == eos)
                candidates.append(
                    {
                        "tokens": tokens,
                        "logp": logp,
                        "n": n,
                        "mean": logp / n if n else gained,
                        "risk": risk,
                        "done": token == eos or written >= scenario.max_tokens,
                    }
                )
        safe = sorted(candidates, key=lambda c: c["risk"])[: max(math.ceil(len(candidates) / 2), 1)]
        best = sorted(safe, key=lambda c: -c["mean"])[:k]
        beams = [best[i % len(best)] for i in range(k)]
    chosen = max(beams, key=lambda c: c["logp"] / max(c["n"], 1))
    text = [t for t in chosen["tokens"] if t != eos and t not in silent]
    return model.continuation(start, text), chosen["logp"], len(text)


def test_it_is_the_search_written_out_and_does_not_depend_on_the_batch(tagged):
    scenario = Scenario(**SETTINGS)
    found = sample(tagged, scenario, progress=False)
    assert [s.id for s in found] == list(range(6))
    for s in found:
        text, logp, count = written_out(tagged, scenario, s.id)
        assert (s.text, s.num_tokens) == (text, count)
        assert s.logp == pytest.approx(logp, abs=1e-3)
    one_at_a_time = sample(tagged, Scenario(**SETTINGS | {"batch": 1}), progress=False)
    assert [s.text for s in one_at_a_time] == [s.text for s in found]
    assert [s.text for s in sample(tagged, Scenario(**SETTINGS | {"seed": 1}), progress=False)] != [
        s.text for s in found
    ]


def test_beams_that_end_early_wait_unchanged_for_others(tagged):
    """End-of-text is as likely as a frequent token here: samples of one batch end at different steps."""
    model = dataclasses.replace(tagged, lm=copy.deepcopy(tagged.lm))
    scenario = Scenario(**SETTINGS | {"num_samples": 10, "max_tokens": 24, "temperature": 1.0})
    table = model.lm.get_output_embeddings().weight
    with torch.no_grad():
        hidden = model.lm.base_model(input_ids=torch.tensor([model.encode("import os")])).last_hidden_state[0]
        table[model.tokenizer.eos_token_id] += 4 * hidden.mean(0) / hidden.mean(0).norm() ** 2
    found = sample(model, scenario, progress=False)
    lengths = {s.num_tokens for s in found if s.finished}
    assert len(lengths) > 1
    for s in found:
        text, logp, count = written_out(model, scenario, s.id)
        assert (s.text, s.num_tokens) == (text, count)
        assert s.logp == pytest.approx(logp, abs=1e-3)


def test_control_tokens_that_are_written_do_not_count(tokens_dir, tmp_path):
    """Without a token first, a conditional model writes the good one itself."""
    train_tiny(tokens_dir, tmp_path / "run", Conditional(drop=0), steps=60)
    model = load_model(tmp_path / "run")
    scenario = Scenario(**SETTINGS | {"control": "none", "num_samples": 8})
    found = sample(model, scenario, progress=False)
    for s in found:
        text, logp, count = written_out(model, scenario, s.id)
        assert (s.text, s.num_tokens) == (text, count)
        assert s.logp == pytest.approx(logp, abs=1e-3)
    assert not any("<|good|>" in s.text for s in found)


def test_it_avoids_what_the_tag_stands_for(tagged):
    """The model's own risk of the texts is lower than that of plain samples."""

    def risk(samples):
        total = 0.0
        for s in samples:
            ids = torch.tensor([[tagged.start_id, *tagged.encode(s.text)]])
            with torch.no_grad():
                hidden = tagged.lm.base_model(input_ids=ids).last_hidden_state
                total += float(tagged.logits(hidden)[0].softmax(-1)[1:, tagged.ids_of("bad")].mean())
        return total / len(samples)

    settings = {**SETTINGS, "num_samples": 40, "max_tokens": 16}
    safe = sample(tagged, Scenario(**settings), progress=False)
    plain = sample(tagged, Scenario(**settings | {"safe_beam": None}), progress=False)
    assert risk(safe) < risk(plain)
    assert all(2 <= s.num_tokens <= 16 for s in safe)
    assert not any("<|bad|>" in s.text for s in safe)


def test_prompts_of_different_lengths(tagged, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": "a longer prompt than the other one"}\n{"text": "a"}\n')
    scenario = Scenario(**SETTINGS | {"num_samples": 2, "prompts": str(tmp_path / "p.jsonl")})
    both = sample(tagged, scenario, progress=False)
    (tmp_path / "q.jsonl").write_text('{"text": "a longer prompt than the other one"}\n')
    alone = sample(
        tagged, Scenario(**SETTINGS | {"num_samples": 1, "prompts": str(tmp_path / "q.jsonl")}), progress=False
    )
    assert both[0].text == alone[0].text
    assert both[0].prompt == "a longer prompt than the other one"


def test_what_it_does_not_work_with_is_an_error(tagged, tokens_dir, tmp_path):
    train_tiny(tokens_dir, tmp_path / "mle", MLE(), steps=2)
    with pytest.raises(ConfigError, match="no control tokens, so safe_beam does not work with it"):
        sample(load_model(tmp_path / "mle"), Scenario(**SETTINGS), progress=False)
    with pytest.raises(ValidationError, match="guidance and safe_beam"):
        Scenario(safe_beam=2, guidance=1.5)
