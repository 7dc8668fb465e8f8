"""Look at the scores before training on them: distributions, what a threshold does, examples, agreement. Floor 3.

    phf inspect scored/ --label toxic

Numbers are over everything (read a column at a time, so memory holds one number a segment); the texts shown are the few
documents at each quantile of the documents' mean scores.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from phf.core import store
from phf.core.config import ConfigError, did_you_mean
from phf.core.types import Rejected, ScoredDocument
from phf.data.scored import ScoredCorpus, read_table

LEVELS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
EXAMPLE_LEVELS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
EXAMPLES = 4
CONTROL_TOKENS = (2, 3, 4, 5)
BINS = 50


class Table:
    """Scores and lengths of all segments of a scored corpus, and where each document lies."""

    def __init__(self, corpus: ScoredCorpus) -> None:
        scores, chars, counts, files, rows = [], [], [], [], []
        for number, file in enumerate(tqdm(corpus.files, desc="reading", unit="file", disable=None, file=sys.stderr)):
            if corpus.preference is None:
                table = read_table(file, ["texts", "scores"])
                given = table["scores"]
            else:
                table = read_table(file, ["texts"])
                given = read_table(corpus.path / "scores" / corpus.preference / f"part-{number:05d}.parquet")["scores"]
            flat, length, size, row = _segments(table["texts"].combine_chunks(), given.combine_chunks())
            scores.append(flat)
            chars.append(length)
            counts.append(size)
            rows.append(row)
            files.append(np.full(len(row), number, np.int32))
        self.score_S = np.concatenate(scores)
        self.chars_S = np.concatenate(chars)
        self.counts_D = np.concatenate(counts)
        self.file_D, self.row_D = np.concatenate(files), np.concatenate(rows)
        self.doc_S = np.repeat(np.arange(len(self.counts_D)), self.counts_D)
        judged_S = ~np.isnan(self.score_S)
        sums = np.bincount(self.doc_S[judged_S], self.score_S[judged_S].astype(np.float64), len(self.counts_D))
        with np.errstate(invalid="ignore", divide="ignore"):
            self.mean_D = sums / np.bincount(self.doc_S[judged_S], minlength=len(self.counts_D))
        self.max_D = np.full(len(self.counts_D), -np.inf)
        np.maximum.at(self.max_D, self.doc_S[judged_S], self.score_S[judged_S])
        self.max_D[np.isinf(self.max_D)] = np.nan
        self.chars_D = np.bincount(self.doc_S, self.chars_S, len(self.counts_D))


def _segments(texts: Any, scores: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scores and characters of every segment of the usable rows, segments of each such row, and the rows' numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    size, other = pc.list_value_length(texts), pc.list_value_length(scores)
    usable = pc.fill_null(pc.and_(pc.equal(size, other), pc.greater(size, 0)), False)
    owner = pc.list_parent_indices(texts).to_numpy(zero_copy_only=False)
    chars_of = pc.fill_null(pc.utf8_length(pc.list_flatten(texts)), 0).to_numpy(zero_copy_only=False)
    has_text = np.bincount(owner, weights=chars_of, minlength=len(texts)) > 0  # a row of empty segments is no document
    usable = pc.and_(usable, pa.array(has_text))
    row = np.flatnonzero(usable.to_numpy(zero_copy_only=False))
    texts, scores = texts.filter(usable), scores.filter(usable)
    flat = pc.fill_null(pc.list_flatten(scores).cast(pa.float32()), math.nan).to_numpy(zero_copy_only=False)
    chars = pc.fill_null(pc.utf8_length(pc.list_flatten(texts)), 0).to_numpy(zero_copy_only=False)
    flat = np.where(np.isinf(flat), np.float32(math.nan), flat)
    return (
        flat,
        chars.astype(np.int64),
        pc.list_value_length(texts).to_numpy(zero_copy_only=False).astype(np.int64),
        row,
    )


def survey(
    scored: str | Path,
    preference: str | None = None,
    threshold: float | None = None,
    label: str | None = None,
    segment_tokens: np.ndarray | None = None,
) -> dict[str, Any]:
    """Everything that the page shows, as plain values. `preference`: which scores, where there are several;
    `threshold`: scores above it are bad (default: 0 where at least a tenth of the segments score 0, else the median of
    the segments); `label`: a field of the documents' metadata that says true for bad documents; `segment_tokens`:
    tokens of every segment that is not empty, in order, to say what share of the tokens a threshold calls bad."""
    corpus = ScoredCorpus(scored, preference)
    table = Table(corpus)
    judged_S = table.score_S[~np.isnan(table.score_S)]
    if not len(judged_S):
        raise store.StoreError(f"{scored} holds no judged segment")
    means_D = table.mean_D[~np.isnan(table.mean_D)]
    zero = float((judged_S == 0).mean())
    if threshold is None:
        threshold = 0.0 if zero >= 0.1 else float(np.quantile(judged_S, 0.5))
    counts = {
        "documents": len(table.counts_D),
        "segments": len(table.score_S),
        "chars": int(table.chars_S.sum()),
        "unjudged_segments": int(np.isnan(table.score_S).sum()),
        "unjudged_documents": int(np.isnan(table.mean_D).sum()),
    }
    return {
        "scored": str(scored),
        "preference": corpus.preference or corpus.main,
        "preferences": corpus.preferences(),
        "identity": corpus.manifest["identity"],
        "counts": counts,
        "set_aside": corpus.manifest.get("rejected", {}),
        "failures": corpus.manifest.get("failures", {}),
        "labels": corpus.manifest.get("labels", {}),
        "threshold": threshold,
        "segments": _distribution(judged_S),
        "documents": _distribution(means_D),
        "thresholds": _thresholds(table, judged_S, _tokens(table, segment_tokens)),
        "suggested": _suggested(judged_S, means_D, zero),
        "length": _by_length(table, threshold),
        "examples": _examples(corpus, table),
        "worst_segments": _worst_segments(corpus, table),
        "agreement": [
            _agreement(corpus, table, name, threshold)
            for name in corpus.preferences()
            if name != (corpus.preference or corpus.main)
        ],
        "labelled": _labelled(corpus, table, label) if label is not None else None,
    }


def _distribution(values: np.ndarray) -> dict[str, Any]:
    """Quantiles, mean and histogram. The histogram leaves out exact zeros, which are said by their share; its bins are
    equal steps of the logarithm where values span more than two decades."""
    positive = values[values > 0]
    histogram: dict[str, Any] = {"edges": [], "counts": [], "log": False}
    if len(positive):
        low, high = float(positive.min()), float(positive.max())
        log = high > 100 * low
        edges = np.geomspace(low, high, BINS + 1) if log else np.linspace(min(0.0, low), high or 1.0, BINS + 1)
        edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
        histogram = {"edges": edges.tolist(), "counts": np.histogram(positive, edges)[0].tolist(), "log": log}
    return {
        "n": len(values),
        "mean": float(values.mean()),
        "zero": float((values == 0).mean()),
        "quantiles": {str(q): float(v) for q, v in zip(LEVELS, np.quantile(values, LEVELS), strict=True)},
        "histogram": histogram,
    }


def _tokens(table: Table, segment_tokens: np.ndarray | None) -> np.ndarray | None:
    """Tokens of every segment of the table: none in an empty one."""
    if segment_tokens is None:
        return None
    tokens_S = np.zeros(len(table.score_S), np.int64)
    tokens_S[table.chars_S > 0] = segment_tokens
    return tokens_S


def _thresholds(table: Table, judged_S: np.ndarray, tokens_S: np.ndarray | None) -> list[dict[str, float | None]]:
    """What each of several thresholds calls bad. Scores are compared as they are stored, in float32."""
    levels = np.unique(
        np.concatenate([[np.float32(0)], np.quantile(judged_S, np.linspace(0.05, 0.995, 39))]).astype(np.float32)
    )
    rows: list[dict[str, float | None]] = []
    chars = float(table.chars_S.sum())
    documents = max(int((~np.isnan(table.mean_D)).sum()), 1)
    for level in levels:
        bad_S = ~(table.score_S <= level)  # a segment that is not judged counts as bad, as in training
        rows.append(
            {
                "threshold": float(level),
                "bad_segments": float(bad_S.mean()),
                "bad_chars": float(table.chars_S[bad_S].sum() / chars),
                "bad_tokens": float(tokens_S[bad_S].sum() / tokens_S.sum()) if tokens_S is not None else None,
                "documents_with_bad": float(
                    (np.bincount(table.doc_S[bad_S], minlength=len(table.counts_D)) > 0).mean()
                ),
                "documents_kept_by_filtering": float((table.mean_D <= level).sum() / documents),
            }
        )
    return rows


def _suggested(judged_S: np.ndarray, means_D: np.ndarray, zero: float) -> dict[str, Any]:
    """Filtering: the median of the documents' means (the paper's rule). Conditional and unlikelihood: 0 where many
    segments are spotless, else the median. K control tokens: the quantiles that cut the segments into K equal parts,
    exact zeros a part of their own where they are more than their share."""
    tokens = {}
    for k in CONTROL_TOKENS:
        if zero > 1 / k and zero < 1:
            inner = np.quantile(judged_S[judged_S > 0], np.arange(1, k - 1) / (k - 1))
            tokens[str(k)] = [0.0, *map(float, inner)]
        else:
            tokens[str(k)] = [float(v) for v in np.quantile(judged_S, np.arange(1, k) / k)]
    return {
        "filtering": float(np.median(means_D)),
        "conditional": 0.0 if zero >= 0.1 else float(np.median(judged_S)),
        "control_tokens": tokens,
    }


def _by_length(table: Table, threshold: float) -> list[dict[str, float]]:
    """Score against length, by tenths of the segments in order of length: a score that falls with length says more of
    the length than of the text."""
    judged_S = ~np.isnan(table.score_S)
    chars, score = table.chars_S[judged_S], table.score_S[judged_S]
    order = np.argsort(chars, kind="stable")
    rows = []
    for part in np.array_split(order, min(10, len(order))):
        if len(part):
            rows.append(
                {
                    "chars_from": int(chars[part].min()),
                    "chars_to": int(chars[part].max()),
                    "n": len(part),
                    "mean": float(score[part].mean()),
                    "bad": float((score[part] > np.float32(threshold)).mean()),
                }
            )
    return rows


def _examples(corpus: ScoredCorpus, table: Table) -> list[dict[str, Any]]:
    """A few documents at each level of the documents' mean scores."""
    judged = np.flatnonzero(~np.isnan(table.mean_D))
    order = judged[np.argsort(table.mean_D[judged], kind="stable")]
    wanted: list[tuple[float, list[int]]] = []
    seen: set[int] = set()
    for level in EXAMPLE_LEVELS:
        at = round(level * (len(order) - 1))
        near = sorted(range(max(at - 4 * EXAMPLES, 0), min(at + 4 * EXAMPLES, len(order))), key=_distance_to(at))
        chosen = [int(order[i]) for i in near if int(order[i]) not in seen]
        seen.update(chosen[:EXAMPLES])
        wanted.append((level, chosen[:EXAMPLES]))
    found = read_documents(corpus, table, [d for _, documents in wanted for d in documents])
    return [
        {
            "level": level,
            "mean": float(np.quantile(table.mean_D[judged], level)),
            "documents": [_shown(found[d], table.mean_D[d]) for d in documents if d in found],
        }
        for level, documents in wanted
    ]


def _distance_to(at: int) -> Callable[[int], int]:
    return lambda i: abs(i - at)


def _shown(document: ScoredDocument, mean: float) -> dict[str, Any]:
    return {
        "id": document.id,
        "mean": float(mean),
        "segments": [[t, None if s != s else s] for t, s in zip(document.texts, document.scores, strict=True)],
    }


def _worst_segments(corpus: ScoredCorpus, table: Table, count: int = 20) -> list[dict[str, Any]]:
    """Segments with the largest scores, one a document."""
    order = np.argsort(np.nan_to_num(table.max_D, nan=-np.inf))[::-1][:count]
    found = read_documents(corpus, table, [int(d) for d in order if not np.isnan(table.max_D[d])])
    rows = []
    for d in map(int, order):
        if d in found:
            text, score = max(
                ((t, s) for t, s in zip(found[d].texts, found[d].scores, strict=True) if s == s), key=lambda x: x[1]
            )
            rows.append({"id": found[d].id, "text": text, "score": score})
    return rows


def read_documents(corpus: ScoredCorpus, table: Table, documents: Sequence[int]) -> dict[int, ScoredDocument]:
    """Documents by their number in the table. Reads each file that holds one of them once."""
    found: dict[int, ScoredDocument] = {}
    for number in sorted({int(table.file_D[d]) for d in documents}):
        rows = {int(table.row_D[d]): d for d in documents if table.file_D[d] == number}
        for row, item in enumerate(corpus.read(corpus.files[number], keep_empty=True)):
            if row in rows and not isinstance(item, Rejected):
                found[rows[row]] = item
            if row >= max(rows):
                break
    return found


def _agreement(corpus: ScoredCorpus, table: Table, name: str, threshold: float) -> dict[str, Any]:
    """How far two scorers agree on the same segments, and where they differ most (by rank)."""
    from scipy.stats import rankdata

    other_corpus = ScoredCorpus(corpus.path, name)
    other = Table(other_corpus)
    if len(other.score_S) != len(table.score_S):
        raise store.StoreError(f"scores {name!r} do not fit the corpus row by row; add them again")
    both = ~np.isnan(table.score_S) & ~np.isnan(other.score_S)
    a, b = table.score_S[both].astype(np.float64), other.score_S[both].astype(np.float64)
    rank_a, rank_b = rankdata(a) / max(len(a), 1), rankdata(b) / max(len(b), 1)
    zero_b = (b == 0).mean()
    other_threshold = 0.0 if zero_b >= 0.1 else float(np.median(b))
    bad_a, bad_b = a > np.float32(threshold), b > np.float32(other_threshold)
    where = np.flatnonzero(both)

    def extremes(order: np.ndarray) -> list[dict[str, Any]]:
        rows = []
        documents = [int(table.doc_S[where[i]]) for i in order]
        found, found_other = read_documents(corpus, table, documents), read_documents(other_corpus, other, documents)
        first_S = np.concatenate([[0], table.counts_D.cumsum()])
        for i, d in zip(order, documents, strict=True):
            if d in found and d in found_other:
                place = int(where[i] - first_S[d])
                if place < len(found[d].texts):
                    rows.append(
                        {
                            "id": found[d].id,
                            "text": found[d].texts[place],
                            "score": found[d].scores[place],
                            "other": found_other[d].scores[place],
                        }
                    )
        return rows

    with np.errstate(invalid="ignore"):
        pearson = float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 else math.nan
        spearman = float(np.corrcoef(rank_a, rank_b)[0, 1]) if len(a) > 1 else math.nan
    difference = rank_a - rank_b
    return {
        "name": name,
        "identity": other_corpus.manifest["identity"],
        "segments": int(both.sum()),
        "threshold": other_threshold,
        "pearson": pearson,
        "spearman": spearman,
        "both_bad": float((bad_a & bad_b).mean()),
        "only_this": float((bad_a & ~bad_b).mean()),
        "only_other": float((~bad_a & bad_b).mean()),
        "this_worse": extremes(np.argsort(-difference, kind="stable")[:8]),
        "other_worse": extremes(np.argsort(difference, kind="stable")[:8]),
    }


def _labelled(corpus: ScoredCorpus, table: Table, label: str) -> dict[str, Any]:
    """How well the scores find the documents that are labelled bad: AUC, precision and recall, of the document's mean
    and of its worst segment."""
    from phf.scorers.fitting import FALSE, THRESHOLDS, TRUE

    value_D = np.full(len(table.counts_D), -1, np.int8)
    place = {(int(f), int(r)): d for d, (f, r) in enumerate(zip(table.file_D, table.row_D, strict=True))}
    fields: set[str] = set()
    for number, file in enumerate(corpus.files):
        for row, item in enumerate(corpus.read(file)):
            if isinstance(item, Rejected) or (number, row) not in place:
                continue
            fields.update(item.meta)
            value = str(item.meta.get(label, "")).strip().lower()
            value_D[place[number, row]] = 1 if value in TRUE else 0 if value in FALSE else -1
    if label not in fields:
        raise ConfigError(f"--label: no document's metadata holds {label!r}{did_you_mean(label, fields)}")
    result: dict[str, Any] = {"field": label, "bad": int((value_D == 1).sum()), "good": int((value_D == 0).sum())}
    if not result["bad"] or not result["good"]:
        raise ConfigError(f"--label {label}: {result['bad']} bad and {result['good']} good documents; both are needed")
    from sklearn.metrics import roc_auc_score

    for name, score_D in (("mean", table.mean_D), ("worst segment", table.max_D)):
        use = (value_D >= 0) & ~np.isnan(score_D)
        bad, score = value_D[use] == 1, score_D[use]
        levels = sorted({*THRESHOLDS, *np.quantile(score, [0.5, 0.75, 0.9, 0.95, 0.99]).tolist(), 0.0})
        at = []
        for level in levels:
            chosen = score > level
            at.append(
                {
                    "threshold": level,
                    "precision": float(bad[chosen].mean()) if chosen.any() else None,
                    "recall": float(chosen[bad].mean()),
                    "share": float(chosen.mean()),
                }
            )
        result[name] = {"auc": float(roc_auc_score(bad, score)), "at": at}
    return result
