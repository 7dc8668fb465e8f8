"""Shared by the benchmarks: interleaved timing, the machine, the result file."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phf.core.device import num_cpus


def arguments(about: str, **more: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=5)
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser.parse_args()


def machine() -> dict[str, Any]:
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line for line in lines if line.startswith("flags")), "")
    return {
        "processor": model or platform.processor(),
        "bf16": [f for f in ("amx_bf16", "avx512_bf16") if f in flags],
        "threads": torch.get_num_threads(),
        "cores": num_cpus(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def interleaved(runs: dict[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each function. The functions run in turn, so that a drift of the machine's speed affects all of
    them."""
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            gc.collect()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def case(
    name: str, ours: list[float], baseline: list[float], unit: str = "s", lower_is_better: bool = True, **more: Any
) -> dict[str, Any]:
    a = statistics.median(ours)
    b = statistics.median(baseline)
    return {
        "case": name,
        "ours": a,
        "baseline": b,
        "unit": unit,
        "ratio": b / a if lower_is_better else a / b,
        "n": len(ours),
        **more,
    }


def write(out: Path | None, name: str, cases: list[dict[str, Any]]) -> None:
    result = {"benchmark": name, "machine": machine(), "cases": cases}
    text = json.dumps(result, indent=2)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
