"""The folder of a run at its start: marked, moved aside, or resumed under known conditions."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phf.core import folders, store
from phf.core.config import Plain, dump_yaml, read_yaml
from phf.core.runs import (
    RunFolder,
    TrainManifest,
    checkpoint_folder,
    checkpoint_step,
    complete_checkpoints,
    damaged_checkpoint,
    incomplete_checkpoints,
    is_complete,
    remove_checkpoint,
)
from phf.training.config import FREE
from phf.training.trainer import TrainingError


@contextlib.contextmanager
def run_folder(run: RunFolder, key: str, settings: Plain) -> Iterator[None]:
    """Hold a run's folder inside the block, marked as started. A run with other settings is moved aside, half-written
    checkpoints are removed."""

    def changed() -> str:
        before = read_yaml(run.config) if run.config.exists() else {}
        return ", ".join(changed_settings(before, settings) or ["the data, the weights or the code"])

    with folders.stage_folder(run.path, TrainManifest.stage, key, because=changed):
        store.write_text(run.config, dump_yaml(settings))
        for folder in incomplete_checkpoints(run.checkpoints):
            remove_checkpoint(folder)
        yield


def changed_settings(before: Any, now: Any, path: str = "") -> list[str]:
    """Names of the settings that differ and that the run's bytes depend on."""
    if isinstance(before, dict) and isinstance(now, dict):
        if before.get("name") != now.get("name"):  # the other settings belong to the name
            return [f"{path}.name"]
        return [
            name
            for key in {**before, **now}
            for name in changed_settings(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        ]
    decides = path not in ("tokens", "model.path") and path.removeprefix("train.") not in FREE
    same = before == now or (before is None and now == {})
    return [path] if decides and not same else []


def precision_name(precision: torch.dtype | None) -> str:
    """ "bf16", or "fp32" for None."""
    return "fp32" if precision is None else "bf16"


@dataclass(frozen=True)
class Environment:
    """`environment.json`: what the run's bytes depend on in addition to its settings."""

    versions: dict[str, str]
    threads: int
    machine: str
    device: str
    precision: str
    processes: int
    micro_rows: int
    compiled: bool

    @classmethod
    def now(cls, precision: torch.dtype | None, micro_rows: int, compiled: bool) -> Environment:
        on_gpu = torch.cuda.is_available()
        return cls(
            versions=folders.versions(),
            threads=torch.get_num_threads(),
            machine=platform.machine(),
            device=torch.cuda.get_device_name() if on_gpu else torch.backends.cpu.get_cpu_capability(),
            precision=precision_name(precision),
            processes=int(os.environ.get("WORLD_SIZE", 1)),
            micro_rows=micro_rows,
            compiled=compiled,
        )


def check_environment(path: Path, now: Environment, resuming: bool) -> None:
    """Write the environment of a new run. Warn where a resumed run's environment has changed."""
    if not resuming or not path.exists():
        store.write_json(path, now)
        return
    before = store.read_record(path, Environment)
    differs = [
        f"{field.name} was {getattr(before, field.name)}, is {getattr(now, field.name)}"
        for field in dataclasses.fields(Environment)
        if getattr(before, field.name) != getattr(now, field.name)
    ]
    if differs:
        print(
            f"warning: the run resumes in another environment, so its bytes will differ: {'; '.join(differs)}",
            file=sys.stderr,
        )


def common_checkpoint(run: RunFolder, key: str, device: torch.device) -> Path | None:
    """The newest whole checkpoint, the same for every process: the first process decides. Checkpoints that are damaged
    are passed over with a note. Raises TrainingError in a process that does not see it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return _newest_whole(run, key)
    found = _newest_whole(run, key) if torch.distributed.get_rank() == 0 else None
    newest = torch.tensor([checkpoint_step(found) if found else -1], device=device)
    torch.distributed.broadcast(newest, src=0)
    step = int(newest)
    if step < 0:
        return None
    chosen = checkpoint_folder(run.checkpoints, step)
    if not is_complete(chosen):
        raise TrainingError(
            f"process {torch.distributed.get_rank()} does not see {chosen}, from which the first process resumes; use "
            "a file system that all processes share"
        )
    return chosen


def _newest_whole(run: RunFolder, key: str) -> Path | None:
    """The newest checkpoint whose files are all there and unchanged. Newer ones are renamed, so that the run can write
    them again."""
    for checkpoint in reversed(complete_checkpoints(run.checkpoints)):
        problem = damaged_checkpoint(checkpoint, key)
        if problem is None:
            return checkpoint
        aside = folders.move_aside(checkpoint)
        print(f"note: {checkpoint} is damaged ({problem}), so it is not used; it is now {aside}", file=sys.stderr)
    return None
