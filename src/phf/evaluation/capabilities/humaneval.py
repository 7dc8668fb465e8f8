"""HumanEval: functions that pass their tests."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import subprocess
import sys
import tempfile
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core import store
from phf.core.config import STRICT, ConfigError
from phf.core.statistics import bounded_estimate
from phf.evaluation.capabilities.base import Capability, local_file, rows_of
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

    **This runs what the model wrote**, so `run_untrusted_code` must be set. Each sample runs in its own process, in
    an empty folder, with an empty environment and with limits on time, memory, files and (unless you are root)
    processes. Where the kernel allows it, the process has no network; the result says so in `network`. This
    protects from accidents, not from malice: the process is the user's and can read the user's files. Run models
    that you do not trust in a virtual machine.
    """

    path: str
    name: Literal["humaneval"] = "humaneval"
    samples_per_problem: Annotated[int, Field(gt=0)] = 1
    k: tuple[Annotated[int, Field(gt=0)], ...] = (1,)
    temperature: Annotated[float, Field(gt=0)] = 0.2
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    max_tokens: Annotated[int, Field(gt=0)] = 256
    max_problems: Annotated[int, Field(gt=0)] | None = None
    timeout_s: Annotated[float, Field(gt=0)] = 5
    seed: int = 0
    run_untrusted_code: bool = False

    def inputs(self) -> list[str | None]:
        return [store.path_hash(local_file(self.path))]

    def check(self, model: LoadedModel) -> None:
        self._problems(model)

    def _problems(self, model: LoadedModel) -> tuple[list[dict[str, Any]], int]:
        """The problems, and how many tokens may be written for each."""
        if not self.run_untrusted_code:
            raise ConfigError(
                "humaneval runs code that the model wrote, with limits but as your user; to allow it, set "
                "run_untrusted_code=true"
            )
        if max(self.k) > self.samples_per_problem:
            raise ConfigError(
                f"humaneval: k={max(self.k)} needs samples_per_problem={max(self.k)}, got {self.samples_per_problem}"
            )
        rows = rows_of(self.path, ["prompt", "test", "entry_point"])[: self.max_problems]
        problems = [row | {"prompt": row["prompt"].rstrip("\n") + "\n"} for row in rows]
        room = model.positions - 2
        longest = max(len(model.encode(p["prompt"])) for p in problems)
        if longest >= room:
            raise ConfigError(f"humaneval: a prompt has {longest} tokens, the model reads {room}")
        return problems, min(self.max_tokens, room - longest)

    def measure(self, model: LoadedModel) -> CapabilityResult:
        problems, max_tokens = self._problems(model)
        n = self.samples_per_problem
        if not _unshare():
            print(
                "note: HumanEval: this kernel cannot start a process without network, so the model's code has "
                "network access",
                file=sys.stderr,
            )
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
        passed = np.zeros((len(problems), n), bool)
        for number, item in enumerate(samples):
            problem = problems[number // n]
            function = problem["prompt"] + function_body(item.text)
            program = f"{function}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"
            passed[number // n, number % n] = run_sandboxed(program, self.timeout_s)
        return self.result(
            {f"pass@{k}": bounded_estimate([pass_at_k(n, int(c), k) for c in passed.sum(1)]) for k in self.k},
            problems=len(problems),
            samples_per_problem=n,
            network="cut off" if _unshare() else "open",
        )


def function_body(text: str) -> str:
    """The text up to the end of the function: the first line that starts at the margin ends it."""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if line and not line[0].isspace():
            return "\n".join(lines[:number])
    return text


SANDBOX = """
import resource, sys
megabytes = 2**20
resource.setrlimit(resource.RLIMIT_AS, (1024 * megabytes, 1024 * megabytes))
resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes, megabytes))
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
try:
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
except (ValueError, OSError):
    pass
code = compile(sys.stdin.read(), "sample", "exec")
sys.stdin = None
namespace = {{"__name__": "__main__"}}
exec(code, namespace)
sys.stdout.flush()
sys.stderr.write("{token}")
"""


def run_sandboxed(program: str, timeout_s: float) -> bool:
    """Whether `program` runs to its end without an error, within limits. HumanEval says what this protects from."""
    token = os.urandom(16).hex()  # a program that exits early with status 0 has not passed
    code = SANDBOX.format(seconds=math.ceil(timeout_s), token=token)
    command = [*_unshare(), sys.executable, "-I", "-c", code]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:  # the size of a file is limited
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={"PATH": os.environ.get("PATH", "")},
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=output,
        )
        try:
            process.communicate(program.encode("utf-8", "replace"), timeout=timeout_s + 1)
        except subprocess.TimeoutExpired:
            return False
        finally:  # with everything that it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        output.seek(0, os.SEEK_END)
        output.seek(max(output.tell() - len(token), 0))
        return process.returncode == 0 and output.read() == token.encode()


@functools.cache
def _unshare() -> tuple[str, ...]:
    """The command that starts a process without network and, if possible, in its own process namespace, so that
    nothing that it starts outlives it. Empty if the kernel allows neither."""
    without_network = ("unshare", "--net", "--map-root-user")
    for command in ((*without_network, "--pid", "--fork", "--kill-child"), without_network):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if subprocess.run([*command, "true"], capture_output=True, timeout=10).returncode == 0:
                return command
    return ()
