"""The folders of runs and recipes: which file is where, and how it is read.

run/  config.yaml     settings of the run, all defaults filled in
      environment.json  versions, threads and device that its bytes depend on
      metrics.jsonl   a line every few steps (phf.training.metrics)
      monitor.jsonl   a line per judgement during training (phf.evaluation.monitor)
      checkpoints/checkpoint-<step>/   each whole one marked by complete.json
      model/          the final model; phf.json says what it was trained for
      samples/<scenario>.jsonl   eval/<part>.json   eval.json
      redteam/        search/   tokens.json   redteam.json
      tamper/         good/   bad/   tamper.json
      persist/        sft/   dpo/   persist.json
      manifest.json   written last: the run is finished

recipe/  recipe.yaml  scored/  tokens/  cache/  <run>/  results.json  report.html  report/
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phf.core import folders, store
from phf.core.config import ConfigError, Plain
from phf.core.text import counted
from phf.core.types import Identity, Number, Roles

COMPLETE = "complete.json"
"""Marks a whole checkpoint (`CheckpointMark`)."""
MODEL_RECORD = "phf.json"
"""Next to a model's weights (`ModelRecord`)."""
_CHECKPOINT = "checkpoint-"
"""Name of a checkpoint's folder, before its step. The Hugging Face Trainer gives it."""


def file_name(name: str) -> str:
    """`name`, which a recipe or a caller gives, if it can be the name of a file. Raises ConfigError for one that would
    leave its folder or be hidden there."""
    if not store.is_file_name(name):
        raise ConfigError(
            f"name {name!r}: a name starts with a letter, a digit or '_', holds no '/' and no line break, and has at "
            f"most 100 characters without {folders.OLD!r}, because it names a file"
        )
    return name


@dataclass(frozen=True)
class RedTeamFolder:
    """Where the files of red-teaming are."""

    path: Path

    @property
    def result(self) -> Path:
        return self.path / "redteam.json"

    @property
    def search(self) -> Path:
        return self.path / "search"

    @property
    def tokens(self) -> Path:
        """Attacks on the control tokens."""
        return self.path / "tokens.json"

    @property
    def cache(self) -> Path:
        """What the search keeps for other searches."""
        return self.path.parent / "cache"


@dataclass(frozen=True)
class RunFolder:
    """Where the files of a run are. A model from elsewhere is judged into a folder with the same names."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def monitor(self) -> Path:
        return self.path / "monitor.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def eval(self) -> Path:
        return self.path / "eval.json"

    @property
    def redteam(self) -> RedTeamFolder:
        return RedTeamFolder(self.path / "redteam")

    @property
    def tamper(self) -> Path:
        """The run finetuned on good and on bad text (phf.redteaming.tamper)."""
        return self.path / "tamper"

    @property
    def persist(self) -> Path:
        """The run after instruction tuning (phf.redteaming.persist)."""
        return self.path / "persist"

    @property
    def cache(self) -> Path:
        """What runs side by side share: texts of references."""
        return self.path.parent / "cache"

    @property
    def earlier_monitor(self) -> Path:
        """What earlier versions called `monitor`."""
        return self.path / "during.jsonl"

    def samples(self, name: str) -> Path:
        """Samples of a scenario. `name`: the scenario's, in training after the tokens so far."""
        return self.path / "samples" / f"{file_name(name)}.jsonl"

    def part(self, name: str) -> Path:
        """The result of one part of an evaluation."""
        return self.path / "eval" / f"{file_name(name)}.json"


@dataclass(frozen=True)
class RecipeFolder:
    """Where the files of a recipe are. `data`: the folder of the scored corpus and the tokens, where it is another."""

    path: Path
    data: Path | None = None

    @property
    def recipe(self) -> Path:
        """The recipe with everything filled in."""
        return self.path / "recipe.yaml"

    @property
    def scored(self) -> Path:
        return (self.data or self.path) / "scored"

    @property
    def tokens(self) -> Path:
        return (self.data or self.path) / "tokens"

    @property
    def cache(self) -> Path:
        """Next to the runs, which share it."""
        return self.path / "cache"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.path / name)

    def judged(self) -> list[Path]:
        """Folders of runs that `phf eval` has judged. Those that were moved aside are left out."""
        return sorted(p.parent for p in self.path.glob("*/eval.json") if ".old-" not in p.parent.name)


# The manifest


@dataclass(frozen=True, kw_only=True)
class TrainCounts:
    """How much a run was trained on."""

    tokens: int
    """Targets of this run."""
    tokens_before: int = 0
    """Targets that its starting weights had seen."""
    steps: int
    """Optimizer steps."""
    epochs: float
    """Source tokens that the training order passed, divided by those of the training part."""
    text_tokens: int
    """Targets' places that are text."""
    source_before: float = 0.0
    """Source tokens of the training order before this run's first row."""
    exposure: Plain = field(default_factory=dict)
    """How much text was read and learned from, by class (`phf.tokens.source_order.Exposure`)."""


@dataclass(frozen=True, kw_only=True)
class NoiseCounts:
    """What errors added to the scores do to the training part, in judged segments."""

    segments: int
    """All of them."""
    bad: int
    """Of these, segments that are bad by the scorer."""
    missed: int
    """Bad segments that got the score of a good one."""
    false_alarms: int
    """Good segments that got the score of a bad one."""
    precision: Number
    """Share of bad segments among those that the objective sees as bad."""
    recall: Number
    """Share of the bad segments that the objective sees as bad."""


@dataclass(frozen=True, kw_only=True)
class TrainManifest(folders.Manifest):
    """`manifest.json` of a finished run."""

    stage: str = "train"
    objective: Plain
    """Settings of the objective, what depends on the corpus resolved."""
    model: Plain
    """Settings of the model."""
    train: Plain
    """Settings of training (`TrainConfig`)."""
    seed: int
    """Seed of weights, order and draws."""
    tokens_dir: str
    """The token store, as the command named it."""
    tokens_from_here: str | None = None
    """The token store from the run's folder: it is found there if both were moved, or from another folder."""
    tokens_content: str
    """Fingerprint of the token store."""
    identity: Identity
    """The scorer whose scores the objective saw."""
    control_tokens: list[str]
    """Control tokens of the objective, by name."""
    parameters: int
    """Parameters of the LM."""
    counts: TrainCounts
    """How much the run was trained on."""
    noise: NoiseCounts | None = None
    """Errors that were added to the scores (`train.scorer_noise`); null: none."""
    seconds: float
    """Time in training steps, over all parts of an interrupted run."""
    threads: int
    """CPU threads."""
    precision: str
    """bf16 or fp32."""

    @property
    def scores(self) -> str | None:
        """Which preference the run was trained on; None: the corpus's own."""
        return self.train.get("scores")

    @property
    def objective_name(self) -> str:
        return str(self.objective.get("name"))


def places(named: str, from_here: str | None, here: Path) -> list[Path]:
    """Where a folder may be that a manifest names: from the folder of the manifest, `here`, or as it was named. Raises
    StoreError for an address: nothing is fetched because a manifest, which may come from others, says so."""
    if "://" in named:
        raise store.StoreError(
            f"{here} names {named}; phf opens no address that only a manifest names: give it yourself"
        )
    found = [] if from_here is None else [Path(os.path.normpath(here.absolute() / from_here))]
    return [*found, store.as_path(named)]


def from_here(path: str | Path, here: str | Path) -> str | None:
    """The path of a local folder from another one; None for a remote folder."""
    return None if "://" in str(path) else os.path.relpath(Path(path).resolve(), Path(here).resolve())


def is_run(path: str | Path) -> bool:
    """Whether a folder holds a finished run of `phf train`. Raises StoreError for a run with damaged files."""
    try:
        if not folders.has_manifest(path, TrainManifest):
            return False
    except store.StoreError:  # another program's manifest.json
        return False
    return bool(folders.read_manifest(path, TrainManifest))


def not_a_run(name: str) -> str:
    """What to say of a name that should be a run's. Raises ConfigError for a folder that does not exist."""
    if Path(name).exists():
        return f"{name} is not a run"
    if not looks_local(name):
        return f"{name} is no folder here, and a model on the Hub is not a run"
    raise ConfigError(f"{name}: no such folder")


def looks_local(name: str) -> bool:
    """Whether a name must be that of a folder: it is no name on the Hub, or its first part is a folder here."""
    first = name.split("/")[0]
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and Path(first).is_dir())


# Checkpoints


@dataclass(frozen=True)
class SinceLine:
    """What a checkpoint holds of the next line of metrics, so that the line is that of a run that was not
    interrupted."""

    steps: int = 0
    """Steps since the last line."""
    seconds: float = 0.0
    """Seconds in them."""
    sums: dict[str, Number] = field(default_factory=dict)
    """Sums of metrics over all processes since the last line."""


@dataclass(frozen=True)
class CheckpointMark:
    """`complete.json`: marks a whole checkpoint."""

    step: int
    """Steps so far."""
    tokens: int
    """Targets seen, those of the starting weights included."""
    since_line: SinceLine = SinceLine()
    """What the next line of metrics already holds."""
    key: str | None = None
    """Key of the run that wrote it; null in checkpoints of earlier versions."""
    files: dict[str, folders.FileMark] = field(default_factory=dict)
    """Size and hash of its files."""


def checkpoint_folder(folder: Path, step: int) -> Path:
    """The checkpoint after a step. `folder`: the run's checkpoints."""
    return folder / f"{_CHECKPOINT}{step}"


def checkpoint_step(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix(_CHECKPOINT))


def is_complete(checkpoint: Path) -> bool:
    return (checkpoint / COMPLETE).exists()


def damaged_checkpoint(checkpoint: Path, key: str | None = None, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint that is marked as whole: damaged or missing files, or another run's key. None if
    nothing is."""
    try:
        mark = store.read_record(checkpoint / COMPLETE, CheckpointMark)
    except store.StoreError:
        return f"{COMPLETE} is damaged"
    if key is not None and mark.key not in (None, key):
        return "it belongs to another run"
    if missing := [name for name in NEEDED_TO_RESUME if not (checkpoint / name).is_file()]:
        return f"{missing[0]} is missing"
    found = folders.damage(checkpoint, mark.files, hashes)
    return found[0] if found else None


NEEDED_TO_RESUME = ("optimizer.pt", "scheduler.pt", "trainer_state.json", "config.json")
"""Files of a checkpoint without which training cannot resume to the same bytes."""


def complete_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a folder, oldest first."""
    return sorted((p for p in _checkpoints(folder) if is_complete(p)), key=checkpoint_step)


def incomplete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder that were not finished."""
    return [p for p in _checkpoints(folder) if not is_complete(p)]


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints by their names; copies and folders of the user's have other names."""
    return [p for p in folder.glob(f"{_CHECKPOINT}*") if re.fullmatch(r"\d+", p.name.removeprefix(_CHECKPOINT))]


CHECKPOINT_FILES = (
    "config.json", "generation_config.json", "model*.safetensors*", "pytorch_model*", "optimizer.pt", "scheduler.pt",
    "scaler.pt", "rng_state*.pth", "trainer_state.json", "training_args.bin", "tokenizer*", "special_tokens*",
    "added_tokens*", "vocab*", "merges*", "chat_template*", "value_head.safetensors", MODEL_RECORD, COMPLETE,
)  # fmt: skip
"""Names of the files that a checkpoint holds."""


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint's own files, its mark first, and its folder if nothing of the user's is left in it."""
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    for pattern in CHECKPOINT_FILES:
        for file in checkpoint.glob(pattern):
            if file.is_file():
                file.unlink()
    for file in checkpoint.glob(".*"):
        if folders.is_partial(file):
            file.unlink()
    with contextlib.suppress(OSError):
        checkpoint.rmdir()


# Models


@dataclass(frozen=True)
class ModelRecord:
    """`phf.json`, next to a model's weights."""

    objective: Plain | None = None
    """Settings of the objective that the model was trained with."""
    control_tokens: dict[str, str] = field(default_factory=dict)
    """Control tokens by role: {"good": name, "bad": name}, or empty."""
    conditions_on: tuple[str, ...] | None = None
    """The roles whose tokens go before what the model shall write; null: "good" if there is one."""
    worst: tuple[str, ...] | None = None
    """The roles whose tokens ask for bad text; null: "bad" if there is one."""
    segmenter: Plain | None = None
    """How training texts were cut into the segments that are tokenized one by one; null: not known."""
    tokens: int | None = None
    """Targets that the model has seen."""
    text: str | None = None
    """Fingerprint of the text of the token store that it was trained on."""
    source_tokens: float | None = None
    """Source tokens of that store's training order that it has read."""
    bad_above: float | None = None
    """Scores above it are bad to the objective; null: it calls nothing bad."""
    document_mask: bool = False
    """Whether tokens attended only to their own document in training."""

    @property
    def roles(self) -> Roles:
        """The control tokens, with what earlier versions did not say."""
        names = self.control_tokens
        usual = (("good",) if "good" in names else (), ("bad",) if "bad" in names else ())
        first = usual[0] if self.conditions_on is None else self.conditions_on
        worst = usual[1] if self.worst is None else self.worst
        return Roles(names, tuple(r for r in first if r in names), tuple(r for r in worst if r in names))


def read_model_record(folder: str | Path) -> ModelRecord | None:
    """The record in a model's folder; None if there is none."""
    path = Path(folder) / MODEL_RECORD
    return model_record(path) if path.exists() else None


def model_record(file: str | Path) -> ModelRecord:
    """The record in a file. In one of an earlier version, the objective's setting `threshold` is `bad_above`."""
    value = store.read_json(file)
    if isinstance(value, dict) and "bad_above" not in value:
        objective = value.get("objective")
        threshold = objective.get("threshold") if isinstance(objective, dict) else None
        value["bad_above"] = threshold if isinstance(threshold, int | float) else None
    return store.as_record(value, ModelRecord, file)


def model_folder(path: str | Path) -> str:
    """Where the weights are: the final model of a run's folder, else the path itself (a folder or a name on the
    Hub)."""
    folder = Path(path).expanduser()
    final = RunFolder(folder).model
    return str(final if (final / "config.json").exists() else folder)


def model_mark(model: str, revision: str | None = None) -> str:
    """What identifies a model: the hash of a folder, or the commit that a name on the Hub refers to."""
    local = Path(model_folder(model))
    if local.exists():
        return store.fingerprint([model, store.path_hash(local)])
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        config = cached_file(model, "config.json", revision=revision)
    except OSError as error:
        raise ConfigError(not_found(f"model {model}", error)) from None
    return store.fingerprint([model, extract_commit_hash(config, None)])


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """What a library raises while it loads a model or tokenizer, as a ConfigError: each format of files has exceptions
    of its own, plain Exception among them. `what`: a word and the path."""
    try:
        yield
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        raise ConfigError(not_found(what, error)) from None


def not_found(what: str, error: Exception) -> str:
    """The message for a model or tokenizer that is neither here nor on the Hub."""
    if "trust_remote_code" in str(error):
        return f"{what} needs Python code that comes with it, and phf never runs such code"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    name = what.partition(" ")[2]
    if Path(name).expanduser().exists():
        return f"{what} cannot be read: {reason}"
    return f"{what}: not a local folder, and it could not be downloaded from the Hub: {reason}"


def tokens_seen(path: str | Path) -> int:
    """Targets that the weights in a folder have seen, those of their own start included. 0 for weights from
    elsewhere."""
    record = read_model_record(model_folder(path))
    if record is not None and record.tokens is not None:
        return record.tokens
    if is_complete(Path(path)):  # a checkpoint whose record does not say it
        return store.read_record(Path(path) / COMPLETE, CheckpointMark).tokens
    for folder in (Path(path), Path(path).parent):
        if (folder / folders.MANIFEST).exists():
            manifest = store.read_json(folder / folders.MANIFEST)
            if manifest.get("stage") in ("train", "export"):
                return int(manifest["counts"]["tokens"] + manifest["counts"].get("tokens_before", 0))
    return 0


def source_read(path: str | Path, text: str) -> float:
    """Source tokens of the training order that the weights in a folder have read, if they were trained on the store
    whose text has this fingerprint. 0 otherwise."""
    record = read_model_record(model_folder(path))
    return 0.0 if record is None or not text or record.text != text else record.source_tokens or 0.0


def weights_mark(path: str | Path) -> str | None:
    """What identifies the weights in a folder, wherever the folder is. None if the weights are not on this
    machine."""
    folder = Path(model_folder(path))
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.json")])
    own = [f for f in files if f.name.startswith(("model", "pytorch_model")) or f.name in ("config.json", MODEL_RECORD)]
    return store.fingerprint([[f.name, store.file_hash(f)] for f in own]) if own else None


# Lines of metrics


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON lines file. A line torn by a full disk or a power cut is left out, and a note says so."""
    lines = []
    torn = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        try:
            found = store.parse_json(line) if line.strip() else {}
        except ValueError:
            found = None
        if not isinstance(found, dict):
            torn.append(number)
        elif found:
            lines.append(found)
    if torn:
        print(
            f"note: {path}: {counted(len(torn), 'line')} left out (first: line {torn[0]}), not whole", file=sys.stderr
        )
    return lines


def keep_lines(path: Path, step: int) -> None:
    """Remove the lines of steps after `step`: a resumed run writes them again."""
    kept = [line for line in (read_lines(path) if path.exists() else []) if line.get("step", 0) <= step]
    store.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def add_line(path: Path, line: Any) -> None:
    """Append one line to a JSON lines file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(store.jsonable(line)) + "\n")
