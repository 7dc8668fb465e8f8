"""Fitted scorers: the hashing against a slow, obvious version; what a fit writes and measures."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from helpers import made_labels, tiny_classifier
from phf.core.config import ConfigError
from phf.core.statistics import auc_gain, wilson
from phf.core.types import Estimate
from phf.report.format import curve_text
from phf.scorers import Fitted, fitting
from phf.scorers import fitted as hashing
from phf.scorers.finetuning import OrdinalLoss
from phf.scorers.fitted import (
    HELD_OUT,
    AtThreshold,
    CurvePoint,
    HashedNgrams,
    LearningCurve,
    feature_matrix,
    load_fitted,
    seen_texts,
)
from phf.scorers.fitting import CUT_SCALE, fit_ordinal, fit_scorer, measure, platt
from phf.scorers.labels import Labels, one_each, read_labels

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
    assert {p.name for p in (tmp_path / "s").iterdir()} == {
        "heldout.jsonl",
        "scorer.json",
        "seen.bin",
        "weights.safetensors",
    }


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


def test_damaged_files_of_a_scorer_are_seen(tmp_path):
    fit_scorer(made_labels(), tmp_path / "a")
    weights = tmp_path / "a" / "weights.safetensors"
    whole = weights.read_bytes()
    for damaged in (b"", whole[:5], whole[: len(whole) // 2]):
        weights.write_bytes(damaged)
        with pytest.raises(ConfigError, match="is not the file that scorer.json describes"):
            load_fitted(str(tmp_path / "a"))
    seen = tmp_path / "a" / "seen.bin"
    whole = seen.read_bytes()
    settings = {"name": "fitted", "path": str(tmp_path / "a")}
    assert len(seen_texts(settings)) == len(whole) // 8
    for damaged in (whole[:-3], whole[:-8], b""):
        seen.write_bytes(damaged)
        with pytest.raises(ConfigError, match="fit the scorer again"):
            seen_texts(settings)


def test_calibration_never_turns_a_scorer_around():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=400)
    slope, _ = platt(logits, rng.random(400) < 1 / (1 + np.exp(logits)))  # the higher, the less often bad
    assert slope == 0


def test_held_out_labels_keep_their_order_and_their_judge(tmp_path):
    labels = made_labels()
    level = np.where(labels.bad_N, 2, np.arange(len(labels.texts)) % 2)
    ordered = replace(labels, level_N=level, bad_from=2, judges=("rule",))
    fit_scorer(ordered, tmp_path / "a")
    rows = [json.loads(line) for line in (tmp_path / "a" / "heldout.jsonl").read_text().splitlines()]
    of_text = dict(zip(labels.texts, level.tolist(), strict=True))
    assert all(row["level"] == of_text[row["text"]] and row["judge"] == "rule" for row in rows)
    assert all(row["label"] == int(row["level"] >= 2) for row in rows)
    assert read_labels(tmp_path / "a" / "heldout.jsonl").judges == ("rule",)


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
    ci95 = wilson(1, 2)
    assert m.at["0.5"] == AtThreshold(0.5, 0.5, 0.5, precision_ci95=ci95, recall_ci95=ci95)
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
    assert len(card.curve.points) == 3
    sizes = [point.texts for point in card.curve.points]
    assert sizes[0] == sizes[2] // 4 < sizes[1] == sizes[2] // 2
    assert card.curve.points[-1].auc == pytest.approx(card.metrics["held out"].auc)
    assert not (tmp_path / "s" / "part").exists()
    short = fit_scorer(
        made_labels(300), tmp_path / "n", kind="transformer", base_model=str(tmp_path / "base"), curve=False
    )
    assert short.curve is None
    assert short.metrics["held out"].auc == card.metrics["held out"].auc  # the curve changes nothing else
    with pytest.raises(ConfigError, match="name the model to finetune"):
        fit_scorer(made_labels(300), tmp_path / "t", kind="transformer")


def test_the_loss_of_a_transformer_with_an_order_is_that_of_a_loop():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 2, generator=g, requires_grad=True)
    level = torch.randint(0, 4, (50,), generator=g)
    loss = OrdinalLoss([1, 2, 3], bad_from=2)
    with torch.no_grad():
        loss.offset_K.copy_(torch.tensor([1.0, 7.0, -0.5]))  # that of the label from which on texts are bad is 0
    found = loss({"logits": logits}, level)
    total = 0.0
    slope = np.zeros((50, 2))
    for n in range(50):
        z = float((logits[n, 1] - logits[n, 0]).detach())
        for k, c in ((1, 1.0), (2, 0.0), (3, -0.5)):
            p = 1 / (1 + math.exp(-(z + c)))
            total -= math.log(p if level[n] >= k else 1 - p)
            error = p - float(level[n] >= k)
            slope[n] += np.array([-error, error]) / 50
    assert found.item() == pytest.approx(total / 50, rel=1e-5)
    found.backward()
    np.testing.assert_allclose(logits.grad.numpy(), slope, atol=1e-6)
    assert loss.offset_K.grad[1] == 0 != loss.offset_K.grad[0]


@pytest.mark.slow
def test_a_transformer_learns_from_labels_with_an_order(tmp_path):
    """The saved model is one of two classes, which plain transformers loads without a word."""
    tiny_classifier(tmp_path / "base", "bert", ["a", "b"])
    labels = ordinal_labels(300)
    card = fit_scorer(labels, tmp_path / "s", kind="transformer", base_model=str(tmp_path / "base"), curve=False)
    assert card.ordinal
    assert card.bad_from == 2
    names = set(load_file(tmp_path / "s" / "model.safetensors"))
    assert not any("cuts" in name for name in names)
    scorer = Fitted(str(tmp_path / "s"))
    assert all(0 <= score <= 1 for score in scorer.score_texts(list(labels.texts[:20])))


# labels with an order


def ordinal_labels(count=600, seed=0):
    """Texts with 0 to 3 bad words; labels are their number."""
    rng = np.random.default_rng(seed)
    level_N = rng.integers(0, 4, count)
    good = ["river", "stone", "tree", "cloud", "bird", "grass", "wind"]
    bad = ["zorp", "glarn", "vex", "quib"]
    texts = [" ".join([*rng.choice(good, 8 - n), *rng.choice(bad, n)]) + f" {rng.integers(10_000)}" for n in level_N]
    return Labels("ordinal", tuple(texts), level_N >= 2, {}, level_N, 2)


def test_an_ordinal_fit_is_the_model_of_proportional_odds():
    """Against the penalized likelihood written out and minimized in float64."""
    from scipy.optimize import minimize
    from scipy.sparse import csr_matrix

    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 2)).astype(np.float32)
    level = np.digitize(x @ [1.5, -1.0] + rng.logistic(size=300), [-1.0, 0.5, 2.0])
    strength = 3.0

    def loss(p):
        w, b, c = p[:2], p[2], p[3:]
        total = 0.5 * (w @ w + b * b + (c @ c) / CUT_SCALE**2)
        for k in range(3):
            z = x @ w + b + c[k]
            y = level >= k + 1
            total += strength / 3 * np.logaddexp(0, np.where(y, -z, z)).sum()
        return total

    best = minimize(loss, np.zeros(6), method="BFGS", options={"gtol": 1e-8}).x
    for bad_from in (1, 2, 3):
        weights, intercept = fit_ordinal(csr_matrix(x), level, bad_from, strength, seed=0)
        np.testing.assert_allclose(weights, best[:2], atol=0.02)
        assert intercept == pytest.approx(best[2] + best[2 + bad_from], abs=0.03)


def test_a_scorer_learns_from_labels_with_an_order(tmp_path):
    labels = ordinal_labels()
    card = fit_scorer(labels, tmp_path / "s")
    assert card.bad_from == 2
    assert card.ordinal  # the labels were made by counting, so their order says much
    assert card.metrics["held out"].auc > 0.97
    scorer = Fitted(str(tmp_path / "s"))
    found = np.array(scorer.score_texts(list(labels.texts)))
    means = [found[labels.level_N == level].mean() for level in range(4)]
    assert means == sorted(means)


def write_labels(folder, rows, manifest):
    folder.mkdir()
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if manifest is not None:
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_folder_of_labels_says_which_are_bad(tmp_path):
    rows = [{"text": f"t{n}", "label": n % 4, "judge": "a"} for n in range(8)]
    folder = write_labels(tmp_path / "l", rows, {"bad_from": 3})
    found = read_labels(folder)
    assert found.bad_N.tolist() == [n % 4 == 3 for n in range(8)]
    assert found.level_N.tolist() == [n % 4 for n in range(8)]
    assert found.levels == [1, 2, 3]
    assert read_labels(folder, bad_from=1).bad_N.sum() == 6
    assert read_labels(folder / "labels.jsonl", bad=["1", "2"]).bad_N.sum() == 4
    plain = write_labels(tmp_path / "p", [{"text": f"t{n}", "label": n % 2} for n in range(4)], {"bad_from": 1})
    assert read_labels(plain).level_N is None
    assert read_labels(plain).mark == read_labels(plain / "labels.jsonl").mark


@pytest.mark.parametrize(
    "label, manifest, more, said",
    [
        (3, None, {}, "did not finish there"),
        (3, {"bad_from": 0}, {}, "does not say from which label"),
        (3, {}, {}, "does not say from which label"),
        (1.5, {"bad_from": 2}, {}, "no whole number from 0 to 100"),
        (-1, {"bad_from": 2}, {}, "no whole number"),
        (101, {"bad_from": 2}, {}, "no whole number"),
        ("²", {"bad_from": 2}, {}, "no whole number"),
        (3, {"bad_from": 9}, {}, "both classes are needed"),
        (3, {"bad_from": 2}, {"bad": ["1"], "bad_from": 2}, "not both"),
    ],
)
def test_folders_of_labels_that_cannot_be_used(tmp_path, label, manifest, more, said):
    folder = write_labels(tmp_path / "l", [{"text": "a", "label": 0}, {"text": "b", "label": label}], manifest)
    with pytest.raises(ConfigError, match=said):
        read_labels(folder, **more)


def test_numbers_above_one_ask_for_the_first_bad_label(tmp_path):
    (tmp_path / "l.csv").write_text("text,label\na,0\nb,2\n")
    with pytest.raises(ConfigError, match="or the first bad one with --bad-from"):
        read_labels(tmp_path / "l.csv")


# learning curves


def slow_auc(value, bad):
    pairs = [(v, w) for v, b in zip(value, bad, strict=True) if b for w, c in zip(value, bad, strict=True) if not c]
    return sum((v > w) + 0.5 * (v == w) for v, w in pairs) / len(pairs)


def test_the_gain_in_auc_is_a_paired_difference():
    rng = np.random.default_rng(0)
    bad = rng.random(400) < 0.4
    old = bad + rng.normal(size=400) * 2
    new = bad + rng.normal(size=400)
    found = auc_gain(new, old, bad)
    assert found.mean == pytest.approx(slow_auc(new, bad) - slow_auc(old, bad), abs=1e-12)
    assert found.ci95[0] > 0
    same = auc_gain(old, old, bad)
    assert (same.mean, same.ci95) == (0, (0, 0))
    assert math.isnan(auc_gain(new, old, np.zeros(400, bool)).mean)


def test_a_fit_says_whether_more_labels_would_help(tmp_path):
    card = fit_scorer(made_labels(800), tmp_path / "s")
    assert card.curve is not None
    sizes = [point.texts for point in card.curve.points]
    assert sizes == sorted(sizes)
    assert sizes[-1] == pytest.approx(2 * sizes[-2], abs=1)
    assert card.curve.points[-1].auc == card.metrics["held out"].auc
    held = read_labels(tmp_path / "s" / HELD_OUT)
    assert len(held.texts) == card.metrics["held out"].n
    assert held.bad_N.sum() == card.metrics["held out"].bad


@pytest.mark.parametrize(
    "low, high, said",
    [
        (0.01, 0.05, "would help"),
        (-0.01, 0.005, "would hardly help"),
        (0.001, 0.004, "would hardly help"),
        (-0.01, 0.05, "too few held-out texts"),
        (math.nan, math.nan, "too few held-out texts"),
    ],
)
def test_a_curve_in_words(low, high, said):
    point = CurvePoint(10, 0.5, (0.4, 0.6))
    assert said in curve_text(LearningCurve([point, point], Estimate(0.02, 0.01, 5, (low, high))))


# weights, and several labels of a text


def test_several_labels_of_a_text_are_one_text(tmp_path):
    plain = made_labels(300)
    five = Labels("five", plain.texts * 5, np.tile(plain.bad_N, 5), {})
    one = fit_scorer(plain, tmp_path / "one")
    all_five = fit_scorer(five, tmp_path / "five")
    assert all_five.texts == one.texts == 300
    assert all_five.metrics["held out"].n == one.metrics["held out"].n
    assert all_five.metrics["held out"].auc_ci95 == one.metrics["held out"].auc_ci95
    assert [p.texts for p in all_five.curve.points] == [p.texts for p in one.curve.points]


def test_the_label_of_most_judges_counts():
    level = np.array([0, 2, 2, 1, 1, 0, 3, 0, 1])
    given = Labels("l", ("a", "a", "a", "b", "b", "c", "c", "d", "d"), level >= 2, {}, level, 2, np.arange(9.0) + 1)
    found = one_each(given)
    assert dict(zip(found.texts, found.level_N.tolist(), strict=True)) == {"a": 2, "b": 1, "d": 0}
    assert found.bad_N.tolist() == [True, False, False]
    assert found.weight_N.tolist() == [1, 4, 8]
    assert found.rejected == {"as many labels bad as good": 1}
    assert one_each(found) is found


def test_weighted_measures_are_those_of_repeated_texts():
    rng = np.random.default_rng(0)
    p = rng.random(60)
    bad = rng.random(60) < p
    times = rng.integers(1, 5, 60)
    weighted = measure(p, bad, times.astype(float))
    repeated = measure(np.repeat(p, times), np.repeat(bad, times))
    for name in ("auc", "average_precision", "brier", "calibration_error"):
        assert getattr(weighted, name) == pytest.approx(getattr(repeated, name), rel=1e-9)
    for threshold in ("0.3", "0.5"):
        a, b = weighted.at[threshold], repeated.at[threshold]
        assert (a.precision, a.recall, a.share) == pytest.approx((b.precision, b.recall, b.share))
        assert a.precision_ci95[1] - a.precision_ci95[0] > b.precision_ci95[1] - b.precision_ci95[0]
    for name in ("average_precision", "brier"):
        low, high = getattr(weighted, f"{name}_ci95")
        assert low < getattr(weighted, name) < high
        assert high - low > np.subtract(*getattr(repeated, f"{name}_ci95")[::-1])
    slope, offset = platt(p, bad, times.astype(float))
    assert np.isfinite([slope, offset]).all()


def test_weights_are_a_column_of_positive_numbers(tmp_path):
    (tmp_path / "l.csv").write_text("text,label,weight\na,0,2.5\nb,1,1\n")
    found = read_labels(tmp_path / "l.csv")
    assert found.weight_N.tolist() == [2.5, 1.0]
    (tmp_path / "m.csv").write_text("text,label,weight\na,0,3\nb,1,1\n")
    assert read_labels(tmp_path / "m.csv").mark != found.mark
    for bad in ("0", "-1", "x", "nan", ""):
        (tmp_path / "b.csv").write_text(f"text,label,weight\na,0,1\nb,1,{bad}\n")
        with pytest.raises(ConfigError, match="weights are positive numbers"):
            read_labels(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("text,label,weight\na,0,1e308\nb,1,1e308\n")
    with pytest.raises(ConfigError, match="too large to be added up"):
        read_labels(tmp_path / "c.csv")


def test_other_weights_are_another_fit(tmp_path, capsys):
    plain = made_labels(200)
    for scale in (1.0, 2.0):
        weights = np.where(plain.bad_N, scale, 1.0)
        fit_scorer(Labels("l", plain.texts, plain.bad_N, {}, weight_N=weights), tmp_path / "s")
    assert (tmp_path / "s.old-1").is_dir()
    assert "weight" in (tmp_path / "s" / "heldout.jsonl").read_text()
    fit_scorer(Labels("l", plain.texts * 2, np.tile(plain.bad_N, 2), {}), tmp_path / "t")
    assert "weight" not in (tmp_path / "t" / "heldout.jsonl").read_text()  # votes are not segments
