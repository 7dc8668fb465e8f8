"""Equal exposure on a store of one window: after equal source text, objectives and phases have read the same text."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from helpers import LINK, tiny_texts, write_jsonl
from phf.data.readers import Jsonl
from phf.data.segment import Lines
from phf.objectives import MLE, Conditional, Filtering, Masking, Tag
from phf.objectives.compose import PhaseOf, Schedule
from phf.scoring.score import score_corpus
from phf.tokens.edited import NO_SOURCE
from phf.tokens.source_order import GROUP_PIECES, PIECE_ROWS
from phf.tokens.store import TokenStore, tokenize_corpus
from phf.tokens.tokenizer import TrainBPE, add_control_tokens
from phf.training.order import training_order

CONTEXT = 16


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """About 130,000 tokens: 60 groups."""
    folder = tmp_path_factory.mktemp("exposure")
    corpus = Jsonl(str(write_jsonl(folder / "t.jsonl", tiny_texts(1500, seed=4))))
    score_corpus(corpus, Lines(), LINK, folder / "s")
    tokenize_corpus(folder / "s", TrainBPE(300), folder / "t", heldout=0.1)
    return TokenStore.open(folder / "t")


def order_of(tokens, objective, places=None, first=0, seed=3):
    fitted = objective.fit(tokens.statistics)
    tokenizer = tokens.tokenizer
    add_control_tokens(tokenizer, fitted.control_tokens)
    return training_order(tokens, fitted, tokenizer, CONTEXT, seed, first, places)


def times_read(tokens, order, start, stop):
    """How often each token of the store is a target of the rows at these places."""
    count_T = np.zeros(len(tokens.tokens), int)
    blocks = np.array([tokens.first_token(k) for k in range(tokens.num_blocks)])
    seg_starts = np.r_[0, tokens.seg_ends[:-1]]
    for n, low, high in order._parts(start, stop):
        own = order.orders[n]
        for row in own.rows(low, high):
            at = int(row) * CONTEXT + 1
            part = own.read(at, at + CONTEXT, places=True)
            starts = seg_starts[part.segment]
            place = blocks[np.searchsorted(blocks, starts, side="right") - 1] + part.source
            count_T[place[part.source != NO_SOURCE]] += 1
    return count_T


def trained(tokens):
    ends = tokens.seg_ends[tokens.doc_ends - 1]
    return np.repeat(~tokens.heldout_D, np.diff(ends, prepend=0))


@pytest.mark.parametrize("objective", [MLE(), Conditional(), Filtering()], ids=lambda o: o.name)
def test_an_epoch_is_every_row_once_and_places_are_source_text(tokens, objective):
    (order,) = order_of(tokens, objective).orders
    first, last = order._rows_of(0)
    rows = order.rows(first, last)
    assert sorted(rows.tolist()) == list(range(first, last))
    assert rows.tolist() != list(range(first, last))
    source = [order.source_at(place) for place in range(first, last + 1)]
    assert source[0] == 0
    assert source[-1] == pytest.approx(trained(tokens).sum())
    assert all(b > a for a, b in itertools.pairwise(source))
    for place in range(first, last, 7):
        assert abs(order.place_at(source[place]) - place) <= 1
    # another epoch has another order
    assert (order.rows(last, 2 * last) - last).tolist()[:50] != rows.tolist()[:50]
    assert len({order.rows(p, p + 1)[0] for p in range(first, last)}) == last - first


@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("objective", [Conditional(), Tag(p=0.3), Masking()], ids=lambda o: o.name)
def test_after_the_same_source_text_objectives_have_read_the_same_text(tokens, objective, share):
    source = share * trained(tokens).sum()
    read = []
    for other in (MLE(), objective):
        order = order_of(tokens, other)
        read.append(times_read(tokens, order, 0, order.place_at(source)) > 0)
    mine, theirs = read
    assert mine.sum() == pytest.approx(source, rel=0.03)
    different = (mine ^ theirs).sum() / (mine | theirs).sum()
    # the edges of pieces, and one group
    assert different < 0.5 / PIECE_ROWS + GROUP_PIECES * PIECE_ROWS * CONTEXT / source
    if objective.name == "masking":
        assert different == 0


@pytest.mark.parametrize("second", [Conditional(), Masking()], ids=lambda o: o.name)
def test_a_phase_goes_on_in_the_text_where_the_one_before_stopped(tokens, second):
    schedule = Schedule(phases=(PhaseOf(MLE(), until=0.4), PhaseOf(second)))
    (plain, after) = order_of(tokens, schedule, places=100).orders
    places = plain.place_at(0.4 * plain.epoch_source)
    rest = after._rows_of(0)[1] - after.place_at(0.4 * plain.epoch_source)
    order = order_of(tokens, schedule, places=places + rest)
    scale = (places + rest) * 0.4 / places
    assert scale == pytest.approx(1, abs=0.1)
    last = next(p for p in range(places + rest, 0, -1) if order.source_at(p) <= plain.epoch_source)
    count_T = times_read(tokens, order, 0, last)[trained(tokens)]
    limit = 0.001 if second.name == "masking" else 0.03
    assert (count_T == 0).mean() <= limit + 0.01
    assert (count_T > 1).mean() <= limit


def test_finetuning_starts_after_the_text_that_was_read(tokens):
    first = order_of(tokens, MLE())
    stop = first.place_at(0.3 * trained(tokens).sum())
    read = times_read(tokens, first, 0, stop) > 0
    second = order_of(tokens, Conditional())
    start = second.place_at(first.source_at(stop))
    end = second.place_at(0.6 * trained(tokens).sum())
    again = times_read(tokens, second, start, end) > 0
    assert (read & again).sum() < 0.1 * again.sum()
