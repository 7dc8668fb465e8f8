"""A scorer fitted to your own labels: hashed n-grams and logistic regression.

    phf fit-scorer labels.jsonl my-scorer/ --text text --label toxic
    phf score corpus.jsonl scored/ --scorer fitted scorer.path=my-scorer

The features of a text are the words, pairs of words and strings of 3 to 5 bytes of the lower-cased text, each hashed to
one of 2^20 weights. Each of n features has the value 1/sqrt(n), so long texts do not weigh more, and the logit is one
sum over a table. Hashing uses prefix sums of a polynomial hash over the bytes, on whole arrays: millions of characters
per second. scikit-learn fits the weights. The probability is calibrated on predictions for texts that the fit had not
seen (Platt 1999). `phf fit-scorer` can also fit a transformer classifier; its folder is read here too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic.dataclasses import dataclass as settings

from phf.core import store
from phf.core.config import STRICT, ConfigError, Plain
from phf.core.types import Estimate, Identity, Number
from phf.scorers.base import TextScorer

SCORER_RECORD = "scorer.json"
WEIGHTS = "weights.safetensors"
HELD_OUT = "heldout.jsonl"
"""The labels that the fit did not see, for `phf audit`."""
SEEN = "seen.bin"
"""Hashes of the texts that it saw, uint64, in order: audits leave these out."""
BUCKET_BITS = 20
CHAR_NGRAMS = (3, 4, 5)
_PAD = b"\0" * max(CHAR_NGRAMS)
_CHUNK = 1 << 16  # bytes hashed at a time: fits the processor's cache

_BASE = np.uint64(0x9E3779B97F4A7C15 | 1)
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))
_MIX = np.uint64(0xD6E8FEB86659FD93)


@settings(frozen=True, config=STRICT)
class Fitted(TextScorer):
    """The output of `phf fit-scorer`: the calibrated probability that a text is bad."""

    path: str
    """The folder of `phf fit-scorer`."""
    name: Literal["fitted"] = "fitted"

    @property
    def names(self) -> dict[str, str]:
        return {"path": self.path}

    @property
    def bad_above(self) -> float:
        return 0.5

    def identity(self) -> Identity:
        loaded = load_fitted(self.path)
        return {
            "name": self.name,
            "unit": "probability",
            "kind": read_scorer_record(self.path).kind,
            "hash": store.path_hash(Path(self.path).expanduser()),
        } | ({"classifier": loaded.identity()} if isinstance(loaded, TransformerScorer) else {})

    def score_texts(self, texts: Sequence[str]) -> list[float]:
        found: list[float] = load_fitted(self.path).probabilities(texts).tolist()
        return found


class HashedNgrams:
    """Weights over hashed n-grams, an intercept, and Platt's slope and offset."""

    def __init__(self, weights: np.ndarray, intercept: float, slope: float, offset: float) -> None:
        self.weights = weights
        self.intercept = intercept
        self.slope = slope
        self.offset = offset

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """Uncalibrated logits, float64 [texts]."""
        sums = [
            np.stack([segment_sums(self.weights[buckets], starts, ends) for buckets, starts, ends in kinds]).sum(0)
            / np.sqrt(sum(ends - starts for _, starts, ends in kinds))
            for kinds in hashed(texts)
        ]
        return (np.concatenate(sums) if sums else np.zeros(0)) + self.intercept

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """Calibrated probabilities of being bad, float64 [texts]. No text may be empty."""
        return 1 / (1 + np.exp(-(self.slope * self.logits(texts) + self.offset)))


def segment_sums(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Sums of values[start:end] (float64). 0 for an empty range."""
    if not len(values):
        return np.zeros(len(starts))
    edges = np.minimum(np.stack([starts, ends], axis=1).ravel(), len(values))
    # reduceat takes no index past the end and gives values[start] for an empty range
    sums = np.add.reduceat(np.append(values, np.float32(0)), edges, dtype=np.float64)[::2]
    return np.where(ends > starts, sums, 0.0)


def _table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint8)
    table[[9, 10, 11, 12, 13]] = 32
    return table


_SPACES = _table().tobytes()
_WORD = np.zeros(256, bool)
_WORD[[*range(48, 58), *range(97, 123), 95, 39, *range(128, 256)]] = True


@functools.cache
def _powers(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Base^i and Base^-i modulo 2^64."""
    up = np.full(length, _BASE, np.uint64)
    down = np.full(length, _INVERSE, np.uint64)
    up[0] = down[0] = 1
    return np.cumprod(up, dtype=np.uint64), np.cumprod(down, dtype=np.uint64)


def hashed(texts: Sequence[str]) -> Iterator[list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Features of runs of texts, in order. Each kind of feature gives (buckets of the whole run, start of each text's
    buckets, end of each text's buckets)."""
    run: list[bytes] = []
    size = 0
    for text in texts:
        data = text.lower().encode("utf-8", "surrogatepass").translate(_SPACES)
        run.append(data.replace(b"\0", b" ") if b"\0" in data else data)
        size += len(data)
        if size >= _CHUNK:
            yield _hashed_run(run)
            run = []
            size = 0
    if run:
        yield _hashed_run(run)


def _hashed_run(run: list[bytes]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    data = np.frombuffer(_PAD + _PAD.join(run) + _PAD, np.uint8)
    lengths = np.array([len(r) for r in run], np.int64)
    starts = len(_PAD) * np.arange(1, len(run) + 1) + np.concatenate([[0], lengths[:-1].cumsum()])
    ends = starts + lengths
    up, down = _powers(1 << max(len(data), _CHUNK * 2).bit_length())
    prefix = np.zeros(len(data) + 1, np.uint64)
    np.cumsum((data.astype(np.uint64) + np.uint64(1)) * up[: len(data)], out=prefix[1:])

    kinds = []
    for n in CHAR_NGRAMS:  # one per byte of a text; the last ones hold the text's end
        count = len(data) - n + 1
        kinds.append((_bucket((prefix[n:] - prefix[:count]) * down[:count], n), starts, ends))
    is_word = _WORD[data]
    change = np.flatnonzero(is_word[1:] != is_word[:-1]) + 1  # starts and ends in turn; there is padding at both ends
    begin = change[::2]
    end = change[1::2]
    word = (prefix[end] - prefix[begin]) * down[begin]
    first = np.searchsorted(begin, starts)
    last = np.searchsorted(begin, ends)
    kinds.append((_bucket(word, 1), first, last))
    pair = word[:-1] * _MIX + word[1:] if len(word) > 1 else word[:0]
    kinds.append((_bucket(pair, 2), first, np.maximum(last - 1, first)))
    return kinds


def _bucket(value: np.ndarray, kind: int) -> np.ndarray:
    """The bucket of each hash. Each kind of feature has its own function."""
    value = value ^ (value >> np.uint64(32))
    value *= _MIX + np.uint64(2 * kind)
    value ^= value >> np.uint64(29)
    value *= _BASE
    return (value >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)


def feature_matrix(texts: Sequence[str]) -> Any:
    """Sparse features [texts, 2^20], float32. The logit is linear in them."""
    import scipy.sparse

    blocks = []
    for kinds in hashed(texts):
        total = np.sqrt(sum(ends - starts for _, starts, ends in kinds))
        rows = []
        columns = []
        for buckets, starts, ends in kinds:
            counts = ends - starts
            inside = np.zeros(len(buckets) + 1, np.int64)
            np.add.at(inside, starts[counts > 0], 1)
            np.add.at(inside, ends[counts > 0], -1)
            columns.append(buckets[inside.cumsum()[:-1] > 0])
            rows.append(np.repeat(np.arange(len(starts)), counts))
        row = np.concatenate(rows)
        column = np.concatenate(columns)
        blocks.append(
            scipy.sparse.coo_matrix(
                ((1 / total[row]).astype(np.float32), (row, column)), shape=(len(total), 1 << BUCKET_BITS)
            ).tocsr()
        )
    return scipy.sparse.vstack(blocks, format="csr")


class TransformerScorer:
    """A finetuned classifier of two classes with the same calibration."""

    def __init__(self, path: Path, slope: float = 1.0, offset: float = 0.0) -> None:
        from phf.scorers.toxicity import Toxicity, load_classifier

        self.classifier = load_classifier(Toxicity(model=str(path), labels=("bad",), activation="softmax"))
        self.slope = slope
        self.offset = offset

    def identity(self) -> Identity:
        """What decides the scores and depends on this machine."""
        return {"dtype": self.classifier.dtype, "max_tokens": self.classifier.max_tokens}

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """Uncalibrated logits, float64 [texts]."""
        p = np.clip(self.classifier.probabilities(texts), 1e-7, 1 - 1e-7)
        logits: np.ndarray = np.log(p / (1 - p))
        return logits

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        calibrated: np.ndarray = 1 / (1 + np.exp(-(self.slope * self.logits(texts) + self.offset)))
        return calibrated


@dataclass(frozen=True)
class AtThreshold:
    """How well scores above a threshold point to bad texts."""

    precision: float | None
    """Share of bad texts among those above the threshold; null if no text is above it."""
    recall: float
    """Share of the bad texts that are above the threshold."""
    share: float
    """Share of all texts that are above the threshold."""
    precision_ci95: tuple[Number, Number] = (math.nan, math.nan)
    """Wilson's interval; null in scorers of earlier versions."""
    recall_ci95: tuple[Number, Number] = (math.nan, math.nan)
    """Wilson's interval; null in scorers of earlier versions."""


@dataclass(frozen=True)
class ScorerMetrics:
    """How good probabilities are on labelled texts."""

    n: int
    """Texts."""
    bad: int
    """Bad ones among them."""
    auc: Number
    """Area under the ROC curve: 1 best, 0.5 chance."""
    auc_ci95: tuple[Number, Number]
    """Its 95% interval."""
    average_precision: float
    """Area under the curve of precision over recall: 1 best, the share of bad texts is chance."""
    brier: float
    """Mean squared error of the probabilities; lower is better."""
    calibration_error: float
    """Expected calibration error over ten bins; lower is better."""
    at: dict[str, AtThreshold]
    """By threshold."""
    average_precision_ci95: tuple[Number, Number] = (math.nan, math.nan)
    """95% interval of the average precision (a bootstrap over texts)."""
    brier_ci95: tuple[Number, Number] = (math.nan, math.nan)
    """Of the Brier score."""
    calibration_error_ci95: tuple[Number, Number] = (math.nan, math.nan)
    """Of the calibration error. The error is an absolute value, so resampling makes it rather larger."""


@dataclass(frozen=True)
class CurvePoint:
    """A fit to a part of the labels, measured on the same held-out texts."""

    texts: int
    """Texts that it was fitted to."""
    auc: Number
    """Area under the ROC curve."""
    auc_ci95: tuple[Number, Number]
    """Its 95% interval."""


@dataclass(frozen=True)
class LearningCurve:
    """Whether more labels would help."""

    points: list[CurvePoint]
    """Fits to an eighth, a quarter, half and all of the labels."""
    gain: Estimate
    """AUC of the last fit less that of the one before, on the same held-out texts (a bootstrap over these)."""


@dataclass(frozen=True, kw_only=True)
class ScorerRecord:
    """`scorer.json` of a fitted scorer."""

    key: str
    """Fingerprint of labels and settings."""
    kind: Literal["ngrams", "transformer"]
    """What was fitted."""
    slope: float
    """Of the calibrated logit."""
    offset: float
    """Of the calibrated logit."""
    intercept: float | None = None
    """n-grams: of the uncalibrated logit."""
    C: float | None = None
    """n-grams: strength of regularization, scikit-learn's C."""
    bucket_bits: int | None = None
    """n-grams: there are 2^bucket_bits weights."""
    weights: str | None = None
    """n-grams: hash of the weights."""
    seen: str | None = None
    """Hash of the list of texts that it was fitted to; null in scorers of earlier versions."""
    base_model: str | None = None
    """Transformer: the model that was finetuned."""
    source: str
    """The file of labels."""
    labels: str | None = None
    """Fingerprint of the labels; null in scorers of earlier versions."""
    texts: int
    """Labelled texts."""
    bad: int
    """Bad ones among them."""
    rejected: dict[str, int]
    """Rows that were skipped, by reason."""
    bad_from: int | None = None
    """The first bad label, of labels with an order; null for others."""
    ordinal: bool = False
    """n-grams: whether the fit used the order of the labels, because that found bad texts better."""
    curve: LearningCurve | None = None
    """Null for transformers, and for scorers of earlier versions."""
    metrics: dict[str, ScorerMetrics]
    """On the held-out texts and on each test file."""
    versions: dict[str, str]
    """Versions of Python, phf and the libraries that results depend on."""


def seen_hash(text: str) -> int:
    """What `SEEN` holds of a text, whatever the white space around it."""
    return store.text_hash(text.strip(), b"phf seen")


def seen_texts(scorer: Plain | None) -> frozenset[int]:
    """`seen_hash` of the texts that a scorer, or a part of a combination, was fitted to, as far as its folder is still
    there. `scorer`: its settings. Raises ConfigError for a damaged list."""
    found: set[int] = set()
    parts: list[Any] = [scorer or {}]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            file = Path(str(part.get("path"))).expanduser() / SEEN
            if part.get("name") == "fitted" and file.is_file():
                listed = file.read_bytes()
                known = read_scorer_record(file.parent).seen
                if len(listed) % 8 or (known is not None and store.bytes_hash(listed) != known):
                    raise _damaged(file)
                found |= set(np.frombuffer(listed, "<u8").tolist())
            parts += part.values()
        elif isinstance(part, list | tuple):
            parts += part
    return frozenset(found)


def read_scorer_record(path: str | Path) -> ScorerRecord:
    """The record of a fitted scorer. Raises ConfigError if there is none."""
    folder = Path(path).expanduser()
    if not (folder / SCORER_RECORD).is_file():
        raise ConfigError(f"{path} has no {SCORER_RECORD}: it was not written by `phf fit-scorer`")
    return store.read_record(folder / SCORER_RECORD, ScorerRecord)


def _damaged(file: Path) -> ConfigError:
    return ConfigError(f"{file} is not the file that {SCORER_RECORD} describes; fit the scorer again")


def load_fitted(path: str) -> HashedNgrams | TransformerScorer:
    """A fitted scorer, checked against the hash on its record and kept in memory until its files change."""
    return _loaded(path, store.signature(path))


@functools.lru_cache(4)
def _loaded(path: str, files: Any) -> HashedNgrams | TransformerScorer:
    record = read_scorer_record(path)
    folder = Path(path).expanduser()
    if record.kind == "transformer":
        return TransformerScorer(folder, record.slope, record.offset)
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        weights = load_file(folder / WEIGHTS)["weights"]
    except (SafetensorError, KeyError, OSError):
        raise _damaged(folder / WEIGHTS) from None
    if record.intercept is None or store.bytes_hash(weights.tobytes()) != record.weights:
        raise _damaged(folder / WEIGHTS)
    return HashedNgrams(weights, record.intercept, record.slope, record.offset)
