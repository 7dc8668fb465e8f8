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


curves = st.lists(st.floats(0.5, 8), min_size=2, max_size=8).map(
    lambda losses: [(1000 * 2**n, loss) for n, loss in enumerate(losses)]
)


@given(curves, st.floats(0.4, 9))
def test_the_slowdown_is_where_plain_training_has_the_loss(curve, loss):
    tokens = curve[-1][0]
    found = slowdown(loss, tokens, curve)
    expected = slow_slowdown(loss, tokens, curve)
    if expected is None:
        assert found == Slowdown(1.0, is_bound=True)
    elif loss >= curve[0][1]:
        assert found == Slowdown(tokens / curve[0][0], is_bound=True)
    else:
        assert not found.is_bound
        assert found.times == pytest.approx(expected, rel=1e-3)


@given(curves, st.floats(0.4, 9), st.floats(0.4, 9))
def test_a_larger_loss_is_no_smaller_slowdown(curve, a, b):
    small, large = sorted((a, b))
    assert slowdown(small, curve[-1][0], curve).times <= slowdown(large, curve[-1][0], curve).times


def test_by_hand():
    curve = [(100, 4.0), (200, 3.0), (400, 2.0)]
    assert slowdown(3.0, 400, curve).times == pytest.approx(2)
    assert slowdown(2.5, 400, curve).times == pytest.approx(math.sqrt(2))
    assert slowdown(2.0, 400, curve).times == pytest.approx(1)
    assert slowdown(1.9, 400, curve) == Slowdown(1.0, is_bound=True)
    assert slowdown(4.5, 400, curve) == Slowdown(4.0, is_bound=True)


@pytest.mark.parametrize(
    "found, bounds, said",
    [
        (Estimate(2.0, 0.1, 3, (1.5, 2.5)), 0, "2 (1.5 to 2.5)"),
        (Estimate(1.1, 0.1, 3, (0.8, 1.4)), 0, "1.1 (1 to 1.4)"),
        (Estimate(10.0, 0.0, 3, (10.0, 10.0)), 3, "more than 10"),
        (Estimate(1.0, 0.0, 3, (1.0, 1.0)), 3, "1 at most"),
        (Estimate(1.5, 0.1, 3, (1.2, 1.8)), 1, "1.5 (1.2 to 1.8); 1 of 3 seeds only bounded"),
        (Estimate.missing(1.5, n=1), 0, "1.5"),
    ],
)
def test_a_slowdown_in_words(found, bounds, said):
    known = Knowledge("g", ("g-s0",), Estimate.missing(1.0), {"bad": found}, {"bad": bounds})
    assert known.said("bad") == said
    assert known.said("good") == ""
