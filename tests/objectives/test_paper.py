"""Every objective against a plain float64 loop: values and gradients, edge values, data edits."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from helpers import NAN, OBJECTIVE_GRID, make_store, pieces_before, whole_block
from phf.core.config import ConfigError, to_plain
from phf.objectives import AWR, MLE, RWR, Conditional, Filtering, LossInputs, Unlikelihood
from phf.training.fused import log_probabilities


def by_hand(objective, p, score, mask, value):
    """The definitions of Korbak et al. 2023, section 2, target by target, in Python floats. -> (sum, counted)."""
    total = 0.0
    counted = 0
    for p_t, s, m, v in zip(p, score, mask, value, strict=True):
        if not m:
            continue
        nll = -math.log(p_t)
        name = objective.name
        if name in ("mle", "filtering", "conditional"):
            total = total + nll
            counted = counted + 1
            continue
        if math.isnan(s):
            continue
        if name == "masking":
            if s <= objective.threshold:
                total = total + nll
                counted = counted + 1
            continue
        counted += 1
        if name == "unlikelihood" and objective.by == "score":
            total += (1 - s) * nll - objective.alpha * s * math.log(1 - p_t)
            continue
        if name == "unlikelihood":
            total += nll if s <= objective.threshold else -objective.alpha * math.log(1 - p_t)
            continue
        reward = -s if objective.rewards == "raw" else (-s - objective.reward_mean) / objective.reward_std
        if name == "rwr":
            total += math.exp(reward / objective.beta - objective.log_norm) * nll
        else:
            fixed = objective.fixed_value is not None
            v = objective.fixed_value if fixed else v
            weight = math.exp(min((reward - v) / objective.beta, math.log(objective.max_weight)))
            total += objective.alpha * weight * nll
            total += 0.0 if fixed else (1 - objective.alpha) * (v - reward) ** 2
    return total, counted


@pytest.mark.parametrize("objective", OBJECTIVE_GRID, ids=repr)
def test_loss_equals_the_definition(objective):
    rng = np.random.default_rng(0)
    n = 200
    p = rng.uniform(1e-6, 1 - 1e-6, n)
    score = rng.choice([0.0, 0.25, 0.5, 1.0, NAN], n)
    mask = rng.random(n) < 0.8
    value = rng.uniform(-1, 0, n)
    logp = torch.tensor(np.log(p)).reshape(4, 50).requires_grad_()
    log1mp = torch.tensor(np.log1p(-p)).reshape(4, 50).requires_grad_()
    value_BT = torch.tensor(value).reshape(4, 50).requires_grad_()
    score_BT = torch.tensor(score, dtype=torch.float64).reshape(4, 50)
    mask_BT = torch.tensor(mask).reshape(4, 50)
    out = objective.loss(LossInputs(logp, log1mp, score_BT, mask_BT, value_BT))
    expected, counted = by_hand(objective, p, score, mask, value)
    assert out.loss_sum.item() == pytest.approx(expected, rel=1e-6)
    assert objective.counted(score_BT, mask_BT).sum() == counted
    grads = torch.autograd.grad(out.loss_sum, [logp, log1mp, value_BT], allow_unused=True)
    for grad in grads:
        assert grad is None or torch.isfinite(grad).all()
    if grads[0] is not None:  # masked and uncounted targets reach nothing
        assert (grads[0][~objective.counted(score_BT, mask_BT)] == 0).all()


@pytest.mark.parametrize("objective", OBJECTIVE_GRID, ids=repr)
def test_gradients_equal_finite_differences_of_the_definition(objective):
    p0 = [0.2, 0.7, 0.999, 1e-4]
    score = [0.0, 1.0, 1.0, 0.25]
    value0 = [-0.4, -0.2, -0.6, -0.9]
    mask = [True] * 4
    logits = torch.tensor([[math.log(p / (1 - p)), 0.0] for p in p0], dtype=torch.float64, requires_grad=True)
    value = torch.tensor(value0, dtype=torch.float64, requires_grad=True)
    logp, log1mp = log_probabilities(logits, torch.zeros(4, dtype=torch.long))
    out = objective.loss(LossInputs(logp, log1mp, torch.tensor(score, dtype=torch.float64), torch.tensor(mask), value))
    grad_logit, grad_value = torch.autograd.grad(out.loss_sum, [logits, value], allow_unused=True)
    weights = None
    if objective.name == "awr":  # V is detached in the weight: hold the weight still
        weights = value0
    for i in range(4):

        def at(logit_i, i=i):
            p = list(p0)
            p[i] = 1 / (1 + math.exp(-logit_i))
            return by_hand(objective, p, score, mask, weights or value0)[0]

        x = math.log(p0[i] / (1 - p0[i]))
        h = 1e-5
        numeric = (at(x + h) - at(x - h)) / (2 * h)
        assert grad_logit[i, 0].item() == pytest.approx(numeric, rel=1e-4, abs=1e-6)
        if grad_value is not None:
            reward = (
                -score[i] if objective.rewards == "raw" else (-score[i] - objective.reward_mean) / objective.reward_std
            )
            assert grad_value[i].item() == pytest.approx(
                2 * (1 - objective.alpha) * (value0[i] - reward), rel=1e-5, abs=1e-9
            )


def test_unlikelihood_with_threshold_zero_is_unlikelihood():
    """Defect 1: `if score_threshold:` made it another objective."""
    x = LossInputs(
        torch.tensor([-0.5, -0.5]), torch.tensor([-0.9, -0.9]), torch.tensor([0.0, 0.1]), torch.tensor([True, True])
    )
    assert Unlikelihood(0.0).loss(x).loss_sum.item() == pytest.approx(0.5 + 0.9)
    assert Unlikelihood(0.2).loss(x).loss_sum.item() == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("logit", [-60.0, -20.0, 0.0, 20.0, 60.0, 200.0])
def test_log_one_minus_p_has_a_gradient_for_p_near_one(dtype, logit):
    """Defect 15: a clamp at 1e-20 makes it 0; a float32 log p makes it NaN. d(-log(1-p))/dlogit = p."""
    logits = torch.tensor([[logit, 0.0]], dtype=dtype, requires_grad=True)
    logp, log1mp = log_probabilities(logits.float() if dtype == torch.bfloat16 else logits, torch.tensor([0]))
    x = LossInputs(logp, log1mp, torch.ones(1), torch.ones(1, dtype=torch.bool))
    Unlikelihood(0.0).loss(x).loss_sum.backward()
    p = 1 / (1 + math.exp(-logit)) if logit > -700 else 0
    assert logits.grad[0, 0].item() == pytest.approx(p, rel=1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert log1mp.item() == pytest.approx(
        -(logit + math.log1p(math.exp(-logit)) if logit > 0 else math.log1p(math.exp(logit))), rel=1e-5, abs=1e-30
    )


def test_thresholds_are_compared_in_float32_as_scores_are_stored(tmp_path):
    t = 0.1  # not a float32 number: the stored score is larger than it in float64
    tokens = make_store(tmp_path, [[[1]], [[2]]], [t, 0.10001])
    assert pieces_before(Conditional(t, drop=0), tokens, 0).tolist() == [0, 1]
    assert Filtering(t).edit(whole_block(tokens), 0).times_D.tolist() == [True, False]
    x = LossInputs(
        torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([t], dtype=torch.float32), torch.tensor([True])
    )
    assert Unlikelihood(t).loss(x).loss_sum.item() == 1.0


def test_filtering_keeps_documents_by_mean_score(tmp_path):
    docs = [[[1], [2]], [[3], [4]], [[5]], [[6], [7]]]
    tokens = make_store(tmp_path, docs, [0.0, 1.0, 0.2, 0.2, NAN, 0.1, NAN])
    fitted = Filtering("median").fit(tokens.statistics)
    assert fitted.threshold == pytest.approx(np.float32(0.2))  # of the means 0.5, 0.2, (none), 0.1
    assert fitted.edit(whole_block(tokens), 0).times_D.tolist() == [False, True, False, True]


def test_conditional_marks_unjudged_segments_bad_and_drops_a_share(tmp_path):
    tokens = make_store(tmp_path / "a", [[[1], [2], [3], []]], [0.0, 0.5, NAN, 0.0])
    assert pieces_before(Conditional(0, drop=0), tokens, 0).tolist() == [0, 1, 1, -1]
    many = make_store(tmp_path / "b", [[[1]] * 20_000], [0.0] * 20_000)
    dropped = pieces_before(Conditional(0, drop=0.1), many, 0) == -1
    assert 0.09 < dropped.mean() < 0.11
    np.testing.assert_array_equal(dropped, pieces_before(Conditional(0, drop=0.1), many, 0) == -1)
    assert (dropped != (pieces_before(Conditional(0, drop=0.1), many, 1) == -1)).any()


def test_standardised_weights_have_mean_one_and_spread(tmp_path):
    """Defect 2: on raw scores RWR is nearly MLE. Weights over the store's training tokens."""
    rng = np.random.default_rng(0)
    docs = [[[1] * int(rng.integers(1, 9)) for _ in range(4)] for _ in range(200)]
    scores = (rng.random(800) * 2e-3).tolist()
    heldout = (rng.random(200) < 0.2).tolist()
    tokens = make_store(tmp_path, docs, scores, heldout)
    table = whole_block(tokens)
    fitted = RWR(0.5).fit(tokens.statistics)
    use = table.train_S
    w = np.exp(fitted.reward(torch.tensor(table.score_S[use])).numpy() / fitted.beta - fitted.log_norm)
    assert np.average(w, weights=table.tokens_S[use]) == pytest.approx(1, rel=1e-4)
    assert w.max() / w.min() > 100
    raw = RWR(10.0, rewards="raw").fit(tokens.statistics)
    w_raw = np.exp(raw.reward(torch.tensor(table.score_S[use])).numpy() / 10)
    assert w_raw.max() / w_raw.min() < 1.001


def test_weighted_objectives_report_the_effective_sample_size():
    x = LossInputs(
        torch.full((4,), -1.0),
        torch.full((4,), -1.0),
        torch.tensor([0.0, 0.0, 1.0, NAN]),
        torch.ones(4, dtype=torch.bool),
    )
    m = RWR(1.0, rewards="raw").loss(x).metrics
    w = [1, 1, math.exp(-1)]
    assert m["weight"].item() == pytest.approx(sum(w))
    assert m["weight_sq"].item() == pytest.approx(sum(v * v for v in w))


def test_only_awr_has_a_value_head():
    """Defect 3: RWR dragged an untrained one along."""
    assert RWR().value is None
    assert MLE().value is None
    assert AWR().value == "linear"
    assert AWR(rewards="raw").value == "negative_sigmoid"


def test_the_value_head_of_awr_can_be_chosen():
    assert AWR(head="negative_sigmoid").value == "negative_sigmoid"
    assert AWR(rewards="raw", head="linear").value == "linear"
    assert AWR(fixed_value=0.0).value is None  # 0 is a value
    assert not AWR(reaches_trunk=False).value_reaches_trunk
    assert AWR().value_reaches_trunk
    assert to_plain(AWR()) == to_plain(AWR(max_weight=1000, reaches_trunk=True))
    assert to_plain(AWR()).keys() == {"alpha", "beta", "name", "reward_mean", "reward_std", "rewards"}
    for mistake in ({"head": "linear"}, {"reaches_trunk": False}):
        with pytest.raises(ValueError, match="leave out head and reaches_trunk"):
            AWR(fixed_value=0.0, **mistake)


def test_awr_clips_its_weights_at_1000():
    x = LossInputs(
        torch.tensor([-1.0]), torch.tensor([-1.0]), torch.tensor([0.0]), torch.tensor([True]), torch.tensor([-50.0])
    )
    assert AWR(0.1, rewards="raw", alpha=1.0).loss(x).loss_sum.item() == pytest.approx(1000, rel=1e-5)


def test_mistakes_are_errors(tmp_path):
    same = make_store(tmp_path, [[[1], [2]]], [0.5, 0.5])
    with pytest.raises(ConfigError, match="same score"):
        RWR().fit(same.statistics)
    none = make_store(tmp_path / "n", [[[1], [2]]], [NAN, NAN])
    with pytest.raises(ConfigError, match="no training segment was judged"):
        AWR().fit(none.statistics)
    with pytest.raises(ConfigError, match="median needs judged segments, and no training segment was judged"):
        Filtering("median").fit(none.statistics)
    with pytest.raises(ValueError, match=r"call fit\(statistics\) first"):
        Filtering("median").edit(whole_block(same), 0)
    with pytest.raises(ValueError, match=r"call fit\(statistics\) first"):
        RWR().reward(torch.zeros(1))
    with pytest.raises(ValueError, match="value"):
        AWR(rewards="raw").loss(LossInputs(*[torch.zeros(1)] * 3, torch.ones(1, dtype=torch.bool)))


def test_fit_changes_nothing_else(tmp_path):
    tokens = make_store(tmp_path, [[[1], [2]]], [0.0, 0.5])
    for objective in (MLE(), Conditional(0.1), Unlikelihood(0.0), RWR(10, rewards="raw")):
        assert objective.fit(tokens.statistics) == objective
    fitted = AWR(0.3, alpha=0.2).fit(tokens.statistics)
    assert dataclasses.replace(fitted, reward_mean=None, reward_std=None) == AWR(0.3, alpha=0.2)
