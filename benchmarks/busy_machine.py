"""A training step at the demo's shape next to busy processes, with our waiting of threads and with OpenMP's own.

    python benchmarks/busy_machine.py --out benchmarks/results/busy_machine.json

Between two pieces of parallel work OpenMP's threads spin, and on cores that others use too they keep away the very
thread they wait for. On a busy machine `phf` lets them spin briefly (phf.core.threads). Each measurement is a process
of its own; the two settings take turns. Neighbours are processes that only count. The ratio is the baseline's time
divided by ours; `of free` is our time divided by ours on free cores.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

SECONDS = 8.0


def worker() -> None:
    """Print the milliseconds of training steps."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from phf.core.device import pick_precision
    from phf.objectives import MLE
    from phf.training.model import PHFModel

    shape = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **shape, vocab_size=2048, max_position_embeddings=512)
    model = PHFModel(AutoModelForCausalLM.from_config(config), MLE(), pick_precision("auto")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(0, 2048, (16, 257))
    batch = {
        "input_ids": ids[:, :-1],
        "targets": ids[:, 1:],
        "scores": torch.zeros(16, 256),
        "mask": torch.ones(16, 256, dtype=torch.bool),
    }
    taken = []
    end = 0.0
    while len(taken) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append((time.perf_counter() - start) * 1000)
        if len(taken) == 3:  # the first steps warm up
            end = time.perf_counter() + SECONDS
    print(json.dumps(taken[3:]))


def measure(environment: dict[str, str]) -> list[float]:
    done = subprocess.run(
        [sys.executable, __file__, "worker"], env=environment, check=True, capture_output=True, text=True
    )
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    from _measure import arguments, write
    from phf.core.device import num_cpus
    from phf.core.threads import SPIN

    args = arguments(__doc__ or "", spin="")
    plain = {k: v for k, v in os.environ.items() if k not in SPIN}
    ours = SPIN if not args.spin else dict.fromkeys(SPIN, args.spin)
    settings = {"ours": plain | ours, "baseline": plain}
    cores = num_cpus()
    cases = []
    free = 0.0
    for neighbours in (0, 1, cores, 2 * cores):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(neighbours)]
        found: dict[str, list[float]] = {name: [] for name in settings}
        try:
            for _ in range(args.repeats):
                for name, environment in settings.items():
                    found[name] += measure(environment)
        finally:
            for process in busy:
                process.kill()
        mine = statistics.median(found["ours"])
        free = free or mine
        cases.append(
            {
                "case": f"step next to {neighbours} busy processes on {cores} cores",
                "ours": mine,
                "baseline": statistics.median(found["baseline"]),
                "unit": "ms",
                "ratio": statistics.median(found["baseline"]) / mine,
                "n": len(found["ours"]),
                "mean": statistics.mean(found["ours"]),
                "baseline_mean": statistics.mean(found["baseline"]),
                "of free": mine / free,
            }
        )
        print(cases[-1], file=sys.stderr)
    write(args.out, "busy_machine", cases)


if __name__ == "__main__":
    worker() if sys.argv[1:] == ["worker"] else main()
