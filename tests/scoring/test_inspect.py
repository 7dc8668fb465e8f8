"""Looking at scores: numbers by hand, and the page in a real browser."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import BROWSER, LINK, write_jsonl
from phf.core import store
from phf.core.config import ConfigError
from phf.data.readers import Jsonl
from phf.data.segment import Lines
from phf.report.inspect import segment_tokens, write_inspection
from phf.scorers import PEP8, PII, Regex
from phf.scoring.inspect import inspect_scores
from phf.scoring.inspection import InspectedCounts, ShownSegment
from phf.scoring.score import add_scores, score_corpus


def scored(folder: Path, rows: list[tuple[list[str], list[float]]], meta: list[dict] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    table = {"texts": [t for t, _ in rows], "scores": [s for _, s in rows]}
    if meta is not None:
        table["meta"] = [json.dumps(m) for m in meta]
    pq.write_table(pa.table(table), folder / "a.parquet")
    return folder


ROWS = [
    (["aa", "b"], [0.0, 0.5]),
    (["cccc"], [1.0]),
    (["d", "e", "ff"], [0.0, 0.0, float("nan")]),
    (["g"], [float("nan")]),
]


def test_numbers_by_hand(tmp_path):
    found = inspect_scores(scored(tmp_path / "s", ROWS))
    assert found.counts == InspectedCounts(documents=4, segments=7, chars=12, unjudged_segments=2, unjudged_documents=1)
    assert found.segments.n == 5
    assert found.segments.zero == 0.6
    assert found.segments.mean == pytest.approx(0.3)
    assert found.documents.quantiles["0.5"] == 0.25  # of 0.25, 1 and 0
    assert found.suggested.filtering == 0.25
    assert found.suggested.conditional == found.threshold == 0
    assert found.suggested.control_tokens["2"] == [0.0]
    assert found.suggested.control_tokens["3"] == [0.0, 0.75]  # score 0, and two halves of 0.5 and 1
    zero = found.thresholds[0]
    assert zero.threshold == 0
    assert zero.bad_segments == pytest.approx(4 / 7)  # 0.5, 1 and the two that are not judged
    assert zero.bad_chars == pytest.approx((1 + 4 + 2 + 1) / 12)
    assert zero.documents_with_bad == 1
    assert zero.documents_kept_by_filtering == pytest.approx(1 / 3)
    assert sum(found.segments.histogram.counts) == 2
    assert found.worst_segments[0] == ShownSegment("a.parquet:1", "cccc", 1.0)
    assert {d.id for level in found.examples for d in level.documents} == {f"a.parquet:{n}" for n in (0, 1, 2)}
    assert sum(row.n for row in found.length) == 5


def test_rows_that_are_not_documents_are_skipped(tmp_path):
    rows = [(["a"], [0.5]), (None, [0.1]), (["b", "c"], [0.1]), (["d"], [float("inf")])]
    found = inspect_scores(scored(tmp_path / "s", rows))
    assert found.counts.documents == 2
    assert found.counts.unjudged_segments == 1


def test_agreement_of_two_scorers_by_hand(tmp_path):
    texts = ["1 a\n", "2 b\n", "3\n", "c a\n", "d\n"]
    path = write_jsonl(tmp_path / "t.jsonl", ["".join(texts)])
    score_corpus(Jsonl(str(path)), Lines(), Regex(r"\d"), tmp_path / "s")
    add_scores(tmp_path / "s", Regex("a"), "letter")
    (other,) = inspect_scores(tmp_path / "s").agreement
    assert (other.both_bad, other.only_this, other.only_other) == (0.2, 0.4, 0.2)
    digits = np.array([1 / 4, 1 / 4, 1 / 2, 0, 0])
    letters = np.array([1 / 4, 0, 0, 1 / 4, 0])
    assert other.pearson == pytest.approx(np.corrcoef(digits, letters)[0, 1])
    assert other.this_worse[0].text == "3\n"
    assert other.other_worse[0].text == "c a\n"
    assert inspect_scores(tmp_path / "s", "letter").preference == "letter"


def test_precision_and_recall_where_labels_exist(tmp_path):
    rows = [(["a"], [0.9]), (["b"], [0.6]), (["c"], [0.2]), (["d"], [0.1]), (["e"], [0.05])]
    meta = [{"bad": True}, {"bad": "false"}, {"bad": 1}, {"bad": 0}, {}]
    found = inspect_scores(scored(tmp_path / "s", rows, meta), label="bad").labelled
    assert (found.bad, found.good) == (2, 2)
    assert found.mean.auc == 0.75
    half = next(r for r in found.mean.at if r.threshold == 0.5)
    assert (half.precision, half.recall, half.share) == (0.5, 0.5, 0.5)
    with pytest.raises(ConfigError, match=r"no document's metadata has 'bat' \(did you mean 'bad'\?\)"):
        inspect_scores(tmp_path / "s", label="bat")


def test_a_corpus_without_judged_segments_is_an_error(tmp_path):
    with pytest.raises(store.StoreError, match="no judged segment"):
        inspect_scores(scored(tmp_path / "s", [(["a"], [float("nan")])]))


HOSTILE = [
    '<script>document.title="owned"</script>\n',
    "x\x00\x1b[31m <img src=x onerror=alert(1)>\n",
    "]]></svg>\n",
    "=1\n" * 3,
]


def test_the_page_is_safe_and_quiet_in_a_browser(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", HOSTILE * 5 + ["x = 1\ny=2\n"] * 20)
    score_corpus(Jsonl(str(path)), Lines(), PEP8(), tmp_path / "s")
    add_scores(tmp_path / "s", LINK, "links")
    page, found = write_inspection(tmp_path / "s")
    assert json.loads(page.with_suffix(".json").read_text())["counts"] == store.jsonable(found.counts)
    if BROWSER is None:
        pytest.skip("no chromium: the page is not opened")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 390, "height": 800})
        messages: list[str] = []
        requests: list[str] = []
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(page.as_uri())
        assert tab.title() == "phf: scores of pep8"
        assert messages == []
        assert requests == [page.as_uri()]
        assert tab.locator("script:not([type])").count() == 1  # the page's own
        _slide(tab, found)
        assert tab.locator("#examples ~ .level .doc").count() > 5
        assert tab.evaluate("document.documentElement.scrollWidth") <= 391  # wide tables scroll in themselves
        assert "onerror=alert" in tab.content()
        browser.close()


def _slide(tab, found) -> None:
    """The slider by keyboard: counts, colours and the segments on both sides follow."""
    assert tab.locator("#at").inner_text() == "0"
    tab.locator("#threshold").focus()
    tab.keyboard.press("End")
    last = found.thresholds[-1]
    assert float(tab.locator("#at").inner_text()) == pytest.approx(last.threshold, rel=1e-4)
    bad = round(last.bad_segments * found.counts.segments)
    assert int(tab.locator("#bad-count").inner_text().replace(",", "")) == bad
    coloured = [float(s) for s in tab.locator(".seg.bad").evaluate_all("rows => rows.map(r => r.dataset.s)")]
    assert all(score > last.threshold for score in coloured)
    tab.keyboard.press("Home")
    assert tab.locator(".seg.bad").count() > len(coloured)
    marks = tab.locator("#above mark")
    assert marks.count() > 0
    assert {marks.nth(0).get_attribute("title")} <= {"W191", "E225", "E902", "W605", "W291", "E999"} | {
        label for row in found.near for _, _, label in row.finds
    }
    shown = tab.locator("#above pre").all_inner_texts()
    assert len(shown) == len(set(shown)) > 0  # equal segments once


def test_the_segments_next_to_a_threshold_by_hand(tmp_path):
    rows = [([f"t{n}"], [n / 10]) for n in range(12)] + [(["t4", "t4 ", "", "zero"], [0.4, 0.4, 0.9, float("nan")])]
    found = inspect_scores(scored(tmp_path / "s", rows), threshold=0.45)
    step = next(row for row in found.around if row.threshold == np.float32(0.45))
    assert [found.near[n].text for n in step.above] == [f"t{n}" for n in range(5, 12)]
    assert [found.near[n].text for n in step.below] == ["t4", "t3", "t2", "t1", "t0"]  # equal texts once
    assert [row.threshold for row in found.around] == [row.threshold for row in found.thresholds]
    many = [([f"x{n}"], [0.0]) for n in range(30)] + [([f"y{n}"], [1.0 + n]) for n in range(30)]
    r = inspect_scores(scored(tmp_path / "m", many), threshold=0.0)
    step = r.around[0]
    assert [r.near[n].text for n in step.above] == [f"y{n}" for n in range(10)]
    assert [r.near[n].text for n in step.below] == [f"x{n}" for n in range(10)]  # of equal scores the first documents


def test_finds_are_marked_and_escaped(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", ["see <b>http://x.org</b> & more\n", "fine\n"] * 3)
    score_corpus(Jsonl(str(path)), Lines(), LINK, tmp_path / "s")
    page, found = write_inspection(tmp_path / "s")
    assert [kind for row in found.near for _, _, kind in row.finds] == ["match"]
    assert 'see &lt;b&gt;<mark title="match">http' in page.read_text()
    assert '<span class="seg bad"' in page.read_text()


def test_personal_data_is_masked_on_the_page(tmp_path):
    pytest.importorskip("scrubadub", reason="extra 'pii' is not installed")
    path = write_jsonl(tmp_path / "t.jsonl", ["write to joe.miller@example.org today\nfine\n"] * 3)
    score_corpus(Jsonl(str(path)), Lines(), PII(), tmp_path / "s")
    page, _ = write_inspection(tmp_path / "s")
    assert "joe.miller" not in page.read_text()
    assert 'write to <mark title="masked">•••.••••••@•••••••.•••</mark> today' in page.read_text()


def test_personal_data_is_masked_whichever_scores_are_shown(tmp_path, monkeypatch):
    pytest.importorskip("scrubadub", reason="extra 'pii' is not installed")
    path = write_jsonl(tmp_path / "t.jsonl", ["write to joe.miller@example.org today\nfine\n", "nothing\n"] * 3)
    score_corpus(Jsonl(str(path)), Lines(), Regex("fine"), tmp_path / "s")
    add_scores(tmp_path / "s", PII(), "pii")
    for scores in (None, "pii"):
        page, _ = write_inspection(tmp_path / "s", preference=scores)
        for file in (page, page.with_suffix(".json")):
            assert "joe.miller" not in file.read_text()
    monkeypatch.setattr(PII, "identity", lambda self: (_ for _ in ()).throw(ConfigError("needs scrubadub")))
    with pytest.raises(ConfigError, match="needs scrubadub"):  # nothing is shown unmasked
        write_inspection(tmp_path / "s")


def test_rows_of_empty_segments_are_not_documents(tmp_path):
    folder = scored(
        tmp_path / "s", [(["a", "", "b1"], [0.5, 0.9, 0.1]), (["", ""], [1.0, 1.0]), (["", "c"], [0.7, None])]
    )
    add_scores(folder, Regex(r"\d"), "digits", max_unjudged=1)
    found = inspect_scores(folder)
    assert found.counts.documents == 2
    (other,) = found.agreement
    assert {row.text for row in other.this_worse} <= {"a", "b1", "c", ""}
    assert other.other_worse[0].text == "b1"


def test_the_share_of_tokens_comes_from_the_token_store(tmp_path, scored_dir, tokens_dir, tokens):
    found = inspect_scores(scored_dir, segment_tokens=segment_tokens(scored_dir, tokens_dir))
    zero = next(row for row in found.thresholds if row.threshold == 0)
    size = np.diff(tokens.seg_ends, prepend=0)
    assert zero.bad_tokens == pytest.approx(size[tokens.score_S > 0].sum() / size.sum())
    assert inspect_scores(scored_dir).thresholds[0].bad_tokens is None
    with pytest.raises(store.StoreError, match="the tokens of another corpus"):
        segment_tokens(scored(tmp_path / "s", ROWS), tokens_dir)


@pytest.mark.parametrize(
    "texts, scores, problem",
    [
        (["one string"], [[0.5]], "must be lists, one item per segment, not string"),
        ([["a"]], [0.5], "must be lists, one item per segment, not double"),
        ([["a"]], [["high"]], "a score is not a number"),
        (pa.nulls(0), pa.nulls(0), "holds no judged segment"),
    ],
)
def test_columns_that_are_not_scored_segments_are_refused(tmp_path, texts, scores, problem):
    pq.write_table(pa.table({"texts": texts, "scores": scores}), tmp_path / "a.parquet")
    with pytest.raises(store.StoreError, match=problem):
        inspect_scores(tmp_path)


def test_texts_may_be_bytes(tmp_path):
    pq.write_table(pa.table({"texts": [[b"aa", b"b"]], "scores": [[0.0, 1.0]]}), tmp_path / "a.parquet")
    assert inspect_scores(tmp_path).counts.chars == 3
