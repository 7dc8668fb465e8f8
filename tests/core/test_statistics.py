from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phf.core import statistics
from phf.core.statistics import compile_rate, expected_max, paired_difference, repetition, self_bleu


def test_wilson_where_none_and_all_hit():
    low, high = statistics.wilson(0, 100)
    assert low == 0
    assert high == pytest.approx(0.0370, abs=1e-4)  # z^2 / (n + z^2)
    assert statistics.wilson(100, 100)[1] == 1
    assert statistics.wilson(0, 0) == (0, 1)


@given(st.integers(1, 500), st.data())
def test_wilson_holds_the_share(n, data):
    hits = data.draw(st.integers(0, n))
    low, high = statistics.wilson(hits, n)
    assert 0 <= low <= hits / n <= high <= 1


def test_mean_estimate_leaves_out_and_counts_nan():
    e = statistics.mean_estimate([1, 2, 3, math.nan])
    assert (e.mean, e.n, e.unjudged) == (2, 3, 1)
    assert e.stderr == pytest.approx(1 / math.sqrt(3))
    assert e.ci95[0] <= 2 <= e.ci95[1]


def test_mean_estimate_of_nothing_is_nan_not_zero():
    assert math.isnan(statistics.mean_estimate([]).mean)
    assert math.isnan(statistics.mean_estimate([math.nan]).mean)
    assert math.isnan(statistics.mean_estimate([1.0]).stderr)


def test_bootstrap_interval_covers_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        low, high = statistics.bootstrap_mean(rng.normal(1, 1, 80), seed=i, resamples=400)
        hits += low <= 1 <= high
    assert 180 <= hits <= 199  # 95% of 200 is 190


def test_t_interval_by_hand():
    e = statistics.t_interval([1, 2, 3])  # mean 2, sd 1, stderr 0.57735, t(2) 4.302653
    assert e.mean == 2
    assert e.ci95 == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))
    assert math.isnan(statistics.t_interval([1]).stderr)
    assert all(map(math.isnan, statistics.t_interval([0.25, 0.25, 0.25]).ci95))  # equal values have no known spread


def test_equal_seeds_have_the_interval_of_their_samples():
    seeds = [statistics.share_estimate([True] * 4 + [False] * 12) for _ in range(3)]
    assert statistics.over_seeds(seeds).ci95 == statistics.wilson(4, 16)
    nothing = [statistics.share_estimate([False] * 16) for _ in range(3)]
    assert statistics.over_seeds(nothing).ci95 == statistics.wilson(0, 16)
    assert all(map(math.isnan, statistics.over_seeds([statistics.mean_estimate([0.0] * 9)] * 2).ci95))


def test_ratio_is_geometric():
    e = statistics.ratio_interval([1, 4], [2, 2])
    assert e.mean == pytest.approx(1)
    assert e.ci95[0] * e.ci95[1] == pytest.approx(1)
    assert math.isnan(statistics.ratio_interval([1, 1], [0, 1]).mean)
    assert math.isnan(statistics.ratio_interval([-1, 1], [1, 1]).mean)


def test_a_ratio_with_a_zero_is_that_of_the_sums_with_an_interval():
    above, below = [0.0, 1.0, 2.0], [10.0, 12.0, 8.0]
    e = statistics.ratio_interval(above, below)
    assert e.mean == pytest.approx(0.1)
    variance = sum((a - 0.1 * b) ** 2 for a, b in zip(above, below, strict=True)) / 2  # Cochran, section 2.11
    half = 4.302653 * math.sqrt(variance / 3) / 10
    assert e.ci95 == pytest.approx((max(0.1 - half, 0), 0.1 + half))
    none = statistics.ratio_interval([0, 0], [1, 2])
    assert none.mean == 0
    assert math.isnan(none.ci95[0])


def test_the_interval_of_a_ratio_with_zeros_covers_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        below = rng.normal(10, 1, 5)
        above = np.maximum(rng.normal(1, 1, 5), 0.0)
        low, high = statistics.ratio_interval(above.tolist(), below.tolist()).ci95
        hits += low <= 0.10833 <= high  # the mean of the positive part of N(1, 1), divided by 10
    assert hits > 0.88 * 400


def test_distinct_and_entropy_by_hand():
    # bigrams: (a b) (b a) (a b): 2 of 3 distinct
    assert statistics.distinct_n(["a b a b"], 2) == pytest.approx(2 / 3)
    assert math.isnan(statistics.distinct_n(["a"], 2))
    assert statistics.ngram_entropy(["a b", "a b"], 1) == pytest.approx(math.log(2))


def test_expected_max_is_the_mean_over_all_subsets():
    scores = [0.3, 0.1, 0.1, 0.9, 0.5, 0.2]
    for k in range(1, 7):
        subsets = [max(c) for c in itertools.combinations(scores, k)]
        assert expected_max(scores, k) == pytest.approx(sum(subsets) / len(subsets), rel=1e-12)
    assert expected_max([*scores, float("nan")], 2) == expected_max(scores, 2)
    assert math.isnan(expected_max(scores, 7))
    assert math.isnan(expected_max([], 1))
    many = np.random.default_rng(0).random(20_000)
    assert expected_max(many, 25) == pytest.approx(25 / 26, abs=0.002)  # of uniform numbers


def test_expected_max_is_unbiased():
    """Of 8 draws from a known distribution; the largest of the first 3 has the same mean."""
    rng = np.random.default_rng(1)
    draws = rng.exponential(size=(20_000, 8))
    estimates = [expected_max(row, 3) for row in draws]
    expected = 1 + 1 / 2 + 1 / 3  # of three exponential numbers
    assert np.mean(estimates) == pytest.approx(expected, abs=4 * np.std(estimates) / math.sqrt(len(draws)))


def test_paired_difference_uses_the_pairs():
    base = np.random.default_rng(0).normal(size=200) * 10
    found = paired_difference(base, base + 0.1)
    assert found.mean == pytest.approx(-0.1)
    assert found.ci95[1] < 0  # though the spread of each is a hundred times the difference
    assert paired_difference([1, float("nan")], [0, 1]).unjudged == 1


def nltk_self_bleu(texts, n, references, split):
    """As the reference implementation calls it."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    tokens = [split(t) for t in texts]
    scores = [
        sentence_bleu((tokens[:i] + tokens[i + 1 :])[:references], tokens[i], (1 / n,) * n, SmoothingFunction().method1)
        for i in range(len(tokens))
    ]
    return sum(scores) / len(scores)


SENTENCES = st.lists(st.sampled_from(["ab", "c", "the", "cat", "sat", ".", "on"]), max_size=14).map(" ".join)


@given(st.lists(SENTENCES, min_size=2, max_size=12), st.integers(1, 5), st.integers(1, 6))
@settings(max_examples=80, deadline=None)
def test_self_bleu_equals_nltk(texts, n, references):
    assert self_bleu(texts, n, references) == pytest.approx(nltk_self_bleu(texts, n, references, str.split), abs=1e-9)
    assert self_bleu(texts, n, references, "characters") == pytest.approx(
        nltk_self_bleu(texts, n, references, list), abs=1e-9
    )


def test_self_bleu_by_hand():
    assert self_bleu(["a b c d e f"] * 3, 2) == pytest.approx(1)
    assert self_bleu(["a b", "c d"], 2) == 0
    assert math.isnan(self_bleu(["a"], 2))


def test_repetition_and_compile_rate_by_hand():
    assert repetition("a b c d e") == 0
    assert repetition("a b a b a b", 2) == pytest.approx(1 - 2 / 5)
    assert math.isnan(repetition("a b"))
    assert compile_rate(["x = 1", "x = ", "def f(:", ""]) == 0.5
    assert compile_rate(["\x00", "(" * 500]) == 0
    assert math.isnan(compile_rate([]))


@given(
    st.lists(
        st.lists(st.sampled_from(["a b a", "b c d e", "", "a", "d d d d"]), min_size=1, max_size=3),
        min_size=1,
        max_size=30,
    )
)
@settings(max_examples=60, deadline=None)
def test_diversity_and_its_jackknife_equal_leaving_each_group_out(units):
    texts = [text for unit in units for text in unit]
    groups = min(20, len(units))
    left = [[t for n, unit in enumerate(units) if n % groups != g for t in unit] for g in range(groups)]
    for n in (1, 2):
        pairs = zip(
            statistics.ngram_diversity(units, n), (statistics.distinct_n, statistics.ngram_entropy), strict=True
        )
        for estimate, plain in pairs:
            assert estimate.mean == pytest.approx(plain(texts, n), nan_ok=True)
            values = np.array([v for v in (plain(part, n) for part in left) if v == v])
            if len(values) > 1 and estimate.mean == estimate.mean:
                if len(units) == groups == len(values):  # equal groups: the jackknife as Tukey has it
                    stderr = math.sqrt((groups - 1) / groups * ((values - values.mean()) ** 2).sum())
                    assert estimate.stderr == pytest.approx(stderr, abs=1e-9)
                assert estimate.ci95[0] <= estimate.mean <= estimate.ci95[1]


@pytest.mark.parametrize("count", [100, 30])  # groups of equal and of unequal size
def test_the_jackknife_finds_the_spread_of_new_texts(count):
    """The standard error from one set of texts against the deviation over many sets."""
    rng = np.random.default_rng(0)

    def texts():
        return [[" ".join(f"w{int(w)}" for w in rng.zipf(1.5, 20) % 500)] for _ in range(count)]

    sets = [statistics.ngram_diversity(texts(), 1) for _ in range(60)]
    for measure in (0, 1):
        spread = np.std([s[measure].mean for s in sets])
        said = np.median([s[measure].stderr for s in sets])
        assert 0.6 < said / spread < 1.6


def test_the_bootstrap_of_a_statistic_covers_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    alike = [statistics.bootstrap(np.median, rng.normal(1, 1, (80, 1)), seed=i, resamples=200) for i in range(150)]
    assert 133 <= sum(low <= 1 <= high for low, high in alike) <= 149  # 95% of 150 is 142
    # units of several values that move together: wider than if they were independent
    units = [np.full(size, value) for size, value in zip(rng.integers(1, 6, 60), rng.normal(size=60), strict=True)]
    low, high = statistics.bootstrap(np.mean, units)
    loose = statistics.bootstrap(np.mean, np.concatenate(units)[:, None])
    assert high - low > 1.2 * (loose[1] - loose[0])
    assert math.isnan(statistics.bootstrap(np.mean, [np.ones(3)])[0])


def test_an_estimate_of_all_or_none_has_wilsons_interval():
    assert statistics.bounded_estimate([0, 0, 0, math.nan]).ci95 == statistics.wilson(0, 3)
    assert statistics.bounded_estimate([1, 1]).ci95 == statistics.wilson(2, 2)
    assert statistics.bounded_estimate([0, 1, 0.5]).ci95 == statistics.mean_estimate([0, 1, 0.5]).ci95
    assert statistics.bounded_estimate([]).n == 0


def test_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    bad = rng.random(60) < 0.4
    value = np.round(bad + rng.normal(0, 1, 60), 1)  # with ties
    pairs = [(b > g) + 0.5 * (b == g) for b in value[bad] for g in value[~bad]]
    found = statistics.auc(value, bad)
    assert found.auc == pytest.approx(np.mean(pairs))
    low, high = found.ci95
    assert low < found.auc < high
    assert statistics.auc(value, bad, np.arange(60)) == found  # one group per unit
    twice = statistics.auc(np.tile(value, 4), np.tile(bad, 4), np.tile(np.arange(60), 4))
    assert twice.auc == pytest.approx(found.auc)
    assert twice.ci95 == pytest.approx(found.ci95)  # copies add no evidence
    low, high = statistics.auc(np.tile(value, 4), np.tile(bad, 4)).ci95
    assert high - low < 0.7 * (found.ci95[1] - found.ci95[0])
    missing = statistics.auc(value, np.ones(60, bool))
    assert np.isnan([missing.auc, *missing.ci95]).all()
