"""What a run trains on, in order: the objective's stream, and its rows by place. Reading them needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phf.core.config import ConfigError
from phf.core.types import Block, Edit
from phf.objectives import Objective
from phf.objectives.compose import merged_edit
from phf.objectives.tensors import torch
from phf.tokens.edited import Stream
from phf.tokens.mixture import Mixture
from phf.tokens.noise import NOISE_SETTING
from phf.tokens.source_order import Exposure, Learned, SourceOrder, TrainingOrder
from phf.tokens.store import TokenStore
from phf.tokens.tokenizer import piece_ids
from phf.training.config import TrainConfig


def open_tokens(path: str | Path, objective: Objective, config: TrainConfig, seed: int) -> TokenStore:
    """The token store with the scores that an objective sees in training. Errors as `TokenStore.open`; ConfigError for
    errors in the scores of an objective that reads several."""
    several = any(member.reads for member, _ in objective.timeline)
    tokens = TokenStore.open(path, config.scores, config.token_scores, several=several)
    if config.scorer_noise is not None and several:
        raise ConfigError(f"{NOISE_SETTING}: for an objective that reads one preference; this one reads several")
    return tokens.with_noise(config.scorer_noise, seed)


def training_order(
    tokens: TokenStore,
    objective: Objective,
    tokenizer: Any,
    context: int,
    seed: int,
    first: int = 0,
    places: int | None = None,
    mixture: Mixture | None = None,
) -> TrainingOrder:
    """The training order of a fitted objective. `tokenizer` has its control tokens. `first`, `places`: the run's first
    place and number of places, which a schedule divides; None: all of it belongs to the schedule's first phase.
    `mixture`: how often documents are read."""
    orders = phase_orders(tokens, objective, tokenizer, context, seed, mixture)
    return TrainingOrder(orders[:1]) if places is None else divided(orders, objective, first, places)


def phase_orders(
    tokens: TokenStore, objective: Objective, tokenizer: Any, context: int, seed: int, mixture: Mixture | None = None
) -> list[SourceOrder]:
    """The order of each phase of a fitted objective, over the whole store."""
    return [
        SourceOrder(objective_stream(tokens, member, tokenizer, seed, objective.preferences, mixture), context, seed)
        for member, _ in objective.timeline
    ]


def divided(orders: Sequence[SourceOrder], objective: Objective, first: int, places: int) -> TrainingOrder:
    """The orders of an objective's phases as one, for a run of that many places from `first` on."""
    shares = [1.0 if until is None else until for _, until in objective.timeline[:-1]]
    return TrainingOrder(orders, [first + round(share * places) for share in shares])


def places_for(orders: Sequence[SourceOrder], objective: Objective, first: int, source: float) -> int:
    """The number of places in which a run that starts at the place `first` reads `source` source tokens, or as near to
    it as places allow; at least 1."""

    def read(places: int) -> float:
        order = divided(orders, objective, first, places)
        return order.source_at(first + places) - order.source_at(first)

    low = 1
    high: int = max(orders[0].place_at(orders[0].source_at(first) + source) - first, 1)
    if len(orders) == 1:
        return high
    while read(high) < source:
        low, high = high, math.ceil(1.2 * high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if read(middle) < source else (low, middle)
    return low if abs(read(low) - source) < abs(read(high) - source) else high


def objective_stream(
    tokens: TokenStore,
    objective: Objective,
    tokenizer: Any,
    seed: int,
    preferences: tuple[str, ...] | None = None,
    mixture: Mixture | None = None,
    split: str = "train",
) -> Stream:
    """The stream of a part of a store after a fitted objective's edit."""
    hidden = objective.hidden_token

    def edit(block: Block) -> Edit:
        found = objective.edit(block, seed)
        return found if mixture is None else merged_edit([(found, 0), (Edit(times_D=mixture.times(block)), 0)])

    return Stream(
        tokens,
        edit,
        piece_ids(objective.pieces, tokenizer),
        None if hidden is None else tokenizer.convert_tokens_to_ids(hidden),
        split=split,
        preferences=preferences,
    )


def exposure(order: TrainingOrder, objective: Objective, start: int, stop: int) -> Exposure:
    """What the rows at these places of the training order read."""

    def learned(member: Objective) -> Learned:
        return lambda score: member.counted(torch.from_numpy(score), torch.ones(len(score), dtype=torch.bool)).numpy()

    return order.exposure(start, stop, [learned(member) for member, _ in objective.timeline])
