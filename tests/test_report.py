from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from conftest import TINY_LLAMA
from phf import store
from phf.config import dump_yaml
from phf.recipe import load_recipe, run_recipe
from phf.report import is_masked, marked, mask, number, visible, write_report
from phf.sample import read_samples, write_samples
from phf.scorers import Regex
from phf.types import Span

HOSTILE = "<script>document.title='owned'</script><img src=http://evil.example/x onerror=alert(1)>\"'&amp;</pre>\x00\x1b[31m\ud800"


@pytest.fixture(scope="module")
def folder(scored_dir, tmp_path_factory) -> Path:
    """A whole comparison of two objectives with the smallest of everything, through the recipe."""
    out = tmp_path_factory.mktemp("report") / "run"
    (out.parent / "mine.yaml").write_text(
        dump_yaml(
            {
                "base": "demo",
                "quick": True,
                "title": "A <b>tiny</b> comparison",
                "out": str(out),
                "corpus": {"name": "jsonl", "path": str(scored_dir.parent / "texts.jsonl")},
                "scorer": {"name": "regex", "pattern": "https?://\\S+"},
                "tokenizer": {"name": "bpe", "vocab_size": 300},
                "model": {"name": "from_config", "config": TINY_LLAMA},
                "train": {
                    "tokens": 20 * 512,
                    "context": 32,
                    "batch_rows": 16,
                    "lr": 0.02,
                    "compile": False,
                    "log_every": 2,
                },
                "seeds": [0, 1],
                "scenarios": {
                    "unconditional": {"num_samples": 8, "max_tokens": 16},
                    "bad_token": {"num_samples": 4, "max_tokens": 16},
                },
            }
        )
    )
    recipe = load_recipe([str(out.parent / "mine.yaml")])
    recipe = type(recipe)(
        **{**recipe.__dict__, "objectives": {k: recipe.objectives[k] for k in ("mle", "conditional")}}
    )
    results = run_recipe(recipe)
    assert [(r["objective"], r["seed"]) for r in results["runs"]] == [
        ("mle", 0),
        ("conditional", 0),
        ("mle", 1),
        ("conditional", 1),
    ]
    assert load_recipe([str(recipe.folder / "recipe.yaml")]) == recipe
    return recipe.folder


def test_results_have_the_promised_form(folder):
    results = store.read_json(folder / "results.json")
    for run in results["runs"]:
        assert set(run) >= {"objective", "seed", "tokens", "misalignment", "heldout", "unjudged", "empty", "distinct_2"}
        assert set(run["misalignment"]) >= {"mean", "stderr", "n", "ci95"}
        assert len(run["misalignment"]["ci95"]) == 2


def test_running_again_does_only_what_has_not_been_done(folder):
    stamps = {
        p: p.stat().st_mtime_ns
        for p in folder.rglob("*")
        if p.is_file() and p.name not in ("report.html", "results.json", "recipe.yaml")
    }
    first = store.read_json(folder / "results.json")["runs"]
    again = run_recipe(load_recipe([str(folder / "recipe.yaml")]))
    assert store.jsonable(again["runs"]) == first
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps


def test_the_page_says_that_a_quick_run_concludes_nothing(folder):
    page = (folder / "report.html").read_text()
    assert "Too short to conclude anything from" in page
    assert "A &lt;b&gt;tiny&lt;/b&gt; comparison" in page


def test_the_page_is_self_contained(folder):
    page = (folder / "report.html").read_text()
    own = re.sub(
        r'<pre>.*?</pre>|xmlns(:xlink)?="[^"]*"|<!--.*?-->|<metadata>.*?</metadata>', "", page, flags=re.DOTALL
    )
    assert not re.search(r'(src|href|url|action)\s*[=(]\s*["\']?\s*(https?:)?//', own)
    assert "<script" not in page
    assert len(page) < 2_000_000


@pytest.fixture(scope="module")
def hostile(folder, tmp_path_factory) -> Path:
    """The same comparison with samples full of HTML."""
    copy = tmp_path_factory.mktemp("hostile") / "run"
    shutil.copytree(folder, copy)
    for path in copy.glob("*/samples/*.jsonl"):
        samples = [type(s)(**{**s.__dict__, "text": HOSTILE + s.text, "prompt": HOSTILE}) for s in read_samples(path)]
        write_samples(path, samples)
    write_report(copy)
    return copy / "report.html"


def test_hostile_samples_stay_text(hostile):
    class Tags(HTMLParser):
        def __init__(self):
            super().__init__()
            self.tags: set[str] = set()

        def handle_starttag(self, tag, attrs):
            self.tags.add(tag)
            assert not any(name.startswith("on") for name, _ in attrs)

    parser = Tags()
    page = hostile.read_text(encoding="utf-8")
    parser.feed(page)
    assert not {"script", "img", "iframe", "object", "link"} & parser.tags
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page
    assert "\x00" not in page


BROWSER = next(
    (p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome") if Path(p).exists()), None
)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_in_a_real_browser(hostile, width, scheme):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        problems, requests = [], []
        page.on("console", lambda m: problems.append(m.text))
        page.on("pageerror", lambda e: problems.append(str(e)))
        page.on("dialog", lambda d: problems.append(d.message))
        page.on("request", lambda r: requests.append(r.url))
        page.goto(hostile.as_uri())
        assert page.title() == "phf: A <b>tiny</b> comparison"
        assert page.locator("#results tbody tr").count() == 2
        assert page.locator("figure svg").count() == 3
        assert page.locator("#quick").is_visible()
        assert "<script>document.title" in page.locator(".sample pre").first.inner_text()
        assert page.locator(".sample mark").count() > 0
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "the page scrolls sideways"
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")
        assert requests == [hostile.as_uri()]
        assert problems == []
        browser.close()


class Finds(Regex):
    """Finds what `pattern` says and calls it a mail address; fails on what says boom."""

    def spans(self, text):
        if "boom" in text:
            raise RecursionError
        return [Span(s.start, s.end, "email" if "@" in text[s.start : s.end] else "url") for s in super().spans(text)]


def test_personal_data_is_masked_links_and_code_are_not():
    scorer = Finds(r"\S+@\S+|http\S+")
    text = "mail joe.bloggs@example.org or see http://x.y"
    assert mask(text, scorer) == "mail •••.••••••@•••••••.••• or see http://x.y"
    assert mask("boom joe@x.y", scorer) == "•••• •••@•.•"  # cannot be judged: nothing is shown
    assert is_masked("phone")
    assert is_masked("email+url")
    assert not is_masked("E501")


def test_the_cut_end_of_a_sample_is_masked_too():
    from phf.report import _shown_samples
    from phf.types import Sample

    sample = Sample(0, "", "fine\nmail joe@example.org", 9, -1.0, False, 0, 0.0)
    run = {"samples": {"u": [sample]}, "eval": {"scenarios": {"u": {"scenario": {"complete_lines": True}}}}}
    html = _shown_samples(run, "u", Finds(r"\S+@\S+"))[0]["html"]
    assert "joe" not in html
    assert '<span class="cut">mail •••@•••••••.•••</span>' in html


def test_runs_of_other_recipes_do_not_come_along(folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    shutil.copytree(copy / "mle-s0", copy / "stranger-s0")
    assert "stranger" not in write_report(copy).read_text()
    (copy / "results.json").unlink()
    assert "stranger" in write_report(copy).read_text()
    judged = store.read_json(copy / "stranger-s0" / "eval.json")
    store.write_json(copy / "stranger-s0" / "eval.json", judged | {"tokens_content": "other"})
    with pytest.raises(store.StoreError, match="differ in tokens_content"):
        write_report(copy)


def test_the_page_does_not_depend_on_where_it_is_made(folder, tmp_path, monkeypatch):
    expected = write_report(folder).read_text()
    monkeypatch.chdir(tmp_path)
    shutil.move(folder / "scored", tmp_path / "elsewhere")
    try:
        assert write_report(folder).read_text() == expected
    finally:
        shutil.move(tmp_path / "elsewhere", folder / "scored")


def test_marking_keeps_the_text_and_survives_overlaps():
    text = "a <b> c\n"
    html = marked(text, [Span(2, 5, "E225"), Span(2, 2, "W291"), Span(3, 4, "x"), Span(8, 8, "W292")])
    assert html == 'a <mark title="E225">&lt;b&gt;</mark> c\n<mark title="W292"></mark>'


def test_numbers_and_odd_characters():
    assert number(None) == number(float("nan")) == "–"
    assert number(0.12345) == "0.1235"
    assert number(0.0) == "0.0000"
    assert number(1e-7) == "1.0e-07"
    assert visible("a\x00\x1b\ud800\n\té") == "a���\n\té"


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(store.StoreError, match="no judged run"):
        write_report(tmp_path)
