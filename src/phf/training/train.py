"""A training run: rows through a model, resumed to the same bytes after any interruption.

    phf train tokens/ runs/conditional recipe.yaml objective.name=conditional

    run/  config.yaml   metrics.jsonl   checkpoints/checkpoint-<step>/   model/   manifest.json     (phf.core.runs)

`model/` and every checkpoint load with plain `from_pretrained`. A checkpoint without its `complete.json` is
removed, and training resumes from the one before. A resumed run gives the same bytes as an uninterrupted one on the
same machine, versions and number of threads. Budgets are in target tokens; the effective batch is in rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import ValidationError
from transformers import TrainerCallback, TrainingArguments

from phf.core import folders, store
from phf.core.config import ConfigError, Plain, did_you_mean, to_plain
from phf.core.device import peak_flops, pick_precision, tune_allocator
from phf.core.runs import RunFolder, TrainCounts, TrainManifest, from_here, source_read, tokens_seen, weights_mark
from phf.objectives import Objective, Own, is_built_in
from phf.tokens.mixture import Mixture
from phf.tokens.source_order import TrainingOrder
from phf.tokens.start import try_start
from phf.tokens.store import TokenStore
from phf.tokens.tokenizer import add_control_tokens, load_tokenizer
from phf.training.arguments import can_compile, trainer_arguments
from phf.training.batches import RowBatches, TrainingRows
from phf.training.config import FREE, TrainConfig, micro_batch, pick_compile
from phf.training.folder import Environment, check_environment, common_checkpoint, precision_name, run_folder
from phf.training.fsdp import shard
from phf.training.fused import check_objective
from phf.training.lm import FromConfig, FromWeights, add_control_embeddings, build_lm, load_lm_weights, set_attention
from phf.training.metrics import (
    JudgingCallback,
    MetricsCallback,
    OpenLine,
    ResumeClock,
    RunScale,
    read_metrics,
    training_seconds,
)
from phf.training.model import PHFModel, trained_control_tokens, trained_value_head
from phf.training.order import divided, exposure, open_tokens, phase_orders, places_for
from phf.training.probe import check_can_be_sampled, flops_per_token, num_parameters
from phf.training.trackers import TrackersCallback
from phf.training.trainer import (
    CheckpointPlan,
    PHFTrainer,
    SaveAt,
    StopAfter,
    disk_full_error,
)


def train(
    *,
    tokens_dir: str | Path,
    out: str | Path,
    model: FromConfig | FromWeights,
    objective: Objective,
    config: TrainConfig,
    seed: int = 0,
    stop_after: int | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> TrainManifest | None:
    """Train a model into folder `out` and return the run's manifest. Returns at once if the run is finished;
    resumes where it was interrupted.

    `stop_after`: stop with a checkpoint after that many steps, for time-limited jobs. The run is then not finished
    and the result is None, as it is on every process but the first. `callbacks` get the LM as their model.

    Raises ConfigError for settings that cannot be used, and TrainingError if training cannot continue: a loss
    that is not finite, a full disk.
    """
    plan = _prepare(tokens_dir, out, model=model, objective=objective, config=config, seed=seed)
    if isinstance(plan, TrainManifest):
        if int(os.environ.get("RANK", 0)) == 0:
            folders.done_before(out)
        return plan
    if plan.writer:
        for remark in plan.objective.remarks(plan.tokens.statistics):
            print(remark if remark.startswith("warning: ") else f"note: {remark}", file=sys.stderr)
        _print_notes(config, removable=plan.objective.removable is not None)
    _check_surroundings(config, judged=bool(callbacks), removable=plan.objective.removable is not None)
    with contextlib.ExitStack() as held:
        built = _build(plan, callbacks, held)
        if not _run(plan, built, stop_after):
            return None
        return _finish(plan, built)


# Prepare


@dataclass(frozen=True)
class _Plan:
    """Everything that decides a run."""

    tokens: TokenStore
    tokens_dir: str
    run: RunFolder
    model: FromConfig | FromWeights
    objective: Objective
    """With what depends on the corpus resolved."""
    config: TrainConfig
    """With the budget in targets."""
    asked: TrainConfig
    seed: int
    order: TrainingOrder
    first: int
    """The place in the order where the run starts."""
    value_head: Path | None
    """The value head that comes with the starting weights."""
    tokens_before: int
    """Targets that the starting weights have seen."""
    key: str
    rank: int
    world: int

    @property
    def writer(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0


def _prepare(
    tokens_dir: str | Path,
    out: str | Path,
    model: FromConfig | FromWeights,
    objective: Objective,
    config: TrainConfig,
    seed: int,
) -> _Plan | TrainManifest:
    """What decides the run, or the manifest of a run that is finished."""
    tokens = open_tokens(tokens_dir, objective, config, seed)
    objective = objective.fit(tokens.statistics)
    stores = [tokens] if objective.reference_model is None else _with_reference(tokens, objective.reference_model)
    if isinstance(objective, Own) or not is_built_in(objective):
        check_objective(objective)
    head = trained_value_head(model.path, objective) if isinstance(model, FromWeights) else None
    skipped = source_read(model.path, tokens.manifest.tokens) if isinstance(model, FromWeights) else 0.0
    start = skipped if config.skip_tokens == "auto" else config.skip_tokens
    run = RunFolder(Path(out))
    keys = []
    for version in ("train/5", "train/4"):  # the latter had another order of rows; what it finished stays finished
        settled = [run_key(known, model, objective, config, seed, version) for known in stores]
        keys += [store.fingerprint([key, start, head and store.file_hash(head)]) for key in settled]
    if (config.budget, config.token_scores, config.mixture) == ("targets", False, None):
        keys.append(_earlier_key(tokens, model, objective, config, seed, head))
    if any(folders.is_done(run.path, key) for key in keys):
        return folders.read_manifest(run.path, TrainManifest)
    if objective.reference_model is not None:
        tokens = tokens.with_reference(objective.reference_model)
    asked = config
    order, first, config = _ordered(tokens, objective, config, seed, start)
    return _Plan(
        tokens=tokens,
        tokens_dir=str(tokens_dir),
        run=run,
        model=model,
        objective=objective,
        config=config,
        asked=asked,
        seed=seed,
        value_head=head,
        tokens_before=tokens_seen(model.path) if isinstance(model, FromWeights) else 0,
        order=order,
        first=first,
        key=keys[0],
        rank=int(os.environ.get("RANK", 0)),
        world=int(os.environ.get("WORLD_SIZE", 1)),
    )


def _with_reference(tokens: TokenStore, model: str) -> list[TokenStore]:
    """The store with its log-probabilities under a reference model. Where that model is gone, with each one's that it
    has: a run that is finished is known by them."""
    if weights_mark(model) is not None:
        return [tokens.with_reference(model)]
    return [dataclasses.replace(tokens, reference=name) for name in tokens.manifest.references]


def run_key(
    tokens: TokenStore,
    model: FromConfig | FromWeights,
    objective: Objective,
    config: TrainConfig,
    seed: int,
    version: str = "train/5",
) -> str:
    """Fingerprint of the settings that the bytes of a run depend on, wherever its weights and its data are."""
    members = [member for member, _ in objective.timeline]
    used = [tokens.with_scores(name) for name in dict.fromkeys(name for member in members for name in member.reads)]
    if not all(member.reads for member in members):
        used.insert(0, tokens)
    others = [[t.manifest.content, t.token_mark] for t in used]
    mixed = () if config.mixture is None else (config.mixture.column,)
    columns = [tokens.manifest.columns.get(column) for column in (*objective.columns, *mixed)]
    others.append([None if mark is None else mark.hash for mark in columns])
    if tokens.reference is not None:
        others.append(["reference", tokens.manifest.references[tokens.reference].hash])
    if config.budget == "source" and len(objective.timeline) > 1:
        others.append(["every phase counts"])  # earlier versions counted what the first phase alone would read
    start = weights_mark(model.path) if isinstance(model, FromWeights) else None
    decides = _decides(model, objective, config, seed)
    return store.fingerprint([decides, tokens.manifest.content, others, start, _code_of(objective), version])


def _earlier_key(
    tokens: TokenStore,
    model: FromConfig | FromWeights,
    objective: Objective,
    config: TrainConfig,
    seed: int,
    value_head: Path | None,
) -> str:
    """The key that earlier versions gave a run of these settings. They read rows in another order; what they finished
    stays finished."""
    start = weights_mark(model.path) if isinstance(model, FromWeights) else None
    decides = _decides(model, objective, config, seed)
    seen = tokens_seen(model.path) if isinstance(model, FromWeights) else 0
    skipped = seen if config.skip_tokens == "auto" else config.skip_tokens
    new = ("budget", "token_scores", "mixture")
    decides["train"] = {k: v for k, v in decides["train"].items() if k not in new} | {"skip_tokens": float(skipped)}
    head = value_head and store.file_hash(value_head)
    return store.fingerprint([decides, tokens.manifest.content, start, head, _code_of(objective), "train/3"])


def _decides(model: FromConfig | FromWeights, objective: Objective, config: TrainConfig, seed: int) -> Plain:
    """The settings, but for the paths of weights."""
    weights = isinstance(model, FromWeights)
    return {
        "model": {k: v for k, v in to_plain(model).items() if v != {} and not (weights and k == "path")},
        "objective": to_plain(objective.with_reference("its weights")),
        "train": {k: v for k, v in to_plain(config).items() if k not in FREE},
        "seed": seed,
    }


def _ordered(
    tokens: TokenStore, objective: Objective, config: TrainConfig, seed: int, start: float
) -> tuple[TrainingOrder, int, TrainConfig]:
    """The training order, the place in it where the run starts, after `start` source tokens, and the settings with the
    budget in targets."""
    tokenizer = load_tokenizer(tokens.path / "tokenizer")
    add_control_tokens(tokenizer, objective.control_tokens)
    mixture = None
    if config.mixture is not None:
        mixed = config.mixture
        mixture = Mixture(tokens, mixed.column, mixed.times, mixed.other, tokenizer, seed)
    orders = phase_orders(tokens, objective, tokenizer, config.context, seed, mixture)
    first = orders[0].place_at(start)
    if config.budget == "source":
        places = places_for(orders, objective, first, config.tokens)
        try:
            config = dataclasses.replace(config, tokens=places * config.context, budget="targets")
        except ValidationError as error:
            why = error.errors()[0]["msg"].removeprefix("Value error, ")
            asked = f"{config.tokens:,.0f} source tokens are {places * config.context:,} targets"
            raise ConfigError(f"train: {asked}: {why}") from None
    return divided(orders, objective, first, config.steps * config.batch_rows), first, config


def _code_of(objective: Objective) -> str:
    """What an objective does beyond its settings: its class and, for a user's own, its source."""
    if isinstance(objective, Own):
        return inspect.getsource(type(objective.inner))
    cls = type(objective)
    if is_built_in(objective):
        return cls.__name__
    try:
        return f"{cls.__module__}.{cls.__qualname__}\n{inspect.getsource(cls)}"
    except (OSError, TypeError):
        return f"{cls.__module__}.{cls.__qualname__}"


TRACKERS = ("clearml", "comet_ml", "dvclive", "mlflow", "neptune", "swanlab", "tensorboard", "trackio", "wandb")
"""Trackers that transformers knows; their packages have the same names, with hyphens."""


def _check_surroundings(config: TrainConfig, judged: bool, removable: bool) -> None:
    """Raise ConfigError for a tracker that is not installed, for a launcher that `config` does not work with, and for
    settings that do not go with an objective's removable part."""
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    known = get_available_reporting_integrations()
    for tracker in config.report_to:
        if tracker not in known:
            install = f"; to install it: pip install {tracker.replace('_', '-')}" if tracker in TRACKERS else ""
            near = "" if install else did_you_mean(tracker, known)
            raise ConfigError(f"train.report_to: {tracker!r} is not an installed tracker{near}{install}")
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        raise ConfigError(
            "accelerate is configured for its own FSDP. Use accelerate launch with plain data-parallel training "
            "(--multi_gpu), or torchrun, and set train.shard=true: phf shards, saves and resumes by itself "
            "(docs/scaling.md)"
        )
    if config.shard and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "train.shard divides a model over processes: start this command with torchrun (docs/scaling.md)"
        )
    if removable and (config.shard or config.gradient_checkpointing):
        setting = "shard" if config.shard else "gradient_checkpointing"
        raise ConfigError(f"train.{setting} does not work with sgtm, which trains parts of the model apart")
    if config.shard and judged:
        raise ConfigError(
            "train.shard: judging during training needs the whole model on one process; leave monitor out and judge "
            "the checkpoints (train.milestones) with phf eval"
        )


def _print_notes(config: TrainConfig, removable: bool) -> None:
    """What a user may not expect of the settings."""
    if config.tokens < config.step_tokens:
        print(
            f"note: tokens={config.tokens:g} is less than one step of {config.batch_rows} x {config.context} targets; "
            "the run makes one step",
            file=sys.stderr,
        )
    if removable and config.compile is True:
        print("note: sgtm is not compiled", file=sys.stderr)


# Build


@dataclass(frozen=True, kw_only=True)
class _Built:
    """What a run works with."""

    wrapper: PHFModel
    tokenizer: Any
    trainer: PHFTrainer
    parameters: int
    resume: Path | None
    """The checkpoint that the run resumes from."""


def _build(plan: _Plan, callbacks: tuple[TrainerCallback, ...], held: contextlib.ExitStack) -> _Built:
    """`held` ends with the run: the first process holds the folder until then."""
    config = plan.config
    micro, accumulate = micro_batch(config, plan.world)
    tune_allocator()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)

    tokenizer = plan.tokens.tokenizer
    lm = _make_lm(plan, tokenizer)
    parameters = num_parameters(lm)
    if plan.writer:
        print(f"model: {lm.config.model_type}, {parameters:,} parameters", file=sys.stderr)
    compiled = plan.objective.removable is None and pick_compile(config, parameters) and can_compile()
    wrapper = PHFModel(
        lm,
        plan.objective,
        pick_precision(config.precision),
        compile=compiled and not config.shard,
        chunk=config.chunk,
        fast_attention=config.attention == "auto",
        end_of_text=plan.tokens.end_of_text_id if config.document_mask else None,
    )
    if plan.value_head is not None:
        wrapper.load_value_head(plan.value_head.parent)

    if plan.writer:
        settings = {
            "model": to_plain(plan.model),
            "objective": to_plain(plan.objective),
            "train": to_plain(plan.asked),
            "seed": plan.seed,
            "tokens": plan.tokens_dir,
        }
        held.enter_context(run_folder(plan.run, plan.key, settings))
    arguments = trainer_arguments(config, plan.run.checkpoints, micro, accumulate, plan.seed, judged=bool(callbacks))
    resume = common_checkpoint(plan.run, plan.key, arguments.device)
    if config.shard:
        _shard(wrapper, resume, arguments.device, compiled)
    if plan.writer:
        now = Environment.now(wrapper.autocast_dtype, micro, compiled)
        check_environment(plan.run.environment, now, resuming=resume is not None)

    batches = RowBatches(config.steps, config.batch_rows, micro, accumulate, plan.rank)
    trainer = _trainer(
        plan,
        wrapper,
        batches=batches,
        tokenizer=tokenizer,
        arguments=arguments,
        callbacks=callbacks,
        parameters=parameters,
    )
    return _Built(wrapper=wrapper, tokenizer=tokenizer, trainer=trainer, parameters=parameters, resume=resume)


def _trainer(
    plan: _Plan,
    wrapper: PHFModel,
    batches: RowBatches,
    tokenizer: Any,
    arguments: TrainingArguments,
    callbacks: tuple[TrainerCallback, ...],
    parameters: int,
) -> PHFTrainer:
    """The trainer with its callbacks: the record of metrics first, then `callbacks`."""
    config = plan.config
    data = TrainingRows(plan.order, config.steps * config.batch_rows, plan.first)
    line = OpenLine()
    judges = [callback for callback in callbacks if isinstance(callback, JudgingCallback)]
    record = _metrics(plan, wrapper, line, parameters, judges)
    checkpoints = CheckpointPlan(
        keep=config.keep,
        milestones=frozenset(config.milestone_steps),
        step_tokens=config.step_tokens,
        tokens_before=plan.tokens_before,
        segmenter=plan.tokens.manifest.segmenter,
        text=plan.tokens.manifest.tokens,
        source_at=lambda step: plan.order.source_at(plan.first + step * config.batch_rows),
        key=plan.key,
    )
    trainer = PHFTrainer(
        model=wrapper,
        rows=data,
        sampler=batches,
        tokenizer=tokenizer,
        line=line,
        plan=checkpoints,
        config=config,
        args=arguments,
        callbacks=[*callbacks, ResumeClock(record)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.callback_handler.callbacks.insert(0, record)
    if config.report_to:
        about = {"objective": to_plain(plan.objective), "scorer": store.jsonable(plan.tokens.manifest.identity)}
        trainer.add_callback(TrackersCallback(about, judges, trainer.callback_handler.callbacks))
    if config.milestones:
        trainer.add_callback(SaveAt(config.milestone_steps))
    return trainer


def _make_lm(plan: _Plan, tokenizer: Any) -> Any:
    """The LM with the objective's control tokens, which are added to `tokenizer` too."""
    lm = build_lm(plan.model, tokenizer, plan.seed, plan.config.context)
    check_can_be_sampled(lm, plan.model.path if isinstance(plan.model, FromWeights) else "model")
    trained = trained_control_tokens(plan.model.path) if isinstance(plan.model, FromWeights) else {}
    add_control_embeddings(lm, tokenizer, plan.objective.control_tokens, plan.seed, trained)
    if plan.writer:
        try_start(tokenizer, plan.objective.control, lm.config.model_type)
    lm.generation_config.eos_token_id = tokenizer.eos_token_id
    if plan.config.gradient_checkpointing:
        lm.activation_checkpointing_enable()
    if plan.config.attention != "auto":
        set_attention(lm, plan.config.attention)
    return lm


def _shard(wrapper: PHFModel, resume: Path | None, device: torch.device, compiled: bool) -> None:
    """Load a checkpoint's weights and divide the model over the processes."""
    if resume is not None:
        load_lm_weights(wrapper.lm, resume)
        wrapper.load_value_head(resume)
    shard(wrapper, device, compiled)
    wrapper.compiled = compiled  # the loss


def _metrics(
    plan: _Plan, wrapper: PHFModel, line: OpenLine, parameters: int, judges: list[JudgingCallback]
) -> MetricsCallback:
    """The callback that writes metrics."""
    config = plan.config
    scale = RunScale(
        steps=config.steps,
        step_tokens=config.step_tokens,
        tokens_before=plan.tokens_before,
        parameters=parameters,
        flops_per_token=flops_per_token(wrapper.lm, config.context),
        peak_flops=peak_flops(wrapper.autocast_dtype, plan.world) if plan.writer else None,
    )
    timed = config.save_every is None
    return MetricsCallback(plan.run.metrics, scale, line, plan.writer, timed_checkpoints=timed, judges=judges)


# Run


def _run(plan: _Plan, built: _Built, stop_after: int | None) -> bool:
    """Train to the end, or to `stop_after`. Whether the run is at its end."""
    trainer = built.trainer
    resume = built.resume
    if stop_after is not None:
        trainer.add_callback(StopAfter(stop_after))
    if resume is not None:
        trainer.resume(resume)
    started_at = trainer.sampler.start
    if started_at < plan.config.steps:
        with deterministic():
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    else:
        assert resume is not None
        trainer.load_checkpoint(resume)
    return stop_after is None or max(trainer.state.global_step, started_at) >= plan.config.steps


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Make equal runs give equal bytes on a CPU, at no measurable cost: otherwise threads add up a compiled embedding's
    gradient in any order. On a GPU it would cost speed and is not used."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = settings.fill_uninitialized_memory
    if not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filled


# Finish


def _finish(plan: _Plan, built: _Built) -> TrainManifest | None:
    """Save the model and write the manifest. None on every process but the first."""
    config = plan.config
    manifest = plan.tokens.manifest
    built.trainer.accelerator.wait_for_everyone()
    if built.wrapper.part is not None:
        built.wrapper.part.remove(plan.seed)
    with disk_full_error(plan.run.path):
        built.trainer.save_model_now(plan.run.model, config.steps)
    if not plan.writer:
        return None
    read = exposure(plan.order, plan.objective, plan.first, plan.first + config.steps * config.batch_rows)
    counts = TrainCounts(
        tokens=config.total_tokens,
        tokens_before=plan.tokens_before,
        steps=config.steps,
        epochs=read.epochs,
        text_tokens=read.read_good + read.read_bad + read.read_unjudged,
        source_before=plan.order.source_at(plan.first),
        exposure=dataclasses.asdict(read),
    )
    return folders.finish(
        plan.run.path,
        TrainManifest(
            key=plan.key,
            objective=to_plain(plan.objective),
            model=to_plain(plan.model),
            train=to_plain(config),
            seed=plan.seed,
            tokens_dir=plan.tokens_dir,
            tokens_from_here=from_here(plan.tokens_dir, plan.run.path),
            tokens_content=manifest.content,
            identity=manifest.identity,
            control_tokens=list(plan.objective.control_tokens),
            parameters=built.parameters,
            counts=counts,
            noise=plan.tokens.noise_counts,
            seconds=training_seconds(read_metrics(plan.run.metrics)),
            threads=torch.get_num_threads(),
            precision=precision_name(built.wrapper.autocast_dtype),
            files=folders.file_marks(plan.run.path, folders.files_below(plan.run.path, "model")),
        ),
    )
