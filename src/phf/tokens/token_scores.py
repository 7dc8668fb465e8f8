"""Scores of tokens, for scorers that say where in a text the faults are. A token that overlaps a fault has the score of
the fault: 1, or what a token classifier says. Any other has 0, and NaN in a segment that was not judged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phf.core import store
from phf.core.config import ConfigError
from phf.core.types import ScoredDocument, Span
from phf.data.scored import ScoredCorpus
from phf.scorers import GivenScores, Scorer
from phf.scorers.base import TextScorer
from phf.scoring.judge import scorer_of_data
from phf.tokens.tokenizer import encode_segments, segment_offsets


def scorer_with_places(corpus: ScoredCorpus, given: Scorer | None = None) -> Scorer:
    """The scorer of a corpus, if it reports the places of faults and needs no code or file; or the one that the user
    gives, if it is the corpus's. Raises ConfigError for any other."""
    name = corpus.preference or corpus.main
    if given is not None and given.identity() == corpus.manifest.identity and not isinstance(given, TextScorer):
        return given
    if corpus.manifest.scorer is None:
        raise ConfigError(f"the scores {name!r} came without their scorer, so there are no scores of tokens")
    scorer = scorer_of_data(corpus.manifest.scorer)
    if scorer.names or isinstance(scorer, TextScorer | GivenScores):
        raise ConfigError(
            f"the scorer of {name!r} ({corpus.manifest.identity['name']}) reports no places of faults; scores of "
            "tokens work with pii, pep8, regex, lexicon with words in its settings, and with token_classifier where "
            "the command names it (--scorer)"
        )
    return scorer


def token_scores(document: ScoredDocument, scorer: Scorer, tokenizer: Any) -> np.ndarray:
    """Score of each token of a document, float16."""
    spans = _spans(document, scorer)
    ids = encode_segments(tokenizer, list(document.texts))
    offsets = segment_offsets(tokenizer, list(document.texts))
    scores = []
    for n, (own, places) in enumerate(zip(ids, offsets, strict=True)):
        if math.isnan(document.scores[n]):
            scores.append(np.full(len(own), np.nan, np.float16))
            continue
        score = np.zeros(len(own), np.float16)
        if spans[n] and len(places) != len(own):  # typed names of special tokens are cut, so places are not known
            score[:] = max(span.score for span in spans[n])
        else:
            for span in spans[n]:
                here = np.array([a < span.end and b > span.start for a, b in places], bool)
                score[here] = np.maximum(score[here], np.float16(span.score))
        scores.append(score)
    return np.concatenate(scores) if scores else np.zeros(0, np.float16)


def _spans(document: ScoredDocument, scorer: Scorer) -> list[list[Span]]:
    """The faults in each segment, in characters of the segment."""
    if not scorer.judges_by_document:
        return [
            [] if math.isnan(score) else scorer.token_spans(text)
            for text, score in zip(document.texts, document.scores, strict=True)
        ]
    found = scorer.token_spans(document.text) if not all(map(math.isnan, document.scores)) else []
    per_segment: list[list[Span]] = []
    start = 0
    for text in document.texts:
        end = start + len(text)
        inside = [s for s in found if (s.start < end and s.end > start) or start <= s.start == s.end < end]
        per_segment.append(
            [Span(max(s.start - start, 0), max(s.end, s.start + 1) - start, s.label, s.score) for s in inside]
        )
        start = end
    return per_segment


def write_token_scores(
    corpus: ScoredCorpus, tokenizer: Any, file: Path, tokens: int, given: Scorer | None = None
) -> None:
    """Write the scores of all tokens of a corpus. Raises StoreError if there are not `tokens`. `given`: its scorer."""
    scorer = scorer_with_places(corpus, given)
    written = 0
    with store.written_aside(file) as aside, open(aside, "wb") as out:
        for part in corpus.files:
            for document in corpus.read(part):
                if isinstance(document, ScoredDocument):
                    scores = token_scores(document, scorer, tokenizer)
                    out.write(scores.tobytes())
                    written += len(scores)
        if written != tokens:
            raise store.StoreError(f"{corpus.path} gives {written:,} tokens, and the token store has {tokens:,}")


def names_with_places(corpus: ScoredCorpus, names: Sequence[str], given: Scorer | None = None) -> list[str]:
    """The preferences of a corpus whose scorers report places."""
    found = []
    for name in names:
        try:
            scorer_with_places(ScoredCorpus(corpus.path, name), given)
        except ConfigError:
            continue
        found.append(name)
    return found
