"""The law of the token stream, for every built-in objective: without what was inserted, and with what was hidden put
back, each document that is kept is there as it was, as often as the edit says."""

from __future__ import annotations

import dataclasses
import tempfile
import typing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from helpers import make_store
from phf.core.config import ConfigError, validate
from phf.core.types import PieceIds
from phf.objectives import AnyObjective
from phf.tokens.edited import NO_SOURCE, apply_edit, edited_length
from phf.tokens.statistics import Statistics

END = 0
HIDDEN = 89
COLUMN = [95, 96, 97, 98, 99]
SCORE = st.sampled_from([0.0, 0.25, 0.5, 1.0, float("nan")])
HALF = {"threshold": 0.25}
OBJECTIVES = {
    "mle": {},
    "filtering": HALF,
    "conditional": HALF | {"drop": 0.3},
    "unlikelihood": HALF,
    "masking": HALF,
    "sgtm": HALF,
    "rwr": {"rewards": "raw"},
    "awr": {"rewards": "raw"},
    "tag": HALF | {"p": 0.4},
    "annotate": HALF | {"where": "after", "text": "a {} b", "column": "c"},
    "metadata": {"column": "c", "before": "x", "after": "y"},
    "quantile": {"k": 3, "drop": 0.2},
    "hide": HALF,
    "weights": {},
    "anchored": HALF | {"reference": "r"},
    "attributes": {"of": ["other"]},
    "each": {
        "members": {
            "given": {"name": "annotate", "where": "before", "text": "s", **HALF},
            "other": {"name": "hide", **HALF},
            "third": {"name": "filtering", **HALF},
            "fourth": {"name": "conditional", "drop": 0.1, **HALF},
        }
    },
    "schedule": {
        "phases": [
            {"objective": {"name": "tag"}, "ramp": {"p": [1.0, 0.1]}, "until": 0.5},
            {"objective": {"name": "annotate", "where": "end", "learned": False, **HALF}},
        ]
    },
}


def test_every_built_in_objective_is_here():
    union = typing.get_args(typing.get_args(AnyObjective)[0])
    names = {f.default for cls in union for f in dataclasses.fields(cls) if f.name == "name"}
    assert names - {"own"} == set(OBJECTIVES)


@st.composite
def blocks(draw):
    """A block of a few documents with scores of four preferences, scores of tokens, and a column."""
    document = st.lists(st.lists(st.integers(1, 80), max_size=6), min_size=1, max_size=5)
    docs = draw(st.lists(document, min_size=1, max_size=6).filter(lambda docs: any(s for d in docs for s in d)))
    count = sum(map(len, docs))
    scores = {n: [draw(SCORE) for _ in range(count)] for n in ("given", "other", "third", "fourth")}
    with tempfile.TemporaryDirectory() as folder:
        made = make_store(Path(folder), docs, scores["given"], [draw(st.booleans()) for _ in docs])
        whole = made.block(0, size=count)
        block = dataclasses.replace(whole, **{f: np.array(getattr(whole, f)) for f in ("score_S", "ids_T")})
    lengths = [draw(st.integers(0, 3)) for _ in docs]
    token_score = [draw(SCORE) for _ in block.ids_T] if draw(st.booleans()) else None

    def with_scores(name):
        return dataclasses.replace(
            block,
            score_S=np.array(scores[name], np.float32),
            token_score_T=None if token_score is None else np.array(token_score, np.float32),
            words=lambda: np.arange(81) % 3 > 0,
            others=with_scores,
            columns=lambda _: (np.resize(COLUMN, sum(lengths)), np.cumsum(lengths)),
        )

    return with_scores("given")


def piece_ids_of(objective):
    """Ids that no text has: one for a control token, three for a text."""
    return [
        PieceIds(learned=p.learned, column=p.column)
        if p.column is not None
        else PieceIds((100 + n,) if p.control else (200 + 3 * n, 201 + 3 * n, 202 + 3 * n), p.learned)
        for n, p in enumerate(objective.pieces)
    ]


def undone(found, block, hidden_T):
    """The documents of a stream, as (first token in the block, ids), read from its ids alone: what is no id of a text
    is left out, and a hidden token is the next one of its document."""
    documents = []
    at = None
    for token, source in zip(found.ids.tolist(), found.source.tolist(), strict=True):
        if token == END:
            documents.append([])
            at = None
        elif token < END + 81 or token == HIDDEN:
            assert at is None or source == at + 1
            at = source
            assert hidden_T[source] == (token == HIDDEN)
            documents[-1].append((source, int(block.ids_T[source]) if token == HIDDEN else token))
        else:
            assert source == NO_SOURCE
    return documents


@pytest.mark.parametrize("name", OBJECTIVES)
@given(blocks(), st.integers(0, 5))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_undoing_an_objective_s_edit_gives_the_original(name, block, seed):
    statistics = Statistics(lambda: iter([block]), 0.0, lambda other: Statistics(lambda: iter([block.of(other)]), 0.0))
    try:
        fitted = validate({"name": name, **OBJECTIVES[name]}, AnyObjective).fit(statistics)
    except ConfigError:
        assume(False)  # nothing was judged
    for member, _ in fitted.timeline:
        edit = member.edit(block, seed)
        pieces = piece_ids_of(member)
        found = apply_edit(block, edit, END, pieces, HIDDEN)
        assert len(found) == edited_length(block, edit, pieces)
        times_D = np.ones(block.num_documents, int) if edit.times_D is None else edit.times_D.astype(int)
        hidden_T = np.zeros(len(block.ids_T), bool) if edit.hidden_T is None else edit.hidden_T
        expected = []
        for turn in range(int(times_D.max(initial=0))):
            for d in np.flatnonzero(block.train_D & (times_D > turn)):
                of = np.flatnonzero(block.doc_S[block.segment_T] == d)
                expected.append([(int(t), int(block.ids_T[t])) for t in of])
        assert undone(found, block, hidden_T) == expected
        # what is inserted is whole pieces
        known = {i for piece in pieces for i in piece.ids} | set(COLUMN) | {END}
        assert set(found.ids[found.source == NO_SOURCE].tolist()) <= known
        for piece in pieces:
            counts = {int((found.ids == i).sum()) for i in piece.ids}
            assert len(counts) <= 1
