"""Servers whose answers are wrong in every way: each is one message, and nothing wrong is kept."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phf.core.config import ConfigError, to_plain, validate
from phf.generation import requests
from phf.generation.server import Answers, Server, ServerError

GOOD = {"choices": [{"index": 0, "text": "fine", "finish_reason": "stop"}], "usage": {"total_tokens": 3}}
ECHO = {"tokens": ["<|endoftext|>", "a"], "token_logprobs": [None, -1.5]}


@pytest.fixture(scope="module")
def stub():
    """A server that answers with `stub.data`, after `stub.wait` seconds per byte."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            server.asked += 1
            self.send_response(server.status)
            self.end_headers()
            for n in range(0, len(server.data), server.step):
                try:
                    self.wfile.write(server.data[n : n + server.step])
                    self.wfile.flush()
                except OSError:
                    return
                time.sleep(server.wait)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield server
    server.shutdown()


def says(stub, value, status=200, wait=0.0, step=1 << 20):
    stub.data = value if isinstance(value, bytes) else json.dumps(value).encode()
    stub.status = status
    stub.wait = wait
    stub.step = step
    return Server(stub.url, "m", retries=0)


def test_a_good_answer_is_read(stub):
    server = says(stub, GOOD)
    assert server.completions(["p"], 4, 1.0, 1.0, 0) == [("fine", True, 3)]
    for number in (10**9 + 1, 10**400, -1, True, 3.0):  # no count of tokens
        assert says(stub, GOOD | {"usage": {"total_tokens": number}}).completions(["p"], 4, 1.0, 1.0, 0)[0][2] is None
    chat = {"choices": [{"message": {"content": "yes"}}]}
    assert says(stub, chat).instruct(["p"], True, 4, 1.0, [0]) == [("yes", 0)]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["choices", "text", "index", "message", "content", "usage", "total_tokens", "logprobs", "tokens",
             "token_logprobs", "finish_reason", "error"]
        ),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(json_values)
def test_any_json_is_an_answer_or_one_message(stub, value):
    server = says(stub, value)
    for ask in (
        lambda: server.completions(["p"], 4, 1.0, 1.0, 0),
        lambda: server.instruct(["p"], True, 4, 1.0, [0]),
        lambda: server.text_logp(["a"], [False]),
    ):
        with contextlib.suppress(ServerError):
            assert all(found is not None for found in ask())


def choice(**changes):
    return {"choices": [{"index": 0, "text": "<|endoftext|>a", "logprobs": ECHO | changes}]}


@pytest.mark.parametrize(
    "answer, message",
    [
        (choice(token_logprobs=[None, 0.5]), "gives 0.5 as the log-probability of 'a'"),
        (choice(token_logprobs=[None, -math.inf]), "gives -inf"),
        (choice(token_logprobs=[None, math.nan]), "gives nan"),
        (choice(token_logprobs=[None, "x"]), "leaves out"),
        (choice(token_logprobs=[None, True]), "leaves out"),
        (choice(token_logprobs=[None]), "leaves out"),
        (choice(tokens=["<|endoftext|>", 7]), "leaves out"),
        (choice(tokens=[], token_logprobs=[]), "no log-probabilities"),
        (choice(tokens="ab"), "no log-probabilities"),
        ({"choices": [{"logprobs": ECHO | {"tokens": ["<|endoftext|>", "b"]}}]}, "echoes another text"),
        ({"choices": [{"index": 5, "logprobs": ECHO}]}, r"numbers its answers \[5\] instead of 0 to 0"),
        ({"choices": [None]}, "no choice"),
        ({"choices": {}}, "answered 0 of 1"),
        ([], "answered 0 of 1"),
        (b"[" * 100_000, "did not answer with JSON"),
        (b"\xff\xfe", "did not answer with JSON"),
    ],
)
def test_wrong_log_probabilities_are_refused(stub, answer, message):
    with pytest.raises(ServerError, match=message):
        says(stub, answer).text_logp(["a"], [False])


@pytest.mark.parametrize("choice", [{}, {"finish_reason": "stop"}, {"message": {"content": "a chat's form"}}])
def test_an_answer_without_a_text_is_no_answer(stub, choice):
    with pytest.raises(ServerError, match="without a text"):
        says(stub, {"choices": [choice]}).complete(["p"], 4)


def test_right_log_probabilities_are_summed(stub):
    assert says(stub, choice()).text_logp(["a"], [False]) == [-1.5]


def test_an_answer_has_a_deadline_and_a_size(stub, monkeypatch):
    slow = says(stub, GOOD, wait=0.2, step=8)
    start = time.monotonic()
    with pytest.raises(ServerError, match="not whole after 0.5 s"):
        Server(slow.url, "m", retries=0, timeout_s=0.5).complete(["p"], 4)
    assert time.monotonic() - start < 5
    monkeypatch.setattr(requests, "MAX_ANSWER_BYTES", 100)
    with pytest.raises(ServerError, match="larger than"):
        says(stub, GOOD | {"more": "x" * 1000}).complete(["p"], 4)


def test_only_answers_that_pass_are_kept_and_a_repaired_server_is_asked_again(stub, tmp_path):
    answers = Answers(tmp_path / "answers.jsonl")
    with pytest.raises(ServerError, match="text that is none"):
        says(stub, {"choices": [{"text": 5}]}).completions(["p"], 4, 1.0, 1.0, 0, answers)
    with pytest.raises(ServerError, match="status 400"):
        says(stub, {}, status=400).completions(["p"], 4, 1.0, 1.0, 0, answers)
    assert not (tmp_path / "answers.jsonl").exists()
    for _ in range(2):
        assert says(stub, GOOD).completions(["p"], 4, 1.0, 1.0, 0, Answers(tmp_path / "answers.jsonl"))[0][0] == "fine"
    (line,) = (tmp_path / "answers.jsonl").read_text().splitlines()
    (tmp_path / "answers.jsonl").write_text(json.dumps(json.loads(line) | {"answer": {"choices": 3}}) + "\n")
    asked = stub.asked  # what an earlier version kept is checked too
    assert says(stub, GOOD).completions(["p"], 4, 1.0, 1.0, 0, Answers(tmp_path / "answers.jsonl"))[0][0] == "fine"
    assert stub.asked == asked + 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"url": "http://user:word@host/v1"}, "no user, password, query or fragment"),
        ({"url": "http://host/v1#key=5"}, "no user, password, query or fragment"),
        ({"url": "http://host/v1?key=5"}, "no user, password, query or fragment"),
        ({"key_env": "HOME"}, "must name an environment variable that ends in _API_KEY"),
    ],
)
def test_secrets_are_only_read_from_variables_of_keys(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate({"url": "http://host/v1", "model": "m"} | changes, Server)


SECRETS = {"api_key": "s3cret", "pwd": "x", "pass": "y", "headers": "z", "user": "w", "extra_id": "sk-abcdefghij"}


def test_secrets_among_the_settings_are_written_nowhere():
    server = Server("http://h/v1", "m", extra=SECRETS | {"top_k": 5, "min_tokens": 3})
    assert server.extra["api_key"] == "s3cret"
    for written in (to_plain(server)["extra"], server.identity["extra"]):
        assert written == dict.fromkeys(SECRETS, "***") | {"top_k": 5, "min_tokens": 3}


@pytest.mark.parametrize("url", ["ftp://host/v1", "http://[::1", "http://host:99999/v1", "http://a b/v1", "http://"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ConfigError, match="url"):
        validate({"url": url, "model": "m"}, Server)
