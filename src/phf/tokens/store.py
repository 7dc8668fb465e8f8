"""The token store: a scored corpus as token ids with segment ends and scores.

    tokens/  tokens.bin      uint16 or uint32 ids, one document after the other, without control or end-of-text tokens
             seg_ends.bin    int64 per segment: exclusive end in tokens
             doc_ends.bin    int64 per document: exclusive end in segments
             seg_bytes.bin   uint32 per segment: UTF-8 bytes of its text
             heldout.bin     uint8 per document: 1 if held out
             <name>.score.bin   float32 per segment, NaN for not judged; one file per preference
             tokenizer/  manifest.json

One store serves every objective and every preference. Tokens are made once: scores that were added to the corpus, or a
new scoring of the same segments, are put next to them.

Every segment is tokenized by itself, so its tokens do not depend on its neighbours. Special tokens typed in a text are
text: nobody can write a control token into a corpus or a prompt.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from tqdm import tqdm

from phf.core import store
from phf.core.config import ConfigError, Plain, did_you_mean, to_plain
from phf.core.types import Identity, Rejected, ScoredDocument, SegmentTable
from phf.data.scored import ScoredCorpus
from phf.tokens.tokenizer import PretrainedTokenizer, TrainBPE, encode_segments, load_tokenizer, train_bpe

BATCH_DOCS = 256
"""Documents tokenized at a time."""
CHECKED_DOCS = 8
"""Documents of each batch that are decoded again and compared with their text. Decoding all would double the time."""
FILES = ("tokens.bin", "seg_ends.bin", "doc_ends.bin", "seg_bytes.bin", "heldout.bin")

AnyTokenizer = Annotated[TrainBPE | PretrainedTokenizer, Field(discriminator="name", title="tokenizer")]


# The manifest


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


@dataclass(frozen=True)
class StoredScores:
    """Scores of one preference in a token store."""

    content: str
    """Fingerprint of the scored files."""
    identity: Identity
    """The scorer's identity."""
    scorer: Plain | None
    """The scorer's settings."""
    unjudged: int
    """Segments that were not judged."""


@dataclass(frozen=True, kw_only=True)
class TokensManifest(store.Manifest):
    """`manifest.json` of a token store. `identity`, `scorer`, `scored_content`, `content` and `counts.unjudged` are
    those of the preference in `main`."""

    stage: str = "tokenize"
    tokenizer: Plain = field(default_factory=dict)
    """Settings of the tokenizer."""
    heldout: float = 0.0
    """Share of documents held out."""
    segmenter: Plain | None = None
    """Settings of the corpus's segmenter."""
    text: str = ""
    """Fingerprint of the segments."""
    end_of_text: str = ""
    """The token before each document."""
    end_of_text_id: int
    """Its id."""
    vocab_size: int = 0
    """Entries of the vocabulary."""
    dtype: str
    """Of tokens.bin: uint16 or uint32."""
    counts: TokenCounts
    """Sizes of the store."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Rows of the scored corpus that were skipped, by reason."""
    tokens: str = ""
    """Fingerprint of the files without the scores."""
    scores: dict[str, StoredScores] = field(default_factory=dict)
    """By name of the preference."""
    scored: str = ""
    """The scored corpus, as the command named it."""
    main: str | None = None
    """The corpus's own preference; null while its scores are being written."""
    identity: Identity = field(default_factory=dict)
    """Identity of the corpus's scorer."""
    scorer: Plain | None = None
    """Settings of the corpus's scorer."""
    scored_content: str = ""
    """Fingerprint of the scored corpus."""
    content: str = ""
    """Fingerprint of tokens and scores."""

    def with_scores(self, name: str) -> TokensManifest:
        """The manifest as if the scores of this name were the only ones."""
        chosen = self.scores[name]
        return dataclasses.replace(
            self,
            identity=chosen.identity,
            scorer=chosen.scorer,
            scored_content=chosen.content,
            content=store.fingerprint([self.tokens, chosen.content]),
            counts=dataclasses.replace(self.counts, unjudged=chosen.unjudged),
        )


# Making a store


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a document is held out, by a hash of its text. Equal documents are all held out or all trained on."""
    return store.text_hash(text, b"phf heldout") < fraction * 2**64


def tokenize_corpus(
    scored: str | Path,
    tokenizer: TrainBPE | PretrainedTokenizer,
    out: str | Path,
    heldout: float = 0.05,
) -> TokensManifest:
    """Tokenize a scored corpus into folder `out` and return its manifest. Resumes after any interruption.

    `heldout`: share of the documents kept out of training. Where `out` already holds the tokens of these segments, only
    the missing scores are added. Raises ConfigError if no document is left for training.
    """
    corpus = ScoredCorpus(scored)
    if not 0 <= heldout < 1:
        raise ConfigError(f"heldout is a share of documents in [0, 1), got {heldout}")
    if "://" in str(out):
        raise ConfigError(f"{out}: a token store is memory-mapped, so it must be a local folder")
    source = {"tokenizer": to_plain(tokenizer), "heldout": heldout}
    given = store.path_hash(tokenizer.path) if isinstance(tokenizer, PretrainedTokenizer) else None
    key = store.fingerprint([source, given, corpus.text, "tokens/2"])
    out = Path(out)
    if not store.is_done(out, key):
        _make_store(corpus, tokenizer, heldout, out, key)
    return _put_scores(corpus, str(scored), out)


def _make_store(
    corpus: ScoredCorpus, tokenizer: TrainBPE | PretrainedTokenizer, heldout: float, out: Path, key: str
) -> None:
    """Make everything but the scores."""
    store.begin(out, TokensManifest.stage, key)
    loaded = _make_tokenizer(tokenizer, corpus, heldout, out / "tokenizer")
    parts = []
    for number, file in enumerate(tqdm(corpus.files, desc="tokenizing", unit="shard", disable=None, file=sys.stderr)):
        part = out / f"part-{number:05d}.npz"
        if not part.exists():
            _tokenize_part(corpus, file, loaded, heldout, part)
        parts.append(part)
    checks = [store.read_record(part.with_suffix(".json"), PartChecks) for part in parts]
    counts = _assemble(parts, checks, out, len(loaded))
    if counts.train_documents == 0:
        raise ConfigError(f"every document of {corpus.path} fell into the held-out part (heldout={heldout}); lower it")
    rejected = sum((Counter(check.rejected) for check in checks), Counter[str]())
    manifest = TokensManifest(
        key=key,
        tokenizer=to_plain(tokenizer),
        heldout=heldout,
        segmenter=corpus.manifest.segmenter,
        text=corpus.text,
        end_of_text=loaded.eos_token,
        end_of_text_id=loaded.eos_token_id,
        vocab_size=len(loaded),
        dtype=_dtype(len(loaded)).name,
        counts=counts,
        rejected=dict(sorted(rejected.items())),
        tokens=store.fingerprint([store.file_hash(out / f) for f in FILES]),
    )
    store.finish(out, manifest)
    for part in parts:
        part.unlink()
        part.with_suffix(".json").unlink()


def _put_scores(corpus: ScoredCorpus, scored: str, out: Path) -> TokensManifest:
    """Put the corpus's preferences next to the tokens, its own first. The manifest is written last. Returns the
    manifest."""
    manifest = store.read_manifest(out, TokensManifest)
    known = dict(manifest.scores)
    segments = manifest.counts.segments
    for name in corpus.preferences():
        chosen = ScoredCorpus(corpus.path, name)
        content = chosen.manifest.content
        file = score_file(out, name)
        whole = file.exists() and file.stat().st_size == 4 * segments
        if name in known and known[name].content == content and whole:
            continue
        if name in known:  # while the file is being replaced, the manifest must not say that it is there
            del known[name]
            store.write_json(out / store.MANIFEST, dataclasses.replace(manifest, scores=known, main=None))
        unjudged = _write_scores(chosen, file, segments)
        known[name] = StoredScores(content, chosen.manifest.identity, chosen.manifest.scorer, unjudged)
    updated = dataclasses.replace(manifest, scored=scored, main=corpus.main, scores=known).with_scores(corpus.main)
    if updated != manifest:
        store.write_json(out / store.MANIFEST, updated)
    return updated


def _write_scores(corpus: ScoredCorpus, file: Path, segments: int) -> int:
    """Write the scores of a corpus's preference and return how many segments were not judged. Raises StoreError if
    there are not `segments` scores."""
    unjudged = written = 0
    with store.written_aside(file) as aside, open(aside, "wb") as scores:
        for part in corpus.files:
            documents = (item for item in corpus.read(part) if isinstance(item, ScoredDocument))
            score_S = np.array([s for d in documents for s in d.scores], np.float32)
            scores.write(score_S.tobytes())
            unjudged += int(np.isnan(score_S).sum())
            written += len(score_S)
    if written != segments:
        file.unlink(missing_ok=True)
        name = corpus.preference or corpus.main
        raise store.StoreError(
            f"{corpus.path} has {written} scores named {name!r} for {segments} segments; score it again"
        )
    return unjudged


def score_file(folder: Path, name: str) -> Path:
    """The file of a preference's scores in a token store."""
    return folder / f"{name}.score.bin"


def _make_tokenizer(config: TrainBPE | PretrainedTokenizer, corpus: ScoredCorpus, heldout: float, folder: Path) -> Any:
    """The tokenizer of a store: trained or copied into `folder`, or the one that is there already."""
    if (folder / "done.json").exists():
        return load_tokenizer(folder)
    if isinstance(config, TrainBPE):

        def training_texts() -> Iterator[str]:
            for file in corpus.files:
                for document in corpus.read(file):
                    if isinstance(document, ScoredDocument) and not is_heldout(document.text, heldout):
                        yield from document.texts

        tokenizer = train_bpe(training_texts(), config.vocab_size)
    else:
        tokenizer = load_tokenizer(config.path, config.revision)
    tokenizer.save_pretrained(str(folder))
    store.write_json(folder / "done.json", {"size": len(tokenizer)})
    return load_tokenizer(folder)


def _dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


@dataclass(frozen=True)
class PartChecks:
    """What was counted while one file of the corpus was tokenized."""

    rejected: dict[str, int]
    checked: int
    lossy: int


class _Part:
    """The arrays of one file of the corpus while it is tokenized."""

    def __init__(self, tokenizer: Any, heldout: float) -> None:
        self.tokenizer = tokenizer
        self.heldout = heldout
        self.ids: list[np.ndarray] = []
        self.seg_tokens: list[int] = []
        self.seg_bytes: list[int] = []
        self.doc_segs: list[int] = []
        self.held: list[bool] = []
        self.checked = self.lossy = 0

    def add(self, documents: Sequence[ScoredDocument]) -> None:
        dtype = _dtype(len(self.tokenizer))
        encoded = iter(encode_segments(self.tokenizer, [t for d in documents for t in d.texts]))
        for number, document in enumerate(documents):
            tokens = [next(encoded) for _ in document.texts]
            self.ids += [np.array(t, dtype=dtype) for t in tokens]
            self.seg_tokens += [len(t) for t in tokens]
            self.seg_bytes += [len(t.encode()) for t in document.texts]
            self.doc_segs.append(len(tokens))
            self.held.append(is_heldout(document.text, self.heldout))
            if number < CHECKED_DOCS:
                self.checked += 1
                decoded = self.tokenizer.decode([i for t in tokens for i in t], clean_up_tokenization_spaces=False)
                self.lossy += decoded != document.text

    def save(self, path: Path) -> None:
        dtype = _dtype(len(self.tokenizer))
        with store.written_aside(path) as aside:
            np.savez(
                aside,
                tokens=np.concatenate(self.ids) if self.ids else np.zeros(0, dtype),
                seg_tokens=np.array(self.seg_tokens, np.int64),
                seg_bytes=np.array(self.seg_bytes, np.uint32),
                doc_segs=np.array(self.doc_segs, np.int64),
                heldout=np.array(self.held, np.uint8),
            )


def _tokenize_part(corpus: ScoredCorpus, file: Path, tokenizer: Any, heldout: float, path: Path) -> None:
    """Tokenize one file of the corpus into arrays at `path`."""
    rejected: Counter[str] = Counter()
    part = _Part(tokenizer, heldout)
    batch: list[ScoredDocument] = []
    for item in corpus.read(file):
        if isinstance(item, Rejected):
            rejected[item.reason] += 1
            continue
        batch.append(item)
        if len(batch) == BATCH_DOCS:
            part.add(batch)
            batch.clear()
    part.add(batch)
    store.write_json(path.with_suffix(".json"), PartChecks(dict(rejected), part.checked, part.lossy))
    part.save(path)


def _assemble(parts: Sequence[Path], checks: Sequence[PartChecks], out: Path, vocab_size: int) -> TokenCounts:
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
                tokens_file.write(arrays["tokens"].astype(_dtype(vocab_size)).tobytes())
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


# Reading a store


@dataclass(frozen=True)
class TokenStore:
    """A finished token store, memory-mapped. Opening takes no time that grows with the corpus."""

    path: Path
    manifest: TokensManifest
    preference: str
    """Name of the scores that are read."""

    @classmethod
    def open(cls, path: str | Path, preference: str | None = None) -> TokenStore:
        """Open a store with the scores named `preference`, or with the corpus's own. The manifest is then as if
        these were the only scores. Raises StoreError for an unfinished store or an unknown name."""
        manifest = store.read_manifest(path, TokensManifest)
        if manifest.main is None or manifest.main not in manifest.scores:
            raise store.StoreError(f"{path} has no scores yet: `phf tokenize` did not finish there; run it again")
        name = manifest.main if preference is None else preference
        if name not in manifest.scores:
            raise store.StoreError(f"{path} has no scores named {name!r}{did_you_mean(name, manifest.scores)}")
        return cls(Path(path), manifest if name == manifest.main else manifest.with_scores(name), name)

    def _map(self, path: Path, dtype: Any) -> np.ndarray:
        return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)

    @cached_property
    def tokens(self) -> np.ndarray:
        return self._map(self.path / "tokens.bin", self.manifest.dtype)

    @cached_property
    def seg_ends(self) -> np.ndarray:
        return self._map(self.path / "seg_ends.bin", np.int64)

    @cached_property
    def doc_ends(self) -> np.ndarray:
        return self._map(self.path / "doc_ends.bin", np.int64)

    @cached_property
    def seg_bytes(self) -> np.ndarray:
        return self._map(self.path / "seg_bytes.bin", np.uint32)

    @cached_property
    def heldout_D(self) -> np.ndarray:
        return self._map(self.path / "heldout.bin", np.uint8).astype(bool)

    @cached_property
    def score_S(self) -> np.ndarray:
        return self._map(score_file(self.path, self.preference), np.float32)

    @cached_property
    def doc_S(self) -> np.ndarray:
        """Number of the document of each segment."""
        return np.repeat(np.arange(len(self.doc_ends)), np.diff(self.doc_ends, prepend=0))

    @cached_property
    def table(self) -> SegmentTable:
        return SegmentTable(self.score_S, np.diff(self.seg_ends, prepend=0), self.doc_S, ~self.heldout_D)

    @property
    def end_of_text_id(self) -> int:
        return self.manifest.end_of_text_id

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.path / "tokenizer")
