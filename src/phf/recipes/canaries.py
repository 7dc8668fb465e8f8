"""Whether a recipe's canaries are what their templates say: good and bad to its scorer."""

from __future__ import annotations

from collections.abc import Sequence

from phf.core import folders, store
from phf.core.config import ConfigError
from phf.core.types import ScoredDocument
from phf.data.canaries import MARK, Canaries, Canary
from phf.data.scored import ScoredCorpus
from phf.recipes.recipe import Recipe
from phf.scorers import GivenScores
from phf.scoring.judge import judge_texts
from phf.tokens.store import TokenStore


def check_canaries(recipe: Recipe, canaries: Canaries) -> None:
    """Raise ConfigError unless the scorer calls canaries by themselves good and bad as their templates say, as far as
    its threshold is known before scoring."""
    if isinstance(recipe.scorer, GivenScores):
        raise ConfigError("canaries have no scores, so they do not go with the scorer 'given'")
    limit = recipe.scorer.bad_above if recipe.threshold is None else recipe.threshold
    made = canaries.made()
    if limit is not None:
        scores = judge_texts(recipe.scorer, [canary.text for canary in made])
        _compare_kinds([(canary, score) for canary, score in zip(made, scores, strict=True)], limit)


def check_placed_canaries(recipe: Recipe, canaries: Canaries) -> None:
    """Raise ConfigError unless the segments of the scored corpus that hold canaries are good and bad as these are: a
    segmenter may join them with other text."""
    tokens = TokenStore.open(recipe.files.tokens)
    limit = tokens.bad_above if recipe.threshold is None else recipe.threshold

    def compare() -> dict[str, int]:
        by_text = {canary.text.rstrip("\n"): canary for canary in canaries.made()}
        found = []
        corpus = ScoredCorpus(recipe.files.scored)
        for file in corpus.files:
            for document in corpus.read(file):
                if isinstance(document, ScoredDocument) and MARK in document.meta:
                    for text, score in zip(document.texts, document.scores, strict=True):
                        lines = dict.fromkeys(text.split("\n"))
                        found += [(by_text[line], score) for line in lines if line in by_text]
        _compare_kinds(found, limit)
        return {"copies": len(found)}

    folders.cached(
        recipe.files.cache / "canaries.json", store.fingerprint([tokens.manifest.content, limit]), dict, compare
    )


def _compare_kinds(found: Sequence[tuple[Canary, float]], limit: float) -> None:
    """Raise ConfigError if the score of some canary, or of its segment, is on the other side of the threshold than its
    kind, or missing."""
    for kind in dict.fromkeys(canary.kind for canary, _ in found):
        scores = [(canary, score) for canary, score in found if canary.kind == kind]
        wrong = [canary for canary, score in scores if not (score > limit if kind == "bad" else score <= limit)]
        if wrong:
            raise ConfigError(
                f"{kind}: the scorer does not call {len(wrong)} of {len(scores)} {kind} canaries {kind}, or not the "
                f"segments that hold them, such as {wrong[0].text.strip()!r} (threshold {limit:g}): give another "
                f"template, a segmenter that cuts lines, or {kind}=null for none"
            )
