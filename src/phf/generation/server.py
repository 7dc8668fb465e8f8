"""Language models on an OpenAI-compatible completions server, for example vLLM.

A server's probabilities are checked before they are used: some servers echo log-probabilities that are off by one,
or none.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import httpx
from pydantic import Field, PlainSerializer
from pydantic.dataclasses import dataclass

from phf.core import store
from phf.core.config import STRICT, Plain
from phf.core.random import key64
from phf.core.types import PhfError
from phf.generation.requests import in_threads, post_json

T = TypeVar("T")
TOLERANCE = 0.02
"""Largest difference in nats per token between the log-probabilities of a completion as given and as echoed."""
PROBES = ("The", "The", "Once upon a time", "1")
"""Prompts that are completed, one after the other, until a completion is not empty. The first is completed greedily."""


_SECRET = re.compile(
    r"key|secret|passw|pass$|pwd|token$|auth|credential|bearer|headers?$|cookie|^user(name)?$",
    re.IGNORECASE,
)
"""In the name of a setting that is a secret."""
_SECRET_VALUE = re.compile(r"^(?:sk|hf|ghp|xox[a-z])[-_]\w{6,}|^bearer |^basic ", re.IGNORECASE)
"""The start of a value that is a secret."""


def without_secrets(extra: Mapping[str, Any]) -> Plain:
    """Settings with the values of secrets replaced, for files and pages."""
    return {
        name: "***" if _SECRET.search(name) or _SECRET_VALUE.search(str(value)) else value
        for name, value in extra.items()
    }


class ServerError(PhfError, RuntimeError):
    """A server that does not answer, or not as it should."""


class Refused(ServerError):
    """A server refuses a request because of its content or length. Asking again does not help."""


class Denied(ServerError):
    """A server does not let this client in."""


class Answers:
    """Answers of servers, kept in a JSON lines file: a job that is killed and run again does not ask, or pay,
    twice. A torn line is left out."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lock = threading.Lock()
        self.known: dict[str, Any] = {}
        self.again: Counter[str] = Counter()
        """Requests that were sent again since this was opened, by reason."""
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        self.torn = not text.endswith("\n") and text != ""
        for line in text.split("\n"):
            try:
                row = json.loads(line)
                self.known[row["key"]] = row["answer"]
            except (ValueError, KeyError, TypeError):
                continue

    def count_again(self, reason: str) -> None:
        with self.lock:
            self.again[reason] += 1

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
    environment variable with the server's key, if it needs one; its name must end in `_API_KEY`."""

    url: str
    model: str
    name: Literal["server"] = "server"
    start: str = "<|endoftext|>"
    end: str = "<|endoftext|>"
    key_env: str = "OPENAI_API_KEY"
    timeout_s: Annotated[float, Field(gt=0)] = 120
    retries: Annotated[int, Field(ge=0)] = 4
    extra: Annotated[dict[str, float | int | str | bool], PlainSerializer(without_secrets)] = Field(
        default_factory=dict
    )
    """Further settings of a request for samples, in the server's own terms (vLLM: top_k=-1, repetition_penalty=1). What
    looks like a secret by its name is not written to any file."""
    batch: Annotated[int, Field(gt=0)] = 32
    """Requests at a time."""
    tokenizer: Annotated[str | None, Field(exclude_if=lambda value: value is None)] = None
    """Folder or name on the Hub with the model's tokenizer, and with phf.json if it has control tokens. Samples are
    then asked for in token ids: control tokens, banned tokens and log-probabilities work. The server must take token
    ids as prompts, `logit_bias`, and `return_tokens_as_token_ids` (vLLM does)."""

    @property
    def identity(self) -> Plain:
        """Everything that decides the answers. Time-outs and retries do not."""
        own = {} if self.tokenizer is None else {"tokenizer": self.tokenizer}
        return {"url": self.url, "model": self.model, "start": self.start, "extra": without_secrets(self.extra)} | own

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url {self.url!r} must start with http:// or https://")
        try:
            found = urllib.parse.urlsplit(self.url)
            port = found.port
        except ValueError as error:
            raise ValueError(f"url {self.url!r} is not an address: {error}") from None
        if not found.hostname or re.search(r"\s", self.url) or port == 0:
            raise ValueError(f"url {self.url!r} is not an address, such as http://host:8000/v1")
        if found.username or found.password or found.query or found.fragment:
            raise ValueError(
                "url must hold no user, password, query or fragment: give the key in an environment variable (key_env)"
            )
        if not re.fullmatch(r"[A-Z0-9_]*API_KEY", self.key_env):
            raise ValueError(f"key_env {self.key_env!r} must name an environment variable that ends in _API_KEY")

    def ask(self, path: str, body: Plain, answers: Answers | None, read: Callable[[Any], T]) -> T:
        """`post` a request for one choice, unless `answers` has its answer, and `read` that. Only an answer that passes
        every check is kept: a server that was repaired is asked again."""
        key = self._key(path, body)
        if answers is not None and key in answers.known:
            with contextlib.suppress(ServerError):
                return read(answers.known[key])
        again = None if answers is None else answers.count_again
        given, answer = self.post(path, body, lambda data: (data, read(data)), again)
        if answers is not None:
            answers.keep(key, given)
        return answer

    def _key(self, path: str, body: Plain) -> str:
        return store.fingerprint([self.url, path, body])

    def post(self, path: str, body: Plain, read: Callable[[Any], T], again: Callable[[str], None] | None = None) -> T:
        """The answer to a POST, as `read` takes it from the JSON. Where the server is busy or away, or `read` raises
        ServerError, it is retried after growing waits; `again` gets the reason each time. Raises ServerError."""
        key = os.environ.get(self.key_env)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        problem = reason = ""
        for attempt in range(self.retries + 1):
            if attempt:
                if again is not None:
                    again(reason)
                time.sleep(min(0.5 * 2**attempt, 20))
            try:
                status, data = post_json(f"{self.url.rstrip('/')}{path}", body, headers, self.timeout_s)
            except httpx.HTTPError as error:
                reason = "too slow" if isinstance(error, httpx.TimeoutException) else "no connection"
                problem = f"does not answer ({str(error) or type(error).__name__})"
                continue
            except httpx.InvalidURL as error:
                raise ServerError(f"{self.url} is not an address: {error}") from None
            text = data[:300].decode("utf-8", "replace")
            if status in (408, 429) or status >= 500:
                reason = f"status {status}"
                problem = f"does not answer (status {status}: {text})"
                continue
            if status in (401, 403):
                raise Denied(
                    f"{self.url}{path} refused: status {status}: {text}. Its key is read from the environment "
                    f"variable {self.key_env}"
                )
            if status in (400, 413, 422):
                raise Refused(f"{self.url}{path} refused: status {status}: {text}")
            if status != 200:
                raise ServerError(f"{self.url}{path} refused: status {status}: {text}")
            try:
                return read(store.parse_json(data))
            except ServerError as error:
                reason = "an answer that cannot be used"
                problem = f"gives no answer that can be used: {error}"
            except ValueError:
                reason = "no JSON"
                problem = f"did not answer with JSON: {text!r}"
        raise ServerError(f"{self.url}{path} {problem}, tried {self.retries + 1} times")

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
            body = self._sample(self.start + prompts[number], max_tokens, temperature, top_p, key64(seed, number))
            try:
                answer = self.ask("/completions", body, answers, partial(_answer, chat=False))
            except Refused:
                if refused is None:
                    raise
                return refused, False, 0
            return answer.text, answer.ended, answer.tokens

        return list(in_threads(one, range(len(prompts)), self.batch))

    def write(
        self,
        starts: Sequence[Sequence[int]],
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        min_tokens: int = 0,
        top_k: int | None = None,
        banned: Sequence[int] = (),
        answers: Answers | None = None,
    ) -> Iterator[Written]:
        """What the model writes after token ids, in token ids. `banned`: ids that it never writes. Seeds as
        `completions`. Raises ServerError for a server that does not answer in token ids."""
        by_ids = {
            "logprobs": 1,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
            "min_tokens": min_tokens or None,
            "top_k": top_k,
            "logit_bias": {str(i): -100 for i in banned} or None,
        }
        asked = {name: value for name, value in by_ids.items() if value is not None}

        def one(number: int) -> Written:
            body = asked | self._sample(list(starts[number]), max_tokens, temperature, top_p, key64(seed, number))
            return self.ask("/completions", body, answers, partial(_written, url=self.url, banned=banned))

        return in_threads(one, range(len(starts)), self.batch)

    def _sample(self, prompt: Any, max_tokens: int, temperature: float, top_p: float, key: int) -> Plain:
        """A request for one sample, with a 31-bit seed from `key`."""
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": key >> 33,
            "n": 1,
            **self.extra,
        }

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
            try:
                answer = self.answer(asked[number], chat, max_tokens, temperature, seeds[number], answers)
            except Refused:
                return "", 0
            return answer.text, answer.tokens or 0

        return list(in_threads(one, range(len(asked)), self.batch))

    def answer(
        self, asked: str, chat: bool, max_tokens: int, temperature: float, seed: int, answers: Answers | None = None
    ) -> Answer:
        """The answer to an instruction, by the chat or the completions endpoint. Raises ServerError."""
        path, body = self._instruction(asked, chat, max_tokens, temperature, seed)
        return self.ask(path, body, answers, partial(_answer, chat=chat))

    def answer_key(self, asked: str, chat: bool, max_tokens: int, temperature: float, seed: int) -> str:
        """The key in `Answers` of what `answer` returns."""
        return self._key(*self._instruction(asked, chat, max_tokens, temperature, seed))

    def _instruction(self, asked: str, chat: bool, max_tokens: int, temperature: float, seed: int) -> tuple[str, Plain]:
        body: Plain = {
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            **self.extra,
        }
        if chat:
            return "/chat/completions", body | {"messages": [{"role": "user", "content": asked}]}
        return "/completions", body | {"prompt": asked}

    def text_logp(self, texts: Sequence[str], finished: Sequence[bool]) -> list[float]:
        """Natural log-probability of each whole text given the start token, with its end where it is finished."""
        found = []
        whole = [self.start + t + self.end * f for t, f in zip(texts, finished, strict=True)]
        for begin in range(0, len(whole), self.batch):
            found += [sum(echo.values[1:]) for echo in self._echo(whole[begin : begin + self.batch])]
        return found

    def _echo(self, prompts: Sequence[str]) -> list[Logprobs]:
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
        choices = self.post("/completions", body, lambda data: _choices(data, len(prompts)))
        for prompt, choice in zip(prompts, choices, strict=True):
            echo = _logprobs(choice, self.url, first_is_known=False)
            if self.start and echo.tokens[0] != self.start:
                raise ServerError(
                    f"{self.url} reads the start {self.start!r} as {echo.tokens[0]!r}: give the token that "
                    "starts a text there (start=...)"
                )
            whole = "".join(echo.tokens)
            after_first = "".join(echo.tokens[1:])  # where the server puts a token of its own before a text
            if prompt not in (choice.get("text"), whole, after_first) and not echo.has_partial_characters:
                raise ServerError(
                    f"{self.url} echoes another text than it was asked about: {whole[:100]!r} instead of "
                    f"{prompt[:100]!r}"
                )
            found.append(echo)
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
        if len(start.tokens) != 1:
            raise ServerError(
                f"{self.url} reads the start {self.start!r} as {start.tokens}: if the server puts a token of its "
                "own before a text, give an empty start="
            )
        self._verify_end()
        for attempt, prompt in enumerate(PROBES):  # an empty completion has nothing to check
            if self._verify_completion(prompt, float(attempt > 0)):
                return
        raise ServerError(f"{self.url} writes nothing after any of {PROBES}, so its numbers cannot be checked")

    def _verify_end(self) -> None:
        plain, ended = self._echo([self.start + PROBES[0], self.start + PROBES[0] + self.end])
        if len(ended.tokens) != len(plain.tokens) + 1:
            found = ended.tokens[len(plain.tokens) :]
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
        (given,) = self.post("/completions", body, lambda data: _choices(data, 1))
        said = _logprobs(given, self.url, first_is_known=True)
        tokens = said.tokens
        values = said.values
        if given.get("finish_reason") == "stop":  # the end is not part of the echoed text
            tokens = tokens[:-1]
            values = values[:-1]
        if not tokens:
            return 0
        (echoed,) = self._echo([self.start + prompt + "".join(tokens)])
        begin = len(echoed.tokens) - len(tokens)
        tail = echoed.values[begin:]
        if echoed.tokens[begin:] != tokens:
            raise ServerError(f"{self.url} reads its own completion as other tokens, so its numbers cannot be checked")
        worst = max(abs(a - b) for a, b in zip(tail, values, strict=True))
        if worst > TOLERANCE:
            raise ServerError(
                f"{self.url} echoes log-probabilities that differ by up to {worst:.3g} nats from those it gave for the "
                "same tokens, so it cannot be a reference; vLLM's are known to be right"
            )
        return len(tokens)


# Checking answers


MOST_TOKENS = 10**9
"""A count of tokens above it is no count."""


@plain_dataclass(frozen=True)
class Answer:
    """The one choice of an answer."""

    text: str
    ended: bool
    """Whether the text ended before the limit."""
    tokens: int | None
    """Tokens that the server counted, those of the prompt included."""


@plain_dataclass(frozen=True)
class Written:
    """What a model wrote, in token ids."""

    ids: list[int]
    """With the end of the text, if the server gives it."""
    logp: list[float]
    """Natural log-probability of each of them."""
    ended: bool
    """Whether the text ended before the limit."""


@plain_dataclass(frozen=True)
class Logprobs:
    """Tokens of a text and their log-probabilities. The first value of an echo may be NaN."""

    tokens: list[str]
    values: list[float]

    @property
    def has_partial_characters(self) -> bool:
        """Whether a token is a part of a character, which servers cannot write as text."""
        return any("\ufffd" in token or token.startswith("bytes:") for token in self.tokens)


def _choices(answer: Any, count: int) -> list[Plain]:
    """The choices of an answer, in the order of the prompts. Raises ServerError unless there is one for each."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != count:
        number = len(choices) if isinstance(choices, list) else 0
        raise ServerError(f"the server answered {number} of {count} prompts: {str(answer)[:200]}")
    if not all(isinstance(choice, dict) for choice in choices):
        raise ServerError(f"the server answered with something that is no choice: {str(answer)[:200]}")
    places = [choice.get("index", n) for n, choice in enumerate(choices)]
    if sorted(map(str, places)) != sorted(map(str, range(count))):
        raise ServerError(f"the server numbers its answers {places} instead of 0 to {count - 1}")
    return [choice for _, choice in sorted(zip(map(int, places), choices, strict=True), key=lambda pair: pair[0])]


def _answer(answer: Any, chat: bool) -> Answer:
    """The one choice of an answer. Raises ServerError for an answer of another shape."""
    (choice,) = _choices(answer, 1)
    holder = choice.get("message") if chat else choice
    text = holder.get("content" if chat else "text") if isinstance(holder, dict) else None
    if text is not None and not isinstance(text, str):
        raise ServerError(f"the server answered with a text that is none: {str(choice)[:200]}")
    if not isinstance(holder, dict):
        raise ServerError(f"the server answered without a message: {str(choice)[:200]}")
    if ("content" if chat else "text") not in holder:
        raise ServerError(f"the server answered without a text: {str(choice)[:200]}")
    usage = answer.get("usage")
    used = usage.get("total_tokens") if isinstance(usage, dict) else None
    whole = isinstance(used, int) and not isinstance(used, bool) and 0 <= used <= MOST_TOKENS
    clean = (text or "").encode("utf-8", "replace").decode()
    return Answer(clean, choice.get("finish_reason") == "stop", used if whole else None)


TOKEN = re.compile(r"token_id:(\d{1,9})")
"""A token as an id."""


def _written(data: Any, url: str, banned: Sequence[int]) -> Written:
    """The one choice of an answer in token ids. Raises ServerError for any other answer."""
    (choice,) = _choices(data, 1)
    ended = choice.get("finish_reason") == "stop"
    said = choice.get("logprobs")
    if isinstance(said, dict) and said.get("tokens") == []:
        return Written([], [], ended)
    found = _logprobs(choice, url, first_is_known=True)
    ids = [TOKEN.fullmatch(token) for token in found.tokens]
    if None in ids:
        raise ServerError(
            f"{url} answers in text, not in token ids ({found.tokens[0]!r}): leave out server.tokenizer, or use a "
            "server that knows return_tokens_as_token_ids"
        )
    numbers = [int(match[1]) for match in ids if match is not None]
    if wrong := set(numbers) & set(banned):
        raise ServerError(f"{url} writes tokens that logit_bias bans, such as {min(wrong)}")
    return Written(numbers, found.values, ended)


def _logprobs(choice: Plain, url: str, first_is_known: bool) -> Logprobs:
    """Tokens and log-probabilities of a choice. Raises ServerError unless there is a finite one, at most 0, for each
    token, perhaps but for the first."""
    said = choice.get("logprobs")
    tokens = said.get("tokens") if isinstance(said, dict) else None
    values = said.get("token_logprobs") if isinstance(said, dict) else None
    cannot = "so it cannot be a reference"
    if not isinstance(tokens, list) or not isinstance(values, list) or not tokens or not values:
        raise ServerError(f"{url} gives no log-probabilities, {cannot}")
    if len(values) != len(tokens) or not all(isinstance(token, str) for token in tokens):
        raise ServerError(f"{url} leaves out log-probabilities of tokens, {cannot}")
    numbers = [math.nan if v is None and n == 0 and not first_is_known else v for n, v in enumerate(values)]
    for n, value in enumerate(numbers):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ServerError(f"{url} leaves out log-probabilities of tokens, {cannot}")
        if isinstance(value, int) and abs(value) > 10**9:
            raise ServerError(f"{url} gives a log-probability that is no such number, {cannot}")
        if (n > 0 or first_is_known) and not (math.isfinite(value) and value <= MOST_LOGP):
            raise ServerError(f"{url} gives {value} as the log-probability of {tokens[n]!r}, {cannot}")
    return Logprobs(tokens, [float(v) for v in numbers])


MOST_LOGP = 1e-3
"""Largest log-probability that rounding explains."""
