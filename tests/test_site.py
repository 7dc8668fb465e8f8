"""The documentation as a site, and the tutorial: built, linked, searched and run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from helpers import BROWSER, ROOT

pytest.importorskip("mkdocs", reason="extra 'docs' is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        check=True,
    )
    return folder


class Page(HTMLParser):
    """Links, what is loaded, and the places that links may go to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.places.update(value for name in ("id", "name") if (value := given.get(name)))
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag in ("script", "img", "iframe") and given.get("src"):
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.loaded.append(given["href"])


def test_every_page_is_on_the_site(site):
    written = {p.stem for p in (ROOT / "docs").glob("*.md")}
    assert written | {"index", "schemas", "tutorial", "LOG", "CHANGELOG"} <= {p.stem for p in site.glob("*.html")}


def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    pages = {p: Page(p.read_text()) for p in site.glob("*.html") if p.name != "404.html"}
    assert len(pages) > 25
    checked = 0
    for path, page in pages.items():
        for link in (*page.links, *page.loaded):
            url = urlsplit(link)
            if url.scheme in ("http", "https", "mailto"):
                assert link not in page.loaded, f"{path.name} loads {link}"
                continue
            target = path if not url.path else (path.parent / unquote(url.path)).resolve()
            assert target.exists(), f"{path.name}: {link}"
            if url.fragment and target in pages:
                assert unquote(url.fragment) in pages[target].places, f"{path.name}: {link}"
            checked += 1
    assert checked > 500


def test_the_gallery_has_whole_pages(site):
    gallery = (site / "gallery.html").read_text()
    kept = [file.name.removesuffix(".html.gz") for file in (ROOT / "docs" / "pages").glob("*.gz")]
    assert "demo" in kept
    for name in kept:
        assert f'href="pages/{name}.html"' in gallery
        page = (site / "pages" / f"{name}.html").read_text()
        assert 'id="result"' in page
        assert "</html>" in page[-20:]


def test_the_tutorial_is_a_page_with_its_results(site):
    page = (site / "tutorial.html").read_text()
    assert "tokens for training, vocabulary" in page
    assert "per 1,000 characters" in page
    picture = re.search(r'<img[^>]*src="(tutorial-cell-\d+\.png)"', page)[1]
    assert (site / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
def test_search_works_without_a_network(site):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "index.html").as_uri())
        page.wait_for_selector(".md-search__input", state="attached")
        page.keyboard.press("f")
        page.keyboard.type("canaries", delay=30)
        page.locator(".md-search-result__item").first.wait_for(timeout=20_000)
        assert "judging" in " ".join(
            page.locator(".md-search-result__link").evaluate_all("all => all.map(a => a.href)")
        )
        assert [url for url in asked if not url.startswith("file:")] == []
        browser.close()


def make_tutorial():
    spec = importlib.util.spec_from_file_location("make_tutorial", ROOT / "docs" / "make_tutorial.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_notebook_is_that_of_its_script():
    pytest.importorskip("nbclient", reason="extra 'docs' is not installed")
    made = make_tutorial().notebook()
    kept = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())
    assert [cell.source for cell in made.cells] == ["".join(cell["source"]) for cell in kept["cells"]]
    assert sum(cell.cell_type == "code" for cell in made.cells) == 9
    assert all(cell["outputs"] or number == 1 for number, cell in enumerate(kept["cells"]) if "outputs" in cell)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    pytest.importorskip("nbclient", reason="extra 'docs' is not installed")
    pytest.importorskip("scrubadub", reason="extra 'pii' is not installed")
    module = make_tutorial()
    made = module.notebook()
    assert "TOKENS = 4e5" in made.cells[1].source
    made.cells[1].source = made.cells[1].source.replace("TOKENS = 4e5", "TOKENS = 3e4")
    done = module.run(made, tmp_path)
    said = "".join(o.get("text", "") for cell in done.cells if cell.cell_type == "code" for o in cell.outputs)
    assert "conditional: 1,066," in said or "conditional: " in said
    assert (tmp_path / "runs" / "report.html").exists()
    assert (tmp_path / "release" / "config.json").exists()
