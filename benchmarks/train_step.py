"""One training step (forward, backward, AdamW): ours against the reference implementation.

    python benchmarks/train_step.py --out benchmarks/results/train_step.json --cases demo,gpt2 --repeats 3

Baselines: `reference` (eager attention, float32, unfused AdamW, dropout 0.1, full logits, cross-entropy twice), the
same without dropout, and plain transformers with labels in bf16. Each side has a process of its own, as in normal
use; only ours tunes the allocator. The sides step in turn. Objectives are compared with our own MLE in one process.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

from phf.core.device import num_cpus

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", str(num_cpus()))

import torch
from transformers import AutoConfig

from _measure import arguments, case, interleaved, write
from phf.core.device import pick_precision, tune_allocator
from phf.objectives import AWR, MLE, RWR, Objective, Unlikelihood
from phf.training.model import PHFModel
from reference_step import ReferenceStep

OBJECTIVES: dict[str, Objective] = {
    "mle": MLE(),
    "ul": Unlikelihood(0.0),
    "rwr": RWR(10.0, rewards="raw"),
    "awr": AWR(10.0, rewards="raw"),
}
DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
NO_DROPOUT = dict.fromkeys(DROPOUT, 0.0)
SHAPES = {
    "demo": ({"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 256, "vocab_size": 2048}, 16, 256, False),
    "mid": ({"n_embd": 256, "n_layer": 6, "n_head": 8, "n_positions": 256, "vocab_size": 8192}, 16, 256, True),
    "gpt2": ({"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50259}, 1, 1024, True),
}


BASELINES = {
    "reference": "",
    "no dropout": " against reference, no dropout",
    "labels": " against transformers, labels, bf16",
}


class OurStep:
    def __init__(self, shape: dict, objective: Objective, compiled: bool) -> None:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **shape, **NO_DROPOUT))
        self.model = PHFModel(lm, objective, pick_precision("auto"), compiled).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-4, weight_decay=0.1, fused=True)

    def __call__(self, batch: dict[str, torch.Tensor]) -> float:
        loss = self.model(**batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def gemm_rate(size: int = 2048) -> float:
    """The processor's rate of matrix products in TFLOP/s, measured now, in bf16 where we use it."""
    import time

    dtype = pick_precision("auto") or torch.float32
    a = torch.randn(size, size).to(dtype)
    b = torch.randn(size, size).to(dtype)
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * size**3 / (time.perf_counter() - start) / 1e12)
    return best


def parameters(shape: dict) -> int:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **shape)).num_parameters()


def random_batch(vocab: int, rows: int, context: int) -> dict[str, torch.Tensor]:
    """Random tokens, a tenth of them with a score above 0."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (rows, context + 1), generator=g)
    scores = (torch.rand(rows, context, generator=g) < 0.1).float() * 0.05
    mask = torch.ones_like(scores, dtype=torch.bool)
    return {"input_ids": ids[:, :-1], "targets": ids[:, 1:].contiguous(), "scores": scores, "mask": mask}


def step_and_batch(name: str, objective: str, side: str) -> tuple[OurStep | ReferenceStep, dict[str, torch.Tensor]]:
    """The step of a side at a shape, as in normal use, and a batch for it."""
    shape, rows, context, compiled = SHAPES[name]
    batch = random_batch(shape["vocab_size"], rows, context)
    if side == "ours":
        tune_allocator()
        return OurStep(shape, OBJECTIVES[objective], compiled), batch
    config = AutoConfig.for_model("gpt2", **shape, **(DROPOUT if side == "reference" else NO_DROPOUT))
    if side == "labels":
        return ReferenceStep(config, "mle", "bf16", fused=True, only_own_loss=True, attention="sdpa"), batch
    return ReferenceStep(config, objective), batch


class Elsewhere:
    """A side in a process of its own. Each call takes one step there."""

    def __init__(self, name: str, objective: str, side: str) -> None:
        command = [sys.executable, __file__, "--side", f"{name},{objective},{side}"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def _answer(self) -> None:
        if self.process.stdout.readline() != "done\n":  # type: ignore[union-attr]
            raise RuntimeError(f"{' '.join(self.process.args)} failed")  # type: ignore[arg-type]

    def __call__(self) -> None:
        print("step", file=self.process.stdin, flush=True)
        self._answer()

    def close(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def answer(name: str, objective: str, side: str) -> None:
    """The work of such a process."""
    step, batch = step_and_batch(name, objective, side)
    print("done", flush=True)
    for _ in sys.stdin:
        step(batch)
        print("done", flush=True)


def against_mle(name: str, objectives: list[str], batch: dict[str, torch.Tensor], repeats: int) -> list[dict]:
    """The cost of objectives relative to maximum likelihood: our own steps in turn, three times as often because the
    difference is small."""
    shape, _, _, compiled = SHAPES[name]
    steps = {
        objective: OurStep(shape, OBJECTIVES[objective], compiled)
        for objective in {"mle": 0} | dict.fromkeys(objectives)
    }
    seconds = interleaved({k: (lambda s=s: s(batch)) for k, s in steps.items()}, 3 * repeats, warmup=2)
    return [
        case(f"{name}-{objective} against our own mle", seconds[objective], seconds["mle"])
        for objective in objectives
        if objective != "mle"
    ]


def main() -> None:
    args = arguments(__doc__ or "", cases="demo,mid,gpt2", objectives="mle,ul,awr", side="")
    if args.side:
        return answer(*args.side.split(","))
    tune_allocator()
    cases = []
    for name in args.cases.split(","):
        shape, rows, context, _ = SHAPES[name]
        for objective in args.objectives.split(","):
            sides = ["ours", "reference"] + (["no dropout", "labels"] if objective == "mle" else [])
            steps = {side: Elsewhere(name, objective, side) for side in sides}
            seconds = interleaved(steps, args.repeats, warmup=2)
            for step in steps.values():
                step.close()
            ours = statistics.median(seconds["ours"])
            flops = 6 * parameters(shape) * rows * context
            for side in sides[1:]:
                case_name = f"{name}-{objective}" + BASELINES[side]
                more = {"tokens_per_s": rows * context / ours, "share_of_gemm": flops / ours / 1e12 / gemm_rate()}
                cases.append(case(case_name, seconds["ours"], seconds[side], **more))
                print(cases[-1], file=sys.stderr, flush=True)
        batch = random_batch(shape["vocab_size"], rows, context)
        cases += against_mle(name, args.objectives.split(","), batch, args.repeats)
    write(args.out, "train_step", cases)


if __name__ == "__main__":
    main()
