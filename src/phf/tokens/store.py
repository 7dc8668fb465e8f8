"""The token store: a scored corpus as token ids with segment ends and scores. Floor 3, no torch.

    tokens/  tokens.bin      uint16 or uint32 ids, documents one after the other, without control or end-of-text tokens
             seg_ends.bin    int64 per segment: exclusive end in tokens
             doc_ends.bin    int64 per document: exclusive end in segments
             seg_bytes.bin   uint32 per segment: UTF-8 bytes of its text
             heldout.bin     uint8 per document: 1 if held out
             <name>.score.bin   float32 per segment, NaN for not judged; one for each preference
             tokenizer/  manifest.json

One store serves every objective and every preference: scores that were added to the corpus, or another scoring of the
same segments, are put beside the tokens, which are made once.

Every segment is tokenised by itself, so that its tokens do not depend on its neighbours, and special tokens typed in
a text are text: nobody can write a control token into a corpus or a prompt.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from tqdm import tqdm

from phf.core import store
from phf.core.config import ConfigError, did_you_mean, to_plain
from phf.core.types import Rejected, ScoredDocument, SegmentTable
from phf.data.scored import ScoredCorpus
from phf.tokens.tokenizer import PretrainedTokenizer, TrainBPE, encode_segments, load_tokenizer, train_bpe

BATCH_DOCS = 256
FILES = ("tokens.bin", "seg_ends.bin", "doc_ends.bin", "seg_bytes.bin", "heldout.bin")


AnyTokenizer = Annotated[TrainBPE | PretrainedTokenizer, Field(discriminator="name")]


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a document is held out: a hash of its text, so that duplicates fall on one side."""
    return store.text_hash(text, b"phf heldout") < fraction * 2**64


def tokenize_corpus(
    scored: str | Path,
    tokenizer: TrainBPE | PretrainedTokenizer,
    out: str | Path,
    heldout: float = 0.05,
) -> dict[str, Any]:
    """Tokenise a scored corpus into directory `out` and return its manifest. Resumes after any interruption.

    `heldout`: share of documents kept out of training, by a hash of their text. Where `out` holds the tokens of these
    very segments already, only scores that it has not are put beside them.
    """
    corpus = ScoredCorpus(scored)
    if not 0 <= heldout < 1:
        raise ConfigError(f"heldout is a share of documents in [0, 1), got {heldout}")
    if "://" in str(out):
        raise ConfigError(f"{out}: a token store is read by memory map, so it must be a folder of this machine")
    source = {"tokenizer": to_plain(tokenizer), "heldout": heldout}
    given = store.path_hash(tokenizer.path) if isinstance(tokenizer, PretrainedTokenizer) else None
    key = store.fingerprint([source, given, corpus.text, "tokens/2"])
    out = Path(out)
    if not store.is_done(out, key):
        _make_store(corpus, tokenizer, source, key, out, heldout)
    return _put_scores(corpus, str(scored), out)


def _make_store(
    corpus: ScoredCorpus, tokenizer: TrainBPE | PretrainedTokenizer, source: dict[str, Any], key: str, out: Path, heldout: float
) -> None:  # fmt: skip
    """Everything but the scores."""
    store.begin(out, "tokenize", key)
    loaded = _make_tokenizer(tokenizer, corpus, heldout, out / "tokenizer")
    parts = []
    for number, file in enumerate(tqdm(corpus.files, desc="tokenising", unit="shard", disable=None, file=sys.stderr)):
        part = out / f"part-{number:05d}.npz"
        if not part.exists():
            _tokenize_part(corpus, file, loaded, heldout, part)
        parts.append(part)
    counts = _assemble(parts, out, len(loaded))
    if counts["train_documents"] == 0:
        raise ConfigError(f"every document of {corpus.path} fell into the held-out part (heldout={heldout}); lower it")
    rejected: Counter[str] = Counter()
    for part in parts:
        rejected.update(store.read_json(part.with_suffix(".json"))["rejected"])
    store.finish(
        out,
        "tokenize",
        key,
        **source,
        segmenter=corpus.manifest.get("segmenter"),
        text=corpus.text,
        end_of_text=loaded.eos_token,
        end_of_text_id=loaded.eos_token_id,
        vocab_size=len(loaded),
        dtype=_dtype(len(loaded)).name,
        counts=counts,
        rejected=dict(sorted(rejected.items())),
        tokens=store.fingerprint([store.file_hash(out / f) for f in FILES]),
        scores={},
    )
    for part in parts:
        part.unlink()
        part.with_suffix(".json").unlink()


def _put_scores(corpus: ScoredCorpus, scored: str, out: Path) -> dict[str, Any]:
    """Put the corpus's preferences beside the tokens, its own first, and return the manifest. Written last, as ever."""
    manifest = store.read_manifest(out, "tokenize")
    known: dict[str, Any] = dict(manifest["scores"])
    segments = manifest["counts"]["segments"]
    for name in corpus.preferences():
        chosen = ScoredCorpus(corpus.path, name)
        content = chosen.manifest["content"]
        file = out / f"{name}.score.bin"
        if known.get(name, {}).get("content") == content and file.exists() and file.stat().st_size == 4 * segments:
            continue
        if name in known:  # nothing may say that these scores are there while they are replaced
            del known[name]
            store.write_json(out / store.MANIFEST, manifest | {"scores": known, "main": None})
        unjudged = written = 0
        with store.written_aside(file) as aside, open(aside, "wb") as scores:
            for part in chosen.files:
                documents = (item for item in chosen.read(part) if isinstance(item, ScoredDocument))
                score_S = np.array([s for d in documents for s in d.scores], np.float32)
                scores.write(score_S.tobytes())
                unjudged += int(np.isnan(score_S).sum())
                written += len(score_S)
        if written != segments:
            file.unlink(missing_ok=True)
            raise store.StoreError(f"scores {name!r} of {scored} are {written} for {segments} segments; score it again")
        known[name] = {
            "content": content,
            "identity": chosen.manifest["identity"],
            "scorer": chosen.manifest.get("scorer"),
            "unjudged": unjudged,
        }
    updated = _seen_by(manifest | {"scored": scored, "main": corpus.main, "scores": known}, corpus.main)
    if updated != manifest:
        store.write_json(out / store.MANIFEST, updated)
    return updated


def _seen_by(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    """The manifest as if the scores of this name were the only ones."""
    chosen = manifest["scores"][name]
    return manifest | {
        "identity": chosen["identity"],
        "scorer": chosen["scorer"],
        "scored_content": chosen["content"],
        "content": store.fingerprint([manifest["tokens"], chosen["content"]]),
        "counts": manifest["counts"] | {"unjudged": chosen["unjudged"]},
    }


def _make_tokenizer(config: TrainBPE | PretrainedTokenizer, corpus: ScoredCorpus, heldout: float, folder: Path) -> Any:
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


def _tokenize_part(corpus: ScoredCorpus, file: Path, tokenizer: Any, heldout: float, part: Path) -> None:
    rejected: Counter[str] = Counter()
    ids: list[np.ndarray] = []
    seg_tokens: list[int] = []
    seg_bytes: list[int] = []
    doc_segs: list[int] = []
    held: list[bool] = []
    checked = lossy = 0
    batch: list[ScoredDocument] = []

    def flush() -> None:
        nonlocal checked, lossy
        encoded = iter(encode_segments(tokenizer, [t for d in batch for t in d.texts]))
        for number, document in enumerate(batch):
            tokens = [next(encoded) for _ in document.texts]
            ids.extend(np.array(t, dtype=_dtype(len(tokenizer))) for t in tokens)
            seg_tokens.extend(len(t) for t in tokens)
            seg_bytes.extend(len(t.encode()) for t in document.texts)
            doc_segs.append(len(tokens))
            held.append(is_heldout(document.text, heldout))
            if number < 8:  # a few of each batch: decoding everything would take as long as the rest
                checked += 1
                decoded = tokenizer.decode([i for t in tokens for i in t], clean_up_tokenization_spaces=False)
                lossy += decoded != document.text
        batch.clear()

    for item in corpus.read(file):
        if isinstance(item, Rejected):
            rejected[item.reason] += 1
            continue
        batch.append(item)
        if len(batch) == BATCH_DOCS:
            flush()
    flush()
    store.write_json(part.with_suffix(".json"), {"rejected": dict(rejected), "checked": checked, "lossy": lossy})
    with store.written_aside(part) as aside:
        np.savez(
            aside,
            tokens=np.concatenate(ids) if ids else np.zeros(0, _dtype(len(tokenizer))),
            seg_tokens=np.array(seg_tokens, np.int64),
            seg_bytes=np.array(seg_bytes, np.uint32),
            doc_segs=np.array(doc_segs, np.int64),
            heldout=np.array(held, np.uint8),
        )


def _assemble(parts: Sequence[Path], out: Path, vocab_size: int) -> dict[str, Any]:
    """The parts' arrays one after the other, as the store's flat files."""
    totals = {
        "documents": 0,
        "segments": 0,
        "tokens": 0,
        "bytes": 0,
        "train_documents": 0,
        "train_tokens": 0,
    }
    with (
        open(out / "tokens.bin", "wb") as tokens,
        open(out / "seg_ends.bin", "wb") as seg_ends,
        open(out / "doc_ends.bin", "wb") as doc_ends,
        open(out / "seg_bytes.bin", "wb") as seg_bytes,
        open(out / "heldout.bin", "wb") as held,
    ):
        for part in parts:
            with np.load(part, allow_pickle=False) as arrays:
                seg_tokens, doc_segs, held_D = arrays["seg_tokens"], arrays["doc_segs"], arrays["heldout"]
                doc_tokens = (
                    np.add.reduceat(seg_tokens, np.r_[0, doc_segs.cumsum()[:-1]]) if len(doc_segs) else seg_tokens
                )
                tokens.write(arrays["tokens"].astype(_dtype(vocab_size)).tobytes())
                seg_ends.write((totals["tokens"] + seg_tokens.cumsum()).tobytes())
                doc_ends.write((totals["segments"] + doc_segs.cumsum()).tobytes())
                seg_bytes.write(arrays["seg_bytes"].tobytes())
                held.write(held_D.tobytes())
                totals["documents"] += len(doc_segs)
                totals["segments"] += len(seg_tokens)
                totals["tokens"] += int(seg_tokens.sum())
                totals["bytes"] += int(arrays["seg_bytes"].sum(dtype=np.int64))
                totals["train_documents"] += int((held_D == 0).sum())
                totals["train_tokens"] += int(doc_tokens[held_D == 0].sum())
    checks = [store.read_json(p.with_suffix(".json")) for p in parts]
    return totals | {
        "roundtrip_checked": sum(c["checked"] for c in checks),
        "roundtrip_lossy": sum(c["lossy"] for c in checks),
    }


@plain_dataclass(frozen=True)
class TokenStore:
    """A finished token store, memory-mapped. Opening costs nothing that grows with the corpus."""

    path: Path
    manifest: dict[str, Any]
    preference: str

    @classmethod
    def open(cls, path: str | Path, preference: str | None = None) -> TokenStore:
        """`preference`: whose scores, where there are several; left out, the scored corpus's own. The manifest is then
        as if these were the only ones."""
        manifest = store.read_manifest(path, "tokenize")
        scores = manifest.get("scores", {})
        if manifest.get("main") not in scores:
            raise store.StoreError(f"{path} has no scores yet: `phf tokenize` did not finish there; run it again")
        name = manifest["main"] if preference is None else preference
        if name not in scores:
            raise store.StoreError(f"{path} has no scores named {name!r}{did_you_mean(name, scores)}")
        return cls(Path(path), manifest if name == manifest["main"] else _seen_by(manifest, name), name)

    def _map(self, name: str, dtype: Any) -> np.ndarray:
        path = self.path / name
        return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)

    @cached_property
    def tokens(self) -> np.ndarray:
        return self._map("tokens.bin", self.manifest["dtype"])

    @cached_property
    def seg_ends(self) -> np.ndarray:
        return self._map("seg_ends.bin", np.int64)

    @cached_property
    def doc_ends(self) -> np.ndarray:
        return self._map("doc_ends.bin", np.int64)

    @cached_property
    def seg_bytes(self) -> np.ndarray:
        return self._map("seg_bytes.bin", np.uint32)

    @cached_property
    def heldout_D(self) -> np.ndarray:
        return self._map("heldout.bin", np.uint8).astype(bool)

    @cached_property
    def score_S(self) -> np.ndarray:
        return self._map(f"{self.preference}.score.bin", np.float32)

    @cached_property
    def doc_S(self) -> np.ndarray:
        """Document of each segment."""
        return np.repeat(np.arange(len(self.doc_ends)), np.diff(self.doc_ends, prepend=0))

    @cached_property
    def table(self) -> SegmentTable:
        return SegmentTable(self.score_S, np.diff(self.seg_ends, prepend=0), self.doc_S, ~self.heldout_D)

    @property
    def end_of_text_id(self) -> int:
        return int(self.manifest["end_of_text_id"])

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.path / "tokenizer")
