"""Rows in which no token attends to another document: equal to each document alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BloomConfig, BloomForCausalLM

from helpers import FAMILIES, losses_of, train_tiny, weights_of
from phf.core.config import ConfigError
from phf.core.runs import read_model_record
from phf.evaluation.heldout import heldout_loss
from phf.generation.loaded import load_model
from phf.objectives import MLE, Unlikelihood
from phf.training import attention
from phf.training.batches import document_positions
from phf.training.lm import FromConfig, build_lm
from phf.training.model import PHFModel

END = 0


def rows_of(cuts, length, rows=2, seed=0):
    """Rows of tokens with end-of-text at `cuts`, other tokens elsewhere."""
    ids = torch.randint(1, 290, (rows, length), generator=torch.Generator().manual_seed(seed))
    for row in range(rows):
        for cut in cuts:
            ids[row, (cut + 3 * row) % length] = END
    return ids


def documents(ids_T):
    """(start, end) of the documents of a row; the first starts with the row."""
    starts = sorted({0, *np.flatnonzero(ids_T.numpy() == END).tolist()})
    return list(zip(starts, [*starts[1:], len(ids_T)], strict=True))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 29), max_size=6), st.integers(1, 30))
def test_positions_start_again_with_every_document(cuts, length):
    ids = rows_of(cuts, length)
    found = document_positions(ids, END)
    for row in range(len(ids)):
        expected = [t - start for start, end in documents(ids[row]) for t in range(start, end)]
        assert found[row].tolist() == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_its_documents_one_by_one_in_float64(tokens, family):
    """The loss and its gradients; also where the row starts inside a document."""
    lm = build_lm(FromConfig(FAMILIES[family]), tokens.tokenizer, seed=1).double()
    model = PHFModel(lm, Unlikelihood(0.0), end_of_text=END)
    ids = rows_of([5, 6, 17], 33)
    scores = torch.randint(0, 2, (2, 32), generator=torch.Generator().manual_seed(2)).float()
    mask = torch.ones(2, 32, dtype=torch.bool)
    whole = model(ids[:, :-1], ids[:, 1:], scores, mask, denominator=1.0)["loss"]
    whole.backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = 0.0
    for row in range(2):
        for start, end in documents(ids[row, :-1]):
            part = slice(start, end)
            alone = PHFModel(lm, Unlikelihood(0.0))
            loss = alone(
                ids[row, :-1][None, part], ids[row, 1:][None, part], scores[None, row, part], mask[:1, part], 1.0
            )["loss"]
            loss.backward()
            total += loss.item()
    assert whole.item() == pytest.approx(total, rel=1e-10)
    for name, p in model.named_parameters():
        torch.testing.assert_close(together[name], p.grad, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("positions", [40, 200, attention.KEPT_POSITIONS + 30])
def test_blocks_with_a_mask_are_the_formula(positions):
    """Values and gradients, in float64."""
    ids = rows_of([7, 8, 31, positions // 2], positions)
    number = (ids == END).cumsum(1)
    allowed = (number[:, :, None] == number[:, None, :]).tril()
    g = torch.Generator().manual_seed(1)
    numbers = [torch.randn(2, 3, positions, 4, generator=g, dtype=torch.float64) for _ in range(4)]
    found = []
    for ours in (True, False):
        q, k, v = (x.clone().requires_grad_() for x in numbers[:3])
        if ours:
            out = attention.causal_attention(q, k, v, 0.5, allowed)
        else:
            scores = (0.5 * q @ k.transpose(-1, -2)).masked_fill(~allowed[:, None], float("-inf"))
            out = torch.softmax(scores, -1) @ v
        found.append((out.detach(), *torch.autograd.grad(out, (q, k, v), numbers[3])))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_in_bfloat16_the_blocks_are_used_and_close(tokens, family, compiled, monkeypatch):
    ids = rows_of([5, 50, 131], 140)
    scores, mask = torch.zeros(2, 139), torch.ones(2, 139, dtype=torch.bool)
    losses = {}
    used = []
    plain = attention.causal_attention
    if not compiled:
        monkeypatch.setattr(
            attention, "causal_attention", lambda *given: used.append(given[4] is not None) or plain(*given)
        )
    for name, dtype in (("bf16", torch.bfloat16), ("exact", None)):
        config = {**FAMILIES[family], "max_position_embeddings": 256}
        lm = build_lm(FromConfig(config), tokens.tokenizer, seed=1)
        model = PHFModel(lm, MLE(), dtype, compile=compiled, end_of_text=END)
        used.clear()
        losses[name] = model(ids[:, :-1], ids[:, 1:], scores, mask)["loss"].item()
        assert compiled or used == ([True] * lm.config.num_hidden_layers if name == "bf16" else [])
    assert losses["bf16"] == pytest.approx(losses["exact"], rel=5e-3)


def test_blocks_that_are_computed_again_have_the_same_gradients(tokens):
    """With gradient checkpointing, layers run a second time in the backward pass."""
    ids = rows_of([5, 50, 131], 140)
    scores, mask = torch.zeros(2, 139), torch.ones(2, 139, dtype=torch.bool)
    gradients = []
    for again in (False, True):
        lm = build_lm(FromConfig({**FAMILIES["llama"], "max_position_embeddings": 256}), tokens.tokenizer, seed=1)
        if again:
            lm.activation_checkpointing_enable()
        model = PHFModel(lm.train(), MLE(), torch.bfloat16, end_of_text=END)
        model(ids[:, :-1], ids[:, 1:], scores, mask)["loss"].backward()
        gradients.append([p.grad for p in lm.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_models_that_cannot_keep_documents_apart_are_refused():
    """BLOOM's attention depends on the distance alone and takes no positions."""
    lm = BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=16, n_layer=1, n_head=2))
    assert not attention.keeps_documents_apart(lm, END)
    with pytest.raises(ConfigError, match="train.document_mask: BloomForCausalLM does not keep the documents"):
        PHFModel(lm, MLE(), end_of_text=END)


def test_a_run_with_the_mask_resumes_and_is_judged_with_it(tokens_dir, tokens, tmp_path):
    train_tiny(tokens_dir, tmp_path / "whole", document_mask=True)
    train_tiny(tokens_dir, tmp_path / "parts", document_mask=True, stop_after=9)
    train_tiny(tokens_dir, tmp_path / "parts", document_mask=True)
    train_tiny(tokens_dir, tmp_path / "plain")
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")
    assert losses_of(tmp_path / "whole") != losses_of(tmp_path / "plain")
    assert read_model_record(tmp_path / "whole" / "model").document_mask
    assert not read_model_record(tmp_path / "plain" / "model").document_mask
    # judged: the loss of a row of all documents is that of each document alone
    model = load_model(tmp_path / "whole")
    together = heldout_loss(model, tokens, context=4000, threshold=0.0, control="none")
    eos = tokens.end_of_text_id
    total = 0.0
    for d in np.flatnonzero(tokens.heldout_D):
        first = int(tokens.doc_ends[d - 1]) if d else 0
        last = int(tokens.doc_ends[d])
        low = int(tokens.seg_ends[first - 1]) if first else 0
        ids = torch.tensor([[eos, *np.asarray(tokens.tokens[low : int(tokens.seg_ends[last - 1])]).tolist()]])
        with torch.no_grad():
            logits = model.only_text(model.logits(model.hidden(ids)))[0, :-1]
        total -= logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum().item()
    assert together.all.documents == tokens.heldout_D.sum() > 1
    assert together.all.nats_per_byte == pytest.approx(total / together.all.bytes, rel=1e-5)
