"""Rows as `phf rows` shows them: each token once, with its kind."""

from __future__ import annotations

import pytest

from helpers import output_of
from phf.objectives import Conditional, Masking
from phf.tokens.store import TokenStore
from phf.tokens.tokenizer import add_control_tokens
from phf.training.order import training_order
from phf.training.show import pieces_of


@pytest.mark.parametrize("objective", [Conditional(drop=0.0), Masking()], ids=lambda o: o.name)
def test_the_pieces_are_the_targets_of_the_row(tokens_dir, objective):
    tokens = TokenStore.open(tokens_dir)
    fitted = objective.fit(tokens.statistics)
    tokenizer = tokens.tokenizer
    add_control_tokens(tokenizer, list(fitted.control_tokens))
    batch = training_order(tokens, fitted, tokenizer, 64, seed=0).batch(0, 20)
    rows = pieces_of(batch, tokens, fitted, tokenizer)
    kinds = set()
    for b, row in enumerate(rows):
        whole = tokenizer.decode(batch.target_BT[b], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert "".join(piece.text for piece in row) == whole
        assert sum(piece.tokens for piece in row) == 64
        at = 0
        for piece in row:
            scores = batch.score_BT[b, at : at + piece.tokens]
            kinds.add((piece.kind, piece.learned))
            if piece.kind in ("good", "bad"):
                assert ((scores > 0) == (piece.kind == "bad")).all()
            if piece.kind == "control":
                assert set(piece.text.replace("|><|", "|> <|").split()) <= {"<|good|>", "<|bad|>"}
            at += piece.tokens
    if objective.name == "masking":
        assert ("bad", False) in kinds
        assert ("good", True) in kinds
        assert ("bad", True) not in kinds
    else:
        assert {kind for kind, _ in kinds} == {"control", "end", "good", "bad"}
        assert all(learned for _, learned in kinds)


def test_the_command(tokens_dir, monkeypatch, capsys):
    out = output_of(
        ["rows", str(tokens_dir), "objective=masking", "train.context=32", "--rows", "2", "--start", "5"],
        monkeypatch,
        capsys,
    )
    heads = [line for line in out.splitlines() if line.startswith("row ")]
    assert len(heads) == 2
    assert heads[0].startswith("row 5: 32 targets, ")
    assert "  good: " in out
