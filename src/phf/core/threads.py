"""How threads wait for each other, which must be set before torch is loaded.

Between two pieces of parallel work, OpenMP's threads spin. On a machine that others use too, they then take the time of
the very thread that they wait for, and a training step takes many times as long. A short spin, then sleep, helps there,
and costs time where the cores are free (benchmarks/busy_machine.py). So the load at the start decides.
"""

from __future__ import annotations

import os

SPIN = {"GOMP_SPINCOUNT": "4000", "KMP_BLOCKTIME": "0"}
"""How long threads spin: turns of a loop for GNU's OpenMP, which torch's wheels for Linux hold; milliseconds for
LLVM's."""
BUSY = 0.5
"""Processes that ran on average over the last minute, from which on the machine is one that others use."""


def wait_briefly() -> None:
    """Let OpenMP's threads spin only briefly on a busy machine. A user's own setting wins. No result depends on it."""
    if "OMP_WAIT_POLICY" in os.environ or not hasattr(os, "getloadavg") or os.getloadavg()[0] < BUSY:
        return
    for name, value in SPIN.items():
        os.environ.setdefault(name, value)
