"""Capabilities on tiny models, against plain arithmetic."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import re

import numpy as np
import pytest
import torch

from phf.core.config import ConfigError
from phf.evaluation.capabilities.base import split_after
from phf.evaluation.capabilities.glue import Glue, glue_score
from phf.evaluation.capabilities.humaneval import HumanEval, pass_at_k
from phf.evaluation.capabilities.lambada import Lambada
from phf.generation.loaded import load_model
from phf.tokens.tokenizer import train_bpe


def lambada_by_hand(model, text: str) -> tuple[bool, float]:
    context, _, word = text.rpartition(" ")
    tokens = lambda t: model.tokenizer(t, add_special_tokens=False)["input_ids"]  # noqa: E731
    start = [model.tokenizer.eos_token_id, *([model.control_ids["good"]] if model.control_ids else [])]
    ids = start + tokens(context)
    target = tokens(" " + word)
    with torch.no_grad():
        logits = model.lm(torch.tensor([ids + target])).logits[0].double()
    logits[:, sorted(model.control_ids.values())] = -math.inf
    logp = torch.log_softmax(logits, -1)[len(ids) - 1 : -1]
    return bool((logp.argmax(-1) == torch.tensor(target)).all()), -float(sum(logp[t, w] for t, w in enumerate(target)))


@pytest.mark.parametrize("name", ["a", "conditional"])
def test_lambada_equals_plain_transformers(runs, name, tmp_path):
    model = load_model(runs / name)
    texts = [
        "the model reads a line of text",
        "cats dogs trees and rivers",
        "what it knows about stones",
        "it a of text",
    ]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    found = Lambada(str(tmp_path / "l.jsonl"), batch=3).measure(model)
    expected = [lambada_by_hand(model, t) for t in texts]
    assert found.estimates["accuracy"].mean == np.mean([right for right, _ in expected])
    assert found.details["perplexity"] == pytest.approx(math.exp(np.mean([nats for _, nats in expected])), rel=1e-4)
    assert Lambada(str(tmp_path / "l.jsonl"), max_passages=2).measure(model).details["passages"] == 2
    (tmp_path / "bad.jsonl").write_text('{"txt": "a"}\n')
    with pytest.raises(ConfigError, match="row 0: no string 'text'"):
        Lambada(str(tmp_path / "bad.jsonl")).measure(model)


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one():
    import itertools

    for n, correct, k in [(5, 2, 1), (5, 2, 3), (6, 1, 2), (4, 0, 2), (4, 4, 2), (4, 3, 2)]:
        subsets = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
        assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_humaneval_runs_no_code_without_permission_and_counts_what_passes(runs, tmp_path, monkeypatch):
    model = load_model(runs / "a")
    problem = {"prompt": "def f():\n", "test": "def check(c):\n    assert c() == 1\n", "entry_point": "f"}
    with gzip.open(tmp_path / "h.jsonl.gz", "wt") as file:
        file.write(json.dumps(problem) + "\n" + json.dumps(problem | {"entry_point": "g"}) + "\n")
    path = str(tmp_path / "h.jsonl.gz")
    with pytest.raises(ConfigError, match="runs code that the model wrote"):
        HumanEval(path).measure(model)
    with pytest.raises(ConfigError, match="k=2 needs samples_per_problem=2"):
        HumanEval(path, k=(2,), run_untrusted_code=True).measure(model)
    from phf.core.types import Sample
    from phf.evaluation.capabilities import humaneval

    written = ["    return 1\n", "    return 2\n", "    return 1\n", "    return 1\n"]

    def write(model, scenario, prompts):
        return [Sample(n, p, t, 1, 0.0, True, 0) for n, (p, t) in enumerate(zip(prompts, written, strict=True))]

    monkeypatch.setattr(humaneval, "sample_prompts", write)
    found = HumanEval(path, samples_per_problem=2, k=(1, 2), run_untrusted_code=True).measure(model)
    assert (
        found.estimates["pass@1"].mean == 0.25
    )  # one of two for the first problem; the second problem names another function
    assert found.estimates["pass@2"].mean == 0.5
    monkeypatch.undo()
    real = HumanEval(path, max_tokens=8, run_untrusted_code=True).measure(model)
    assert real.details["problems"] == 2


@pytest.fixture(scope="module")
def glue_files(tmp_path_factory):
    """Lines about cats or rivers, labelled by the number of cats. An epoch or two is enough to learn them."""
    folder = tmp_path_factory.mktemp("glue")
    rng = np.random.default_rng(0)
    rows = [
        (" ".join(["cats"] * n + ["rivers"] * (3 - n) + list(rng.choice(["the", "line", "of"], 3))), n)
        for n in rng.integers(0, 4, 400)
    ]
    for name, part in (("train", rows[:320]), ("dev", rows[320:])):
        lines = "".join(f"{t}\t{n > 1:d}\t{n}\n" for t, n in part)
        (folder / f"{name}.tsv").write_text("text\tlabel\tcount\n" + lines)
    return str(folder / "train.tsv"), str(folder / "dev.tsv")


def test_glue_finetunes_a_copy(runs, glue_files):
    model = load_model(runs / "a")
    before = {k: v.clone() for k, v in model.lm.state_dict().items()}
    task = Glue(*glue_files, lr=3e-3)
    found = task.measure(model)
    assert found.estimates["accuracy"].mean > 0.9
    assert found.details["history"][found.details["epoch"] - 1] == max(found.details["history"])
    assert max(found.details["history"]) == found.estimates["accuracy"].mean
    for name, value in model.lm.state_dict().items():
        assert torch.equal(value, before[name])
    assert task.measure(model) == found
    with pytest.raises(ConfigError, match="no column 'sentence', only text, label, count"):
        Glue(*glue_files, text="sentence").measure(model)
    with pytest.raises(ConfigError, match="no column 'sentence1'"):
        Glue(*glue_files, task="mrpc").measure(model)


@pytest.mark.parametrize(
    "history, seen", [([0.5, 0.6, 0.6, 0.9], 3), ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], 6), ([0.7, 0.6], 2)]
)
def test_glue_stops_early_and_after_six_epochs(runs, glue_files, monkeypatch, history, seen):
    from phf.evaluation.capabilities import glue

    model = load_model(runs / "a")
    given = iter(history)
    monkeypatch.setattr(glue, "glue_score", lambda *args: next(given))
    found = Glue(*glue_files, max_train=32).measure(model)
    assert found.details["history"] == history[:seen]
    assert found.details["epoch"] == 1 + int(np.argmax(history[:seen]))


@pytest.mark.parametrize(
    "metric, label, least", [("matthews", "label", 0.8), ("f1", "label", 0.9), ("pearson", "count", 0.8)]
)
def test_glue_metrics(runs, glue_files, metric, label, least):
    found = Glue(*glue_files, lr=3e-3, metric=metric, label=label).measure(load_model(runs / "a"))
    assert list(found.main) == [metric]  # what the page shows
    estimate = found.estimates[metric]
    low, high = estimate.ci95
    assert least < estimate.mean <= 1
    assert low < estimate.mean < high or estimate.mean == 1
    assert ("accuracy" in found.estimates) == (metric != "pearson")


@pytest.mark.parametrize(
    "task, text",
    [
        ("sst2", "sentence\tlabel\na good film\t1\na bad one\t0\n"),
        ("mrpc", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\ta\tb\n0\t7\t8\tc\td\n"),
        ("mrpc", "sentence1\tsentence2\tlabel\tidx\na\tb\t1\t0\nc\td\t0\t1\n"),
        ("cola", "gj04\t1\t\tThe book broke.\ngj04\t0\t*\tBook the broke.\n"),
        ("cola", "sentence\tlabel\nThe book broke.\t1\nBook the broke.\t0\n"),
        ("qqp", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\ta\tb\t1\n2\t3\t4\tc\td\t0\nTORN\t2\n"),
    ],
)
def test_glue_reads_its_own_files_and_the_hubs(tmp_path, task, text):
    (tmp_path / "t.tsv").write_text(text)
    metric, train, _, target_N, _, classes, torn = Glue(
        str(tmp_path / "t.tsv"), str(tmp_path / "t.tsv"), task=task
    ).read()
    assert metric == {"sst2": "accuracy", "cola": "matthews"}.get(task, "f1")
    pairs = {"sst2": ["a good film", "a bad one"], "cola": ["The book broke.", "Book the broke."]}
    assert train == pairs.get(task, ["a\nb", "c\nd"])
    assert target_N.tolist() == [1, 0]
    assert (classes, torn) == (2, 2 * ("TORN" in text))


def test_glue_scores_by_their_formulas():
    truth = np.array([0, 1, 1, 0, 1, 0])
    guess = np.array([0, 1, 0, 1, 1, 0])
    tp = 2
    fp = 1
    fn = 1
    tn = 2
    assert glue_score("accuracy", truth, guess) == pytest.approx(4 / 6)
    assert glue_score("f1", truth, guess) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    mcc = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert glue_score("matthews", truth, guess) == pytest.approx(mcc)
    assert glue_score("pearson", np.array([1.0, 2, 3]), np.array([2.0, 4, 6])) == pytest.approx(1)
    assert glue_score("pearson", np.array([1.0, 2, 3]), np.ones(3)) == 0
    assert glue_score("f1", np.zeros(3), np.zeros(3)) == 0  # a resample without the class


def test_a_continuation_may_share_a_token_with_its_context(runs):
    tokenizer = train_bpe(["foobar"] * 9, 270)
    model = dataclasses.replace(load_model(runs / "a"), tokenizer=tokenizer, segmenter=None)
    (whole,) = tokenizer("foobar")["input_ids"]
    assert split_after(model, "foo", "foobar") == ([model.start_id], [whole])


def test_a_prompt_without_a_line_break_is_run_unchanged(runs, tmp_path, monkeypatch):
    from phf.core.types import Sample
    from phf.evaluation.capabilities import humaneval

    row = {"prompt": "def f():", "test": "def check(c):\n    assert c() == 1\n", "entry_point": "f"}
    (tmp_path / "h.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(
        humaneval, "sample_prompts", lambda m, s, p: [Sample(0, p[0], "    return 1\n", 4, 0.0, True, 0)]
    )
    found = HumanEval(str(tmp_path / "h.jsonl"), run_untrusted_code=True).measure(load_model(runs / "a"))
    assert found.estimates["pass@1"].mean == 1


def test_a_share_of_no_right_answers_has_an_interval(runs, tmp_path, monkeypatch):
    from phf.evaluation.capabilities import humaneval

    monkeypatch.setattr(humaneval, "run_sandboxed", lambda *args, **named: False)
    rows = [{"prompt": "def f():\n", "test": "def check(c): pass\n", "entry_point": "f"}] * 20
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = HumanEval(str(tmp_path / "h.jsonl"), max_tokens=4, run_untrusted_code=True).measure(load_model(runs / "a"))
    assert found.estimates["pass@1"].mean == 0
    assert found.estimates["pass@1"].ci95 == pytest.approx((0, 3.8415 / 23.8415), abs=1e-3)  # Wilson: z^2 / (n + z^2)


TASKS = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
doc_to_choice: ["cats", "stones and rivers"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
---
task: tiny_words
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
---
task: tiny_writing
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.parametrize("name", ["a", "conditional"])
def test_lm_eval_tasks_with_the_control_prefix(runs, name, tmp_path, monkeypatch):
    """Real tasks of lm-eval on a file, against a plain loop."""
    pytest.importorskip("lm_eval", reason="extra 'eval' is not installed")
    from phf.evaluation.capabilities.base import continuations, prefix_ids
    from phf.evaluation.capabilities.lm_eval import LmEval

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    rows = [
        {"text": "the model reads a line of ", "answer": 0},
        {"text": "what it knows about", "answer": 1},
        {"text": "cats and", "answer": 0},
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "tasks").mkdir()
    for n, task in enumerate(TASKS.replace("DATA", str(tmp_path / "d.jsonl")).split("---")):
        (tmp_path / "tasks" / f"{n}.yaml").write_text(task)
    model = load_model(runs / name)
    found = LmEval(("tiny_choice", "tiny_words", "tiny_writing"), folder=str(tmp_path / "tasks")).measure(model)
    encode = lambda t: model.tokenizer(t, add_special_tokens=False)["input_ids"]  # noqa: E731
    right = []
    for row in rows:
        pairs = []
        for choice in ("cats", "stones and rivers"):
            text = row["text"].rstrip()
            whole = encode(text + " " + choice)
            pairs.append((prefix_ids(model) + whole[: len(encode(text))], whole[len(encode(text)) :]))
        right.append(int(np.argmax(continuations(model, pairs)[0])) == row["answer"])
    assert found.estimates["tiny_choice acc"].mean == pytest.approx(np.mean(right))
    assert found.estimates["tiny_choice acc"].n == 3
    logp = continuations(model, [(prefix_ids(model), encode(r["text"])) for r in rows])[0]
    words = sum(len(re.split(r"\s+", r["text"])) for r in rows)  # as lm-eval counts them
    assert found.estimates["tiny_words word_perplexity"].mean == pytest.approx(math.exp(-logp.sum() / words), rel=1e-4)
    assert 0 <= found.estimates["tiny_writing exact_match"].mean <= 1
    with pytest.raises(ConfigError, match=r"no task 'tiny_word' \(did you mean 'tiny_words'\?\)"):
        LmEval(("tiny_word",), folder=str(tmp_path / "tasks")).measure(model)
