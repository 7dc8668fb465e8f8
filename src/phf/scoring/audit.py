"""Audit a scorer: how right it is on its own corpus, measured with labels of some of the corpus's segments.

    phf audit scored/ labels.jsonl

The corpus's segments are divided into strata by their score. In each stratum, the labelled segments estimate the share
of bad text. Weighted by the sizes of the strata in the corpus, these shares give precision and recall at any threshold
(the post-stratified estimator of Cochran, Sampling Techniques, 1977, section 5A.9). So the labelled segments may be
drawn evenly by score, where a uniform sample would hold hardly any bad text. Within a stratum they must be drawn
without regard to anything else.

Intervals are quantiles of draws from the posterior distribution of the shares. For two strata the prior is Jeffreys'
(Brown, Cai and DasGupta, Statistical Science 16, 2001); more strata divide the weight of two such priors among them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from phf.core.config import ConfigError
from phf.core.statistics import auc, krippendorff_alpha, weighted_share
from phf.core.types import Estimate, Identity, Number, Rejected
from phf.data.scored import ScoredCorpus, natural_threshold
from phf.scorers.fitted import seen_hash, seen_texts
from phf.scorers.labels import Labels
from phf.scoring.inspect import agreement
from phf.scoring.inspection import Agreement, ShownSegment
from phf.scoring.strata import Stratum, divided_strata, strata_of, stratum_edges, weighted
from phf.scoring.table import Table

SHOWN = 10
"""False alarms and misses that are shown."""


@dataclass(frozen=True)
class AuditedThreshold:
    """What a threshold does to the corpus's segments, if the labels are right."""

    threshold: float
    """Scores above it are called bad."""
    called_bad: float
    """Share of the segments above the threshold."""
    precision: Estimate
    """Share of bad segments among those above the threshold."""
    recall: Estimate
    """Share of the bad segments that is above the threshold."""
    clean_discarded: Estimate
    """Share of the good segments that is above the threshold."""
    bad_kept: Estimate
    """Share of the bad segments that is not above the threshold."""


@dataclass(frozen=True)
class Quadrant:
    """Segments of the corpus by what two scorers call them."""

    this_bad: bool
    """Whether the audited scorer calls them bad."""
    other_bad: bool
    """Whether the other scorer does."""
    segments: int
    """Segments of the corpus that both scorers judged."""
    labelled: int
    """Of these, segments with a label."""
    share: Estimate
    """Share of bad segments among the labelled ones."""


@dataclass(frozen=True)
class SecondScorer:
    """Another scorer of the same corpus, measured with the same labels."""

    agreement: Agreement
    """Where the two differ, whatever the labels."""
    auc: Number
    """Area under the ROC curve on the labelled segments, not weighted."""
    auc_ci95: tuple[Number, Number]
    """Its 95% interval."""
    quadrants: list[Quadrant]
    """What both scorers call each segment."""
    at: AuditedThreshold
    """At the other scorer's own threshold."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """`audit.json`: how right a scorer is on its corpus."""

    scored: str
    """The scored corpus."""
    preference: str
    """Name of the scores."""
    identity: Identity
    """What decides a score."""
    labels: str
    """The file of labels."""
    judges: list[str] = field(default_factory=list)
    """Who labelled, as far as the labels say."""
    segments: int
    """Judged segments of the corpus."""
    labelled: int
    """Different segments with a label and a score."""
    bad: int
    """Of these, segments that are labelled bad."""
    left_out: dict[str, int]
    """Labels without use, by reason."""
    alpha: Number
    """Krippendorff's alpha of texts that were labelled several times: 1 is agreement, 0 is chance."""
    bad_share: Estimate
    """Share of the corpus's segments that is bad."""
    threshold: float
    """The threshold of this audit."""
    auc: Number
    """Area under the ROC curve on the labelled segments, not weighted."""
    auc_ci95: tuple[Number, Number]
    """Its 95% interval."""
    strata: list[Stratum]
    """From the lowest scores to the highest."""
    at: list[AuditedThreshold]
    """At the ends of the strata, in order; one of them is `threshold`."""
    false_alarms: list[ShownSegment]
    """Segments above the threshold that are labelled good, the highest score first."""
    misses: list[ShownSegment]
    """Other segments that are labelled bad, the lowest score first."""
    others: list[SecondScorer]
    """The corpus's other scores."""
    not_compared: list[str]
    """Other scores on which the labels say nothing: all are on one side of their threshold, or of one class."""

    @property
    def main(self) -> AuditedThreshold:
        """What the threshold of this audit does."""
        return next(row for row in self.at if row.threshold == self.threshold)


@dataclass(frozen=True)
class _Labelled:
    """A labelled text of the corpus: its first place, its score there by each of the scorers, and whether it is bad."""

    id: str
    text: str
    scores: tuple[float, ...]
    bad: bool
    times: int
    """How often the text occurs."""
    weight: float
    """How many texts it stands for; 1 where the labels have no weights."""


def audit(scored: str | Path, labels: Labels, preference: str | None = None, threshold: float | None = None) -> Audit:
    """Measure the scores of a corpus with labels of its segments.

    A label belongs to the segments with the same text, apart from spaces at the ends. `threshold`: scores above it are
    bad (default: the scorer's own). Raises ConfigError if no labelled text is a segment of the corpus, if all are of
    one class, or if no labelled segment is on one side of the threshold.
    """
    corpus = ScoredCorpus(scored, preference)
    table = Table(corpus)
    judged_S = table.score_S[~np.isnan(table.score_S) & (table.chars_S > 0)].astype(np.float64)
    if not len(judged_S):
        raise ConfigError(f"{scored} holds no judged segment")
    limit = _float32(natural_threshold(corpus.manifest, judged_S) if threshold is None else threshold)
    own = corpus.preference or corpus.main
    names = [name for name in corpus.preferences() if name != own]
    readers = [corpus, *(ScoredCorpus(scored, name) for name in names)]
    bad_of, left_out, alpha = _one_label_each(labels)
    weight_of: dict[str, float] = {}
    if labels.weight_N is not None:
        weight_of = {text.strip(): float(w) for text, w in zip(labels.texts, labels.weight_N, strict=True)}
    found = _matched(readers, bad_of, weight_of)
    left_out["not a segment of the corpus"] = len(bad_of) - len(found)
    seen = [seen_texts(reader.manifest.scorer) for reader in readers]
    unseen = [x for x in found if seen_hash(x.text) not in seen[0]]
    left_out["seen by the scorer when it was fitted"] = len(found) - len(unseen)
    kept = [x for x in unseen if math.isfinite(x.scores[0])]
    left_out["not judged by the scorer"] = len(unseen) - len(kept)
    if found and not unseen:
        raise ConfigError(f"{labels.source}: the scorer of {scored} was fitted to all of these texts; label others")
    if not kept:
        raise ConfigError(
            f"{labels.source}: none of the {len(bad_of):,} labelled texts is a judged segment of {scored}; labels are "
            "matched by their whole text"
        )
    score_N = np.array([x.scores[0] for x in kept])
    bad_N = np.array([x.bad for x in kept])
    if bad_N.all() or not bad_N.any():
        raise ConfigError(
            f"{labels.source}: all {len(kept)} labelled segments of {scored} are {'bad' if bad_N.all() else 'good'}; "
            "both classes are needed"
        )
    edges = stratum_edges(score_N, limit, labels.source)
    weight_N = None if labels.weight_N is None else np.array([x.weight for x in kept])
    strata = strata_of(judged_S, score_N, bad_N, np.array([x.times for x in kept]), edges, weight_N)
    area = auc(score_N, bad_N)
    seconds = {
        name: _second(
            readers,
            n,
            table,
            limit,
            edges,
            [x for x in kept if seen_hash(x.text) not in seen[n]],
            labels.weight_N is not None,
        )
        for n, name in enumerate(names, 1)
    }
    alarms = sorted((x for x in kept if x.scores[0] > limit and not x.bad), key=lambda x: -x.scores[0])
    misses = sorted((x for x in kept if x.scores[0] <= limit and x.bad), key=lambda x: x.scores[0])
    return Audit(
        scored=str(scored),
        preference=own,
        identity=corpus.manifest.identity,
        labels=labels.source,
        judges=list(labels.judges),
        segments=len(judged_S),
        labelled=len(kept),
        bad=int(bad_N.sum()),
        left_out={reason: count for reason, count in left_out.items() if count},
        alpha=alpha,
        bad_share=weighted(strata, [True] * len(strata))[0],
        threshold=limit,
        auc=area.auc,
        auc_ci95=area.ci95,
        strata=strata,
        at=[_at(strata, edges, edge) for edge in edges],
        false_alarms=[ShownSegment(x.id, x.text, x.scores[0]) for x in alarms[:SHOWN]],
        misses=[ShownSegment(x.id, x.text, x.scores[0]) for x in misses[:SHOWN]],
        others=[other for other in seconds.values() if other is not None],
        not_compared=[name for name, other in seconds.items() if other is None],
    )


def _one_label_each(labels: Labels) -> tuple[dict[str, bool], Counter[str], float]:
    """(label of each different text, labels without use by reason, alpha of repeated labels)."""
    given: dict[str, list[bool]] = {}
    for text, bad in zip(labels.texts, labels.bad_N.tolist(), strict=True):
        given.setdefault(text.strip(), []).append(bad)
    left_out = Counter(labels.rejected)
    left_out["another label of the same text"] = len(labels.texts) - len(given)
    found = {}
    for text, votes in given.items():
        if 2 * sum(votes) == len(votes):
            left_out["as many labels bad as good"] += 1
        else:
            found[text] = 2 * sum(votes) > len(votes)
    return found, left_out, krippendorff_alpha(list(given.values()))


def _matched(readers: Sequence[ScoredCorpus], bad_of: dict[str, bool], weight_of: dict[str, float]) -> list[_Labelled]:
    """The labelled texts that are segments of the corpus. `readers`: the corpus with each of its scores, which count as
    float32, like everywhere else."""
    first: dict[str, tuple[str, str, tuple[float, ...]]] = {}
    times: Counter[str] = Counter()
    for file in readers[0].files:
        for row in zip(*(reader.read(file) for reader in readers), strict=True):
            documents = [document for document in row if not isinstance(document, Rejected)]
            if len(documents) < len(row):
                continue
            for place, text in enumerate(documents[0].texts):
                key = text.strip()
                if key in bad_of:
                    times[key] += 1
                    if key not in first:
                        first[key] = (documents[0].id, text, tuple(_float32(d.scores[place]) for d in documents))
    return [
        _Labelled(*found, bad_of[key], times[key], weight_of.get(key, float(times[key])) / times[key])
        for key, found in first.items()
    ]


def _float32(score: float) -> float:
    """A score as `Table` holds it. Infinite beyond the range."""
    with np.errstate(over="ignore"):
        return float(np.float32(score))


def _at(strata: Sequence[Stratum], edges: Sequence[float], threshold: float) -> AuditedThreshold:
    return _when_called(strata, [number > edges.index(threshold) for number in range(len(strata))], threshold)


def _when_called(strata: Sequence[Stratum], called_bad: Sequence[bool], threshold: float) -> AuditedThreshold:
    """What a scorer does that calls the segments of some strata bad."""
    precision, recall, discarded = weighted(strata, called_bad)
    low, high = recall.ci95
    above = sum(stratum.segments for stratum, is_bad in zip(strata, called_bad, strict=True) if is_bad)
    return AuditedThreshold(
        threshold=threshold,
        called_bad=above / sum(stratum.segments for stratum in strata),
        precision=precision,
        recall=recall,
        clean_discarded=discarded,
        bad_kept=replace(recall, mean=1 - recall.mean, ci95=(1 - high, 1 - low)),
    )


def _second(
    readers: Sequence[ScoredCorpus],
    number: int,
    table: Table,
    threshold: float,
    edges: Sequence[float],
    kept: Sequence[_Labelled],
    weighs: bool,
) -> SecondScorer | None:
    """The scores of one of `readers` with the same labels; None where the labels do not reach both sides of its
    threshold, or are of one class."""
    other = Table(readers[number])
    judged_S = ~np.isnan(table.score_S) & ~np.isnan(other.score_S) & (table.chars_S > 0)
    if not judged_S.any():
        return None
    both = agreement(readers[0], table, readers[number], other, threshold)
    limit = _float32(both.threshold)
    here = [x for x in kept if math.isfinite(x.scores[number])]
    bad_N = np.array([x.bad for x in here], bool)
    times_N = np.array([x.times for x in here])
    weight_N = np.array([x.weight for x in here])
    first_N = np.array([x.scores[0] for x in here])
    called_N = np.array([x.scores[number] > limit for x in here], bool)
    if called_N.all() or not called_N.any() or bad_N.all() or not bad_N.any():
        return None
    first_S = table.score_S[judged_S].astype(np.float64)
    called_S = other.score_S[judged_S] > limit
    quadrants = []
    for this_bad in (True, False):
        for other_bad in (True, False):
            chosen_N = ((first_N > threshold) == this_bad) & (called_N == other_bad)
            share, _ = weighted_share(bad_N[chosen_N], weight_N[chosen_N] if weighs else None)
            size = int((((first_S > threshold) == this_bad) & (called_S == other_bad)).sum())
            quadrants.append(Quadrant(this_bad, other_bad, size, int(chosen_N.sum()), share))
    strata = [
        divided_strata(
            edges,
            first_S[called_S == c],
            first_N[here_N],
            bad_N[here_N],
            times_N[here_N],
            weight_N[here_N] if weighs else None,
        )
        for c in (False, True)
        for here_N in [called_N == c]
    ]
    called_bad = [is_bad for is_bad, part in zip((False, True), strata, strict=True) for _ in part]
    area = auc(np.array([x.scores[number] for x in here]), bad_N)
    return SecondScorer(both, area.auc, area.ci95, quadrants, _when_called([*strata[0], *strata[1]], called_bad, limit))
