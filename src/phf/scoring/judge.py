"""Run a scorer on documents: its failures become NaN and are counted, never a score."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import TypeAdapter

from phf.core import store
from phf.core.config import ConfigError, Plain
from phf.core.types import Identity, PhfError
from phf.data.scored import UNKNOWN_SCORER
from phf.scorers import AnyScorer, Scorer


class ScoringError(PhfError, RuntimeError):
    """Too much of the corpus could not be judged, or a worker died."""


@dataclass(frozen=True)
class Judged:
    """What a scorer says about one document."""

    scores: list[float]
    """One per segment; NaN: not judged."""
    failure: str | None = None
    """Why the scorer failed, if it did."""
    labels: Counter[str] = field(default_factory=Counter)
    """How often each kind of fault was found."""


def judge_documents(scorer: Scorer, documents: Sequence[Sequence[str]]) -> list[Judged]:
    """`judge` of several documents, all at once if the scorer is faster that way. If that fails, each document is
    judged by itself, so one document that cannot be judged does not affect the others."""
    if len(documents) > 1 and type(scorer).judge_documents is not Scorer.judge_documents:
        try:
            given = scorer.judge_documents(documents)
        except (KeyboardInterrupt, MemoryError, ConfigError):
            raise
        except Exception:
            given = None
        if given is not None:
            return [_checked(scores, labels, len(d)) for d, (scores, labels) in zip(documents, given, strict=True)]
    return [judge(scorer, segments) for segments in documents]


def judge(scorer: Scorer, segments: Sequence[str]) -> Judged:
    """Scores of a document's segments. Where the scorer raises an exception, all are NaN; an infinite score is NaN too.

    Only this function and `judge_documents` catch exceptions of a scorer. A mistake in the scorer's settings is raised.
    """
    try:
        scores, labels = scorer.judge_segments(segments)
    except (KeyboardInterrupt, MemoryError, ConfigError):
        raise
    except Exception as error:
        return Judged([math.nan] * len(segments), type(error).__name__)
    return _checked(scores, labels, len(segments))


def _checked(given: Sequence[float], labels: Counter[str], count: int) -> Judged:
    scores = [float(s) for s in given]
    if len(scores) != count:
        raise ScoringError(f"scorer returned {len(scores)} scores for {count} segments")
    if any(math.isinf(s) for s in scores):
        return Judged([math.nan if math.isinf(s) else s for s in scores], "infinite score", labels)
    return Judged(scores, "not a number" if any(map(math.isnan, scores)) else None, labels)


def judge_texts(scorer: Scorer, texts: Sequence[str]) -> list[float]:
    """Scores of whole texts. NaN for an empty text and where the scorer fails."""
    judged = judge_documents(scorer, [[text] if text else [] for text in texts])
    return [found.scores[0] if found.scores else math.nan for found in judged]


def corpus_scorer(settings: Plain | None, identity: Identity, allow_other: bool = False) -> Scorer:
    """The scorer of a corpus, as installed now. `settings` and `identity` come from the manifest of the corpus.

    Raises ConfigError if the corpus came without its scorer. Raises it too if the scorer would now judge
    differently (another version or setting), unless `allow_other`.
    """
    if settings is None:
        raise ConfigError(
            "the corpus came with scores but without its scorer; name one to judge samples with: phf eval --scorer pii"
        )
    scorer: Scorer = TypeAdapter(AnyScorer).validate_python(settings)
    check_identity(scorer, identity, allow_other)
    return scorer


def check_identity(scorer: Scorer, identity: Identity, allow_other: bool = False) -> None:
    """Raise ConfigError unless `scorer` is the one that scored the corpus. Scores of an unknown scorer pass:
    callers that name a scorer for them are responsible."""
    if identity == UNKNOWN_SCORER:
        return
    now = store.jsonable(scorer.identity())
    if now != identity and not allow_other:
        differs = [
            f"{k}: corpus {identity.get(k)!r}, now {now.get(k)!r}"
            for k in sorted(set(now) | set(identity))
            if now.get(k) != identity.get(k)
        ]
        raise ConfigError(
            f"this scorer is not the one that scored the corpus ({'; '.join(differs)}); to judge samples with it "
            "anyway, add --other-scorer to phf eval"
        )
