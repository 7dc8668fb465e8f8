"""Rows and the training order against a slow, obvious implementation, and the laws of the design as properties."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import DEFAULT_OBJECTIVES, LINK, make_store, tiny_texts, write_jsonl
from phf.core.config import ConfigError
from phf.core.random import permute, uniforms, uniforms_at
from phf.core.types import Edit, Insertions, PieceIds
from phf.data.readers import Jsonl
from phf.data.segment import Lines
from phf.objectives import Conditional
from phf.scoring.score import score_corpus
from phf.tokens import source_order
from phf.tokens import store as store_module
from phf.tokens.edited import NO_SOURCE, Stream
from phf.tokens.rows import Rows
from phf.tokens.source_order import SourceOrder, TrainingOrder
from phf.tokens.store import TokenStore, tokenize_corpus
from phf.tokens.tokenizer import TrainBPE

END = 0
GOOD = 90
BAD = 91
HIDDEN = 92
PIECES = (PieceIds((GOOD,)), PieceIds((BAD,)), PieceIds((93, 94, 95), learned=False), PieceIds(()))
SEGMENT = st.lists(st.integers(1, 80), min_size=0, max_size=6)
DOCUMENT = st.lists(SEGMENT, min_size=1, max_size=5)
SCORE = st.sampled_from([0.0, 0.25, 0.5, 1.0, float("nan")])


@st.composite
def corpora(draw, most=6):
    docs = draw(st.lists(DOCUMENT, min_size=1, max_size=most).filter(lambda docs: any(s for d in docs for s in d)))
    scores = [draw(SCORE) for d in docs for _ in d]
    heldout = [draw(st.booleans()) for _ in docs]
    return docs, scores, heldout


def any_edit(seed):
    """An edit that does everything an edit can do, by draws on global numbers."""

    def edit(block):
        generator_S = block.uniform_S(seed, "pieces")
        before_S = np.where(generator_S < 0.5, (generator_S * 8).astype(int), -1)
        after_S = np.where(block.uniform_S(seed, "after") < 0.3, 2, -1)
        inside_T = block.uniform_T(seed, "inside") < 0.2
        at = np.flatnonzero(inside_T)
        inside = Insertions(
            block.segment_T[at],
            at - block.start_S[block.segment_T[at]],
            (block.uniform_T(seed, "which")[at] * 4).astype(int),
        )
        parts = [Insertions.before(before_S), inside, Insertions.after(after_S, block.tokens_S)]
        return Edit(
            times_D=(block.uniform_D(seed, "times") * 4).astype(int),
            insertions=Insertions.merged(parts),
            hidden_T=block.uniform_T(seed, "hide") < 0.2,
        )

    return edit


def no_edit(block):
    return Edit()


def slow_block(block, edit, pieces, train):
    """(token, segment, learned, source) by the definition, one token after the other."""
    out = []
    edit = edit(block)
    times_D = np.ones(block.num_documents, int) if edit.times_D is None else edit.times_D
    for turn in range(int(times_D.max(initial=0))):
        for d in range(block.num_documents):
            if block.train_D[d] != train or times_D[d] <= turn:
                continue
            for s in np.flatnonzero(block.doc_S == d):
                if s == 0 or block.doc_S[s - 1] != d:
                    out.append((END, block.first_segment + s, True, NO_SOURCE))
                for offset in range(block.tokens_S[s] + 1):
                    for i in range(0 if edit.insertions is None else len(edit.insertions.piece_I)):
                        found = edit.insertions
                        if (found.segment_I[i], found.offset_I[i]) == (s, offset):
                            piece = pieces[found.piece_I[i]]
                            out += [(t, block.first_segment + s, piece.learned, NO_SOURCE) for t in piece.ids]
                    if offset < block.tokens_S[s]:
                        t = block.start_S[s] + offset
                        hidden = edit.hidden_T is not None and edit.hidden_T[t]
                        token = HIDDEN if hidden else block.ids_T[t]
                        out.append((int(token), block.first_segment + s, not hidden, int(t)))
    return out


def slow_stream(tokens, edit, split="train"):
    """The whole stream in the order of the store."""
    return [x for k in range(tokens.num_blocks) for x in slow_block(tokens.block(k), edit, PIECES, split == "train")]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of two segments and windows of a few tokens, so that small stores have many."""
    monkeypatch.setattr(store_module, "BLOCK_SEGMENTS", (1, 1))
    monkeypatch.setattr(source_order, "WINDOW_TOKENS", 20)
    monkeypatch.setattr(source_order, "WHOLE_TOKENS", 0)


@given(corpora(), st.integers(1, 9), st.integers(0, 3), st.sampled_from(["train", "heldout"]), st.booleans())
@settings(max_examples=300, deadline=None)
def test_every_row_equals_the_slow_implementation(corpus, context, seed, split, pad):
    docs, scores, heldout = corpus
    with tempfile.TemporaryDirectory() as folder:
        tokens = make_store(Path(folder), docs, scores, heldout)
        edit = any_edit(seed)
        expected = slow_stream(tokens, edit, split)
        targets = max(len(expected) - 1, 0)
        count = -(-targets // context) if pad else targets // context
        if count == 0:
            with pytest.raises(ConfigError, match="too few for one row"):
                Rows(tokens, edit, context, PIECES, split, pad, HIDDEN)
            return
        rows = Rows(tokens, edit, context, PIECES, split, pad, HIDDEN)
        assert rows.num_rows == count
        assert rows.num_tokens == len(expected)
        for order in (range(count), reversed(range(count))):
            for r in order:
                part = expected[r * context : r * context + context + 1]
                batch = rows.batch([r])
                n = len(part) - 1
                assert batch.input_BT[0, :n].tolist() == [t for t, *_ in part[:-1]]
                assert batch.target_BT[0, :n].tolist() == [t for t, *_ in part[1:]]
                of_segment = np.array([scores[s] for _, s, *_ in part[1:]], np.float32)
                np.testing.assert_array_equal(batch.score_BT[0, :n], of_segment)
                assert batch.mask_BT[0].tolist() == [x[2] for x in part[1:]] + [False] * (context - n)


@given(corpora(), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_undoing_an_edit_gives_the_original(corpus, seed):
    """Without what was inserted, each document that is kept is there whole, as often as the edit says."""
    docs, scores, heldout = corpus
    with tempfile.TemporaryDirectory() as folder:
        tokens = make_store(Path(folder), docs, scores, heldout)
        edit = any_edit(seed)
        stream = Stream(tokens, edit, PIECES, HIDDEN)
        for k in range(tokens.num_blocks):
            block = tokens.block(k)
            found = stream.with_places(k)
            assert stream.length(k) == len(found) == len(stream.block(k))
            kept = found.source != NO_SOURCE
            made = edit(block)
            original = block.ids_T[found.source[kept]].astype(int)
            np.testing.assert_array_equal(
                found.ids[kept], np.where(made.hidden_T[found.source[kept]], HIDDEN, original)
            )
            times_D = np.where(block.train_D, made.times_D, 0)
            times_T = np.bincount(found.source[kept], minlength=len(block.ids_T))
            np.testing.assert_array_equal(times_T, times_D[block.doc_S][block.segment_T])
            first = np.flatnonzero(np.diff(found.source[kept]) != 1) + 1  # where another document or a copy starts
            assert set(found.source[kept][first]) <= set(block.start_S[np.flatnonzero(block.first_S)]) | set(
                block.start_S
            )


@given(corpora(12), st.integers(1, 9), st.integers(0, 3), st.integers(0, 400), st.integers(1, 30))
@settings(max_examples=200, deadline=None)
def test_the_training_order_is_the_windows_streams_one_after_the_other(corpus, context, seed, start, length):
    docs, scores, heldout = corpus
    with tempfile.TemporaryDirectory() as folder:
        tokens = make_store(Path(folder), docs, scores, heldout)
        edit = any_edit(seed)
        try:
            order = SourceOrder(Stream(tokens, edit, PIECES, HIDDEN), context, seed)
        except ConfigError:
            assert (
                sum(len(slow_block(tokens.block(k), edit, PIECES, True)) for k in range(tokens.num_blocks)) <= context
            )
            return
        whole = []
        g = 0
        ends = []
        while len(whole) < (start + length + 1) * context + 200:
            for k in order.window(g):
                whole += slow_block(tokens.block(int(k)), edit, PIECES, True)
            ends.append(len(whole))
            g += 1
        batch = SourceOrder(Stream(tokens, edit, PIECES, HIDDEN), context, seed).batch(start, start + length)
        for b, row in enumerate(order.rows(start, start + length)):
            part = whole[row * context : row * context + context + 1]
            assert batch.input_BT[b].tolist() == [t for t, *_ in part[:-1]]
            assert batch.target_BT[b].tolist() == [t for t, *_ in part[1:]]
            assert batch.mask_BT[b].tolist() == [x[2] for x in part[1:]]
        # each row once, and rows stay in the window where they start
        places = order.rows(0, start + length)
        known = [-(-e // context) for e in ends]
        for place, row in enumerate(places):
            window = next(n for n, e in enumerate(known) if place < e)
            assert (known[window - 1] if window else 0) <= row < known[window]
        assert len(set(places.tolist())) == len(places)


@given(corpora(12), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_after_each_window_all_objectives_have_read_the_same_source(corpus, context, seed):
    docs, scores, heldout = corpus
    with tempfile.TemporaryDirectory() as folder:
        tokens = make_store(Path(folder), docs, scores, heldout)
        try:
            orders = [
                SourceOrder(Stream(tokens, edit, PIECES, HIDDEN), context, seed)
                for edit in (lambda block: Edit(), any_edit(seed))
            ]
        except ConfigError:
            return
        for order in orders:
            order._reach(300)
        plain, edited = orders
        for g in range(min(len(plain.ends), len(edited.ends))):
            assert plain.window(g).tolist() == edited.window(g).tolist()
            assert plain.sources[g] == edited.sources[g]
        blocks = np.concatenate([plain.window(g) for g in range(plain.windows)])
        assert sorted(blocks.tolist()) == list(range(tokens.num_blocks))  # an epoch reads every block once
        assert plain.epoch_source == sum(len(s) for d, held in zip(docs, heldout, strict=True) for s in d if not held)


@given(corpora(12), st.integers(1, 5), st.integers(0, 3), st.integers(0, 60))
@settings(max_examples=150, deadline=None)
def test_a_run_goes_on_where_another_stopped(corpus, context, seed, place):
    docs, scores, heldout = corpus
    with tempfile.TemporaryDirectory() as folder:
        tokens = make_store(Path(folder), docs, scores, heldout)
        try:
            plain, edited = (
                SourceOrder(Stream(tokens, edit, PIECES, HIDDEN), context, seed)
                for edit in (lambda block: Edit(), any_edit(seed))
            )
        except ConfigError:
            return
        assert plain.place_at(0) == edited.place_at(0) == 0
        g = edited._window_at(place)
        source = edited.source_at(place)
        assert edited.source_at(edited.place_at(source)) == pytest.approx(source)
        if min(np.diff([0, *edited.sources[: g + 1]])) > 0:  # windows without source text have one place in source
            assert edited.place_at(source) == place
        if plain.epoch_source == 0:
            return
        other = plain.source_at(plain.place_at(source))
        size = edited.sources[g] - (edited.sources[g - 1] if g else 0)
        assert abs(other - source) <= size + context  # within a window


@given(corpora(10), st.integers(1, 5), st.integers(0, 3), st.integers(0, 20), st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_exposure_counts_every_target(corpus, context, seed, start, length):
    docs, scores, heldout = corpus
    with tempfile.TemporaryDirectory() as folder:
        tokens = make_store(Path(folder), docs, scores, heldout)
        try:
            order = SourceOrder(Stream(tokens, any_edit(seed), PIECES, HIDDEN), context, seed)
        except ConfigError:
            return
        if order.epoch_source == 0:
            return
        found = order.exposure(start, start + length, lambda score: score <= 0.25)
        batch = order.batch(start, start + length)
        count = dict.fromkeys(("good", "bad", "unjudged", "learned_good", "other", "hidden"), 0)
        for row in order.rows(start, start + length):
            part = order.read(int(row) * context + 1, (int(row) + 1) * context + 1, places=True)
            for token, source, score, learned in zip(part.ids, part.source, part.score, part.learned, strict=True):
                kind = "unjudged" if np.isnan(score) else "bad" if score > 0 else "good"
                kind = "hidden" if token == HIDDEN else kind
                count[kind if source != NO_SOURCE else "other"] += 1
                count["learned_good"] += bool(learned and source != NO_SOURCE and score <= 0)
        assert (found.read_good, found.read_bad, found.read_unjudged) == (
            count["good"],
            count["bad"],
            count["unjudged"],
        )
        assert found.learned_good == count["learned_good"]
        assert found.inserted + found.end_of_text == count["other"]
        assert found.hidden == count["hidden"]
        assert batch.target_BT.size == length * context


@given(corpora(12), st.integers(1, 5), st.integers(0, 3), st.lists(st.integers(1, 20), max_size=3), st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_a_phase_continues_where_the_one_before_stopped(corpus, context, seed, lengths, length):
    docs, scores, heldout = corpus
    with tempfile.TemporaryDirectory() as folder:
        tokens = make_store(Path(folder), docs, scores, heldout)
        try:
            orders = [
                SourceOrder(Stream(tokens, edit, PIECES, HIDDEN), context, seed)
                for edit in [lambda block: Edit(), any_edit(seed), lambda block: Edit(), any_edit(5)][
                    : len(lengths) + 1
                ]
            ]
        except ConfigError:
            return
        if orders[0].epoch_source == 0:
            return
        until = np.cumsum(lengths).tolist()
        order = TrainingOrder(orders, until)
        batch = order.batch(0, length)
        own = [0]
        for n, end in enumerate(until):
            stopped = orders[n].source_at(own[n] + lengths[n])
            own.append(orders[n + 1].place_at(stopped))
            assert order.source_at(end) == orders[n + 1].source_at(own[-1])
        for place in range(length):
            n = sum(place >= end for end in until)
            at = own[n] + place - (until[n - 1] if n else 0)
            expected = orders[n].batch(at, at + 1)
            assert batch.input_BT[place].tolist() == expected.input_BT[0].tolist()
            assert batch.mask_BT[place].tolist() == expected.mask_BT[0].tolist()
            assert batch.phase_BT is None if not lengths else (batch.phase_BT[place] == n).all()
        read = order.exposure(0, length)
        texts = read.read_good + read.read_bad + read.read_unjudged
        assert texts + read.inserted + read.end_of_text + read.hidden == length * context


def test_the_rows_of_the_seven_objectives_in_the_order_of_the_store_are_those_of_the_first_version(
    tmp_path, monkeypatch
):
    monkeypatch.undo()  # blocks of the usual size
    score_corpus(
        Jsonl(str(write_jsonl(tmp_path / "texts.jsonl", tiny_texts(600, seed=1)))), Lines(), LINK, tmp_path / "s"
    )
    tokenize_corpus(tmp_path / "s", TrainBPE(300), tmp_path / "tokens", heldout=0.1)
    tokens = TokenStore.open(tmp_path / "tokens")
    golden = json.loads((Path(__file__).parents[1] / "golden" / "rows.json").read_text())
    assert tokens.num_blocks > 1
    for objective in DEFAULT_OBJECTIVES:
        fitted = objective.fit(tokens.statistics)
        expected = golden[objective.name]
        for name, value in expected["settings"].items():
            assert getattr(fitted, name) == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value)
        pieces = [PieceIds((300 + n,)) for n in range(2)]
        rows = Rows(tokens, lambda block, fitted=fitted: fitted.edit(block, 5), 32, pieces)
        batch = rows.batch(range(rows.num_rows))
        digest = hashlib.blake2b(digest_size=16)
        for array in (batch.input_BT, batch.target_BT, batch.score_BT, batch.mask_BT):
            digest.update(array.tobytes())
        assert (rows.num_rows, rows.num_tokens, digest.hexdigest()) == (
            expected["rows"],
            expected["tokens"],
            expected["hash"],
        ), objective.name


def test_no_text_of_a_held_out_document_is_in_a_training_row(tokens):
    """On the real store: no held-out line that training documents do not hold too."""
    rows = Rows(tokens, lambda block: Edit(), 32)
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
    piece_S = np.array([1, 0, 1])

    def edit(block):
        return Edit(insertions=Insertions.before(piece_S[block.first_segment :][: block.num_segments]))

    rows = Rows(tokens, edit, 8, PIECES, pad=True)
    batch = rows.batch([0])
    assert [*batch.input_BT[0, :1], *batch.target_BT[0]] == [END, BAD, 5, 6, GOOD, 7, END, BAD, 8]
    np.testing.assert_array_equal(batch.score_BT[0], np.float32([0.5, 0.5, 0.5, 0, 0, 1, 1, 1]))


def test_control_tokens_are_there_whatever_the_segmenter(tmp_path):
    """Defect 7: with whole documents as segments they were skipped in silence."""
    tokens = make_store(tmp_path, [[[5, 6, 7]], [[8, 9]]], [0.0, 1.0])
    rows = Rows(tokens, lambda block: Conditional(0, drop=0).edit(block, 0), 8, PIECES, pad=True)
    assert [*rows.batch([0]).input_BT[0, :1], *rows.batch([0]).target_BT[0]] == [END, GOOD, 5, 6, 7, END, BAD, 8, 9]


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


@given(st.integers(0, 500), st.integers(0, 50))
def test_draws_depend_on_what_and_their_number_alone(first, n):
    np.testing.assert_array_equal(uniforms_at(first, n, 1, "a"), uniforms(first + n, 1, "a")[first:])


def test_draws_of_other_purposes_differ():
    assert (uniforms(5, 1, "a") != uniforms(5, 1, "b")).all()
