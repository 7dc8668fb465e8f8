"""Language models behind an OpenAI-compatible completions server (vLLM, for one). Floor 5.

What a server says of probabilities is checked before it is used: servers exist whose echoed log-probabilities are off by
one or missing.
"""

from __future__ import annotations

import concurrent.futures
import os
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import httpx
from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.config import STRICT

TOLERANCE = 0.02
"""Largest difference, in nats a token, between the log-probabilities of a completion as given and as echoed."""


class ServerError(RuntimeError):
    """A server that does not answer, or not as it should."""


@dataclass(frozen=True, config=STRICT)
class Server:
    """`url`: up to and with `/v1`. `model`: as the server names it. `start` and `end`: the text of the tokens that begin
    and end a text there (`<|endoftext|>` for GPT-2, `<s>` and `</s>` for Llama). `key_env`: the environment variable
    that holds the key, if the server wants one."""

    url: str
    model: str
    name: Literal["server"] = "server"
    start: str = "<|endoftext|>"
    end: str = "<|endoftext|>"
    key_env: str = "OPENAI_API_KEY"
    timeout_s: Annotated[float, Field(gt=0)] = 120
    retries: Annotated[int, Field(ge=0)] = 4
    extra: dict[str, float | int | str | bool] = Field(default_factory=dict)
    """What else a request for samples says, as the server knows it (vLLM: top_k=-1, repetition_penalty=1)."""
    batch: Annotated[int, Field(gt=0)] = 32

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url {self.url!r} must begin with http:// or https://")

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """A POST with retries and growing waits where the server is busy or away. Raises ServerError."""
        key = os.environ.get(self.key_env)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(0.5 * 2**attempt, 20))
            try:
                answer = httpx.post(f"{self.url.rstrip('/')}{path}", json=body, headers=headers, timeout=self.timeout_s)
            except httpx.HTTPError as error:
                problem = str(error) or type(error).__name__
                continue
            if answer.status_code in (408, 429) or answer.status_code >= 500:
                problem = f"status {answer.status_code}: {answer.text[:200]}"
                continue
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
        """A completion of each prompt, and whether it came to its end (not to the limit). Each is asked for by itself, with
        a seed of its own: a server draws the prompts of one request alike where they are alike."""

        def one(number: int) -> tuple[str, bool]:
            body = {
                "model": self.model, "prompt": [self.start + prompts[number]], "max_tokens": max_tokens,
                "temperature": temperature, "top_p": top_p, "seed": seed + number, "n": 1, **self.extra,
            }  # fmt: skip
            (choice,) = _choices(self.post("/completions", body), 1)
            return choice.get("text") or "", choice.get("finish_reason") == "stop"

        with concurrent.futures.ThreadPoolExecutor(self.batch) as pool:
            return list(pool.map(one, range(len(prompts))))

    def text_logp(self, texts: Sequence[str], finished: Sequence[bool]) -> list[float]:
        """Natural log-probability of each text as a whole, its end included where it has one, given the start token."""
        found = []
        for begin in range(0, len(texts), self.batch):
            part = [
                self.start + t + self.end * f
                for t, f in zip(texts[begin : begin + self.batch], finished[begin : begin + self.batch], strict=True)
            ]
            for choice in self._echo(part):
                found.append(sum(choice["token_logprobs"][1:]))
        return found

    def _echo(self, prompts: Sequence[str]) -> list[dict[str, list[Any]]]:
        """Tokens and log-probabilities of prompts, without anything generated."""
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
            if logprobs["tokens"][0] != self.start:
                raise ServerError(
                    f"{self.url} reads the start {self.start!r} as {logprobs['tokens'][0]!r}: say which token begins a text "
                    "there (start=...)"
                )
            found.append(logprobs)
        return found

    def verify(self) -> None:
        """Raise ServerError unless a completion that the server has just given with its log-probabilities is echoed with
        the same ones."""
        (start,) = self._echo([self.start])
        if len(start["tokens"]) != 1:
            raise ServerError(
                f"{self.url} reads the start {self.start!r} as {start['tokens']}: it puts a token of its own before a text, so "
                "leave the start empty or choose another"
            )
        body = {
            "model": self.model, "prompt": [self.start + "The"], "max_tokens": 8, "temperature": 0, "logprobs": 1,
        }  # fmt: skip
        (given,) = _choices(self.post("/completions", body), 1)
        logprobs = given.get("logprobs")
        if not logprobs or not logprobs.get("token_logprobs"):
            raise ServerError(
                f"{self.url} gives no log-probabilities with its completions, so it cannot be a reference"
            )
        tokens, values = logprobs["tokens"], logprobs["token_logprobs"]
        if given.get("finish_reason") == "stop":  # the end itself is not part of the text that is echoed
            tokens, values = tokens[:-1], values[:-1]
        (echoed,) = self._echo([self.start + "The" + "".join(tokens)])
        tail = echoed["token_logprobs"][-len(values) :] if values else []
        if echoed["tokens"][-len(tokens) :] != tokens:
            raise ServerError(f"{self.url} reads its own completion as other tokens; its numbers cannot be checked")
        worst = max((abs(a - b) for a, b in zip(tail, values, strict=True)), default=0.0)
        if worst > TOLERANCE:
            raise ServerError(
                f"{self.url} echoes other log-probabilities than it gave for the same tokens (they differ by up to "
                f"{worst:.3g} nats), so it cannot be a reference; vLLM is known to be right"
            )


def _choices(answer: Any, count: int) -> list[Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != count:
        raise ServerError(f"the server answered {len(choices or [])} of {count} prompts: {str(answer)[:200]}")
    return sorted(choices, key=lambda c: c.get("index", 0))
