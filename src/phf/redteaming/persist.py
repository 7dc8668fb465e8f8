"""Persistence: what is left after the finetuning that everybody does to a base model?

    phf persist runs/conditional runs/mle

A run is finetuned on harmless instructions, first supervised (SFT), then by preferences (DPO, Rafailov et al. 2023),
with TRL's trainers. The instructions are made of the run's own corpus: a good segment is the question, the good
segments after it are the answer; for DPO, the answer to another question is the rejected one. Nothing in them is about
what the scorer finds bad. The model is judged before and after each step: on texts from nothing, on answers in the chat
template of the finetuning, and on answers in another template.

persist/  sft/  dpo/  (models that from_pretrained loads)   persist.json
"""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core import folders, statistics, store
from phf.core.config import STRICT, ConfigError, Plain, to_plain
from phf.core.extras import MissingPackage, needs
from phf.core.locks import LOCK, locked
from phf.core.random import key64
from phf.core.runs import RunFolder
from phf.core.types import Estimate, Identity, Number
from phf.evaluation.capabilities.base import continuations
from phf.evaluation.evaluate import JudgedRun, open_run
from phf.evaluation.judge import judge_samples
from phf.generation.loaded import LoadedModel, check_room, load_model
from phf.generation.sample import sample, sample_prompts
from phf.redteaming.config import Sampled
from phf.scorers import Scorer
from phf.tokens.store import TokenStore

RESULT = "persist.json"
STAGE = "stage.json"
"""In the folder of a stage's model: the key of its settings."""
Stage = Literal["before", "sft", "dpo"]
TEMPLATES = {
    "same": "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "other": "{% for m in messages %}### {{ 'Instruction' if m['role'] == 'user' else 'Response' }}:\n"
    "{{ m['content'] }}\n\n{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}",
}
"""Chat templates: the one of the finetuning, and another one. Their marks are ordinary text to the tokenizer."""
NOTHING = "nothing"
"""Instead of a template: texts from nothing, as before the finetuning."""


@dataclass(frozen=True, config=STRICT)
class Persistence(Sampled):
    """How a model is finetuned and judged."""

    pairs: Annotated[int, Field(gt=1)] = 512
    """Instructions to learn from."""
    epochs: Annotated[int, Field(gt=0)] = 2
    """Passes over them in SFT; DPO makes one."""
    batch_rows: Annotated[int, Field(gt=0)] = 16
    """Instructions in a step."""
    lr: Annotated[float, Field(gt=0)] = 5e-4
    """Learning rate of SFT, for small models. AdamW, linear to 0."""
    dpo_lr: Annotated[float, Field(gt=0)] = 5e-5
    """Learning rate of DPO."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """DPO's strength of the pull to the SFT model."""
    dpo: bool = True
    """Whether DPO follows SFT."""
    num_samples: Annotated[int, Field(gt=1)] = 128
    """Samples that are judged each time; fewer answers if held-out text has fewer questions."""
    max_tokens: Annotated[int, Field(gt=0)] = 96
    """Longest sample."""
    question_tokens: Annotated[int, Field(gt=0)] = 48
    """Longest question."""
    answer_tokens: Annotated[int, Field(gt=0)] = 64
    """Longest answer to learn."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the instructions, of finetuning and of samples."""


@plain_dataclass(frozen=True)
class Instruction:
    """A question and its answer."""

    question: str
    """What is asked."""
    answer: str
    """What is learned."""


@plain_dataclass(frozen=True)
class Persisted:
    """A model at one stage, asked in one way."""

    stage: Stage
    """before, sft (after supervised finetuning) or dpo (after preferences too)."""
    template: str
    """nothing (texts from nothing), same (the chat template of the finetuning) or other."""
    misalignment: Estimate
    """Mean score of what the model wrote."""
    bad_segments: Number
    """Share of its segments above the threshold."""
    answer_loss: Number
    """Nats per token of held-out answers in this template; null for texts from nothing."""


@plain_dataclass(frozen=True, kw_only=True)
class PersistResult:
    """`persist.json`: a model before and after instruction tuning."""

    key: str
    """Fingerprint of the model, the text and all settings."""
    model: str
    """The run."""
    seed: int
    """The run's seed."""
    settings: Persistence
    """Settings."""
    identity: Identity
    """The scorer that judged."""
    threshold: float
    """Scores above it are bad."""
    pairs: int
    """Instructions that were learned."""
    found: list[Persisted]
    """By stage, then by template."""
    versions: dict[str, str]
    """Versions of Python, phf and the libraries that results depend on."""
    seconds: float = 0.0
    """Time."""

    def of(self, stage: str, template: str) -> Persisted | None:
        """The model at one stage, asked in one way."""
        return next((p for p in self.found if (p.stage, p.template) == (stage, template)), None)


def persist(
    run: str | Path,
    config: Persistence = Persistence(),
    *,
    scorer: Scorer | None = None,
    threshold: float | None = None,
    tokens_dir: str | Path | None = None,
    allow_other_scorer: bool = False,
    main: bool = False,
) -> PersistResult:
    """Finetune a finished run on harmless instructions, judge it on the way, and write `persist/persist.json` into its
    folder. Returns at once if this was done with the same settings, and resumes after an interruption.

    `scorer`, `threshold`, `main`: as in `phf.evaluate`. Raises ConfigError without TRL and for a corpus without enough
    good text, and errors as `open_run`.
    """
    opened = open_run(run, tokens_dir, scorer, allow_other_scorer, main)
    limit = opened.threshold(threshold)
    folder = opened.folder.persist
    identity = opened.scorer.identity()
    bad_above = opened.corpus_limit(limit)
    learned = instructions(opened.tokens, bad_above, config, config.pairs, heldout=False)
    asked = instructions(opened.tokens, bad_above, config, config.num_samples, heldout=True)
    pairs = [[[pair.question, pair.answer] for pair in part] for part in (learned, asked)]
    of_model = store.fingerprint([opened.manifest.key, to_plain(config), TEMPLATES, pairs, "persist/2"])
    key = store.fingerprint([of_model, identity, limit])
    file = folder / RESULT
    if (done := folders.kept(file, key, PersistResult)) is not None:
        folders.done_before(file)
        return done
    trl_version = _require_trl()
    base = opened.folder.model
    before = load_model(base)
    _check_room(before, asked, config)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        held.enter_context(locked(opened.folder.path, "persist", shared=True))
        held.enter_context(locked(folder, "persist"))
        if file.exists():
            earlier = folders.keep_earlier(folder, file.name)
            print(f"note: {file} is of other settings; that result is kept in {earlier}", file=sys.stderr)
        start = time.perf_counter()
        found = _judged("before", before, asked, opened, config, limit)
        stages: tuple[Stage, ...] = ("sft", "dpo") if config.dpo else ("sft",)
        for stage in stages:
            base = _finetuned(stage, base, folder, learned, config, store.fingerprint([of_model, stage]))
            found += _judged(stage, load_model(base), asked, opened, config, limit)
        result = PersistResult(
            key=key,
            model=opened.folder.path.name,
            seed=opened.manifest.seed,
            settings=config,
            identity=identity,
            threshold=limit,
            pairs=len(learned),
            found=found,
            versions=folders.versions() | {"trl": trl_version},
            seconds=time.perf_counter() - start,
        )
        store.write_json(file, result)
    return store.read_record(file, PersistResult)


def read_persist(folder: RunFolder) -> PersistResult | None:
    """What instruction tuning left of a run; None if it was not tried. Raises StoreError for a damaged file."""
    file = folder.persist / RESULT
    return store.read_record(file, PersistResult) if file.exists() else None


def _require_trl() -> str:
    """TRL's version. Raises ConfigError without it."""
    try:
        import trl
    except ImportError as error:
        raise MissingPackage(f"phf persist {needs(error.name)}") from None
    return str(trl.__version__)


# Instructions


def instructions(
    tokens: TokenStore, bad_above: float, config: Persistence, count: int, heldout: bool
) -> list[Instruction]:
    """At most `count` instructions, of the training part or of held-out text, in random order.

    A question is a segment that is not bad; its answer is the segments after it in the document up to the first bad
    one, cut after `answer_tokens`. Raises ConfigError if there are fewer than two.
    """
    score_S = np.asarray(tokens.score_S, np.float32)
    good_S = (score_S <= np.float32(bad_above)) & (tokens.tokens_S > 0)
    end_S = np.asarray(tokens.seg_ends)
    begin_S = end_S - tokens.tokens_S
    follows_S = np.r_[tokens.doc_S[1:] == tokens.doc_S[:-1], False]
    part_S = tokens.heldout_D[tokens.doc_S] == heldout
    able_S = good_S & follows_S & part_S & (tokens.tokens_S <= config.question_tokens)
    able_S[:-1] &= good_S[1:]
    special = tokens.tokenizer.all_special_tokens
    found = []
    for place in np.random.default_rng(key64(config.seed, "instructions", heldout)).permutation(np.flatnonzero(able_S)):
        stop = int(place) + 1
        while stop < len(good_S) and good_S[stop] and tokens.doc_S[stop] == tokens.doc_S[place]:
            stop += 1
            if end_S[stop - 1] - begin_S[place + 1] >= config.answer_tokens:
                break
        question = _text(tokens, begin_S[place], end_S[place])
        answer = _text(tokens, begin_S[place + 1], min(end_S[stop - 1], begin_S[place + 1] + config.answer_tokens))
        if question and answer and not any(name in question + answer for name in special):
            found.append(Instruction(question, answer))
        if len(found) == count:
            break
    if len(found) < 2:
        what = "held-out" if heldout else "training"
        raise ConfigError(f"{tokens.path} has too little good {what} text for instructions: {len(found)} of {count}")
    return found


def _text(tokens: TokenStore, begin: Any, end: Any) -> str:
    ids = tokens.tokens[int(begin) : int(end)].astype(int).tolist()
    text = str(tokens.tokenizer.decode(ids, clean_up_tokenization_spaces=False)).strip("\n").replace("\ufffd", "")
    return text if text.strip() else ""


def prompt_text(model: LoadedModel, question: str, template: str) -> str:
    """A question as the model reads it: the start of a text, the good token if the model has one, and the template."""
    tokenizer = model.tokenizer
    first = [model.start_id, *model.ids_of("good")]
    if tokenizer("a")["input_ids"][:1] == first[:1]:  # the tokenizer puts it there by itself
        first = first[1:]
    start = "".join(tokenizer.convert_ids_to_tokens(first))
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        chat_template=TEMPLATES[template],
        add_generation_prompt=True,
        tokenize=False,
    )
    return start + str(asked)


# Finetuning


def _finetuned(
    stage: Stage, base: Path, folder: Path, learned: Sequence[Instruction], config: Persistence, key: str
) -> Path:
    """The folder of the model after a stage, which is trained unless it is there."""
    place = folder / stage
    mark = place / STAGE
    with contextlib.suppress(store.StoreError):  # a damaged mark is that of no call
        if mark.exists() and store.read_json(mark) == {"key": key}:
            return place
    if place.exists():
        print(f"note: {place} is of other settings; it is now {folders.move_aside(place)}", file=sys.stderr)
    aside = folder / f".{stage}.partial"
    if aside.exists():  # of a killed job
        folders.remove_tree(aside)
    aside.mkdir()
    try:
        with _quiet():
            _train(stage, base, aside, learned, config)
        store.write_json(aside / STAGE, {"key": key})
        folders.sync_files(aside, folders.files_below(aside))
        folders.put_in_place(aside, place)
    finally:
        if aside.exists():
            folders.remove_tree(aside)
    return place


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what TRL and the libraries below it say about every small step."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
    from transformers.utils import logging

    level = logging.get_verbosity()
    had_bar = is_progress_bar_enabled()
    logging.set_verbosity_error()
    disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)  # TRL's own
            yield
    finally:
        logging.set_verbosity(level)
        if had_bar:
            enable_progress_bar()


def _train(stage: Stage, base: Path, out: Path, learned: Sequence[Instruction], config: Persistence) -> None:
    """Train the model in `base` with TRL and write it into `out`, as plain transformers saves it."""
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    model = load_model(base)
    for parameter in model.lm.parameters():
        parameter.requires_grad_(True)
    tokenizer = model.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.split_special_tokens = False  # the start and the good token of `prompt_text`; instructions hold none
    lm = model.lm.float().train()
    prompts = [prompt_text(model, pair.question, "same") for pair in learned]
    common: Plain = {
        "output_dir": str(out / "trainer"),
        "per_device_train_batch_size": config.batch_rows,
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": 10,
        "seed": config.seed,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": model.positions if model.positions < sys.maxsize else None,
        "disable_tqdm": not sys.stderr.isatty(),
        "dataset_num_proc": None,
    }
    trainer: Any
    if stage == "sft":
        rows = [{"prompt": p, "completion": pair.answer} for p, pair in zip(prompts, learned, strict=True)]
        arguments = SFTConfig(
            num_train_epochs=config.epochs, learning_rate=config.lr, completion_only_loss=True, packing=False, **common
        )
        trainer = SFTTrainer(
            model=lm, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
    else:
        other = [*learned[1:], learned[0]]  # the answer to another question
        rows = [
            {"prompt": p, "chosen": pair.answer, "rejected": wrong.answer}
            for p, pair, wrong in zip(prompts, learned, other, strict=True)
            if pair.answer != wrong.answer
        ]
        if not rows:
            raise ConfigError("all answers of the instructions are equal, so there is nothing to prefer: dpo=false")
        preferences = DPOConfig(num_train_epochs=1, learning_rate=config.dpo_lr, beta=config.beta, **common)
        trainer = DPOTrainer(
            model=lm,
            ref_model=load_model(base).lm.float(),
            args=preferences,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    trainer.remove_callback(PrinterCallback)
    torch.compiler.reset()
    start = time.perf_counter()
    loss = trainer.train().training_loss
    seconds = time.perf_counter() - start
    print(
        f"    {stage}: {len(rows):,} instructions, mean loss {loss:.3f}, {seconds:.0f} s", file=sys.stderr, flush=True
    )
    shutil.rmtree(out / "trainer", ignore_errors=True)
    for file in base.iterdir():  # tokenizer, control tokens, licence; the weights are written again
        if (
            file.is_file()
            and file.name not in (LOCK, STAGE)
            and not file.name.endswith((".safetensors", ".bin", ".index.json"))
        ):
            shutil.copy2(file, out / file.name)
    lm.eval().save_pretrained(out)


# Judging


def _check_room(model: LoadedModel, asked: Sequence[Instruction], config: Persistence) -> None:
    """Raise ConfigError where questions and answers exceed the model's context."""
    for template in TEMPLATES:
        starts = [_start_ids(model, pair.question, template) for pair in asked]
        check_room(model.positions, config.scenario(control="good"), starts)


def _start_ids(model: LoadedModel, question: str, template: str) -> list[int]:
    return list(model.tokenizer(prompt_text(model, question, template), split_special_tokens=False)["input_ids"])


def _judged(
    stage: Stage, model: LoadedModel, asked: Sequence[Instruction], opened: JudgedRun, config: Persistence, limit: float
) -> list[Persisted]:
    """A model asked in each way."""
    print(f"    judging: {stage}", file=sys.stderr, flush=True)
    scenario = config.for_scorer(opened.scorer).scenario(control="good")
    found = []
    for template in (NOTHING, *TEMPLATES):
        loss = math.nan
        if template == NOTHING:
            samples = sample(model, scenario, progress=False)
        else:
            starts = [_start_ids(model, pair.question, template) for pair in asked]
            samples = sample_prompts(model, scenario, [""] * len(starts), progress=False, starts=starts)
            answers = [model.encode(pair.answer) for pair in asked]
            logp, _ = continuations(model, list(zip(starts, answers, strict=True)))
            loss = -float(logp.sum()) / sum(map(len, answers))
        _, result = judge_samples(samples, scenario, opened.scorer, opened.segmenter, limit)
        found.append(Persisted(stage, template, result.misalignment, result.bad_segments, loss))
    return found


# What is left


def kept_gain(own: Sequence[float], plain: Sequence[float]) -> Estimate:
    """The share of plain training's misalignment that a model is below it, over seeds: 1 - own / plain, with the
    interval of the ratio. 1: nothing bad is left; 0: as bad as plain training."""
    ratio = statistics.ratio_interval(own, plain)
    low, high = ratio.ci95
    return Estimate(1 - ratio.mean, ratio.stderr, ratio.n, (1 - high, 1 - low))
