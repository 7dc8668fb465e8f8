"""Score and tokenize on a cluster: each shard is a task of a Slurm job array or of a Ray cluster. Extras `cluster` and
`ray`.

    phf score s3://bucket/corpus s3://bucket/scored --executor slurm executor.partition=cpu
    phf tokenize s3://bucket/scored shared/tokens --executor ray

datatrove's executors distribute the work: each shard is a rank, which does what one machine would do. Every node must
see the output folder. datatrove passes its own job on as a pickle that only datatrove reads.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core import folders, store
from phf.core.config import STRICT, ConfigError, Plain
from phf.core.extras import MissingPackage, needs
from phf.scoring.score import Executor, Submitted, score_plain


@dataclass(frozen=True, config=STRICT)
class Slurm:
    """A Slurm job array, one task per shard. `workers`: tasks at a time (-1: as many as Slurm allows)."""

    partition: str
    name: Literal["slurm"] = "slurm"
    time: str = "24:00:00"
    workers: Annotated[int, Field(ge=-1)] = -1
    cpus_per_task: Annotated[int, Field(gt=0)] = 1
    mem_per_cpu_gb: Annotated[int, Field(gt=0)] = 4
    gpus_per_task: Annotated[int, Field(ge=0)] = 0
    qos: str = "normal"
    env_command: str | None = None
    venv_path: str | None = None
    sbatch_args: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class Ray:
    """A Ray cluster. `address`: as for `ray.init` ("auto": the cluster that this machine belongs to)."""

    name: Literal["ray"] = "ray"
    address: str = "auto"
    workers: Annotated[int, Field(ge=-1)] = -1
    cpus_per_task: Annotated[int, Field(gt=0)] = 1
    mem_per_cpu_gb: Annotated[float, Field(gt=0)] = 2
    gpus_per_task: Annotated[int, Field(ge=0)] = 0


AnyExecutor = Annotated[Slurm | Ray, Field(discriminator="name", title="executor")]


class Rank:
    """A step of a datatrove pipeline: a rank runs the job of its own number, read from the plan."""

    def __init__(self, plan: str, run: Callable[[Plain], None]) -> None:
        self.plan = plan
        self.run = run
        self.folder = os.getcwd()

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        os.chdir(self.folder)  # paths of the plan may be relative
        with store.as_path(self.plan).open("r", encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                if number == rank:
                    self.run(json.loads(line))


def executor(config: Slurm | Ray, run: Callable[[Plain], None] = score_plain, name: str = "score") -> Executor:
    """The function that runs shards on a cluster, for `score_corpus`, `add_scores` and `tokenize_corpus`. `run`: a
    module's function that runs a job as it was sent, as JSON. `name`: of the stage."""
    return functools.partial(_execute, config, run, name)


def _is_queued(job_id: str) -> bool:
    """Whether a Slurm job is still waiting or running."""
    try:
        listed = subprocess.run(["squeue", "-h", "-j", job_id], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and bool(listed.stdout.strip())


def _execute(config: Slurm | Ray, run: Callable[[Plain], None], name: str, jobs: Sequence[Any], out: str) -> None:
    try:
        import datatrove  # noqa: F401
    except ImportError as error:
        extra = "ray" if isinstance(config, Ray) else "cluster"
        raise MissingPackage(f"a cluster {needs(error.name, extra)}") from None
    lines = "".join(json.dumps(asdict(job)) + "\n" for job in jobs)
    folder = store.as_path(out) / folders.CLUSTER / store.fingerprint(lines)
    plan = folder / "plan.jsonl"
    store.write_text(plan, lines)
    common = {
        "pipeline": [Rank(str(plan), run)],
        "tasks": len(jobs),
        "workers": config.workers,
        "logging_dir": str(folder / "logs"),
        "cpus_per_task": config.cpus_per_task,
        "mem_per_cpu_gb": config.mem_per_cpu_gb,
        "gpus_per_task": config.gpus_per_task,
    }
    if isinstance(config, Slurm):
        from datatrove.executor import SlurmPipelineExecutor

        slurm = SlurmPipelineExecutor(
            **common,
            partition=config.partition,
            time=config.time,
            qos=config.qos,
            job_name=f"phf-{name}",
            env_command=config.env_command,
            venv_path=config.venv_path,
            sbatch_args=dict(config.sbatch_args),
            mail_type="NONE",
        )
        job = store.as_path(out) / folders.CLUSTER / "job.json"
        if job.exists() and _is_queued(str(store.read_json(job)["id"])):
            raise Submitted(f"job {store.read_json(job)['id']} is still running; run this command again after it")
        slurm.run()
        store.write_json(job, {"id": slurm.job_id})
        raise Submitted(
            f"{len(jobs)} shards as Slurm job {slurm.job_id} (logs: {folder / 'logs'}); when it has ended, run the "
            "same command again: it writes the manifest, or submits what failed"
        )
    try:
        import ray
    except ImportError as error:
        raise MissingPackage(f"the executor 'ray' {needs(error.name)}") from None
    from datatrove.executor import RayPipelineExecutor

    if not ray.is_initialized():
        try:
            ray.init(address=config.address, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise ConfigError(f"executor.address={config.address}: no Ray cluster answers there: {error}") from None
    RayPipelineExecutor(**common).run()
