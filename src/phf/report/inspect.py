"""The page of `phf inspect`: what the scores of a corpus look like. Floor 6."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from pydantic import TypeAdapter

from phf.core import store
from phf.core.config import ConfigError
from phf.data.scored import ScoredCorpus
from phf.report import plots
from phf.report.browser import mask, visible
from phf.report.page import environment
from phf.scorers import AnyScorer, Scorer
from phf.scoring.inspect import survey
from phf.tokens.store import TokenStore

SHOWN_CHARS = 4000
"""Characters of a document on the page."""


def write_inspection(
    scored: str | Path,
    out: str | Path | None = None,
    preference: str | None = None,
    threshold: float | None = None,
    label: str | None = None,
    tokens_dir: str | Path | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Write `inspect.html` and `inspect.json` (in the scored folder, unless `out` names the page) and return the page's
    path and the numbers."""
    if out is None and not store.is_local(store.as_path(scored)):
        raise ConfigError(f"{scored} is not a folder of this machine; say where the page goes with --out")
    lengths = None if tokens_dir is None else segment_tokens(scored, tokens_dir)
    found = survey(scored, preference, threshold, label, lengths)
    scorers = masking_scorers(scored)
    mask_texts(found, scorers)
    target = store.as_path(out if out is not None else store.as_path(scored) / "inspect.html")
    store.write_json(target.with_suffix(".json"), found)
    page = environment().get_template("inspect.html.j2").render(**context(found, bool(scorers)))
    store.write_text(target, page)
    return target, found


def segment_tokens(scored: str | Path, tokens_dir: str | Path) -> np.ndarray:
    """Tokens of every segment of a scored corpus, empty ones left out. Raises StoreError for another corpus's tokens."""
    tokens = TokenStore.open(tokens_dir)
    if tokens.manifest["text"] != ScoredCorpus(scored).text:
        raise store.StoreError(f"{tokens_dir} holds the tokens of another corpus than {scored}")
    return np.diff(tokens.seg_ends, prepend=0)


def masking_scorers(scored: str | Path) -> list[Scorer]:
    """The scorers of the corpus that find personal data, which must not stand on a page, whichever scores are shown.
    Raises ConfigError where one is not installed: nothing is shown unmasked."""
    scorers: list[Scorer] = []
    for name in ScoredCorpus(scored).preferences():
        config = ScoredCorpus(scored, name).manifest.get("scorer")
        if config is not None and config["name"] in ("pii", "presidio", "combination"):
            scorer: Scorer = TypeAdapter(AnyScorer).validate_python(config)
            scorer.identity()  # says what is missing
            scorers.append(scorer)
    return scorers


def mask_texts(found: dict[str, Any], scorers: Sequence[Scorer]) -> None:
    """Mask personal data in every text of a survey, and cut what is too long to look at."""

    def masked(text: str) -> str:
        for scorer in scorers:
            text = mask(text, scorer)
        return text[:SHOWN_CHARS]

    for level in found["examples"]:
        for document in level["documents"]:
            shown, segments = 0, []
            for text, score in document["segments"]:
                if shown >= SHOWN_CHARS:
                    break
                segments.append([masked(text)[: SHOWN_CHARS - shown], score])
                shown += len(text)
            document["cut"] = len(segments) < len(document["segments"]) or shown > SHOWN_CHARS
            document["segments"] = segments
    for row in found["worst_segments"]:
        row["text"] = masked(row["text"])
    for other in found["agreement"]:
        for row in other["this_worse"] + other["other_worse"]:
            row["text"] = masked(row["text"])


def context(found: dict[str, Any], masked: bool) -> dict[str, Any]:
    """Everything that the template shows."""
    positive = np.sort([s for level in found["examples"] for d in level["documents"] for _, s in d["segments"] if s])
    unit = found["identity"].get("unit", "score")
    segments, documents = found["segments"]["histogram"], found["documents"]["histogram"]
    return {
        "s": found,
        "masked": masked,
        "segment_plot": Markup(plots.histogram(segments, f"score of a segment ({unit})", found["threshold"])),
        "document_plot": Markup(
            plots.histogram(documents, "mean score of a document", found["suggested"]["filtering"])
        ),
        "threshold_plot": Markup(plots.thresholds(found["thresholds"])),
        "length_plot": Markup(plots.by_length(found["length"])),
        "examples": [
            {**level, "documents": [{**d, "html": _coloured(d, positive)} for d in level["documents"]]}
            for level in found["examples"]
        ],
    }


def _coloured(document: dict[str, Any], positive: np.ndarray) -> Markup:
    """A document's segments, each coloured by its score's rank among the scores above 0. All of it escaped."""
    pieces = []
    for text, score in document["segments"]:
        if score is None:
            pieces.append(Markup('<span class="seg none" title="not judged">{}</span>').format(visible(text)))
        elif score <= 0 or not len(positive):
            pieces.append(Markup("{}").format(visible(text)))
        else:
            heat = round(75 * float(np.searchsorted(positive, score, side="right")) / len(positive))
            pieces.append(
                Markup('<span class="seg" style="--h:{}" title="{}">{}</span>').format(
                    heat, f"{score:.6g}", visible(text)
                )
            )
    if document["cut"]:
        pieces.append(Markup(' <span class="soft">… (cut here)</span>'))
    return Markup("").join(pieces)
