"""Scores from a classifier of tokens, for texts and for the tokens of a store."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer, BertConfig, GPT2Config

from helpers import CLASSIFIER_WORDS, output_of, tiny_classifier, train_tiny, write_jsonl
from phf.cli import main
from phf.core.config import ConfigError
from phf.core.store import StoreError
from phf.data.readers import Jsonl
from phf.data.segment import Lines
from phf.objectives import Masking
from phf.scorers import GivenScores
from phf.scorers.token_classifier import TokenClassifier
from phf.scoring.score import add_scores, score_corpus
from phf.tokens.store import TokenStore, tokenize_corpus
from phf.tokens.tokenizer import TrainBPE

WORDS = [w for w in CLASSIFIER_WORDS if w.isalpha()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT of random weights with the labels O, NAME and MAIL."""
    path = tiny_classifier(tmp_path_factory.mktemp("ner") / "m", "bert", ["O", "NAME", "MAIL"])
    tokenizer = AutoTokenizer.from_pretrained(path)
    labels = {0: "O", 1: "NAME", 2: "MAIL"}
    config = BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=24,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        id2label=labels,
        initializer_range=0.6,
    )
    torch.manual_seed(3)
    AutoModelForTokenClassification.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_a_text_is_as_bad_as_its_worst_token(folder):
    scorer = TokenClassifier(model=folder, threshold=0.7)
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = " ".join(WORDS[:6])
    read = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
    places = read.pop("offset_mapping")[0].tolist()
    with torch.no_grad():
        p = model(**read).logits[0].double().softmax(-1)
    expected = {tuple(place): float(p[t, 1:].sum()) for t, place in enumerate(places) if place[1] > place[0]}
    found = scorer.token_spans(text)
    assert {(s.start, s.end): pytest.approx(s.score, abs=1e-6) for s in found} == expected
    assert scorer.score_text(text) == pytest.approx(max(expected.values()), abs=1e-6)
    assert {s.label for s in found} <= {"NAME", "MAIL"}
    assert [s.score > 0.7 for s in scorer.spans(text)] == [True] * sum(v > 0.7 for v in expected.values())
    assert math.isnan(scorer.score_text(""))
    scores, kinds = scorer.judge_segments([text, "", WORDS[0]])
    assert scores[0] == scorer.score_text(text)
    assert math.isnan(scores[1])
    assert sum(kinds.values()) == sum(len(scorer.spans(t)) for t in (text, WORDS[0]))
    assert scorer.bad_above == 0.7
    one = TokenClassifier(model=folder, labels=("MAIL",))
    assert one.score_text(text) == pytest.approx(float(p[1:-1, 2].max()), abs=1e-6)
    assert one.identity() != scorer.identity()


def test_a_long_text_is_read_in_windows(folder):
    scorer = TokenClassifier(model=folder)
    text = " ".join(WORDS * 8)
    places = [(s.start, s.end) for s in scorer.token_spans(text)]
    assert places == sorted(set(places))
    covered = np.zeros(len(text), bool)
    for start, end in places:
        covered[start:end] = True
    assert covered[[i for i, c in enumerate(text) if c != " "]].all()


def test_a_tokenizer_without_padding_and_special_tokens(tokens_dir, tmp_path):
    """As GPT-2's: windows of different lengths are read all the same."""
    tokenizer = AutoTokenizer.from_pretrained(tokens_dir / "tokenizer")
    assert tokenizer.pad_token is None
    sizes = {"n_positions": 24, "n_embd": 32, "n_layer": 1, "n_head": 2, "initializer_range": 0.6}
    torch.manual_seed(3)
    model = AutoModelForTokenClassification.from_config(
        GPT2Config(vocab_size=len(tokenizer), id2label={0: "O", 1: "NAME"}, **sizes)
    ).eval()
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    scorer = TokenClassifier(model=str(tmp_path / "m"))
    text = " ".join(WORDS * 4)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) % 21 > 3  # the last window is shorter
    with torch.no_grad():
        windows = [ids[start : start + 24] for start in range(0, len(ids) - 3, 21)]
        p = [model(torch.tensor([w])).logits[0].double().softmax(-1)[:, 1].tolist() for w in windows]
    expected = [0.0] * len(ids)
    for n, window in enumerate(p):
        for place, score in enumerate(window, 21 * n):
            expected[place] = max(expected[place], score)
    assert [s.score for s in scorer.token_spans(text)] == pytest.approx(expected, abs=1e-6)
    assert scorer.judge_segments(["", text])[0][1] == pytest.approx(max(expected), abs=1e-6)


def test_tokens_of_a_store_get_the_probabilities(folder, tmp_path, monkeypatch, capsys):
    texts = [" ".join(np.random.default_rng(n).choice(WORDS, 7)) + "\n" for n in range(30)]
    corpus = Jsonl(str(write_jsonl(tmp_path / "t.jsonl", texts)))
    score_corpus(corpus, Lines(), TokenClassifier(model=folder), tmp_path / "scored")
    command = ["tokenize", str(tmp_path / "scored"), str(tmp_path / "tokens"), "--vocab-size", "300", "--token-scores"]
    monkeypatch.setattr("sys.argv", ["phf", *command])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "token_classifier where the command names it (--scorer)" in capsys.readouterr().err
    output_of([*command, "--scorer", "token_classifier", f"scorer.model={folder}"], monkeypatch, capsys)
    tokens = TokenStore.open(tmp_path / "tokens", by_token=True)
    found = np.asarray(tokens.token_score_T).astype(np.float64)
    assert ((found >= 0) & (found <= 1)).all()
    assert len(np.unique(found)) > 20  # probabilities, not marks
    worst = np.maximum.reduceat(found, np.r_[0, tokens.seg_ends[:-1]])
    assert worst == pytest.approx(np.asarray(tokens.score_S), abs=2e-3)  # float16
    assert tokens.bad_above == 0.5
    run = train_tiny(tmp_path / "tokens", tmp_path / "run", Masking(), steps=3, token_scores=True)
    assert 0 < run.counts.exposure["learned_bad"] < run.counts.exposure["read_bad"]  # good tokens of bad segments


def test_it_may_score_the_tokens_of_a_second_preference(folder, tmp_path):
    texts = [" ".join(np.random.default_rng(n).choice(WORDS, 7)) + "\n" for n in range(30)]
    scorer = TokenClassifier(model=folder)
    rows = [json.dumps({"text": text, "score": n / 30}) + "\n" for n, text in enumerate(texts)]
    (tmp_path / "t.jsonl").write_text("".join(rows))
    score_corpus(Jsonl(str(tmp_path / "t.jsonl")), Lines(), GivenScores("n"), tmp_path / "s")
    add_scores(tmp_path / "s", scorer, "names")
    tokenize_corpus(tmp_path / "s", TrainBPE(300), tmp_path / "t", heldout=0.2, token_scores=True, scorer=scorer)
    tokens = TokenStore.open(tmp_path / "t", "names", by_token=True)
    assert len(np.unique(tokens.token_score_T)) > 20
    with pytest.raises(StoreError, match="no scores of tokens"):
        TokenStore.open(tmp_path / "t", by_token=True)


def test_what_cannot_be_used_is_an_error(folder, tmp_path):
    sequence = tiny_classifier(tmp_path / "s", "bert", ["good", "bad"])
    with pytest.raises(ConfigError, match="which of the labels"):
        TokenClassifier(model=str(sequence)).score_text("a")
    with pytest.raises(ConfigError, match="has no label 'MAILS'.*MAIL"):
        TokenClassifier(model=folder, labels=("MAILS",)).score_text("a")
    with pytest.raises(ConfigError, match="all labels"):
        TokenClassifier(model=folder, labels=("O", "NAME", "MAIL")).score_text("a")
    with pytest.raises(ConfigError, match="name a token classifier"):
        TokenClassifier().score_text("a")
