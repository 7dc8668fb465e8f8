"""TODO."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter

from phf.core import store
from phf.core.config import ConfigError
from phf.scorers import AnyScorer, Scorer


class ScoringError(RuntimeError):
    """Too much of the corpus could not be judged, or a worker died."""


def judge_documents(
    scorer: Scorer, documents: Sequence[Sequence[str]]
) -> list[tuple[list[float], str | None, Counter[str]]]:
    """`judge` of several documents, all at once where the scorer is quicker so. Where that fails, each by itself, so that
    one document that cannot be judged does not take others with it."""
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


def judge(scorer: Scorer, segments: Sequence[str]) -> tuple[list[float], str | None, Counter[str]]:
    """Scores of a document's segments, why it failed if it did (then all are NaN), and the kinds of faults found.
    Infinite scores are failures.

    This and `judge_documents` are the places where a scorer's exception is caught: it becomes NaN and a counted reason,
    never a score. A mistake in the scorer's settings is raised.
    """
    try:
        scores, labels = scorer.judge_segments(segments)
    except (KeyboardInterrupt, MemoryError, ConfigError):
        raise
    except Exception as error:
        return [math.nan] * len(segments), type(error).__name__, Counter()
    return _checked(scores, labels, len(segments))


def _checked(given: Sequence[float], labels: Counter[str], count: int) -> tuple[list[float], str | None, Counter[str]]:
    scores = [float(s) for s in given]
    if len(scores) != count:
        raise ScoringError(f"scorer gave {len(scores)} scores for {count} segments")
    if any(math.isinf(s) for s in scores):
        return [math.nan if math.isinf(s) else s for s in scores], "infinite score", labels
    return scores, "not a number" if any(math.isnan(s) for s in scores) else None, labels


def corpus_scorer(manifest: dict[str, Any], allow_other: bool = False) -> Scorer:
    """The scorer that scored the corpus behind a manifest, as installed now.

    Raises ConfigError if it would judge differently (another version or setting) unless `allow_other`.
    """
    if manifest.get("scorer") is None:
        raise ConfigError(
            "the corpus came with scores but without its scorer; name one to judge samples with: phf eval --scorer pii"
        )
    scorer: Scorer = TypeAdapter(AnyScorer).validate_python(manifest["scorer"])
    check_identity(scorer, manifest["identity"], allow_other)
    return scorer


def check_identity(scorer: Scorer, identity: dict[str, Any], allow_other: bool = False) -> None:
    """Raise ConfigError unless `scorer` is the one that scored the corpus."""
    if identity == {"name": "unknown"}:  # scores from elsewhere: whoever names a scorer answers for it
        return
    now = store.jsonable(scorer.identity())
    if now != identity and not allow_other:
        differs = [
            f"{k}: corpus {identity.get(k)!r}, now {now.get(k)!r}"
            for k in sorted(set(now) | set(identity))
            if now.get(k) != identity.get(k)
        ]
        raise ConfigError(
            "samples would be judged by another scorer than the corpus ("
            + "; ".join(differs)
            + "); phf eval --other-scorer allows it"
        )
