"""KL from a reference, against plain arithmetic: with a local model, and with servers that work and servers that do
not."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from helpers import LINK, JsonServer, output_of
from phf.cli import main
from phf.core.config import ConfigError
from phf.core.statistics import ratio_of_sums
from phf.data.segment import Documents, Lines
from phf.evaluation.kl import KL, LocalModel, kl, reference_texts, text_logp, text_rows
from phf.generation.loaded import load_model
from phf.generation.server import Server, ServerError
from phf.tokens.tokenizer import train_bpe


def listed(prompt):
    return [prompt] if isinstance(prompt, str) else prompt


def by_hand(model, pieces: list[str], finished: bool) -> float:
    """log p of a text, token by token through plain transformers, with the good token before each piece if there is
    one."""
    good = [model.control_ids["good"]] if model.control_ids else []
    ids = [model.tokenizer.eos_token_id]
    counted = [False]
    for piece in pieces:
        tokens = model.tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += good + tokens
        counted += [False] * len(good) + [True] * len(tokens)
    if finished:
        ids.append(model.tokenizer.eos_token_id)
        counted.append(True)
    with torch.no_grad():
        logits = model.lm(torch.tensor([ids])).logits[0].double()
    logits[:, sorted(model.control_ids.values())] = -math.inf
    logp = torch.log_softmax(logits, -1)
    return sum(float(logp[t - 1, ids[t]]) for t in range(1, len(ids)) if counted[t])


@pytest.mark.parametrize("name", ["a", "conditional"])
def test_whole_text_log_probabilities_equal_plain_ones(runs, name):
    model = load_model(runs / name)
    texts = ["the model reads\n  a line\n", "cats", "", "see https://example.org/x and\n"]
    finished = [True, False, True, False]
    for batch in (1, 3, 64):
        found = text_logp(model, texts, finished, Lines(), batch)
        pieces = [Lines().split(t) for t in texts]  # cut like its training texts
        if model.control_ids:
            pieces[2] = [""]  # an empty text that ends: the good token, then the end
        expected = [by_hand(model, p, f) for p, f in zip(pieces, finished, strict=True)]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="longer than the 128"):
        text_logp(model, ["a b c d e f g " * 60], [True], Lines())


def test_a_model_of_phf_reads_a_text_in_segments_and_other_models_read_it_whole(runs):
    """Two line breaks are one token of many tokenizers, which no model trained on lines has ever read."""
    tokenizer = train_bpe(["a\n\nb\n\n    c\n\n"] * 9, 270)
    model = dataclasses.replace(load_model(runs / "a"), tokenizer=tokenizer)
    assert model.segmenter == Lines()
    text = "a\n\n    c"
    pieces = [i for line in text.splitlines(keepends=True) for i in tokenizer(line)["input_ids"]]
    assert pieces != tokenizer(text)["input_ids"]
    assert text_rows(model, [text], [False], Documents()) == [[model.start_id, *pieces]]
    assert model.encode(text) == pieces
    elsewhere = dataclasses.replace(model, segmenter=None)
    assert text_rows(elsewhere, [text], [False], Lines()) == [[model.start_id, *tokenizer(text)["input_ids"]]]


def test_kl_from_itself_is_zero_and_from_another_model_equals_the_definition(runs, tmp_path):
    a = load_model(runs / "a")
    b = load_model(runs / "b")
    config = KL(LocalModel(str(runs / "a")), num_samples=64, max_tokens=24, reverse=True)
    same = kl(a, config, Lines(), tmp_path)
    for way in ("forward", "reverse"):
        assert getattr(same, way).nats_per_text.mean == pytest.approx(0, abs=1e-4)
    found = kl(b, config, Lines(), tmp_path)
    texts = reference_texts(config, tmp_path)
    difference = np.array(texts.logp) - text_logp(b, texts.texts, texts.finished, Lines())
    assert found.forward.nats_per_text.mean == pytest.approx(difference.mean())
    size = sum(len(t.encode()) for t in texts.texts)
    assert found.forward.nats_per_byte.mean == pytest.approx(difference.sum() / size)
    low, high = found.forward.nats_per_text.ci95
    assert 0 < low < found.forward.nats_per_text.mean < high
    assert found.reverse.nats_per_text.mean > 0


def test_kl_on_a_small_vocabulary_equals_the_sum_over_all_texts(tmp_path):
    """One-token texts of two unigram models: sum p log(p / q), exactly."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(6))
    q = rng.dirichlet(np.ones(6))
    exact = float((p * np.log(p / q)).sum())
    drawn = rng.choice(6, 200_000, p=p)
    estimate = ratio_of_sums(np.log(p / q)[drawn], np.ones(len(drawn)))
    assert estimate.ci95[0] < exact < estimate.ci95[1]
    assert estimate.stderr == pytest.approx(np.log(p / q)[drawn].std() / math.sqrt(len(drawn)), rel=0.01)


def test_a_conditional_model_can_be_compared(runs, tmp_path):
    config = KL(LocalModel(str(runs / "a")), num_samples=32, max_tokens=16)
    found = kl(load_model(runs / "conditional"), config, Lines(), tmp_path)
    assert found.forward.nats_per_text.mean > 0
    assert found.reverse is None


def test_a_conditional_model_is_also_read_with_the_tokens_that_the_scorer_implies(runs, tmp_path):
    model = load_model(runs / "conditional")
    pieces = ["the model reads\n", "see https://example.org/x and\n", "cats"]
    bad = [[False, True, False]]
    ids = [model.tokenizer.eos_token_id]
    counted = [False]
    for piece, worse in zip(pieces, bad[0], strict=True):
        tokens = model.tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += [model.control_ids["bad" if worse else "good"], *tokens]
        counted += [False] + [True] * len(tokens)
    with torch.no_grad():
        logits = model.lm(torch.tensor([ids])).logits[0].double()
    logits[:, sorted(model.control_ids.values())] = -math.inf
    logp = torch.log_softmax(logits, -1)
    expected = sum(float(logp[t - 1, ids[t]]) for t in range(1, len(ids)) if counted[t])
    found = text_logp(model, ["".join(pieces)], [False], Lines(), bad=bad)
    assert found[0] == pytest.approx(expected, rel=1e-5)
    config = KL(LocalModel(str(runs / "a")), num_samples=96, max_tokens=60)
    both = kl(model, config, Lines(), tmp_path, LINK, 0.0)
    assert both.oracle_bad_segments > 5
    # it has learned to write links after the bad token only
    assert both.oracle.nats_per_text.mean < both.forward.nats_per_text.mean
    assert kl(load_model(runs / "b"), config, Lines(), tmp_path, LINK, 0.0).oracle is None


def test_the_cache_is_keyed_by_everything_that_decides_the_texts(runs, tmp_path):
    """Defect 11: the reference implementation's cache ignored the number of samples."""
    base = KL(LocalModel(str(runs / "a")), num_samples=8, max_tokens=8)
    first = reference_texts(base, tmp_path)
    assert reference_texts(base, tmp_path) == first
    assert len(list(tmp_path.glob("reference-*.json"))) == 1
    others = [
        KL(LocalModel(str(runs / "a")), num_samples=9, max_tokens=8),
        KL(LocalModel(str(runs / "a")), num_samples=8, max_tokens=9),
        KL(LocalModel(str(runs / "a")), num_samples=8, max_tokens=8, seed=1),
        KL(LocalModel(str(runs / "b")), num_samples=8, max_tokens=8),
    ]
    for n, other in enumerate(others, 2):
        reference_texts(other, tmp_path)
        assert len(list(tmp_path.glob("reference-*.json"))) == n
    assert len(reference_texts(others[0], tmp_path).texts) == 9


class Completions(JsonServer):
    """A completions server over a tiny model. `fault`: what it does wrong. `busy`: how many requests it first
    answers with 503."""

    def __init__(self, model, fault: str = "", busy: int = 0) -> None:
        self.model = model
        self.fault = fault
        self.busy = busy
        self.requests = 0
        super().__init__()

    def answer_to(self, path, body):
        self.requests += 1
        if self.busy > 0:
            self.busy -= 1
            return 503, {"error": "busy"}
        if self.fault == "refuses":
            return 400, {"error": "no such model"}
        return 200, {"choices": [self.answer(i, p, body) for i, p in enumerate(listed(body["prompt"]))]}

    def ids(self, prompt: str) -> list[int]:
        """Special tokens as themselves, the text between them as text."""
        start = "<|endoftext|>"
        ids = [self.model.tokenizer.eos_token_id] * (self.fault == "puts a token before")
        for n, piece in enumerate(prompt.split(start)):
            ids += [self.model.tokenizer.eos_token_id] * (n > 0)
            ids += self.model.tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
        return ids

    def logp(self, ids: list[int]) -> list[float]:
        with torch.no_grad():
            logp = torch.log_softmax(self.model.lm(torch.tensor([ids])).logits[0].double(), -1)
        return [float(logp[t - 1, ids[t]]) for t in range(1, len(ids))]

    def answer(self, index: int, prompt: str, body: dict) -> dict:
        ids = self.ids(prompt)
        generator = torch.Generator().manual_seed(body.get("seed", 0))  # the same for every prompt, as vLLM does
        written: list[int] = []
        finished = False
        while len(written) < body["max_tokens"] and not finished:
            with torch.no_grad():
                logits = self.model.lm(torch.tensor([ids + written])).logits[0, -1]
            if body["temperature"] == 0:
                token = int(logits.argmax())
            else:
                p = torch.softmax(logits / body["temperature"], -1)
                token = int(torch.multinomial(p, 1, generator=generator))
            finished = token == self.model.tokenizer.eos_token_id
            written.append(token)
        stops = self.fault == "stops always" or (self.fault == "stops at once" and body["temperature"] == 0)
        if stops and body["max_tokens"]:
            written = [self.model.tokenizer.eos_token_id]
            finished = True
        text = self.model.tokenizer.decode(written[:-1] if finished else written)
        choice = {"index": index, "text": text, "finish_reason": "stop" if finished else "length", "logprobs": None}
        if body.get("logprobs"):
            shown = ids + written if body.get("echo") else written
            values = [None, *self.logp(ids + written)][-len(shown) :]
            if self.fault == "off by one" and body.get("echo"):
                values = [None, *values[:-1]][: len(values)] if len(values) > 1 else values
                if len(values) > 2:
                    values[1] = values[2]
            if self.fault == "leaves out" and body.get("echo"):
                values = [None if n < len(values) - 1 else v for n, v in enumerate(values)]
            if self.fault == "none":
                values = []
            tokens = [self.model.tokenizer.decode([i]) for i in shown]
            choice["logprobs"] = {"tokens": tokens, "token_logprobs": values}
        return choice


@pytest.fixture
def served(runs):
    made = []

    def make(**kwargs):
        made.append(Completions(load_model(runs / "a"), **kwargs))
        return made[-1]

    yield make
    for server in made:
        server.shutdown()
        server.server_close()


def test_a_served_reference_gives_the_numbers_of_the_model_itself(runs, served, tmp_path):
    server = Server(served().url, "tiny", retries=1)
    server.verify()
    texts = ["the model reads\n", "cats and dogs", ""]
    finished = [True, False, True]
    np.testing.assert_allclose(
        server.text_logp(texts, finished), text_logp(load_model(runs / "a"), texts, finished, Lines()), rtol=1e-4
    )
    config = KL(server, num_samples=16, max_tokens=12, reverse=True)
    same = kl(load_model(runs / "a"), config, Lines(), tmp_path)
    assert same.reverse.nats_per_text.mean == pytest.approx(0, abs=1e-3)
    assert abs(same.forward.nats_per_text.mean) < 0.5  # the server returns text, whose tokens may differ
    assert kl(load_model(runs / "b"), config, Lines(), tmp_path).forward.nats_per_text.mean > 0


@pytest.mark.parametrize(
    "fault, message",
    [
        ("off by one", "echoes log-probabilities that differ"),
        ("leaves out", "leaves out log-probabilities of tokens"),
        ("none", "no log-probabilities"),
        ("refuses", "refused: status 400"),
    ],
)
def test_servers_that_cannot_be_trusted_are_refused_with_the_reason(served, fault, message, tmp_path):
    server = Server(served(fault=fault).url, "tiny", retries=0)
    with pytest.raises(ServerError, match=message):
        reference_texts(KL(server, num_samples=4, max_tokens=4), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_wrong_start_token_is_reported(served):
    with pytest.raises(ServerError, match=r"reads the end '</s>' as .*give the token that ends a text"):
        Server(served().url, "tiny", end="</s>", retries=0).verify()
    with pytest.raises(ServerError, match="give the token that starts a text"):
        Server(served().url, "tiny", start="<s>", retries=0).text_logp(["a"], [False])


def test_a_server_that_adds_a_start_token_itself_needs_an_empty_one(served, runs, tmp_path):
    """As vLLM does with Llama's tokenizers."""
    server = served(fault="puts a token before")
    with pytest.raises(ServerError, match=r"give an empty start="):
        Server(server.url, "tiny", retries=0).verify()
    right = Server(server.url, "tiny", start="", retries=0)
    right.verify()
    texts = ["the model reads\n", "cats and dogs"]
    finished = [True, False]
    expected = text_logp(load_model(runs / "a"), texts, finished, Lines())
    np.testing.assert_allclose(right.text_logp(texts, finished), expected, rtol=1e-4)
    with pytest.raises(ServerError, match="puts no token of its own before a text"):
        Server(served().url, "tiny", start="", retries=0).verify()


def test_after_an_empty_completion_another_prompt_is_tried(served):
    Server(served(fault="stops at once").url, "tiny", retries=0).verify()
    with pytest.raises(ServerError, match="writes nothing after any of"):
        Server(served(fault="stops always").url, "tiny", retries=0).verify()


def test_seeds_of_a_server_share_no_samples(served):
    """Seed 1 does not draw the samples of seed 0, shifted by one."""
    server = Server(served().url, "tiny")
    first, second = ([t for t, _ in server.complete([""] * 8, 12, seed=seed)] for seed in (0, 1))
    assert first == [t for t, _ in server.complete([""] * 8, 12, seed=0)]
    assert len(set(first) & set(second)) < 3  # short texts coincide


def test_a_busy_server_is_tried_again_and_a_missing_one_is_reported(served, monkeypatch):
    import time

    monkeypatch.setattr(time, "sleep", lambda s: None)
    busy = served(busy=2)
    assert len(Server(busy.url, "tiny").complete(["the"], 3)) == 1
    assert busy.requests == 3
    with pytest.raises(ServerError, match="does not answer .* tried 2 times"):
        Server("http://127.0.0.1:9/v1", "tiny", retries=1).complete(["the"], 3)


def test_sampling_from_a_server(served, tmp_path):
    from phf.generation.sample import sample_served
    from phf.generation.scenario import Scenario

    (tmp_path / "p.jsonl").write_text('{"text": "the model"}\n{"text": "cats"}\n')
    scenario = Scenario(
        num_samples=4, samples_per_prompt=2, prompts=str(tmp_path / "p.jsonl"), max_tokens=6, min_tokens=0
    )
    samples = sample_served(Server(served().url, "tiny"), scenario)
    assert [s.prompt for s in samples] == ["the model"] * 2 + ["cats"] * 2
    assert len({s.text for s in samples}) > 1


def test_servers_by_command(served, runs, tmp_path, monkeypatch, capsys):
    import shutil

    from phf.generation.sample import read_samples

    url = served().url
    shutil.copytree(runs / "b", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    output_of(["sample", url, "s.jsonl", "server.model=tiny", "num_samples=5", "max_tokens=6"], monkeypatch, capsys)
    assert len(read_samples(tmp_path / "s.jsonl")) == 5
    scenario = ["num_samples=4", "max_tokens=6", "min_tokens=1"]
    reference = ["kl.reference.name=server", f"kl.reference.url={url}", "kl.reference.model=tiny"]
    command = ["eval", "run", *scenario, *reference, "kl.num_samples=8", "kl.max_tokens=8"]
    assert "KL, nats per text" in output_of(command, monkeypatch, capsys)
    found = json.loads((tmp_path / "run" / "eval.json").read_text())["kl"]
    assert found["reference"] == {"server": url, "model": "tiny"}
    assert found["forward"]["nats_per_text"]["mean"] > 0
    for wrong in ("control=good", "min_tokens=3"):
        monkeypatch.setattr("sys.argv", ["phf", "sample", url, "s.jsonl", "server.model=tiny", wrong])
        with pytest.raises(SystemExit):
            main()
        assert f"error: {wrong.split('=')[0]} does not work with a server" in capsys.readouterr().err


def test_equal_prompts_get_different_texts_from_a_server(served):
    """vLLM gives every prompt of a request the request's seed: equal prompts would be equal texts."""
    texts = [t for t, _ in Server(served().url, "tiny").complete([""] * 12, 8)]
    assert len(set(texts)) > 4


def test_a_reference_with_control_tokens_is_refused(runs, tmp_path):
    with pytest.raises(ConfigError, match="a reference is a plain LM"):
        reference_texts(KL(LocalModel(str(runs / "conditional")), num_samples=4, max_tokens=4), tmp_path)


def test_reverse_kl_of_a_model_with_control_tokens_is_refused(runs, tmp_path):
    config = KL(LocalModel(str(runs / "a")), num_samples=4, max_tokens=4, reverse=True)
    with pytest.raises(ConfigError, match="only KL from the reference is defined"):
        kl(load_model(runs / "conditional"), config, Lines(), tmp_path)
