"""A scorer fitted to your own labels: hashed n-grams and logistic regression. Floor 2.

    phf fit-scorer labels.jsonl my-scorer/ --text text --label toxic
    phf score corpus.jsonl scored/ --scorer fitted scorer.path=my-scorer

Features: words and pairs of words, and strings of 3 to 5 bytes, of the lower-cased text, each hashed into one of 2^20
weights; a text of n features has 1/sqrt(n) for each of them (so a long text does not weigh more), which makes the
logit one sum over a table. Hashing is by prefix sums of a polynomial hash over the bytes, whole arrays at a time:
millions of characters a second. The weights are fitted by scikit-learn; the probability is calibrated on predictions
for texts that the fit had not seen (Platt 1999). A folder with a transformer classifier of the same tool is read, too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic.dataclasses import dataclass

from phf.core import store
from phf.core.config import STRICT, ConfigError
from phf.scorers.base import TextScorer

CARD = "scorer.json"
WEIGHTS = "weights.safetensors"
BUCKET_BITS = 20
CHAR_NGRAMS = (3, 4, 5)
_PAD = b"\0" * max(CHAR_NGRAMS)
_CHUNK = 1 << 16  # bytes hashed at a time: fits the processor's cache

_BASE = np.uint64(0x9E3779B97F4A7C15 | 1)
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))
_MIX = np.uint64(0xD6E8FEB86659FD93)


@dataclass(frozen=True, config=STRICT)
class Fitted(TextScorer):
    """What `phf fit-scorer` wrote: the calibrated probability that a text is bad."""

    path: str
    name: Literal["fitted"] = "fitted"

    def identity(self) -> dict[str, Any]:
        loaded = load_fitted(self.path)
        return {
            "name": self.name,
            "unit": "probability",
            "kind": read_card(self.path)["kind"],
            "hash": store.path_hash(Path(self.path).expanduser()),
        } | ({"classifier": loaded.identity()} if isinstance(loaded, TransformerScorer) else {})

    def score_texts(self, texts: Sequence[str]) -> list[float]:
        return load_fitted(self.path).probabilities(texts).tolist()  # type: ignore[no-any-return]


class HashedNgrams:
    """Weights over hashed n-grams, an intercept, and Platt's slope and offset."""

    def __init__(self, weights: np.ndarray, intercept: float, slope: float, offset: float) -> None:
        self.weights, self.intercept, self.slope, self.offset = weights, intercept, slope, offset

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
    """Sums of values[start:end], float64; 0 where the range is empty."""
    if not len(values):
        return np.zeros(len(starts))
    edges = np.minimum(np.stack([starts, ends], axis=1).ravel(), len(values))
    # reduceat takes no index past the end, and gives values[start] for an empty range
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
    up, down = np.full(length, _BASE, np.uint64), np.full(length, _INVERSE, np.uint64)
    up[0] = down[0] = 1
    return np.cumprod(up, dtype=np.uint64), np.cumprod(down, dtype=np.uint64)


def hashed(texts: Sequence[str]) -> Iterator[list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """For runs of texts, in order: for each kind of feature the buckets (one after the other) and, for each text of the
    run, the start and end of its own among them."""
    run: list[bytes] = []
    size = 0
    for text in texts:
        data = text.lower().encode("utf-8", "surrogatepass").translate(_SPACES)
        run.append(data.replace(b"\0", b" ") if b"\0" in data else data)
        size += len(data)
        if size >= _CHUNK:
            yield _hashed_run(run)
            run, size = [], 0
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
    for n in CHAR_NGRAMS:  # one for each byte of a text; the last ones hold its end
        count = len(data) - n + 1
        kinds.append((_bucket((prefix[n:] - prefix[:count]) * down[:count], n), starts, ends))
    is_word = _WORD[data]
    change = np.flatnonzero(is_word[1:] != is_word[:-1]) + 1  # begins and ends by turns; padding is at both ends
    begin, end = change[::2], change[1::2]
    word = (prefix[end] - prefix[begin]) * down[begin]
    first, last = np.searchsorted(begin, starts), np.searchsorted(begin, ends)
    kinds.append((_bucket(word, 1), first, last))
    pair = word[:-1] * _MIX + word[1:] if len(word) > 1 else word[:0]
    kinds.append((_bucket(pair, 2), first, np.maximum(last - 1, first)))
    return kinds


def _bucket(value: np.ndarray, kind: int) -> np.ndarray:
    """The bucket of each hash; a different function for each kind of feature."""
    value = value ^ (value >> np.uint64(32))
    value *= _MIX + np.uint64(2 * kind)
    value ^= value >> np.uint64(29)
    value *= _BASE
    return (value >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)


def feature_matrix(texts: Sequence[str]) -> Any:
    """Sparse features [texts, 2^20], float32: what the logit is linear in."""
    import scipy.sparse

    blocks = []
    for kinds in hashed(texts):
        total = np.sqrt(sum(ends - starts for _, starts, ends in kinds))
        rows, columns = [], []
        for buckets, starts, ends in kinds:
            counts = ends - starts
            inside = np.zeros(len(buckets) + 1, np.int64)
            np.add.at(inside, starts[counts > 0], 1)
            np.add.at(inside, ends[counts > 0], -1)
            columns.append(buckets[inside.cumsum()[:-1] > 0])
            rows.append(np.repeat(np.arange(len(starts)), counts))
        row, column = np.concatenate(rows), np.concatenate(columns)
        blocks.append(
            scipy.sparse.coo_matrix(
                ((1 / total[row]).astype(np.float32), (row, column)), shape=(len(total), 1 << BUCKET_BITS)
            ).tocsr()
        )
    return scipy.sparse.vstack(blocks, format="csr")


class TransformerScorer:
    """A fine-tuned classifier of two classes, with the same calibration."""

    def __init__(self, path: Path, card: dict[str, Any]) -> None:
        from phf.scorers.toxicity import Toxicity, _load

        self.classifier = _load(Toxicity(model=str(path), labels=("bad",), activation="softmax"))
        self.slope, self.offset = card["slope"], card["offset"]

    def identity(self) -> dict[str, Any]:
        """What of this machine decides its scores."""
        return {"dtype": self.classifier.dtype, "max_tokens": self.classifier.max_tokens}

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """Uncalibrated logits, float64 [texts]."""
        p = np.clip(self.classifier.probabilities(texts), 1e-7, 1 - 1e-7)
        logits: np.ndarray = np.log(p / (1 - p))
        return logits

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        calibrated: np.ndarray = 1 / (1 + np.exp(-(self.slope * self.logits(texts) + self.offset)))
        return calibrated


def read_card(path: str | Path) -> dict[str, Any]:
    """The card of a fitted scorer. Raises ConfigError where there is none."""
    folder = Path(path).expanduser()
    if not (folder / CARD).is_file():
        raise ConfigError(f"{path} holds no {CARD}: it is not what `phf fit-scorer` writes")
    return store.read_json(folder / CARD)  # type: ignore[no-any-return]


def load_fitted(path: str) -> HashedNgrams | TransformerScorer:
    """A fitted scorer, checked against the hash on its card; kept in memory until its files change."""
    return _loaded(path, store.signature(path))


@functools.lru_cache(4)
def _loaded(path: str, files: Any) -> HashedNgrams | TransformerScorer:
    card = read_card(path)
    folder = Path(path).expanduser()
    if card["kind"] == "transformer":
        return TransformerScorer(folder, card)
    from safetensors.numpy import load_file

    weights = load_file(folder / WEIGHTS)["weights"]
    if store.bytes_hash(weights.tobytes()) != card["weights"]:
        raise ConfigError(f"{path}: {WEIGHTS} is not the one that its {CARD} describes; fit the scorer again")
    return HashedNgrams(weights, card["intercept"], card["slope"], card["offset"])
