"""The parts of a token store while it is made: one file of arrays per file of the scored corpus."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from phf.core import folders, store
from phf.core.config import ConfigError, Plain
from phf.core.types import Rejected, ScoredDocument
from phf.data.canaries import is_left_out
from phf.data.scored import ScoredCorpus
from phf.tokens.tokenizer import encode_segments, load_tokenizer, special_ids, table_size

BATCH_DOCS = 256
"""Documents tokenized at a time."""


CHECKED_DOCS = 8
"""Documents of each batch that are decoded again and compared with their text. Decoding all would double the time."""
CHECKED_FOREIGN = 32
"""In addition, documents of each batch with characters beyond ASCII, which tokenizers change most often."""


ANOTHER = (
    "use another tokenizer (a byte-level BPE reads every text), or accept changed texts with --lossy "
    "(tokenizer.lossy=true in a recipe)"
)
"""What to do about a tokenizer that changes texts."""


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Sizes of a token store."""

    documents: int = 0
    """Documents."""
    segments: int = 0
    """Segments."""
    tokens: int = 0
    """Text tokens, without end-of-text and control tokens."""
    bytes: int = 0
    """UTF-8 bytes of the text."""
    train_documents: int = 0
    """Documents that are not held out."""
    train_tokens: int = 0
    """Their tokens."""
    roundtrip_checked: int = 0
    """Documents whose tokens were decoded again and compared with the text."""
    roundtrip_lossy: int = 0
    """Those of them that differed from the text."""
    unjudged: int = 0
    """Segments that were not judged."""


def first_examples(checks: Sequence[PartChecks]) -> dict[str, str]:
    found: dict[str, str] = {}
    for check in checks:
        found = check.examples | found
    return found


def id_type(vocab_size: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


@dataclass(frozen=True)
class PartChecks:
    """What was counted while one file of the corpus was tokenized."""

    rejected: dict[str, int]
    checked: int
    lossy: int
    examples: dict[str, str] = field(default_factory=dict)


class Part:
    """The arrays of one file of the corpus while it is tokenized. `lossy`: whether texts may change."""

    def __init__(self, tokenizer: Any, heldout: float, lossy: bool) -> None:
        self.tokenizer = tokenizer
        self.heldout = heldout
        self.may_be_lossy = lossy
        self.size = table_size(tokenizer)
        unknown = tokenizer.unk_token_id if lossy else None
        self.forbidden = [i for i in special_ids(tokenizer) if i != unknown or i == tokenizer.eos_token_id]
        self.ids: list[np.ndarray] = []
        self.seg_tokens: list[int] = []
        self.seg_bytes: list[int] = []
        self.doc_segs: list[int] = []
        self.held: list[bool] = []
        self.checked = self.lossy = 0

    def add(self, documents: Sequence[ScoredDocument]) -> None:
        dtype = id_type(self.size)
        foreign = 0
        encoded = iter(encode_segments(self.tokenizer, [t for d in documents for t in d.texts]))
        for number, document in enumerate(documents):
            tokens = [next(encoded) for _ in document.texts]
            ids = [i for t in tokens for i in t]
            self.ids.append(np.array(ids, np.int64))
            self._check_ids(document, self.ids[-1])
            self.ids[-1] = self.ids[-1].astype(dtype)
            self.seg_tokens += [len(t) for t in tokens]
            self.seg_bytes += [len(t.encode()) for t in document.texts]
            self.doc_segs.append(len(tokens))
            self.held.append(is_left_out(document, self.heldout))
            foreign += not document.text.isascii()
            if number < CHECKED_DOCS or (not document.text.isascii() and foreign <= CHECKED_FOREIGN):
                self._check_text(document, ids)

    def _check_ids(self, document: ScoredDocument, ids: np.ndarray) -> None:
        """Raise ConfigError if a text gives the id of a special token, or one that is not in the vocabulary."""
        if len(ids) and ids.max() >= self.size:
            raise ConfigError(f"document {document.id}: the tokenizer gives id {ids.max()}, but has only {self.size}")
        if len(found := ids[np.isin(ids, self.forbidden)]):
            name = self.tokenizer.convert_ids_to_tokens(int(found[0]))
            what = (
                "cannot write some of its characters, and writes the special token"
                if found[0] == self.tokenizer.unk_token_id
                else "reads some of its text as the special token"
            )
            raise ConfigError(f"document {document.id}: the tokenizer {what} {name!r} instead; {ANOTHER}")

    def _check_text(self, document: ScoredDocument, ids: Sequence[int]) -> None:
        """Raise ConfigError if the tokens do not decode to the text that was scored, unless that is allowed."""
        self.checked += 1
        decoded = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if decoded == document.text:
            return
        self.lossy += 1
        if not self.may_be_lossy:
            at = next(n for n, (a, b) in enumerate(zip(document.text + "\0", decoded + "\1", strict=False)) if a != b)
            start = max(at - 10, 0)
            raise ConfigError(
                f"document {document.id}: its tokens do not decode to its text. From character {start} on, the text is "
                f"{document.text[start : at + 20]!r} and the tokens say {decoded[start : at + 20]!r}; {ANOTHER}"
            )

    def save(self, path: Path, checks: PartChecks, wanted: Callable[[], None]) -> None:
        """Write the arrays to `path`, and before them what was counted. `wanted` raises an exception if nobody waits
        for them any more."""
        dtype = id_type(self.size)
        with store.written_aside(path) as aside:
            np.savez(
                aside,
                tokens=np.concatenate(self.ids) if self.ids else np.zeros(0, dtype),
                seg_tokens=np.array(self.seg_tokens, np.int64),
                seg_bytes=np.array(self.seg_bytes, np.uint32),
                doc_segs=np.array(self.doc_segs, np.int64),
                heldout=np.array(self.held, np.uint8),
            )
            wanted()
            store.write_json(path.with_suffix(".json"), checks)


@dataclass(frozen=True, kw_only=True)
class TokenizeJob:
    """One file of a corpus to tokenize. It is sent as JSON to other processes and machines."""

    scored: str
    """The scored corpus."""
    file: int
    """Which of its files."""
    tokenizer: str
    """Folder of the tokenizer."""
    heldout: float
    lossy: bool
    part: str
    """Where the arrays go."""
    key: str
    """Key of the stage that asked for this work. A job that a scheduler starts late must not write into a folder that
    belongs to other settings by then."""


def run_job(job: TokenizeJob) -> None:
    """Tokenize one file of a corpus in a process of its own. Raises StoreError if the folder belongs to other settings
    by now."""
    path = Path(job.part)
    wanted = functools.partial(folders.check_wanted, path.parent, job.key)
    wanted()
    corpus, tokenizer = _opened(job.scored, job.tokenizer, job.key)
    tokenize_part(corpus, corpus.files[job.file], Part(tokenizer, job.heldout, job.lossy), path, wanted)


def run_plain(job: Plain) -> None:
    """`run_job` of a job that was sent as JSON."""
    run_job(TokenizeJob(**job))


@functools.lru_cache(maxsize=1)
def _opened(scored: str, tokenizer: str, key: str) -> tuple[ScoredCorpus, Any]:
    """A scored corpus and a store's tokenizer, for all jobs of a process. `key`: the store's, because another store may
    get the same folder."""
    return ScoredCorpus(scored), load_tokenizer(tokenizer)


def tokenize_part(corpus: ScoredCorpus, file: Path, part: Part, path: Path, wanted: Callable[[], None]) -> None:
    """Tokenize one file of the corpus into arrays at `path`. `wanted`: as for `Part.save`."""
    rejected: Counter[str] = Counter()
    examples: dict[str, str] = {}
    batch: list[ScoredDocument] = []
    for item in corpus.read(file):
        if isinstance(item, Rejected):
            rejected[item.reason] += 1
            examples.setdefault(item.reason, item.id)
            continue
        batch.append(item)
        if len(batch) == BATCH_DOCS:
            part.add(batch)
            batch.clear()
    part.add(batch)
    part.save(path, PartChecks(dict(rejected), part.checked, part.lossy, examples), wanted)


def assemble(parts: Sequence[Path], checks: Sequence[PartChecks], out: Path, vocab_size: int) -> TokenCounts:
    """Write the parts' arrays one after the other as the store's flat files."""
    documents = segments = tokens = num_bytes = train_documents = train_tokens = 0
    with (
        open(out / "tokens.bin", "wb") as tokens_file,
        open(out / "seg_ends.bin", "wb") as seg_ends_file,
        open(out / "doc_ends.bin", "wb") as doc_ends_file,
        open(out / "seg_bytes.bin", "wb") as seg_bytes_file,
        open(out / "heldout.bin", "wb") as heldout_file,
    ):
        for part in parts:
            with np.load(part, allow_pickle=False) as arrays:
                seg_tokens = arrays["seg_tokens"]
                doc_segs = arrays["doc_segs"]
                held_D = arrays["heldout"]
                doc_tokens = (
                    np.add.reduceat(seg_tokens, np.r_[0, doc_segs.cumsum()[:-1]]) if len(doc_segs) else seg_tokens
                )
                tokens_file.write(arrays["tokens"].astype(id_type(vocab_size)).tobytes())
                seg_ends_file.write((tokens + seg_tokens.cumsum()).tobytes())
                doc_ends_file.write((segments + doc_segs.cumsum()).tobytes())
                seg_bytes_file.write(arrays["seg_bytes"].tobytes())
                heldout_file.write(held_D.tobytes())
                documents += len(doc_segs)
                segments += len(seg_tokens)
                tokens += int(seg_tokens.sum())
                num_bytes += int(arrays["seg_bytes"].sum(dtype=np.int64))
                train_documents += int((held_D == 0).sum())
                train_tokens += int(doc_tokens[held_D == 0].sum())
    return TokenCounts(
        documents=documents,
        segments=segments,
        tokens=tokens,
        bytes=num_bytes,
        train_documents=train_documents,
        train_tokens=train_tokens,
        roundtrip_checked=sum(c.checked for c in checks),
        roundtrip_lossy=sum(c.lossy for c in checks),
    )
