"""Audits: numbers by hand, a corpus whose labels are all known, and intervals that cover the truth."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import write_jsonl
from phf.core.config import ConfigError
from phf.core.statistics import krippendorff_alpha
from phf.data.readers import Jsonl
from phf.data.segment import Lines
from phf.report.audit import write_audit
from phf.report.format import verdict
from phf.scorers import PII, Regex
from phf.scorers.labels import Labels
from phf.scoring.audit import audit
from phf.scoring.score import add_scores, score_corpus
from phf.scoring.strata import divided_strata, stratum_edges, weighted


def scored(folder, scores):
    """A corpus of one document per score; the text of a segment is its number."""
    folder.mkdir()
    table = {"texts": [[f"s{n}\n"] for n in range(len(scores))], "scores": [[float(s)] for s in scores]}
    pq.write_table(pa.table(table), folder / "a.parquet")
    return folder


def labels(pairs):
    return Labels("labels.jsonl", tuple(f"s{n}" for n, _ in pairs), np.array([bad for _, bad in pairs]), {})


def test_numbers_by_hand(tmp_path):
    """Four segments of ten above 0.5, 2 of 3 labels bad; six not above, 1 of 2 labels bad."""
    folder = scored(tmp_path / "s", [0.9, 0.9, 0.9, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    found = audit(folder, labels([(0, True), (1, True), (2, False), (4, True), (5, False)]), threshold=0.5)
    assert [(s.segments, s.labelled, s.bad) for s in found.strata] == [(6, 2, 1), (4, 3, 2)]
    row = found.main
    assert row.called_bad == 0.4
    assert row.precision.mean == pytest.approx(2 / 3)
    bad = 4 * 2 / 3 + 6 * 1 / 2
    assert found.bad_share.mean == pytest.approx(bad / 10)
    assert row.recall.mean == pytest.approx(4 * 2 / 3 / bad)
    assert row.clean_discarded.mean == pytest.approx(4 / 3 / (10 - bad))
    assert row.bad_kept.mean == pytest.approx(3 / bad)
    for share in (row.precision, row.recall, row.clean_discarded, row.bad_kept, found.bad_share):
        assert 0 <= share.ci95[0] < share.mean < share.ci95[1] <= 1
    assert [x.text for x in found.false_alarms] == ["s2\n"]
    assert [x.text for x in found.misses] == ["s4\n"]
    assert "66.7%" in verdict(found)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.52])
def test_labels_of_every_segment_give_the_plain_counts(tmp_path, threshold):
    rng = np.random.default_rng(3)
    scores = np.where(rng.random(200) < 0.4, 0.0, np.float32(rng.random(200).round(2)))
    bad = rng.random(200) < scores * 0.8 + 0.05
    found = audit(scored(tmp_path / "s", scores), labels(list(enumerate(bad.tolist()))), threshold=threshold)
    assert sum(s.labelled for s in found.strata) == sum(s.segments for s in found.strata) == 200
    assert 4 <= len(found.at) <= 9
    for row in found.at:
        above = [s > row.threshold for s in scores]
        hits = sum(a and b for a, b in zip(above, bad, strict=True))
        assert row.precision.mean == pytest.approx(hits / sum(above))
        assert row.recall.mean == pytest.approx(hits / sum(bad))
        assert row.clean_discarded.mean == pytest.approx((sum(above) - hits) / (200 - sum(bad)))


def test_labels_drawn_by_score_are_weighted_back_and_intervals_cover_the_truth(tmp_path):
    """Of 2,000 segments, 100 labels are drawn from each side of the threshold, which only 100 segments are above. The
    intervals of precision and recall hold the true value in nearly all of 40 draws; plain shares of the labels give
    another recall."""
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.random(1800) * 0.5, 0.5 + rng.random(200) * 0.5]).astype(np.float32)
    bad = rng.random(2000) < np.where(scores > 0.5, 0.7, 0.02)
    folder = scored(tmp_path / "s", scores)
    above = scores > 0.5
    truth = {
        "precision": bad[above].mean(),
        "recall": bad[above].sum() / bad.sum(),
        "clean_discarded": (~bad & above).sum() / (~bad).sum(),
    }
    covered = dict.fromkeys(truth, 0)
    for _ in range(40):
        drawn = [*rng.choice(np.flatnonzero(above), 100, False), *rng.choice(np.flatnonzero(~above), 100, False)]
        found = audit(folder, labels([(n, bool(bad[n])) for n in drawn]), threshold=0.5).main
        for name, value in truth.items():
            low, high = getattr(found, name).ci95
            covered[name] += low <= value <= high
    assert all(count >= 34 for count in covered.values()), covered
    plain = bad[drawn][:100].sum() / bad[drawn].sum()
    low, high = found.recall.ci95
    assert not low <= plain <= high


def test_a_second_scorer_is_weighted_by_the_score_that_the_labels_were_drawn_by():
    """Labels are drawn half above the first scorer's threshold, which a tenth of the segments is above. The second
    scorer's recall by the strata of the first is right on average; by plain shares it is not."""
    rng = np.random.default_rng(0)
    first = np.concatenate([rng.random(9000) * 0.5, 0.5 + rng.random(1000) * 0.5])
    bad = rng.random(10000) < np.where(first > 0.5, 0.5, 0.1)
    called = rng.random(10000) < np.where(bad, np.where(first > 0.5, 0.9, 0.3), 0.1)
    truth = called[bad].mean()
    found = []
    plain = []
    for _ in range(20):
        drawn = np.concatenate([rng.choice(1000, 200, False) + 9000, rng.choice(9000, 200, False)])
        edges = stratum_edges(first[drawn], 0.5)
        parts = [
            divided_strata(edges, first[called == c], first[mine], bad[mine], np.ones(len(mine), int))
            for c in (False, True)
            for mine in [drawn[called[drawn] == c]]
        ]
        assert sum(s.segments for part in parts for s in part) == 10000
        chosen = [c for c, part in zip((False, True), parts, strict=True) for _ in part]
        found.append(weighted([*parts[0], *parts[1]], chosen)[1].mean)
        plain.append(called[drawn][bad[drawn]].mean())
    assert np.mean(found) == pytest.approx(truth, abs=0.05)
    assert np.mean(plain) > truth + 0.2


def test_every_stratum_holds_a_label():
    rng = np.random.default_rng(1)
    for threshold, spread in itertools.product((0.0, 0.2, 0.9), (1, 2, 10, 1000)):
        for _ in range(20):
            scores = np.concatenate([[0.0, 1.0], (rng.random(rng.integers(0, 30)) * spread).round() / spread])
            edges = stratum_edges(scores, threshold)
            assert threshold in edges
            assert edges == sorted(set(edges))
            held = np.bincount(np.searchsorted(edges, scores, side="left"), minlength=len(edges) + 1)
            assert (held > 0).all(), (threshold, scores, edges)


def test_labels_that_do_not_fit_are_counted_or_refused(tmp_path):
    folder = scored(tmp_path / "s", [0.9, 0.1, 0.2, math.nan])
    given = [(0, True), (1, False), (2, True), (2, False), (3, True), (77, True), (0, True)]
    found = audit(folder, labels(given), threshold=0.5)
    assert found.labelled == 2
    assert found.left_out == {
        "another label of the same text": 2,
        "as many labels bad as good": 1,
        "not a segment of the corpus": 1,
        "not judged by the scorer": 1,
    }
    assert found.alpha == pytest.approx(krippendorff_alpha([[True, True], [True, False]]))
    with pytest.raises(ConfigError, match="none of the 2 labelled texts is a judged segment"):
        audit(folder, labels([(50, True), (51, False)]))
    with pytest.raises(ConfigError, match="all 2 labelled segments of .* are bad"):
        audit(folder, labels([(0, True), (1, True), (9, False)]))
    with pytest.raises(ConfigError, match="no labelled segment has a score above the threshold 0.95"):
        audit(folder, labels([(0, True), (1, False)]), threshold=0.95)


def test_scores_on_which_the_labels_say_nothing_are_named(tmp_path):
    lines = [f"line {n} {'BAD' if n % 2 else 'fine'}\n" for n in range(20)]
    write_jsonl(tmp_path / "c.jsonl", ["".join(lines)])
    score_corpus(Jsonl(str(tmp_path / "c.jsonl")), Lines(), scorer=Regex(pattern="BAD"), out=tmp_path / "s")
    add_scores(tmp_path / "s", Regex(pattern="absent"), "never")
    truth = Labels("l", tuple(lines), np.array(["BAD" in line for line in lines]), {})
    page, found = write_audit(tmp_path / "s", truth)
    assert found.others == []
    assert found.not_compared == ["never"]
    assert "Other scores on which these labels say nothing: never" in page.read_text()


def test_scores_from_elsewhere_count_as_float32(tmp_path):
    scores = [0.1, 0.2, 0.3, 0.6, 0.7, 0.8, 0.9] * 10
    folder = scored(tmp_path / "s", scores)
    found = audit(folder, labels([(n, n % 2 == 0) for n in range(70)]), threshold=0.7)
    assert all(s.segments == s.labelled for s in found.strata)
    assert found.main.called_bad == pytest.approx(20 / 70)


def test_a_label_holds_for_every_segment_with_its_text(tmp_path):
    """A line that occurs 500 times is labelled once or a hundred times: the corpus has 500 such segments."""
    rng = np.random.default_rng(0)
    scores = [0.2] * 750 + [0.8] * 250
    texts = ["}\n"] * 500 + [f"s{n}\n" for n in range(500)]
    bad = [False] * 500 + [bool(rng.random() < share) for share in [0.5] * 250 + [0.9] * 250]
    (tmp_path / "s").mkdir()
    table = {"texts": [[t] for t in texts], "scores": [[s] for s in scores]}
    pq.write_table(pa.table(table), tmp_path / "s" / "a.parquet")
    drawn = rng.choice(1000, 300, replace=False)
    given = Labels("l", tuple(texts[n] for n in drawn), np.array([bad[n] for n in drawn]), {})
    found = audit(tmp_path / "s", given, threshold=0.5)
    assert found.strata[0].repeated == 500
    assert found.strata[0].repeated_bad == 0
    truth = sum(bad) / 1000
    assert found.bad_share.ci95[0] <= truth <= found.bad_share.ci95[1]
    assert found.bad_share.mean == pytest.approx(truth, abs=0.05)
    assert found.main.recall.mean == pytest.approx(sum(bad[750:]) / sum(bad), abs=0.08)


def test_alpha_is_that_of_a_plain_loop():
    """Observed disagreement is the mean over pairs of labels of one unit, weighted as in Krippendorff 2011; expected,
    over all pairs."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        units = [rng.integers(0, 3, rng.integers(1, 5)).tolist() for _ in range(12)]
        used = [u for u in units if len(u) > 1]
        values = [v for u in used for v in u]
        observed = sum(sum(a != b for a, b in itertools.permutations(u, 2)) / (len(u) - 1) for u in used) / len(values)
        pairs = list(itertools.permutations(values, 2))
        expected = sum(a != b for a, b in pairs) / len(pairs)
        assert krippendorff_alpha(units) == pytest.approx(1 - observed / expected)
    assert krippendorff_alpha([[1, 1], [0, 0], [1, 1]]) == 1
    assert math.isnan(krippendorff_alpha([[1], [0]]))
    assert math.isnan(krippendorff_alpha([[1, 1], [1, 1]]))


def test_the_page_compares_a_second_scorer_and_masks_personal_data(tmp_path):
    lines = [f"mail anna{n}@example.com now\n" if n % 4 == 0 else f"plain line {n} BAD\n" for n in range(40)]
    write_jsonl(tmp_path / "c.jsonl", ["".join(lines[n : n + 4]) for n in range(0, 40, 4)])
    score_corpus(Jsonl(str(tmp_path / "c.jsonl")), Lines(), scorer=PII(), out=tmp_path / "s")
    add_scores(tmp_path / "s", Regex(pattern="BAD"), "word")
    truth = Labels("l.jsonl", tuple(lines[:30]), np.array([n % 4 == 0 and n != 4 for n in range(30)]), {})
    page, found = write_audit(tmp_path / "s", truth)
    (other,) = found.others
    assert other.agreement.name == "word"
    assert found.auc > 0.9 > 0.2 > other.auc
    assert [(q.this_bad, q.other_bad, q.segments, q.labelled) for q in other.quadrants] == [
        (True, True, 0, 0),
        (True, False, 10, 8),
        (False, True, 30, 22),
        (False, False, 0, 0),
    ]
    assert [x.text for x in found.false_alarms] == ["mail •••••@•••••••.••• now\n"]
    text = page.read_text()
    assert "anna" not in text
    assert verdict(found) in text
    numbers = json.loads(page.with_suffix(".json").read_text())
    assert numbers["strata"][0]["above"] is None
    assert numbers["at"][0]["precision"]["mean"] == found.at[0].precision.mean


def test_labels_that_were_drawn_by_another_score_are_weighted(tmp_path):
    """Labels drawn by a first score: half from the tenth that it calls bad. Audits of a second score cover the truth
    with the weights, and do not without."""
    rng = np.random.default_rng(0)
    n = 20_000
    bad = rng.random(n) < 0.02
    first = (rng.random(n) < np.where(bad, 0.9, 0.08)).astype(float)
    second = np.clip(np.where(bad, 0.7, 0.2) + rng.normal(size=n) * 0.2, 0, 1)
    folder = scored(tmp_path / "scored", second)
    truth = bad[second > 0.5].mean()
    covered = {True: 0, False: 0}
    for seed in range(8):
        draw = np.random.default_rng(seed)
        chosen = [draw.choice(np.flatnonzero(first == value), 400, replace=False) for value in (0.0, 1.0)]
        weights = np.repeat([(first == value).sum() / 400 for value in (0.0, 1.0)], 400)
        picked = np.concatenate(chosen)
        for weighs in covered:
            given = Labels("l", tuple(f"s{i}" for i in picked), bad[picked], {}, weight_N=weights if weighs else None)
            found = audit(folder, given, threshold=0.5)
            low, high = found.main.precision.ci95
            covered[weighs] += low <= truth <= high
            if weighs:
                assert found.bad_share.ci95[0] <= bad.mean() <= found.bad_share.ci95[1] or seed
                assert all(s.effective <= s.labelled + 1e-9 for s in found.strata if s.labelled)
    assert covered[True] >= 7
    assert covered[False] == 0


def test_an_audit_with_the_fitted_labels_uses_those_that_the_fit_did_not_see(tmp_path):
    from helpers import made_labels, phf_inside
    from phf.scorers import Fitted

    given = made_labels(300)
    rows = [{"text": t, "label": int(b)} for t, b in zip(given.texts, given.bad_N, strict=True)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "labels.jsonl").write_text(lines)
    ran = phf_inside("fit-scorer", "labels.jsonl", "mine", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    held = (tmp_path / "mine" / "heldout.jsonl").read_text().count("\n")
    (tmp_path / "labels.jsonl").write_text(json.dumps({"text": "another", "label": 1}) + "\n" + lines)  # one more
    corpus = Jsonl(str(write_jsonl(tmp_path / "t.jsonl", [t + "\n" for t in given.texts])))
    score_corpus(corpus, Lines(), Fitted(str(tmp_path / "mine")), tmp_path / "scored")
    ran = phf_inside("audit", "scored", "labels.jsonl", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert f"{300 - held} seen by the scorer when it was fitted" in ran.stdout
    assert json.loads((tmp_path / "scored" / "audit.json").read_text())["labelled"] == held
    seen = "".join(json.dumps(row) + "\n" for row in rows if row["text"] not in held_texts(tmp_path / "mine"))
    (tmp_path / "seen.jsonl").write_text(seen)
    ran = phf_inside("audit", "scored", "seen.jsonl", cwd=tmp_path)
    assert ran.returncode == 2
    assert "was fitted to all of these texts" in ran.stderr
    pii = tmp_path / "by-regex"
    score_corpus(corpus, Lines(), Regex("zorp"), pii)
    add_scores(pii, Fitted(str(tmp_path / "mine")), "mine")
    ran = phf_inside("audit", "by-regex", "labels.jsonl", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    found = json.loads((pii / "audit.json").read_text())
    assert found["labelled"] == 300  # the first scorer saw none of them
    assert sum(row["labelled"] for row in found["others"][0]["quadrants"]) == held


def held_texts(folder):
    return {json.loads(line)["text"] for line in (folder / "heldout.jsonl").read_text().splitlines()}
