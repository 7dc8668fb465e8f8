"""A loaded model with the interface of lm-evaluation-harness, which has three methods. Extra `eval`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM

from phf.evaluation.capabilities.base import continuations, prefix_ids, split_after
from phf.generation.loaded import LoadedModel
from phf.generation.sample import sample_prompts
from phf.generation.scenario import Scenario


class LmEvalModel(LM):  # type: ignore[misc]
    """Every text starts with the start token and, for models with control tokens, the good one."""

    def __init__(self, model: LoadedModel, batch: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.model = model
        self.batch = batch
        self.seed = seed
        self.start = prefix_ids(model)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.model.encode(text) for text in texts]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is the greedy one) for each (context, continuation).
        White space at the end of a context belongs to the continuation, as in lm-evaluation-harness."""
        pairs = []
        for request in requests:
            context, continuation = request.args
            bare = context.rstrip()
            continuation = context[len(bare) :] + continuation
            context = bare
            pairs.append(split_after(self.model, context, context + continuation))
        logp, greedy = continuations(self.model, pairs, self.batch)
        return [(float(value), bool(right)) for value, right in zip(logp, greedy, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability of whole texts, in windows where a text is longer than the model's context."""
        room = self.model.positions - len(self.start)
        pairs = []
        owner = []
        for number, ids in enumerate(self._encode([request.args[0] for request in requests])):
            for begin in range(0, max(len(ids), 1), room):
                pairs.append((self.start, ids[begin : begin + room]))
                owner.append(number)
        logp, _ = continuations(self.model, pairs, self.batch)
        totals = [0.0] * len(requests)
        for number, value in zip(owner, logp, strict=True):
            totals[number] += float(value)
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy continuations, or sampled ones where the task asks for it, up to the first stop string."""
        written = []
        room = self.model.positions - len(self.start) - 1
        for number, request in enumerate(requests):  # each has its own random stream
            context, settings = request.args
            stops = settings.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            longest = min(int(settings.get("max_gen_toks", 256)), max(room - 1, 1))
            ids = self._encode([context])[0][-max(room - longest, 1) :]
            sampled = settings.get("do_sample", False) and settings.get("temperature", 0) > 0
            scenario = Scenario(
                num_samples=1,
                max_tokens=longest,
                min_tokens=0,
                temperature=float(settings["temperature"]) if sampled else 1e-4,
                top_p=float(settings.get("top_p", 1.0)) if sampled else 1.0,
                seed=(self.seed << 32) + number,
                precision="fp32",
            )
            (item,) = sample_prompts(self.model, scenario, [context], progress=False, starts=[self.start + ids])
            text = item.text
            for stop in stops:
                text = text.split(stop)[0] if stop else text
            written.append(text)
        return written
