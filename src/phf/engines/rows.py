"""What the adapters of other trainers share: which objectives they can train, and rows as their batches."""

from __future__ import annotations

from typing import Any

import torch
import yaml
from torch import Tensor

from phf.core.config import ConfigError, validate
from phf.objectives import AnyObjective, LossInputs, Objective, count_targets
from phf.tokens.source_order import TrainingOrder
from phf.tokens.store import TokenStore
from phf.tokens.tokenizer import add_control_tokens
from phf.training.batches import to_tensors
from phf.training.fused import log_probabilities

IGNORED = -100
"""Label of positions that are no targets, or that the objective does not count."""


def check_objective(objective: Objective, engine: str) -> None:
    """Raise ConfigError for an objective that needs more than scores."""
    if objective.value is not None:
        raise ConfigError(f"{objective.name} needs a value head, which {engine}'s models do not have")
    if objective.reference_model is not None:
        raise ConfigError(f"{objective.name} compares with a reference model; train it with `phf train`")
    if objective.removable is not None:
        raise ConfigError(f"{objective.name} trains a part of the model apart; train it with `phf train`")


def objective_of(text: str) -> Objective:
    """An objective from its name, or from its settings as YAML. Raises ConfigError."""
    try:
        plain = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"objective: not YAML: {error}") from None
    made: Objective = validate({"name": plain} if isinstance(plain, str) else plain, AnyObjective, "objective")
    return made


def open_fitted(path: str, scores: str | None, objective: str, engine: str) -> tuple[TokenStore, Any, Objective]:
    """A token store, its tokenizer with the control tokens of an objective, and the objective fitted to the store.
    Raises PhfError for what cannot be trained."""
    made = objective_of(objective)
    check_objective(made, engine)
    tokens = TokenStore.open(path, scores)
    made = made.fit(tokens.statistics)
    tokenizer = tokens.tokenizer
    add_control_tokens(tokenizer, list(made.control_tokens))
    return tokens, tokenizer, made


def labelled_rows(order: TrainingOrder, objective: Objective, start: int, stop: int) -> dict[str, Tensor]:
    """Rows of a training order: `input_ids` and `labels` [B, T] int64, `scores` [B, T] or [B, T, preferences] float32,
    and for schedules `phase` [B, T] uint8."""
    rows = to_tensors(order.batch(start, stop))
    counted = count_targets(objective, rows["scores"], rows["mask"], rows.get("phase"))
    batch = {"input_ids": rows["input_ids"], "scores": rows["scores"]}
    batch["labels"] = torch.where(counted, rows["targets"], IGNORED)
    return batch | ({"phase": rows["phase"]} if "phase" in rows else {})


def loss_of_logits(
    objective: Objective, logits: Tensor, labels: Tensor, scores: Tensor, phase: Tensor | None, progress: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of an objective's loss over the labels that count, and its metrics, from logits [B, T, V] and the tensors
    of `labelled_rows`."""
    counted = labels.flatten() != IGNORED
    target = torch.where(counted, labels.flatten(), 0)
    logp, log1mp = log_probabilities(logits.flatten(0, 1).float(), target)
    phase = None if phase is None else phase.flatten()
    out = objective.loss(LossInputs(logp, log1mp, scores.flatten(0, 1), counted, None, progress, phase))
    return out.loss_sum, out.metrics
