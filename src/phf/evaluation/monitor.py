"""Judge the model while it trains: held-out loss, and as much else of `phf eval` as asked, every n tokens.

    phf train tokens/ runs/mine recipe.yaml monitor.every=1e6 monitor.scenarios.unconditional.num_samples=64

Writes `monitor.jsonl` next to `metrics.jsonl`: a line every `every` tokens and one for the final model. Samples go
to `samples/<tokens>-<scenario>.jsonl`. The trainer does not know about it: the monitor is a callback, and the run's
bytes are the same with and without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from phf.core.config import STRICT, ConfigError
from phf.core.runs import RunFolder, add_line, keep_lines, read_lines
from phf.core.store import as_record
from phf.data.segment import known_segmenter, segmenter_from
from phf.evaluation.capabilities import AnyCapability
from phf.evaluation.kl import KL, reference_texts
from phf.evaluation.parts import Evaluation, Heldout, HeldoutText, Judging, scenario_part
from phf.evaluation.results import CapabilityResult, HeldoutResult, MonitorLine, ScenarioResult
from phf.generation.loaded import LoadedModel
from phf.generation.sample import read_samples
from phf.generation.scenario import Scenario
from phf.objectives import Objective
from phf.scorers import Scorer
from phf.scorers.masking import without_personal_data
from phf.scoring.judge import check_identity, corpus_scorer, is_same_scorer
from phf.tokens.store import TokenStore
from phf.tokens.tokenizer import add_control_tokens
from phf.training import attention
from phf.training.config import TrainConfig
from phf.training.fused import LogitShape
from phf.training.metrics import JudgingCallback
from phf.training.probe import logit_shape


@settings(frozen=True, config=STRICT)
class Monitor:
    """What is judged during training."""

    every: Annotated[float, Field(gt=0)] | None = None
    """Tokens between judgements; None: only at `steps` and at the end."""
    heldout_tokens: Annotated[int, Field(ge=0)] = 50_000
    """Held-out tokens that are read each time; 0: none."""
    scenarios: dict[str, Scenario] = Field(default_factory=dict)
    """Samples to judge; the report's curves are those of the first scenario."""
    kl: KL | None = None
    """Measure the KL from a reference model too."""
    capabilities: tuple[AnyCapability, ...] = ()
    """Capabilities to measure too."""
    threshold: float | None = None
    """Scores above it are bad; None: the scorer's own threshold."""
    steps: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Further steps to judge at; 0: before training."""


TRACKED = ("bad_segments", "distinct_2", "self_bleu_5", "mean_chars", "finished", "compile_rate")
"""Numbers of a scenario that trackers get, in addition to its means."""


@dataclass(frozen=True)
class _Prepared:
    """What is known once training starts."""

    evaluation: Evaluation
    shape: LogitShape


class MonitorCallback(JudgingCallback):
    """The callback. `run`: the run's folder. `scorer`: by default the corpus's own. Of several processes only the first
    one judges.

    Raises ConfigError if a scenario needs control tokens that the objective does not have, and, when training
    starts, for everything else that cannot be judged.
    """

    def __init__(
        self,
        config: Monitor,
        run: str | Path,
        tokens_dir: str | Path,
        train: TrainConfig,
        objective: Objective,
        scorer: Scorer | None = None,
        allow_other_scorer: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.scorer = scorer
        self.allow_other_scorer = allow_other_scorer
        self.run = RunFolder(Path(run))
        self.tokens = TokenStore.open(tokens_dir, train.scores)
        self.tokenizer = self.tokens.tokenizer
        fitted = objective.fit(self.tokens.statistics)
        ids = add_control_tokens(self.tokenizer, list(fitted.roles.values())) if fitted.roles else []
        self.control_ids = dict(zip(fitted.roles, ids, strict=True))
        self.conditions_on = fitted.conditions_on
        self.worst = fitted.worst
        for name, scenario in config.scenarios.items():
            if (why := scenario.lacks(fitted.control)) is not None:
                raise ConfigError(f"monitor.scenarios.{name}: {objective.name} {why}")
        if config.kl is not None and config.kl.reverse and self.control_ids:
            raise ConfigError("monitor.kl.reverse is not defined for a model with control tokens")
        self.threshold = self.tokens.bad_above if config.threshold is None else config.threshold
        self.control_threshold = self.threshold if fitted.bad_above is None else fitted.bad_above
        self.context = train.context
        self.document_mask = train.document_mask
        self.step_tokens = train.step_tokens
        self.every_steps = None if config.every is None else max(round(config.every / self.step_tokens), 1)
        self.prepared: _Prepared | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            keep_lines(self.run.monitor, state.global_step)
            with torch.compiler.set_stance("force_eager"):
                self.prepare(model)
            if state.global_step == 0 and 0 in self.config.steps and not read_monitor(self.run.monitor):
                self._judge_now(args, model, 0)

    def prepare(self, lm: Any) -> None:
        """Load what judging needs, and find every problem before training instead of in its middle."""
        config = self.config
        manifest = self.tokens.manifest
        text = HeldoutText(self.tokens, self.context, config.heldout_tokens)
        reads = bool(config.heldout_tokens) and bool(self.tokens.heldout_D.any())
        judging = Judging(None, segmenter_from(manifest.segmenter), self.threshold, self.control_threshold)
        if self._needs_scorer():
            scorer = self._scorer()
            judging = dataclasses.replace(judging, scorer=scorer)
            if not is_same_scorer(scorer, manifest.identity):
                own = scorer.bad_above or 0.0
                limit = own if config.threshold is None else config.threshold
                judging = dataclasses.replace(judging, threshold=limit, corpus_threshold=self.tokens.bad_above)
        evaluation = Evaluation(
            folder=self.run,
            judging=judging,
            scenarios=config.scenarios,
            heldout=Heldout(lambda model: text, None, brief=True) if reads else None,
            kl=config.kl,
            capabilities=config.capabilities,
            progress=False,
        )
        self.prepared = _Prepared(evaluation, logit_shape(lm))
        model = self._loaded(lm)
        for part in evaluation.parts().values():
            part.check(model)
        if config.kl is not None:
            evaluation = dataclasses.replace(evaluation, reference=reference_texts(config.kl, self.run.cache))
            evaluation.parts()["kl"].check(model)
            self.prepared = dataclasses.replace(self.prepared, evaluation=evaluation)

    def _scorer(self) -> Scorer:
        """The scorer that the user named, or the corpus's own."""
        manifest = self.tokens.manifest
        if self.scorer is None:
            return corpus_scorer(manifest.scorer, manifest.identity)
        check_identity(self.scorer, manifest.identity, self.allow_other_scorer)
        return self.scorer

    def _needs_scorer(self) -> bool:
        return bool(self.config.scenarios) or (self.config.kl is not None and bool(self.control_ids))

    def _loaded(self, lm: Any) -> LoadedModel:
        assert self.prepared is not None
        return LoadedModel(
            lm=lm,
            tokenizer=self.tokenizer,
            control_ids=self.control_ids,
            conditions_on=self.conditions_on,
            worst=self.worst,
            path="the model in training",
            shape=self.prepared.shape,
            segmenter=known_segmenter(self.tokens.manifest.segmenter),
            document_mask=self.document_mask,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        step = state.global_step
        if state.is_world_process_zero and self._is_due(step, state.max_steps - step):
            self._judge_now(args, model, step)

    def _is_due(self, step: int, left: int) -> bool:
        """Whether to judge after `step` steps, with `left` steps to come."""
        if left == 0 or step in self.config.steps:
            return True
        if self.every_steps is None:
            return False
        near_the_end = left < self.every_steps / 10  # the final model is judged soon
        return step % self.every_steps == 0 and not near_the_end

    def _judge_now(self, args: Any, model: Any, step: int) -> None:
        start = time.perf_counter()
        line = self.judge(model, step)
        self.judged = tracked(line)
        if args.report_to:
            self.texts = self._texts(line)
        add_line(self.run.monitor, dataclasses.replace(line, seconds=time.perf_counter() - start))

    def _texts(self, line: MonitorLine) -> dict[str, list[tuple[str, float]]]:
        """The first samples of each scenario, for trackers. Personal data that the scorer finds are masked."""
        assert self.prepared is not None
        scorer = self.prepared.evaluation.judging.scorer
        found = {}
        for name in line.scenarios or {}:
            samples = read_samples(self.run.samples(f"{line.tokens}-{name}"))[:SHOWN_SAMPLES]
            assert scorer is not None  # samples have scores
            found[f"monitor/samples/{name}"] = [(without_personal_data(s.text, scorer), s.score) for s in samples]
        return found

    def judge(self, lm: Any, step: int) -> MonitorLine:
        """Judge `lm` as it is after `step` steps, and leave it and every random stream as they were."""
        assert self.prepared is not None
        tokens = step * self.step_tokens
        evaluation = dataclasses.replace(self.prepared.evaluation, samples_prefix=f"{tokens}-")
        with _undisturbed(lm):
            model = self._loaded(lm)
            results = {name: part.measure(model) for name, part in evaluation.parts().items()}
        heldout: HeldoutResult | None = results.pop("heldout", None)
        kl = results.pop("kl", None)
        scenarios: dict[str, ScenarioResult] = {n: results.pop(scenario_part(n)) for n in evaluation.scenarios}
        capabilities: list[CapabilityResult] = list(results.values())
        main = next(iter(scenarios.values()), None)
        return MonitorLine(
            step=step,
            tokens=tokens,
            heldout=None if heldout is None or heldout.main is None else heldout.main.nats(),
            misalignment=None if main is None else main.misalignment,
            bad_segments=None if main is None else main.bad_segments,
            unjudged=None if main is None else main.unjudged,
            mean_chars=None if main is None else main.mean_chars,
            scenarios=scenarios or None,
            kl=kl,
            capabilities=capabilities or None,
        )


SHOWN_SAMPLES = 16
"""Samples of a scenario that trackers get."""


def tracked(line: MonitorLine) -> dict[str, float]:
    """The numbers of a line under the names that trackers show: monitor/heldout/good,
    monitor/scenario/unconditional/misalignment, monitor/kl, monitor/capability/lambada/accuracy."""
    found: dict[str, float] = {f"heldout/{part}": nats for part, nats in (line.heldout or {}).items()}
    for name, result in (line.scenarios or {}).items():
        for key in ("misalignment", "hit_rate", "repetition_4"):
            found[f"scenario/{name}/{key}"] = getattr(result, key).mean
        for key in TRACKED:
            found[f"scenario/{name}/{key}"] = getattr(result, key)
    if line.kl is not None and line.kl.forward is not None:
        found["kl"] = line.kl.forward.nats_per_text.mean
    for capability in line.capabilities or ():
        for key, estimate in capability.main.items():
            found[f"capability/{capability.name}/{key}"] = estimate.mean
    found["tokens"] = line.tokens
    return {f"monitor/{name}": v for name, v in found.items() if v is not None and math.isfinite(v)}


@contextlib.contextmanager
def _undisturbed(lm: Any) -> Iterator[None]:
    """Inside this block `lm` is judged as it will be once it is loaded. Afterwards its mode and all random streams
    are as before."""
    devices = [lm.device] if lm.device.type == "cuda" else []
    streams = random.getstate(), np.random.get_state()
    # samples have every length, and a compiled trunk would be compiled again for each
    with (
        torch.random.fork_rng(devices=devices),
        torch.compiler.set_stance("force_eager"),
        attention.usual(lm),
        attention.evaluating(lm),
    ):
        try:
            yield
        finally:
            random.setstate(streams[0])
            np.random.set_state(streams[1])


def read_monitor(path: Path) -> list[MonitorLine]:
    """The lines of monitor.jsonl. A torn line is left out."""
    return [as_record(line, MonitorLine, path) for line in read_lines(path)]
