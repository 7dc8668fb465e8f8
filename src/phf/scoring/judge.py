"""Run a scorer on documents: its failures become NaN and are counted, never a score."""

from __future__ import annotations

import math
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from phf.core import store
from phf.core.config import ConfigError, Plain, validate
from phf.core.types import Identity, PhfError, Span
from phf.data.scored import UNKNOWN_SCORER
from phf.scorers import AnyScorer, Combination, GivenScores, Presidio, Scorer


class ScoringError(PhfError, RuntimeError):
    """Too much of the corpus could not be judged, or a worker died."""


SHOWN_CHARS = 60
"""Characters of a text and of a message in a report of a failure."""


@dataclass(frozen=True)
class Failure:
    """A segment that a scorer could not judge."""

    segment: int
    """Its number in the document; for scorers that judge whole documents, the first one."""
    reason: str
    """Name of the exception, "infinite score" or "not a number"."""
    message: str = ""
    """Message of the exception, and the line of code that raised it."""
    count: int = 1
    """Segments that were not judged for this reason."""


@dataclass(frozen=True)
class Judged:
    """What a scorer says about one document."""

    scores: list[float]
    """One per segment; NaN: not judged."""
    failures: tuple[Failure, ...] = ()
    """Why segments were not judged."""
    labels: Counter[str] = field(default_factory=Counter)
    """How often each kind of fault was found."""

    @property
    def failure(self) -> str | None:
        """Reason of the first failure."""
        return self.failures[0].reason if self.failures else None


def judge_documents(scorer: Scorer, documents: Sequence[Sequence[str]]) -> list[Judged]:
    """`judge` of several documents, all at once if the scorer is faster that way. If that fails, each document is
    judged by itself, so one document that cannot be judged does not affect the others."""
    if len(documents) > 1 and type(scorer).judge_documents is not Scorer.judge_documents:
        try:
            given = scorer.judge_documents(documents)
        except (KeyboardInterrupt, PhfError):
            raise
        except BaseException:  # each document by itself then
            given = None
        if given is not None:
            return [_checked(scores, labels, len(d)) for d, (scores, labels) in zip(documents, given, strict=True)]
    return [judge(scorer, segments) for segments in documents]


def judge(scorer: Scorer, segments: Sequence[str]) -> Judged:
    """Scores of a document's segments. Where the scorer raises an exception, each segment is judged by itself, and the
    score of one that fails is NaN; for scorers that judge whole documents all are NaN. An infinite score is NaN too.

    Only this function and `judge_documents` catch exceptions of a scorer. A mistake in the scorer's settings is raised.
    """
    try:
        scores, labels = scorer.judge_segments(segments)
    except (KeyboardInterrupt, PhfError):
        raise
    except BaseException as error:  # SystemExit too: a function must not end the command as if all were well
        if len(segments) == 1 or scorer.judges_by_document:
            failure = Failure(0, type(error).__name__, _message(error), len(segments))
            return Judged([math.nan] * len(segments), (failure,))
        return _joined([judge(scorer, [segment]) for segment in segments])
    return _checked(scores, labels, len(segments))


def _joined(parts: Sequence[Judged]) -> Judged:
    """Judgements of single segments as one of their document."""
    failures = tuple(replace(f, segment=n) for n, part in enumerate(parts) for f in part.failures)
    return Judged([part.scores[0] for part in parts], failures, sum((p.labels for p in parts), Counter[str]()))


def _message(error: BaseException) -> str:
    """The message of an exception and the line of code that raised it."""
    try:
        message = " ".join(str(error).split())[: 2 * SHOWN_CHARS]
    except Exception:  # the user's own exception, whose message fails
        message = ""
    message = message.encode("utf-8", "backslashreplace").decode()
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return message + "".join(f" ({Path(f.filename).name}, line {f.lineno})" for f in last)


def shown(text: str) -> str:
    """How a text starts, for a report of a failure."""
    return repr(text[:SHOWN_CHARS]) + ("..." if len(text) > SHOWN_CHARS else "")


LARGEST_SCORE = 3.4e38
"""Scores are stored as float32."""


def _checked(given: Sequence[float], labels: Counter[str], count: int) -> Judged:
    scores = [float(s) for s in given]
    if len(scores) != count:
        raise ScoringError(f"scorer returned {len(scores)} scores for {count} segments")
    failures = []
    scores = [math.inf if abs(s) > LARGEST_SCORE else s for s in scores]  # as they are stored, in float32
    for reason, found in (("infinite score", math.isinf), ("not a number", math.isnan)):
        places = [n for n, s in enumerate(scores) if found(s)]
        if places:
            failures.append(Failure(places[0], reason, count=len(places)))
    return Judged([math.nan if math.isinf(s) else s for s in scores], tuple(failures), labels)


def judge_texts(scorer: Scorer, texts: Sequence[str]) -> list[float]:
    """Scores of whole texts. NaN for an empty text and where the scorer fails."""
    judged = judge_documents(scorer, [[text] if text else [] for text in texts])
    return [found.scores[0] if found.scores else math.nan for found in judged]


def corpus_scorer(settings: Plain | None, identity: Identity, allow_other: bool = False) -> Scorer:
    """The scorer of a corpus, as installed now. `settings` and `identity` come from the manifest of the corpus.

    Raises ConfigError if the corpus came without its scorer, and for a scorer that needs code, a file or a model: a
    manifest may come from others, so the user must name them. Raises it too if the scorer would now judge differently
    (another version or setting), unless `allow_other`.
    """
    if settings is None:
        raise ConfigError(
            "the corpus came with scores but without its scorer; name one to judge samples with: phf eval --scorer pii"
        )
    scorer = scorer_of_data(settings)
    if isinstance(scorer, GivenScores):
        raise ConfigError(
            f"the corpus came with its scores ({scorer.source}), so nothing says how to judge samples; name a scorer "
            "with --scorer NAME --other-scorer"
        )
    if scorer.names:
        named = " ".join(f"scorer.{key}={value}" for key, value in scorer.names.items())
        raise ConfigError(
            f"the corpus's scorer, {settings['name']}, needs what only a manifest names ({named}). Manifests may come "
            "from others, so phf takes no code, file or model from them: give the scorer yourself, with "
            f"--scorer {settings['name']} and its scorer.* settings"
        )
    check_identity(scorer, identity, allow_other)
    return scorer


def scorer_of_data(settings: Plain) -> Scorer:
    """The scorer that settings in a manifest or a result describe. It is not used yet: see `Scorer.names`. Raises
    ConfigError for settings that are none of a scorer of phf."""
    scorer: Scorer = validate(settings, AnyScorer, "the manifest", prefix="scorer")
    return scorer


def scorer_for_pages(settings: Plain | None, given: Scorer | None = None) -> Scorer:
    """The scorer that marks and masks texts on a page: the one that the user names, else the one of the data, without
    those of its parts that name code, files or models. Nothing is marked if nothing is left."""
    if given is not None:
        return given
    try:
        scorer = scorer_of_data(settings or {})
    except ConfigError:  # a user's own class
        return Unavailable()
    usable = [part for part in _parts(scorer) if not part.names]
    if len(usable) < 2:
        return usable[0] if usable else Unavailable()
    return scorer if not scorer.names else Combination(tuple(usable))  # type: ignore[arg-type]


def _parts(scorer: Scorer) -> Sequence[Scorer]:
    """The scorers of a combination. Of Presidio with a model the part that needs none."""
    if isinstance(scorer, Combination):
        return [part for each in scorer.scorers for part in _parts(each)]
    return [replace(scorer, spacy_model=None)] if isinstance(scorer, Presidio) and scorer.names else [scorer]


class Unavailable(Scorer):
    """In the place of a scorer that only a manifest names: it marks nothing."""

    def identity(self) -> Identity:
        return UNKNOWN_SCORER

    def spans(self, text: str) -> list[Span]:
        return []


def is_same_scorer(scorer: Scorer, identity: Identity) -> bool:
    """Whether a scorer gives the scores of a corpus whose manifest has this identity."""
    same: bool = store.jsonable(scorer.identity()) == identity
    return same


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
            "anyway, add --other-scorer"
        )
