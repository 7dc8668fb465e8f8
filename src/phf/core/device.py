"""Which device and which number type to compute with. torch is imported inside the functions."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any


def pick_device(device: str = "auto") -> str:
    """`device`, or for "auto" cuda if there is a GPU, else cpu."""
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them. Found without loading torch."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    numbers = [file.name.removeprefix("nvidia") for file in Path("/dev").glob("nvidia[0-9]*")]
    return sorted(numbers, key=int)


def has_fast_bf16(device: str) -> bool:
    """Whether bfloat16 is faster than float32 on this device."""
    import torch

    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    cpu: Any = torch.cpu
    return bool(
        getattr(cpu, "_is_avx512_bf16_supported", lambda: False)()
        or getattr(cpu, "_is_amx_tile_supported", lambda: False)()
    )


def pick_precision(precision: str) -> Any:
    """The autocast type for "auto", "bf16" or "fp32": torch.bfloat16 or None. Never float16, which is slower than
    float32 on a CPU."""
    import torch

    wanted = precision == "bf16" or (precision == "auto" and has_fast_bf16(pick_device()))
    return torch.bfloat16 if wanted else None


@functools.cache
def tune_allocator() -> None:
    """Keep freed memory instead of returning every large tensor to the kernel (glibc on Linux; elsewhere no effect).

    Page faults otherwise cost a quarter to a third of a CPU training step, and most of a draw from a large vocabulary.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold = -1  # names and numbers of malloc.h
    m_mmap_max = -4
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


def num_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Dense bf16 (V100, T4: fp16) operations per second of GPUs, from their data sheets. The first name that fits
counts."""


@functools.cache
def peak_flops(dtype: Any, processes: int = 1) -> float | None:
    """Peak operations per second of the hardware of `processes` processes; None if it is not known.

    A GPU's peak comes from its data sheet. A CPU's is measured in a third of a second on matrix products (`dtype` None:
    float32) with the threads of this process. Further processes on the machine count in full while there are cores for
    them.
    """
    import time

    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        known = next((peak for model, peak in PEAK_FLOPS.items() if model in name), None)
        return known * processes if known is not None else None
    size = 1024
    a, b = (torch.ones(size, size, dtype=dtype or torch.float32) for _ in range(2))
    best = 0.0
    start = time.perf_counter()
    while (begin := time.perf_counter()) - start < 0.3:
        a @ b
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return best * processes / here * min(here, max(num_cpus() / torch.get_num_threads(), 1))
