"""One training step of every objective against that of maximum likelihood, at the demo's and GPT-2 small's shape.

    python benchmarks/objectives_step.py --out benchmarks/results/objectives_step.json

Objectives that only change the text have the loss of one of these, and their edit is made outside of the step.
`documents` is maximum likelihood with a mask that keeps documents apart; its ratio may be 1.1 less. The steps take
turns in one process. Ratio: the step of maximum likelihood divided by that of the objective.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phf.core.device import num_cpus

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", str(num_cpus()))

import torch

from _measure import arguments, case, interleaved, write
from phf.core.device import pick_precision, tune_allocator
from phf.objectives import AWR, MLE, RWR, Anchored, Each, Masking, Objective, Schedule, Unlikelihood, Weights
from phf.objectives.compose import PhaseOf
from phf.training.model import PHFModel
from train_step import NO_DROPOUT, SHAPES, random_batch

STANDARD = {"reward_mean": -0.005, "reward_std": 0.015}
OBJECTIVES: dict[str, Objective] = {
    "mle": MLE(),
    "unlikelihood": Unlikelihood(0.0),
    "masking": Masking(0.0),
    "rwr": RWR(0.5, **STANDARD),
    "awr": AWR(1.0, **STANDARD),
    "weights": Weights(((0.0, 1.0), (0.05, 0.1)), norm=0.9),
    "anchored": Anchored(0.0, reference="cached"),
    "each": Each({"a": Masking(0.0), "b": Unlikelihood(0.0)}),
    "schedule": Schedule((PhaseOf(MLE(), until=0.5), PhaseOf(Unlikelihood(0.0), ramp={"alpha": (0.0, 1.0)}))),
}
END = 0
DOCUMENT = 120
"""Tokens of a document, about."""


class Step:
    def __init__(self, shape: dict[str, Any], objective: Objective, compiled: bool, end_of_text: int | None) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **shape, **NO_DROPOUT))
        self.model = PHFModel(lm, objective, pick_precision("auto"), compiled, end_of_text=end_of_text).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-4, weight_decay=0.1, fused=True)

    def __call__(self, batch: dict[str, torch.Tensor]) -> None:
        self.model(**batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def batches(shape: dict[str, Any], rows: int, context: int) -> Iterator[tuple[str, Objective, dict[str, Any], bool]]:
    """(name, objective, its batch, whether documents are kept apart)"""
    plain = random_batch(shape["vocab_size"], rows, context)
    starts = torch.rand(plain["input_ids"].shape, generator=torch.Generator().manual_seed(1)) < 1 / DOCUMENT
    plain["input_ids"] = torch.where(starts, END, plain["input_ids"].clamp(min=1))
    for name, objective in OBJECTIVES.items():
        batch = dict(plain)
        if name == "anchored":
            batch["reference"] = -5 * torch.rand(rows, context)
        if name == "each":
            batch["scores"] = torch.stack([plain["scores"], plain["scores"].flip(0)], -1)
        if name == "schedule":
            batch["phase"] = (torch.rand(rows, context) < 0.5).to(torch.uint8)
        yield name, objective, batch, False
    yield "documents", MLE(), plain, True


def main() -> None:
    args = arguments(__doc__ or "", cases="demo,gpt2")
    tune_allocator()
    cases = []
    for name in args.cases.split(","):
        shape, rows, context, compiled = SHAPES[name]
        runs = {}
        for objective_name, objective, batch, apart in batches(shape, rows, context):
            if name == "gpt2" and objective_name not in ("mle", "unlikelihood", "awr", "anchored", "each", "documents"):
                continue  # memory: the others cost as one of these
            step = Step(shape, objective, compiled, END if apart else None)
            runs[objective_name] = lambda step=step, batch=batch: step(batch)
        seconds = interleaved(runs, args.repeats, warmup=2)
        cases += [case(f"{name}-{o}", seconds[o], seconds["mle"]) for o in runs if o != "mle"]
        print(cases, file=sys.stderr, flush=True)
    write(args.out, "objectives_step", cases)


if __name__ == "__main__":
    main()
