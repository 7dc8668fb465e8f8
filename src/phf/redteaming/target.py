"""Settings of a red-teaming search, and the model under attack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from phf.core.types import Sample
from phf.generation.loaded import LoadedModel, prompt_ids
from phf.generation.sample import sample_prompts
from phf.generation.served import ServedModel
from phf.generation.server import Answers, Server
from phf.redteaming.config import RedTeam


@dataclass(frozen=True)
class Target:
    """The model under attack: a loaded one, or one on a server."""

    model: LoadedModel | ServedModel | Server
    """A server: one that is asked in text."""

    def continuations(
        self, prompts: Sequence[str], config: RedTeam, seed: int, answers: Answers
    ) -> tuple[list[list[Sample]], int | None]:
        """`config.continuations` texts after each prompt, and the text tokens read and written (None: the server
        does not count). A refusal of a server is an empty text, which is not judged."""
        repeated = [p for p in prompts for _ in range(config.continuations)]
        spent: int | None
        if isinstance(self.model, Server):
            given = self.model.completions(
                repeated,
                config.max_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                seed=seed,
                answers=answers,
                refused="",
            )
            samples = [
                Sample(id=n, prompt=p, text=text, num_tokens=0, logp=math.nan, finished=finished, seed=seed)
                for n, (p, (text, finished, _)) in enumerate(zip(repeated, given, strict=True))
            ]
            counts = [used for _, _, used in given]
            spent = None if None in counts else sum(c or 0 for c in counts)
        else:
            scenario = config.scenario(seed)
            of_prompt = {p: prompt_ids(self.model, p, scenario) for p in set(prompts)}
            starts = [of_prompt[p] for p in repeated]
            samples = sample_prompts(self.model, scenario, repeated, progress=False, starts=starts)
            spent = sum(len(s) + w.num_tokens for s, w in zip(starts, samples, strict=True))
        per = config.continuations
        return [samples[i : i + per] for i in range(0, len(samples), per)], spent

    def holds(self, prompt: str, config: RedTeam) -> bool:
        """Whether the model's context holds the prompt and its continuation."""
        if isinstance(self.model, Server):
            return True
        return len(prompt_ids(self.model, prompt, config.scenario(0))) + config.max_tokens <= self.model.positions
