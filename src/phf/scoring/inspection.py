"""`inspect.json`: what `phf inspect` reports about the scores of a corpus."""

from __future__ import annotations

from dataclasses import dataclass, field

from phf.core.types import Identity, Number


@dataclass(frozen=True)
class InspectedCounts:
    documents: int
    """Documents."""
    segments: int
    """Segments."""
    chars: int
    """Characters."""
    unjudged_segments: int
    """Segments that were not judged."""
    unjudged_documents: int
    """Documents without a judged segment."""


@dataclass(frozen=True)
class Histogram:
    """Counts of scores above 0. `log`: the bins are equal steps of the logarithm."""

    edges: list[float]
    """Edges of the bins."""
    counts: list[int]
    """Scores in each bin."""
    log: bool
    """Whether the bins are equal on a logarithmic scale."""


@dataclass(frozen=True)
class Distribution:
    """Scores of segments, or mean scores of documents."""

    n: int
    """Number of scores."""
    mean: float
    """Their mean."""
    zero: float
    """Share of exact zeros."""
    quantiles: dict[str, float]
    """Their quantiles."""
    histogram: Histogram
    """Counts of the scores above 0."""


@dataclass(frozen=True)
class ThresholdEffect:
    """What a threshold calls bad. Segments that were not judged count as bad, as in training."""

    threshold: float
    """Scores above it are bad."""
    bad_segments: float
    """Share of the segments."""
    bad_chars: float
    """Share of the characters in bad segments."""
    bad_tokens: float | None
    """Share of the tokens; null without a token store."""
    documents_with_bad: float
    """Share of the documents with a bad segment."""
    documents_kept_by_filtering: float
    """Share of the judged documents that filtering keeps."""


@dataclass(frozen=True)
class Suggested:
    """Suggested thresholds."""

    filtering: float
    """Median of the documents' mean scores, the paper's rule."""
    conditional: float
    """The scorer's own threshold; where it has none, a guess from the scores."""
    control_tokens: dict[str, list[float]]
    """By number of control tokens: cuts into equal shares of the segments. If zeros are more than one share, the first
    cut is 0."""


@dataclass(frozen=True)
class LengthBin:
    """A tenth of the judged segments, by length."""

    chars_from: int
    """Shortest segment of the bin, in characters."""
    chars_to: int
    """Longest segment of the bin, in characters."""
    n: int
    """Number of segments."""
    mean: float
    """Their mean score."""
    bad: float
    """Share above the threshold."""


@dataclass(frozen=True)
class ShownDocument:
    id: str
    """Id of the document."""
    mean: float
    """Mean score of its segments."""
    segments: list[tuple[str, Number]]
    """(text, score); NaN: not judged."""
    cut: bool = False
    """Whether only the beginning is kept."""


@dataclass(frozen=True)
class ExampleLevel:
    """Documents at a quantile of the documents' mean scores."""

    level: float
    """The quantile, from 0 to 1."""
    mean: float
    """The mean score at this quantile."""
    documents: list[ShownDocument]
    """Documents with a mean score near it."""


@dataclass(frozen=True)
class ShownSegment:
    """A segment with its score. `other`: its score by another scorer."""

    id: str
    """Id of the document."""
    text: str
    """The segment."""
    score: float
    """Its score."""
    other: float | None = None
    """Its score by the other scorer, if there is one."""


@dataclass(frozen=True)
class NearSegment:
    """A segment near a threshold."""

    id: str
    """Id of its document."""
    text: str
    """The segment."""
    score: float
    """Its score."""
    finds: list[tuple[int, int, str]] = field(default_factory=list)
    """(start, end, kind) of what the scorer found in it, if it says so."""


@dataclass(frozen=True)
class Around:
    """The different segments next to a threshold, nearest first, as places in `near`."""

    threshold: float
    """Scores above it are bad."""
    above: list[int]
    """Segments just above it."""
    below: list[int]
    """Segments just not above it."""


@dataclass(frozen=True)
class Agreement:
    """How two scorers agree on the segments that both judged. Shares are of these segments."""

    name: str
    """The other scores."""
    identity: Identity
    """Identity of the other scorer."""
    segments: int
    """Segments that both judged."""
    threshold: float
    """Of the other scores."""
    pearson: Number
    """Correlation of the scores."""
    spearman: Number
    """Correlation of the ranks."""
    both_bad: float
    """Segments that both call bad."""
    only_this: float
    """Segments that only this scorer calls bad."""
    only_other: float
    """Segments that only the other scorer calls bad."""
    this_worse: list[ShownSegment]
    """Segments that this scorer ranks much worse."""
    other_worse: list[ShownSegment]
    """Segments that the other scorer ranks much worse."""


@dataclass(frozen=True)
class LabelledAt:
    """How documents above a threshold match their labels."""

    threshold: float
    """Scores above it are bad."""
    precision: float | None
    """Share of bad labels among the documents above it."""
    recall: float
    """Share of the bad labels that are above it."""
    share: float
    """Share of the documents above it."""


@dataclass(frozen=True)
class LabelledBy:
    """How well one number per document finds the documents that are labelled bad."""

    auc: float
    """Area under the ROC curve."""
    at: list[LabelledAt]
    """Precision and recall at thresholds."""


@dataclass(frozen=True)
class Labelled:
    """Scores against a label in the documents' metadata."""

    field: str
    """The field with the label."""
    bad: int
    """Documents with a bad label."""
    good: int
    """Documents with a good label."""
    mean: LabelledBy
    """By the document's mean score."""
    worst_segment: LabelledBy
    """By the score of the document's worst segment."""


@dataclass(frozen=True)
class Inspection:
    """`inspect.json`: what `phf inspect` reports."""

    scored: str
    """The scored corpus."""
    preference: str
    """Name of the scores."""
    preferences: list[str]
    """Names of all scores of the corpus."""
    identity: Identity
    """Identity of the scorer."""
    counts: InspectedCounts
    """Sizes of the corpus."""
    rejected: dict[str, int]
    """Rows that could not become documents, by reason."""
    failures: dict[str, int]
    """Documents on which the scorer failed, by reason."""
    labels: dict[str, int]
    """Kinds of faults."""
    threshold: float
    """Scores above it are bad."""
    segments: Distribution
    """Scores of the segments."""
    documents: Distribution
    """Mean scores of the documents."""
    thresholds: list[ThresholdEffect]
    """What other thresholds would change."""
    suggested: Suggested
    """Suggested thresholds."""
    length: list[LengthBin]
    """Mean score by length of the segment."""
    examples: list[ExampleLevel]
    """Documents at quantiles of the documents' mean scores."""
    worst_segments: list[ShownSegment]
    """Segments with the highest scores."""
    agreement: list[Agreement]
    """Agreement with each of the other scores of the corpus."""
    labelled: Labelled | None
    """Agreement with labels in the documents; null without labels."""
    near: list[NearSegment] = field(default_factory=list)
    """Segments near the thresholds."""
    around: list[Around] = field(default_factory=list)
    """For each of `thresholds`, the segments next to it."""
