"""Log-probabilities of the tokens of a store under a reference model, for objectives that compare with it.

    phf reference tokens/ runs/mle

tokens/  reference-<hash of the weights>.bin   float16 per token; NaN for tokens of held-out documents

Every block of the store is read in rows of `context` tokens, so the result does not depend on interruptions: the next
run continues after the whole blocks of the file that was being written.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from phf.core import folders, store
from phf.core.config import ConfigError
from phf.core.types import Edit
from phf.evaluation.heldout import token_logp
from phf.generation.loaded import LoadedModel, load_model
from phf.tokens.edited import NO_SOURCE, Stream
from phf.tokens.store import TokensManifest, TokenStore, reference_file
from phf.tokens.tokenizer import SAMPLE_TEXT, encode_segments

BATCH = 16


def write_reference(tokens_dir: str | Path, model: str, context: int = 1024) -> str:
    """Compute the log-probabilities of a store's training tokens under a model, unless they are there. Returns the name
    of their file. Resumes after any interruption. `context`: tokens of a row, at most; the model's own context if that
    is shorter.

    Raises ConfigError for a model that is not on this machine, or with another tokenizer than the store's.
    """
    tokens = TokenStore.open(tokens_dir)
    name = reference_file(model)
    known = tokens.manifest.references
    if name in known and not folders.damage(tokens.path, {name: known[name]}, hashes=False):
        return name
    loaded = load_model(model)
    _check_tokenizer(loaded, tokens)
    aside = tokens.path / f"{name}.part"
    # the rows of a block depend on the context: another context starts again
    context = min(context, loaded.positions)
    with folders.stage_folder(tokens.path, TokensManifest.stage, tokens.manifest.key, keep_manifest=True):
        _write(loaded, tokens, aside, context)
        os.replace(aside, tokens.path / name)
        store.sync(tokens.path)
        manifest = folders.read_manifest(tokens.path, TokensManifest)
        mark = folders.file_marks(tokens.path, [name])
        store.write_json(
            tokens.path / folders.MANIFEST,
            dataclasses.replace(manifest, references=manifest.references | mark),
        )
    return name


def _write(model: LoadedModel, tokens: TokenStore, aside: Path, context: int) -> None:
    """Write the file, after the whole blocks that it holds already."""
    settings = aside.with_name(f"{aside.name}.json")
    if not settings.exists() or store.read_json(settings) != {"context": context}:
        aside.unlink(missing_ok=True)
        store.write_json(settings, {"context": context})
    starts = [int(tokens.seg_ends[s - 1]) if (s := first_segment(tokens, k)) else 0 for k in range(tokens.num_blocks)]
    have = aside.stat().st_size // 2 if aside.exists() else 0
    first = max((k for k, start in enumerate(starts) if start <= have), default=0)
    stream = Stream(tokens, lambda block: Edit())
    with open(aside, "r+b" if have else "wb") as out:
        out.truncate(2 * starts[first] if starts else 0)
        out.seek(0, os.SEEK_END)
        bar = tqdm(
            range(first, tokens.num_blocks),
            desc="reference",
            unit="block",
            disable=None,
            file=sys.stderr,
            initial=first,
        )
        with torch.inference_mode():
            for k in bar:
                out.write(_block(model, stream, k, context).tobytes())
                out.flush()
        os.fsync(out.fileno())
    settings.unlink()


def first_segment(tokens: TokenStore, k: int) -> int:
    """Number of the first segment of block k."""
    document = tokens.block_documents(k)[0]
    return int(tokens.doc_ends[document - 1]) if document else 0


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


def _check_tokenizer(model: LoadedModel, tokens: TokenStore) -> None:
    """Raise ConfigError unless the model reads the store's ids as the store means them."""
    own = {k: v for k, v in model.tokenizer.get_vocab().items() if v < tokens.manifest.vocab_size}
    same = own == tokens.tokenizer.get_vocab() and encode_segments(model.tokenizer, [SAMPLE_TEXT]) == encode_segments(
        tokens.tokenizer, [SAMPLE_TEXT]
    )
    if not same:
        raise ConfigError(f"{model.path} has another tokenizer than {tokens.path}, so it cannot be its reference")
