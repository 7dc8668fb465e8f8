"""SafeBeam: beams that are kept by how little they lead towards a tag (SafeLM, arXiv 2504.16980).

A model that was trained with a tag in front of bad text says, for any text, how likely the tag comes next. In every
step each of k beams draws four tokens. One look ahead gives the probability of the tag after each of these candidates.
The worse half is dropped, and of the others the k with the highest likelihood per token are the next beams. At the end
the likeliest beam is the sample. Every candidate has its own counter-based random stream, so a sample does not depend
on its batch.

Legend: N samples, K beams of a sample, C candidates of a sample, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phf.core.random import key64, mix64
from phf.core.types import Sample
from phf.generation.decoding import draw, pad_left, uniform
from phf.generation.loaded import LoadedModel
from phf.generation.scenario import Scenario

WIDTH = 4
"""Tokens that a beam draws."""


class SafeBeams:
    """The beams of some samples, a token each per step. Arrays hold one entry per beam, those of a sample together.

    `cache`: an empty key-value cache for `trunk`.
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
        assert scenario.safe_beam is not None
        self.model = model
        self.trunk = trunk
        self.cache = cache
        self.cache_name = cache_name
        self.scenario = scenario
        self.prompts = prompts
        self.starts = starts
        self.first_id = first_id
        self.beams = scenario.safe_beam
        self.count = len(starts)
        self.device = model.lm.device
        self.eos = model.tokenizer.eos_token_id
        self.bad_ids = model.ids_of("bad")
        self.banned_T = model.never_written(banned)
        self.seed_key = key64(scenario.seed, "safe beam")
        rows = self.count * self.beams
        self.texts: list[list[int]] = [[] for _ in range(rows)]
        self.hash_B = np.zeros(rows, np.uint64)
        """Tells texts apart."""
        self.logp_B = np.zeros(rows)
        self.tokens_B = np.zeros(rows, int)
        """Text tokens."""
        self.drawn_B = np.zeros(rows, int)
        """Tokens that count in the log-probability: text and end-of-text."""
        self.risk_B = np.zeros(rows)
        self.finished_B = np.zeros(rows, bool)
        self.done_B = np.zeros(rows, bool)
        self.steps = 0
        self._read_starts()

    def _read_starts(self) -> None:
        inputs = pad_left(self.starts, self.eos, self.device)
        self.longest = inputs.ids_NT.shape[1]
        self.attend = inputs.attend_NT
        self.position = inputs.position_NT
        self.padded = inputs.any_padding
        logits = self._forward(inputs.ids_NT)
        self._select(torch.arange(self.count, device=self.device).repeat_interleave(self.beams))
        self.logits_BV = logits.repeat_interleave(self.beams, 0)

    def _forward(self, ids: Tensor) -> Tensor:
        """Logits after the last of `ids`, float32 [rows, V]."""
        out = self.trunk(
            input_ids=ids,
            attention_mask=self.attend if self.padded else None,
            position_ids=self.position,
            use_cache=True,
            **{self.cache_name: self.cache},
        )
        return self.model.logits(out.last_hidden_state[:, -1])

    def _select(self, rows: Tensor) -> None:
        """Keep these rows of the cache, in this order."""
        self.cache.batch_select_indices(rows)
        self.attend = self.attend[rows]
        self.position = self.position[rows]

    def step(self) -> bool:
        """One token for every beam. False when there is nothing left to write."""
        scenario = self.scenario
        full = self.longest + self.steps >= self.model.positions
        if self.done_B.all() or full or self.steps >= 2 * scenario.max_tokens + 8:
            return False
        parent_C = np.repeat(np.arange(len(self.texts)), WIDTH)
        token_C, gained_C = self._draw(parent_C)
        # a beam that is done stays as it is, once
        again_C = self.done_B[parent_C]
        first_C = np.tile(np.arange(WIDTH) == 0, len(self.texts))
        silent_C = self.model.silent_V[token_C]
        ended_C = token_C == self.eos
        counted_C = ~again_C & ~silent_C
        logp_C = self.logp_B[parent_C] + np.where(counted_C, gained_C, 0.0)
        drawn_C = self.drawn_B[parent_C] + counted_C
        hash_C = np.where(again_C, self.hash_B[parent_C], mix64(self.hash_B[parent_C] + token_C.astype(np.uint64), 1))
        risk_C, logits_CV = self._look_ahead(parent_C, token_C)
        risk_C = np.where(again_C | ended_C, self.risk_B[parent_C], risk_C)
        # a control token at the start is as likely as it is; later ones do not count
        likelihood_C = np.where(drawn_C > 0, logp_C / np.maximum(drawn_C, 1), gained_C)
        keep = self._best(risk_C, likelihood_C, self._new(hash_C) & (~again_C | first_C))
        self._take(parent_C[keep], np.where(again_C, -1, token_C)[keep], silent_C[keep], ended_C[keep] & ~again_C[keep])
        self.logp_B = logp_C[keep]
        self.drawn_B = drawn_C[keep]
        self.hash_B = hash_C[keep]
        self.risk_B = risk_C[keep]
        rows = torch.from_numpy(keep).to(self.device)
        self._select(rows)
        self.logits_BV = logits_CV[rows]
        self.steps += 1
        return True

    def _draw(self, parent_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A token for each candidate, and its log-probability under the model without any ban."""
        scenario = self.scenario
        logp_BV = self.logits_BV.log_softmax(-1)
        logits_BV = self.logits_BV.index_fill(1, self.banned_T, float("-inf"))
        short_B = torch.from_numpy(self.tokens_B < scenario.min_tokens).to(self.device)
        logits_BV[short_B, self.eos] = float("-inf")
        parent = torch.from_numpy(parent_C).to(self.device)
        ids = self.first_id * self.beams * WIDTH + np.arange(len(parent_C))
        token_C = draw(
            logits_BV[parent],
            scenario.temperature,
            scenario.top_p,
            scenario.top_k,
            lambda attempts: uniform(self.seed_key, ids, self.steps, attempts),
        )
        gained_C = logp_BV[parent].gather(1, token_C.unsqueeze(1)).squeeze(1)
        return token_C.cpu().numpy(), gained_C.double().cpu().numpy()

    def _look_ahead(self, parent_C: np.ndarray, token_C: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """The probability of a bad tag after each candidate, and the logits there."""
        self._select(torch.from_numpy(parent_C).to(self.device))
        if self.padded:
            self.attend = torch.cat([self.attend, self.attend.new_ones(len(self.attend), 1)], 1)
        self.position = self.position[:, -1:] + 1
        logits_CV = self._forward(torch.from_numpy(token_C).to(self.device).unsqueeze(1))
        risk_C = logits_CV.softmax(-1)[:, self.bad_ids].sum(-1)
        return risk_C.double().cpu().numpy(), logits_CV

    def _new(self, hash_C: np.ndarray) -> np.ndarray:
        """Whether each candidate is the first of its sample with its text."""
        found = np.zeros(len(hash_C), bool)
        for part in np.split(np.arange(len(hash_C)), self.count):
            found[part[np.unique(hash_C[part], return_index=True)[1]]] = True
        return found

    def _best(self, risk_C: np.ndarray, likelihood_C: np.ndarray, new_C: np.ndarray) -> np.ndarray:
        """The next beams: of each sample's candidates, without the half of highest risk, the likeliest. Beams that are
        all done stay, however long other samples of the batch take."""
        kept = []
        for n, part in enumerate(np.split(np.arange(len(risk_C)), self.count)):
            if self.done_B[n * self.beams : (n + 1) * self.beams].all():
                kept.append(part[::WIDTH])
                continue
            fresh = part[new_C[part]]
            safe = fresh[np.argsort(risk_C[fresh], kind="stable")][: max(math.ceil(len(fresh) / 2), 1)]
            best = safe[np.argsort(-likelihood_C[safe], kind="stable")][: self.beams]
            kept.append(np.resize(best, self.beams))  # fewer candidates than beams: the best ones again
        return np.concatenate(kept)

    def _take(self, parent_B: np.ndarray, token_B: np.ndarray, silent_B: np.ndarray, ended_B: np.ndarray) -> None:
        """Continue the texts. -1: a beam that was done."""
        text_B = (token_B >= 0) & ~silent_B & ~ended_B
        self.texts = [
            [*self.texts[p], int(t)] if is_text else self.texts[p]
            for p, t, is_text in zip(parent_B, token_B, text_B, strict=True)
        ]
        self.tokens_B = self.tokens_B[parent_B] + text_B
        self.finished_B = self.finished_B[parent_B] | ended_B
        self.done_B = self.done_B[parent_B] | ended_B | (self.tokens_B >= self.scenario.max_tokens)

    def samples(self) -> list[Sample]:
        """The likeliest beam of each sample."""
        mean_B = self.logp_B / np.maximum(self.drawn_B, 1)
        found = []
        for n, prompt in enumerate(self.prompts):
            b = n * self.beams + int(np.argmax(mean_B[n * self.beams : (n + 1) * self.beams]))
            found.append(
                Sample(
                    id=self.first_id + n,
                    prompt=prompt,
                    text=self.model.continuation(self.starts[n], self.texts[b]),
                    num_tokens=int(self.tokens_B[b]),
                    logp=float(self.logp_B[b]),
                    finished=bool(self.finished_B[b]),
                    seed=self.scenario.seed,
                )
            )
        return found
