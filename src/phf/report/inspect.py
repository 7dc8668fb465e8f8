"""The page of `phf inspect`: what the scores of a corpus look like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from phf.core import folders, store
from phf.core.config import ConfigError
from phf.core.text import visible
from phf.data.scored import ScoredCorpus
from phf.report import plots
from phf.report.page import environment
from phf.scorers import Scorer
from phf.scorers.masking import mask, mask_links
from phf.scoring.inspect import inspect_scores
from phf.scoring.inspection import Agreement, ExampleLevel, Inspection, ShownDocument, ShownSegment
from phf.scoring.judge import scorer_for_pages
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
) -> tuple[Path, Inspection]:
    """Write `inspect.html` and `inspect.json` into the scored folder, or next to `out`, the page. Returns the page's
    path and the numbers. Personal data in texts are masked.

    Raises ConfigError if the folder is remote and `out` is None, and errors as `inspect_scores`.
    """
    target = page_of(scored, out, "inspect.html")
    tokens = None if tokens_dir is None else segment_tokens(scored, tokens_dir)
    scorers = masking_scorers(scored)
    found = masked(inspect_scores(scored, preference, threshold, label, tokens), scorers)
    page = environment().get_template("inspect.html.j2").render(**template_values(found, bool(scorers)))
    write_page(target, page, found)
    return target, found


def page_of(scored: str | Path, out: str | Path | None, name: str) -> Path:
    """Where the page about a scored corpus goes: `out`, else the file `name` in the corpus's folder. Raises ConfigError
    if that is no place for a page."""
    if out is None and not store.is_local(store.as_path(scored)):
        raise ConfigError(f"{scored} is not a local folder; give the page to write with --out")
    if store.as_path(scored).is_file():
        raise ConfigError(f"{scored} is a file; give its folder, and in it nothing but scored Parquet files")
    target = store.as_path(out if out is not None else store.as_path(scored) / name)
    if target.suffix == ".json":
        raise ConfigError(f"{target}: the page is HTML; the numbers go to a .json file next to it")
    return target


def write_page(target: Path, page: str, numbers: Any) -> None:
    """Write a page and its numbers as JSON next to it. Files that phf did not write are kept under another name."""
    if store.is_local(target) and not folders.is_our_page(target):
        for file in (target, target.with_suffix(".json")):
            if file.exists():
                folders.keep_old_file(file)
    store.write_json(target.with_suffix(".json"), numbers)
    store.write_text(target, page)


def segment_tokens(scored: str | Path, tokens_dir: str | Path) -> np.ndarray:
    """Tokens of each non-empty segment of a scored corpus [S]. Raises StoreError for the tokens of another corpus."""
    tokens = TokenStore.open(tokens_dir)
    if tokens.manifest.text != ScoredCorpus(scored).text:
        raise store.StoreError(f"{tokens_dir} holds the tokens of another corpus than {scored}")
    return np.diff(tokens.seg_ends, prepend=0)


# Masking


def masking_scorers(scored: str | Path) -> list[Scorer]:
    """The corpus's scorers that find personal data, whichever scores are shown. Raises ConfigError if one of
    them is not installed, so that nothing is shown unmasked."""
    scorers: list[Scorer] = []
    for name in ScoredCorpus(scored).preferences():
        scorer = scorer_for_pages(ScoredCorpus(scored, name).manifest.scorer)
        if scorer.finds_personal_data:
            scorer.identity()  # raises if something is missing
            scorers.append(scorer)
    return scorers


def masked(found: Inspection, scorers: Sequence[Scorer]) -> Inspection:
    """The same numbers with personal data masked in every text, and with long texts cut."""
    return replace(
        found,
        examples=[
            replace(level, documents=[_masked_document(d, scorers) for d in level.documents])
            for level in found.examples
        ],
        worst_segments=masked_segments(found.worst_segments, scorers),
        agreement=[masked_agreement(other, scorers) for other in found.agreement],
    )


def masked_segments(rows: Sequence[ShownSegment], scorers: Sequence[Scorer]) -> list[ShownSegment]:
    """The same segments with personal data masked, and cut if they are long."""
    return [replace(row, text=_masked_text(row.text, scorers)) for row in rows]


def masked_agreement(other: Agreement, scorers: Sequence[Scorer]) -> Agreement:
    return replace(
        other,
        this_worse=masked_segments(other.this_worse, scorers),
        other_worse=masked_segments(other.other_worse, scorers),
    )


def _masked_document(document: ShownDocument, scorers: Sequence[Scorer]) -> ShownDocument:
    shown = 0
    segments: list[tuple[str, float]] = []
    for text, score in document.segments:
        if shown >= SHOWN_CHARS:
            break
        segments.append((_masked_text(text, scorers)[: SHOWN_CHARS - shown], score))
        shown += len(text)
    return replace(document, segments=segments, cut=len(segments) < len(document.segments) or shown > SHOWN_CHARS)


def _masked_text(text: str, scorers: Sequence[Scorer]) -> str:
    for scorer in scorers:
        text = mask(text, scorer)
    return (mask_links(text) if scorers else text)[:SHOWN_CHARS]


# The page


@dataclass(frozen=True)
class ColouredDocument:
    """A document of the examples, as HTML."""

    id: str
    mean: float
    html: Markup


def template_values(found: Inspection, is_masked: bool) -> dict[str, Any]:
    """Everything that the template shows."""
    shown = [score for level in found.examples for d in level.documents for _, score in d.segments]
    positive = np.sort([score for score in shown if score > 0])
    unit = found.identity.get("unit", "score")
    return {
        "s": found,
        "name": store.as_path(found.scored).name,
        "masked": is_masked,
        "segment_plot": Markup(
            plots.histogram(found.segments.histogram, f"score of a segment ({unit})", found.threshold)
        ),
        "document_plot": Markup(
            plots.histogram(found.documents.histogram, "mean score of a document", found.suggested.filtering)
        ),
        "threshold_plot": Markup(plots.thresholds(found.thresholds)),
        "length_plot": Markup(plots.by_length(found.length)),
        "examples": [(level, _coloured_documents(level, positive)) for level in found.examples],
    }


def _coloured_documents(level: ExampleLevel, positive: np.ndarray) -> list[ColouredDocument]:
    return [ColouredDocument(d.id, d.mean, _coloured(d, positive)) for d in level.documents]


def _coloured(document: ShownDocument, positive: np.ndarray) -> Markup:
    """A document's segments as escaped HTML, each coloured by the rank of its score among `positive`, the sorted scores
    above 0."""
    pieces = []
    for text, score in document.segments:
        if np.isnan(score):
            pieces.append(Markup('<span class="seg none" title="not judged">{}</span>').format(visible(text)))
        elif score <= 0 or not len(positive):
            pieces.append(Markup("{}").format(visible(text)))
        else:
            heat = round(75 * float(np.searchsorted(positive, score, side="right")) / len(positive))
            span = Markup('<span class="seg" style="--h:{}" title="{}">{}</span>')
            pieces.append(span.format(heat, f"{score:.6g}", visible(text)))
    if document.cut:
        pieces.append(Markup(' <span class="soft">… (cut here)</span>'))
    return Markup("").join(pieces)
