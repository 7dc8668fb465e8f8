"""Tokenizers: trained on the corpus or taken from a model. Text is encoded segment by segment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core import store
from phf.core.config import STRICT, ConfigError
from phf.core.runs import not_found

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, config=STRICT)
class TrainBPE:
    """A byte-level BPE with GPT-2's pre-tokenization, trained on the corpus's own training documents."""

    vocab_size: Annotated[int, Field(ge=257)]
    name: Literal["bpe"] = "bpe"


@dataclass(frozen=True, config=STRICT)
class PretrainedTokenizer:
    """A tokenizer from a local folder or the Hub. It must be a fast tokenizer with an end-of-text token."""

    path: str
    name: Literal["pretrained"] = "pretrained"
    revision: str | None = None


def train_bpe(texts: Iterable[str], vocab_size: int) -> Any:
    """A `PreTrainedTokenizerFast` with `vocab_size` entries (end-of-text among them), trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path: str | Path, revision: str | None = None) -> Any:
    """A fast tokenizer with an end-of-text token, from a folder or the Hub. Raises ConfigError for any other."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(not_found(f"tokenizer {path}", error)) from None
    if not tokenizer.is_fast:
        raise ConfigError(f"tokenizer {path} has no fast version (tokenizer.json); phf needs one")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"tokenizer {path} has no end-of-text token (eos_token); add one and save it again")
    return tokenizer


def encode_segments(tokenizer: Any, segments: Sequence[str]) -> list[list[int]]:
    """Token ids of each segment by itself. Special tokens typed in a text are encoded as text."""
    with _special_as_text(tokenizer) as backend:
        return [e.ids for e in backend.encode_batch_fast(list(segments), add_special_tokens=False)]


@contextlib.contextmanager
def _special_as_text(tokenizer: Any) -> Iterator[Any]:
    """The tokenizer's backend, which reads special tokens typed in a text as text inside this block."""
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        yield backend
    finally:
        backend.encode_special_tokens = before


def encode_cut(tokenizer: Any, segments: Sequence[str], pieces: Sequence[str] | None = None) -> list[list[int]]:
    """Token ids of segments whose text is tokenized in other `pieces` (None: as a whole) and then cut at the
    segments' ends. A token belongs to the segment of its last character."""
    pieces = ["".join(segments)] if pieces is None else pieces
    with _special_as_text(tokenizer) as backend:
        encoded = backend.encode_batch(list(pieces), add_special_tokens=False)
    starts = np.cumsum([0, *map(len, pieces)])
    last = [start + max(end - 1, 0) for e, start in zip(encoded, starts, strict=False) for _, end in e.offsets]
    ids = np.array([i for e in encoded for i in e.ids], np.int64)
    if not segments or not len(ids):
        return [[] for _ in segments]
    owner = np.searchsorted(np.cumsum([len(s) for s in segments]), np.maximum.accumulate(last), side="right")
    counts = np.bincount(np.minimum(owner, len(segments) - 1), minlength=len(segments)).cumsum()[:-1]
    return [part.tolist() for part in np.split(ids, counts)]


def add_control_tokens(tokenizer: Any, names: Sequence[str]) -> list[int]:
    """Add control tokens to `tokenizer` as special tokens, in place, and return their ids.

    Raises ConfigError if a name is already an ordinary entry of the vocabulary, which text could produce.
    """
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    for name in names:
        if name in vocabulary and name not in special:
            raise ConfigError(
                f"control token {name!r} is an ordinary entry of the tokenizer's vocabulary; choose another name"
            )
    tokenizer.add_special_tokens({"additional_special_tokens": list(names)}, replace_extra_special_tokens=False)
    return [tokenizer.convert_tokens_to_ids(name) for name in names]


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Save a tokenizer so that plain `from_pretrained` loads one that reads typed special tokens as text. To get
    the token itself, call `tokenizer(text, split_special_tokens=False)`."""
    tokenizer.save_pretrained(str(folder))
    path = Path(folder) / "tokenizer_config.json"
    store.write_json(path, store.read_json(path) | {"split_special_tokens": True})
