"""HumanEval: functions that pass their tests."""

from __future__ import annotations

import concurrent.futures
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core import store
from phf.core.config import STRICT, ConfigError
from phf.core.device import num_cpus
from phf.core.statistics import bounded_estimate
from phf.evaluation.capabilities.base import Capability, local_file, rows_of
from phf.evaluation.capabilities.sandbox import is_isolated, run_sandboxed
from phf.evaluation.results import CapabilityResult
from phf.generation.loaded import LoadedModel
from phf.generation.sample import sample_prompts
from phf.generation.scenario import Scenario


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that at least one of k samples is correct, estimated without bias from n samples of which
    `correct` are: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374)."""
    if n - correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


@dataclass(frozen=True, config=STRICT)
class HumanEval(Capability):
    """Writing functions that pass their tests (Chen et al. 2021): pass@k.

    `path`: HumanEval.jsonl, .jsonl.gz or the Parquet file of the Hub (hf://datasets/OWNER/NAME/FILE).

    **This runs what the model wrote**, so `run_untrusted_code` must be set. Each sample runs in namespaces of its own:
    it sees an empty file system in memory and Python's libraries, and has no network, no other processes, no rights,
    and limits on time and memory. The tests run in another process, so nothing that the model wrote decides what
    passes. Where the system has no such namespaces this is an error, unless `without_sandbox`: then only the limits
    hold, and the code can read the user's files and use the network. The result says which in `sandbox`.
    """

    path: str
    name: Literal["humaneval"] = "humaneval"
    samples_per_problem: Annotated[int, Field(gt=0)] = 1
    """Programs that are written for each problem."""
    k: tuple[Annotated[int, Field(gt=0)], ...] = (1,)
    """Which k of pass@k."""
    temperature: Annotated[float, Field(gt=0)] = 0.2
    """Of the programs."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Of the programs: only the likeliest tokens that together have this probability."""
    max_tokens: Annotated[int, Field(gt=0)] = 256
    """Longest program, in tokens."""
    max_problems: Annotated[int, Field(gt=0)] | None = None
    """Largest number of problems to ask; None: all."""
    timeout_s: Annotated[float, Field(gt=0)] = 5
    """Seconds that a program may run."""
    seed: int = 0
    """Of the draws."""
    run_untrusted_code: bool = False
    without_sandbox: Annotated[bool, Field(exclude_if=lambda value: not value)] = False

    def inputs(self) -> list[str | None]:
        return [store.path_hash(local_file(self.path))]

    def check(self, model: LoadedModel) -> None:
        self._problems(model)

    def check_inputs(self) -> None:
        self._rows()

    def _rows(self) -> list[dict[str, Any]]:
        """The rows of the file. Raises ConfigError where the settings do not allow to run code."""
        if not self.run_untrusted_code:
            raise ConfigError(
                "humaneval runs code that the model wrote, in a sandbox; to allow it, set run_untrusted_code=true"
            )
        if not is_isolated() and not self.without_sandbox:
            raise ConfigError(
                "humaneval: this system does not let users start processes in namespaces of their own (unshare "
                "--user), so the model's code could read your files and use the network; run it in a virtual machine, "
                "or set without_sandbox=true"
            )
        if max(self.k) > self.samples_per_problem:
            raise ConfigError(
                f"humaneval: k={max(self.k)} needs samples_per_problem={max(self.k)}, got {self.samples_per_problem}"
            )
        return rows_of(self.path, ["prompt", "test", "entry_point"])[: self.max_problems]

    def _problems(self, model: LoadedModel) -> tuple[list[dict[str, Any]], int]:
        """The problems, and how many tokens may be written for each."""
        rows = self._rows()
        problems = [row | {"prompt": row["prompt"].rstrip("\n") + "\n"} for row in rows]
        room = model.positions - 2
        longest = max(len(model.encode(p["prompt"])) for p in problems)
        if longest >= room:
            raise ConfigError(f"humaneval: a prompt has {longest} tokens, the model reads {room}")
        return problems, min(self.max_tokens, room - longest)

    def measure(self, model: LoadedModel) -> CapabilityResult:
        problems, max_tokens = self._problems(model)
        n = self.samples_per_problem
        scenario = Scenario(
            num_samples=n * len(problems),
            samples_per_prompt=n,
            max_tokens=max_tokens,
            min_tokens=1,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            batch=32,
        )
        samples = sample_prompts(model, scenario, [p["prompt"] for p in problems for _ in range(n)])

        def passes(number: int) -> bool:
            problem = problems[number // n]
            program = problem["prompt"] + function_body(samples[number].text)
            return run_sandboxed(
                program, self.timeout_s, problem["test"], problem["entry_point"], helpers=problem["prompt"]
            )

        with concurrent.futures.ThreadPoolExecutor(num_cpus()) as pool:
            passed = np.array(list(pool.map(passes, range(len(samples)))), bool).reshape(len(problems), n)
        return self.result(
            {f"pass@{k}": bounded_estimate([pass_at_k(n, int(c), k) for c in passed.sum(1)]) for k in self.k},
            problems=len(problems),
            samples_per_problem=n,
            sandbox="namespaces" if is_isolated() else "none",
        )


STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a function ends, as in Chen et al. 2021 and in lm-eval: pass@k compares only with the same rule."""


def function_body(text: str) -> str:
    """The text up to the first of `STOPS`."""
    found = [at for stop in STOPS if (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else text
