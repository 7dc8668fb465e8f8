"""The page of `phf inspect`: what the scores of a corpus look like. Floor 6."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from pydantic import TypeAdapter

from phf import store
from phf.annotate import ScoredCorpus
from phf.config import ConfigError
from phf.report import environment, mask, plots, visible
from phf.scorers import AnyScorer, Scorer
from phf.survey import survey

SHOWN_CHARS = 4000
"""Characters of a document on the page."""


def write_inspection(
    scored: str | Path,
    out: str | Path | None = None,
    preference: str | None = None,
    threshold: float | None = None,
    label: str | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Write `inspect.html` and `inspect.json` (in the scored folder, unless `out` names the page) and return the page's
    path and the numbers."""
    found = survey(scored, preference, threshold, label)
    target = store.as_path(out if out is not None else store.as_path(scored) / "inspect.html")
    page = environment().get_template("inspect.html.j2").render(**context(scored, found))
    store.write_text(target, page)
    store.write_json(target.with_suffix(".json"), found)
    return target, found


def context(scored: str | Path, found: dict[str, Any]) -> dict[str, Any]:
    """Everything that the template shows."""
    corpus = ScoredCorpus(scored, found["preference"])
    scorer = _masking_scorer(corpus)
    positive = np.sort([s for level in found["examples"] for d in level["documents"] for _, s in d["segments"] if s])
    unit = found["identity"].get("unit", "score")

    def one(text: str) -> Markup:
        return Markup("{}").format(visible(_masked(text, scorer)[:SHOWN_CHARS]))

    return {
        "s": found,
        "masked": scorer is not None,
        "segment_plot": Markup(
            plots.histogram(found["segments"]["histogram"], f"score of a segment ({unit})", found["threshold"])
        ),
        "document_plot": Markup(
            plots.histogram(
                found["documents"]["histogram"], "mean score of a document", found["suggested"]["filtering"]
            )
        ),
        "threshold_plot": Markup(plots.thresholds(found["thresholds"])),
        "length_plot": Markup(plots.by_length(found["length"])),
        "examples": [
            {
                **level,
                "documents": [{**d, "html": _coloured(d["segments"], positive, scorer)} for d in level["documents"]],
            }
            for level in found["examples"]
        ],
        "worst": [{**row, "html": one(row["text"])} for row in found["worst_segments"]],
    } | _agreement(found, one)


def _agreement(found: dict[str, Any], one: Any) -> dict[str, Any]:
    for other in found["agreement"]:
        for key in ("this_worse", "other_worse"):
            other[key] = [{**row, "html": one(row["text"])} for row in other[key]]
    return {}


def _masking_scorer(corpus: ScoredCorpus) -> Scorer | None:
    """The corpus's scorer where it finds personal data, which must not stand on a page."""
    config = corpus.manifest.get("scorer")
    if config is None or config["name"] not in ("pii", "presidio", "combination"):
        return None
    try:
        scorer: Scorer = TypeAdapter(AnyScorer).validate_python(config)
        scorer.identity()
    except (ConfigError, ValueError):
        return None
    return scorer


def _masked(text: str, scorer: Scorer | None) -> str:
    return text if scorer is None else mask(text, scorer)


def _coloured(segments: Sequence[Sequence[Any]], positive: np.ndarray, scorer: Scorer | None) -> Markup:
    """A document's segments, each coloured by its score's rank among the scores above 0. All of it escaped."""
    pieces, shown = [], 0
    for text, score in segments:
        text = _masked(text, scorer)[: SHOWN_CHARS - shown]
        shown += len(text)
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
        if shown >= SHOWN_CHARS:
            pieces.append(Markup(' <span class="soft">… (cut here)</span>'))
            break
    return Markup("").join(pieces)
