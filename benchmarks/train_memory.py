"""Peak memory of a whole training process: ours against the reference implementation.

    python benchmarks/train_memory.py --out benchmarks/results/train_memory.json --cases demo,mid,gpt2

Each side takes three steps in a process of its own, at the shapes of train_step.py. The peak is the kernel's count of
resident memory with libraries. `imports` is the memory of a process of either side before it builds a model.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from _measure import arguments, case, write

STEPS = 3


def peak(name: str, objective: str, side: str) -> tuple[float, float]:
    """Memory of a process that takes the steps, in MB: after its imports, and its peak."""
    done = subprocess.run(
        [sys.executable, __file__, "--side", f"{name},{objective},{side}"], check=True, capture_output=True, text=True
    )
    imports, most = json.loads(done.stdout.splitlines()[-1])
    return imports, most


def steps(name: str, objective: str, side: str) -> None:
    import resource

    import transformers.modeling_utils  # noqa: F401

    from train_step import step_and_batch

    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step, batch = step_and_batch(name, objective, side)
    for _ in range(STEPS):
        step(batch)
    print(json.dumps([imports / 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def main() -> None:
    args = arguments(__doc__ or "", cases="demo,mid,gpt2", objectives="mle,ul,awr", side="")
    if args.side:
        return steps(*args.side.split(","))
    cases = []
    for name in args.cases.split(","):
        for objective in args.objectives.split(","):
            found: dict[str, list[float]] = {"ours": [], "reference": []}
            for _ in range(args.repeats):
                for side in found:
                    imports, most = peak(name, objective, side)
                    found[side].append(most)
            cases.append(case(f"{name}-{objective}", found["ours"], found["reference"], "MB", imports=imports))
            print(cases[-1], file=sys.stderr, flush=True)
    write(args.out, "train_memory", cases)


if __name__ == "__main__":
    main()
