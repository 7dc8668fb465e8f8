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
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from phf.core import folders, store
from phf.core.config import ConfigError, Plain, did_you_mean, to_plain
from phf.core.progress import Progress
from phf.core.runs import NoiseCounts, from_here, weights_mark
from phf.core.types import Block, Identity, ScoredDocument
from phf.core.workers import in_workers
from phf.data.canaries import is_left_out, without_canaries
from phf.data.scored import ScoredCorpus, ScoreManifest, bad_above_of, natural_threshold
from phf.scorers import Scorer
from phf.scoring.score import Executor
from phf.tokens.columns import check_columns, files_of, open_column, write_column
from phf.tokens.noise import Noise, ScorerNoise, make_noise
from phf.tokens.parts import PartChecks, TokenCounts, TokenizeJob, assemble, first_examples, id_type, run_job
from phf.tokens.statistics import Statistics
from phf.tokens.token_scores import names_with_places, scorer_with_places, write_token_scores
from phf.tokens.tokenizer import (
    PretrainedTokenizer,
    TrainBPE,
    load_tokenizer,
    starts_words,
    table_size,
    train_bpe,
)
from phf.tokens.vocabulary import Vocabulary

BLOCK_TOKENS = 1 << 13
BLOCK_SEGMENTS = (6, 12)
"""Powers of two between which the number of segments in a block is."""
STATISTICS_SEGMENTS = 1 << 14
"""Segments that are read at a time for statistics of the whole store."""

FILES = ("tokens.bin", "seg_ends.bin", "doc_ends.bin", "seg_bytes.bin", "heldout.bin")


AnyTokenizer = Annotated[TrainBPE | PretrainedTokenizer, Field(discriminator="name", title="tokenizer")]


# The manifest


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
    bad_above: float | None = None
    """Scores above it are bad, by the scorer; null: 0.5 for probabilities, else 0."""
    hash: str | None = None
    """Hash of the file; null in stores of earlier versions."""
    token_hash: str | None = None
    """Hash of the file with scores of tokens; null if there is none."""


@dataclass(frozen=True, kw_only=True)
class TokensManifest(folders.Manifest):
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
    examples: dict[str, str] = field(default_factory=dict)
    """The first row of each reason in `rejected`."""
    tokens: str = ""
    """Fingerprint of the files without the scores."""
    columns: dict[str, folders.FileMark] = field(default_factory=dict)
    """Columns of the corpus whose text about each document was tokenized too, and the files with their tokens."""
    references: dict[str, folders.FileMark] = field(default_factory=dict)
    """Files with the log-probabilities of all tokens under a reference model."""
    scores: dict[str, StoredScores] = field(default_factory=dict)
    """By name of the preference."""
    scored: str = ""
    """The scored corpus, as the command named it."""
    scored_from_here: str | None = None
    """The scored corpus from the store's folder; null for a remote one."""
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


def tokenize_corpus(
    scored: str | Path,
    tokenizer: TrainBPE | PretrainedTokenizer,
    out: str | Path,
    heldout: float = 0.05,
    token_scores: bool = False,
    columns: Sequence[str] = (),
    scorer: Scorer | None = None,
    workers: int = 1,
    executor: Executor | None = None,
) -> TokensManifest:
    """Tokenize a scored corpus into folder `out` and return its manifest. Resumes after any interruption.

    `columns`: fields of the corpus that say something about each document, which objectives can put before it.
    `token_scores`: also score single tokens, for scorers that report the places of faults. `scorer`: the corpus's, for
    scores of tokens by one that needs a model. `heldout`: share of the documents kept out of training. Where `out`
    already holds the tokens of these segments, only the missing scores are added. `workers`: processes. `executor` runs
    the shards elsewhere (phf.scoring.cluster); if it only submits them, it raises `Submitted`, and a later call makes
    the store. Raises ConfigError if no document is left for training.
    """
    corpus = ScoredCorpus(scored)
    if not 0 <= heldout < 1:
        raise ConfigError(f"heldout is a share of documents in [0, 1), got {heldout}")
    if "://" in str(out):
        raise ConfigError(f"{out}: a token store is memory-mapped, so it must be a local folder")
    source = {"tokenizer": to_plain(tokenizer), "heldout": heldout}
    given = store.path_hash(tokenizer.path) if isinstance(tokenizer, PretrainedTokenizer) else None
    out = Path(out)
    key = store.fingerprint([source, given, corpus.text, "tokens/3"])
    keys = [key, *_earlier_keys(source, given, corpus.text)]
    done = next((k for k in keys if folders.is_done(out, k)), None)
    known = folders.read_manifest(out, TokensManifest).columns if done is not None else {}
    check_columns(corpus, [column for column in columns if column not in known])
    shared = executor is not None
    with folders.stage_folder(out, TokensManifest.stage, done or key, shared=shared, keep_manifest=done is not None):
        if done is None:
            _make_store(corpus, tokenizer, heldout, out, key, workers, executor)
        for part in [*out.glob("part-*.npz"), *out.glob("part-*.json")]:  # the store has everything now
            part.unlink()
        _put_columns(corpus, out, columns)
        return _put_scores(corpus, str(scored), out, token_scores, scorer, done=done is not None)


def _earlier_keys(source: Plain, given: str | None, text: str) -> list[str]:
    """Keys of earlier versions, which made the same tokens with the tokenizers that they trained themselves."""
    return [store.fingerprint([source, given, text, "tokens/2"])] if source["tokenizer"]["name"] == "bpe" else []


def _make_store(
    corpus: ScoredCorpus,
    tokenizer: TrainBPE | PretrainedTokenizer,
    heldout: float,
    out: Path,
    key: str,
    workers: int,
    executor: Executor | None,
) -> None:
    """Make everything but the scores."""
    loaded = _make_tokenizer(tokenizer, corpus, heldout, out / "tokenizer")
    parts = [out / f"part-{number:05d}.npz" for number in range(len(corpus.files))]
    jobs = [
        TokenizeJob(
            scored=str(corpus.path),
            file=number,
            tokenizer=str(out / "tokenizer"),
            heldout=heldout,
            lossy=getattr(tokenizer, "lossy", False),
            part=str(part),
            key=key,
        )
        for number, part in enumerate(parts)
    ]
    todo = [job for job in jobs if not Path(job.part).exists()]
    if todo and executor is not None:
        executor(todo, str(out))
        todo = [job for job in todo if not Path(job.part).exists()]
        if todo:
            raise store.StoreError(f"{len(todo)} of {len(jobs)} shards are not done; run the same command again")
    with Progress(total=len(jobs), initial=len(jobs) - len(todo), desc="tokenizing", unit="shard") as bar:
        for _ in in_workers(run_job, todo, workers):
            bar.update()
    checks = [store.read_record(part.with_suffix(".json"), PartChecks) for part in parts]
    size = table_size(loaded)
    counts = assemble(parts, checks, out, size)
    if counts.train_documents == 0:
        raise ConfigError(f"every document of {corpus.path} fell into the held-out part (heldout={heldout}); lower it")
    rejected = sum((Counter(check.rejected) for check in checks), Counter[str]())
    marks = folders.file_marks(out, [*FILES, *folders.files_below(out, "tokenizer")])
    manifest = TokensManifest(
        key=key,
        tokenizer=to_plain(tokenizer),
        heldout=heldout,
        segmenter=corpus.manifest.segmenter,
        text=corpus.text,
        end_of_text=loaded.eos_token,
        end_of_text_id=loaded.eos_token_id,
        vocab_size=size,
        dtype=id_type(size).name,
        counts=counts,
        rejected=dict(sorted(rejected.items())),
        examples=first_examples(checks),
        tokens=store.fingerprint([marks[f].hash for f in FILES]),
        files=marks,
    )
    folders.finish(out, manifest)


def _put_scores(
    corpus: ScoredCorpus, scored: str, out: Path, of_tokens: bool, scorer: Scorer | None, done: bool
) -> TokensManifest:
    """Put the corpus's preferences next to the tokens, its own first. The manifest is written last. Returns the
    manifest. `done`: whether the tokens were there."""
    if of_tokens and not names_with_places(corpus, corpus.preferences(), scorer):  # before anything takes long
        scorer_with_places(corpus, scorer)
    manifest = folders.read_manifest(out, TokensManifest)
    known = dict(manifest.scores)
    segments = manifest.counts.segments
    for name in corpus.preferences():
        chosen = ScoredCorpus(corpus.path, name)
        content = chosen.manifest.content
        file = score_file(out, name)
        whole = file.exists() and file.stat().st_size == 4 * segments
        if name in known and known[name].content == content and whole:
            if known[name].hash in (None, store.file_hash(file)):
                continue
            print(f"note: {file} is damaged and is written again", file=sys.stderr)
        if name in known:  # while the file is being replaced, the manifest must not say that it is there
            del known[name]
            store.write_json(out / folders.MANIFEST, dataclasses.replace(manifest, scores=known, main=None))
        unjudged = _write_scores(chosen, file, segments)
        known[name] = StoredScores(
            content=content,
            identity=chosen.manifest.identity,
            scorer=chosen.manifest.scorer,
            unjudged=unjudged,
            bad_above=_threshold(chosen.manifest, name, file),
            hash=store.file_hash(file),
        )
    if of_tokens:
        known |= _put_token_scores(corpus, out, known, manifest, scorer)
    updated = dataclasses.replace(
        manifest, scored=scored, scored_from_here=from_here(scored, out), main=corpus.main, scores=known
    ).with_scores(corpus.main)
    if dataclasses.replace(updated, scored_from_here=manifest.scored_from_here) != manifest:
        store.write_json(out / folders.MANIFEST, updated)
    elif done:
        folders.done_before(out)
    return updated


def _put_columns(corpus: ScoredCorpus, out: Path, columns: Sequence[str]) -> None:
    """Put columns of the corpus next to the tokens of a finished store, unless they are there."""
    manifest = folders.read_manifest(out, TokensManifest)
    known = dict(manifest.columns)
    for column in columns:
        files = files_of(out, column)
        mark = known.get(column)
        whole = mark is not None and not folders.damage(out, {files[0].name: mark}, hashes=True) and files[1].exists()
        if not whole:
            tokenizer = load_tokenizer(out / "tokenizer")
            known[column] = write_column(corpus, column, tokenizer, np.dtype(manifest.dtype), out)
    if known != manifest.columns:
        store.write_json(out / folders.MANIFEST, dataclasses.replace(manifest, columns=known))


def _put_token_scores(
    corpus: ScoredCorpus,
    out: Path,
    known: dict[str, StoredScores],
    manifest: TokensManifest,
    scorer: Scorer | None,
) -> dict[str, StoredScores]:
    """Score the tokens for each preference whose scorer reports places. Returns their entries of the manifest."""
    found = {}
    for name in names_with_places(corpus, list(known), scorer):
        file = token_score_file(out, name)
        if not file.exists() or known[name].token_hash != store.file_hash(file):
            tokenizer = load_tokenizer(out / "tokenizer")
            write_token_scores(ScoredCorpus(corpus.path, name), tokenizer, file, manifest.counts.tokens, scorer)
        found[name] = dataclasses.replace(known[name], token_hash=store.file_hash(file))
    return found


def _threshold(manifest: ScoreManifest, name: str, file: Path) -> float:
    """Scores above it are bad. What the scorer does not say is taken from the scores, and noted."""
    if manifest.bad_above is not None or manifest.identity.get("unit") == "probability":
        return bad_above_of(manifest)
    score_S = np.fromfile(file, np.float32)
    found = natural_threshold(manifest, score_S[~np.isnan(score_S)])
    print(
        f"note: the scorer of {name!r} states no threshold; by their distribution, scores above {found:.4g} count as "
        "bad. Say another with objective.threshold, or with scorer.threshold when scoring",
        file=sys.stderr,
    )
    return found


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
            name = corpus.preference or corpus.main
            raise store.StoreError(
                f"{corpus.path} has {written} scores named {name!r} for {segments} segments; score it again"
            )
    return unjudged


def token_score_file(folder: Path, name: str) -> Path:
    """The file of a preference's scores of tokens in a token store."""
    return folder / f"{name}.token.bin"


def _has_token_scores(path: Path, manifest: TokensManifest, name: str) -> bool:
    file = token_score_file(path, name)
    known = manifest.scores[name].token_hash is not None
    return known and file.exists() and file.stat().st_size == 2 * manifest.counts.tokens


def reference_file(model: str) -> str:
    """The name of the file with a model's log-probabilities in a token store. Raises ConfigError for a model that is
    not in a folder of this machine."""
    mark = weights_mark(model)
    if mark is None:
        raise ConfigError(f"reference model {model}: no weights there; give the folder of a model or of a finished run")
    return f"reference-{mark[:16]}.bin"


def score_file(folder: Path, name: str) -> Path:
    """The file of a preference's scores in a token store."""
    return folder / f"{name}.score.bin"


def _make_tokenizer(config: TrainBPE | PretrainedTokenizer, corpus: ScoredCorpus, heldout: float, folder: Path) -> Any:
    """The tokenizer of a store: trained or copied into `folder`, or the one that is there already."""
    if (folder / "done.json").exists():
        return load_tokenizer(folder)
    if isinstance(config, TrainBPE):
        plain = without_canaries(corpus.manifest.corpus)

        def training_texts() -> Iterator[str]:
            for file in corpus.files:
                for document in corpus.read(file):
                    if isinstance(document, ScoredDocument) and not is_left_out(document, heldout):
                        yield from map(plain, document.texts)

        tokenizer = train_bpe(training_texts(), config.vocab_size)
    else:
        tokenizer = load_tokenizer(config.path, config.revision)
    tokenizer.save_pretrained(str(folder))
    store.write_json(folder / "done.json", {"size": table_size(tokenizer)})
    return load_tokenizer(folder)


# Reading a store


def is_token_store(path: str | Path) -> bool:
    """Whether a folder holds a finished token store."""
    try:
        return folders.has_manifest(path, TokensManifest)
    except store.StoreError:
        return False


def _check_sizes(folder: Path, manifest: TokensManifest) -> None:
    """Raise StoreError unless the files have the sizes that the manifest's counts say. Manifests of earlier versions do
    not list the files."""
    if manifest.dtype not in ("uint16", "uint32", "int64"):
        raise store.StoreError(f"{folder}: manifest.json names an unknown type of ids: {manifest.dtype!r}")
    if manifest.vocab_size and not 0 <= manifest.end_of_text_id < manifest.vocab_size:
        raise store.StoreError(f"{folder}: manifest.json has an end-of-text id outside of the vocabulary")
    counts = manifest.counts
    if not counts.segments:
        return
    expected = {
        "tokens.bin": counts.tokens * np.dtype(manifest.dtype).itemsize,
        "seg_ends.bin": 8 * counts.segments,
        "doc_ends.bin": 8 * counts.documents,
        "seg_bytes.bin": 4 * counts.segments,
        "heldout.bin": counts.documents,
    }
    for name, size in expected.items():
        file = folder / name
        if not file.exists() or file.stat().st_size != size:
            raise store.StoreError(f"{file} is missing or damaged; run `phf tokenize` again into another folder")


@dataclass(frozen=True)
class TokenStore:
    """A finished token store, memory-mapped. Opening takes no time that grows with the corpus."""

    path: Path
    manifest: TokensManifest
    preference: str
    """Name of the scores that are read."""
    by_token: bool = False
    """Whether scores of tokens are read where the preference has them."""
    reference: str | None = None
    """The file of log-probabilities under a reference model that blocks come with."""
    noise: Noise | None = None
    """Errors that blocks' scores come with."""

    @classmethod
    def open(
        cls, path: str | Path, preference: str | None = None, by_token: bool = False, several: bool = False
    ) -> TokenStore:
        """Open a store with the scores named `preference`, or with the corpus's own. The manifest is then as if
        these were the only scores. `by_token`: with the scores of tokens; `several`: of those preferences that have
        them, of which there must be one. Raises StoreError for an unfinished store, an
        unknown name, or where there are no scores of tokens."""
        manifest = folders.read_manifest(path, TokensManifest)
        if manifest.main is None or manifest.main not in manifest.scores:
            raise store.StoreError(f"{path} has no scores yet: `phf tokenize` did not finish there; run it again")
        name = manifest.main if preference is None else preference
        if name not in manifest.scores:
            raise store.StoreError(f"{path} has no scores named {name!r}{did_you_mean(name, manifest.scores)}")
        _check_sizes(Path(path), manifest)
        file = score_file(Path(path), name)
        segments = manifest.counts.segments
        if not file.exists() or (segments and file.stat().st_size != 4 * segments):
            raise store.StoreError(f"{file} is missing or damaged; run `phf tokenize` again, which writes it again")
        needed = manifest.scores if several else (name,)
        if by_token and not any(_has_token_scores(Path(path), manifest, other) for other in needed):
            raise store.StoreError(
                f"{path} has no scores of tokens for {name!r}: run `phf tokenize` again with --token-scores"
            )
        return cls(Path(path), manifest if name == manifest.main else manifest.with_scores(name), name, by_token)

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
        return self._map(self.path / "heldout.bin", np.uint8).view(np.bool_)

    @cached_property
    def score_S(self) -> np.ndarray:
        return self._map(score_file(self.path, self.preference), np.float32)

    @property
    def block_segments(self) -> int:
        """Segments in a block, about: a power of two, for about `BLOCK_TOKENS` tokens."""
        mean = len(self.tokens) / max(len(self.seg_ends), 1)
        wanted = BLOCK_TOKENS / max(mean, 1)
        return int(2 ** np.clip(round(math.log2(max(wanted, 1))), *BLOCK_SEGMENTS))

    @property
    def num_blocks(self) -> int:
        return -(-len(self.seg_ends) // self.block_segments)

    def block_documents(self, k: int, size: int | None = None) -> tuple[int, int]:
        """The documents [first, last) of block k: those whose first segment is one of `size` (default:
        `block_segments`) segments. There may be none, after a long document."""
        size = self.block_segments if size is None else size
        return self._document_from(k * size), self._document_from((k + 1) * size)

    def first_token(self, k: int) -> int:
        """Number of the first token of block k."""
        return self._end(self.seg_ends, self._end(self.doc_ends, self.block_documents(k)[0]))

    def _document_from(self, segment: int) -> int:
        """The first document that starts at this segment or after it."""
        if segment <= 0:
            return 0
        return min(int(np.searchsorted(self.doc_ends, segment)) + 1, len(self.doc_ends))

    def block(self, k: int, size: int | None = None) -> Block:
        """Block k of the store, with the scores of its preference. `size`: its segments, about."""
        first, last = self.block_documents(k, size)
        segments = slice(self._end(self.doc_ends, first), self._end(self.doc_ends, last))
        ends_S = np.asarray(self.seg_ends[segments])
        first_token = self._end(self.seg_ends, segments.start)
        tokens = slice(first_token, int(ends_S[-1]) if len(ends_S) else first_token)
        counts_D = np.diff(np.asarray(self.doc_ends[first:last]), prepend=segments.start)
        token_score = self.token_score_T
        block = Block(
            first_segment=segments.start,
            first_document=first,
            first_token=first_token,
            score_S=np.asarray(self.score_S[segments]),
            tokens_S=np.diff(ends_S, prepend=first_token),
            doc_S=np.repeat(np.arange(last - first), counts_D),
            train_D=~self.heldout_D[first:last],
            ids_T=np.asarray(self.tokens[tokens]),
            bad_above=self.bad_above,
            token_score_T=None if token_score is None else token_score[tokens].astype(np.float32),
            reference_T=None if self.reference is None else self.reference_T[tokens].astype(np.float32),
            words=lambda: self.word_V,
            others=lambda name: self.with_scores(name).block(k, size),
            columns=lambda name: self._about(name, first, last),
        )
        return block if self.noise is None else dataclasses.replace(block, score_S=self.noise.scores_S(block))

    def _about(self, column: str, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens about the documents [first, last) in a column, and each document's exclusive end."""
        ids, ends = self.column(column)
        start = self._end(ends, first)
        return ids[start : self._end(ends, last)], np.asarray(ends[first:last]) - start

    def column(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens about all documents in a column, and each document's exclusive end. Raises StoreError for a column
        that was not tokenized."""
        if column not in self.manifest.columns:
            raise store.StoreError(
                f"{self.path} has no column {column!r}{did_you_mean(column, self.manifest.columns)}: run "
                f"`phf tokenize` again with --column {column}"
            )
        if column not in self._columns:
            self._columns[column] = open_column(self.path, column, self.manifest.dtype)
        return self._columns[column]

    @cached_property
    def _columns(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {}

    @staticmethod
    def _end(ends: np.ndarray, number: int) -> int:
        """The exclusive end of the first `number` entries."""
        return int(ends[number - 1]) if number else 0

    def large_blocks(self) -> Iterator[Block]:
        """All of the store, in blocks for one pass over it."""
        count = -(-len(self.seg_ends) // STATISTICS_SEGMENTS)
        return (self.block(k, STATISTICS_SEGMENTS) for k in range(count))

    @cached_property
    def statistics(self) -> Statistics:
        """What objectives may know about the whole store."""
        return Statistics(
            self.large_blocks,
            self.bad_above,
            lambda name: self.with_scores(name).statistics,
            of_tokens=self.token_score_T is not None,
        )

    @cached_property
    def doc_S(self) -> np.ndarray:
        """Number of the document of each segment."""
        return np.repeat(np.arange(len(self.doc_ends)), np.diff(self.doc_ends, prepend=0))

    @cached_property
    def tokens_S(self) -> np.ndarray:
        """Number of tokens of each segment."""
        return np.diff(self.seg_ends, prepend=0)

    def with_scores(self, name: str) -> TokenStore:
        """The store with the scores of this name."""
        if name == self.preference:
            return self
        if name not in self._others:
            self._others[name] = TokenStore.open(self.path, name, self.by_token, several=True)
        return self._others[name]

    @cached_property
    def _others(self) -> dict[str, TokenStore]:
        return {}

    @cached_property
    def token_score_T(self) -> np.ndarray | None:
        """Score of each token, float16; None where they are not asked for, or segments have scores only."""
        file = token_score_file(self.path, self.preference)
        return self._map(file, np.float16) if self.by_token and file.exists() else None

    @cached_property
    def reference_T(self) -> np.ndarray:
        """Log-probability of each token under the reference model, float16; NaN: not known."""
        assert self.reference is not None
        return self._map(self.path / self.reference, np.float16)

    def with_reference(self, model: str) -> TokenStore:
        """The store with the log-probabilities of its tokens under a model. Raises ConfigError where they have not been
        computed."""
        file = reference_file(model)
        if file not in self.manifest.references:
            raise ConfigError(
                f"{self.path} has no log-probabilities under the reference model {model}: run "
                f"`phf reference {self.path} {model}` first"
            )
        if damaged := folders.damage(self.path, {file: self.manifest.references[file]}, hashes=False):
            raise store.StoreError(f"{damaged[0]}; run `phf reference` again, which writes it again")
        return dataclasses.replace(self, reference=file)

    def with_noise(self, noise: ScorerNoise | None, seed: int) -> TokenStore:
        """The store with errors in the scores of its blocks. Raises ConfigError where they have scores of tokens, or no
        good or bad segment."""
        if noise is None:
            return self
        if self.by_token:
            raise ConfigError("train.scorer_noise: errors are of segments, so they do not go with train.token_scores")
        if noise.scorer is not None and noise.scorer != store.fingerprint([self.manifest.identity, "scorer"]):
            raise ConfigError(
                f"train.scorer_noise: the audit is of another scorer than that of {self.path}; audit this one"
            )
        return dataclasses.replace(self, noise=make_noise(noise, seed, self.large_blocks(), self.bad_above))

    @cached_property
    def noise_counts(self) -> NoiseCounts | None:
        """What the errors do to the training part; None without errors."""
        return None if self.noise is None else self.noise.count(dataclasses.replace(self, noise=None).large_blocks())

    @property
    def token_mark(self) -> str | None:
        """Hash of the scores of tokens; None where segments have scores only."""
        return None if self.token_score_T is None else self.manifest.scores[self.preference].token_hash

    @cached_property
    def word_V(self) -> np.ndarray:
        """Whether each entry of the vocabulary starts a word, bool: it decodes to white space before something else,
        or to white space alone."""
        return starts_words(self.tokenizer)

    @property
    def bad_above(self) -> float:
        """Scores above it are bad, by the scorer."""
        chosen = self.manifest.scores.get(self.preference)
        if chosen is not None and chosen.bad_above is not None:
            return chosen.bad_above
        return 0.5 if self.manifest.identity.get("unit") == "probability" else 0.0

    @property
    def end_of_text_id(self) -> int:
        return self.manifest.end_of_text_id

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer; where transformers is not installed its `Vocabulary`."""
        folder = self.path / "tokenizer"
        try:
            return load_tokenizer(folder)
        except ModuleNotFoundError as error:
            if error.name != "transformers":
                raise
            return Vocabulary(folder)
