"""torchtitan's trainer with the loss of a phf objective, and its configurations by name."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import yaml
from torch import Tensor
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.models import _supported_models
from torchtitan.trainer import Trainer

from phf.core.config import ConfigError, Plain, to_plain
from phf.engines.rows import open_fitted
from phf.engines.torchtitan.rows_and_loss import ObjectiveLoss, RowLoader
from phf.objectives import Own
from phf.tokens.tokenizer import table_size


class ScoredTrainer(Trainer):  # type: ignore[misc]
    """torchtitan's trainer, with the scores of `RowLoader` for the loss."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):  # type: ignore[misc]
        pass

    def __init__(self, config: Config) -> None:
        fit(config)
        super().__init__(config)

    def _forward_backward_body(
        self, inputs: Tensor, labels: Tensor, global_valid_tokens: Tensor, extra_kwargs: Plain
    ) -> Tensor:
        given: Plain = {name: extra_kwargs[name] for name in ("scores", "phase") if name in extra_kwargs}
        rest = {name: value for name, value in extra_kwargs.items() if name not in given}
        given["progress"] = (self.step - 1) / self.config.training.steps
        with self.train_context():
            pred = self.model_parts[0](inputs, **rest)
            loss: Tensor = self.loss_fn(pred, labels, global_valid_tokens, **given)[0]
            del pred
            loss.backward()
        return loss


def fit(config: ScoredTrainer.Config) -> None:
    """Fit the objective to the token store, in place, for the loss. Raises ConfigError for what cannot be used."""
    loader = config.dataloader
    if not isinstance(loader, RowLoader.Config):
        raise ConfigError("dataloader: phf.engines.torchtitan.RowLoader reads the scores; make one by with_objective")
    for name in ("tensor", "context", "pipeline"):
        if getattr(config.parallelism, f"{name}_parallel_degree") > 1:
            raise ConfigError(f"parallelism.{name}_parallel_degree: a process then has no whole rows or no whole head")
    if config.parallelism.spmd_backend == "full_dtensor" or config.debug.spmd_typechecking:
        raise ConfigError("parallelism.spmd_backend: scores are plain tensors; take spmd_types without type checks")
    _, tokenizer, objective = open_fitted(loader.tokens, loader.scores, loader.objective, "torchtitan")
    if len(objective.timeline) > 1 or isinstance(objective, Own):  # they may depend on the progress
        if config.training.global_batch_size < 0 or not config.training.disable_cuda_graphs:
            raise ConfigError(f"{objective.name}: give training.global_batch_size and training.disable_cuda_graphs")
        loader.rows = config.training.global_batch_size * config.training.steps
    if (needed := table_size(tokenizer)) > (rows := config.model_spec.model.vocab_size):
        raise ConfigError(f"the model has {rows:,} rows of embeddings; the store and its tokens need {needed:,}")
    _leaf(config.loss).objective = yaml.safe_dump(to_plain(objective), default_flow_style=True, width=10**6)
    config.validator.enable = False


def _leaf(loss: Any) -> Any:
    return loss.loss_fn if isinstance(loss, ChunkedLossWrapper.Config) else loss


def with_objective(
    config: Trainer.Config, tokens: str = "", objective: str = "mle", seed: int = 0
) -> ScoredTrainer.Config:
    """A configuration of torchtitan that trains `objective` (a name, or settings as YAML) on the store at `tokens`."""
    if type(config) is not Trainer.Config or type(_leaf(config.loss)) is not CrossEntropyLoss.Config:
        raise ConfigError("a phf objective takes the place of the cross-entropy of a plain language model only")
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.init}
    settings["dataloader"] = RowLoader.Config(tokens=tokens, objective=objective, seed=seed)
    own = ObjectiveLoss.Config()
    settings["loss"] = own if _leaf(config.loss) is config.loss else replace(config.loss, loss_fn=own)
    return ScoredTrainer.Config(**settings)


def __getattr__(name: str) -> Callable[[], ScoredTrainer.Config]:
    """The configuration of that name of torchtitan's own models, with phf's objective: what `--config` looks for."""
    for model in () if name.startswith("_") else sorted(_supported_models):
        with contextlib.suppress(ImportError):  # of a model whose own packages are not installed
            found = getattr(importlib.import_module(f"torchtitan.models.{model}.config_registry"), name, None)
            if found is not None:
                return lambda: with_objective(found())
    raise AttributeError(f"none of torchtitan's models that can be imported here has a configuration {name!r}")
