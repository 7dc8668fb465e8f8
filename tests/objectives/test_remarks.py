"""What training says about thresholds and weights before it starts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from helpers import make_store, train_tiny
from phf.objectives import AWR, MLE, RWR, Conditional, Filtering, Schedule, Unlikelihood
from phf.objectives.compose import PhaseOf
from phf.recipes.recipe import load_recipe
from phf.scorers import PII


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    """Two hundred documents of one segment of two tokens, with the scores 0, 0.005, 0.01 ..."""
    docs = [[[1, 2]] for _ in range(200)]
    return make_store(tmp_path_factory.mktemp("s") / "s", docs, [n / 200 for n in range(200)]).statistics


def test_shares_are_counted_in_float32(statistics):
    assert statistics.share_at_most(0.5) == 101 / 200
    assert statistics.share_at_most(0.005, "documents") == 2 / 200
    assert statistics.share_at_most(-1.0) == 0


@pytest.mark.parametrize(
    "objective, remark",
    [
        (Filtering("median"), "filtering keeps 50.0% of the training documents (mean score at most 0.4975)"),
        (Filtering(0.005), "warning: filtering keeps 1.0% of the training documents (mean score at most 0.005); does"),
        (Filtering(0.99), "warning: filtering keeps 99.5% of the"),
        (Conditional(0.5), "49.50% of the judged training tokens score above the threshold 0.5"),
        (Unlikelihood(2.0), "warning: 0.00% of the judged training tokens score above the threshold 2; does it fit"),
        (Conditional(-1.0), "warning: 100.00% of the judged training tokens"),
        (RWR(0.5), "the effective sample size of the weights is "),
        (RWR(10.0, rewards="raw"), "the effective sample size of the weights is 99.92%"),
        (
            RWR(1000.0, rewards="raw"),
            "warning: the effective sample size of the weights is 100.00% of the training tokens: they hardly",
        ),
        (RWR(0.001, rewards="raw"), "warning: the effective sample size of the weights is 0.5"),
        (Schedule((PhaseOf(MLE(), until=0.5), PhaseOf(Conditional(0.5)))), "conditional: 49.50% of the judged"),
        (Schedule((PhaseOf(MLE(), until=0.5), PhaseOf(Filtering(0.005)))), "warning: filtering: filtering keeps 1.0%"),
    ],
)
def test_remarks(objective, remark, statistics):
    found = objective.fit(statistics).remarks(statistics)
    assert len(found) == 1
    assert found[0].startswith(remark)


def test_the_effective_sample_size_is_kishs(statistics):
    fitted = RWR(0.5).fit(statistics)
    scores = np.arange(200) / 200
    rewards = -(scores - scores.mean()) / scores.std()
    weights = np.exp(rewards / 0.5)
    share = weights.sum() ** 2 / (200 * (weights**2).sum())
    assert (
        fitted.remarks(statistics)[0]
        == f"the effective sample size of the weights is {share:.2%} of the training tokens"
    )


def test_objectives_without_a_threshold_say_nothing(statistics):
    assert MLE().remarks(statistics) == AWR().fit(statistics).remarks(statistics) == []


def test_training_prints_them_once(tokens_dir, tmp_path, capsys):
    train_tiny(tokens_dir, tmp_path / "r", Conditional(), steps=2)
    first = capsys.readouterr().err
    assert "note: " in first
    assert "of the judged training tokens score above the threshold 0" in first
    train_tiny(tokens_dir, tmp_path / "r", Conditional(), steps=2)
    assert "judged training tokens" not in capsys.readouterr().err


def test_pii_divided_twice_is_the_scale_of_the_published_scores():
    texts = ["mail me: a@b.org\n", "nothing here\n", "see https://x.org and https://y.org\n", ""]
    once = PII().judge_segments(texts)
    twice = PII(divide="twice").judge_segments(texts)
    assert once[1] == twice[1]
    for text, a, b in zip(texts, once[0], twice[0], strict=True):
        assert (math.isnan(a) and math.isnan(b)) if not text else b == pytest.approx(a / len(text))
        scores = PII(divide="twice").score_text(text), PII().score_text(text)
        assert not text or scores[0] == pytest.approx(scores[1] / len(text))
    assert PII(divide="twice").identity() != PII().identity()


def test_the_papers_threshold_of_pii_comes_with_its_scale():
    """2.86e-4 is the median of scores that were divided twice; of scores divided once it keeps almost nothing."""
    corrected = load_recipe(["paper-pii"])
    assert (corrected.objectives["filtering"].threshold, corrected.scorer.divide) == ("median", "once")
    paper = load_recipe(["paper-pii", "preset=paper"])
    assert (paper.objectives["filtering"].threshold, paper.scorer.divide) == (2.86e-4, "twice")
    assert paper.scorer.detectors == corrected.scorer.detectors == "paper"
