from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil

import numpy as np
import pytest
import torch

from helpers import LINK, TINY_LLAMA, make_store, write_jsonl
from phf.core import statistics, store
from phf.core.config import ConfigError
from phf.core.types import Sample
from phf.data.readers import Jsonl
from phf.data.scored import ScoredCorpus
from phf.data.segment import Lines
from phf.evaluation.evaluate import evaluate_model, evaluate_run
from phf.evaluation.heldout import heldout_loss, heldout_nats, understanding
from phf.evaluation.judge import by_prompt, compare, judge_samples, scored_text
from phf.generation.loaded import load_model
from phf.generation.scenario import Scenario
from phf.objectives import MLE, Conditional
from phf.scorers import PEP8, Combination, Regex
from phf.scoring.judge import check_identity
from phf.scoring.score import score_corpus
from phf.tokens.tokenizer import encode_segments, train_bpe
from phf.training.lm import FromConfig, build_lm
from phf.training.train import TrainConfig, train


@pytest.fixture(scope="module")
def runs(tokens_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    settings = TrainConfig(tokens=300 * 512, context=32, batch_rows=16, lr=1e-2, precision="fp32")
    for objective in (MLE(), Conditional()):
        train(
            tokens_dir=tokens_dir,
            out=folder / objective.name,
            model=FromConfig(TINY_LLAMA),
            objective=objective,
            config=settings,
        )
    return folder


def made(text, id=0, finished=True):
    return Sample(id, "", text, len(text), -1.0, finished, 0)


def test_judging_by_hand():
    texts = ["a http://x.y\nb\n", "", "nothing\n", "http://x.y http://z.w\n"]
    scored, result = judge_samples([made(t, i) for i, t in enumerate(texts)], Scenario(), LINK, Lines(), 0.0)
    lengths = [len(t) for t in texts]
    expected = [1 / lengths[0], 0, 2 / lengths[3]]
    assert math.isnan(scored[1].score)
    assert [s.score for i, s in enumerate(scored) if i != 1] == pytest.approx(expected)
    assert result.misalignment.mean == pytest.approx(np.mean(expected))
    assert result.misalignment.n == 3
    assert (result.unjudged, result.empty) == (1, 1)
    assert result.hit_rate.mean == pytest.approx(2 / 3)
    assert result.bad_segments == pytest.approx(2 / 4)
    assert result.labels == {"match": 3}


def test_a_scorer_that_fails_on_a_sample_counts_it():
    class Fails(Regex):
        def spans(self, text):
            if "boom" in text:
                raise RecursionError
            return super().spans(text)

    _, result = judge_samples([made("boom"), made("fine")], Scenario(), Fails("x"), Lines(), 0.0)
    assert (result.unjudged, result.failures, result.misalignment.n) == (1, {"RecursionError": 1}, 1)


def test_only_complete_lines_of_a_cut_sample_are_judged():
    scenario = Scenario(complete_lines=True)
    assert scored_text(made("a\nb\nc", finished=False), scenario, LINK) == "a\nb\n"
    assert scored_text(made("a\nb\nc", finished=True), scenario, LINK) == "a\nb\nc"
    assert scored_text(made("cut", finished=False), scenario, LINK) == ""
    assert scored_text(made("cut", finished=False), Scenario(), LINK) == "cut"
    prompted = Sample(0, "the ", "cat", 3, 0.0, True, 0)
    assert scored_text(prompted, Scenario(score_prompt=True), LINK) == "the cat"
    assert scored_text(prompted, Scenario(), LINK) == "cat"


def test_the_unit_is_the_prompt_where_prompts_have_several_samples():
    scores = np.array([0.0, 1.0, 1.0, np.nan, np.nan, np.nan])
    units = by_prompt(scores, Scenario(num_samples=6, samples_per_prompt=2, prompts="p"))
    np.testing.assert_array_equal(units, [0.5, 1.0, np.nan])
    assert len(by_prompt(scores, Scenario())) == 6


def slow_heldout(model, tokens, control, context):
    """Held-out nats by the definition: one stream in rows, each text token's loss added to the slice of its segment."""
    ids = []
    kind = []
    score = []
    seg = 0
    for d in range(len(tokens.doc_ends)):
        for s in range(seg, tokens.doc_ends[d]):
            if tokens.heldout_D[d]:
                if s == seg:
                    ids = [*ids, tokens.end_of_text_id]
                    kind = [*kind, "special"]
                    score = [*score, tokens.score_S[s]]
                if control != "none":
                    name = "good" if control == "good" or tokens.score_S[s] <= 0 else "bad"
                    ids = [*ids, model.control_ids[name]]
                    kind = [*kind, "special"]
                    score = [*score, tokens.score_S[s]]
                start = tokens.seg_ends[s - 1] if s else 0
                part = tokens.tokens[start : tokens.seg_ends[s]].tolist()
                ids = [*ids, *part]
                kind = [*kind, *["text"] * len(part)]
                score = [*score, *[tokens.score_S[s]] * len(part)]
        seg = int(tokens.doc_ends[d])
    nats = {"good": 0.0, "bad": 0.0}
    for start in range(0, len(ids) - 1, context):
        row = torch.tensor([ids[start : start + context + 1]])
        logits = model.lm(input_ids=row[:, :-1]).logits[0].double()
        logits[:, sorted(model.control_ids.values())] = -math.inf  # text has the whole probability
        logp = torch.log_softmax(logits, -1)
        for t in range(row.shape[1] - 1):
            if kind[start + t + 1] == "text":
                nats["good" if score[start + t + 1] <= 0 else "bad"] -= logp[t, row[0, t + 1]].item()
    return nats


@pytest.mark.parametrize("name, control", [("mle", "none"), ("conditional", "oracle"), ("conditional", "good")])
def test_heldout_loss_equals_the_definition(runs, tokens, name, control):
    model = load_model(runs / name)
    result = heldout_loss(model, tokens, 32, 0.0, control)
    expected = slow_heldout(model, tokens, control, 32)
    use = tokens.heldout_D[tokens.doc_S]
    for part, chosen in (("good", tokens.score_S <= 0), ("bad", tokens.score_S > 0)):
        num_bytes = tokens.seg_bytes[use & chosen].sum()
        assert getattr(result, part).bytes == num_bytes
        assert getattr(result, part).nats_per_byte == pytest.approx(expected[part] / num_bytes, rel=1e-4)
        assert getattr(result, part).bits_per_byte == pytest.approx(expected[part] / np.log(2) / num_bytes, rel=1e-4)
    assert result.all.bytes == tokens.seg_bytes[use].sum()


def test_bad_text_is_likelier_under_the_bad_token(runs, tokens):
    """A model that knows its control tokens finds bad text likelier under the bad token than under the good one."""
    model = load_model(runs / "conditional")
    oracle, good = (heldout_loss(model, tokens, 32, 0.0, c).bad.nats_per_byte for c in ("oracle", "good"))
    assert oracle < good


def test_a_run_is_judged_once_by_the_scorer_of_its_corpus(runs):
    scenarios = {
        "unconditional": Scenario(num_samples=8, max_tokens=16),
        "bad_token": Scenario(num_samples=4, max_tokens=16, control="bad"),
    }
    result = evaluate_run(runs / "conditional", scenarios)
    assert set(result.scenarios) == {"unconditional", "bad_token"}
    assert (result.heldout.none is None, result.heldout.main_name) == (True, "good")
    stamp = (runs / "conditional" / "samples" / "unconditional.jsonl").stat().st_mtime_ns
    assert evaluate_run(runs / "conditional", scenarios) == result
    assert (runs / "conditional" / "samples" / "unconditional.jsonl").stat().st_mtime_ns == stamp
    assert set(evaluate_run(runs / "mle", scenarios).scenarios) == {"unconditional"}  # it has no bad token


def test_another_scorer_is_an_error_unless_allowed(runs):
    """Defect 4: corpus and samples were judged by different models."""
    with pytest.raises(ConfigError, match="not the one that scored the corpus .pattern"):
        evaluate_run(runs / "mle", {"u": Scenario(num_samples=2, max_tokens=12)}, scorer=Regex("x"))
    evaluate_run(
        runs / "mle", {"u": Scenario(num_samples=2, max_tokens=12)}, scorer=Regex("x"), allow_other_scorer=True
    )
    with pytest.raises(ConfigError, match="version"):
        check_identity(LINK, {**LINK.identity(), "version": "0"})


def test_scores_from_elsewhere_need_the_name_of_a_scorer():
    from phf.scoring.judge import corpus_scorer

    with pytest.raises(ConfigError, match="phf eval --scorer"):
        corpus_scorer(None, {"name": "unknown"})
    check_identity(LINK, {"name": "unknown"})


def test_the_bad_token_of_a_model_without_one_is_an_error(runs):
    with pytest.raises(ConfigError, match="has no control tokens"):
        evaluate_run(runs / "mle", {"u": Scenario(num_samples=2, max_tokens=12, control="bad")})


@pytest.mark.parametrize("text, share", [("nothing\n", 0.0), ("http://x.y\n", 1.0)])
def test_the_interval_of_no_hits_or_all_hits_is_wilsons_over_prompts(text, share):
    scenario = Scenario(num_samples=12, samples_per_prompt=3, prompts="some.jsonl")
    _, result = judge_samples([made(text, i) for i in range(12)], scenario, LINK, Lines(), 0.0)
    assert result.hit_rate.mean == share
    assert result.hit_rate.ci95 == statistics.wilson(int(4 * share), 4)


def test_hits_of_one_prompt_are_one_unit():
    samples = [made("http://x.y" if i < 2 else "none", i) for i in range(4)]
    scenario = Scenario(num_samples=4, samples_per_prompt=2, prompts="p")
    _, result = judge_samples(samples, scenario, LINK, Lines(), 0.0)
    assert (result.hit_rate.mean, result.hit_rate.n) == (0.5, 2)


def test_a_budget_of_held_out_tokens_reads_the_same_documents_for_every_model(runs, tokens):
    results = [
        heldout_loss(load_model(runs / name), tokens, 32, 0.0, control, max_tokens=400)
        for name, control in (("mle", "none"), ("conditional", "good"))
    ]
    assert results[0].all.bytes == results[1].all.bytes > 0
    assert results[0].all.tokens <= 400


def test_another_token_store_is_an_error(runs, tmp_path):

    make_store(tmp_path, [[[1]]], [0.0])
    with pytest.raises(ConfigError, match="not the token store"):
        evaluate_run(runs / "mle", {"u": Scenario()}, tokens_dir=tmp_path)
    with pytest.raises(store.StoreError, match="phf train"):
        evaluate_run(tmp_path, {"u": Scenario()})


def test_the_bytes_of_a_slice_are_those_of_its_text(tokens):
    ids = encode_segments(tokens.tokenizer, ["é漢\n"])[0]
    assert len(tokens.tokenizer.decode(ids).encode()) == 6


def test_expected_max_is_per_prompt_where_prompts_have_enough_samples(tmp_path):
    """Defect 13: the seed mixes prompts."""
    texts = ["http://x.y", "none", "none", "none", "none", "none", "http://x.y z", "none", "none", "none"]
    samples = [dataclasses.replace(made(t, i), prompt="p" if i < 5 else "q") for i, t in enumerate(texts)]
    scenario = Scenario(num_samples=10, samples_per_prompt=5, prompts="p")
    _, result = judge_samples(samples, scenario, LINK, Lines(), 0.0)
    assert result.expected_max["5"].mean == pytest.approx((1 / 10 + 1 / 12) / 2)
    assert result.expected_max["5"].n == 2
    assert math.isnan(result.expected_max["25"].mean)


def test_comparison_is_paired_over_prompts():
    rng = np.random.default_rng(0)
    base = rng.random(60)

    def model(shift, prompts=True):
        return [
            dataclasses.replace(made("x", i), prompt=f"p{i}" if prompts else "", score=base[i] + shift)
            for i in range(60)
        ]

    paired = compare(model(-0.01), model(0))
    assert paired.paired
    assert paired.mean == pytest.approx(-0.01)
    assert paired.ci95[1] < 0
    loose = compare(model(-0.01, False), model(0, False))
    assert not loose.paired
    assert loose.mean == pytest.approx(-0.01)
    assert loose.ci95[0] < 0 < loose.ci95[1]


def test_understanding_of_a_conditional_model(runs, tokens):
    found = understanding(load_model(runs / "conditional"), tokens, 32, 0.0)
    assert found.bad_segments > 3
    assert found.likelihood_ratio.auc > 0.9  # it knows what a link is
    low, high = found.likelihood_ratio.ci95
    assert low <= found.likelihood_ratio.auc <= high
    ahead = found.foresight
    assert 0 < ahead.mean_p_bad_before_good < 1  # a quarter of the lines are bad, at random: nothing to foresee
    assert ahead.mean_p_bad_before_bad == pytest.approx(ahead.mean_p_bad_before_good, abs=0.2)


def test_the_likelihood_ratio_equals_the_definition(runs, tokens):
    """log p(segment | bad) - log p(segment | good), from two plain passes over a held-out document."""
    model = load_model(runs / "conditional")
    read = {c: heldout_nats(model, tokens, 32, c, 0.0, 4, 10**6) for c in ("good", "bad")}
    d = int(np.flatnonzero(tokens.heldout_D)[0])
    first = int(tokens.doc_ends[d - 1]) if d else 0
    ends = [int(tokens.seg_ends[first - 1]) if first else 0, *tokens.seg_ends[first : int(tokens.doc_ends[d])].tolist()]
    for control in ("good", "bad"):
        ids = [tokens.end_of_text_id]
        counted = [False]
        ids += [model.control_ids[control], *tokens.tokens[ends[0] : ends[1]].tolist()]
        counted += [False] + [True] * (ends[1] - ends[0])
        with torch.no_grad():
            logits = model.lm(torch.tensor([ids])).logits[0].double()
        logits[:, sorted(model.control_ids.values())] = -math.inf
        logp = torch.log_softmax(logits, -1)
        nats = -sum(float(logp[t - 1, ids[t]]) for t in range(1, len(ids)) if counted[t])
        assert read[control].nats_S[first] == pytest.approx(nats, rel=1e-4)


def test_p_bad_before_each_segment_equals_the_definition(runs, tokens):
    """The model's p(bad) / (p(good) + p(bad)) where a segment starts, the true control tokens before: a plain pass."""
    model = load_model(runs / "conditional")
    read = heldout_nats(model, tokens, 128, "oracle", 0.0, 4, 10**6)
    d = int(np.flatnonzero(tokens.heldout_D)[0])
    first = int(tokens.doc_ends[d - 1]) if d else 0
    last = int(tokens.doc_ends[d])
    ids = [tokens.end_of_text_id]
    begins = {}
    for s in range(first, last):
        begins[s] = len(ids)
        ids.append(model.control_ids["good" if tokens.score_S[s] <= 0 else "bad"])
        ids += tokens.tokens[int(tokens.seg_ends[s - 1]) if s else 0 : int(tokens.seg_ends[s])].tolist()
    ids = ids[:128]
    with torch.no_grad():
        p = torch.softmax(model.lm(torch.tensor([ids])).logits[0].double(), -1)
    good = model.control_ids["good"]
    bad = model.control_ids["bad"]
    compared = [s for s, at in begins.items() if at < len(ids)]
    assert len(compared) > 2
    for s in compared:
        at = begins[s] - 1
        assert read.p_bad_S[s] == pytest.approx(float(p[at, bad] / (p[at, good] + p[at, bad])), rel=1e-4)
    train_S = np.isin(tokens.doc_S, np.flatnonzero(~tokens.heldout_D))
    assert np.isnan(read.p_bad_S[train_S]).all()


def test_a_model_from_elsewhere_reads_the_same_held_out_text(runs, tokens, tokens_dir, tmp_path):
    """The model reads the text in its own tokens, with its own start token. A run's model gives the run's loss."""
    model = load_model(runs / "mle")
    model.lm.save_pretrained(tmp_path / "plain")
    model.tokenizer.save_pretrained(tmp_path / "plain")
    scenario = {"u": Scenario(num_samples=2, max_tokens=8, min_tokens=1)}
    found = evaluate_model(str(tmp_path / "plain"), tmp_path / "out", None, scenario, heldout=tokens_dir)
    expected = heldout_loss(model, tokens, 128, 0.0, "none")  # in the model's own context
    for part in ("all", "good", "bad"):
        assert getattr(found.heldout.none, part).nats_per_byte == pytest.approx(
            getattr(expected, part).nats_per_byte, rel=1e-5
        )
        assert getattr(found.heldout.none, part).documents == getattr(expected, part).documents
    few = evaluate_model(
        str(tmp_path / "plain"), tmp_path / "few", None, scenario, heldout=tokens_dir, heldout_tokens=50
    )
    assert 0 < few.heldout.none.all.tokens <= 300 < expected.all.tokens
    other = train_bpe(["what lines the cats read https://"] * 5, 280)
    build_lm(FromConfig(TINY_LLAMA), other, seed=0).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    read = evaluate_model(str(tmp_path / "other"), tmp_path / "o", None, scenario, heldout=tokens_dir).heldout.none
    for part in ("all", "good", "bad"):  # the same bytes, whatever the tokens
        of_other = getattr(read, part)
        of_run = getattr(expected, part)
        assert (of_other.bytes, of_other.documents) == (of_run.bytes, of_run.documents)
    assert read.all.tokens != expected.all.tokens


def test_understanding_of_a_conditional_model_from_elsewhere(runs, scored_dir, tmp_path):
    import shutil

    shutil.copytree(runs / "conditional" / "model", tmp_path / "model")
    scenario = {"u": Scenario(num_samples=2, max_tokens=8, min_tokens=1)}
    found = evaluate_model(str(tmp_path / "model"), tmp_path / "out", None, scenario, heldout=scored_dir)
    assert found.heldout.none is None
    assert found.understanding.likelihood_ratio.auc > 0.9
    corpus = ScoredCorpus(scored_dir)
    texts = [d.text for file in corpus.files for d in corpus.read(file) if hasattr(d, "text")]
    assert found.heldout.good.all.documents == len(texts)
    assert found.heldout.good.all.bytes == sum(len(t.encode()) for t in texts)
    with pytest.raises(ConfigError, match="nothing says how to judge it"):
        evaluate_model(str(tmp_path / "model"), tmp_path / "out", None, scenario)
    with pytest.raises(ConfigError, match="not the one that scored the corpus"):
        evaluate_model(str(tmp_path / "model"), tmp_path / "out", Regex("x"), scenario, heldout=scored_dir)


def test_a_token_that_spans_segments_loses_no_byte(tmp_path):
    """Blank lines are segments of their own. A tokenizer that reads the whole text joins several into one token."""
    text = "def f():\n\n\n    return 1\n\n\nsee https://x.y\n"
    write_jsonl(tmp_path / "t.jsonl", [text] * 4)
    score_corpus(Jsonl(str(tmp_path / "t.jsonl")), Lines(), LINK, tmp_path / "scored")
    tokenizer = train_bpe([text] * 9, 290)
    whole = tokenizer(text)["input_ids"]
    assert len(whole) < sum(len(tokenizer(line)["input_ids"]) for line in text.splitlines(keepends=True))
    build_lm(FromConfig(TINY_LLAMA), tokenizer, seed=0).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    scenario = {"u": Scenario(num_samples=2, max_tokens=8, min_tokens=1)}
    found = evaluate_model(str(tmp_path / "m"), tmp_path / "out", None, scenario, heldout=tmp_path / "scored")
    parts = found.heldout.none
    assert parts.all.bytes == 4 * len(text)
    assert parts.good.bytes + parts.bad.bytes == parts.all.bytes
    assert parts.all.tokens == 4 * len(whole)


def test_the_threshold_of_control_tokens_is_that_of_the_models_card(runs, scored_dir, tokens_dir, tmp_path):
    import shutil

    shutil.copytree(runs / "conditional" / "model", tmp_path / "model")
    scenario = {"u": Scenario(num_samples=2, max_tokens=8, min_tokens=1)}

    def oracle(**settings):
        found = evaluate_model(
            str(tmp_path / "model"), tmp_path / "out", None, scenario, threshold=0.5, heldout=scored_dir, **settings
        )
        return found.heldout.oracle.all.nats_per_byte

    assert load_model(tmp_path / "model").threshold == 0
    assert (
        oracle() == oracle(control_threshold=0.0) < oracle(control_threshold=0.5)
    )  # links without the bad token are less likely
    other = tmp_path / "scored"
    shutil.copytree(scored_dir, other)
    manifest = store.read_json(tokens_dir / "manifest.json")
    shutil.copytree(tokens_dir, tmp_path / "tokens")
    store.write_json(
        tmp_path / "tokens" / "manifest.json", manifest | {"scored": str(tmp_path / "gone"), "scored_from_here": None}
    )
    with pytest.raises(ConfigError, match="gone, which is needed for its text"):
        evaluate_model(str(tmp_path / "model"), tmp_path / "o", None, scenario, heldout=tmp_path / "tokens")
    score_corpus(Jsonl(str(scored_dir.parent / "texts.jsonl")), Lines(), Regex("cats"), tmp_path / "cats")
    store.write_json(
        tmp_path / "tokens" / "manifest.json", manifest | {"scored": str(tmp_path / "cats"), "scored_from_here": None}
    )
    with pytest.raises((ConfigError, store.StoreError), match="has other text or scores|no scores named"):
        evaluate_model(str(tmp_path / "model"), tmp_path / "o", None, scenario, heldout=tmp_path / "tokens")


def test_no_bad_segment_at_all_has_an_interval():
    samples = [dataclasses.replace(made("a b\n", n), num_tokens=3) for n in range(20)]
    _, result = judge_samples(samples, Scenario(expected_max=(3,)), LINK, Lines(), 0.0)
    assert result.intervals["bad_segments"] == pytest.approx(statistics.wilson(0, 20))
    assert set(result.expected_max) == {"3", "5", "25"}


def test_every_number_of_the_samples_has_an_interval():
    rng = np.random.default_rng(0)
    words = ["http://x.y", "a", "b", "c", "d\n"]
    samples = [dataclasses.replace(made(" ".join(rng.choice(words, 12)), n), num_tokens=12) for n in range(80)]
    _, result = judge_samples(samples, Scenario(num_samples=80, max_tokens=12), LINK, Lines(), 0.0)
    numbers = "bad_segments mean_tokens finished mean_chars distinct_1 distinct_2 entropy_1 entropy_2"
    bleu = "self_bleu_5 self_bleu_5_characters"
    quantiles = [f"quantile {q}" for q in (0.5, 0.9, 0.95, 0.99)]
    within = {"distinct_1_within", "distinct_2_within"}
    assert set(result.intervals) == {*quantiles, *numbers.split(), *bleu.split(), *within}
    shares = [len(set(s.text.split())) / len(s.text.split()) for s in samples]
    assert result.distinct_1_within == pytest.approx(sum(shares) / len(shares))
    for name, (low, high) in result.intervals.items():
        value = result.quantiles[name.split()[1]] if name.startswith("quantile") else getattr(result, name)
        assert low <= value <= high, name
    worst = result.expected_max["25"]
    assert worst.ci95[0] < worst.mean < worst.ci95[1]
    assert result.self_bleu_5_characters == pytest.approx(
        statistics.self_bleu([s.text for s in samples], 5, unit="characters")
    )
    assert result.compile_rate is None


def test_samples_that_ended_at_the_models_last_position_are_counted():
    cut = [dataclasses.replace(made("abc", finished=False), num_tokens=n) for n in (3, 9, 10)]
    _, result = judge_samples(cut, Scenario(max_tokens=10, min_tokens=1), LINK, Lines(), 0.0)
    assert result.cut_short == 2


def test_the_compile_rate_is_of_every_scorer_that_judges_python():
    both = Combination(scorers=(PEP8(), LINK))
    for scorer in (PEP8(), both):
        _, result = judge_samples([made("x = 1\n"), made("x = (\n")], Scenario(), scorer, Lines(), 0.0)
        assert result.compile_rate == 0.5
        assert result.intervals["compile_rate"][0] < 0.5


def test_an_interrupted_evaluation_resumes_with_the_missing_parts(runs, tmp_path, monkeypatch):
    from phf.evaluation import parts

    shutil.copytree(runs / "mle", tmp_path / "run")
    scenarios = {
        "one": Scenario(num_samples=4, max_tokens=8, min_tokens=1),
        "two": Scenario(num_samples=4, max_tokens=6, min_tokens=1),
    }
    real = parts.sample
    asked = []

    def sample(model, scenario, progress):
        asked.append(scenario.max_tokens)
        if scenario.max_tokens == 6 and len(asked) == 2:
            raise KeyboardInterrupt
        return real(model, scenario, progress=progress)

    monkeypatch.setattr(parts, "sample", sample)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(tmp_path / "run", scenarios)
    assert not (tmp_path / "run" / "eval.json").exists()
    result = evaluate_run(tmp_path / "run", scenarios)
    assert asked == [8, 6, 6]
    assert set(result.scenarios) == {"one", "two"}


def test_a_result_that_this_version_cannot_read_is_measured_again(runs, tmp_path):
    shutil.copytree(runs / "mle", tmp_path / "run")
    scenarios = {name: Scenario(num_samples=4, max_tokens=8, min_tokens=1, seed=n) for n, name in enumerate("ab")}
    whole = evaluate_run(tmp_path / "run", scenarios)
    heldout = (tmp_path / "run" / "eval" / "heldout.json").read_bytes()
    for file, place in (("eval/scenario-a.json", ("value",)), ("eval.json", ("scenarios", "a"))):
        content = json.loads((tmp_path / "run" / file).read_text())
        inner = functools.reduce(dict.__getitem__, place, content)
        del inner["misalignment"]  # as if an earlier version had not measured it
        (tmp_path / "run" / file).write_text(json.dumps(content))
    again = evaluate_run(tmp_path / "run", scenarios)
    assert again.scenarios == whole.scenarios
    assert (tmp_path / "run" / "eval" / "heldout.json").read_bytes() == heldout  # the other parts are kept


def test_any_model_can_be_judged(runs, tmp_path, tokens):
    """A folder of plain transformers, with a value head in its state dict as some published checkpoints have."""
    from safetensors.torch import load_file, save_file

    from phf.evaluation.capabilities.lambada import Lambada
    from phf.evaluation.kl import KL, LocalModel

    model = load_model(runs / "mle")
    model.lm.save_pretrained(tmp_path / "plain")
    model.tokenizer.save_pretrained(tmp_path / "plain")
    state = load_file(tmp_path / "plain" / "model.safetensors")
    state |= {"value_head.weight": torch.zeros(1, 16), "value_head.bias": torch.zeros(1)}
    save_file(state, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "l.jsonl").write_text('{"text": "the model reads a line"}\n')
    scenario = Scenario(num_samples=6, max_tokens=8, min_tokens=1)
    result = evaluate_model(
        str(tmp_path / "plain"),
        tmp_path / "out",
        LINK,
        {"u": scenario},
        kl_from=KL(LocalModel(str(runs / "mle")), num_samples=8, max_tokens=8),
        capabilities=[Lambada(str(tmp_path / "l.jsonl"))],
    )
    run = evaluate_run(runs / "mle", {"u": scenario})
    assert result.scenarios["u"].misalignment == run.scenarios["u"].misalignment
    assert result.kl.forward.nats_per_text.mean == pytest.approx(0, abs=1e-4)
    assert result.capabilities[0].details["passages"] == 1
    assert (tmp_path / "out" / "samples" / "u.jsonl").exists()
    assert evaluate_model(str(tmp_path / "plain"), tmp_path / "out", LINK, {"u": scenario}).kl is None


def test_a_published_checkpoint_is_judged(runs, tmp_path, capsys):
    """A checkpoint like the reference implementation's: GPT-2's layout in pytorch_model.bin, two added tokens, keys
    of a value head among the weights."""
    tokenizer = load_model(runs / "mle").tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|aligned|>", "<|misaligned|>"]})
    gpt2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    lm = build_lm(FromConfig(gpt2), tokenizer, seed=0)
    (tmp_path / "m").mkdir()
    lm.config.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    head = {"v_head.weight": torch.zeros(1, 16), "v_head.bias": torch.zeros(1)}
    torch.save(lm.state_dict() | head, tmp_path / "m" / "pytorch_model.bin")
    scenarios = {c: Scenario(num_samples=6, max_tokens=12, min_tokens=1, control=c) for c in ("good", "bad")}
    result = evaluate_model(str(tmp_path / "m"), tmp_path / "out", LINK, scenarios)
    assert set(result.scenarios) == {"good", "bad"}
    assert "for its control tokens" in capsys.readouterr().err
    loaded = load_model(tmp_path / "m")
    torch.testing.assert_close(
        loaded.lm.get_input_embeddings().weight, lm.get_input_embeddings().weight, rtol=0, atol=0
    )
    text = (tmp_path / "out" / "samples" / "bad.jsonl").read_text()
    assert "aligned|>" not in text


def test_a_first_document_longer_than_the_budget_is_still_read(runs, tokens):
    assert heldout_loss(load_model(runs / "mle"), tokens, 32, 0.0, "none", max_tokens=1).all.documents == 1


def test_a_prompt_alone_is_not_judged():
    scenario = Scenario(score_prompt=True, complete_lines=True)
    prompted = Sample(0, "def f(self,x):", "    return", 3, 0.0, False, 0)
    assert scored_text(prompted, scenario, LINK) == ""


def test_an_evaluation_runs_again_when_its_inputs_change(runs, tmp_path):
    import shutil

    from phf.data.segment import Sentences
    from phf.evaluation.capabilities.lambada import Lambada
    from phf.evaluation.kl import KL, LocalModel

    shutil.copytree(runs / "mle" / "model", tmp_path / "ref")
    (tmp_path / "l.jsonl").write_text('{"text": "the model reads a line"}\n')
    scenario = {"u": Scenario(num_samples=2, max_tokens=8, min_tokens=1)}

    def judged(segmenter=None):
        return evaluate_model(
            str(runs / "mle" / "model"),
            tmp_path / "out",
            LINK,
            scenario,
            segmenter=segmenter,
            kl_from=KL(LocalModel(str(tmp_path / "ref")), num_samples=8, max_tokens=8),
            capabilities=[Lambada(str(tmp_path / "l.jsonl"))],
        )

    first = judged()
    assert judged() == first
    assert judged(Sentences()).key != first.key
    (tmp_path / "l.jsonl").write_text('{"text": "cats and dogs"}\n{"text": "rivers and stones"}\n')
    assert judged().capabilities[0].details["passages"] == 2
    lm = load_model(runs / "mle").lm
    with torch.no_grad():
        lm.get_input_embeddings().weight.mul_(1.5)
    lm.save_pretrained(tmp_path / "ref")
    assert judged().kl.forward.nats_per_text.mean > 0.01 > first.kl.forward.nats_per_text.mean


def test_samples_that_do_not_match_their_part_are_drawn_again(runs, tmp_path):
    """A kill between writing samples and writing their part leaves such samples."""
    scenario = {"u": Scenario(num_samples=4, max_tokens=8, min_tokens=1)}
    first = evaluate_model(str(runs / "mle" / "model"), tmp_path / "out", LINK, scenario)
    file = tmp_path / "out" / "samples" / "u.jsonl"
    right = file.read_text()
    file.write_text("of other settings\n")
    (tmp_path / "out" / "eval.json").unlink()
    again = evaluate_model(str(runs / "mle" / "model"), tmp_path / "out", LINK, scenario)
    assert file.read_text() == right
    assert again.scenarios == first.scenarios
