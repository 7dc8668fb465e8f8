"""The interface of a capability, and what capabilities share: files, the start of a text, log-probabilities."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from phf.core.config import ConfigError, to_plain
from phf.core.types import Estimate
from phf.data.files import read_rows
from phf.evaluation.results import CapabilityResult
from phf.generation.loaded import LoadedModel


class Capability:
    """Interface. A subclass is a frozen dataclass; its fields are its settings."""

    @property
    def title(self) -> str:
        """The capability's name and task, for tables."""
        settings = to_plain(self)
        return " ".join([settings["name"], *([settings["task"]] if "task" in settings else [])])

    def of_text(self, tokens: str) -> Self:
        """The capability on a token store, where it reads one that its settings leave open (`path`)."""
        return self

    def measure(self, model: LoadedModel) -> CapabilityResult:
        """Measure a model. The first estimate of the result is the main number."""
        raise NotImplementedError

    def inputs(self) -> list[str | None]:
        """Hashes of the files that the capability reads."""
        raise NotImplementedError

    def check_inputs(self) -> None:
        """Raise ConfigError for files that are missing or of another form, before there is a model."""
        self.inputs()

    def check(self, model: LoadedModel) -> None:
        """Raise ConfigError for problems that can be found before anything is measured."""
        self.inputs()

    def result(self, estimates: dict[str, Estimate], **details: Any) -> CapabilityResult:
        """A result with this capability's name and settings."""
        settings = to_plain(self)
        return CapabilityResult(settings["name"], settings, estimates, details)


HUB = "hf://datasets/"


def local_file(path: str) -> Path:
    """A local file, or a file of the Hub (`hf://datasets/OWNER/NAME/FILE`), downloaded once into its cache."""
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
    except (OSError, ValueError, HFValidationError) as error:  # errors of the Hub and of the connection
        raise ConfigError(f"{path} cannot be downloaded: {error}") from None


def rows_of(path: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a file. Raises ConfigError if one of `fields` is not a string in some row."""
    rows = read_rows(local_file(path))
    for number, row in enumerate(rows):
        for field in fields:
            if not isinstance(row.get(field), str):
                raise ConfigError(f"{path}, row {number}: no string {field!r}")
    if not rows:
        raise ConfigError(f"{path} is empty")
    return rows


def tell_cut(cut: int, count: int, what: str) -> None:
    """Say that some texts were cut."""
    if cut:
        print(f"note: {cut:,} of {count:,} {what}", file=sys.stderr)


def prefix_ids(model: LoadedModel) -> list[int]:
    """Token ids that a text starts with: the start token and the control tokens that the model conditions on."""
    return [model.start_id, *model.ids_of("good")]


def split_after(model: LoadedModel, context: str, whole: str) -> tuple[list[int], list[int]]:
    """Token ids of `whole`, split after its beginning `context`: the tokens that the context has by itself too
    (after `prefix_ids`), and the rest, at least one token.

    The rest is not tokenized by itself: SentencePiece would treat it as the beginning of a text, and a token may
    span the end of the context.
    """
    ids = model.encode(whole)
    before = model.encode(context)
    common = next((n for n, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), min(len(ids), len(before)))
    common = min(common, max(len(ids) - 1, 0))
    return prefix_ids(model) + ids[:common], ids[common:]


@torch.inference_mode()
def continuations(
    model: LoadedModel, pairs: Sequence[tuple[list[int], list[int]]], batch: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """For each (context, continuation) in token ids: log-probability of the continuation in nats (float64), and
    whether all its tokens are the likeliest. Control tokens are excluded.

    A context starts with `prefix_ids`; a context that is too long loses tokens right after them. Raises ConfigError
    for a continuation longer than the model's context.
    """
    lm = model.lm
    limit = model.positions
    kept = len(prefix_ids(model))
    rows = []
    cut = 0
    for context, target in pairs:
        if kept + len(target) - 1 > limit:
            raise ConfigError(
                f"a continuation of {len(target)} tokens is longer than the {limit} that {model.path} reads"
            )
        over = max(0, len(context) + len(target) - 1 - limit)
        cut += over > 0
        rows.append((context[:kept] + context[kept + over :], target))
    tell_cut(
        cut, len(rows), f"contexts are longer than the {limit} tokens that the model reads; they lost their beginning"
    )
    logp = np.zeros(len(rows))
    greedy = np.ones(len(rows), bool)
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
