"""The edited token stream of a store as other training engines read it.

    phf export-tokens tokens/ out/ --format megatron objective=conditional objective.threshold=0

out/  shard-00000...   files of the format      tokenizer/   with the objective's control tokens      manifest.json

The stream is what training reads: end-of-text, then the document with what the objective inserts, without what it
drops. Documents are in the order of the store, each as often as one epoch reads it; engines shuffle themselves. A shard
that is written is not written again after an interruption.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from phf.core import folders, store
from phf.core.config import ConfigError, Plain, to_plain
from phf.core.extras import MissingPackage, needs
from phf.core.progress import Progress
from phf.engines.formats import WRITERS, Format, Shard
from phf.objectives import Objective
from phf.objectives.tensors import torch
from phf.tokens.edited import Edited, Stream
from phf.tokens.parts import id_type
from phf.tokens.store import TokenStore
from phf.tokens.tokenizer import add_control_tokens, save_tokenizer, table_size
from phf.tokens.vocabulary import Vocabulary
from phf.training.order import objective_stream


@dataclass(frozen=True)
class ShardCounts:
    """What a shard holds."""

    documents: int
    tokens: int
    learned: int
    """Targets that the objective counts."""
    bad: int
    """Tokens with a score above the scorer's threshold."""
    files: dict[str, folders.FileMark]

    def __add__(self, other: ShardCounts) -> ShardCounts:
        return ShardCounts(
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.learned + other.learned,
            self.bad + other.bad,
            self.files | other.files,
        )


@dataclass(frozen=True, kw_only=True)
class ExportTokensManifest(folders.Manifest):
    """`manifest.json` of exported tokens."""

    stage: str = "export-tokens"
    format: str
    objective: Plain
    """Settings, with what depends on the corpus resolved."""
    split: str
    dtype: str
    """Of the token ids."""
    vocab_size: int
    """With the control tokens."""
    end_of_text_id: int
    control_tokens: dict[str, int] = field(default_factory=dict)
    """Ids by role."""
    tokens_content: str
    """Fingerprint of the token store."""
    shards: int
    documents: int
    tokens: int
    learned: int
    bad: int


def export_tokens(
    tokens_dir: str | Path,
    out: str | Path,
    objective: Objective,
    format: Format = "flat",
    split: str = "train",
    scores: str | None = None,
    token_scores: bool = False,
    shard_tokens: int = 100_000_000,
    seed: int = 0,
) -> ExportTokensManifest:
    """Write the edited stream of a store into folder `out` and return its manifest. Resumes after any interruption.

    `split`: train or heldout. `scores`, `token_scores`, `seed`: as in training. `shard_tokens`: tokens in a shard,
    about. Raises ConfigError for an objective whose loss is no weight of each target, and for schedules, whose edits
    differ by time.
    """
    tokens = TokenStore.open(tokens_dir, scores, token_scores)
    objective = objective.fit(tokens.statistics)
    _check(objective)
    used = [tokens] if objective.preferences is None else [tokens.with_scores(name) for name in objective.preferences]
    content = [[t.manifest.content, t.token_mark] for t in used]
    key = store.fingerprint([content, to_plain(objective), format, split, shard_tokens, seed, "export-tokens/1"])
    out = Path(out)
    if folders.is_done(out, key):
        folders.done_before(out)
        return folders.read_manifest(out, ExportTokensManifest)
    tokenizer = tokens.tokenizer
    if isinstance(tokenizer, Vocabulary):
        raise MissingPackage(f"export-tokens {needs('transformers')}", name="transformers")
    ids = dict(zip(objective.roles, add_control_tokens(tokenizer, list(objective.control_tokens)), strict=True))
    stream = objective_stream(tokens, objective, tokenizer, seed, objective.preferences, split=split)
    dtype = id_type(table_size(tokenizer))
    with folders.stage_folder(out, ExportTokensManifest.stage, key):
        save_tokenizer(tokenizer, out / "tokenizer")
        total = ShardCounts(0, 0, 0, 0, {})
        parts = list(_parts(stream, shard_tokens))
        for number, blocks in enumerate(Progress(parts, desc="exporting", unit="shard")):
            done = out / f".shard-{number:05d}.json"
            if not done.exists():
                shard = _shard(stream, blocks, objective, dtype)
                files = WRITERS[format](out / f"shard-{number:05d}", shard)
                bad = int((shard.score > np.float16(tokens.bad_above)).sum())
                marks = folders.file_marks(out, [f.name for f in files])
                store.write_json(
                    done, ShardCounts(len(shard.ends), len(shard.ids), int(shard.learned.sum()), bad, marks)
                )
            total = total + store.read_record(done, ShardCounts)
        if not total.documents:
            raise ConfigError(f"the {split} part has no document after the objective's edit")
        manifest = ExportTokensManifest(
            key=key,
            format=format,
            objective=to_plain(objective),
            split=split,
            dtype=dtype.name,
            vocab_size=table_size(tokenizer),
            end_of_text_id=tokens.end_of_text_id,
            control_tokens=ids,
            tokens_content=tokens.manifest.content,
            shards=len(parts),
            documents=total.documents,
            tokens=total.tokens,
            learned=total.learned,
            bad=total.bad,
            files=total.files | folders.file_marks(out, folders.files_below(out, "tokenizer")),
        )
        finished = folders.finish(out, manifest)
        for number in range(len(parts)):
            (out / f".shard-{number:05d}.json").unlink(missing_ok=True)
    return finished


def _check(objective: Objective) -> None:
    """Raise ConfigError for an objective that a file with a weight per token does not hold."""
    if len(objective.timeline) > 1:
        raise ConfigError(f"{objective.name} changes during training, so its stream cannot be exported once")
    more = (objective.value, objective.reference_model, objective.removable)
    if any(needed is not None for needed in more):
        raise ConfigError(f"{objective.name} needs more than a weight per token: train it with `phf train`")


def _parts(stream: Stream, shard_tokens: int) -> Iterator[list[int]]:
    """The blocks of each shard."""
    blocks: list[int] = []
    size = 0
    for k in range(stream.tokens.num_blocks):
        blocks.append(k)
        size += stream.length(k)
        if size >= shard_tokens:
            yield blocks
            blocks = []
            size = 0
    if size or blocks:
        yield blocks


def _shard(stream: Stream, blocks: list[int], objective: Objective, dtype: np.dtype[np.generic]) -> Shard:
    edited = Edited.joined([dataclasses.replace(stream.with_places(k), segment=None, source=None) for k in blocks])
    score = torch.from_numpy(edited.score)
    learned = torch.from_numpy(edited.learned)
    weight, unlikelihood = objective.weights(score, learned)
    counted = objective.counted(score, learned) | (unlikelihood > 0)
    starts = np.flatnonzero(edited.ids == stream.tokens.end_of_text_id)
    return Shard(
        ids=edited.ids.astype(dtype),
        score=(edited.score if edited.score.ndim == 1 else edited.score[:, 0]).astype(np.float16),
        learned=counted.numpy(),
        weight=weight.float().numpy(),
        unlikelihood=unlikelihood.float().numpy() if bool((unlikelihood > 0).any()) else None,
        ends=np.r_[starts[1:], len(edited.ids)].astype(np.int64) if len(starts) else np.zeros(0, np.int64),
    )
