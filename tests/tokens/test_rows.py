"""Rows against a slow, obvious implementation, and the laws of the design as properties."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import make_store
from phf.core.config import ConfigError
from phf.core.random import permute, uniforms
from phf.core.types import Edit
from phf.objectives import Conditional, Filtering
from phf.tokens.rows import Order, Rows

END = 0
GOOD = 90
BAD = 91
SEGMENT = st.lists(st.integers(1, 80), min_size=0, max_size=6)
DOCUMENT = st.lists(SEGMENT, min_size=1, max_size=5)
SCORE = st.sampled_from([0.0, 0.25, 0.5, 1.0, float("nan")])


@st.composite
def corpora(draw):
    docs = draw(st.lists(DOCUMENT, min_size=1, max_size=6).filter(lambda docs: any(s for d in docs for s in d)))
    scores = [draw(SCORE) for d in docs for _ in d]
    heldout = [draw(st.booleans()) for _ in docs]
    return docs, scores, heldout


def slow_stream(docs, scores, heldout, edit: Edit, split: str) -> list[tuple[int, float]]:
    """(token, score) by the definition: end-of-text, then each segment after its control token."""
    out = []
    seg = 0
    for d, doc in enumerate(docs):
        kept = heldout[d] == (split == "heldout") and (edit.keep_D is None or edit.keep_D[d])
        for s, ids in enumerate(doc):
            if kept:
                if s == 0:
                    out.append((END, scores[seg]))
                if edit.control_S is not None and edit.control_S[seg] >= 0:
                    out.append(((GOOD, BAD)[edit.control_S[seg]], scores[seg]))
                out.extend((t, scores[seg]) for t in ids)
            seg += 1
    return out


@given(corpora(), st.integers(1, 9), st.integers(0, 3), st.sampled_from(["train", "heldout"]), st.booleans())
@settings(max_examples=300, deadline=None)
def test_every_row_equals_the_slow_implementation(corpus, context, seed, split, pad):
    docs, scores, heldout = corpus
    with tempfile.TemporaryDirectory() as folder:
        tokens = make_store(Path(folder), docs, scores, heldout)
        edit = Conditional(0.25, drop=0.3).edit(tokens.table, seed)
        expected = slow_stream(docs, scores, heldout, edit, split)
        targets = max(len(expected) - 1, 0)
        count = -(-targets // context) if pad else targets // context
        if count == 0:
            with pytest.raises(ConfigError, match="too few for one row"):
                Rows(tokens, edit, context, [GOOD, BAD], split, pad)
            return
        rows = Rows(tokens, edit, context, [GOOD, BAD], split, pad)
        assert rows.num_rows == count
        assert rows.num_tokens == len(expected)
        for order in (range(count), reversed(range(count))):
            for r in order:
                part = expected[r * context : r * context + context + 1]
                batch = rows.batch([r])
                n = len(part) - 1
                assert batch.input_BT[0, :n].tolist() == [t for t, _ in part[:-1]]
                assert batch.target_BT[0, :n].tolist() == [t for t, _ in part[1:]]
                np.testing.assert_array_equal(batch.score_BT[0, :n], np.array([s for _, s in part[1:]], np.float32))
                assert batch.mask_BT[0].tolist() == [True] * n + [False] * (context - n)


@given(corpora(), st.integers(1, 9), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_no_token_is_lost_but_the_tail_and_none_held_out_is_seen(corpus, context, seed):
    docs, scores, heldout = corpus
    with tempfile.TemporaryDirectory() as folder:
        tokens = make_store(Path(folder), docs, scores, heldout)
        edit = Conditional(0.25, drop=0.3).edit(tokens.table, seed)
        expected = [t for t, _ in slow_stream(docs, scores, heldout, edit, "train")]
        if len(expected) - 1 < context:
            return
        rows = Rows(tokens, edit, context, [GOOD, BAD])
        batch = rows.batch(range(rows.num_rows))
        seen = [int(batch.input_BT[0, 0]), *batch.target_BT.flatten().tolist()]
        assert seen == expected[: len(seen)]
        assert len(expected) - len(seen) < context  # the documented tail
        # removing the control tokens gives the unedited documents
        plain = [t for t, _ in slow_stream(docs, scores, heldout, Edit(), "train")]
        assert [t for t in expected if t not in (GOOD, BAD)] == plain


def test_no_text_of_a_held_out_document_is_in_a_training_row(tokens):
    """On the real store: no held-out line that training documents do not hold too."""
    rows = Rows(tokens, Edit(), 32)
    batch = rows.batch(range(rows.num_rows))
    trained = np.r_[batch.input_BT[0, :1], batch.target_BT.flatten()]
    text = tokens.tokenizer.decode(
        [int(i) for i in trained if i != tokens.end_of_text_id], clean_up_tokenization_spaces=False
    )
    seg_starts = np.r_[0, tokens.seg_ends[:-1]]
    doc_starts = np.r_[0, tokens.doc_ends[:-1]]
    held = 0
    for d in np.flatnonzero(tokens.heldout_D):
        ids = tokens.tokens[seg_starts[doc_starts[d]] : tokens.seg_ends[tokens.doc_ends[d] - 1]]
        document = tokens.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
        assert document not in text
        held += 1
    assert held > 0


def test_end_of_text_has_the_score_of_the_first_segment_and_control_tokens_theirs(tmp_path):
    tokens = make_store(tmp_path, [[[5, 6], [7]], [[8]]], [0.5, 0.0, 1.0])
    rows = Rows(tokens, Edit(control_S=np.array([1, 0, 1], np.int8)), 8, [GOOD, BAD], pad=True)
    batch = rows.batch([0])
    assert [*batch.input_BT[0, :1], *batch.target_BT[0]] == [END, BAD, 5, 6, GOOD, 7, END, BAD, 8]
    np.testing.assert_array_equal(batch.score_BT[0], np.float32([0.5, 0.5, 0.5, 0, 0, 1, 1, 1]))


def test_control_tokens_are_there_whatever_the_segmenter(tmp_path):
    """Defect 7: with whole documents as segments they were skipped in silence."""
    tokens = make_store(tmp_path, [[[5, 6, 7]], [[8, 9]]], [0.0, 1.0])
    rows = Rows(tokens, Conditional(0, drop=0).edit(tokens.table, 0), 8, [GOOD, BAD], pad=True)
    assert [*rows.batch([0]).input_BT[0, :1], *rows.batch([0]).target_BT[0]] == [END, GOOD, 5, 6, 7, END, BAD, 8, 9]


def test_the_index_is_cached_and_gives_the_same_rows(tmp_path, tokens):
    edit = Filtering(0.02).edit(tokens.table, 0)
    first = Rows(tokens, edit, 16, index_file=tmp_path / "i.npy")
    second = Rows(tokens, edit, 16, index_file=tmp_path / "i.npy")
    np.testing.assert_array_equal(first.batch(range(5)).target_BT, second.batch(range(5)).target_BT)
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("i-")  # its hash follows


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=100, deadline=None)
def test_the_permutation_is_one(n, key):
    assert sorted(permute(np.arange(n), n, key)) == list(range(n))


@given(st.integers(1, 10**15), st.integers(0, 2**32), st.data())
def test_the_permutation_is_evaluated_by_index(n, key, data):
    index = data.draw(st.integers(0, n - 1))
    assert 0 <= permute(index, n, key)[0] < n
    assert permute(index, n, key)[0] == permute(np.array([0, index, n - 1]), n, key)[1]


def test_the_permutation_mixes_and_depends_on_the_key():
    a = permute(np.arange(1000), 1000, 1)
    b = permute(np.arange(1000), 1000, 2)
    assert (a == b).mean() < 0.02
    assert (a == np.arange(1000)).mean() < 0.02
    assert abs(np.corrcoef(a, np.arange(1000))[0, 1]) < 0.12
    with pytest.raises(IndexError):
        permute(5, 5, 0)


@given(st.integers(1, 40), st.integers(0, 200), st.integers(0, 60))
def test_the_order_visits_every_row_once_an_epoch_from_any_start(num_rows, start, length):
    order = Order(num_rows, seed=3)
    whole = order.rows(0, start + length)
    np.testing.assert_array_equal(order.rows(start, start + length), whole[start:])
    for epoch in range(len(whole) // num_rows):
        assert sorted(whole[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_epochs_differ_and_draws_depend_on_what_alone():
    order = Order(100, 0)
    assert (order.rows(0, 100) != order.rows(100, 200)).any()
    np.testing.assert_array_equal(uniforms(5, 1, "a"), uniforms(5, 1, "a"))
    assert (uniforms(5, 1, "a") != uniforms(5, 1, "b")).all()
