"""Estimate what a recipe costs, without running it.

    phf plan paper-toxicity --tflops 300 --memory-gb 80

FLOPs are 6 x parameters x tokens (Kaplan et al. 2020). Memory is that of training: weights, gradients and Adam's
moments in float32 (16 bytes per parameter), the activations of one micro-batch, one chunk of logits. Disk is that of
checkpoints; the scored corpus and its tokens are listed separately. Hours are training alone, at a given or measured
speed. The scorer's hours are extrapolated from the first documents.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phf.core import folders
from phf.core.config import ConfigError
from phf.data.corpus import Corpus, Shard
from phf.data.hub import DatasetList, HFDataset
from phf.data.segment import segments_of
from phf.data.several import RandomDocuments, Several
from phf.recipes.recipe import Recipe, Variant
from phf.scorers import GivenScores

SCORED_SECONDS = 3.0
SCORED_AT_LEAST = 20
"""The scorer is timed on this many documents, or for this many seconds, whichever is more."""
HUB_DOCUMENTS = 500
"""Documents that are streamed from the Hub to time the scorer."""
CHECKPOINT_BYTES = 12
"""Bytes per parameter in a checkpoint: weights and Adam's two moments in float32."""
STATE_BYTES = 16
"""Bytes per parameter in training: weights, gradients and Adam's two moments in float32."""
STORED_BYTES = 1.5
"""Bytes on disk per character of the corpus, of scored corpus and tokens together."""


@dataclass(frozen=True)
class Hardware:
    """What runs are planned for. Memory is that of one device."""

    memory_gb: float
    disk_gb: float
    processes: int
    tokens_per_s: float | None
    """Known training speed; None: by FLOPs."""
    tflops: float | None
    """10^12 FLOPs per second of matrix products of one device; None: not needed."""
    utilisation: float
    """Share of `tflops` that training reaches."""

    def hours(self, tokens: int, flops: float) -> float:
        if self.tokens_per_s:
            return tokens / self.tokens_per_s / 3600
        return flops / ((self.tflops or 0) * 1e12 * self.utilisation * self.processes or 1) / 3600


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model."""

    parameters: int
    embedding_parameters: int
    """Input and output embeddings."""
    layers: int
    width: int
    vocab: int
    heads: int
    positions: int | None


@dataclass(frozen=True)
class RunPlan:
    """What a run costs."""

    run: str
    parameters: int
    tokens: int
    steps: int
    micro_rows: int
    flops: float
    memory_gb: float
    disk_gb: float
    hours: float
    of_optimal: float
    """Tokens divided by 20 per parameter (Hoffmann et al. 2022)."""


@dataclass(frozen=True)
class ScoringPlan:
    """What scoring costs."""

    chars_per_s: float
    """Of one process, measured."""
    workers: int
    chars: int | None = None
    """Of the corpus; None: not known before it is downloaded."""
    documents: int | None = None
    exact: bool = True
    """Whether sizes were counted; False: extrapolated from the first shard."""

    @property
    def hours(self) -> float:
        return math.nan if self.chars is None else self.chars / self.chars_per_s / 3600 / self.workers


@dataclass(frozen=True)
class Plan:
    """What a recipe costs. `problems`: what cannot fit, with what to do about it."""

    hardware: Hardware
    runs: list[RunPlan]
    samples: int
    sampled_tokens: int
    attack_samples: int
    """Continuations that attacks ask for at most, without gradient searches, tampering and tuning."""
    scoring: ScoringPlan | str | None
    """A note if scoring is done or cannot be estimated; None: not requested."""
    problems: list[str]

    @property
    def flops(self) -> float:
        return sum(run.flops for run in self.runs)

    @property
    def hours(self) -> float:
        return sum(run.hours for run in self.runs)

    @property
    def disk_gb(self) -> float:
        return sum(run.disk_gb for run in self.runs)


def make_plan(
    recipe: Recipe,
    tokens_per_s: float | None = None,
    tflops: float | None = None,
    utilisation: float = 0.4,
    memory_gb: float | None = None,
    disk_gb: float | None = None,
    score: bool = True,
    processes: int = 1,
) -> Plan:
    """Estimate the cost of every run of a recipe, and of scoring.

    `tflops` and `memory_gb` are those of one device; `processes` devices train a run together. None: measured here.
    Raises ConfigError on a GPU of unknown speed if neither `tokens_per_s` nor `tflops` is given.
    """
    hardware = _hardware(
        recipe,
        tokens_per_s,
        tflops=tflops,
        utilisation=utilisation,
        memory_gb=memory_gb,
        disk_gb=disk_gb,
        processes=processes,
    )
    shape = model_shape(recipe)
    runs = [_run(variant, shape, hardware) for variant in recipe.variants]
    scenarios = recipe.scenarios.values()
    return Plan(
        hardware=hardware,
        runs=runs,
        samples=sum(s.num_samples for s in scenarios) * len(runs),
        sampled_tokens=sum(s.num_samples * s.max_tokens for s in scenarios) * len(runs),
        attack_samples=_attack_samples(recipe) * len(runs),
        scoring=_scoring(recipe) if score else None,
        problems=_problems(recipe, shape, runs, hardware),
    )


def _attack_samples(recipe: Recipe) -> int:
    """Continuations of the attacks on a run at most."""
    from phf.redteaming.control_tokens import MOST_ATTACKS

    search = recipe.redteam
    tokens = recipe.token_attacks
    found = 0 if tokens is None else tokens.num_samples * MOST_ATTACKS
    if search is not None:
        asked = search.pool + search.rounds * search.candidates + search.confirm
        found += search.trials * asked * search.continuations
    return found


def _hardware(
    recipe: Recipe,
    tokens_per_s: float | None,
    tflops: float | None,
    utilisation: float,
    memory_gb: float | None,
    disk_gb: float | None,
    processes: int,
) -> Hardware:
    """What is given, and the rest measured on this machine."""
    import torch

    from phf.core.device import peak_flops, pick_device, pick_precision

    if tokens_per_s is None and tflops is None:
        tflops = (peak_flops(pick_precision("auto")) or 0) / 1e12
        if not tflops:
            raise ConfigError("the speed of this GPU is not known: give --tflops or --tokens-per-s")
    if memory_gb is None and pick_device() == "cuda":
        memory_gb = torch.cuda.get_device_properties(0).total_memory / 1e9
    elif memory_gb is None:
        memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if disk_gb is None:
        near = recipe.folder.absolute()
        while not near.exists():
            near = near.parent
        disk_gb = shutil.disk_usage(near).free / 1e9
    return Hardware(
        memory_gb=memory_gb,
        disk_gb=disk_gb,
        processes=processes,
        tokens_per_s=tokens_per_s,
        tflops=tflops,
        utilisation=utilisation,
    )


def _problems(recipe: Recipe, shape: ModelShape, runs: Sequence[RunPlan], hardware: Hardware) -> list[str]:
    problems = [
        f"{run.run} needs about {run.memory_gb:.3g} GB of memory, but the device has {hardware.memory_gb:.3g}: lower "
        f"train.micro_rows ({run.micro_rows}), set train.gradient_checkpointing=true, or divide the model over devices "
        "(train.shard=true, here with --processes)"
        for run in runs
        if run.memory_gb > hardware.memory_gb
    ]
    disk = sum(run.disk_gb for run in runs)
    if disk > hardware.disk_gb:
        problems.append(
            f"the runs need about {disk:.1f} GB of disk, but {hardware.disk_gb:.1f} are free: lower train.keep, or set "
            "out to a folder on another disk"
        )
    sampled = max(s.max_tokens + 2 for s in recipe.scenarios.values())
    for variant in recipe.variants:
        longest = max(variant.train.context, sampled)
        if shape.positions is not None and longest > shape.positions:
            problems.append(
                f"{variant.name} has rows or samples of {longest} tokens, but the model has {shape.positions} positions"
            )
            break
    return problems


# Training


def _run(variant: Variant, shape: ModelShape, hardware: Hardware) -> RunPlan:
    from phf.training.config import micro_batch
    from phf.training.metrics import SAVE_SECONDS

    train = variant.train
    micro_rows, _ = micro_batch(train, hardware.processes)
    flops = 6.0 * shape.parameters * train.total_tokens
    hours = hardware.hours(train.total_tokens, flops)
    several = train.save_every is not None or hours * 3600 > SAVE_SECONDS
    checkpoints = (train.keep if several else 1) + len(train.milestones)
    return RunPlan(
        run=variant.name,
        parameters=shape.parameters,
        tokens=train.total_tokens,
        steps=train.steps,
        micro_rows=micro_rows,
        flops=flops,
        memory_gb=_training_bytes(variant, shape, micro_rows, hardware.processes) / 1e9,
        disk_gb=shape.parameters * (CHECKPOINT_BYTES * checkpoints + 4) / 1e9,
        hours=hours,
        of_optimal=train.total_tokens / (20 * shape.parameters),
    )


def _training_bytes(variant: Variant, shape: ModelShape, micro_rows: int, processes: int) -> float:
    """Memory of training on one device: state, activations and one chunk of logits.

    Activations are about 34 values of the width per token and layer, in 2 bytes (Korthikanti et al. 2022).
    """
    import torch

    from phf.core.device import pick_device, pick_precision
    from phf.training.attention import KEPT_POSITIONS
    from phf.training.config import pick_compile
    from phf.training.fused import default_chunk

    train = variant.train
    tokens = micro_rows * variant.train.context
    bf16 = train.precision != "fp32"
    own_attention = pick_device() == "cpu" and pick_precision(train.precision) is not None
    kept = 5.0 if train.attention == "eager" else 1.25 if own_attention and train.context <= KEPT_POSITIONS else 0.0
    layers = 1 if train.gradient_checkpointing else shape.layers
    probabilities = kept * shape.heads * train.context * layers
    per_width = 2 * shape.layers if train.gradient_checkpointing else 34 * shape.layers
    activations = (1 if bf16 else 2) * tokens * (shape.width * per_width + probabilities) + tokens * shape.width * 8

    gpu_memory = torch.cuda.get_device_properties(0).total_memory if pick_device() == "cuda" else None
    compiled = pick_compile(train, shape.parameters)
    logit_bytes = 12 if gpu_memory is None else 6 if compiled else 24
    chunk = min(train.chunk or default_chunk(shape.vocab, gpu_memory, compiled), tokens)

    state = float(STATE_BYTES * shape.parameters)
    if train.shard:  # whole on every device: the embeddings with their gradient, and bf16 copies of the blocks
        blocks = shape.parameters - shape.embedding_parameters
        copies = 2 * blocks if bf16 and not train.gradient_checkpointing else 0
        state = state / processes + 8 * shape.embedding_parameters + copies
    return state + activations + chunk * shape.vocab * logit_bytes


def model_shape(recipe: Recipe) -> ModelShape:
    """Sizes of the recipe's model, which is built without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    from phf.training.lm import FromWeights, new_config, pretrained_config
    from phf.training.probe import num_parameters

    tokenizer = recipe.tokenizer
    if isinstance(recipe.model, FromWeights):
        config = pretrained_config(recipe.model.path, recipe.model.revision, recipe.model.config)
    else:
        vocab = {"vocab_size": tokenizer.vocab_size} if tokenizer.name == "bpe" else {}
        config = new_config(recipe.model.config, **vocab)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    parameters = num_parameters(lm)
    return ModelShape(
        parameters=parameters,
        embedding_parameters=parameters - num_parameters(lm, embeddings=False),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        vocab=config.vocab_size,
        heads=config.num_attention_heads,
        positions=getattr(config, "max_position_embeddings", None),
    )


# Scoring


def _scoring(recipe: Recipe) -> ScoringPlan | str:
    """Speed of the scorer on the first documents, and the size of the corpus. A note where scoring is done, or where
    corpus or scorer cannot be used here."""
    if (recipe.files.scored / folders.MANIFEST).exists():
        return "done"
    if isinstance(recipe.scorer, GivenScores):
        return "none: the scores come with the corpus"
    corpus, size_known = _first_documents(recipe.corpus)
    shards = corpus.plan()
    try:
        chars, documents, speed = _time_scorer(recipe, corpus, shards[0])
    except (ConfigError, OSError, RuntimeError, ImportError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return f"not known ({reason})"
    if not size_known:
        return ScoringPlan(speed, recipe.score_workers)
    return ScoringPlan(
        speed, recipe.score_workers, chars * len(shards), documents * len(shards), exact=len(shards) == 1
    )


def _first_documents(corpus: Corpus) -> tuple[Corpus, bool]:
    """The part of a corpus that the scorer is timed on, and whether its size says how large the corpus is. Nothing is
    downloaded as a whole."""
    first = corpus
    if isinstance(first, RandomDocuments):
        first = first.corpus
    if isinstance(first, Several):
        first = next(iter(first.corpora.values()))
    if isinstance(first, DatasetList):
        first = first.first()
    if isinstance(first, HFDataset) and not Path(first.path).expanduser().exists():
        return replace(first, streaming=True, max_docs=HUB_DOCUMENTS), False
    return first, first is corpus


def _time_scorer(recipe: Recipe, corpus: Corpus, shard: Shard) -> tuple[int, int, float]:
    """(characters, documents, characters scored per second) of a shard. The first document is not timed: it is mostly
    loading."""
    from phf.core.types import Rejected
    from phf.scoring.judge import judge_documents

    chars = documents = scored = 0
    seconds = 0.0
    for item in corpus.read(shard):
        if isinstance(item, Rejected):
            continue
        documents += 1
        chars += len(item.text)
        if seconds > SCORED_SECONDS and documents > SCORED_AT_LEAST:
            continue
        segments = segments_of(item, recipe.segmenter)
        start = time.perf_counter()
        judge_documents(recipe.scorer, [segments])
        if documents > 1:
            seconds += time.perf_counter() - start
            scored += len(item.text)
    return chars, documents, scored / seconds if seconds else math.nan


def check_plan(plan: Plan) -> None:
    """Raise ConfigError for a recipe that cannot run here."""
    if plan.problems:
        raise ConfigError("this recipe cannot run here:\n" + "\n".join(f"  {problem}" for problem in plan.problems))


# Printing

HEAD = ["run", "parameters", "tokens", "steps", "tokens / (20 x parameters)", "FLOPs", "memory GB", "disk GB", "hours"]


def plan_table(plan: Plan) -> tuple[list[list[str]], list[str]]:
    """The plan as rows of a table with the columns `HEAD`, and lines below the table."""
    rows = [
        [
            run.run,
            f"{run.parameters:,}",
            f"{run.tokens:,}",
            f"{run.steps:,}",
            f"{run.of_optimal:.2g}",
            f"{run.flops:.2e}",
            f"{run.memory_gb:.2f}",
            f"{run.disk_gb:.2f}",
            f"{run.hours:.2f}",
        ]
        for run in plan.runs
    ]
    hardware = plan.hardware
    lines = [
        f"total: {plan.flops:.2e} FLOPs, {plan.hours:.2f} hours of training, {plan.disk_gb:.2f} GB of disk "
        f"({hardware.disk_gb:.1f} GB free); each device has {hardware.memory_gb:.1f} GB of memory",
        f"judging: {plan.samples:,} samples with up to {plan.sampled_tokens:,} tokens in total",
    ]
    if plan.attack_samples:
        lines.append(
            f"attacks: up to {plan.attack_samples:,} samples, which may take longer than training a small model; "
            "redteam=null token_attacks=null leaves them out"
        )
    if hardware.tflops is not None:
        lines.append(
            f"speed: {hardware.tflops:.3g} TFLOP/s of matrix products, of which training reaches "
            f"{hardware.utilisation:.0%}"
        )
    return rows, lines + _scoring_lines(plan.scoring)


def _scoring_lines(scoring: ScoringPlan | str | None) -> list[str]:
    if scoring is None:
        return []
    if isinstance(scoring, str):
        return [f"scoring: {scoring}"]
    speed = f"{scoring.chars_per_s:,.0f} characters per second in one process"
    if scoring.chars is None or scoring.documents is None:
        return [
            f"scoring: {speed}, measured on the first documents; the size of a dataset on the Hub is not known before "
            "it is downloaded"
        ]
    basis = "" if scoring.exact else "estimated from the first shard: "
    return [
        f"scored corpus and tokens: about {scoring.chars * STORED_BYTES / 1e9:.2f} GB of disk in addition to the runs",
        f"scoring: {basis}{scoring.documents:,} documents, {scoring.chars:,} characters; {speed}, so "
        f"{scoring.hours:.2g} hours with score_workers={scoring.workers}",
    ]
