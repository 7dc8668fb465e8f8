"""Tokenizers: trained on the corpus or taken from a model. Text is encoded segment by segment."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core import store
from phf.core.config import STRICT, ConfigError
from phf.core.runs import loading
from phf.core.types import Piece, PieceIds

END_OF_TEXT = "<|endoftext|>"
SAMPLE_TEXT = 'Capitals,  two spaces, 1234 and 5.6, it\'s "quoted", naïve ﬁ Ünï 日本\n\tdef f(x): return x\n'
"""Two tokenizers that cut it alike are taken for the same."""


def difference(tokenizer: Any, other: Any) -> str | None:
    """What differs if `other` reads the ids of `tokenizer` otherwise, or cuts a text otherwise; None: nothing. It may
    have more tokens."""
    theirs = other.get_vocab()
    for token, id in tokenizer.get_vocab().items():
        if theirs.get(token) != id:
            what = f"is {theirs[token]} there" if token in theirs else "does not exist there"
            return f"token {token!r} has id {id} in the store and {what}"
    if encode_segments(tokenizer, [SAMPLE_TEXT]) != encode_segments(other, [SAMPLE_TEXT]):
        return "the vocabularies are the same, but they cut texts differently"
    return None


@dataclass(frozen=True, config=STRICT)
class TrainBPE:
    """A byte-level BPE with GPT-2's pre-tokenization, trained on the corpus's own training documents."""

    vocab_size: Annotated[int, Field(ge=257)]
    name: Literal["bpe"] = "bpe"


@dataclass(frozen=True, config=STRICT)
class PretrainedTokenizer:
    """A tokenizer from a local folder or the Hub. It must be a fast tokenizer with an end-of-text token.

    `lossy`: accept a tokenizer that changes texts, for example to lower case.
    """

    path: str
    name: Literal["pretrained"] = "pretrained"
    revision: str | None = None
    lossy: Annotated[bool, Field(exclude_if=lambda value: not value)] = False


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


def load_tokenizer(path: str | Path, revision: str | None = None, as_it_is: bool = False) -> Any:
    """A fast tokenizer with an end-of-text token, from a folder or the Hub. Raises ConfigError for any other.

    Segments are tokenized one by one and must join to the document, so a space that the tokenizer would put before
    every text is switched off, and so are truncation and padding that were saved with it. `as_it_is`: keep the space,
    for models from elsewhere that were trained with it.
    """
    from transformers import AutoTokenizer

    with loading(f"tokenizer {path}"):
        tokenizer = AutoTokenizer.from_pretrained(str(path), revision=revision, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ConfigError(f"tokenizer {path} has no fast version (tokenizer.json); phf needs one")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"tokenizer {path} has no end-of-text token (eos_token); add one and save it again")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if not as_it_is:
        _remove_prefix(tokenizer)
    return tokenizer


def _remove_prefix(tokenizer: Any) -> None:
    """Switch off the space that a tokenizer puts before every text, in place."""
    from tokenizers import Tokenizer

    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    plain = {
        **parts,
        **{name: _without_prefix(parts[name], name) for name in ("normalizer", "pre_tokenizer", "decoder")},
    }
    if plain != parts:
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(plain))
        tokenizer.init_kwargs.pop("add_prefix_space", None)


def _without_prefix(part: Any, role: str) -> Any:
    """A normalizer, pre_tokenizer or decoder (`role`) of tokenizer.json without what adds or removes a space at the
    start; None for one that does nothing else."""
    if part is None:
        return None
    for inner in ("normalizers", "pretokenizers", "decoders"):
        if part["type"] == "Sequence" and inner in part:
            kept = [_without_prefix(p, role) for p in part[inner]]
            return {**part, inner: [p for p in kept if p is not None]}
    if part["type"] == "Prepend" or (part["type"] == "Strip" and part.get("content") == " " and part.get("start")):
        return None
    if part["type"] == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    if part["type"] == "ByteLevel" and role == "pre_tokenizer":
        return {**part, "add_prefix_space": False}
    return part


def table_size(tokenizer: Any) -> int:
    """Rows that a model's table of embeddings needs: the largest id and 1. A vocabulary may have holes."""
    return int(max(tokenizer.get_vocab().values())) + 1


def special_ids(tokenizer: Any) -> list[int]:
    """Ids that no text may give: end-of-text and all tokens that the tokenizer calls special."""
    added = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    return sorted({tokenizer.eos_token_id, *tokenizer.all_special_ids, *added})


def check_model_fits(tokenizer: Any, rows: int, model: str) -> None:
    """Raise ConfigError for a tokenizer whose largest id is not in a model's table of `rows` embeddings."""
    if (needed := table_size(tokenizer)) > rows:
        raise ConfigError(
            f"{model} has {rows:,} rows of embeddings, but its tokenizer has ids up to {needed - 1:,}: it is not this "
            "model's tokenizer"
        )


def encode_segments(tokenizer: Any, segments: Sequence[str]) -> list[list[int]]:
    """Token ids of each segment by itself. Special tokens typed in a text are encoded as text."""
    with _special_as_text(tokenizer) as backend:
        found = [e.ids for e in backend.encode_batch_fast(list(segments), add_special_tokens=False)]
        special = set(special_ids(tokenizer))
        names = _names_pattern([tokenizer.convert_ids_to_tokens(i) for i in special])
        for n, segment in enumerate(segments):
            if names.search(segment) and special.intersection(found[n]):
                found[n] = _encode_cut_names(backend, segment, names)
        return found


def segment_offsets(tokenizer: Any, segments: Sequence[str]) -> list[list[tuple[int, int]]]:
    """The characters [start, end) of each token of each segment, by itself, as `encode_segments` cuts it."""
    with _special_as_text(tokenizer) as backend:
        return [e.offsets for e in backend.encode_batch(list(segments), add_special_tokens=False)]


def _names_pattern(names: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _encode_cut_names(backend: Any, text: str, names: re.Pattern[str]) -> list[int]:
    """Token ids of a text in which the names of special tokens are cut after their first character. Some kinds of model
    have them as entries of their vocabulary, and would read a typed name as the token."""
    cuts = [0, *(m.start() + 1 for m in names.finditer(text)), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(cuts) if a < b]
    return [i for e in backend.encode_batch_fast(pieces, add_special_tokens=False) for i in e.ids]


@contextlib.contextmanager
def _special_as_text(tokenizer: Any) -> Iterator[Any]:
    """The tokenizer's backend, which inside this block reads special tokens typed in a text as text, and neither cuts
    nor pads."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
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


def piece_ids(pieces: Sequence[Piece], tokenizer: Any) -> list[PieceIds]:
    """Pieces as token ids. The tokenizer has their control tokens already."""
    made = []
    for piece in pieces:
        if piece.column is not None:
            made.append(PieceIds(learned=piece.learned, column=piece.column))
            continue
        if piece.control:
            ids = [tokenizer.convert_tokens_to_ids(piece.text)]
        else:
            (ids,) = encode_segments(tokenizer, [piece.text])
        made.append(PieceIds(tuple(ids), piece.learned))
    return made


def starts_words(tokenizer: Any) -> np.ndarray:
    """Whether each entry of a tokenizer's vocabulary starts a word, bool: what it decodes to starts with white space,
    or the tokenizer marks it so."""
    names = tokenizer.convert_ids_to_tokens(list(range(table_size(tokenizer))))
    texts = [tokenizer.convert_tokens_to_string([name]) if name is not None else "" for name in names]
    marked = ("Ġ", "▁")
    starts = np.array(
        [text[:1].isspace() or str(name).startswith(marked) for name, text in zip(names, texts, strict=True)], bool
    )
    if starts.any():
        return starts
    return np.array([not str(name).startswith("##") for name in names], bool)  # WordPiece marks what continues a word


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
    ids = [int(tokenizer.convert_tokens_to_ids(name)) for name in names]
    taken = {i for name, i in vocabulary.items() if name not in names}
    if clash := [name for name, i in zip(names, ids, strict=True) if i in taken]:
        raise ConfigError(
            f"control token {clash[0]!r} would get the id of another token, because the tokenizer's vocabulary has "
            "holes; use a tokenizer whose ids have none"
        )
    return ids


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Save a tokenizer so that plain `from_pretrained` loads one that reads typed special tokens as text. To get
    the token itself, call `tokenizer(text, split_special_tokens=False)`."""
    tokenizer.save_pretrained(str(folder))
    path = Path(folder) / "tokenizer_config.json"
    config = store.read_json(path) | {"split_special_tokens": True}
    if config.get("tokenizer_class") not in GENERIC_CLASSES and not _loads_alike(tokenizer, folder):
        config["tokenizer_class"] = GENERIC_CLASSES[0]  # the model's own class would put the space back
    store.write_json(path, config)


GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of transformers that load tokenizer.json as it is."""


def _loads_alike(tokenizer: Any, folder: str | Path) -> bool:
    """Whether plain `from_pretrained` reads a text with the saved tokenizer as `tokenizer` does."""
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    text = "A text. It has  spaces\n    and lines"
    return bool(
        tokenizer(text, add_special_tokens=False)["input_ids"] == again(text, add_special_tokens=False)["input_ids"]
    )
