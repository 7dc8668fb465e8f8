"""TODO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phf.core import store
from phf.core.config import ConfigError

COMPLETE = "complete.json"
"""Marks a whole checkpoint: its step and the target tokens seen."""
MODEL_CARD = "phf.json"
"""Beside a model's weights: its objective, what its control tokens mean ({"good": name, "bad": name} or nothing), how texts
were cut, and the target tokens that it has seen."""


def model_folder(path: str | Path) -> str:
    """Where the weights are: a run's folder stands for its final model; anything else for itself (a Hub name too)."""
    folder = Path(path).expanduser()
    final = folder / "model"
    return str(final if (final / "config.json").exists() else folder)


def model_mark(model: str, revision: str | None = None) -> str:
    """What identifies a model, in a folder or on the Hub, where the commit that its name and revision stand for does."""
    local = Path(model_folder(model))
    if local.exists():
        return store.fingerprint([model, store.path_hash(local)])
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        config = cached_file(model, "config.json", revision=revision)
    except OSError as error:
        raise ConfigError(f"model {model}: no such folder, and it is not to be had from the Hub: {error}") from None
    return store.fingerprint([model, extract_commit_hash(config, None)])


def tokens_seen(path: str | Path) -> int:
    """Target tokens that the run which made these weights (or this checkpoint) has seen, its own start included; 0 if no
    run of phf did."""
    card = Path(model_folder(path)) / MODEL_CARD
    if card.exists() and (tokens := store.read_json(card).get("tokens")) is not None:
        return int(tokens)
    if (Path(path) / COMPLETE).exists():  # of before the card said it
        return int(store.read_json(Path(path) / COMPLETE).get("tokens", 0))
    for folder in (Path(path), Path(path).parent):
        if (folder / store.MANIFEST).exists():
            manifest = store.read_json(folder / store.MANIFEST)
            if manifest.get("stage") in ("train", "export"):
                return int(manifest["counts"]["tokens"] + manifest["counts"].get("tokens_before", 0))
    return 0


def weights_mark(path: str | Path) -> str | None:
    """What identifies the weights in a folder, wherever it lies and whatever lies beside them; None where they are not
    here."""
    folder = Path(model_folder(path))
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.json")])
    own = [f for f in files if f.name.startswith(("model", "pytorch_model")) or f.name in ("config.json", MODEL_CARD)]
    return store.fingerprint([[f.name, store.file_hash(f)] for f in own]) if own else None


def complete_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if (p / COMPLETE).exists()]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one that a full disk or a power cut tore is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def keep_lines(path: Path, step: int) -> None:
    """Leave out of a file of metrics what belongs to steps behind `step`: those are done again."""
    kept = [line for line in (read_metrics(path) if path.exists() else []) if line["step"] <= step]
    store.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def add_line(path: Path, line: dict[str, Any]) -> None:
    """One more line of a file of metrics."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(store.jsonable(line)) + "\n")


def is_run(path: str | Path) -> bool:
    """Whether a folder holds a finished run of `phf train`."""
    try:
        return bool(store.read_manifest(path, "train"))
    except store.StoreError:
        return False
