"""Tasks of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core import store
from phf.core.config import STRICT, ConfigError, did_you_mean
from phf.core.extras import MissingPackage, needs
from phf.core.statistics import Z95
from phf.core.types import Estimate
from phf.evaluation.capabilities.base import Capability
from phf.evaluation.results import CapabilityResult
from phf.generation.loaded import LoadedModel


@dataclass(frozen=True, config=STRICT)
class LmEval(Capability):
    """Tasks of EleutherAI's lm-evaluation-harness (extra `eval`), with the good token before each text where the
    model has one.

    `tasks`: names of tasks. `folder`: your own task files; the harness's own, which take seconds to read, are then
    not available.
    """

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    name: Literal["lm-eval"] = "lm-eval"
    folder: str | None = None
    limit: Annotated[int, Field(gt=0)] | None = None
    """Documents of each task at most; None: all."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples in each question; None: the task's own number."""
    batch: Annotated[int, Field(gt=0)] = 32
    """Texts that are computed together."""
    seed: int = 0
    """Of the examples."""

    def inputs(self) -> list[str | None]:
        if self.folder is None:
            self._import()
            return [metadata.version("lm-eval")]
        return [store.path_hash(self.folder), *(store.path_hash(p) for p in sorted(Path(self.folder).rglob("*.*")))]

    @staticmethod
    def _import() -> tuple[Any, Any]:
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise MissingPackage(f"the capability 'lm-eval' {needs(error.name)}") from None
        return lm_eval, TaskManager

    def check(self, model: LoadedModel) -> None:
        self._manager()

    def _manager(self) -> Any:
        _, manager_of = self._import()
        manager = manager_of(include_path=self.folder, include_defaults=self.folder is None)
        unknown = [t for t in self.tasks if t not in manager.all_tasks]
        if unknown:
            raise ConfigError(f"lm-eval: no task {unknown[0]!r}{did_you_mean(unknown[0], manager.all_tasks)}")
        return manager

    def measure(self, model: LoadedModel) -> CapabilityResult:
        lm_eval, _ = self._import()
        from phf.evaluation.capabilities.lm_eval_adapter import LmEvalModel

        found = lm_eval.simple_evaluate(
            model=LmEvalModel(model, self.batch, self.seed),
            tasks=list(self.tasks),
            task_manager=self._manager(),
            limit=self.limit,
            num_fewshot=self.num_fewshot,
            random_seed=self.seed,
            numpy_random_seed=self.seed,
            torch_random_seed=self.seed,
            fewshot_random_seed=self.seed,
            log_samples=False,
            bootstrap_iters=1000,
        )
        estimates: dict[str, Estimate] = {}
        for task, values in found["results"].items():
            for key, value in values.items():
                metric, _, filter_name = key.partition(",")
                if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                n = found["n-samples"].get(task, {}).get("effective", values.get("sample_len"))
                stderr = values.get(f"{metric}_stderr,{filter_name}")
                if isinstance(stderr, int | float):
                    ci95 = (value - Z95 * stderr, value + Z95 * stderr)
                    estimates[f"{task} {metric}"] = Estimate(float(value), stderr, n, ci95)
                else:
                    estimates[f"{task} {metric}"] = Estimate.missing(float(value), n)
        return self.result(estimates)
