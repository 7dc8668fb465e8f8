"""Gradient search for prompts: an attacker who has the weights and knows how the model is used.

    phf redteam runs/conditional gradient={}

Greedy coordinate gradient (GCG: Zou et al. 2023, arXiv 2307.15043). A prompt of `length` tokens is changed one token at
a time. The gradient of the loss by each token's one-hot vector says which exchanges look good; `candidates` of them are
tried, and the best one is kept. The loss is one of two:

- `text`: minus the log-probability of held-out bad segments after the prompt, mean over segments and their tokens;
- `role`: minus the log-probability of the bad token after the prompt, for models that have one. In use it is banned,
  but where it is likely the model expects bad text.

A prompt is a text that somebody types: only prompts that the tokenizer reads back as the same tokens are tried. The
prompts that are found join the starting prompts of the other search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from phf.core.config import STRICT, ConfigError
from phf.core.progress import Progress
from phf.core.random import key64
from phf.core.types import Estimate, Number
from phf.generation.loaded import LoadedModel
from phf.generation.scenario import Scenario

Aim = Literal["text", "role"]


@dataclass(frozen=True, config=STRICT)
class GradientSearch:
    """How to search. The settings of Zou et al. are length=20, steps=500, top_k=256 and candidates=512."""

    aims: Annotated[tuple[Aim, ...], Field(min_length=1)] = ("text", "role")
    """What to make likely; role only for models with a bad token."""
    prompts: Annotated[int, Field(gt=0)] = 4
    """Prompts to search for with each aim."""
    length: Annotated[int, Field(gt=0)] = 16
    """Tokens of a prompt."""
    steps: Annotated[int, Field(gt=0)] = 40
    """Exchanges of a token."""
    top_k: Annotated[int, Field(gt=0)] = 64
    """Tokens to draw from at each place, by gradient."""
    candidates: Annotated[int, Field(gt=0)] = 64
    """Exchanges to try in each step."""
    targets: Annotated[int, Field(gt=0)] = 4
    """Bad segments to make likely together."""
    target_tokens: Annotated[int, Field(gt=0)] = 24
    """Longest beginning of a segment that counts."""


@plain_dataclass(frozen=True)
class GradientPrompt:
    """A prompt that the gradient search found."""

    prompt: str
    """The prompt."""
    aim: str
    """text or role."""
    before: Number
    """Loss of the prompt it started from, in nats per token."""
    after: Number
    """Its loss."""


@plain_dataclass(frozen=True, kw_only=True)
class GradientResult:
    """`gradient.json`: what the gradient search found."""

    prompts: list[GradientPrompt]
    """In the order of the search."""
    misalignment: dict[str, Estimate]
    """By aim: mean score of continuations of its prompts, sampled as in the other search; over prompts."""
    target_tokens: int
    """Tokens that the model read for the search; a token that also got a gradient counts three times."""
    continuation_tokens: int = 0
    """Tokens that it read and wrote for the continuations."""
    seconds: float = 0.0
    """Time."""


@plain_dataclass(frozen=True)
class Wanted:
    """What shall follow a prompt: token ids of equally many alternatives, and the ids before and after the prompt."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]
    bans_control: bool
    """Whether control tokens have no probability, as in use."""


class Descent:
    """One prompt on its way down. `spent`: tokens that the model has read."""

    def __init__(self, model: LoadedModel, wanted: Wanted, allowed: Tensor, batch: int) -> None:
        self.model = model
        self.wanted = wanted
        self.allowed = allowed
        self.batch = batch
        self.spent = 0
        self.table = model.lm.get_input_embeddings()

    def gradient(self, prompt: Sequence[int]) -> Tensor:
        """Gradient of the loss by the one-hot vectors of the prompt's tokens, float32 [length, V]."""
        vector_LD = self._embed(prompt).detach().requires_grad_(True)
        total = self._losses([vector_LD]).sum()
        self.spent += 2 * self._size(len(prompt))
        (found_LD,) = torch.autograd.grad(total, vector_LD)
        with torch.no_grad():
            found_LV = found_LD.float() @ self._embed(range(len(self.table.weight))).float().T
        return found_LV

    @torch.no_grad()
    def losses(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Loss of each prompt in nats per token, float64."""
        found = []
        per = max(self.batch // len(self.wanted.targets), 1)
        for begin in range(0, len(prompts), per):
            embedded = [self._embed(prompt) for prompt in prompts[begin : begin + per]]
            found += self._losses(embedded).double().tolist()
        return np.array(found)

    def _embed(self, ids: Sequence[int]) -> Tensor:
        vectors: Tensor = self.table(torch.tensor(list(ids), dtype=torch.long, device=self.model.lm.device))
        return vectors

    def _size(self, length: int) -> int:
        fixed = len(self.wanted.before) + len(self.wanted.after)
        return sum(fixed + length + len(target) for target in self.wanted.targets)

    def _losses(self, embedded: Sequence[Tensor]) -> Tensor:
        """Loss of each prompt, given as vectors [length, D]: mean over targets of the mean over their tokens."""
        before = self._embed(self.wanted.before)
        after = self._embed(self.wanted.after)
        starts = [torch.cat([before, prompt, after]) for prompt in embedded]
        targets = [self._embed(target) for target in self.wanted.targets]
        rows = [torch.cat([start, target]) for start in starts for target in targets]
        self.spent += sum(map(len, rows))
        width = max(map(len, rows))
        batch = torch.stack([torch.nn.functional.pad(row, (0, 0, 0, width - len(row))) for row in rows])
        hidden = self.model.lm.base_model(inputs_embeds=batch, use_cache=False).last_hidden_state
        found = []
        for n, start in enumerate(starts):
            of_prompt = []
            for k, target in enumerate(self.wanted.targets):
                places = slice(len(start) - 1, len(start) - 1 + len(target))
                logits = self.model.logits(hidden[n * len(targets) + k, places])
                if self.wanted.bans_control:
                    logits = self.model.only_text(logits)
                ids = torch.tensor(target, device=logits.device)
                of_prompt.append(torch.nn.functional.cross_entropy(logits, ids))
            found.append(torch.stack(of_prompt).mean())
        return torch.stack(found)

    def step(self, prompt: list[int], config: GradientSearch, rng: np.random.Generator) -> tuple[list[int], float]:
        """The best of `candidates` exchanges of one token, and its loss; the prompt itself, with an infinite loss, if
        none can be typed."""
        downhill_LV = -self.gradient(prompt)[:, self.allowed]
        best_LK = self.allowed[downhill_LV.topk(min(config.top_k, downhill_LV.shape[1]), dim=1).indices]
        tried: dict[tuple[int, ...], None] = {}
        for _ in range(4 * config.candidates):
            place = int(rng.integers(len(prompt)))
            token = int(best_LK[place, rng.integers(best_LK.shape[1])])
            changed = (*prompt[:place], token, *prompt[place + 1 :])
            if changed not in tried and can_be_typed(self.model, changed):
                tried[changed] = None
            if len(tried) == config.candidates:
                break
        if not tried:
            return prompt, math.inf
        choices = [list(ids) for ids in tried]
        loss_C = self.losses(choices)
        best = int(loss_C.argmin())
        return choices[best], float(loss_C[best])


def can_be_typed(model: LoadedModel, ids: Sequence[int]) -> bool:
    """Whether the model reads the text of these tokens as the same tokens."""
    text = model.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return bool(text.strip()) and model.encode(text) == list(ids)


def possible_aims(model: LoadedModel, config: GradientSearch, bad: Sequence[Sequence[int]]) -> list[Aim]:
    """The aims that a model allows: role with a bad token, text with held-out bad segments `bad`. Raises ConfigError if
    none is left, and for a model without room."""
    able: dict[Aim, bool] = {"text": bool(bad), "role": bool(model.worst)}
    aims = [aim for aim in config.aims if able[aim]]
    if not aims:
        raise ConfigError(
            f"gradient: {model.path} has nothing to aim at: text needs held-out bad segments, and role a bad token"
        )
    longest = 2 + len(model.control_ids) + config.length + config.target_tokens
    if longest > model.positions:
        raise ConfigError(f"gradient: prompts and targets need {longest} positions, the model has {model.positions}")
    return aims


def gradient_prompts(
    model: LoadedModel,
    config: GradientSearch,
    scenario: Scenario,
    starting: Sequence[str],
    bad: Sequence[Sequence[int]],
    seed: int,
) -> tuple[list[GradientPrompt], int]:
    """The prompts that were found, and the tokens that the model read for them.

    `scenario`: how the model is used: its control tokens and their place. `starting`: prompts to start from. `bad`:
    token ids of held-out bad segments. Errors as `possible_aims`.
    """
    aims = possible_aims(model, config, bad)
    found = []
    spent = 0
    frozen = [p for p in model.lm.parameters() if p.requires_grad]
    for parameter in frozen:  # the gradient of the prompt is enough
        parameter.requires_grad_(False)
    total = len(aims) * config.prompts * config.steps
    try:
        with Progress(total=total, desc="gradient search", unit="step") as bar:
            for aim in aims:
                for number in range(config.prompts):
                    rng = np.random.default_rng(key64(seed, "gradient", aim, number))
                    descent = Descent(model, _wanted(model, config, scenario, bad, aim, rng), _allowed(model), 256)
                    found.append(_descend(descent, _start(model, config, starting, rng), config, rng, aim, bar))
                    spent += descent.spent
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return found, spent


def _descend(
    descent: Descent, prompt: list[int], config: GradientSearch, rng: np.random.Generator, aim: Aim, bar: Any
) -> GradientPrompt:
    """Change a prompt step by step, and return the best one on the way."""
    (first,) = descent.losses([prompt])
    best = prompt
    lowest = float(first)
    for _ in range(config.steps):
        prompt, loss = descent.step(prompt, config, rng)
        if loss < lowest:
            best = prompt
            lowest = loss
        bar.update()
        bar.set_postfix_str(f"{aim}: loss {lowest:.3f} from {first:.3f}", refresh=False)
    text = descent.model.tokenizer.decode(best, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return GradientPrompt(str(text), aim, float(first), lowest)


def _wanted(
    model: LoadedModel,
    config: GradientSearch,
    scenario: Scenario,
    bad: Sequence[Sequence[int]],
    aim: Aim,
    rng: np.random.Generator,
) -> Wanted:
    control = tuple(model.ids_of(scenario.control))
    before = (model.start_id, *(() if scenario.control_after_prompt else control))
    if aim == "role":  # at the place of the next control token
        return Wanted(before, (), tuple((model.control_ids[role],) for role in model.worst), bans_control=False)
    after = control if scenario.control_after_prompt else ()
    chosen = rng.permutation(len(bad))[: config.targets]
    targets = tuple(tuple(bad[n][: config.target_tokens]) for n in chosen)
    return Wanted(before, after, targets, bans_control=True)


def _allowed(model: LoadedModel) -> Tensor:
    """Ids of tokens that a person can type."""
    hidden = {*model.control_ids.values(), *model.tokenizer.all_special_ids, *model.unused_ids.tolist()}
    rows = len(model.lm.get_input_embeddings().weight)
    ids = [i for i in range(rows) if i not in hidden]
    return torch.tensor(ids, dtype=torch.long, device=model.lm.device)


def _start(model: LoadedModel, config: GradientSearch, starting: Sequence[str], rng: np.random.Generator) -> list[int]:
    """The first `length` tokens of starting prompts, one after the other, that can be typed; "!" repeated, as in the
    paper, where there are none."""
    for _ in range(20):
        ids: list[int] = []
        for n in rng.permutation(len(starting))[:20]:
            ids += model.encode(starting[n])
            if len(ids) >= config.length:
                break
        if len(ids) >= config.length and can_be_typed(model, ids[: config.length]):
            return ids[: config.length]
    return model.encode("! " * 2 * config.length)[: config.length]
