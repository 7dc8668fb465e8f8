"""Fitted scorers: the hashing against a slow, obvious version; what a fit writes and measures."""

from __future__ import annotations

import itertools
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import made_labels, tiny_classifier
from phf.core.config import ConfigError
from phf.scorers import Fitted, fitting
from phf.scorers import fitted as hashing
from phf.scorers.fitted import AtThreshold, HashedNgrams, feature_matrix, load_fitted
from phf.scorers.fitting import Labels, fit_scorer, measure, platt, read_labels

MASK = 2**64 - 1
BASE = int(hashing._BASE)
MIX = int(hashing._MIX)


def slow_bucket(value: int, kind: int) -> int:
    value ^= value >> 32
    value = value * (MIX + 2 * kind) & MASK
    value ^= value >> 29
    return (value * BASE & MASK) >> (64 - hashing.BUCKET_BITS)


def slow_features(text: str) -> list[int]:
    """Buckets of a text's features, one after the other, by loops over big integers."""
    data = [32 if b in (0, 9, 10, 11, 12, 13) else b for b in text.lower().encode("utf-8", "surrogatepass")]

    def polynomial(part: list[int]) -> int:
        return sum((b + 1) * pow(BASE, i, 2**64) for i, b in enumerate(part)) & MASK

    padded = data + [0] * max(hashing.CHAR_NGRAMS)
    found = [slow_bucket(polynomial(padded[i : i + n]), n) for n in hashing.CHAR_NGRAMS for i in range(len(data))]
    words = [list(m) for m in re.findall(rb"[0-9a-z_'\x80-\xff]+", bytes(data))]
    hashes = [polynomial(w) for w in words]
    found += [slow_bucket(h, 1) for h in hashes]
    found += [slow_bucket((a * MIX + b) & MASK, 2) for a, b in itertools.pairwise(hashes)]
    return found


TEXTS = st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=6)


@given(TEXTS)
@settings(max_examples=60, deadline=None)
def test_features_equal_a_slow_implementation_whatever_the_other_texts(texts):
    matrix = feature_matrix(texts).toarray() if len(texts) < 3 else None
    weights = np.random.default_rng(0).normal(size=1 << hashing.BUCKET_BITS).astype(np.float32)
    logits = HashedNgrams(weights, 0.25, 1.0, 0.0).logits(texts)
    for number, text in enumerate(texts):
        buckets = slow_features(text)
        expected = sum(float(weights[b]) for b in buckets) / math.sqrt(len(buckets)) + 0.25
        assert logits[number] == pytest.approx(expected, rel=1e-5, abs=1e-5)
        if matrix is not None:
            counts = np.bincount(buckets, minlength=1 << hashing.BUCKET_BITS) / math.sqrt(len(buckets))
            np.testing.assert_allclose(matrix[number], counts, rtol=1e-5)


def test_runs_of_texts_do_not_change_the_scores(monkeypatch):
    texts = [f"text number {i} " * (i % 7 + 1) for i in range(50)] + ["x" * 5000]
    weights = np.random.default_rng(1).normal(size=1 << hashing.BUCKET_BITS).astype(np.float32)
    scorer = HashedNgrams(weights, 0.0, 1.0, 0.0)
    whole = scorer.logits(texts)
    monkeypatch.setattr(hashing, "_CHUNK", 64)
    np.testing.assert_allclose(scorer.logits(texts), whole, rtol=1e-12)


def test_a_fit_finds_bad_texts_and_measures_itself(tmp_path):
    labels = made_labels()
    other = made_labels(100, 1)
    card = fit_scorer(labels, tmp_path / "s", [Labels("other", other.texts, other.bad_N, {})])
    assert card.metrics["held out"].auc > 0.95
    assert card.metrics["other"].n == 100
    assert card.metrics["held out"].n + round(0.8 * 400) == pytest.approx(400, abs=40)
    low, high = card.metrics["other"].auc_ci95
    assert low <= card.metrics["other"].auc <= high
    scorer = Fitted(str(tmp_path / "s"))
    good, bad = scorer.score_segments(["river stone tree ", "a zorp glarn "])
    assert 0 <= good < 0.5 < bad <= 1
    assert scorer.score_text("") != scorer.score_text("")  # NaN
    assert scorer.identity()["unit"] == "probability"
    assert not list(tmp_path.glob("s/*.pkl"))
    assert {p.name for p in (tmp_path / "s").iterdir()} == {"scorer.json", "weights.safetensors"}


def test_fits_give_the_same_bytes_and_a_finished_fit_does_not_run_again(tmp_path, monkeypatch):
    fit_scorer(made_labels(), tmp_path / "a")
    fit_scorer(made_labels(), tmp_path / "b")
    for name in ("scorer.json", "weights.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    monkeypatch.setattr(fitting, "_fit_ngrams", None)
    fit_scorer(made_labels(), tmp_path / "a")


def test_other_weights_than_the_cards_are_refused(tmp_path):
    fit_scorer(made_labels(), tmp_path / "a")
    fit_scorer(made_labels(seed=3), tmp_path / "b")
    (tmp_path / "b" / "weights.safetensors").replace(tmp_path / "a" / "weights.safetensors")
    with pytest.raises(ConfigError, match="is not the file that scorer.json describes"):
        load_fitted(str(tmp_path / "a"))


def test_duplicates_are_all_held_out_or_all_fitted():
    assert fitting._hash_unit("a", b"phf fit heldout") == fitting._hash_unit("a", b"phf fit heldout")
    units = [fitting._hash_unit(str(i), b"phf fit heldout") for i in range(4000)]
    assert np.mean(np.array(units) < 0.2) == pytest.approx(0.2, abs=0.03)


def test_platt_finds_the_slope_and_offset_of_known_probabilities():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=200_000) * 2
    bad = rng.random(len(logits)) < 1 / (1 + np.exp(-(0.7 * logits - 0.4)))
    slope, offset = platt(logits, bad)
    assert slope == pytest.approx(0.7, abs=0.02)
    assert offset == pytest.approx(-0.4, abs=0.02)


def test_measures_by_hand():
    m = measure(np.array([0.9, 0.6, 0.4, 0.1]), np.array([True, False, True, False]))
    assert m.auc == 0.75  # of four (bad, good) pairs three are in order
    assert m.at["0.5"] == AtThreshold(precision=0.5, recall=0.5, share=0.5)
    assert m.at["0.9"].precision is None  # no score is above it
    assert m.brier == pytest.approx((0.01 + 0.36 + 0.36 + 0.01) / 4)


def test_labels_are_read_and_odd_rows_are_counted(tmp_path):
    rows = [{"t": "a", "y": 1}, {"t": "b", "y": "false"}, {"t": "", "y": 0}, {"t": "c", "y": None}, {"t": 3, "y": 1}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    labels = read_labels(tmp_path / "a.jsonl", "t", "y")
    assert labels.texts == ("a", "b")
    assert labels.bad_N.tolist() == [True, False]
    assert labels.rejected == {"empty text": 1, "no label": 1, "text is not a string but int": 1}
    (tmp_path / "a.csv").write_text('text,class\n"a, b",0\nc,2\n')
    assert read_labels(tmp_path / "a.csv", label="class", bad=["0"]).bad_N.tolist() == [True, False]
    with pytest.raises(ConfigError, match="label '2' is neither true nor false; name the values that mean bad"):
        read_labels(tmp_path / "a.csv", label="class")
    with pytest.raises(ConfigError, match=r"no column 'klass' \(did you mean 'class'\?\)"):
        read_labels(tmp_path / "a.csv", label="klass")
    with pytest.raises(ConfigError, match="no label is '9'"):
        read_labels(tmp_path / "a.csv", label="class", bad=["0", "9"])
    with pytest.raises(ConfigError, match="both classes are needed"):
        read_labels(tmp_path / "a.csv", label="class", bad=["0", "2"])
    (tmp_path / "q.tsv").write_text('text\tlabel\n"quoted\t1\nplain\t0\n')  # GLUE's files have no quoting
    assert read_labels(tmp_path / "q.tsv").texts == ('"quoted', "plain")
    (tmp_path / "b.jsonl").write_text('{"text": 1\n')
    with pytest.raises(ConfigError, match="line 1: malformed JSON"):
        read_labels(tmp_path / "b.jsonl")
    (tmp_path / "deep.jsonl").write_text('{"text": "a", "m": ' + "[" * 1500 + "]" * 1500 + "}\n")
    with pytest.raises(ConfigError, match="line 1: nested too deeply"):
        read_labels(tmp_path / "deep.jsonl")
    with pytest.raises(ConfigError, match="does not exist"):
        read_labels(tmp_path / "none.csv")


def test_files_without_a_label_and_loose_commas(tmp_path):
    (tmp_path / "none.csv").write_text("text,label\n")
    with pytest.raises(ConfigError, match="none.csv holds no labelled text"):
        read_labels(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("text,label\na line,\n")
    with pytest.raises(ConfigError, match=r"holds no labelled text \(skipped: 1 no label\)"):
        read_labels(tmp_path / "empty.csv")
    (tmp_path / "two.csv").write_text("text,label\na line,nasty\nanother,fine\n")
    assert read_labels(tmp_path / "two.csv", bad=["nasty", ""]).bad_N.tolist() == [True, False]


def test_too_few_labels_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match="at least 5 of each are needed"):
        fit_scorer(made_labels(20), tmp_path / "s")
    assert not (tmp_path / "s").exists()
    with pytest.raises(ConfigError, match="it was not written by `phf fit-scorer`"):
        Fitted(str(tmp_path)).score_text("a")


@pytest.mark.slow
def test_a_transformer_can_be_fitted_instead(tmp_path):

    tiny_classifier(tmp_path / "base", "bert", ["a", "b"])
    card = fit_scorer(made_labels(300), tmp_path / "s", kind="transformer", base_model=str(tmp_path / "base"))
    assert card.kind == "transformer"
    scores = Fitted(str(tmp_path / "s")).score_segments(["river stone", "zorp vex"])
    assert all(0 <= s <= 1 for s in scores)
    with pytest.raises(ConfigError, match="name the model to finetune"):
        fit_scorer(made_labels(300), tmp_path / "t", kind="transformer")
