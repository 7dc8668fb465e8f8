"""Judging while training: held-out loss, and as much of the rest of `phf eval` as is asked for, every n tokens. Floor 5.

    phf train tokens/ runs/mine recipe.yaml during.every=1e6 during.scenarios.unconditional.num_samples=64

Writes `during.jsonl` beside `metrics.jsonl`: a line every `every` tokens and one for the final model
(one for both where they are near), and what was sampled as `samples/<tokens>-<scenario>.jsonl`. The trainer does not know of it: it is a callback that is handed in, and the run's bytes are the same with and without it.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from transformers import TrainerCallback

from phf.core.config import STRICT, ConfigError
from phf.core.runs import add_line, keep_lines
from phf.data.segment import known_segmenter
from phf.evaluation.capabilities import AnyCapability
from phf.evaluation.evaluate import segmenter_of
from phf.evaluation.heldout import Control, heldout_loss
from phf.evaluation.judge import judge_samples
from phf.evaluation.kl import KL, drawn_as, kl, reference_texts, text_rows
from phf.generation.loaded import LoadedModel, check_lengths, prompt_ids
from phf.generation.sample import sample, write_samples
from phf.generation.scenario import Scenario, scenario_prompts
from phf.objectives import Objective
from phf.scorers import Scorer
from phf.scoring.judge import corpus_scorer
from phf.tokens.store import TokenStore
from phf.tokens.tokenizer import add_control_tokens
from phf.training import attention
from phf.training.fused import PLAIN
from phf.training.lm import logit_shape
from phf.training.train import TrainConfig


@dataclass(frozen=True, config=STRICT)
class During:
    """`every`: tokens between judgements. `heldout_tokens`: how much held-out text is read each time (0: none).
    `scenarios`: samples to judge, none unless given; the page's curves are of the first. `kl` and `capabilities`: as for
    `phf eval`. `threshold`: scores above it are bad."""

    every: Annotated[float, Field(gt=0)]
    heldout_tokens: Annotated[int, Field(ge=0)] = 50_000
    scenarios: dict[str, Scenario] = Field(default_factory=dict)
    kl: KL | None = None
    capabilities: tuple[AnyCapability, ...] = ()
    threshold: float = 0.0


class JudgeDuring(TrainerCallback):
    """The callback. `run` is the folder of the run; only the first of several processes judges."""

    def __init__(
        self, config: During, run: str | Path, tokens_dir: str | Path, train: TrainConfig, objective: Objective
    ) -> None:
        self.config, self.context = config, train.context
        self.tokens = TokenStore.open(tokens_dir, train.scores)
        self.tokenizer = self.tokens.tokenizer
        ids = add_control_tokens(self.tokenizer, objective.control_tokens) if objective.control_tokens else []
        self.control_ids = dict(zip(("good", "bad"), ids, strict=False))
        self.segmenter = segmenter_of(self.tokens)
        own = getattr(objective.fit(self.tokens.table), "threshold", None)
        self.control_threshold = own if isinstance(own, int | float) else config.threshold
        for name, scenario in config.scenarios.items():
            if (scenario.control == "bad" or scenario.guidance is not None) and not self.control_ids:
                raise ConfigError(f"during.scenarios.{name} asks for control tokens, which {objective.name} has not")  # type: ignore[attr-defined]
        if config.kl is not None and config.kl.reverse and self.control_ids:
            raise ConfigError("during.kl.reverse is not defined for a model with control tokens")
        self.run, self.cache = Path(run), Path(run).parent / "cache"
        self.shape = PLAIN
        self.scorer: Scorer | None = None
        self.reference: dict[str, Any] | None = None
        self.path = self.run / "during.jsonl"
        self.step_tokens = train.step_tokens
        self.every_steps = max(round(config.every / self.step_tokens), 1)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            keep_lines(self.path, state.global_step)
            with torch.compiler.set_stance("force_eager"):
                self.prepare(model)

    def prepare(self, lm: Any) -> None:
        """Everything that can be known now: what cannot be judged is said before training, not in the middle of it."""
        config = self.config
        self.shape = logit_shape(lm)
        model = self._loaded(lm)
        if config.scenarios or (config.kl is not None and self.control_ids):
            self.scorer = corpus_scorer(self.tokens.manifest)
        for scenario in config.scenarios.values():
            check_lengths(model, scenario, [prompt_ids(model, p, scenario) for p in scenario_prompts(scenario)])
        for capability in config.capabilities:
            capability.check(model)
        if config.kl is not None:
            self.reference = reference_texts(config.kl, self.cache)
            text_rows(model, self.reference["texts"], self.reference["finished"], self.segmenter)
            if config.kl.reverse:
                drawn_as(model, config.kl)

    def _loaded(self, lm: Any) -> LoadedModel:
        cut = known_segmenter(self.tokens.manifest.get("segmenter"))
        return LoadedModel(lm, self.tokenizer, self.control_ids, "the model in training", None, self.shape, cut)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        step = state.global_step
        left = state.max_steps - step
        near_the_end = left < self.every_steps / 10  # the judgement of the final model comes at once
        due = left == 0 or (step % self.every_steps == 0 and not near_the_end)
        if not state.is_world_process_zero or not due:
            return
        start = time.perf_counter()
        line = {"step": step, "tokens": step * self.step_tokens} | self.judge(model, step * self.step_tokens)
        line["seconds"] = time.perf_counter() - start
        add_line(self.path, line)

    def judge(self, lm: Any, tokens: int) -> dict[str, Any]:
        """Judge `lm` as it is after so many tokens, and leave it and every random stream as they were."""
        devices = [lm.device] if lm.device.type == "cuda" else []
        streams = random.getstate(), np.random.get_state()
        # samples have every length: a compiled trunk would be compiled anew for each
        with (
            torch.random.fork_rng(devices=devices),
            torch.compiler.set_stance("force_eager"),
            attention.usual(lm),
            attention.evaluating(lm),
        ):
            try:
                return self._judge(self._loaded(lm), tokens)
            finally:
                random.setstate(streams[0])
                np.random.set_state(streams[1])

    def _judge(self, model: LoadedModel, tokens: int) -> dict[str, Any]:
        config = self.config
        line: dict[str, Any] = {}
        if config.heldout_tokens and self.tokens.heldout_D.any():
            control: Control = "good" if self.control_ids else "none"
            found = heldout_loss(
                model, self.tokens, self.context, config.threshold, control, max_tokens=config.heldout_tokens
            )
            line["heldout"] = {part: (found[part] or {}).get("nats_per_byte") for part in ("all", "good", "bad")}
        judged = {name: self._scenario(model, name, tokens) for name in config.scenarios}
        if judged:
            first = next(iter(judged.values()))
            shown = ("misalignment", "bad_segments", "unjudged", "mean_chars")
            line |= {key: first[key] for key in shown} | {"scenarios": judged}
        if config.kl is not None:
            line["kl"] = kl(
                model, config.kl, self.segmenter, self.cache, self.scorer, self.control_threshold, self.reference
            )
        if config.capabilities:
            line["capabilities"] = [{"name": c.name, **c.measure(model)} for c in config.capabilities]
        return line

    def _scenario(self, model: LoadedModel, name: str, tokens: int) -> dict[str, Any]:
        scenario = self.config.scenarios[name]
        assert self.scorer is not None
        samples = sample(model, scenario, progress=False)
        samples, judged = judge_samples(samples, scenario, self.scorer, self.segmenter, self.config.threshold)
        write_samples(self.run / "samples" / f"{tokens}-{name}.jsonl", samples)
        return {key: value for key, value in judged.items() if key != "scenario"}
