"""Models on a server that are asked in token ids, by the same functions as loaded ones."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from phf.core.config import ConfigError
from phf.core.progress import Progress
from phf.core.types import Sample
from phf.generation.loaded import ModelTokens, load_model_tokens, positions_of
from phf.generation.scenario import Scenario
from phf.generation.server import Answers, Server
from phf.training.lm import pretrained_config


@dataclass(frozen=True, kw_only=True)
class ServedModel(ModelTokens):
    """A model on a server with its tokenizer here."""

    server: Server
    context: int
    """The model's longest context, as far as its folder says."""
    answers: Answers | None = None
    """Where answers are kept, so that none is asked for twice."""

    @property
    def positions(self) -> int:
        return self.context


def served_model(server: Server, answers: Answers | None = None) -> ServedModel:
    """The model on a server with `tokenizer`. Raises ConfigError if that is no tokenizer."""
    assert server.tokenizer is not None
    tokens = load_model_tokens(server.tokenizer)
    try:
        context = positions_of(pretrained_config(server.tokenizer))
    except ConfigError:  # a tokenizer alone
        context = int(min(tokens.tokenizer.model_max_length, sys.maxsize))
    return ServedModel(server=server, context=context, answers=answers, **vars(tokens))


def sample_by_ids(
    model: ServedModel,
    scenario: Scenario,
    prompts: Sequence[str],
    starts: Sequence[Sequence[int]],
    banned: Sequence[int],
    progress: bool,
) -> list[Sample]:
    """One sample after each of `starts`. Raises ConfigError for what needs the model's logits."""
    for name in ("guidance", "safe_beam", "repetition_penalty", "banned_words"):
        if getattr(scenario, name) != getattr(Scenario, name):
            raise ConfigError(f"{name} needs the model's logits, which a server does not give; load the model here")
    written = model.server.write(
        starts,
        scenario.max_tokens,
        scenario.temperature,
        scenario.top_p,
        scenario.seed,
        min_tokens=scenario.min_tokens,
        top_k=scenario.top_k,
        banned=banned,
        answers=model.answers,
    )
    silent = {*model.control_ids.values(), int(model.tokenizer.eos_token_id)}
    bar = Progress(written, total=len(starts), desc="sampling", unit="sample", silent=not progress)
    samples = []
    for n, found in enumerate(bar):
        text = [i for i in found.ids if i not in silent]
        counted = [p for i, p in zip(found.ids, found.logp, strict=True) if i not in model.control_ids.values()]
        samples.append(
            Sample(
                id=n,
                prompt=prompts[n],
                text=model.continuation(starts[n], text),
                num_tokens=len(text),
                logp=math.fsum(counted),
                finished=found.ended,
                seed=scenario.seed,
            )
        )
    return samples
