"""The interface of a scorer."""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

from phf.core.types import Identity, Span


class Scorer:
    """Interface. A subclass is a frozen dataclass; its fields are its settings.

    A scorer that counts (entities, violations, matches) implements `identity` and `spans`: its scores are spans per
    character. Any other scorer also overrides `score_text` and `judge_segments`, or derives from `TextScorer`.
    """

    @property
    def judges_code(self) -> bool:
        """Whether texts are Python code."""
        return False

    @property
    def finds_personal_data(self) -> bool:
        """Whether `spans` are personal data, which pages mask."""
        return False

    @property
    def names(self) -> dict[str, str]:
        """What the settings name outside of phf: code, files and models, by setting. Settings that stand in a manifest
        may come from others, so such names count only where the user gives them."""
        return {}

    @property
    def bad_above(self) -> float | None:
        """Scores above it are bad: 0 for scorers that count faults. None: the scorer does not know."""
        return 0.0

    @property
    def judges_by_document(self) -> bool:
        """Whether the score of a segment depends on the other segments of its document."""
        return type(self).judge_segments not in (Scorer.judge_segments, TextScorer.judge_segments)

    def identity(self) -> Identity:
        """Everything that decides a score: name, unit, versions, settings. Equal identities give equal scores."""
        raise NotImplementedError

    def spans(self, text: str) -> list[Span]:
        """The faults in `text`, in order of start. Raises an exception for a text that cannot be judged."""
        raise NotImplementedError

    def token_spans(self, text: str) -> list[Span]:
        """Spans with the scores of the tokens in them; tokens outside of all have the score 0."""
        return self.spans(text)

    def score_text(self, text: str) -> float:
        """Score of a whole text: spans per character. NaN for an empty text."""
        return len(self.spans(text)) / len(text) if text else math.nan

    def judge_segments(self, segments: Sequence[str]) -> tuple[list[float], Counter[str]]:
        """Scores of the segments of one document, and how often each kind of fault occurs in it."""
        found = [self.spans(segment) for segment in segments]
        scores = [len(f) / len(s) if s else math.nan for f, s in zip(found, segments, strict=True)]
        return scores, Counter(span.label for spans in found for span in spans)

    def score_segments(self, segments: Sequence[str]) -> list[float]:
        """Scores of the segments of one document."""
        return self.judge_segments(segments)[0]

    def judge_documents(self, documents: Sequence[Sequence[str]]) -> list[tuple[list[float], Counter[str]]]:
        """`judge_segments` of several documents. Scorers that are faster on many segments at once override it."""
        return [self.judge_segments(segments) for segments in documents]

    def without_cut(self, text: str) -> str:
        """The part of a truncated text without faults that the truncation caused: its complete lines."""
        return text[: text.rfind("\n") + 1]


class TextScorer(Scorer):
    """Interface of scorers that score each text by itself and have no spans. A subclass implements `identity` and
    `score_texts`."""

    def score_texts(self, texts: Sequence[str]) -> list[float]:
        """Scores of texts. No text is empty."""
        raise NotImplementedError

    def spans(self, text: str) -> list[Span]:
        return []

    def score_text(self, text: str) -> float:
        return self.score_texts([text])[0] if text else math.nan

    def judge_segments(self, segments: Sequence[str]) -> tuple[list[float], Counter[str]]:
        return self.judge_documents([segments])[0]

    def judge_documents(self, documents: Sequence[Sequence[str]]) -> list[tuple[list[float], Counter[str]]]:
        """All segments of all documents at once."""
        flat = [segment for segments in documents for segment in segments]
        judged = iter(self.score_texts([t for t in flat if t]))
        return [([next(judged) if t else math.nan for t in segments], Counter()) for segments in documents]


def scores_by_position(segments: Sequence[str], spans: Sequence[Span]) -> list[float]:
    """Scores of segments from spans of the joined text: spans that start in a segment, per character of the segment."""
    ends = list(accumulate(len(s) for s in segments))
    counts = [0] * len(segments)
    for span in spans:
        counts[min(bisect.bisect_right(ends, span.start), len(segments) - 1)] += 1
    return [count / len(segment) if segment else math.nan for count, segment in zip(counts, segments, strict=True)]
