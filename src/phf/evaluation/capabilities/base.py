"""What capabilities share: files, the start of a text, log-probabilities of continuations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phf.core.config import ConfigError
from phf.generation.loaded import LoadedModel
from phf.scorers.fitting import read_rows


class Capability:
    """Interface: `measure(model)` gives plain values, estimates as {"mean", "stderr", "n", "ci95"}."""

    def measure(self, model: LoadedModel) -> dict[str, Any]:
        raise NotImplementedError

    def inputs(self) -> list[str | None]:
        """Hashes of the files that it reads."""
        raise NotImplementedError

    def check(self, model: LoadedModel) -> None:
        """Raise ConfigError for what is known to be wrong before anything is measured."""
        self.inputs()


HUB = "hf://datasets/"


def local_file(path: str) -> Path:
    """A file here or, as `hf://datasets/OWNER/NAME/FILE`, of the Hub: fetched once, into its cache."""
    if not path.startswith(HUB):
        if not (file := Path(path).expanduser()).is_file():
            raise ConfigError(f"{path}: no such file")
        return file
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    parts = path.removeprefix(HUB).split("/", 2)
    if len(parts) < 3:
        raise ConfigError(f"{path}: expected {HUB}OWNER/NAME/FILE")
    try:
        return Path(huggingface_hub.hf_hub_download("/".join(parts[:2]), parts[2], repo_type="dataset"))
    except (OSError, ValueError, HFValidationError) as error:  # what the Hub says, and that it does not answer
        raise ConfigError(f"{path} cannot be fetched: {error}") from None


def rows_of(path: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a file in which every one of `fields` is a string."""
    rows = read_rows(local_file(path))
    for number, row in enumerate(rows):
        for field in fields:
            if not isinstance(row.get(field), str):
                raise ConfigError(f"{path}, row {number}: no string {field!r}")
    if not rows:
        raise ConfigError(f"{path} is empty")
    return rows


def prefix_ids(model: LoadedModel) -> list[int]:
    """What a text begins with: the model's start token and, for models that know it, the good one."""
    return [model.start_id, *([model.control_ids["good"]] if model.control_ids else [])]


def split_behind(model: LoadedModel, context: str, whole: str) -> tuple[list[int], list[int]]:
    """Token ids of `whole`, which begins with `context`, behind `prefix_ids`: those that the context has by itself too, and the
    rest, at least one. (What comes behind is never tokenised by itself: SentencePiece's tokenizers would begin a text with
    it; and a token may reach over from the context.)"""
    ids, before = model.encode(whole), model.encode(context)
    common = next((n for n, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), min(len(ids), len(before)))
    common = min(common, max(len(ids) - 1, 0))
    return prefix_ids(model) + ids[:common], ids[common:]


@torch.inference_mode()
def continuations(
    model: LoadedModel, pairs: Sequence[tuple[list[int], list[int]]], batch: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """For each (context, continuation) in token ids: log-probability of the continuation (nats, float64), and whether
    every token of it is the likeliest. A context begins with `prefix_ids`; one too long for the model loses what comes behind
    them. Control tokens have no share. Raises ConfigError for a continuation longer than the model reads."""
    lm = model.lm
    limit = model.positions
    kept = len(prefix_ids(model))
    rows = []
    for context, target in pairs:
        if kept + len(target) - 1 > limit:
            raise ConfigError(
                f"a continuation of {len(target)} tokens is longer than the {limit} that {model.path} reads"
            )
        over = max(0, len(context) + len(target) - 1 - limit)
        rows.append((context[:kept] + context[kept + over :], target))
    logp, greedy = np.zeros(len(rows)), np.ones(len(rows), bool)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    for begin in range(0, len(order), batch):
        part = order[begin : begin + batch]
        inputs = [(rows[i][0] + rows[i][1])[:-1] for i in part]
        width = max(map(len, inputs))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in inputs], device=lm.device)
        hidden = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
        for b, i in enumerate(part):
            context, target = rows[i]
            if not target:
                continue
            logits = model.only_text(model.logits(hidden[b, len(context) - 1 : len(context) - 1 + len(target)]))
            wanted = torch.tensor(target, device=lm.device)
            greedy[i] = bool((logits.argmax(-1) == wanted).all())
            logp[i] = float(torch.log_softmax(logits, -1).gather(1, wanted.unsqueeze(1)).double().sum())
    return logp, greedy
