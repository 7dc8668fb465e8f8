"""Samples of a served model by token ids, against the same model loaded here."""

from __future__ import annotations

import threading

import pytest
import torch
from scipy.stats import ks_2samp

from helpers import JsonServer, output_of, train_tiny, write_jsonl
from phf.core.config import ConfigError
from phf.generation.loaded import load_model
from phf.generation.sample import read_samples, sample, sample_served
from phf.generation.scenario import Scenario
from phf.generation.server import Server, ServerError
from phf.objectives import Conditional
from phf.redteaming.attack import redteam
from phf.redteaming.config import RedTeam, TokenAttacks
from phf.redteaming.control_tokens import attacks, injection
from phf.scorers import Regex
from phf.scoring.judge import judge_texts


class Tokens(JsonServer):
    """A completions server that takes and gives token ids, as vLLM documents it. `fault`: what it does wrong."""

    def __init__(self, model, fault=None):
        self.model = model
        self.fault = fault
        self.asked = []
        self.lock = threading.Lock()
        super().__init__()

    def answer_to(self, path, body):
        with self.lock:
            self.asked.append(body)
            return 200, {"choices": [self.answer(body)]}

    @torch.inference_mode()
    def answer(self, body):
        ids = list(body["prompt"])
        assert all(isinstance(i, int) for i in ids)
        draw = torch.Generator().manual_seed(body["seed"])
        end = self.model.tokenizer.eos_token_id
        tokens = []
        values = []
        reason = "length"
        while len(tokens) < body["max_tokens"]:
            logits = self.model.lm(torch.tensor([ids + tokens])).logits[0, -1].double()
            plain = logits.log_softmax(-1)
            for token, bias in body.get("logit_bias", {}).items():
                logits[int(token)] += bias
            if len(tokens) < body.get("min_tokens", 0):
                logits[end] = -torch.inf
            if "top_k" in body:
                logits[logits < logits.topk(body["top_k"]).values[-1]] = -torch.inf
            p, order = (logits / body["temperature"]).softmax(-1).sort(descending=True)
            p[p.cumsum(-1) - p >= body["top_p"]] = 0.0
            tokens.append(int(order[torch.multinomial(p, 1, generator=draw)]))
            values.append(float(plain[tokens[-1]]))
            if tokens[-1] == end:
                reason = "stop"
                break
        if self.fault == "ignores logit_bias":
            tokens[0] = int(next(iter(body["logit_bias"])))
        names = [f"token_id:{token}" for token in tokens]
        if self.fault == "answers in text":
            names = self.model.tokenizer.convert_ids_to_tokens(tokens)
        text = self.model.tokenizer.decode(tokens)
        return {
            "index": 0,
            "text": text,
            "finish_reason": reason,
            "logprobs": {"tokens": names, "token_logprobs": values},
        }


VOWELS = Regex("[aeiou]")
"""A scorer with many different scores."""


@pytest.fixture(scope="module")
def folder(tokens_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("served") / "run"
    train_tiny(tokens_dir, out, objective=Conditional(threshold=0.0, drop=0.0), steps=60)
    return out


@pytest.fixture
def serve(folder):
    made = []

    def start(fault=None):
        made.append(Tokens(load_model(folder), fault))
        return made[-1], Server(made[-1].url, "tiny", tokenizer=str(folder), retries=0)

    yield start
    for server in made:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("control", ["good", "bad", "none"])
def test_greedy_texts_are_those_of_the_loaded_model(serve, folder, control, tmp_path):
    _, server = serve()
    prompts = str(write_jsonl(tmp_path / "p.jsonl", ["the model", "see <|bad|> here", "cats and"]))
    scenario = Scenario(
        num_samples=3, prompts=prompts, control=control, top_k=1, max_tokens=12, min_tokens=3, precision="fp32"
    )
    own = sample(load_model(folder), scenario)
    found = sample_served(server, scenario)
    assert [s.text for s in found] == [s.text for s in own]
    assert [(s.prompt, s.num_tokens, s.finished) for s in found] == [(s.prompt, s.num_tokens, s.finished) for s in own]
    assert [s.logp for s in found] == pytest.approx([s.logp for s in own], abs=1e-3)


def test_scores_have_the_distribution_of_the_own_sampler(serve, folder):
    _, server = serve()
    for control in ("good", "bad"):
        scenario = Scenario(num_samples=300, control=control, max_tokens=16, min_tokens=4, temperature=1.0)
        own = judge_texts(VOWELS, [s.text for s in sample(load_model(folder), scenario)])
        found = judge_texts(VOWELS, [s.text for s in sample_served(server, scenario)])
        assert len(set(found)) > 20
        assert ks_2samp(own, found).pvalue > 0.01


def test_what_is_asked_bans_the_other_roles(serve, folder):
    stub, server = serve()
    ids = load_model(folder).control_ids
    sample_served(server, Scenario(num_samples=2, max_tokens=4, min_tokens=1, top_k=3, control="bad"))
    for body in stub.asked:
        assert body["logit_bias"] == {str(ids["good"]): -100}
        assert body["prompt"][-1] == ids["bad"]
        assert body["top_k"] == 3
    assert len({body["seed"] for body in stub.asked}) == 2


@pytest.mark.parametrize(
    "fault, message", [("answers in text", "answers in text, not in token ids"), ("ignores logit_bias", "bans")]
)
def test_servers_that_do_not_speak_in_ids_are_refused(serve, fault, message):
    _, server = serve(fault)
    scenario = Scenario(num_samples=40, max_tokens=40, min_tokens=1, control="good", temperature=2.0, top_p=1.0)
    with pytest.raises(ServerError, match=message):
        sample_served(server, scenario)


def test_what_needs_logits_is_refused(serve):
    _, server = serve()
    for settings in ({"guidance": 2.0}, {"safe_beam": 2}):
        with pytest.raises(ConfigError, match="needs the model's logits"):
            sample_served(server, Scenario(num_samples=1, max_tokens=10, **settings))
    with pytest.raises(ConfigError, match="control=q1"):
        sample_served(server, Scenario(num_samples=1, control="q1"))


def test_control_tokens_of_a_served_model_are_attacked(serve, folder, tmp_path):
    stub, server = serve()
    prompts = str(write_jsonl(tmp_path / "p.jsonl", ["the model", "cats and", "see"]))
    sizes = {"trials": 1, "rounds": 1, "pool": 2, "candidates": 2, "continuations": 2, "confirm": 1, "shots": 1}
    config = RedTeam(prompts=prompts, max_tokens=4, **sizes)
    on_tokens = TokenAttacks(num_samples=6, max_tokens=6, min_tokens=1)
    found = redteam(server, tmp_path / "out", config, on_tokens, scorer=VOWELS)
    model = load_model(folder)
    assert [a.attack for a in found.tokens.attacks] == [a.name for a in attacks(model, on_tokens)]
    assert found.tokens.injection == injection(model)
    starts = {tuple(body["prompt"][:2]) for body in stub.asked}
    start, good, bad = model.start_id, model.control_ids["good"], model.control_ids["bad"]
    assert {(start, good), (start, bad)} <= starts
    assert found.search.budget.target_tokens > 0
    asked = len(stub.asked)
    assert redteam(server, tmp_path / "out", config, on_tokens, scorer=VOWELS) == found
    assert len(stub.asked) == asked
    for file in (tmp_path / "out").glob("*.json"):  # as after kill -9: no answer is paid for twice
        file.unlink()
    again = redteam(server, tmp_path / "out", config, on_tokens, scorer=VOWELS)
    assert again.tokens.attacks == found.tokens.attacks
    assert again.tokens.worst == found.tokens.worst
    assert len(stub.asked) == asked


def test_the_command_samples_with_a_control_token(serve, folder, tmp_path, monkeypatch, capsys):
    stub, _ = serve()
    out = tmp_path / "s.jsonl"
    settings = ["server.model=tiny", f"server.tokenizer={folder}", "control=bad", "num_samples=3", "max_tokens=5"]
    output_of(["sample", stub.url, str(out), *settings, "min_tokens=2"], monkeypatch, capsys)
    assert all(s.num_tokens >= 2 and s.logp < 0 for s in read_samples(out))
