"""Knowledge or propensity: the loss-matched slowdown against a search on a fine grid, and what a page says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phf.core.types import Estimate
from phf.report.knowledge import Knowledge, Slowdown, slowdown


def slow_slowdown(loss, tokens, curve):
    """The first point on a fine grid at which plain training is as good."""
    low = curve[0][0]
    best = np.minimum.accumulate([value for _, value in curve])
    at = np.array([t for t, _ in curve], float)
    grid = np.exp(np.linspace(math.log(low), math.log(at[-1]), 200_001))
    losses = np.interp(np.log(grid), np.log(at), best)
    reached = np.flatnonzero(losses <= loss + 1e-12)
    return tokens / grid[reached[0]] if len(reached) else None


LOSS = st.integers(400, 9000).map(lambda n: n / 1000)
curves = st.lists(LOSS, min_size=2, max_size=8).map(
    lambda losses: [(1000 * 2**n, loss) for n, loss in enumerate(losses)]
)


@given(curves, LOSS, st.sampled_from([1, 2]))
def test_the_slowdown_is_where_plain_training_has_the_loss(curve, loss, times):
    tokens = curve[-1][0] * times
    found = slowdown(loss, tokens, curve)
    expected = slow_slowdown(loss, tokens, curve)
    if expected is None:
        assert found == Slowdown(times, "at most")
    elif loss > curve[0][1]:
        assert found == Slowdown(tokens / curve[0][0], "more than")
    else:
        assert found.bound == ""
        assert found.times == pytest.approx(expected, rel=1e-3)


@given(curves, LOSS, LOSS)
def test_a_larger_loss_is_no_smaller_slowdown(curve, a, b):
    small, large = sorted((a, b))
    assert slowdown(small, curve[-1][0], curve).times <= slowdown(large, curve[-1][0], curve).times


def test_by_hand():
    curve = [(100, 4.0), (200, 3.0), (400, 2.0)]
    assert slowdown(3.0, 400, curve).times == pytest.approx(2)
    assert slowdown(2.5, 400, curve).times == pytest.approx(math.sqrt(2))
    assert slowdown(2.0, 400, curve).times == pytest.approx(1)
    assert slowdown(2.0, 800, curve).times == pytest.approx(2)  # a model that had more tokens
    assert slowdown(1.9, 800, curve) == Slowdown(2.0, "at most")
    assert slowdown(4.5, 400, curve) == Slowdown(4.0, "more than")


@pytest.mark.parametrize(
    "found, said",
    [
        ([Slowdown(2.0)], "2"),
        ([Slowdown(2.0), Slowdown(2.0)], "2"),
        ([Slowdown(10.0, "more than"), Slowdown(9.0, "more than")], "more than 9"),
        ([Slowdown(1.0, "at most"), Slowdown(2.0, "at most")], "at most 2"),
        ([Slowdown(1.5), Slowdown(10.0, "more than")], "1.5, more than 10"),
        ([Slowdown(4.0, "more than"), Slowdown(1.0, "at most")], "more than 4, at most 1"),
    ],
)
def test_a_slowdown_in_words(found, said):
    known = Knowledge("g", ("g-s0",), Estimate.missing(1.0), {"bad": found})
    assert known.said("bad") == said
    assert known.said("good") == ""
    assert (known.mean("bad") is None) == any(one.bound for one in found)
