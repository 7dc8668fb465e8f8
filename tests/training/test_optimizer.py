"""Muon for matrices and AdamW for the rest, as one optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from helpers import TINY_MODEL, losses_of, metrics_of, train_config, train_tiny, weights_of
from phf.objectives import AWR, MLE
from phf.training.config import TrainConfig
from phf.training.lm import build_lm
from phf.training.model import PHFModel
from phf.training.optimizer import MuonAdamW, make_muon

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonal(matrix):
    """Five steps of the quintic Newton-Schulz iteration (Jordan et al. 2024)."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / x.norm()
    a, b, c = COEFFICIENTS
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_a_matrix_takes_the_steps_of_muon(shape):
    """Within what Newton-Schulz in bfloat16 rounds."""
    lr, decay, momentum = 0.02, 0.1, 0.95
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    parameter = nn.Parameter(start.clone())
    optimizer = MuonAdamW([{"params": [parameter], "weight_decay": decay}], [], 1e-3, lr, (0.9, 0.95))
    expected = start.double()
    buffer = torch.zeros(shape, dtype=torch.float64)
    for step in range(5):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        parameter.grad = gradient.clone()
        optimizer.step()
        buffer = momentum * buffer + (1 - momentum) * gradient.double()
        update = orthogonal((1 - momentum) * gradient.double() + momentum * buffer)
        expected = expected * (1 - lr * decay) - lr * 0.2 * max(shape) ** 0.5 * update
    moved = (parameter.detach().double() - start.double()).norm()
    assert (parameter.detach().double() - expected).norm() < 0.02 * moved


def test_vectors_embeddings_and_the_value_head_take_the_steps_of_adamw(tokens):
    model = PHFModel(build_lm(TINY_MODEL, tokens.tokenizer, seed=0), AWR().fit(tokens.statistics))
    config = train_config(lr=1e-3, optimizer="muon")
    decays = [name for name, p in model.named_parameters() if p.ndim == 2]
    optimizer = make_muon(model, model.lm, config, decays)
    adamw, bare, muon = optimizer.param_groups
    assert muon["lr"] == 1e-3
    assert muon["weight_decay"] == adamw["weight_decay"] == config.weight_decay
    assert bare["weight_decay"] == 0
    embedding = model.lm.get_input_embeddings().weight
    assert [p is embedding for p in adamw["params"]] == [True]  # tied with the output layer
    assert all(p.ndim == 1 for p in bare["params"])
    assert any(p is model.value_head.weight for p in bare["params"])
    count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert count == sum(p.numel() for p in model.parameters())
    assert {p.ndim for p in muon["params"]} == {2}


def test_any_parameters_may_be_frozen_and_weight_decay_is_by_name(tokens):
    model = PHFModel(build_lm(TINY_MODEL, tokens.tokenizer, seed=0), MLE())
    matrices = [(n, p) for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    for _, parameter in matrices:
        parameter.requires_grad_(False)
    only_adamw = make_muon(model, model.lm, train_config(optimizer="muon"), [])
    assert {p.ndim for g in only_adamw.param_groups for p in g["params"]} == {1, 2}
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is p for _, p in matrices))
    only_muon = make_muon(model, model.lm, train_config(optimizer="muon"), [matrices[0][0]])
    decayed, bare = only_muon.param_groups
    assert [p is matrices[0][1] for p in decayed["params"]] == [True]
    assert (decayed["weight_decay"], bare["weight_decay"]) == (train_config().weight_decay, 0)
    assert len(bare["params"]) == len(matrices) - 1
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="empty parameter list"):
        make_muon(model, model.lm, train_config(optimizer="muon"), [])


def test_a_loaded_state_continues_as_the_first_would():
    def made():
        generator = torch.Generator().manual_seed(0)
        parts = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((6, 4), (5, 3), (4,))]
        groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(parts, (0.1, 0.1, 0.0), strict=True)]
        return parts, MuonAdamW(groups[:1], groups[1:], 1e-2, 2e-2, (0.9, 0.95))

    def step(parameters, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()

    first, optimizer = made()
    step(first, optimizer, 1)
    second, other = made()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for mine, theirs in zip(second, first, strict=True):
        mine.data.copy_(theirs.data)
    for group in (*optimizer.param_groups, *other.param_groups):
        group["lr"] *= 0.5  # a schedule reaches both parts
    for seed in (2, 3):
        step(first, optimizer, seed)
        step(second, other, seed)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(other.state) == 3


def test_a_run_with_muon_learns_and_resumes_to_the_same_bytes(tokens_dir, tmp_path):
    train_tiny(tokens_dir, tmp_path / "whole", AWR(), optimizer="muon")
    train_tiny(tokens_dir, tmp_path / "parts", AWR(), optimizer="muon", stop_after=9)
    train_tiny(tokens_dir, tmp_path / "parts", AWR(), optimizer="muon")
    train_tiny(tokens_dir, tmp_path / "adamw", AWR())
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
    assert weights_of(tmp_path / "parts") != weights_of(tmp_path / "adamw")
    curve = losses_of(tmp_path / "whole")
    assert sum(curve[-3:]) < sum(curve[:3])
    assert [x["lr"] for x in metrics_of(tmp_path / "whole")] == [x["lr"] for x in metrics_of(tmp_path / "adamw")]


def test_a_learning_rate_of_muon_without_muon_is_an_error():
    with pytest.raises(ValidationError, match="muon_lr is for optimizer=muon"):
        TrainConfig(tokens=1e6, muon_lr=0.01)
