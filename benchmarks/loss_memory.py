"""Peak memory of the loss: ours against full logits, over a doubling series of targets and two vocabularies.

    python benchmarks/loss_memory.py --out benchmarks/results/loss_memory.json

Each case is a process of its own. Its figure is the peak resident memory (Linux's VmHWM) beyond inputs and gradients.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from _measure import arguments, case, write

CHILD = r"""
import re, sys, torch
from phf.training.fused import fused_loss, unfused_loss
from phf.objectives import Unlikelihood
def memory(kind):
    return int(re.search(kind + r":\s+(\d+) kB", open("/proc/self/status").read())[1])
way, targets, vocab = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
hidden, weight = torch.randn(targets, 256, requires_grad=True), torch.randn(vocab, 256, requires_grad=True)
target, score = torch.randint(0, vocab, (targets,)), (torch.rand(targets) < 0.1).float()
mask = torch.ones(targets, dtype=torch.bool)
torch.randn(64, 64) @ torch.randn(64, 64)
room = torch.ones_like(hidden), torch.ones_like(weight)  # memory of the gradients
before = memory("VmRSS")
del room
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
loss = fused_loss if way == "ours" else unfused_loss
loss(hidden, weight, None, target, score, mask, None, Unlikelihood(0.0)).loss_sum.backward()
print(memory("VmHWM") - before)
"""


def peak(way: str, targets: int, vocab: int) -> float:
    out = subprocess.run(
        [sys.executable, "-c", CHILD, way, str(targets), str(vocab)], capture_output=True, text=True, check=True
    )
    return int(out.stdout) / 1024


def main() -> None:
    args = arguments(__doc__ or "")
    cases = []
    ours: dict[tuple[int, int], float] = {}
    for vocab in (2048, 50259):
        for targets in (1024, 2048, 4096, 8192):
            mine, theirs = ([peak(way, targets, vocab) for _ in range(3)] for way in ("ours", "full"))
            cases.append(case(f"{targets} targets, {vocab} words", mine, theirs, "MB"))
            ours[targets, vocab] = cases[-1]["ours"]
            print(cases[-1], file=sys.stderr, flush=True)
        cases.append(
            case(f"growth from 2048 to 8192 targets, {vocab} words", [ours[8192, vocab]], [ours[2048, vocab]], "MB")
        )
    write(args.out, "loss_memory", cases)


if __name__ == "__main__":
    main()
