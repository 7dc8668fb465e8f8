"""Segments just above and just below a threshold: where a page asks whether it is the right one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from phf.data.scored import ScoredCorpus
from phf.scoring.inspection import Around, NearSegment
from phf.scoring.table import Table, read_documents

SHOWN = 10
"""Different segments on each side of a threshold."""
READ = 30
"""Segments on each side that are looked at for these: many are alike."""


def around_thresholds(
    corpus: ScoredCorpus, table: Table, thresholds: Sequence[float]
) -> tuple[list[NearSegment], list[Around]]:
    """Different segments next to each threshold, nearest first, and where each threshold finds them. Segments with one
    text and one score count as one; of equal scores, those of the first documents are shown."""
    usable = np.flatnonzero(~np.isnan(table.score_S) & (table.chars_S > 0))
    order = usable[np.argsort(table.score_S[usable], kind="stable")]  # equal scores by document
    score = table.score_S[order]
    sides = []
    for threshold in np.asarray(thresholds, np.float32):
        cut = int(np.searchsorted(score, threshold, side="right"))
        lowest = int(np.searchsorted(score, score[cut - 1])) if cut else 0
        below = order[lowest : min(lowest + READ, cut)]  # those of the nearest score, from the first document on
        rest = order[max(lowest - READ + len(below), 0) : lowest][::-1]
        sides.append((order[cut : cut + READ], np.concatenate([below, rest])))
    first_S = np.concatenate([[0], table.counts_D.cumsum()])
    wanted = np.unique(np.concatenate([places for pair in sides for places in pair]).astype(np.int64))
    found = read_documents(corpus, table, sorted({int(d) for d in table.doc_S[wanted]}))

    near: list[NearSegment] = []
    place_of: dict[tuple[str, float], int] = {}

    def shown(places: np.ndarray) -> list[int]:
        chosen: list[int] = []
        for s in map(int, places):
            document = int(table.doc_S[s])
            if document not in found:
                continue
            text = found[document].texts[s - int(first_S[document])]
            known = (text.strip(), float(table.score_S[s]))
            if known not in place_of:
                place_of[known] = len(near)
                near.append(NearSegment(found[document].id, text, known[1]))
            number = place_of[known]
            if number not in chosen:
                chosen.append(number)
            if len(chosen) == SHOWN:
                break
        return chosen

    steps = [
        Around(float(threshold), above=shown(above), below=shown(below))
        for threshold, (above, below) in zip(thresholds, sides, strict=True)
    ]
    return near, steps
