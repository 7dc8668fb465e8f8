"""The page of `phf inspect`: what the scores of a corpus look like."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from phf.core import folders, store
from phf.core.config import ConfigError, Plain
from phf.core.text import visible
from phf.data.scored import ScoredCorpus
from phf.report import plots
from phf.report.page import environment, page_script, script_digest, script_json
from phf.scorers import Scorer
from phf.scorers.masking import find_spans, mask, mask_links
from phf.scoring.inspect import inspect_scores
from phf.scoring.inspection import Agreement, ExampleLevel, Inspection, NearSegment, ShownDocument, ShownSegment
from phf.scoring.judge import scorer_for_pages
from phf.tokens.store import TokenStore

SHOWN_CHARS = 4000
"""Characters of a document on the page."""
NEAR_CHARS = 600
"""Characters of a segment near a threshold."""
MASKED = re.compile(r"\S*•\S*")
"""Personal data that is masked."""


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
    found = inspect_scores(scored, preference, threshold, label, tokens)
    finder = scorer_for_pages(ScoredCorpus(scored, preference).manifest.scorer)
    found = masked(found, scorers, finder)
    shown = template_values(found, bool(scorers), finder)
    audit = store.as_path(scored) / "audit.html"
    if store.is_local(target) and store.is_local(audit) and audit.is_file():
        shown["audit"] = os.path.relpath(audit, target.parent)
    page = environment().get_template("inspect.html.j2").render(**shown)
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


def masked(found: Inspection, scorers: Sequence[Scorer], finder: Scorer) -> Inspection:
    """The same numbers with personal data masked in every text, with long texts cut, and with what `finder` finds in
    the segments near thresholds."""
    return replace(
        found,
        examples=[
            replace(level, documents=[_masked_document(d, scorers) for d in level.documents])
            for level in found.examples
        ],
        worst_segments=masked_segments(found.worst_segments, scorers),
        agreement=[masked_agreement(other, scorers) for other in found.agreement],
        near=[
            replace(row, text=_masked_text(row.text, scorers)[:NEAR_CHARS], finds=_finds(row.text, finder))
            for row in found.near
        ],
    )


def _finds(text: str, finder: Scorer) -> list[tuple[int, int, str]]:
    """What a scorer finds in the shown part of a text."""
    spans = find_spans(text[:SHOWN_CHARS], finder) or []
    return [(span.start, min(span.end, NEAR_CHARS), span.label) for span in spans if span.start < NEAR_CHARS]


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


def template_values(found: Inspection, is_masked: bool, finder: Scorer) -> dict[str, Any]:
    """Everything that the template shows."""
    unit = found.identity.get("unit", "score")
    limit = np.float32(found.threshold)
    chosen = next(n for n, row in enumerate(found.thresholds) if np.float32(row.threshold) == limit)
    source = page_script("inspect.js")
    return {
        "s": found,
        "audit": None,
        "name": store.as_path(found.scored).name,
        "masked": is_masked,
        "segment_plot": plots.histogram(found.segments.histogram, f"score of a segment ({unit})", found.threshold).html,
        "document_plot": plots.histogram(
            found.documents.histogram, "mean score of a document", found.suggested.filtering
        ).html,
        "threshold_plot": plots.thresholds(found.thresholds).html,
        "length_plot": plots.by_length(found.length).html,
        "examples": [(level, _coloured_documents(level, found.threshold, finder)) for level in found.examples],
        "worst": [
            (row, marked(row.text, _shown_finds(row.text, finder), found.threshold, row.score))
            for row in found.worst_segments
        ],
        "chosen": chosen,
        "step": found.thresholds[chosen],
        "above": [_near(found, n) for n in found.around[chosen].above],
        "below": [_near(found, n) for n in found.around[chosen].below],
        "finds": any(row.finds for row in found.near),
        "page_data": Markup(script_json(_slider(found))),
        "script": Markup(source),
        "digest": script_digest(source),
    }


def _near(found: Inspection, number: int) -> tuple[NearSegment, Markup]:
    row = found.near[number]
    return row, marked(row.text, row.finds)


def _slider(found: Inspection) -> Plain:
    """What the page's script reads. `t` threshold, `s`, `c`, `k`, `d`, `f` shares of segments, characters and tokens,
    documents with a bad segment, documents that filtering keeps; `a`, `b` places in `near` above and below."""
    return {
        "steps": [
            {
                "t": row.threshold,
                "s": row.bad_segments,
                "c": row.bad_chars,
                "k": row.bad_tokens,
                "d": row.documents_with_bad,
                "f": row.documents_kept_by_filtering,
                "a": near.above,
                "b": near.below,
            }
            for row, near in zip(found.thresholds, found.around, strict=True)
        ],
        "near": [{"i": visible(n.id), "p": _pieces(n.text, n.finds), "s": n.score} for n in found.near],
        "segments": found.counts.segments,
    }


def _coloured_documents(level: ExampleLevel, threshold: float, finder: Scorer) -> list[ColouredDocument]:
    return [ColouredDocument(d.id, d.mean, _coloured(d, threshold, finder)) for d in level.documents]


def _coloured(document: ShownDocument, threshold: float, finder: Scorer) -> Markup:
    """A document's segments as escaped HTML: red above the threshold, dashed where they were not judged."""
    pieces = [marked(text, _shown_finds(text, finder), threshold, score) for text, score in document.segments]
    if document.cut:
        pieces.append(Markup(' <span class="soft">… (cut here)</span>'))
    return Markup("").join(pieces)


def _shown_finds(text: str, finder: Scorer) -> list[tuple[int, int, str]]:
    """What a scorer finds in a text that is shown. In masked text, the dots are what was found."""
    dots = [(m.start(), m.end(), "masked") for m in MASKED.finditer(text)]
    if finder.finds_personal_data:
        return dots
    return dots + [(span.start, span.end, span.label) for span in find_spans(text, finder) or []]


def marked(
    text: str, finds: Sequence[tuple[int, int, str]], threshold: float | None = None, score: float | None = None
) -> Markup:
    """A text as escaped HTML with its finds marked. With a score, coloured by the threshold."""
    inner = Markup("").join(
        Markup('<mark title="{}">{}</mark>').format(kind, piece) if kind else Markup("{}").format(piece)
        for piece, kind in _pieces(text, finds)
    )
    if score is None or threshold is None:
        return inner
    if np.isnan(score):
        return Markup('<span class="seg none" title="not judged">{}</span>').format(inner)
    bad = " bad" if np.float32(score) > np.float32(threshold) else ""
    return Markup('<span class="seg{}" data-s="{}" title="{}">{}</span>').format(bad, score, f"{score:.6g}", inner)


def _pieces(text: str, finds: Sequence[tuple[int, int, str]]) -> list[tuple[str, str]]:
    """(text, kind of the find or "") in order; of finds that overlap, the first."""
    pieces = []
    at = 0
    for start, end, kind in sorted(finds):
        if start >= at and end > start:
            pieces += [(visible(text[at:start]), ""), (visible(text[start:end]), kind)]
            at = end
    pieces.append((visible(text[at:]), ""))
    return [piece for piece in pieces if piece[0]]
