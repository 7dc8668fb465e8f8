"""How threads wait for each other, which must be set before torch is loaded.

Between two pieces of parallel work, OpenMP's threads spin. On a machine that others use too, they then take the time of
the very thread that they wait for, and a training step takes many times as long. A short spin, then sleep, costs its
fair share (benchmarks/busy_machine.py).
"""

from __future__ import annotations

import os

SPIN = {"GOMP_SPINCOUNT": "4000", "KMP_BLOCKTIME": "0"}
"""How long threads spin: turns of a loop for GNU's OpenMP, which torch's wheels for Linux hold; milliseconds for
LLVM's."""


def wait_briefly() -> None:
    """Let OpenMP's threads spin only briefly. A user's own setting wins."""
    if "OMP_WAIT_POLICY" in os.environ:
        return
    for name, value in SPIN.items():
        os.environ.setdefault(name, value)
