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
from phf.generation.loaded import LoadedModel
from phf.generation.sample import sample_prompts
from phf.generation.scenario import Scenario


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that one of k samples is right, from n of which `correct` are: 1 - C(n-c, k) / C(n, k), unbiased (Chen et
    al. 2021, arXiv 2107.03374)."""
    if n - correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


@dataclass(frozen=True, config=STRICT)
class HumanEval(Capability):
    """Writing functions that pass their tests (Chen et al. 2021): pass@k. `path`: HumanEval.jsonl, .jsonl.gz
    or the Parquet file of the Hub (hf://datasets/OWNER/NAME/FILE).

    **This runs what the model wrote.** Each sample runs in a process of its own with limits on time, memory, files
    and (unless you are root) processes, in an empty folder, with an empty environment and, where the kernel lets it, without network (the result
    says which: `network`). That protects from accidents, not from malice: the process is still the user's and can read
    the user's files. Run models that you do not trust in a virtual machine. `run_untrusted_code` must be set.
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
        """The problems, and how many tokens may be written to each."""
        if not self.run_untrusted_code:
            raise ConfigError(
                "humaneval runs code that the model wrote, with limits but as you; say run_untrusted_code=true if you want that"
            )
        if max(self.k) > self.samples_per_problem:
            raise ConfigError(
                f"humaneval: k={max(self.k)} needs as many samples_per_problem, got {self.samples_per_problem}"
            )
        rows = rows_of(self.path, ["prompt", "test", "entry_point"])[: self.max_problems]
        problems = [row | {"prompt": row["prompt"].rstrip("\n") + "\n"} for row in rows]
        room = model.positions - 2
        longest = max(len(model.encode(p["prompt"])) for p in problems)
        if longest >= room:
            raise ConfigError(f"humaneval: a prompt has {longest} tokens, the model reads {room}")
        return problems, min(self.max_tokens, room - longest)

    def measure(self, model: LoadedModel) -> dict[str, Any]:
        (problems, max_tokens), n = self._problems(model), self.samples_per_problem
        if not _unshare():
            print(
                "note: HumanEval: this kernel gives no process without network, so what the model wrote can reach it",
                file=sys.stderr,
            )
        scenario = Scenario(
            num_samples=n * len(problems), samples_per_prompt=n, max_tokens=max_tokens,
            min_tokens=1, temperature=self.temperature, top_p=self.top_p, seed=self.seed, batch=32,
        )  # fmt: skip
        samples = sample_prompts(model, scenario, [p["prompt"] for p in problems for _ in range(n)])
        passed = np.zeros((len(problems), n), bool)
        for number, item in enumerate(samples):
            problem = problems[number // n]
            program = f"{problem['prompt']}{function_body(item.text)}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"
            passed[number // n, number % n] = run_sandboxed(program, self.timeout_s)
        return {
            f"pass@{k}": bounded_estimate([pass_at_k(n, int(c), k) for c in passed.sum(1)]).to_json() for k in self.k
        } | {
            "problems": len(problems),
            "samples_per_problem": n,
            "network": "cut off" if _unshare() else "open",
        }


def function_body(text: str) -> str:
    """What was written up to the end of the function: the first line that begins at the margin ends it."""
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
    """Whether `program` runs to its end without an error, within limits. See HumanEval for what this protects from."""
    token = os.urandom(16).hex()  # a program that leaves early with status 0 has not passed
    code = SANDBOX.format(seconds=math.ceil(timeout_s), token=token)
    command = [*_unshare(), sys.executable, "-I", "-c", code]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as said:  # a file: its size has a limit
        process = subprocess.Popen(
            command, cwd=folder, env={"PATH": os.environ.get("PATH", "")}, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said,
        )  # fmt: skip
        try:
            process.communicate(program.encode("utf-8", "replace"), timeout=timeout_s + 1)
        except subprocess.TimeoutExpired:
            return False
        finally:  # and whatever it has started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        said.seek(0, os.SEEK_END)
        said.seek(max(said.tell() - len(token), 0))
        return process.returncode == 0 and said.read() == token.encode()


@functools.cache
def _unshare() -> tuple[str, ...]:
    """The command that starts a process without network, and with process numbers of its own, so that nothing it starts
    outlives it; as much of it as can be had here."""
    apart = ("unshare", "--net", "--map-root-user")
    for command in ((*apart, "--pid", "--fork", "--kill-child"), apart):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if subprocess.run([*command, "true"], capture_output=True, timeout=10).returncode == 0:
                return command
    return ()
