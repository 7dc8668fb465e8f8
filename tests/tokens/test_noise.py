"""Errors added to the scores that an objective sees."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import make_store, output_of, train_config, train_tiny
from phf.core.config import ConfigError, apply_overrides, validate
from phf.core.random import uniforms
from phf.objectives import Each, Filtering, Masking
from phf.report.audit import write_audit
from phf.scorers.labels import Labels
from phf.tokens import noise as noise_module
from phf.tokens import store as store_module
from phf.tokens.noise import ScorerNoise, noise_of_audit
from phf.training.config import TrainConfig

NOISE = ScorerNoise(missed=0.3, false_alarms=0.1)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """2,000 segments of one token, a fifth of them bad, 1 in 50 not judged, in many blocks."""
    monkeypatch.setattr(store_module, "BLOCK_SEGMENTS", (5, 5))
    rng = np.random.default_rng(0)
    scores = np.where(rng.random(2000) < 0.2, 1 + rng.random(2000), -rng.random(2000))
    scores[::50] = np.nan
    docs = [[[1]] * 4 for _ in range(500)]
    return make_store(tmp_path / "tokens", docs, scores, heldout=[n % 5 == 0 for n in range(500)])


def seen(store) -> np.ndarray:
    """The scores that an objective sees, block by block from the last one."""
    return np.concatenate([store.block(k).score_S for k in reversed(range(store.num_blocks))][::-1])


def test_the_errors_are_those_of_a_plain_loop(store):
    noisy = store.with_noise(NOISE, seed=7)
    wrong = uniforms(2000, 7, "scorer noise")
    rank = uniforms(2000, 7, "score of the noise")
    trained = np.repeat(~store.heldout_D, 4)
    judged = sorted(s for s, use in zip(store.score_S, trained, strict=True) if use and not np.isnan(s))
    good = [s for s in judged if s <= 0]
    bad = [s for s in judged if s > 0]
    expected = []
    for n, score in enumerate(store.score_S):
        if score > 0 and wrong[n] < 0.3:
            score = good[int(rank[n] * len(good))]
        elif score <= 0 and wrong[n] < 0.1:
            score = bad[int(rank[n] * len(bad))]
        expected.append(score)
    np.testing.assert_array_equal(seen(noisy), np.array(expected, np.float32))
    np.testing.assert_array_equal(seen(store), store.score_S)  # the store itself is as before


def test_counts_precision_and_recall_are_of_the_training_part(store):
    noisy = store.with_noise(NOISE, seed=3)
    use = np.repeat(~store.heldout_D, 4) & ~np.isnan(store.score_S)
    before = store.score_S[use] > 0
    after = seen(noisy)[use] > 0
    found = noisy.noise_counts
    assert (found.segments, found.bad) == (use.sum(), before.sum())
    assert (found.missed, found.false_alarms) == ((before & ~after).sum(), (after & ~before).sum())
    assert found.precision == pytest.approx((before & after).sum() / after.sum())
    assert found.recall == pytest.approx((before & after).sum() / before.sum())
    assert abs(found.missed / found.bad - 0.3) < 0.1
    assert abs(found.false_alarms / (found.segments - found.bad) - 0.1) < 0.03


def test_statistics_are_of_the_scores_with_errors(store):
    everything = store.with_noise(ScorerNoise(missed=1, false_alarms=1), seed=0)
    use = np.repeat(~store.heldout_D, 4) & ~np.isnan(store.score_S)
    np.testing.assert_array_equal(seen(everything)[use] > 0, store.score_S[use] <= 0)
    assert everything.statistics.median() > 0 > store.statistics.median()
    fitted = Filtering().fit(everything.statistics)
    assert fitted.threshold == np.float32(everything.statistics.median("documents"))


def test_seeds_draw_other_errors_and_one_seed_the_same(store):
    first, again, other = (seen(store.with_noise(NOISE, seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).sum() > 50


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("0.1", ScorerNoise(0.1, 0.1)),
        ("0", None),
        ("0.0", None),
        ("null", None),
        ("{missed: 0.5}", ScorerNoise(missed=0.5)),
        ("{false_alarms: 1}", ScorerNoise(false_alarms=1.0)),
    ],
)
def test_a_number_stands_for_both_kinds(setting, expected):
    given = apply_overrides({"tokens": 1e6}, [f"scorer_noise={setting}"])
    assert validate(given, TrainConfig, "here").scorer_noise == expected


@pytest.mark.parametrize("setting", ["1.5", "-0.1", "{missed: 2}", "{mised: 0.1}", "true", "much"])
def test_what_is_no_share_is_refused(setting):
    given = apply_overrides({"tokens": 1e6}, [f"scorer_noise={setting}"])
    with pytest.raises(ConfigError, match="scorer_noise"):
        validate(given, TrainConfig, "here")


def audited(folder, threshold=0.0):
    """The audit of a corpus whose segments score 0 to 1.5, by labels that are wrong near the threshold."""
    rng = np.random.default_rng(1)
    score = np.float32(rng.random(600) * 1.5 - 0.5)
    folder.mkdir()
    table = {"texts": [[f"s{n}\n"] for n in range(600)], "scores": [[float(s)] for s in score]}
    pq.write_table(pa.table(table), folder / "a.parquet")
    bad = score + rng.normal(0, 0.2, 600) > 0
    labels = Labels("labels.jsonl", tuple(f"s{n}" for n in range(600)), bad, {})
    page, found = write_audit(folder, labels, threshold=threshold)
    return page.with_suffix(".json"), found, score, bad


def test_the_errors_of_an_audit_are_where_it_found_them(store, tmp_path):
    path, audit, score, bad = audited(tmp_path / "scored")
    noise = validate(apply_overrides({"tokens": 1e6}, [f"scorer_noise={path}"]), TrainConfig, "here").scorer_noise
    assert noise.threshold == 0
    assert len(noise.by_score) == len(audit.strata) > 4
    low = -np.inf
    for end, share in noise.by_score:  # every text of the corpus has a label, so the shares are plain counts
        high = np.inf if end is None else end
        here = (score > low) & (score <= high)
        assert share == pytest.approx(float(((score > 0) != bad)[here].mean()), abs=1e-6)
        low = high
    shares = [share for _, share in noise.by_score]
    assert max(shares) > 10 * min(shares)

    with pytest.raises(ConfigError, match="the audit is of another scorer than that of"):
        store.with_noise(noise, seed=7)
    noisy = store.with_noise(dataclasses.replace(noise, scorer=None), seed=7)
    drawn = uniforms(2000, 7, "scorer noise")
    expected = []
    for n, value in enumerate(store.score_S):
        chance = next(
            share for end, share in noise.by_score if end is None or value <= np.float32(end) or value != value
        )
        expected.append(bool(drawn[n] < chance) and value == value)
    changed = (seen(noisy) > 0) != (store.score_S > 0)
    np.testing.assert_array_equal(changed, expected)
    assert noisy.noise_counts.missed == 0 < noisy.noise_counts.false_alarms  # far above the threshold nothing is wrong


def test_errors_of_another_threshold_are_refused(store, tmp_path):
    path, *_ = audited(tmp_path / "scored", threshold=0.25)
    with pytest.raises(ConfigError, match=r"the audit is about the threshold 0.25.*--threshold 0"):
        store.with_noise(dataclasses.replace(noise_of_audit(path), scorer=None), seed=0)


@pytest.mark.parametrize(
    "setting, message",
    [
        ("nowhere.json", "no audit that can be read"),
        ("{by_score: [[0.1, 0.5]]}", "the last must be null"),
        ("{by_score: [[0.5, 0.1], [0.2, 0.1], [null, 0]]}", "must rise"),
        ("{by_score: [[null, 0.1]], missed: 0.1}", "takes the place of missed"),
    ],
)
def test_errors_by_score_that_cannot_be(setting, message):
    given = apply_overrides({"tokens": 1e6}, [f"scorer_noise={setting}"])
    with pytest.raises(ConfigError, match=message):
        validate(given, TrainConfig, "here")


def test_no_audit_is_an_error(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match="no audit that can be read"):
        noise_of_audit(tmp_path / "x.json")


def test_a_run_says_what_its_objective_saw(store, tmp_path, tokens_dir):
    plain = train_tiny(tokens_dir, tmp_path / "plain", Masking(), steps=2)
    none = train_tiny(tokens_dir, tmp_path / "none", Masking(), steps=2, scorer_noise=0)
    noisy = train_tiny(tokens_dir, tmp_path / "noisy", Masking(), steps=2, scorer_noise=NOISE)
    assert plain.noise is None
    assert none.key == plain.key
    assert noisy.key != plain.key
    assert noisy.noise.missed > 0
    assert noisy.noise.false_alarms > 0
    before, after = plain.counts.exposure, noisy.counts.exposure
    assert after["read_bad"] == before["read_bad"] > after["learned_bad"] > before["learned_bad"] == 0
    assert "scorer_noise" not in plain.train


def test_errors_of_segments_go_with_no_other_scores(tokens_dir, tmp_path, store):
    with pytest.raises(ConfigError, match="reads several"):
        train_tiny(tokens_dir, tmp_path / "each", Each(members={"regex": Masking()}), steps=2, scorer_noise=0.1)
    with pytest.raises(ConfigError, match="errors are of segments"):
        dataclasses.replace(store, by_token=True).with_noise(NOISE, 0)


def test_without_a_bad_segment_there_is_nothing_to_draw(tmp_path):
    store = make_store(tmp_path / "good", [[[1], [2]]], [0, 0])
    with pytest.raises(ConfigError, match="no bad segment among 2"):
        store.with_noise(NOISE, 0)


def test_rare_bad_segments_are_found_and_many_are_thinned(tmp_path, monkeypatch):
    monkeypatch.setattr(noise_module, "SAMPLE", 8)
    scores = np.arange(1000) / 1000 - 1
    scores[[3, 500, 999]] = [0.5, 0.25, 1]
    store = make_store(tmp_path / "rare", [[[1]] * 10] * 100, scores)
    noise = store.with_noise(ScorerNoise(missed=1, false_alarms=0.5), 0).noise
    np.testing.assert_array_equal(noise.bad, np.array([0.25, 0.5, 1], np.float32))
    assert 8 <= len(noise.good) <= 16
    assert noise.good[0] < -0.9 < -0.1 < noise.good[-1]  # from all of the corpus
    every = np.diff(np.searchsorted(np.sort(scores[scores <= 0]), noise.good))
    assert set(every) <= {every[0], every[0] - 1, every[0] + 1}


def test_rows_are_shown_with_the_errors(tokens_dir, monkeypatch, capsys):
    def bad(*settings: str) -> int:
        shown = output_of(["rows", str(tokens_dir), "objective=masking", *settings], monkeypatch, capsys)
        return shown.count("bad, not learned: ")

    assert bad("train.scorer_noise={missed: 1}") == 0 < bad()


def test_settings_without_errors_are_written_as_before():
    assert train_config(scorer_noise=0) == train_config()
