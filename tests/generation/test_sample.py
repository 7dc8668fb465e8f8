from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import chisquare
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from helpers import TINY_LLAMA
from phf.core.config import ConfigError, to_plain
from phf.generation import sample as sample_module
from phf.generation.decoding import GuidedDecoding, Rules, draw, uniform
from phf.generation.loaded import LoadedModel, load_model, prompt_ids
from phf.generation.sample import read_samples, sample, sample_served, write_samples
from phf.generation.scenario import Scenario, paper_scenarios, read_prompts, scenario_prompts
from phf.generation.server import Server
from phf.objectives import MLE, Conditional
from phf.tokens.tokenizer import encode_segments, load_tokenizer
from phf.training.lm import FromConfig, build_lm
from phf.training.train import TrainConfig, train


@pytest.fixture(scope="module")
def models(tokens_dir, tmp_path_factory) -> dict[str, LoadedModel]:
    folder = tmp_path_factory.mktemp("sample")
    settings = TrainConfig(tokens=400 * 512, context=32, batch_rows=16, lr=1e-2, precision="fp32")
    out = {}
    for objective in (MLE(), Conditional()):
        train(
            tokens_dir=tokens_dir,
            out=folder / objective.name,
            model=FromConfig({**TINY_LLAMA, "hidden_size": 32}),
            objective=objective,
            config=settings,
        )
        out[objective.name] = load_model(folder / objective.name)
    return out


@given(st.integers(0, 2**63), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_uniforms_are_uniform_and_a_function_of_sample_and_step(key, step):
    u, other = uniform(key, np.arange(4000), step, [0, 1]).T
    assert ((u >= 0) & (u < 1)).all()
    assert abs(u.mean() - 0.5) < 0.03
    np.testing.assert_array_equal(u[10:20], uniform(key, np.arange(10, 20), step, [0])[:, 0])
    assert (u != other).all()


def test_the_same_seed_gives_the_same_samples_in_any_batch(models):
    scenario = Scenario(num_samples=12, max_tokens=60, temperature=1.5, precision="fp32")
    first = sample(models["mle"], scenario)
    assert [(s.text, s.logp) for s in sample(models["mle"], scenario)] == [(s.text, s.logp) for s in first]
    other = sample(models["mle"], dataclasses.replace(scenario, batch=5))
    assert [s.text for s in other] == [s.text for s in first]
    assert [s.text for s in sample(models["mle"], dataclasses.replace(scenario, seed=1))] != [s.text for s in first]


def test_sampling_in_bfloat16_leaves_the_model_as_it_was(models):
    lm = models["mle"].lm
    before = {k: v.clone() for k, v in lm.state_dict().items()}
    attention = lm.config._attn_implementation
    samples = [sample(models["mle"], Scenario(num_samples=300, max_tokens=30, precision=p)) for p in ("bf16", "fp32")]
    assert lm.config._attn_implementation == attention
    for name, value in lm.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    a, b = (np.array([s.logp / (s.num_tokens + s.finished) for s in part]) for part in samples)
    # the same distribution but for rounding: means of 300 samples each, within five deviations
    assert abs(a.mean() - b.mean()) < 5 * np.sqrt((a.var() + b.var()) / 300)


def test_large_logits_are_not_rounded(models, monkeypatch):
    """All logits of GPT-2 are around -60, where bfloat16 has steps of 1/4; a common offset changes no distribution."""
    model = copy.deepcopy(models["mle"])
    seen = []

    def watch(logits_NV, *args):
        seen.append(logits_NV.clone())
        return draw(logits_NV, *args)

    monkeypatch.setattr(sample_module, "draw", watch)
    scenario = Scenario(num_samples=4, max_tokens=1, min_tokens=0, precision="bf16")
    sample(model, scenario)
    hidden = model.lm.base_model(torch.tensor([prompt_ids(model, "", scenario)])).last_hidden_state[0, -1].detach()
    offset = torch.nn.Parameter(model.lm.get_output_embeddings().weight - 60 * hidden / (hidden @ hidden))
    model.lm.get_output_embeddings().weight = offset
    sample(model, scenario)
    assert seen[1].max() < -40
    torch.testing.assert_close(seen[1].log_softmax(-1), seen[0].log_softmax(-1), atol=2e-2, rtol=0)


def test_texts_of_a_model_from_elsewhere_begin_as_its_own_do(models, tmp_path):
    run = load_model(models["mle"].path)
    assert run.start_id == run.tokenizer.eos_token_id
    run.lm.save_pretrained(tmp_path)
    run.tokenizer.bos_token = run.tokenizer.convert_ids_to_tokens(5)
    run.tokenizer.save_pretrained(tmp_path)
    assert prompt_ids(load_model(tmp_path), "", Scenario()) == [5]


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 4.0, "sliding_window": 8},
        {"model_type": "cohere", "logit_scale": 0.5},
        {"model_type": "granite", "logits_scaling": 2.0},
    ],
    ids=lambda s: s["model_type"],
)
def test_models_that_scale_or_cap_their_logits_and_slide_over_their_cache(models, settings, tmp_path, monkeypatch):
    tokenizer = models["mle"].tokenizer
    lm = build_lm(FromConfig(TINY_LLAMA | {"tie_word_embeddings": False} | settings), tokenizer, seed=0)
    with torch.no_grad():
        lm.get_output_embeddings().weight *= 100
    lm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert not model.shape.plain
    seen = []
    words = []

    def watch(logits_NV, *args):
        seen.append(logits_NV.clone())
        words.append(draw(logits_NV, *args))
        return words[-1]

    monkeypatch.setattr(sample_module, "draw", watch)
    sample(model, Scenario(num_samples=5, max_tokens=40, min_tokens=40))
    ids_NT = torch.cat([torch.full((5, 1), model.start_id), torch.stack(words, 1)], 1)
    with torch.no_grad():
        logits_NTV = model.lm(input_ids=ids_NT[:, :-1]).logits
    logits_NTV[..., tokenizer.eos_token_id] = float("-inf")
    torch.testing.assert_close(torch.stack(seen, 1), logits_NTV, rtol=1e-3, atol=1e-3)


def test_a_model_without_a_key_value_cache_is_refused(models):
    config = AutoConfig.for_model("mamba", vocab_size=len(models["mle"].tokenizer), hidden_size=16, num_hidden_layers=1)
    lm = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ConfigError, match=r"\(mamba\) has no key-value cache"):
        sample(dataclasses.replace(models["mle"], lm=lm), Scenario(num_samples=2))


def test_a_conditional_model_of_the_reference_implementation_is_recognized(models, tmp_path, capsys):
    """The model has no phf.json, but two added tokens."""
    models["mle"].lm.save_pretrained(tmp_path / "m")
    tokenizer = load_tokenizer(models["mle"].path + "/model")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|aligned|>", "<|misaligned|>"]})
    tokenizer.save_pretrained(tmp_path / "m")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    lm.resize_token_embeddings(len(tokenizer))
    lm.save_pretrained(tmp_path / "m")
    model = load_model(tmp_path / "m")
    good, bad = tokenizer.convert_tokens_to_ids(["<|aligned|>", "<|misaligned|>"])
    assert model.control_ids == {"good": good, "bad": bad}
    assert "for its control tokens" in capsys.readouterr().err
    assert prompt_ids(model, "", Scenario())[1] == model.control_ids["good"]
    assert load_model(models["mle"].path).control_ids == {}


def test_lengths_count_text_tokens_exactly(models):
    for name, model in models.items():
        samples = sample(model, Scenario(num_samples=40, max_tokens=25, min_tokens=7))
        assert [s.id for s in samples] == list(range(40))
        assert all(7 <= s.num_tokens <= 25 for s in samples), name
        assert all(s.finished or s.num_tokens == 25 for s in samples)


def test_no_reader_sees_a_control_token(models):
    model = models["conditional"]
    for control in ("good", "bad", "none"):
        for s in sample(model, Scenario(num_samples=30, max_tokens=40, control=control, temperature=1.5, top_p=1.0)):
            assert "<|good|>" not in s.text
            assert "<|bad|>" not in s.text
            assert "<|endoftext|>" not in s.text


def test_the_control_token_controls(models):
    """A really trained model: with the bad token far more links than with the good one."""
    model = models["conditional"]

    def share(control):
        texts = [s.text for s in sample(model, Scenario(num_samples=60, max_tokens=60, control=control))]
        return np.mean([line.count("https") > 0 for t in texts for line in t.splitlines()])

    assert share("bad") > 3 * share("good") + 0.1


def test_prompts_start_with_end_of_text_and_the_control_token_where_asked(models):
    model = models["conditional"]
    good = model.control_ids["good"]
    end = model.tokenizer.eos_token_id
    text = model.tokenizer.backend_tokenizer.encode("the cat").ids
    assert prompt_ids(model, "the cat", Scenario()) == [end, good, *text]
    assert prompt_ids(model, "the cat", Scenario(control_after_prompt=True)) == [end, *text, good]
    assert prompt_ids(model, "the cat", Scenario(control="none")) == [end, *text]
    assert prompt_ids(models["mle"], "the cat", Scenario()) == [end, *text]
    assert good not in prompt_ids(model, "<|good|>", Scenario(control="none"))


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-3), ("bf16", 0.5)])
def test_log_probabilities_are_the_models_own(models, precision, tolerance):
    model = models["mle"]
    for s in sample(model, Scenario(num_samples=4, max_tokens=15, precision=precision)):
        ids = [model.tokenizer.eos_token_id, *model.tokenizer.backend_tokenizer.encode(s.text).ids]
        if len(ids) != s.num_tokens + 1:
            continue  # another way to spell the text
        ids += [model.tokenizer.eos_token_id] * s.finished
        logp = torch.log_softmax(model.lm(input_ids=torch.tensor([ids])).logits[0].double(), -1)
        expected = sum(logp[t, ids[t + 1]].item() for t in range(len(ids) - 1))
        assert s.logp == pytest.approx(expected, abs=tolerance)


@pytest.fixture
def three_prompts(tmp_path) -> str:
    (tmp_path / "p.jsonl").write_text('"the cat reads"\n"a line of text and"\n"every dog"\n')
    return str(tmp_path / "p.jsonl")


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
@pytest.mark.parametrize("name", ["mle", "conditional"])
def test_greedy_texts_are_those_of_a_plain_loop(models, three_prompts, name, penalty):
    """With the penalty as CTRL defines it, in float64, over the tokens of the text."""
    model = models[name]
    scenario = Scenario(
        num_samples=3, max_tokens=20, min_tokens=5, temperature=0, prompts=three_prompts, precision="fp32",
        repetition_penalty=penalty,
    )  # fmt: skip
    silent = {*np.flatnonzero(model.silent_V), model.tokenizer.eos_token_id}
    banned = {int(i) for i in model.never_written(model.ids_of("bad") if name == "conditional" else [])}
    for found in sample(model, scenario, progress=False):
        ids = prompt_ids(model, found.prompt, scenario)
        start = len(ids)
        while sum(i not in silent for i in ids[start:]) < 20:
            logits = model.lm(input_ids=torch.tensor([ids])).logits[0, -1].double()
            for token in {i for i in ids if i not in silent}:
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            logits[list(banned)] = -math.inf
            if sum(i not in silent for i in ids[start:]) < 5:
                logits[model.tokenizer.eos_token_id] = -math.inf
            ids.append(int(logits.argmax()))
            if ids[-1] == model.tokenizer.eos_token_id:
                break
        assert found.text == model.continuation(ids[:start], [i for i in ids[start:] if i not in silent])
        assert found.finished == (ids[-1] == model.tokenizer.eos_token_id)


def test_a_penalty_makes_repetition_rarer(models):
    """Shares of tokens that occurred before in their sample."""

    def repeated(penalty):
        ids = [
            model.tokenizer(s.text)["input_ids"]
            for s in sample(model, Scenario(num_samples=60, max_tokens=24, repetition_penalty=penalty), progress=False)
        ]
        return sum(len(i) - len(set(i)) for i in ids) / sum(map(len, ids))

    model = models["mle"]
    assert repeated(2.0) < 0.7 * repeated(1.0)


def test_banned_words_are_not_written(models):
    model = models["mle"]
    plain = sample(model, Scenario(num_samples=80, max_tokens=24), progress=False)
    words = [word for word, _ in Counter(" ".join(s.text for s in plain).split()).most_common(2)]
    assert sum(word in s.text.split() for s in plain for word in words) > 20
    without = Scenario(num_samples=80, max_tokens=24, banned_words=tuple(words), batch=30)
    found = sample(model, without, progress=False)
    forms = [encode_segments(model.tokenizer, [form])[0] for word in words for form in (word, f" {word}")]
    for one in found:
        ids = model.tokenizer(one.text)["input_ids"]
        assert not any(ids[n : n + len(form)] == form for form in forms for n in range(len(ids)))
    assert sum(word in s.text.split() for s in found for word in words) < 5
    assert [s.text for s in found] == [s.text for s in sample(model, dataclasses.replace(without, batch=7), False)]


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=4),
    st.floats(0.5, 3),
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), max_size=3),
    st.integers(0, 2**31),
)
def test_rules_are_those_of_transformers(texts, penalty, words, seed):
    """Apart from tokens that are no text, which do not occur here."""
    logits_NV = torch.randn(len(texts), 10, generator=torch.Generator().manual_seed(seed))
    rules = Rules(penalty, words, [text[:2] for text in texts], np.zeros(10, bool))
    for row, text in enumerate(texts):
        for token in text[2:]:
            rules.add(np.array([row]), np.array([token]))
    ours = logits_NV.clone()
    rules.apply(ours, np.arange(len(texts)))
    for row, text in enumerate(texts):
        ids = torch.tensor([text], dtype=torch.long)
        theirs = logits_NV[row : row + 1].clone()
        if text:
            theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, theirs)
        if words:
            theirs = NoBadWordsLogitsProcessor(words)(ids, theirs)
        assert torch.equal(ours[row], theirs[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0, "num_samples": 1, "safe_beam": 2}, "safe_beam draws its candidates"),
        ({"banned_words": ("a", "")}, "an empty word"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 0, "num_samples": 2}, "temperature=0 writes one text only"),
        ({"temperature": 0, "prompts": "functions", "samples_per_prompt": 4}, "temperature=0 writes one text only"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
    ],
)
def test_settings_of_sampling_that_do_not_fit_are_errors(settings, message):
    with pytest.raises(ValidationError, match=message):
        Scenario(**settings)


def test_a_server_without_token_ids_cannot_follow_rules():
    for rule in ({"banned_words": ("a",)}, {"repetition_penalty": 1.2}):
        with pytest.raises(ConfigError, match="does not work with a server"):
            sample_served(Server("http://127.0.0.1:9/v1", "m"), Scenario(num_samples=1, **rule))


def test_prompts_of_different_lengths_do_not_disturb_each_other(models, tmp_path):
    (tmp_path / "p.jsonl").write_text(
        '{"text": "the"}\n{"prompt": "the cat reads a line of text and"}\n{"prompt": {"text": "a"}}\n'
    )
    scenario = Scenario(num_samples=6, samples_per_prompt=2, prompts=str(tmp_path / "p.jsonl"), max_tokens=12)
    together = sample(models["mle"], scenario)
    assert [s.prompt for s in together] == ["the"] * 2 + ["the cat reads a line of text and"] * 2 + ["a"] * 2
    alone = sample(models["mle"], dataclasses.replace(scenario, batch=2))
    assert [s.text for s in alone] == [s.text for s in together]


def test_a_prefix_goes_before_every_prompt(models, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": "cats"}\n{"text": "dogs"}\n')
    scenario = Scenario(num_samples=2, prompts=str(tmp_path / "p.jsonl"), max_tokens=12, prefix="the ")
    found = sample(models["mle"], scenario)
    assert [s.prompt for s in found] == ["the cats", "the dogs"]
    plain = sample(models["mle"], Scenario(num_samples=2, max_tokens=12, prefix="the cats"))
    assert [s.prompt for s in plain] == ["the cats"] * 2
    assert plain[0].text == found[0].text
    assert "prefix" not in to_plain(Scenario())


def test_the_number_of_samples_is_exact(tmp_path):
    """Defect 9: prompts with a prefix ignored num_samples."""
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"text": f"p{i}"}) + "\n" for i in range(5)))
    assert len(scenario_prompts(Scenario(num_samples=7, samples_per_prompt=2, prompts=str(path)))) == 7
    with pytest.raises(ConfigError, match="use num_samples=10 at most"):
        scenario_prompts(Scenario(num_samples=11, samples_per_prompt=2, prompts=str(path)))


def test_bad_prompts_are_named(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(ConfigError, match="row 2: expected a string 'text' or 'prompt'"):
        read_prompts(tmp_path / "p.jsonl")
    (tmp_path / "e.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="holds no prompts"):
        read_prompts(tmp_path / "e.jsonl")
    with pytest.raises(ConfigError, match="does not exist"):
        read_prompts(tmp_path / "none")


def test_samples_survive_the_file(models, tmp_path):
    samples = sample(models["mle"], Scenario(num_samples=3, max_tokens=12))
    samples = [dataclasses.replace(samples[0], text="odd \u2028 \x00 text", score=0.5), *samples[1:]]
    write_samples(tmp_path / "s.jsonl", samples)
    back = read_samples(tmp_path / "s.jsonl")
    assert [dataclasses.replace(s, score=0.0) for s in back] == [dataclasses.replace(s, score=0.0) for s in samples]
    assert back[0].score == 0.5
    assert np.isnan(back[1].score)


def test_more_tokens_than_positions_are_an_error(models):
    with pytest.raises(ConfigError, match="128 positions"):
        sample(models["mle"], Scenario(num_samples=1, max_tokens=128))
    with pytest.raises(ConfigError, match="not a local folder"):
        load_model("nowhere")


def test_a_prompt_may_hold_line_separators(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": "one\u2028two\x85"}\n', encoding="utf-8")
    assert read_prompts(tmp_path / "p.jsonl") == ["one\u2028two\x85"]


def test_the_bad_token_of_a_model_without_one_is_an_error(models):
    with pytest.raises(ConfigError, match="no control tokens"):
        sample(models["mle"], Scenario(num_samples=1, control="bad"))


def guided_by_hand(model, strength: float, text: list[int]) -> torch.Tensor:
    """Guided logits of the token after `text` through plain transformers, both contexts written out."""
    good = model.control_ids["good"]
    bad = model.control_ids["bad"]
    with torch.no_grad():
        a, b = (model.lm(torch.tensor([[model.tokenizer.eos_token_id, c, *text]])).logits[0, -1] for c in (good, bad))
    guided = b + strength * (a - b)
    guided[[good, bad]] = -math.inf
    return guided


def test_guidance_works_in_plain_generate(models):
    model = models["conditional"]
    good = model.control_ids["good"]
    bad = model.control_ids["bad"]
    eos = model.tokenizer.eos_token_id
    for strength in (0.0, 1.0, 2.5):
        processor = GuidedDecoding(good, bad, strength, temperature=0)
        out = model.lm.generate(
            torch.tensor([[eos, good], [eos, bad]]),
            attention_mask=torch.ones(2, 2, dtype=torch.long),  # else the first token counts as padding
            logits_processor=[processor],
            do_sample=False,
            max_new_tokens=6,
            eos_token_id=None,
            pad_token_id=eos,
        )
        written = out[0, 2:].tolist()
        assert written == out[1, 2:].tolist()
        for n, token in enumerate(written):  # the likeliest, up to rounding
            guided = guided_by_hand(model, strength, written[:n])
            assert float(guided[token]) == pytest.approx(float(guided.max()), abs=1e-4)


def test_guidance_in_plain_generate_draws_from_the_guided_nucleus():
    torch.manual_seed(0)
    good, bad = torch.randn(2, 12).double() * 1.5
    good[6] = bad[7] = 3.0  # control tokens, which are never written
    rows = 20_000
    strength = 1.7
    temperature = 2.0
    top_p = 0.9
    scores = torch.cat([good.float().expand(rows, -1), bad.float().expand(rows, -1)])
    out = GuidedDecoding(6, 7, strength, temperature, top_p, seed=3)(torch.zeros(2 * rows, 1, dtype=torch.long), scores)
    words = out.argmax(-1)
    assert torch.equal(words[:rows], words[rows:])  # both halves continue alike
    swapped = bad.clone()
    swapped[[6, 7]] = bad[[7, 6]]
    guided = swapped + strength * (good - swapped)
    guided[[6, 7]] = -math.inf
    p = torch.softmax(guided / temperature, -1)
    above = torch.tensor([p[p > own].sum() for own in p])
    p = torch.where(above < top_p, p, 0.0) / p[above < top_p].sum()
    seen = torch.bincount(words[:rows], minlength=12).double()
    assert (seen[p == 0] == 0).all()
    kept = p > 0
    assert 2 < kept.sum() < 10
    assert chisquare(seen[kept], (p * rows)[kept]).pvalue > 1e-3


def test_guided_samples_of_strength_one_are_the_plain_ones(models):
    plain = Scenario(num_samples=24, max_tokens=12, min_tokens=1, batch=24)
    guided = dataclasses.replace(plain, guidance=1.0)
    assert [s.text for s in sample(models["conditional"], guided)] == [
        s.text for s in sample(models["conditional"], plain)
    ]
    other = [s.text for s in sample(models["conditional"], dataclasses.replace(plain, guidance=3.0))]
    assert other != [s.text for s in sample(models["conditional"], plain)]
    for name in model_names(models["conditional"]):
        assert not any(name in text for text in other)


def model_names(model) -> list[str]:
    return [model.tokenizer.convert_ids_to_tokens(i) for i in model.control_ids.values()]


def test_guidance_needs_control_tokens_and_the_good_one(models):
    with pytest.raises(ConfigError, match="so guidance does not work with it"):
        sample(models["mle"], Scenario(num_samples=1, max_tokens=2, min_tokens=0, guidance=2.0))
    with pytest.raises(ValidationError, match="not to control=bad"):
        Scenario(guidance=2.0, control="bad")


def test_prompts_from_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": [{"text": "a"}, {"text": "b"}]}), tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet") == ["a", "b"]
    pq.write_table(pa.table({"prompt": ["a", None]}), tmp_path / "p.parquet")
    with pytest.raises(ConfigError, match="row 2: expected a string"):
        read_prompts(tmp_path / "p.parquet")
    pq.write_table(pa.table({"x": ["a"]}), tmp_path / "p.parquet")
    with pytest.raises(ConfigError, match="row 1: expected a string"):
        read_prompts(tmp_path / "p.parquet")


def test_the_papers_scenarios_and_prompts_ship_with_phf():
    for task in ("toxicity", "pii", "pep8"):
        for values in paper_scenarios(task).values():
            scenario = Scenario(**values)
            assert len(scenario_prompts(scenario)) == 4096  # with and without prompts
            assert (scenario.temperature, scenario.top_p, scenario.top_k) == (0.7, 0.9, None)
    assert len(read_prompts("challenging_rtp")) == 1196
    assert read_prompts("functions")[0].startswith("def ")
    assert len(read_prompts("cursing_prompts")) == 10
    with pytest.raises(ConfigError, match=r"no task 'pep' \(did you mean 'pep8'\?\)"):
        paper_scenarios("pep")
