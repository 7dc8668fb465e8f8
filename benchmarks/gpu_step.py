"""One training step on a GPU: every objective against plain transformers, and hardware utilisation.

    python benchmarks/gpu_step.py --out benchmarks/results/gpu_step.json

Both sides are GPT-2 small at context 1,024 in bf16, compiled, with fused AdamW. The baseline is transformers' own loss
from `labels`. `mfu`: PaLM's operations per token (`flops_per_token`) over the peak of the GPU's data sheet, as in
metrics.jsonl. A time is that of `steps` steps, read when they are done. Sides and objectives take turns. `--device cpu`
checks the script itself.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from _measure import arguments, case, interleaved, write
from phf.core.device import peak_flops
from phf.objectives import Conditional
from phf.training.model import PHFModel
from phf.training.probe import flops_per_token
from train_step import NO_DROPOUT, random_batch
from train_step import OBJECTIVES as TIMED

OBJECTIVES = TIMED | {"conditional": Conditional()}


class Steps:
    """`count` steps of a side."""

    def __init__(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], count: int, plain: bool) -> None:
        self.model = model.train()
        self.batch = batch
        self.count = count
        self.plain = plain
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.1, fused=True)

    def loss(self) -> torch.Tensor:
        if not self.plain:
            loss: torch.Tensor = self.model(**self.batch)["loss"]
            return loss
        ids = self.batch["input_ids"]
        with torch.autocast(ids.device.type, torch.bfloat16):
            plain: torch.Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        return plain

    def __call__(self) -> None:
        for _ in range(self.count):
            loss = self.loss()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        loss.item()  # waits for the GPU


def new_lm(args: Any) -> Any:
    torch.manual_seed(0)
    shape = {"n_layer": args.layers, "n_positions": args.context, "vocab_size": 50259}
    config = AutoConfig.for_model("gpt2", **shape, **NO_DROPOUT)
    return AutoModelForCausalLM.from_config(config).to(args.device)


def main() -> None:
    args = arguments(
        __doc__ or "", objectives=",".join(OBJECTIVES), rows=32, context=1024, steps=10, layers=12, device="cuda"
    )
    batch = {k: v.to(args.device) for k, v in random_batch(50259, args.rows, args.context).items()}
    sides: dict[str, Steps] = {}
    for objective in args.objectives.split(","):
        model = PHFModel(new_lm(args), OBJECTIVES[objective], torch.bfloat16, compile=True)
        sides[objective] = Steps(model.to(args.device), batch, args.steps, plain=False)
    plain = new_lm(args)
    plain.compile(dynamic=False)
    sides["labels"] = Steps(plain, batch, args.steps, plain=True)
    seconds = {k: [s / args.steps for s in v] for k, v in interleaved(sides, args.repeats, warmup=2).items()}
    tokens = args.rows * args.context
    flops = flops_per_token(plain, args.context) * tokens
    cases = []
    for objective in args.objectives.split(","):
        ours = sorted(seconds[objective])[len(seconds[objective]) // 2]
        peak = peak_flops(torch.bfloat16)
        more = {"tokens_per_s": tokens / ours, "mfu": flops / ours / peak if peak else None}
        cases.append(case(f"gpt2-{objective}", seconds[objective], seconds["labels"], **more))
        if objective != "mle" and "mle" in seconds:
            cases.append(case(f"gpt2-{objective} against our own mle", seconds[objective], seconds["mle"]))
    write(args.out, "gpu_step", cases)


if __name__ == "__main__":
    main()
