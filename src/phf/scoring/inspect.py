"""Look at scores before training on them: distributions, effects of a threshold, examples, agreement of scorers.

    phf inspect scored/ --label toxic

Numbers cover the whole corpus. Files are read a column at a time, so memory holds a few numbers per segment. The texts
shown are a few documents at each quantile of the documents' mean scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from phf.core import store
from phf.core.config import ConfigError, did_you_mean
from phf.core.types import Rejected
from phf.data.scored import ScoredCorpus, natural_threshold
from phf.scoring.around import around_thresholds
from phf.scoring.inspection import (
    Agreement,
    Distribution,
    ExampleLevel,
    Histogram,
    InspectedCounts,
    Inspection,
    Labelled,
    LabelledAt,
    LabelledBy,
    LengthBin,
    ShownDocument,
    ShownSegment,
    Suggested,
    ThresholdEffect,
)
from phf.scoring.table import Table, read_documents

LEVELS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
"""Quantiles that are reported."""
EXAMPLE_LEVELS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
"""Quantiles of the documents' mean scores at which documents are shown."""
EXAMPLES = 4
"""Documents shown per quantile."""
NUM_QUANTILE_TOKENS = (2, 3, 4, 5)
"""Numbers of control tokens for which cuts are suggested."""
BINS = 50


def inspect_scores(
    scored: str | Path,
    preference: str | None = None,
    threshold: float | None = None,
    label: str | None = None,
    segment_tokens: np.ndarray | None = None,
) -> Inspection:
    """Measure the scores of a corpus.

    `preference`: which scores, where the corpus has several. `threshold`: scores above it are bad (default: the
    scorer's own; where it has none, a guess from the scores). `label`: a field of the documents'
    metadata that is true for bad documents. `segment_tokens`: number of tokens of every segment with text, in
    order; with it, the share of bad tokens is reported too. Raises StoreError for a corpus without a judged segment
    and ConfigError for a label that no document has.
    """
    corpus = ScoredCorpus(scored, preference)
    table = Table(corpus)
    judged_S = table.score_S[~np.isnan(table.score_S)]
    if not len(judged_S):
        raise store.StoreError(f"{scored} holds no judged segment")
    means_D = table.mean_D[~np.isnan(table.mean_D)]
    if threshold is None:
        threshold = natural_threshold(corpus.manifest, judged_S)
    own = corpus.preference or corpus.main
    effects = _thresholds(table, judged_S, _tokens(table, segment_tokens), threshold)
    near, around = around_thresholds(corpus, table, [row.threshold for row in effects])
    return Inspection(
        scored=str(scored),
        preference=own,
        preferences=corpus.preferences(),
        identity=corpus.manifest.identity,
        counts=InspectedCounts(
            documents=len(table.counts_D),
            segments=len(table.score_S),
            chars=int(table.chars_S.sum()),
            unjudged_segments=int(np.isnan(table.score_S).sum()),
            unjudged_documents=int(np.isnan(table.mean_D).sum()),
        ),
        rejected=corpus.manifest.rejected,
        failures=corpus.manifest.failures,
        labels=corpus.manifest.labels,
        threshold=threshold,
        segments=_distribution(judged_S),
        documents=_distribution(means_D),
        thresholds=effects,
        suggested=_suggested(judged_S, means_D, natural_threshold(corpus.manifest, judged_S)),
        length=_by_length(table, threshold),
        examples=_examples(corpus, table),
        worst_segments=_worst_segments(corpus, table),
        agreement=[
            agreement(corpus, table, other, Table(other), threshold)
            for other in (ScoredCorpus(scored, name) for name in corpus.preferences() if name != own)
        ],
        labelled=_labelled(corpus, table, label) if label is not None else None,
        near=near,
        around=around,
    )


def _tokens(table: Table, segment_tokens: np.ndarray | None) -> np.ndarray | None:
    """Number of tokens of every segment of the table: 0 for a segment without text."""
    if segment_tokens is None:
        return None
    tokens_S = np.zeros(len(table.score_S), np.int64)
    tokens_S[table.chars_S > 0] = segment_tokens
    return tokens_S


# Distributions and thresholds


def _distribution(values: np.ndarray) -> Distribution:
    """The histogram leaves out exact zeros. Its bins are logarithmic where values span more than two decades."""
    positive = values[values > 0]
    histogram = Histogram([], [], False)
    if len(positive):
        low = float(positive.min())
        high = float(positive.max())
        log = high > 100 * low
        edges = np.geomspace(low, high, BINS + 1) if log else np.linspace(min(0.0, low), high or 1.0, BINS + 1)
        edges[0] = min(edges[0], low)
        edges[-1] = max(edges[-1], high)
        histogram = Histogram(edges.tolist(), np.histogram(positive, edges)[0].tolist(), log)
    return Distribution(
        n=len(values),
        mean=float(values.mean()),
        zero=float((values == 0).mean()),
        quantiles={str(q): float(v) for q, v in zip(LEVELS, np.quantile(values, LEVELS), strict=True)},
        histogram=histogram,
    )


def _thresholds(
    table: Table, judged_S: np.ndarray, tokens_S: np.ndarray | None, threshold: float
) -> list[ThresholdEffect]:
    """Effects of `threshold` and of thresholds at quantiles of the scores. Scores are compared as they are stored, in
    float32."""
    above = judged_S[judged_S > 0]  # many corpora score mostly 0
    shares = np.linspace(0.05, 0.995, 39)
    quantiles = [np.quantile(found, shares, method="lower") for found in (judged_S, above) if len(found)]
    levels = np.unique(np.concatenate([[0.0, threshold], *quantiles]).astype(np.float32))
    chars = float(table.chars_S.sum())
    documents = max(int((~np.isnan(table.mean_D)).sum()), 1)
    effects = []
    for level in levels:
        bad_S = ~(table.score_S <= level)
        with_bad = np.bincount(table.doc_S[bad_S], minlength=len(table.counts_D)) > 0
        effects.append(
            ThresholdEffect(
                threshold=float(level),
                bad_segments=float(bad_S.mean()),
                bad_chars=float(table.chars_S[bad_S].sum() / chars),
                bad_tokens=float(tokens_S[bad_S].sum() / tokens_S.sum()) if tokens_S is not None else None,
                documents_with_bad=float(with_bad.mean()),
                documents_kept_by_filtering=float((table.mean_D <= level).sum() / documents),
            )
        )
    return effects


def _suggested(judged_S: np.ndarray, means_D: np.ndarray, natural: float) -> Suggested:
    """Suggested thresholds. Of several control tokens, exact zeros get one of their own where they are more than an
    equal share of the segments."""
    zero = float((judged_S == 0).mean())
    cuts = {}
    for k in NUM_QUANTILE_TOKENS:
        if 1 / k < zero < 1:
            inner = np.quantile(judged_S[judged_S > 0], np.arange(1, k - 1) / (k - 1))
            cuts[str(k)] = [0.0, *map(float, inner)]
        else:
            cuts[str(k)] = [float(v) for v in np.quantile(judged_S, np.arange(1, k) / k)]
    return Suggested(float(np.median(means_D)), natural, cuts)


def _by_length(table: Table, threshold: float) -> list[LengthBin]:
    """Mean score by tenths of the segments in order of length. A score that falls with length says more about the
    length than about the text."""
    judged_S = ~np.isnan(table.score_S)
    chars = table.chars_S[judged_S]
    score = table.score_S[judged_S]
    order = np.argsort(chars, kind="stable")
    return [
        LengthBin(
            chars_from=int(chars[part].min()),
            chars_to=int(chars[part].max()),
            n=len(part),
            mean=float(score[part].mean()),
            bad=float((score[part] > np.float32(threshold)).mean()),
        )
        for part in np.array_split(order, min(10, len(order)))
        if len(part)
    ]


# Texts


def _examples(corpus: ScoredCorpus, table: Table) -> list[ExampleLevel]:
    """A few documents at each quantile of the documents' mean scores, none twice."""
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
        ExampleLevel(
            level=level,
            mean=float(np.quantile(table.mean_D[judged], level)),
            documents=[
                ShownDocument(
                    found[d].id,
                    float(table.mean_D[d]),
                    list(zip(found[d].texts, found[d].scores, strict=True)),
                )
                for d in documents
                if d in found
            ],
        )
        for level, documents in wanted
    ]


def _distance_to(at: int) -> Callable[[int], int]:
    return lambda i: abs(i - at)


def _worst_segments(corpus: ScoredCorpus, table: Table, count: int = 20) -> list[ShownSegment]:
    """Segments with the largest scores, at most one per document."""
    order = np.argsort(np.nan_to_num(table.max_D, nan=-np.inf))[::-1][:count]
    found = read_documents(corpus, table, [int(d) for d in order if not np.isnan(table.max_D[d])])
    worst = []
    for d in map(int, order):
        if d in found:
            judged = [(t, s) for t, s in zip(found[d].texts, found[d].scores, strict=True) if not math.isnan(s)]
            text, score = max(judged, key=lambda pair: pair[1])
            worst.append(ShownSegment(found[d].id, text, score))
    return worst


# Comparisons


def agreement(
    corpus: ScoredCorpus, table: Table, other_corpus: ScoredCorpus, other: Table, threshold: float
) -> Agreement:
    """How far two scorers agree on the same segments, and where they differ most by rank. `threshold`: of the first."""
    from scipy.stats import rankdata

    name = other_corpus.preference or other_corpus.main
    if len(other.score_S) != len(table.score_S):
        raise store.StoreError(f"scores {name!r} do not match the corpus row by row; add them again")
    both = ~np.isnan(table.score_S) & ~np.isnan(other.score_S)
    a = table.score_S[both].astype(np.float64)
    b = other.score_S[both].astype(np.float64)
    rank_a = rankdata(a) / max(len(a), 1)
    rank_b = rankdata(b) / max(len(b), 1)
    other_threshold = natural_threshold(other_corpus.manifest, b)
    bad_a = a > np.float32(threshold)
    bad_b = b > np.float32(other_threshold)
    where = np.flatnonzero(both)
    first_S = np.concatenate([[0], table.counts_D.cumsum()])

    def shown(order: np.ndarray) -> list[ShownSegment]:
        documents = [int(table.doc_S[where[i]]) for i in order]
        found = read_documents(corpus, table, documents)
        found_other = read_documents(other_corpus, other, documents)
        segments = []
        for i, d in zip(order, documents, strict=True):
            if d in found and d in found_other:
                place = int(where[i] - first_S[d])
                if place < len(found[d].texts):
                    segments.append(
                        ShownSegment(
                            found[d].id,
                            found[d].texts[place],
                            found[d].scores[place],
                            found_other[d].scores[place],
                        )
                    )
        return segments

    with np.errstate(invalid="ignore"):
        pearson = float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 else math.nan
        spearman = float(np.corrcoef(rank_a, rank_b)[0, 1]) if len(a) > 1 else math.nan
    difference = rank_a - rank_b
    return Agreement(
        name=name,
        identity=other_corpus.manifest.identity,
        segments=int(both.sum()),
        threshold=other_threshold,
        pearson=pearson,
        spearman=spearman,
        both_bad=float((bad_a & bad_b).mean()),
        only_this=float((bad_a & ~bad_b).mean()),
        only_other=float((~bad_a & bad_b).mean()),
        this_worse=shown(np.argsort(-difference, kind="stable")[:8]),
        other_worse=shown(np.argsort(difference, kind="stable")[:8]),
    )


def _labelled(corpus: ScoredCorpus, table: Table, label: str) -> Labelled:
    """How well the scores find the documents that are labelled bad."""
    from phf.scorers.labels import FALSE, TRUE

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
        raise ConfigError(f"--label: no document's metadata has {label!r}{did_you_mean(label, fields)}")
    num_bad = int((value_D == 1).sum())
    num_good = int((value_D == 0).sum())
    if not num_bad or not num_good:
        raise ConfigError(f"--label {label}: {num_bad} bad and {num_good} good documents; both are needed")
    return Labelled(label, num_bad, num_good, _labelled_by(table.mean_D, value_D), _labelled_by(table.max_D, value_D))


def _labelled_by(score_D: np.ndarray, value_D: np.ndarray) -> LabelledBy:
    """Scores of documents against labels: 1 bad, 0 good, -1 without a label."""
    from sklearn.metrics import roc_auc_score

    from phf.scorers.fitting import THRESHOLDS

    use = (value_D >= 0) & ~np.isnan(score_D)
    bad = value_D[use] == 1
    score = score_D[use]
    levels = sorted({*THRESHOLDS, *np.quantile(score, [0.5, 0.75, 0.9, 0.95, 0.99]).tolist(), 0.0})
    at = []
    for level in levels:
        chosen = score > level
        precision = float(bad[chosen].mean()) if chosen.any() else None
        at.append(LabelledAt(level, precision, float(chosen[bad].mean()), float(chosen.mean())))
    return LabelledBy(float(roc_auc_score(bad, score)), at)
