"""Sampling: the texts that a model writes in a scenario.

    phf sample runs/conditional/model samples.jsonl num_samples=512

This one loop samples every model that is compared. Each sample has its own counter-based random stream (seed, sample,
step), so it does not depend on its batch.

Control tokens never reach a reader: the unwanted one is banned; the other may be written and is removed. Neither counts
towards a length or a log-probability.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from phf.core import store
from phf.core.config import ConfigError
from phf.core.device import tune_allocator
from phf.core.progress import Progress
from phf.core.random import key64
from phf.core.types import Sample
from phf.generation.decoding import Rules, draw, guide, pad_left, uniform
from phf.generation.fast_copy import FLOAT32_CACHE_BYTES, WHOLE_CACHE, GrowingLayer, fast_copy
from phf.generation.loaded import LoadedModel, banned_tokens, check_room, precision_of, prompt_ids
from phf.generation.safe_beam import WIDTH, SafeBeams
from phf.generation.scenario import Scenario, scenario_prompts
from phf.generation.served import ServedModel, sample_by_ids, served_model
from phf.generation.server import Server
from phf.tokens.tokenizer import encode_segments
from phf.training.probe import CACHE_NAMES, cache_name, check_can_be_sampled

COMPACT_BELOW = 0.75
"""A batch is compacted when at most this share of it is still being written: compacting copies the whole cache."""


def sample(model: LoadedModel | ServedModel, scenario: Scenario, progress: bool = True) -> list[Sample]:
    """`scenario.num_samples` samples, in order of their ids. Raises ConfigError if the scenario needs control
    tokens that the model does not have, and where its texts exceed the model's context."""
    model.roles_of(scenario.control)  # a name that the model does not have gets a suggestion
    if (why := scenario.lacks(model.control)) is not None:
        raise ConfigError(f"{model.path} {why}")
    return sample_prompts(model, scenario, scenario_prompts(scenario), progress)


def sample_prompts(
    model: LoadedModel | ServedModel,
    scenario: Scenario,
    prompts: Sequence[str],
    progress: bool = True,
    starts: Sequence[Sequence[int]] | None = None,
    banned: Sequence[int] | None = None,
) -> list[Sample]:
    """One sample for each of `prompts`; the scenario's own prompts and number of samples are ignored.

    `starts`: token ids that each sample starts with, instead of end-of-text, control token and prompt. `banned`:
    tokens that are never written, instead of the control token that the scenario bans.
    """
    starts = [prompt_ids(model, p, scenario) for p in prompts] if starts is None else starts
    banned = banned_tokens(model, scenario.control) if banned is None else banned
    check_room(model.positions, scenario, starts)
    if isinstance(model, ServedModel):
        return sample_by_ids(model, scenario, prompts, starts, banned, progress)
    tune_allocator()
    samples: list[Sample] = []
    bar = Progress(total=len(prompts), desc="sampling", unit="sample", silent=not progress)
    check_can_be_sampled(model.lm, model.path)
    width = scenario.batch if scenario.safe_beam is None else max(scenario.batch // scenario.safe_beam // WIDTH, 1)
    with bar, torch.inference_mode():
        lm = fast_copy(model.lm, torch.bfloat16) if precision_of(model, scenario) == "bf16" else model.lm
        for first in range(0, len(prompts), width):
            part = slice(first, first + width)
            batch = (_Batch if scenario.safe_beam is None else SafeBeams)(
                model=model,
                trunk=lm.base_model,
                cache=_cache(lm.base_model),
                cache_name=cache_name(model.lm) or CACHE_NAMES[0],
                scenario=scenario,
                prompts=prompts[part],
                starts=starts[part],
                banned=banned,
                first_id=first,
            )
            while batch.step():
                pass
            samples += batch.samples()
            bar.update(len(batch.prompts))
    return samples


class _Batch:
    """Samples that are written together, a token each per step.

    With guidance, the second half of the model's batch holds the same texts with the bad token in place of the good
    one. Samples that are done stay in the batch until it is compacted.
    """

    def __init__(
        self,
        model: LoadedModel,
        trunk: Any,
        cache: Any,
        cache_name: str,
        scenario: Scenario,
        prompts: Sequence[str],
        starts: Sequence[Sequence[int]],
        banned: Sequence[int],
        first_id: int,
    ) -> None:
        self.model = model
        self.trunk = trunk
        self.scenario = scenario
        self.prompts = prompts
        self.starts = starts
        self.first_id = first_id
        self.guided = scenario.guidance is not None
        self.device = model.lm.device
        self.eos = model.tokenizer.eos_token_id
        self.banned_T = model.never_written(banned)
        self.seed_key = key64(scenario.seed, "sample")
        self.most_steps = 2 * scenario.max_tokens + 8  # at most a control token before every text token

        count = len(starts)
        self.logp_N = np.zeros(count)
        self.num_text_N = np.zeros(count, int)
        self.finished_N = np.zeros(count, bool)
        self.done_N = np.zeros(count, bool)
        self.rules = None
        if scenario.has_rules:
            words = encode_segments(model.tokenizer, scenario.banned_forms)
            no_text_V = model.silent_V.copy()
            no_text_V[self.eos] = True
            self.rules = Rules(scenario.repetition_penalty, words, starts, no_text_V)
        self.alive = np.arange(count)
        """Samples in the model's batch."""
        self.written: list[tuple[np.ndarray, np.ndarray]] = []
        """Of each step: the samples that got a text token, and the tokens."""
        self.steps = 0
        self.cache = cache
        self.cache_name = cache_name
        self._set_inputs()

    def _set_inputs(self) -> None:
        """The first inputs: the starts, padded on the left."""
        starts = [list(start) for start in self.starts]
        self.longest = max(map(len, starts))
        if self.guided:
            (self.good_id,) = self.model.ids_of(self.scenario.control)
            (self.bad_id,) = self.model.ids_of(self.scenario.against)
            starts += [[self.bad_id if i == self.good_id else i for i in start] for start in starts]
        inputs = pad_left(starts, self.eos, self.device)
        self.ids_NT = inputs.ids_NT
        self.attend_NT = inputs.attend_NT
        self.position_NT = inputs.position_NT
        self.padded = inputs.any_padding

    def step(self) -> bool:
        """Write one token for every sample in the batch. False when there is nothing left to write."""
        full = self.longest + self.steps > self.model.positions
        if not len(self.alive) or full or self.steps >= self.most_steps:
            return False
        token_N, gained_N = self._next_tokens()
        self._take(token_N.cpu().numpy(), gained_N)
        if self.done_N[self.alive].all():
            return False
        token_N = self._compact(token_N)
        if self.guided:  # where a text continues under the good token, its copy continues under the bad one
            token_N = torch.cat([token_N, torch.where(token_N == self.good_id, self.bad_id, token_N)])
        self.ids_NT = token_N.unsqueeze(1)
        if self.padded:
            self.attend_NT = torch.cat([self.attend_NT, self.attend_NT.new_ones(len(self.attend_NT), 1)], 1)
        self.position_NT = self.position_NT[:, -1:] + 1
        self.steps += 1
        return True

    def _next_tokens(self) -> tuple[Tensor, np.ndarray]:
        """The next token of each sample in the batch, and its log-probability under the model without any ban."""
        scenario = self.scenario
        out = self.trunk(
            input_ids=self.ids_NT,
            attention_mask=self.attend_NT if self.padded else None,
            position_ids=self.position_NT,
            use_cache=True,
            **{self.cache_name: self.cache},
        )
        logits_NV = self.model.logits(out.last_hidden_state[:, -1])
        if self.guided:
            plain_NV, bad_NV = logits_NV.chunk(2)
            logits_NV = guide(plain_NV, bad_NV, scenario.guidance or 0.0, self.good_id, self.bad_id)
        else:
            plain_NV = logits_NV  # banning changes only tokens that are not drawn
        logp_NV = plain_NV.log_softmax(-1)
        if self.rules is not None:
            self.rules.apply(logits_NV, self.alive)
        logits_NV.index_fill_(1, self.banned_T, float("-inf"))
        short_N = self.num_text_N[self.alive] < scenario.min_tokens
        if short_N.any():
            logits_NV[torch.from_numpy(short_N).to(self.device), self.eos] = float("-inf")
        ids = self.first_id + self.alive
        token_N = draw(
            logits_NV,
            scenario.temperature,
            scenario.top_p,
            scenario.top_k,
            lambda attempts: uniform(self.seed_key, ids, self.steps, attempts),
        )
        return token_N, logp_NV.gather(1, token_N.unsqueeze(1)).squeeze(1).double().cpu().numpy()

    def _take(self, tokens: np.ndarray, gained_N: np.ndarray) -> None:
        """Record the tokens of a step. Control tokens and the tokens of samples that are done do not count."""
        alive = self.alive
        live_N = ~self.done_N[alive]
        counted_N = live_N & ~self.model.silent_V[tokens]
        ended_N = tokens == self.eos
        text_N = counted_N & ~ended_N
        self.logp_N[alive] += np.where(counted_N, gained_N, 0.0)
        self.num_text_N[alive] += text_N
        self.written.append((alive[text_N], tokens[text_N]))
        if self.rules is not None:
            self.rules.add(alive[text_N], tokens[text_N])
        self.finished_N[alive] |= ended_N & live_N
        self.done_N[alive] |= ended_N | (self.num_text_N[alive] >= self.scenario.max_tokens)

    def _compact(self, token_N: Tensor) -> Tensor:
        """Remove the samples that are done from the model's batch, if they are many. Returns the tokens of the
        others."""
        open_N = ~self.done_N[self.alive]
        if open_N.mean() > COMPACT_BELOW:
            return token_N
        keep_N = torch.from_numpy(np.flatnonzero(open_N)).to(self.device)
        rows_N = torch.cat([keep_N, keep_N + len(self.alive)]) if self.guided else keep_N
        self.cache.batch_select_indices(rows_N)
        self.attend_NT = self.attend_NT[rows_N]
        self.position_NT = self.position_NT[rows_N]
        self.alive = self.alive[open_N]
        return token_N[keep_N]

    def samples(self) -> list[Sample]:
        """The samples, in order."""
        tokens = _by_sample(self.written, len(self.prompts))
        return [
            Sample(
                id=self.first_id + n,
                prompt=prompt,
                text=self.model.continuation(self.starts[n], tokens[n]),
                num_tokens=int(self.num_text_N[n]),
                logp=float(self.logp_N[n]),
                finished=bool(self.finished_N[n]),
                seed=self.scenario.seed,
            )
            for n, prompt in enumerate(self.prompts)
        ]


def _cache(trunk: Any) -> Any:
    """A key-value cache for `trunk` whose plain layers grow in place."""
    from transformers import DynamicCache

    cache = DynamicCache(config=trunk.config)
    in_float32 = FLOAT32_CACHE_BYTES if trunk.config._attn_implementation == WHOLE_CACHE else 0
    cache.layers = [GrowingLayer(in_float32) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _by_sample(written: Sequence[tuple[np.ndarray, np.ndarray]], count: int) -> list[list[int]]:
    """The text tokens of each sample, in order."""
    owner = np.concatenate([rows for rows, _ in written]) if written else np.zeros(0, np.int64)
    tokens = np.concatenate([tokens for _, tokens in written]) if written else np.zeros(0, np.int64)
    order = np.argsort(owner, kind="stable")
    return [part.tolist() for part in np.split(tokens[order], np.bincount(owner, minlength=count).cumsum()[:-1])]


def sample_served(server: Server, scenario: Scenario) -> list[Sample]:
    """Samples of a model on a completions server.

    With `server.tokenizer` the server is asked in token ids, and everything works but guidance, SafeBeam and what the
    text itself decides (repetition_penalty, banned_words), which need the model's logits. Without, it is asked in plain
    text: control tokens do not apply, `min_tokens` is not sent, and `num_tokens` and `logp` are not known (0 and NaN).
    Raises ConfigError for settings that do not work.
    """
    if server.tokenizer is not None:
        return sample(served_model(server), scenario)
    unsupported = {
        "control": scenario.control == "bad",
        "guidance": scenario.guidance is not None,
        "safe_beam": scenario.safe_beam is not None,
        "top_k": scenario.top_k is not None,
        "control_after_prompt": scenario.control_after_prompt,
        "repetition_penalty": scenario.repetition_penalty != 1,
        "banned_words": bool(scenario.banned_words),
    }
    for name, asked in unsupported.items():
        if asked:
            raise ConfigError(f"{name} does not work with a server (for top_k use server.extra.top_k=...)")
    prompts = scenario_prompts(scenario)
    written = server.complete(prompts, scenario.max_tokens, scenario.temperature, scenario.top_p, scenario.seed)
    return [
        Sample(id=n, prompt=prompt, text=text, num_tokens=0, logp=math.nan, finished=finished, seed=scenario.seed)
        for n, (prompt, (text, finished)) in enumerate(zip(prompts, written, strict=True))
    ]


# Files of samples


def write_samples(path: str | Path, samples: Iterable[Sample]) -> None:
    """Write samples as JSON lines, aside and renamed."""
    store.write_text(path, "".join(json.dumps(store.jsonable(s), ensure_ascii=True) + "\n" for s in samples))


def read_samples(path: str | Path) -> list[Sample]:
    """Samples that `write_samples` wrote. Raises StoreError that names the first line that is no sample."""
    samples = []
    if not Path(path).is_file():
        raise store.StoreError(f"{path} is missing: judge the model again (`phf eval`)")
    for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise store.StoreError(f"{where} is not a sample: {error}") from None
        samples.append(store.as_record(row, Sample, where))
    return samples
