"""Jobs in other processes of this machine."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from phf.core.device import num_cpus
from phf.core.types import PhfError

J = TypeVar("J")
R = TypeVar("R")


class WorkerKilled(PhfError, RuntimeError):
    """A process ended before its work did."""


def in_workers(run: Callable[[J], R], jobs: Sequence[J], workers: int, gpus: Sequence[str] = ()) -> Iterator[R]:
    """`run` of each job, in this process or in `workers` others, as they are done. `run` and the jobs are sent to
    other processes, so `run` is a function of a module. `gpus`: each process gets one of them. Raises WorkerKilled,
    and what `run` raises."""
    workers = min(workers, len(jobs))
    if workers <= 1:
        yield from map(run, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        workers,
        context,
        initializer=_start,
        initargs=(max(1, num_cpus() // workers), context.Value("i", 0), gpus),
    ) as pool:
        try:
            for future in concurrent.futures.as_completed([pool.submit(run, job) for job in jobs]):
                yield future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise WorkerKilled("a worker was killed (out of memory?); run the same command again to resume") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start(threads: int, started: Any, gpus: Sequence[str]) -> None:
    """Give a worker its share of the cores and, of several GPUs, one; and end it when its parent is killed. `started`:
    how many workers have started."""
    with started.get_lock():
        number = started.value
        started.value += 1
    if len(gpus) > 1:  # before torch is loaded
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):  # numpy, torch and tokenizers read them as they are imported
        os.environ[name] = str(threads)
