from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phf import metrics


def test_wilson_where_none_and_all_hit():
    low, high = metrics.wilson(0, 100)
    assert low == 0
    assert high == pytest.approx(0.0370, abs=1e-4)  # z^2 / (n + z^2)
    assert metrics.wilson(100, 100)[1] == 1
    assert metrics.wilson(0, 0) == (0, 1)


@given(st.integers(1, 500), st.data())
def test_wilson_holds_the_share(n, data):
    hits = data.draw(st.integers(0, n))
    low, high = metrics.wilson(hits, n)
    assert 0 <= low <= hits / n <= high <= 1


def test_mean_estimate_leaves_out_and_counts_nan():
    e = metrics.mean_estimate([1, 2, 3, math.nan])
    assert (e.mean, e.n, e.unjudged) == (2, 3, 1)
    assert e.stderr == pytest.approx(1 / math.sqrt(3))
    assert e.ci95[0] <= 2 <= e.ci95[1]


def test_mean_estimate_of_nothing_is_nan_not_zero():
    assert math.isnan(metrics.mean_estimate([]).mean)
    assert math.isnan(metrics.mean_estimate([math.nan]).mean)
    assert math.isnan(metrics.mean_estimate([1.0]).stderr)


def test_bootstrap_interval_covers_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        low, high = metrics.bootstrap_mean(rng.normal(1, 1, 80), seed=i, resamples=400)
        hits += low <= 1 <= high
    assert 180 <= hits <= 199  # 95% of 200 is 190


def test_t_interval_by_hand():
    e = metrics.t_interval([1, 2, 3])  # mean 2, sd 1, stderr 0.57735, t(2) 4.303
    assert e.mean == 2
    assert e.ci95 == pytest.approx((2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)))
    assert math.isnan(metrics.t_interval([1]).stderr)


@pytest.mark.parametrize("df, t", [(1, 12.706), (10, 2.228), (30, 2.042), (100, 1.984)])
def test_t_quantiles_of_the_tables(df, t):
    assert metrics._t975(df) == pytest.approx(t, abs=2e-3)


def test_ratio_is_geometric_and_nan_without_logarithm():
    e = metrics.ratio_interval([1, 4], [2, 2])
    assert e.mean == pytest.approx(1)
    assert e.ci95[0] * e.ci95[1] == pytest.approx(1)
    assert math.isnan(metrics.ratio_interval([0, 1], [1, 1]).mean)


def test_distinct_and_entropy_by_hand():
    # bigrams: (a b) (b a) (a b): 2 of 3 distinct
    assert metrics.distinct_n(["a b a b"], 2) == pytest.approx(2 / 3)
    assert math.isnan(metrics.distinct_n(["a"], 2))
    assert metrics.ngram_entropy(["a b", "a b"], 1) == pytest.approx(math.log(2))
