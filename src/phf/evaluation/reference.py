"""Log-probabilities of the tokens of a store under a reference model, for objectives that compare with it.

    phf reference tokens/ runs/mle

tokens/  reference-<hash of the weights>.bin   float16 per token; NaN for tokens of held-out documents

Every block of the store is read in rows of `context` tokens, so the result does not depend on interruptions: the next
run continues after the whole blocks of the file that was being written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from phf.core import folders, store
from phf.core.config import ConfigError, Plain
from phf.core.locks import Busy
from phf.core.progress import Progress
from phf.core.runs import TrainManifest, weights_mark
from phf.core.types import Edit
from phf.evaluation.heldout import token_logp
from phf.generation.loaded import LoadedModel, load_model
from phf.tokens.edited import NO_SOURCE, Stream
from phf.tokens.store import TokensManifest, TokenStore, reference_file
from phf.tokens.tokenizer import difference

BATCH = 16
CONTEXT = 1024
"""Tokens of a row, at most, where the user does not say."""
WAIT_SECONDS = 1.0
"""Time between two looks at a store that another process is writing."""


def write_reference(tokens_dir: str | Path, model: str, context: int | None = None) -> str:
    """Compute the log-probabilities of a store's training tokens under a model, unless they are there. Returns the name
    of their file. Resumes after any interruption, and waits while another process writes into the store. `context`:
    tokens of a row, at most (default: 1,024); the model's own context if that is shorter.

    Raises ConfigError for a model that is not on this machine, or with another tokenizer than the store's, and where
    the log-probabilities are there and were computed with another `context`.
    """
    tokens = TokenStore.open(tokens_dir)
    name = reference_file(model)
    if _is_there(tokens.path, name, context):
        return name
    loaded = load_model(model)
    if (found := difference(tokens.tokenizer, loaded.tokenizer)) is not None:
        raise ConfigError(f"{model} has another tokenizer than {tokens.path}, so it cannot be its reference: {found}")
    with _turn(tokens):
        if _is_there(tokens.path, name, context):
            return name
        aside = tokens.path / f"{name}.part"
        made_with = {"context": CONTEXT if context is None else context, "positions": loaded.positions}
        _write(loaded, tokens, aside, made_with)
        store.write_json(_settings(tokens.path / name), made_with)
        os.replace(aside, tokens.path / name)
        _settings(aside).unlink()
        store.sync(tokens.path)
        manifest = folders.read_manifest(tokens.path, TokensManifest)
        mark = folders.file_marks(tokens.path, [name])
        store.write_json(
            tokens.path / folders.MANIFEST,
            dataclasses.replace(manifest, references=manifest.references | mark),
        )
    return name


def prepare_reference(tokens_dir: str | Path, model: str, run: str | Path) -> None:
    """`write_reference` for a run in training. A run that is finished needs no reference any more."""
    if weights_mark(model) is None and folders.has_manifest(run, TrainManifest):
        return
    write_reference(tokens_dir, model)


def _is_there(folder: Path, name: str, context: int | None) -> bool:
    """Whether a store holds a whole file of that name. Raises ConfigError if it was computed with another context."""
    known = folders.read_manifest(folder, TokensManifest).references
    if name not in known or folders.damage(folder, {name: known[name]}, hashes=False):
        return False
    settings = _settings(folder / name)
    if context is not None and settings.exists():
        made = store.read_json(settings)
        if min(context, made["positions"]) != min(made["context"], made["positions"]):
            raise ConfigError(
                f"{folder / name} was computed with --context {made['context']}; to compute it with another one, move "
                "it away first"
            )
    return True


def _settings(file: Path) -> Path:
    """What a file was computed with."""
    return file.with_suffix(".json")


@contextlib.contextmanager
def _turn(tokens: TokenStore) -> Iterator[None]:
    """Hold the store inside the block; waits for another process that does."""
    with contextlib.ExitStack() as held:
        waits = False
        while True:
            try:
                held.enter_context(
                    folders.stage_folder(tokens.path, TokensManifest.stage, tokens.manifest.key, keep_manifest=True)
                )
                break
            except Busy as error:
                if not waits:
                    print(f"note: waiting: {error}", file=sys.stderr)
                waits = True
                time.sleep(WAIT_SECONDS)
        yield


def _write(model: LoadedModel, tokens: TokenStore, aside: Path, made_with: Plain) -> None:
    """Write the file, after the whole blocks that it holds already. The rows of a block depend on the context: another
    context starts again."""
    settings = _settings(aside)
    context = min(made_with["context"], made_with["positions"])
    if not settings.exists() or store.read_json(settings) != made_with:
        aside.unlink(missing_ok=True)
        store.write_json(settings, made_with)
    starts = [tokens.first_token(k) for k in range(tokens.num_blocks)]
    have = aside.stat().st_size // 2 if aside.exists() else 0
    first = max((k for k, start in enumerate(starts) if start <= have), default=0)
    stream = Stream(tokens, lambda block: Edit())
    with open(aside, "r+b" if have else "wb") as out:
        out.truncate(2 * starts[first] if starts else 0)
        out.seek(0, os.SEEK_END)
        bar = Progress(
            range(first, tokens.num_blocks),
            desc="reference",
            unit="block",
            initial=first,
        )
        with torch.inference_mode():
            for k in bar:
                out.write(_block(model, stream, k, context).tobytes())
                out.flush()
        os.fsync(out.fileno())


def _block(model: LoadedModel, stream: Stream, k: int, context: int) -> np.ndarray:
    """Log-probabilities of the tokens of block k, float16."""
    found = np.full(len(stream.tokens.block(k).ids_T), np.nan, np.float16)
    edited = stream.with_places(k)
    assert edited.source is not None
    logp = np.zeros(len(edited), np.float32)
    rows = [(low, min(low + context, len(edited) - 1)) for low in range(0, len(edited) - 1, context)]
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        ids = torch.zeros((len(part), context + 1), dtype=torch.long)
        for b, (low, high) in enumerate(part):
            ids[b, : high - low + 1] = torch.from_numpy(edited.ids[low : high + 1])
        ids = ids[:, : max(high - low for low, high in part) + 1].to(model.lm.device)
        scored, _ = token_logp(model, ids[:, :-1], ids[:, 1:])
        for b, (low, high) in enumerate(part):
            logp[low + 1 : high + 1] = scored[b, : high - low].cpu().numpy()
    text = edited.source != NO_SOURCE
    found[edited.source[text]] = logp[text]
    return found
