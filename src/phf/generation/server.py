"""Language models on an OpenAI-compatible completions server, for example vLLM.

A server's probabilities are checked before they are used: some servers echo log-probabilities that are off by one,
or none.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core import store
from phf.core.config import STRICT, Plain
from phf.core.random import key64
from phf.core.types import PhfError

TOLERANCE = 0.02
"""Largest difference in nats per token between the log-probabilities of a completion as given and as echoed."""
PROBES = ("The", "The", "Once upon a time", "1")
"""Prompts that are completed, one after the other, until a completion is not empty. The first is completed greedily."""


class ServerError(PhfError, RuntimeError):
    """A server that does not answer, or not as it should."""


class Refused(ServerError):
    """A server refuses a request because of its content or length. Asking again does not help."""


class Answers:
    """Answers of servers, kept in a JSON lines file: a job that is killed and run again does not ask, or pay,
    twice. A torn line is left out."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lock = threading.Lock()
        self.known: dict[str, Any] = {}
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        self.torn = not text.endswith("\n") and text != ""
        for line in text.split("\n"):
            try:
                row = json.loads(line)
                self.known[row["key"]] = row["answer"]
            except (ValueError, KeyError, TypeError):
                continue

    def keep(self, key: str, answer: Any) -> None:
        """Keep an answer. It is on disk when this returns."""
        with self.lock:
            self.known[key] = answer
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\n" * self.torn + json.dumps({"key": key, "answer": answer}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.torn = False


@dataclass(frozen=True, config=STRICT)
class Server:
    """A server. `url`: up to and including `/v1`. `model`: the server's name for the model. `start` and `end`: text
    of the tokens that start and end a text (`<|endoftext|>` for GPT-2, `<s>` and `</s>` for Llama). `key_env`: the
    environment variable with the server's key, if it needs one."""

    url: str
    model: str
    name: Literal["server"] = "server"
    start: str = "<|endoftext|>"
    end: str = "<|endoftext|>"
    key_env: str = "OPENAI_API_KEY"
    timeout_s: Annotated[float, Field(gt=0)] = 120
    retries: Annotated[int, Field(ge=0)] = 4
    extra: dict[str, float | int | str | bool] = Field(default_factory=dict)
    """Further settings of a request for samples, in the server's own terms (vLLM: top_k=-1, repetition_penalty=1)."""
    batch: Annotated[int, Field(gt=0)] = 32

    @property
    def identity(self) -> Plain:
        """Everything that decides the answers. Time-outs and retries do not."""
        return {"url": self.url, "model": self.model, "start": self.start, "extra": dict(self.extra)}

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url {self.url!r} must start with http:// or https://")

    def ask(self, path: str, body: Plain, answers: Answers | None) -> Any:
        """`post` a request for one choice, unless `answers` has its answer. An answer and a refusal (raised as
        Refused again) are kept; an error that may pass is not."""
        key = store.fingerprint([self.url, path, body])
        if answers is not None and key in answers.known:
            answer = answers.known[key]
            if "refused" in answer:
                raise Refused(answer["refused"])
            return answer
        try:
            answer = self.post(path, body)
        except Refused as refusal:
            if answers is not None:
                answers.keep(key, {"refused": str(refusal)})
            raise
        _choices(answer, 1)
        if answers is not None:
            answers.keep(key, answer)
        return answer

    def post(self, path: str, body: Plain) -> Any:
        """A POST. Where the server is busy or away, it is retried after growing waits. Raises ServerError."""
        key = os.environ.get(self.key_env)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(0.5 * 2**attempt, 20))
            try:
                answer = _client().post(
                    f"{self.url.rstrip('/')}{path}", json=body, headers=headers, timeout=self.timeout_s
                )
            except httpx.HTTPError as error:
                problem = str(error) or type(error).__name__
                continue
            if answer.status_code in (408, 429) or answer.status_code >= 500:
                problem = f"status {answer.status_code}: {answer.text[:200]}"
                continue
            if answer.status_code in (400, 413, 422):
                raise Refused(f"{self.url}{path} refused: status {answer.status_code}: {answer.text[:300]}")
            if answer.status_code != 200:
                raise ServerError(f"{self.url}{path} refused: status {answer.status_code}: {answer.text[:300]}")
            try:
                return answer.json()
            except ValueError:
                raise ServerError(f"{self.url}{path} did not answer with JSON: {answer.text[:200]!r}") from None
        raise ServerError(f"{self.url}{path} does not answer ({problem}), tried {self.retries + 1} times")

    def complete(
        self, prompts: Sequence[str], max_tokens: int, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0
    ) -> list[tuple[str, bool]]:
        """A completion of each prompt, and whether it ended before the limit."""
        return [(text, ended) for text, ended, _ in self.completions(prompts, max_tokens, temperature, top_p, seed)]

    def completions(
        self,
        prompts: Sequence[str],
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        answers: Answers | None = None,
        refused: str | None = None,
    ) -> list[tuple[str, bool, int | None]]:
        """(text, whether it ended, tokens that the server counted or None) of a completion of each prompt.

        Each prompt is a request of its own with its own 31-bit seed, which no other `seed` shares: equal prompts in one
        request would get equal completions. `refused`: the text that replaces a refused answer; None: a refusal is an
        error.
        """

        def one(number: int) -> tuple[str, bool, int | None]:
            body = {
                "model": self.model,
                "prompt": self.start + prompts[number],
                "max_tokens": max_tokens,
                "temperature": temperature,
                "top_p": top_p,
                "seed": key64(seed, number) >> 33,
                "n": 1,
                **self.extra,
            }
            try:
                answer = self.ask("/completions", body, answers)
            except Refused:
                if refused is None:
                    raise
                return refused, False, 0
            (choice,) = _choices(answer, 1)
            used = (answer.get("usage") or {}).get("total_tokens")
            return choice.get("text") or "", choice.get("finish_reason") == "stop", used

        with concurrent.futures.ThreadPoolExecutor(self.batch) as pool:
            return list(pool.map(one, range(len(prompts))))

    def instruct(
        self,
        asked: Sequence[str],
        chat: bool,
        max_tokens: int,
        temperature: float,
        seeds: Sequence[int],
        answers: Answers | None = None,
    ) -> list[tuple[str, int]]:
        """(text, tokens that the server counted or 0) of the answer to each instruction, by the chat or the completions
        endpoint. The text is empty if the server refuses. `extra` is sent too; `start` is not."""

        def one(number: int) -> tuple[str, int]:
            body: Plain = {
                "model": self.model,
                "max_tokens": max_tokens,
                "temperature": temperature,
                "seed": seeds[number],
                **self.extra,
            }
            if chat:
                body["messages"] = [{"role": "user", "content": asked[number]}]
            else:
                body["prompt"] = asked[number]
            try:
                answer = self.ask("/chat/completions" if chat else "/completions", body, answers)
            except Refused:
                return "", 0
            (choice,) = _choices(answer, 1)
            text = (choice.get("message") or {}).get("content") if chat else choice.get("text")
            return text or "", int((answer.get("usage") or {}).get("total_tokens") or 0)

        with concurrent.futures.ThreadPoolExecutor(self.batch) as pool:
            return list(pool.map(one, range(len(asked))))

    def text_logp(self, texts: Sequence[str], finished: Sequence[bool]) -> list[float]:
        """Natural log-probability of each whole text given the start token, with its end where it is finished."""
        found = []
        whole = [self.start + t + self.end * f for t, f in zip(texts, finished, strict=True)]
        for begin in range(0, len(whole), self.batch):
            for choice in self._echo(whole[begin : begin + self.batch]):
                found.append(sum(choice["token_logprobs"][1:]))
        return found

    def _echo(self, prompts: Sequence[str]) -> list[dict[str, list[Any]]]:
        """Tokens and log-probabilities of prompts. Nothing is generated."""
        body = {
            "model": self.model,
            "prompt": list(prompts),
            "max_tokens": 0,
            "echo": True,
            "logprobs": 1,
            "temperature": 0,
        }
        found = []
        for choice in _choices(self.post("/completions", body), len(prompts)):
            logprobs = choice.get("logprobs")
            if not logprobs or not logprobs.get("token_logprobs") or "tokens" not in logprobs:
                raise ServerError(f"{self.url} echoes no log-probabilities, so it cannot be a reference")
            values = logprobs["token_logprobs"]
            if any(v is None for v in values[1:]) or len(values) != len(logprobs["tokens"]):
                raise ServerError(
                    f"{self.url} leaves out log-probabilities of echoed tokens, so it cannot be a reference"
                )
            if self.start and logprobs["tokens"][0] != self.start:
                raise ServerError(
                    f"{self.url} reads the start {self.start!r} as {logprobs['tokens'][0]!r}: give the token that "
                    "starts a text there (start=...)"
                )
            found.append(logprobs)
        return found

    def verify(self) -> None:
        """Raise ServerError unless the server echoes a completion that it has just given with the same
        log-probabilities."""
        try:
            (start,) = self._echo([self.start])
        except ServerError as error:
            if self.start:
                raise
            raise ServerError(
                f"{self.url} puts no token of its own before a text; give the one that starts it (start=...): {error}"
            ) from None
        if len(start["tokens"]) != 1:
            raise ServerError(
                f"{self.url} reads the start {self.start!r} as {start['tokens']}: if the server puts a token of its "
                "own before a text, give an empty start="
            )
        self._verify_end()
        for attempt, prompt in enumerate(PROBES):  # an empty completion has nothing to check
            if self._verify_completion(prompt, float(attempt > 0)):
                return
        raise ServerError(f"{self.url} writes nothing after any of {PROBES}, so its numbers cannot be checked")

    def _verify_end(self) -> None:
        plain, ended = self._echo([self.start + PROBES[0], self.start + PROBES[0] + self.end])
        if len(ended["tokens"]) != len(plain["tokens"]) + 1:
            found = ended["tokens"][len(plain["tokens"]) :]
            raise ServerError(
                f"{self.url} reads the end {self.end!r} as {found}: give the token that ends a text there (end=...)"
            )

    def _verify_completion(self, prompt: str, temperature: float) -> int:
        """Check a completion. Returns how many of its tokens were compared."""
        body = {
            "model": self.model,
            "prompt": [self.start + prompt],
            "max_tokens": 8,
            "temperature": temperature,
            "seed": 0,
            "logprobs": 1,
        }
        (given,) = _choices(self.post("/completions", body), 1)
        logprobs = given.get("logprobs")
        if not logprobs or not logprobs.get("token_logprobs") or None in logprobs["token_logprobs"]:
            raise ServerError(
                f"{self.url} gives no log-probabilities with its completions, so it cannot be a reference"
            )
        tokens = logprobs["tokens"]
        values = logprobs["token_logprobs"]
        if given.get("finish_reason") == "stop":  # the end is not part of the echoed text
            tokens = tokens[:-1]
            values = values[:-1]
        if not tokens:
            return 0
        (echoed,) = self._echo([self.start + prompt + "".join(tokens)])
        begin = len(echoed["tokens"]) - len(tokens)
        tail = echoed["token_logprobs"][begin:]
        if echoed["tokens"][begin:] != tokens:
            raise ServerError(f"{self.url} reads its own completion as other tokens, so its numbers cannot be checked")
        worst = max(abs(a - b) for a, b in zip(tail, values, strict=True))
        if worst > TOLERANCE:
            raise ServerError(
                f"{self.url} echoes log-probabilities that differ by up to {worst:.3g} nats from those it gave for the "
                "same tokens, so it cannot be a reference; vLLM's are known to be right"
            )
        return len(tokens)


@functools.lru_cache(maxsize=1)
def _client() -> httpx.Client:
    """One client for all requests and threads: creating one takes longer than a request to a local server."""
    return httpx.Client(limits=httpx.Limits(max_connections=None, max_keepalive_connections=64))


def _choices(answer: Any, count: int) -> list[Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != count:
        raise ServerError(f"the server answered {len(choices or [])} of {count} prompts: {str(answer)[:200]}")
    return sorted(choices, key=lambda c: c.get("index", 0))
