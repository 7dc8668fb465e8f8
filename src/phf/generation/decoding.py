"""Drawing a token: nucleus sampling without a sort, and guidance between control tokens.

Nucleus sampling works by rejection: draw a token from p and keep it if the mass of likelier tokens is below top_p. The
distribution is that of sorting the vocabulary, without the sort, which takes most of the time of `generate` on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor

from phf.core.config import ConfigError
from phf.core.random import mix64

MAX_REJECTIONS = 25
"""Draws before the exact sort is used. With top_p 0.9 a token is rejected at most one time in ten."""
DRAWS_AT_ONCE = 4
"""Draws at a time after the first."""
BELOW_ONE = 1 - 2.0**-52
"""Its product with any positive float64 is smaller than that number."""
BROKEN = "the model's logits are NaN or infinite, so its weights are broken"
TOKENS_PER_BLOCK = 64
"""Tokens whose probabilities are summed before one of them is searched."""


@dataclass(frozen=True)
class Padded:
    """Texts that a batch starts with, padded on the left to one length: [N, T]."""

    ids_NT: Tensor
    attend_NT: Tensor
    """1 for a token, 0 for padding."""
    position_NT: Tensor

    @property
    def any_padding(self) -> bool:
        return bool((self.attend_NT == 0).any())


def pad_left(starts: Sequence[Sequence[int]], fill: int, device: torch.device) -> Padded:
    """Token ids of several texts as one batch."""
    longest = max(map(len, starts))
    ids_NT = torch.full((len(starts), longest), fill, device=device)
    attend_NT = torch.zeros((len(starts), longest), dtype=torch.long, device=device)
    for n, start in enumerate(starts):
        ids_NT[n, longest - len(start) :] = torch.tensor(start, device=device)
        attend_NT[n, longest - len(start) :] = 1
    return Padded(ids_NT, attend_NT, (attend_NT.cumsum(1) - 1).clamp(min=0))


def uniform(seed_key: int, id_N: np.ndarray, step: int, attempts: Sequence[int]) -> np.ndarray:
    """Uniforms in [0, 1), [N, attempts], that depend on (seed, id, step, attempt) only."""
    stream_N = mix64(id_N.astype(np.uint64), seed_key)
    count_K = np.asarray(attempts, np.uint64) + np.uint64((step << 16) + 1)
    bits_NK = mix64(stream_N[:, None] + count_K, 0)
    return (bits_NK >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Rules:
    """What the texts of a batch hold decides what may follow: a penalty for repeated tokens, and banned words.

    The penalty is that of CTRL (Keskar et al. 2019, arXiv 1909.05858, section 4.1) in the form of transformers: logit /
    penalty for a positive logit, logit x penalty for a negative one. `words`: token ids of each banned word.
    `no_text_V`: tokens that are no text, which do not count.
    """

    def __init__(
        self, penalty: float, words: Sequence[Sequence[int]], starts: Sequence[Sequence[int]], no_text_V: np.ndarray
    ) -> None:
        self.penalty = penalty
        self.tokens = [word[0] for word in words if len(word) == 1]
        self.words = [list(word) for word in words if len(word) > 1]
        self.texts = [[i for i in start if not no_text_V[i]] for start in starts]

    def add(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """Text tokens that were written in these rows."""
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            self.texts[row].append(token)

    def apply(self, logits_NV: Tensor, rows: np.ndarray) -> None:
        """Change the logits of what comes next in these rows, in place."""
        logits_NV[:, self.tokens] = float("-inf")
        for n, text in enumerate(self.texts[row] for row in rows.tolist()):
            if self.penalty != 1 and text:
                seen = torch.tensor(sorted(set(text)), device=logits_NV.device)
                logits = logits_NV[n, seen]
                logits_NV[n, seen] = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
            for word in self.words:
                if text[-len(word) + 1 :] == word[:-1]:
                    logits_NV[n, word[-1]] = float("-inf")


def draw(logits_NV: Tensor, temperature: float, top_p: float, top_k: int | None, uniforms: Any) -> Tensor:
    """One token per row [N]: temperature first, then top-k, then nucleus sampling with `top_p`. At temperature 0 the
    likeliest one.

    The nucleus is every token whose likelier tokens together have a mass below `top_p`. `uniforms(attempts)`
    returns float64 [N, attempts] in [0, 1). A rejected token is drawn again; rows that are still rejected after
    `MAX_REJECTIONS` draws are sorted, so the distribution is exact. A token of probability 0 is never drawn. Raises
    ConfigError if logits are NaN or infinite.
    """
    if temperature == 0:
        best = logits_NV.max(-1)
        if not best.values.isfinite().all():
            raise ConfigError(BROKEN)
        return best.indices
    p_NV = torch.softmax(logits_NV.float() / temperature, -1)
    if top_k is not None and top_k < p_NV.shape[1]:
        kth_N1 = p_NV.topk(top_k, -1).values[:, -1:]
        p_NV = torch.where(p_NV >= kth_N1, p_NV, 0.0)
        p_NV = p_NV / p_NV.sum(-1, keepdim=True)
    if p_NV.shape[1] % TOKENS_PER_BLOCK:
        p_NV = F.pad(p_NV, (0, -p_NV.shape[1] % TOKENS_PER_BLOCK))
    cdf_NB = F.pad(p_NV.unflatten(1, (-1, TOKENS_PER_BLOCK)).sum(-1).double().cumsum(-1), (1, 0))
    if not math.isfinite(cdf_NB[:, -1].sum()):
        raise ConfigError(BROKEN)

    def uniforms_of(attempts: Sequence[int]) -> Tensor:
        return torch.from_numpy(uniforms(attempts)).to(p_NV.device)

    u_NK = uniforms_of(range(1 + DRAWS_AT_ONCE))
    chosen_N, accepted_N = _attempt(p_NV, cdf_NB, top_p, u_NK[:, :1])
    open_N = torch.nonzero(~accepted_N).squeeze(1)
    for first in range(1, MAX_REJECTIONS, DRAWS_AT_ONCE):
        if len(open_N) == 0:
            return chosen_N
        u_NK = (u_NK[:, 1:] if first == 1 else uniforms_of(range(first, first + DRAWS_AT_ONCE)))[open_N]
        token_N, accepted_N = _attempt(p_NV[open_N], cdf_NB[open_N], top_p, u_NK)
        chosen_N[open_N[accepted_N]] = token_N[accepted_N]
        open_N = open_N[~accepted_N]
    if len(open_N):
        u_N1 = uniforms_of([MAX_REJECTIONS])[open_N]
        chosen_N[open_N] = _draw_sorted(p_NV[open_N], top_p, u_N1)
    return chosen_N


def _attempt(p_NV: Tensor, cdf_NB: Tensor, top_p: float, u_NK: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the first of K draws that is in the nucleus, and whether there is one.

    A block of the vocabulary is drawn first, then a token in it. `cdf_NB`: the mass before each block, and the
    whole mass.
    """
    N, K = u_NK.shape
    target_NK = u_NK.clamp(max=BELOW_ONE) * cdf_NB[:, -1:]
    block_NK = torch.searchsorted(cdf_NB, target_NK, right=True) - 1
    inside_NKL = p_NV.unflatten(1, (-1, TOKENS_PER_BLOCK)).gather(
        1, block_NK.unsqueeze(2).expand(-1, -1, TOKENS_PER_BLOCK)
    )
    inside_NKL = inside_NKL.double().cumsum(-1)
    left_NK = torch.minimum(
        target_NK - cdf_NB.gather(1, block_NK), inside_NKL[..., -1] * BELOW_ONE
    )  # the two sums round differently
    place_NK = (
        torch.searchsorted(inside_NKL, left_NK.unsqueeze(2), right=True).squeeze(2).clamp(max=TOKENS_PER_BLOCK - 1)
    )
    token_NK = block_NK * TOKENS_PER_BLOCK + place_NK
    if top_p >= 1:
        return token_NK[:, 0], torch.ones(N, dtype=torch.bool, device=p_NV.device)
    own_NK = p_NV.gather(1, token_NK)
    # the sum of the larger probabilities: a quotient is above 1 exactly where its numerator is the larger
    above_NKV = F.hardshrink(p_NV.unsqueeze(1) / own_NK.unsqueeze(2), 1.0)
    accepted_NK = above_NKV.sum(-1) * own_NK < top_p
    if K == 1:
        return token_NK[:, 0], accepted_NK[:, 0]
    first_N1 = accepted_NK.int().argmax(1, keepdim=True)
    return token_NK.gather(1, first_N1).squeeze(1), accepted_NK.any(1)


def _draw_sorted(p_NV: Tensor, top_p: float, u_N1: Tensor) -> Tensor:
    """Nucleus sampling by sorting, for the rows that rejection did not settle. The distribution is the same."""
    sorted_NV, order_NV = torch.sort(p_NV, dim=-1, descending=True, stable=True)
    before_NV = sorted_NV.cumsum(-1) - sorted_NV
    first_NV = F.pad(sorted_NV[:, 1:] != sorted_NV[:, :-1], (1, 0), value=True)
    # equally likely tokens are kept or dropped together
    before_NV = torch.where(first_NV, before_NV, 0.0).cummax(-1).values
    kept_NV = torch.where(before_NV < top_p, sorted_NV, 0.0).double().cumsum(-1)
    rank_N1 = torch.searchsorted(kept_NV, u_N1 * kept_NV[:, -1:], right=True).clamp(max=p_NV.shape[1] - 1)
    return order_NV.gather(1, rank_N1).squeeze(1)


def guide(good_NV: Tensor, bad_NV: Tensor, strength: float, good_id: int, bad_id: int) -> Tensor:
    """Logits l_bad + g (l_good - l_bad). In the bad context the two control tokens are exchanged."""
    swapped_NV = bad_NV.clone()
    swapped_NV[:, [good_id, bad_id]] = bad_NV[:, [bad_id, good_id]]
    guided_NV = swapped_NV + strength * (good_NV - swapped_NV)
    return torch.where(torch.isneginf(good_NV), good_NV, guided_NV)  # banned tokens stay banned


class GuidedDecoding(LogitsProcessor):
    """Guidance for plain `generate`.

    Give `generate` 2N prompts, `do_sample=False` and this processor. The second N prompts are the first N with the bad
    token in place of the good one. The processor draws the tokens itself, so both halves continue in the same way; a
    temperature of 0 takes the likeliest token. The first N outputs are the samples.
    """

    def __init__(
        self, good_id: int, bad_id: int, strength: float, temperature: float = 0.7, top_p: float = 0.9, seed: int = 0
    ) -> None:
        if not 0 < top_p <= 1:
            raise ConfigError(f"top_p={top_p} is not in (0, 1]")
        self.good_id = good_id
        self.bad_id = bad_id
        self.strength = strength
        self.temperature = temperature
        self.top_p = top_p
        self.generator = np.random.Generator(np.random.Philox(seed))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        good_NV, bad_NV = scores.float().chunk(2)
        guided_NV = guide(good_NV, bad_NV, self.strength, self.good_id, self.bad_id)
        guided_NV[:, [self.good_id, self.bad_id]] = float("-inf")
        if self.temperature == 0:
            token_N = guided_NV.argmax(-1)
        else:
            rows = len(guided_NV)
            token_N = draw(
                guided_NV,
                self.temperature,
                self.top_p,
                None,
                lambda attempts: self.generator.random((rows, len(attempts))),
            )
        chosen = torch.full_like(scores, float("-inf"))
        return chosen.scatter_(1, torch.cat([token_N, token_N]).unsqueeze(1), 0.0)
