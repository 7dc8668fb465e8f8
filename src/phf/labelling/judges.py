"""Judges: they answer a rubric's question about a text.

    phf label scored/ labels/ --rubric rubric.md --server http://host:8000/v1 --model NAME
    phf label scored/ labels/ --rubric rubric.md --local FOLDER

A served model writes its answer, which is read strictly. A local model is not sampled: the label is the one whose
answer it finds likeliest, so it always gives one.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from phf.core import store
from phf.core.config import STRICT, ConfigError, to_plain
from phf.core.progress import Progress
from phf.core.random import key64
from phf.core.runs import model_folder
from phf.core.text import first_line
from phf.core.types import PhfError
from phf.evaluation.capabilities.base import continuations
from phf.generation.loaded import LoadedModel, load_model
from phf.generation.requests import in_threads
from phf.generation.server import Answers, Denied, Refused, Server, ServerError
from phf.labelling.rubric import REFUSED, Rubric, answer_text, parse_label, question

MAX_CHARS = 8000
"""Longer texts are cut before they are shown to a judge."""
CHARS_PER_TOKEN = 3.5
"""Of English text, roughly, for costs of servers whose tokenizer is not known."""
PROBES = 4
"""Answers that are asked for first, to know the time that the others take. They are kept."""
NO_ANSWER = "no answer"
FAILURES_IN_A_ROW = 20
"""A server that gave no answer for so long gets no more questions."""


class JudgeError(PhfError, RuntimeError):
    """A judge that cannot be used."""


@dataclass(frozen=True)
class Given:
    """What a judge said about a text: a label, or why there is none."""

    label: int | None
    reason: str = ""
    """Why there is no label."""
    said: str = ""
    """Its answer, or the error."""
    tokens: int = 0
    """That the server counted, those of the question included."""
    asked: bool = True
    """Whether it was asked for now; False: it was there from an earlier call."""


@dataclass(frozen=True)
class Cost:
    """What labelling will take."""

    answers: int
    """Answers to get; those from earlier calls are there already."""
    known: int
    """Answers that are there already."""
    tokens_in: int
    """Tokens of the questions, roughly."""
    tokens_out: int
    """Tokens of the answers at most."""


class Judge:
    """Interface. A subclass is a frozen dataclass; its fields are its settings."""

    def identity(self) -> Any:
        """Everything that decides its labels."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """Its name in the file of labels."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise an error for a judge that cannot be used, before anything starts."""

    def cost(self, texts: Sequence[str], rubric: Rubric, repeats: int, answers: Answers) -> Cost:
        """What `labels` will take."""
        raise NotImplementedError

    def unknown(self, texts: Sequence[str], rubric: Rubric, answers: Answers) -> Iterator[str]:
        """The texts whose (first) label is not in `answers`."""
        raise NotImplementedError

    @property
    def at_once(self) -> int:
        """How many questions are answered at the same time."""
        return 1

    def labels(self, texts: Sequence[str], rubric: Rubric, repeat: int, answers: Answers) -> Iterator[Given]:
        """What the judge says about each text, in order. Answers that are in `answers` are not asked for again."""
        raise NotImplementedError


def shown_to_judge(text: str) -> str:
    """A text as judges read it: without the middle if it is long."""
    if len(text) <= MAX_CHARS:
        return text
    half = MAX_CHARS // 2
    return f"{text[:half]}\n[...]\n{text[-half:]}"


@settings(frozen=True, config=STRICT)
class ServedJudge(Judge):
    """A model on an OpenAI-compatible server, by its chat completions or, with `chat: false`, its completions."""

    server: Server
    name: Literal["server"] = "server"
    chat: bool = True
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Repeated labels need one above 0."""
    max_tokens: Annotated[int, Field(gt=0)] = 64
    """Of an answer. A model that writes its thoughts first needs more."""

    def identity(self) -> Any:
        return [to_plain(self) | {"server": None}, self.server.identity]

    @property
    def title(self) -> str:
        return self.server.model

    def cost(self, texts: Sequence[str], rubric: Rubric, repeats: int, answers: Answers) -> Cost:
        if repeats > 1 and not self.temperature:
            raise ConfigError(f"{repeats} labels of each text would be equal: set judge.temperature above 0")
        asked = [(text, repeat) for text in texts for repeat in range(repeats)]
        open_ = [text for text, repeat in asked if self._key(text, rubric, repeat) not in answers.known]
        chars = sum(len(question(rubric, shown_to_judge(text))) for text in open_)
        return Cost(
            len(open_), len(asked) - len(open_), math.ceil(chars / CHARS_PER_TOKEN), len(open_) * self.max_tokens
        )

    def unknown(self, texts: Sequence[str], rubric: Rubric, answers: Answers) -> Iterator[str]:
        return (text for text in texts if self._key(text, rubric, 0) not in answers.known)

    @property
    def at_once(self) -> int:
        return self.server.batch

    def _request(self, text: str, rubric: Rubric, repeat: int, attempt: int = 0) -> tuple[str, int]:
        what = (repeat, store.text_hash(text, b"phf judge") >> 1, *([attempt] if attempt else []))
        return question(rubric, shown_to_judge(text)), key64(*what) >> 33

    def _key(self, text: str, rubric: Rubric, repeat: int) -> str:
        asked, seed = self._request(text, rubric, repeat)
        return self.server.answer_key(asked, self.chat, self.max_tokens, self.temperature, seed)

    def labels(self, texts: Sequence[str], rubric: Rubric, repeat: int, answers: Answers) -> Iterator[Given]:
        failed = 0

        def one(text: str) -> Given:
            given = ask(text, 0)
            if given.label is None and given.reason not in (REFUSED, NO_ANSWER):  # what cannot be read, once more
                if given.asked:
                    answers.count_again(f"answer that cannot be read ({given.reason})")
                again = ask(text, 1)
                spent = given.tokens + again.tokens
                given = replace(again if again.label is not None else given, tokens=spent)
            return given

        def ask(text: str, attempt: int) -> Given:
            asked, seed = self._request(text, rubric, repeat, attempt)
            how = (asked, self.chat, self.max_tokens, self.temperature, seed)
            new = self.server.answer_key(*how) not in answers.known
            try:
                answer = self.server.answer(*how, answers)
            except Denied:
                raise
            except Refused as error:
                return Given(None, REFUSED, first_line(error))
            except ServerError as error:
                return Given(None, NO_ANSWER, first_line(error))
            label = parse_label(answer.text, rubric.top)
            if isinstance(label, int):
                return Given(label, said=answer.text, tokens=answer.tokens or 0, asked=new)
            return Given(None, label, answer.text, answer.tokens or 0, asked=new)

        for found in in_threads(one, texts, self.server.batch):
            failed = failed + 1 if found.reason == NO_ANSWER else 0
            if failed == min(FAILURES_IN_A_ROW, len(texts)):
                raise JudgeError(f"{failed} questions in a row got no answer: {found.said}")
            yield found


@settings(frozen=True, config=STRICT)
class LocalJudge(Judge):
    """A causal or chat model from a folder or the Hub. `chat`: use its chat template; None: if it has one."""

    path: str
    name: Literal["local"] = "local"
    revision: str | None = None
    chat: bool | None = None
    batch: Annotated[int, Field(gt=0)] = 32

    def identity(self) -> Any:
        return [to_plain(self) | {"batch": None}, store.path_hash(model_folder(self.path))]

    @property
    def title(self) -> str:
        return self.path.rstrip("/").rpartition("/")[2]

    def check(self) -> None:
        _local_judge(self.path, self.revision)

    def cost(self, texts: Sequence[str], rubric: Rubric, repeats: int, answers: Answers) -> Cost:
        if repeats > 1:
            raise ConfigError("a local judge always gives the same label; repeats are for judges that sample")
        mark = store.fingerprint([self.identity(), rubric.text])
        open_ = [text for text in texts if _local_key(mark, text) not in answers.known]
        model = _local_judge(self.path, self.revision)
        tokens = sum(len(self._asked(model, rubric, text)) for text in open_)
        return Cost(len(open_), len(texts) - len(open_), tokens * (rubric.top + 1), 0)

    def unknown(self, texts: Sequence[str], rubric: Rubric, answers: Answers) -> Iterator[str]:
        mark = store.fingerprint([self.identity(), rubric.text])
        return (text for text in texts if _local_key(mark, text) not in answers.known)

    def labels(self, texts: Sequence[str], rubric: Rubric, repeat: int, answers: Answers) -> Iterator[Given]:
        mark = store.fingerprint([self.identity(), rubric.text])
        for begin in range(0, len(texts), self.batch):
            part = {_local_key(mark, text): text for text in texts[begin : begin + self.batch]}
            new = {key: text for key, text in part.items() if key not in answers.known}
            for key, label in zip(new, self._labels(list(new.values()), rubric), strict=True):
                answers.keep(key, label)
            for key in part:
                label = answers.known[key]
                if isinstance(label, int) and 0 <= label <= rubric.top:
                    yield Given(label, asked=key in new)
                else:
                    yield Given(None, "probabilities that are no numbers", asked=key in new)

    def _labels(self, texts: Sequence[str], rubric: Rubric) -> list[int | None]:
        """The likeliest label of each text; None where the model's numbers are none."""
        model = _local_judge(self.path, self.revision)
        ids = model.tokenizer(
            [answer_text(n) for n in range(rubric.top + 1)], add_special_tokens=False, split_special_tokens=False
        )["input_ids"]
        asked = [self._asked(model, rubric, text) for text in texts]
        pairs = [(start, list(answer)) for start in asked for answer in ids]
        logp, _ = continuations(model, pairs, batch=self.batch)
        likely = logp.reshape(len(texts), rubric.top + 1)
        return [int(row.argmax()) if np.isfinite(row).all() else None for row in likely]

    def _asked(self, model: LoadedModel, rubric: Rubric, text: str) -> list[int]:
        """The question in token ids, with as much of the text as the model can read."""
        chat = bool(model.tokenizer.chat_template) if self.chat is None else self.chat
        room = model.positions - 32  # for the answer
        shown = shown_to_judge(text)
        while len(ids := model.asked(question(rubric, shown), chat)) > room:
            if not shown:
                raise ConfigError(f"{self.path} reads {model.positions} tokens, fewer than the rubric has")
            shown = shown[: int(len(shown) * min(0.9, room / len(ids)))]
        return ids


def _local_key(mark: str, text: str) -> str:
    return store.fingerprint([mark, text])


@functools.lru_cache(maxsize=1)
def _local_judge(path: str, revision: str | None) -> LoadedModel:
    return load_model(path, revision)


AnyJudge: Any = Annotated[ServedJudge | LocalJudge, Field(discriminator="name", title="judge")]


def with_progress(judge: Judge, given: Iterator[Given], total: int) -> Iterator[Given]:
    """`given` with progress on stderr."""
    without = 0
    with Progress(given, total=total, desc=f"labels of {judge.title}", unit="text") as bar:
        for found in bar:
            without += found.label is None
            bar.set_postfix_str(f"{without} without a label", refresh=False)
            yield found


def duration(seconds: float) -> str:
    """A time as people say it."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def probed(judge: Judge, texts: Sequence[str], rubric: Rubric, answers: Answers, cost: Cost) -> float | None:
    """Seconds that a judge's answers take, roughly, by its first few, which are kept. None if all are there, or
    none of these comes."""
    first = list(itertools.islice(judge.unknown(texts, rubric, answers), PROBES))
    if not first:
        return None
    start = time.monotonic()
    try:
        for _ in judge.labels(first, rubric, 0, answers):
            pass
    except JudgeError:  # the others are asked all the same
        return None
    took = time.monotonic() - start
    together = max(judge.at_once, 1)
    return took * math.ceil(cost.answers / together) / math.ceil(len(first) / together)
