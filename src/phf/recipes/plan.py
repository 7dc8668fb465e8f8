"""What a recipe takes, said before anything runs. Floor 6.

    phf plan paper-toxicity --tflops 300 --memory-gb 80

FLOPs are 6 x parameters x tokens (Kaplan et al. 2020). Memory is an estimate for training: weights, gradients and Adam's
moments in float32 (16 bytes a parameter), the activations of one micro-batch, one chunk of logits. Disk is that of
checkpoints; scored corpus and tokens are told beside it. Hours are for training alone, at a given or measured speed; the
scorer's are extrapolated from the first documents.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from phf.core.config import ConfigError
from phf.data.readers import HubDataset, HubDatasets
from phf.recipes.recipe import Recipe, Variant

SCORED_FOR_S = 3.0
SCORED_AT_LEAST = 20
FROM_HUB = 500
"""Documents that are streamed from the Hub to time the scorer."""
TRAIN_STATE = 12
"""Bytes a parameter in a checkpoint: weights and Adam's two moments in float32."""


def make_plan(
    recipe: Recipe, tokens_per_s: float | None = None, tflops: float | None = None, utilisation: float = 0.4,
    memory_gb: float | None = None, disk_gb: float | None = None, score: bool = True, processes: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Numbers for each run and in all, and `problems`: what cannot fit. `tflops` and `memory_gb` are those of one device;
    a run is trained by `processes` of them."""
    import torch

    from phf.core.device import peak_flops, pick_device, pick_precision

    rate = tflops
    if tokens_per_s is None and rate is None:
        rate = (peak_flops(pick_precision("auto")) or 0) / 1e12
        if not rate:
            raise ConfigError("how fast this GPU is is not known: give --tflops or --tokens-per-s")
    if memory_gb is None:
        on_gpu = pick_device() == "cuda"
        memory_gb = (torch.cuda.get_device_properties(0).total_memory if on_gpu else _memory()) / 1e9
    if disk_gb is None:
        near = recipe.folder.absolute()
        while not near.exists():
            near = near.parent
        disk_gb = shutil.disk_usage(near).free / 1e9
    flops_per_s = None if rate is None else rate * 1e12 * utilisation * processes
    runs = [_run(v, tokens_per_s, flops_per_s, recipe, processes) for v in recipe.variants]
    problems = []
    for run in runs:
        if run["memory_gb"] > memory_gb:
            problems.append(
                f"{run['run']} needs about {run['memory_gb']:.1f} GB of memory, {memory_gb:.1f} are there: lower train.micro_rows "
                f"({run['micro_rows']}), set train.gradient_checkpointing=true, or divide the model (train.shard=true, here with "
                "--processes)"
            )
    disk = sum(run["disk_gb"] for run in runs)
    if disk > disk_gb:
        problems.append(
            f"the runs need about {disk:.1f} GB of disk, {disk_gb:.1f} are free: lower train.keep, or out=ELSEWHERE"
        )
    for variant in recipe.variants:
        longest = max(variant.train.context, *(s.max_tokens + 2 for s in recipe.scenarios.values()))
        positions = runs[0]["positions"]
        if positions is not None and longest > positions:
            problems.append(
                f"{variant.name}: rows or samples of {longest} tokens, but the model holds {positions} positions"
            )
            break
    samples = sum(s.num_samples for s in recipe.scenarios.values())
    found: dict[str, Any] = {
        "runs": runs,
        "memory_gb": memory_gb,
        "disk_gb": disk_gb,
        "disk_needed_gb": disk,
        "tflops": rate,
        "utilisation": utilisation,
        "hours": sum(run["hours"] for run in runs),
        "flops": sum(run["flops"] for run in runs),
        "samples": samples * len(runs),
        "sampled_tokens": sum(s.num_samples * s.max_tokens for s in recipe.scenarios.values()) * len(runs),
        "scoring": None,
        "problems": problems,
    }
    if score:
        found["scoring"] = _scoring(recipe)
    return found


def _run(
    variant: Variant, tokens_per_s: float | None, flops_per_s: float | None, recipe: Recipe, processes: int
) -> dict[str, Any]:
    import torch

    from phf.core.device import pick_device, pick_precision
    from phf.training.attention import KEEP
    from phf.training.fused import default_chunk
    from phf.training.metrics import SAVE_SECONDS
    from phf.training.train import micro_batch, pick_compile

    train = variant.train
    shape = _shape(recipe)
    parameters = shape["parameters"]
    micro, _ = micro_batch(train, processes)
    tokens = micro * train.context
    layers, width, vocab = shape["layers"], shape["width"], shape["vocab"]
    # per token and layer: about 34 values of the width in bf16 (Korthikanti et al. 2022), half of them where softmax is fused
    low = train.precision != "fp32"
    in_blocks = train.context <= KEEP and pick_device() == "cpu" and pick_precision(train.precision) is not None
    matrix = 5 if train.attention == "eager" else 1.25 if in_blocks else 0  # bytes of attention's probabilities
    scores = matrix * shape["heads"] * train.context * (1 if train.gradient_checkpointing else layers)
    wide = 1 if low else 2
    kept = 2 * layers if train.gradient_checkpointing else 34 * layers
    activations = wide * tokens * (width * kept + scores) + tokens * width * 8
    gpu_memory = torch.cuda.get_device_properties(0).total_memory if pick_device() == "cuda" else None
    compiled = pick_compile(train, parameters)
    number = 12 if gpu_memory is None else 6 if compiled else 24  # bytes
    logits = min(train.chunk or default_chunk(vocab, gpu_memory, compiled), tokens) * vocab * number
    state = 16.0 * parameters
    if train.shard:  # and whole: the embeddings and their gradient, and copies of the blocks in bf16
        copies = 2 * (parameters - shape["ends"]) if low and not train.gradient_checkpointing else 0
        state = state / processes + 8 * shape["ends"] + copies
    flops = 6.0 * parameters * train.total_tokens
    hours = train.total_tokens / tokens_per_s / 3600 if tokens_per_s else flops / (flops_per_s or 1) / 3600
    several = train.save_every is not None or hours * 3600 > SAVE_SECONDS
    checkpoints = (train.keep if several else 1) + len(train.milestones)
    return {
        "run": variant.name,
        "parameters": parameters,
        "tokens": train.total_tokens,
        "steps": train.steps,
        "micro_rows": micro,
        "positions": shape["positions"],
        "flops": flops,
        "memory_gb": (state + activations + logits) / 1e9,
        "disk_gb": parameters * (TRAIN_STATE * checkpoints + 4) / 1e9,
        "hours": hours,
        "of_optimal": train.total_tokens / (20 * parameters),
    }


def _shape(recipe: Recipe) -> dict[str, Any]:
    """Parameters, layers, width and vocabulary of the recipe's model, made without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    from phf.training.lm import FromWeights, new_config, num_parameters, pretrained_config

    tokenizer = recipe.tokenizer
    if isinstance(recipe.model, FromWeights):
        config = pretrained_config(recipe.model.path, recipe.model.revision, recipe.model.config)
    else:
        vocab = {"vocab_size": tokenizer.vocab_size} if tokenizer.name == "bpe" else {}
        config = new_config(recipe.model.config, **vocab)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    return {
        "parameters": num_parameters(lm),
        "ends": num_parameters(lm) - num_parameters(lm, embeddings=False),
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "vocab": config.vocab_size,
        "heads": config.num_attention_heads,
        "positions": getattr(config, "max_position_embeddings", None),
    }


def _memory() -> int:
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _scoring(recipe: Recipe) -> dict[str, Any]:
    """The scorer on the first documents, for a few seconds: its speed, and how long the corpus would take. Where the corpus
    or the scorer is not to be had here, why."""
    from phf.core.types import Rejected
    from phf.data.segment import Given
    from phf.scoring.judge import judge_documents

    if (recipe.folder / "scored" / "manifest.json").exists():
        return {"done": True}
    corpus, whole_known = recipe.corpus, True
    if isinstance(corpus, HubDatasets):
        corpus, whole_known = corpus.first(), False
    if isinstance(corpus, HubDataset) and not Path(corpus.path).expanduser().exists():
        corpus, whole_known = replace(corpus, streaming=True, max_docs=FROM_HUB), False  # nothing whole is downloaded
    try:
        shards = corpus.plan()
        chars = scored = documents = 0
        seconds = 0.0
        for item in corpus.read(shards[0]):
            if isinstance(item, Rejected):
                continue
            documents += 1
            chars += len(item.text)
            if seconds > SCORED_FOR_S and documents > SCORED_AT_LEAST:
                continue  # only its length
            cut = (
                list(item.segments or ()) if isinstance(recipe.segmenter, Given) else recipe.segmenter.split(item.text)
            )
            start = time.perf_counter()
            judge_documents(recipe.scorer, [cut])
            if documents > 1:  # the first is mostly loading
                seconds += time.perf_counter() - start
                scored += len(item.text)
    except (ConfigError, OSError, RuntimeError, ImportError, ValueError) as error:
        return {"unknown": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}
    speed = scored / seconds if seconds else float("nan")
    if not whole_known:
        return {"chars_per_s": speed, "chars": None, "workers": recipe.score_workers}
    whole = chars * len(shards)
    return {
        "chars_per_s": speed, "chars": whole, "documents": documents * len(shards), "exact": len(shards) == 1,
        "hours": whole / speed / 3600 / recipe.score_workers, "workers": recipe.score_workers,
    }  # fmt: skip


def told(found: dict[str, Any]) -> tuple[list[list[str]], list[str]]:
    """The plan as rows of a table and lines below it."""
    rows = [
        [
            r["run"], f"{r['parameters']:,}", f"{r['tokens']:,}", f"{r['steps']:,}",
            f"{r['of_optimal']:.2g}", f"{r['flops']:.2e}", f"{r['memory_gb']:.2f}", f"{r['disk_gb']:.2f}", f"{r['hours']:.2f}",
        ]
        for r in found["runs"]
    ]  # fmt: skip
    lines = [
        f"in all: {found['flops']:.2e} FLOPs, {found['hours']:.2f} hours of training, {found['disk_needed_gb']:.2f} GB of disk "
        f"({found['disk_gb']:.1f} free), {found['memory_gb']:.1f} GB of memory there",
        f"judging: {found['samples']:,} samples of up to {found['sampled_tokens']:,} tokens in all",
    ]
    if found["tflops"] is not None:
        lines.append(
            f"speed: {found['tflops']:.3g} TFLOP/s of matrix products, of which training reaches {found['utilisation']:.0%}"
        )
    scoring = found["scoring"]
    if scoring is not None:
        if scoring.get("done"):
            lines.append("scoring: done")
        elif "unknown" in scoring:
            lines.append(f"scoring: not known ({scoring['unknown']})")
        else:
            if scoring["chars"] is None:
                lines.append(
                    f"scoring: {scoring['chars_per_s']:,.0f} characters a second in one process, measured on the first documents; how many "
                    "there are on the Hub is not known before they are here"
                )
                return rows, lines
            lines.append(
                f"on disk, beside the runs: about {scoring['chars'] * 1.5 / 1e9:.2f} GB of scored corpus and tokens"
            )
            about = "" if scoring["exact"] else "about, by the first shard: "
            lines.append(
                f"scoring: {about}{scoring['documents']:,} documents, {scoring['chars']:,} characters; "
                f"{scoring['chars_per_s']:,.0f} characters a second measured in one process, so {scoring['hours']:.2g} hours with "
                f"score_workers={scoring['workers']}"
            )
    return rows, lines
