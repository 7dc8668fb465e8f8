"""Scores of tokens: a token is bad exactly if one of its characters is part of a fault."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from helpers import LINK, tiny_texts, train_tiny, write_jsonl
from phf.core import store
from phf.core.check import check_below
from phf.core.config import ConfigError
from phf.data.readers import Jsonl
from phf.data.scored import ScoredCorpus
from phf.data.segment import Lines
from phf.objectives import RWR, Attributes, Conditional, Each, Masking, Weights
from phf.scorers import PEP8, Function
from phf.scoring.score import add_scores, score_corpus
from phf.tokens.store import TokenStore, token_score_file, tokenize_corpus
from phf.tokens.tokenizer import TrainBPE

CODE = [f"def f{n}(a,b):\n    x = 1;  y=2\n    return  x\n" for n in range(30)]


def made(folder, texts, scorer):
    score_corpus(Jsonl(str(write_jsonl(folder / "t.jsonl", texts))), Lines(), scorer, folder / "scored")
    tokenize_corpus(folder / "scored", TrainBPE(300), folder / "tokens", heldout=0.2, token_scores=True)
    return TokenStore.open(folder / "tokens", by_token=True)


@pytest.mark.parametrize("texts, scorer", [(tiny_texts(20), LINK), (CODE, PEP8())], ids=["regex", "pep8"])
def test_a_token_is_bad_where_its_characters_are(tmp_path, texts, scorer):
    tokens = made(tmp_path, texts, scorer)
    corpus = ScoredCorpus(tmp_path / "scored")
    at = 0
    seen = set()
    for file in corpus.files:
        for document in corpus.read(file):
            bad = np.zeros(len(document.text) + 1, bool)
            for span in scorer.spans(document.text):
                bad[span.start : max(span.end, span.start + 1)] = True
            start = 0
            for text in document.texts:
                decoded = ""
                while decoded != text:
                    decoded += tokens.tokenizer.decode([tokens.tokens[at]], clean_up_tokenization_spaces=False)
                    piece = bad[start + len(decoded) - 1]
                    before = len(decoded) - len(tokens.tokenizer.decode([tokens.tokens[at]]))
                    expected = bad[start + before : start + len(decoded)].any()
                    assert tokens.token_score_T[at] == expected or (piece and not expected)
                    seen.add(bool(expected))
                    at += 1
                start += len(text)
    assert at == len(tokens.tokens)
    assert seen == {True, False}
    segment_bad = tokens.score_S > 0
    by_segment = np.maximum.reduceat(np.asarray(tokens.token_score_T, np.float32), np.r_[0, tokens.seg_ends[:-1]])
    if not scorer.judges_by_document:
        np.testing.assert_array_equal(by_segment > 0, segment_bad)


def test_masking_by_tokens_learns_more_than_by_segments(tmp_path):
    tokens = made(tmp_path, tiny_texts(60), LINK)
    runs = {
        of_tokens: train_tiny(tokens.path, tmp_path / str(of_tokens), Masking(), steps=3, token_scores=of_tokens)
        for of_tokens in (False, True)
    }
    # bad text is text of bad segments, whatever is learned of it
    assert runs[True].counts.exposure["read_bad"] == runs[False].counts.exposure["read_bad"] > 0
    assert runs[True].counts.exposure["learned_bad"] > runs[False].counts.exposure["learned_bad"] == 0
    assert runs[True].key != runs[False].key


def test_what_weights_rest_on_is_computed_from_the_scores_that_the_loss_reads(tmp_path):
    tokens = made(tmp_path, tiny_texts(60), LINK)
    use = np.repeat(~tokens.heldout_D, np.diff(tokens.seg_ends[tokens.doc_ends - 1], prepend=0))
    score = np.asarray(tokens.token_score_T, float)[use]
    bad = np.repeat(tokens.score_S > 0, tokens.tokens_S)[use]
    assert 0 < score.mean() < bad.mean()  # 1 where a token is bad
    rwr = RWR(beta=2.0).fit(tokens.statistics)
    assert (-rwr.reward_mean, rwr.reward_std) == (pytest.approx(score.mean()), pytest.approx(score.std()))
    weights, _ = rwr.weights(torch.from_numpy(score), torch.ones(len(score), dtype=torch.bool))
    assert weights.mean().item() == pytest.approx(1)
    weights, _ = (
        Weights(points=((0, 1), (1, 0.5)))
        .fit(tokens.statistics)
        .weights(torch.from_numpy(score), torch.ones(len(score), dtype=torch.bool))
    )
    assert weights.mean().item() == pytest.approx(1)
    assert Masking("median").fit(tokens.statistics).threshold == np.median(score)
    (said,) = Masking(0).remarks(tokens.statistics)
    assert said.startswith(f"{score.mean():.2%} of the judged training tokens")
    # what an edit decides for whole segments rests on the scores of segments
    (by_segment,) = Conditional(0).remarks(tokens.statistics)
    assert by_segment.startswith(f"{bad.mean():.2%} of the judged training tokens")
    assert Masking(0).remarks(TokenStore.open(tokens.path).statistics) == [by_segment]


def test_each_preference_is_read_by_token_where_it_has_scores_of_tokens(tmp_path):
    tokens = made(tmp_path, tiny_texts(60), LINK)
    (tmp_path / "f.py").write_text("def score(text):\n    return float('stone' in text)\n")
    add_scores(tmp_path / "scored", Function(f"{tmp_path}/f.py:score"), "letters")
    tokenize_corpus(tmp_path / "scored", TrainBPE(300), tokens.path, heldout=0.2, token_scores=True)
    both = Each({"letters": Masking(), "regex": Masking()})
    run = train_tiny(tokens.path, tmp_path / "run", both, steps=2, token_scores=True)
    assert run.counts.exposure["learned_bad"] > 0  # good tokens of lines with a link
    train_tiny(tokens.path, tmp_path / "attributes", Attributes(("letters", "regex")), steps=2, token_scores=True)
    with pytest.raises(store.StoreError, match="no scores of tokens for 'letters'"):
        train_tiny(tokens.path, tmp_path / "x", Masking(), steps=2, token_scores=True, scores="letters")


def test_a_threshold_for_scores_of_tokens_is_at_least_the_stored_score(tmp_path):
    tokens = made(tmp_path, tiny_texts(10), LINK)
    at = float(np.float16(0.3))
    assert at > 0.3
    assert Masking(0.3).fit(tokens.statistics).threshold == at
    assert Conditional(0.3).fit(tokens.statistics).threshold == 0.3
    assert Masking(0.3).fit(TokenStore.open(tokens.path).statistics).threshold == 0.3
    assert float(np.float16(0.8)) < 0.8
    assert Masking(0.8).fit(tokens.statistics).threshold == 0.8


def test_scores_of_tokens_are_added_checked_and_refused(tmp_path):
    tokens = made(tmp_path, tiny_texts(20), LINK)
    file = token_score_file(tokens.path, tokens.preference)
    whole = file.read_bytes()
    file.write_bytes(whole[:-2])
    with pytest.raises(store.StoreError, match="no scores of tokens"):
        TokenStore.open(tokens.path, by_token=True)
    tokenize_corpus(tmp_path / "scored", TrainBPE(300), tokens.path, heldout=0.2, token_scores=True)
    assert file.read_bytes() == whole
    assert not any(found.problems for found in check_below(tokens.path))
    file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert any(found.problems for found in check_below(tokens.path))
    (tmp_path / "m.py").write_text("def f(text):\n    return float(len(text))\n")
    score_corpus(Jsonl(str(tmp_path / "t.jsonl")), Lines(), Function(f"{tmp_path / 'm.py'}:f"), tmp_path / "other")
    with pytest.raises(ConfigError, match="reports no places"):
        tokenize_corpus(tmp_path / "other", TrainBPE(300), tmp_path / "t2", token_scores=True)


def test_a_segment_that_was_not_judged_has_tokens_that_were_not(tmp_path):
    from phf.core.types import ScoredDocument
    from phf.tokens.token_scores import token_scores
    from phf.tokens.tokenizer import train_bpe

    tokenizer = train_bpe(["a text"] * 9, 300)
    document = ScoredDocument("d", ("see https://a.b\n", "https://c.d\n"), (0.1, float("nan")))
    scores = token_scores(document, LINK, tokenizer)
    second = len(tokenizer("https://c.d\n", add_special_tokens=False)["input_ids"])
    assert np.isnan(scores[-second:]).all()
    assert not np.isnan(scores[:-second]).any()
    whole = dataclasses.replace(document, scores=(0.1, 0.2))
    assert token_scores(whole, LINK, tokenizer)[-second:].tolist() == [1.0] * (second - 1) + [0.0]
