"""The interface of a scorer. Floor 2."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from phf.core.types import Span


class Scorer:
    """Interface: configuration, identity and judgement in one frozen dataclass.

    A final class gives `identity` and `spans` (a counting scorer: entities, violations, matches; scores are counts per
    character); one that does not count overrides `score_text` and `judge_segments`.
    """

    def identity(self) -> dict[str, Any]:
        """Everything that decides a score: name, versions, settings, unit. Equal identities give equal scores."""
        raise NotImplementedError

    def spans(self, text: str) -> list[Span]:
        """What was found in `text`, in order of start. Raises on a text that cannot be judged."""
        raise NotImplementedError

    def score_text(self, text: str) -> float:
        """Score of a whole text: spans per character. An empty text cannot be judged (NaN)."""
        return len(self.spans(text)) / len(text) if text else float("nan")

    def judge_segments(self, segments: Sequence[str]) -> tuple[list[float], Counter[str]]:
        """Scores of the segments of one document, and how often each kind of fault was found in it."""
        found = [self.spans(segment) for segment in segments]
        scores = [len(f) / len(s) if s else float("nan") for f, s in zip(found, segments, strict=True)]
        return scores, Counter(span.label for spans in found for span in spans)

    def score_segments(self, segments: Sequence[str]) -> list[float]:
        """Scores of the segments of one document."""
        return self.judge_segments(segments)[0]

    def judge_documents(self, documents: Sequence[Sequence[str]]) -> list[tuple[list[float], Counter[str]]]:
        """`judge_segments` of several documents. Scorers that are quicker on many segments at once override it."""
        return [self.judge_segments(segments) for segments in documents]

    def without_cut(self, text: str) -> str:
        """The part of a text cut off at a length limit that carries no fault of the cut: its complete lines."""
        return text[: text.rfind("\n") + 1]


class TextScorer(Scorer):
    """Interface of scorers that judge every text by itself and point at nothing in it: a final class gives `identity`
    and `score_texts`."""

    def score_texts(self, texts: Sequence[str]) -> list[float]:
        """Scores of texts, none of them empty."""
        raise NotImplementedError

    def spans(self, text: str) -> list[Span]:
        return []

    def score_text(self, text: str) -> float:
        return self.score_texts([text])[0] if text else float("nan")

    def judge_segments(self, segments: Sequence[str]) -> tuple[list[float], Counter[str]]:
        return self.judge_documents([segments])[0]

    def judge_documents(self, documents: Sequence[Sequence[str]]) -> list[tuple[list[float], Counter[str]]]:
        """All segments of all documents at once."""
        flat = [segment for segments in documents for segment in segments]
        judged = iter(self.score_texts([t for t in flat if t]))
        return [([next(judged) if t else float("nan") for t in segments], Counter()) for segments in documents]


def scores_by_position(segments: Sequence[str], spans: Sequence[Span]) -> list[float]:
    """Spans of the joined text as scores of its segments: each span counts where it starts, per character there."""
    ends = list(accumulate(len(s) for s in segments))
    counts = [0] * len(segments)
    for span in spans:
        counts[min(bisect.bisect_right(ends, span.start), len(segments) - 1)] += 1
    return [count / len(segment) if segment else float("nan") for count, segment in zip(counts, segments, strict=True)]
