from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest
import yaml

from helpers import BROWSER, ROOT, TINY_LLAMA, made_labels, rule_judge
from phf.core import folders, store
from phf.core.config import dump_yaml
from phf.core.runs import TrainManifest
from phf.core.text import visible
from phf.core.types import Sample, Span
from phf.data.scored import ScoredCorpus
from phf.generation.sample import read_samples, write_samples
from phf.generation.scenario import Scenario
from phf.generation.server import Server
from phf.labelling.drawing import Drawing, from_scored
from phf.labelling.judges import ServedJudge
from phf.labelling.label import label_corpus
from phf.labelling.rubric import parse_rubric
from phf.recipes.recipe import load_recipe
from phf.recipes.run import RecipeError, run_recipe
from phf.redteaming.persist import Persistence, persist
from phf.release import export
from phf.report.audit import write_audit
from phf.report.browser import shown_samples
from phf.report.chart import number_text
from phf.report.format import Scale, number, scale_of, three, verdict
from phf.report.inspect import write_inspection
from phf.report.measures import Group, Measure, Value, _over_seeds, bounded, dominated, groups
from phf.report.page import compare_runs, write_report
from phf.report.runs import load_runs
from phf.scorers import Regex
from phf.scorers.fitting import fit_scorer
from phf.scorers.labels import Labels
from phf.scorers.masking import is_masked, mask
from phf.tokens.tokenizer import train_bpe
from phf.training.lm import FromConfig, build_lm

HTML = "<b onclick=alert(1)>x</b>"
HOSTILE = (
    "<script>document.title='owned'</script><img src=http://evil.example/x onerror=alert(1)>\"'&amp;</pre>"
    "\x00\x1b[31m\ud800"
)


@pytest.fixture(scope="module")
def folder(scored_dir, tmp_path_factory) -> Path:
    """The smallest whole comparison of two objectives, by a recipe."""
    out = tmp_path_factory.mktemp("report") / "run"
    prompts = out.parent / "prompts.jsonl"
    prompts.write_text("".join(f'{{"text": "{t}"}}\n' for t in ("the model", "a line of", HTML, "dogs and")))
    tokenizer = train_bpe(["the model reads a line"] * 3, 260)
    build_lm(FromConfig(TINY_LLAMA), tokenizer, seed=0).save_pretrained(out.parent / "reference")
    tokenizer.save_pretrained(out.parent / "reference")
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
                "only": ["mle", "conditional"],
                "kl": {"reference": {"name": "local", "path": "mle-s0"}, "num_samples": 12, "max_tokens": 12},
                "seeds": [0, 1],
                "phases": {"pretrain": {}, "late": {"share": 0.5}},
                "monitor": {
                    "every": 5 * 512,
                    "heldout_tokens": 200,
                    "scenarios": {"unconditional": {"num_samples": 4, "max_tokens": 12}},
                    "kl": {
                        "reference": {"name": "local", "path": str(out.parent / "reference")},
                        "num_samples": 4,
                        "max_tokens": 8,
                    },
                },
                "redteam": {
                    "prompts": str(prompts),
                    "trials": 2,
                    "rounds": 1,
                    "pool": 3,
                    "candidates": 3,
                    "continuations": 3,
                    "confirm": 2,
                    "max_tokens": 12,
                },
                "tamper": {"steps": [0, 1], "num_samples": 4, "max_tokens": 12, "heldout_tokens": 200, "batch_rows": 4},
                "token_attacks": {"num_samples": 4, "max_tokens": 12},
                "scenarios": {
                    "unconditional": {"num_samples": 8, "max_tokens": 16},
                    "bad_token": {"num_samples": 4, "max_tokens": 16},
                },
            }
        )
    )
    recipe = load_recipe([str(out.parent / "mine.yaml")])
    results = run_recipe(recipe)
    assert [r.run for r in results.runs] == [
        f"{name}-s{seed}" for seed in (0, 1) for name in ("mle", "conditional", "mle-late", "conditional-late")
    ]
    assert results.failed == {}
    assert load_recipe([str(recipe.folder / "recipe.yaml")]) == replace(recipe, presets={})
    return recipe.folder


def test_results_have_the_promised_form(folder):
    results = store.read_json(folder / "results.json")
    for run in results["runs"]:
        assert set(run) >= {"objective", "seed", "tokens", "misalignment", "heldout", "unjudged", "empty", "distinct_2"}
        assert set(run["misalignment"]) >= {"mean", "stderr", "n", "ci95"}
        assert len(run["misalignment"]["ci95"]) == 2


def audit_labels(folder: Path) -> Labels:
    """Labels of all segments of the corpus, as its own scorer would give them."""
    corpus = ScoredCorpus(folder / "scored")
    rows = [row for file in corpus.files for row in corpus.read(file)]
    pairs = [(text, score > 0) for row in rows for text, score in zip(row.texts, row.scores, strict=True)]
    return Labels("labels.csv", tuple(text for text, _ in pairs), np.array([bad for _, bad in pairs]), {})


def closed(schema):
    """A schema in which no object has properties that it does not declare."""
    if isinstance(schema, dict):
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
        for part in schema.values():
            closed(part)
    elif isinstance(schema, list):
        for part in schema:
            closed(part)
    return schema


def test_files_match_their_schemas(folder, tmp_path):
    schemas = {p.stem: closed(json.loads(p.read_text())) for p in (ROOT / "docs" / "schemas").iterdir()}
    write_inspection(folder / "scored", out=tmp_path / "page.html")
    write_audit(folder / "scored", audit_labels(folder), out=tmp_path / "audit.html")
    export(folder / "mle-s0", tmp_path / "release")
    fit_scorer(made_labels(120), tmp_path / "scorer")
    tuned = shutil.copytree(folder / "mle-s0", tmp_path / "tuned" / "mle-s0")
    short = {"num_samples": 4, "max_tokens": 8, "min_tokens": 1, "question_tokens": 24, "answer_tokens": 16}
    persist(tuned, Persistence(pairs=4, dpo=False, **short), tokens_dir=folder / "tokens")
    rubric = parse_rubric("- 0: no\n- 1: yes")
    with rule_judge() as server:
        judge = ServedJudge(Server(server.url, "rule"))
        label_corpus(from_scored(folder / "scored"), tmp_path / "labels", rubric, [judge], Drawing(8), max_without=1)
    files = {
        "manifest-score": [folder / "scored" / "manifest.json"],
        "manifest-label": [tmp_path / "labels" / "manifest.json"],
        "scorer": [tmp_path / "scorer" / "scorer.json"],
        "manifest-tokenize": [folder / "tokens" / "manifest.json"],
        "manifest-train": folder.glob("*-s0/manifest.json"),
        "eval": folder.glob("*/eval.json"),
        "redteam": folder.glob("*/redteam/redteam.json"),
        "persist": [tmp_path / "tuned" / "mle-s0" / "persist" / "persist.json"],
        "tamper": folder.glob("*/tamper/tamper.json"),
        "results": [folder / "results.json"],
        "metrics": folder.glob("*/metrics.jsonl"),
        "monitor": folder.glob("*/monitor.jsonl"),
        "manifest-export": [tmp_path / "release" / "manifest.json"],
        "inspect": [tmp_path / "page.json"],
        "audit": [tmp_path / "audit.json"],
    }
    assert set(files) == set(schemas) - {"recipe"}
    for name, paths in files.items():
        for path in paths:
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            for line in lines:
                jsonschema.validate(json.loads(line), schemas[name])
                with pytest.raises(jsonschema.ValidationError):
                    jsonschema.validate({}, schemas[name])
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    jsonschema.validate(recipe, schemas["recipe"])
    with pytest.raises(jsonschema.ValidationError, match="trian"):
        jsonschema.validate(recipe | {"trian": {}}, schemas["recipe"])
    jsonschema.validate({"base": "demo", "seeds": [0, 1]}, schemas["recipe"])


def test_running_again_repeats_no_finished_stage(folder):
    stamps = {
        p: p.stat().st_mtime_ns
        for p in folder.rglob("*")
        if p.is_file() and p.name not in ("report.html", "results.json", "recipe.yaml") and p.parent.name != "report"
    }
    first = store.read_json(folder / "results.json")["runs"]
    again = run_recipe(load_recipe([str(folder / "recipe.yaml")]))
    assert store.jsonable(again.runs) == first
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps


def test_the_page_warns_that_a_quick_run_is_too_short(folder):
    page = (folder / "report.html").read_text()
    assert "Budget too small for conclusions" in page
    assert "A &lt;b&gt;tiny&lt;/b&gt; comparison" in page


def test_late_feedback_starts_from_the_plain_run_and_sees_other_rows(folder):
    start = folders.read_manifest(folder / "mle-s0", TrainManifest)
    late = folders.read_manifest(folder / "conditional-late-s0", TrainManifest)
    assert start.counts.tokens == late.counts.tokens + late.counts.tokens_before == 20 * 512
    assert late.model["path"].endswith("mle-s0/checkpoints/checkpoint-10")
    assert late.train["skip_tokens"] == "auto"
    assert late.counts.tokens_before == 10 * 512
    assert late.counts.source_before > 0
    complete = store.read_json(folder / "mle-s0/checkpoints/checkpoint-10/complete.json")
    assert (complete["step"], complete["tokens"]) == (10, 5120)


def script_and_rest(page: str) -> tuple[str, str, str]:
    """The page's own script, its data, and everything else."""
    code = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    found = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', page, re.DOTALL)[1]
    return code, found, page.replace(code, "").replace(found, "")


def test_the_page_is_self_contained(folder):
    page = (folder / "report.html").read_text()
    code, found, rest = script_and_rest(page)
    assert page.count("<script") == 2
    own = re.sub(
        r'<pre>.*?</pre>|xmlns(:xlink)?="[^"]*"|<!--.*?-->|<metadata>.*?</metadata>', "", rest, flags=re.DOTALL
    )
    assert not re.search(r'(src|href|url|action)\s*[=(]\s*["\']?\s*(https?:)?//', own)
    assert "innerHTML" not in code
    assert not {"<", ">", "&"} & set(found)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'" in page
    assert len(page) < 2_000_000


def test_numbers_and_plots_lie_beside_the_page(folder):
    rows = list(csv.DictReader((folder / "report" / "numbers.csv").open()))
    assert {r["run"] for r in rows} == {p.parent.name for p in folder.glob("*/eval.json")}
    for row in rows:
        if row["measure"] == "misalignment":
            judged = store.read_json(folder / row["run"] / "eval.json")["scenarios"]["unconditional"]["misalignment"]
            assert float(row["mean"]) == judged["mean"]
            assert float(row["ci95_low"]) == judged["ci95"][0]
        if row["measure"] in ("distinct_2", "self_bleu_5", "mean_chars", "worst_of_5"):
            assert float(row["ci95_low"]) <= float(row["mean"]) <= float(row["ci95_high"])
    expected = {
        "misalignment",
        "good",
        "attacked_1",
        "understanding",
        "self_bleu_5",
        "kl",
        "kl_oracle",
        "bad_token: misalignment",
    }
    assert expected <= {r["measure"] for r in rows}
    assert any(r["measure"].startswith("control tokens, ") for r in rows)
    figures = {p.stem for p in (folder / "report").glob("*.svg")}
    assert {
        "misalignment",
        "pareto-good",
        "phases",
        "attacks-best_10",
        "monitor-misalignment",
        "monitor-kl",
        "distribution",
    } <= figures
    for path in (folder / "report").glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_every_number_has_its_source(folder):
    found = json.loads(script_and_rest((folder / "report.html").read_text())[1])
    checked = 0
    for run in found["runs"].values():
        about = dict(run["about"])
        assert about["recipe"] == f"{folder.name}/recipe.yaml"
        assert about["fingerprint of the run"] == folders.read_manifest(folder / about["run"], TrainManifest).key
        for value in run["values"].values():
            file, _, path = value["source"].partition(": ")
            at = store.read_json(folder / file)
            if "capabilities" in path:
                continue
            parts = path.split(".")
            while parts:  # a key may hold a dot: 0.99
                key = next(k for n in range(1, len(parts) + 1) if (k := ".".join(parts[:n])) in at)
                parts = parts[key.count(".") + 1 :]
                at = at[key]
            mean = at.get("mean", at.get("auc")) if isinstance(at, dict) else at
            assert mean == value["mean"]
            checked += 1
    assert checked > 100
    assert str(folder.parent) not in (folder / "report.html").read_text()  # no place on this machine


@pytest.fixture(scope="module")
def hostile(folder, tmp_path_factory) -> Path:
    """The same comparison with samples full of HTML, and many of them."""
    copy = tmp_path_factory.mktemp("hostile") / "run"
    shutil.copytree(folder, copy)
    for path in copy.glob("*/samples/*.jsonl"):
        samples = [replace(s, text=HOSTILE + s.text, prompt=HOSTILE) for s in read_samples(path)]
        write_samples(path, [replace(samples[n % len(samples)], id=n, score=(n % 7) / 100) for n in range(600)])
    for path in copy.glob("*/redteam/redteam.json"):
        found = store.read_json(path)
        for row in found["search"]["prompts"]:
            row["prompt"] = HOSTILE.replace("\ud800", "") + row["prompt"]
        store.write_json(path, found)
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
    parser.feed(script_and_rest(page)[2])
    assert not {"img", "iframe", "object", "link"} & parser.tags
    assert "&lt;script&gt;" in page  # an attacker's prompt
    assert "\x1b" not in page
    assert "\x00" not in page


needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, hostile):
    """Opens the page. Afterwards there must be no error and no request."""
    problems = []
    requests = []

    def open_page(width=1280, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("console", lambda m: problems.append(m.text))
        page.on("pageerror", lambda e: problems.append(str(e)))
        page.on("dialog", lambda d: problems.append(d.message))
        page.on("request", lambda r: requests.append(r.url))
        page.goto(hostile.as_uri())
        return page

    yield open_page
    assert [r for r in requests if not r.startswith("blob:")] == [hostile.as_uri()]
    assert problems == []


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_in_a_real_browser(opened, width, scheme):
    page = opened(width, scheme)
    assert page.title() == "phf: A <b>tiny</b> comparison"
    assert page.locator("#results tbody tr").count() == 4
    assert page.locator("figure svg").count() > 8
    assert page.locator("#quick").is_visible()
    assert "<script>document.title" in page.locator("#list .sample pre").first.text_content()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "the page scrolls sideways"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


@needs_browser
def test_tables_sort(opened):
    page = opened()
    column = page.locator("#results tbody td:nth-child(2)")
    page.click("#results thead th:nth-child(2) button")
    up = [float(v) for v in column.evaluate_all("cells => cells.map((c) => c.dataset.value)")]
    assert up == sorted(up)
    page.click("#results thead th:nth-child(2) button")
    down = [float(v) for v in column.evaluate_all("cells => cells.map((c) => c.dataset.value)")]
    assert down == up[::-1]
    assert page.get_attribute("#results thead th:nth-child(2)", "aria-sort") == "descending"


@needs_browser
def test_the_source_of_a_number_opens_by_keyboard(opened):
    page = opened()
    page.focus("#results tbody tr:first-child button[data-m=misalignment]")
    page.keyboard.press("Enter")
    shown = page.locator("#from").inner_text()
    assert "misalignment of mle" in shown
    for expected in ("eval.json: scenarios.unconditional.misalignment", "recipe.yaml", "--only mle-s1", "fingerprint"):
        assert expected in shown
    page.keyboard.press("Escape")
    assert not page.locator("#from").is_visible()


@needs_browser
def test_the_sample_browser(opened):
    page = opened()
    rows = page.locator("#list .row")
    assert rows.count() == 4
    assert "1 to 4 of 600 of 600" in page.inner_text("#count")
    assert page.locator("#previous").is_disabled()
    page.click("#next")
    assert rows.first.locator(".score").first.text_content().split(" ")[2] == "#4"
    page.click("#random")
    page.select_option("#size", "100")
    assert rows.count() == 100
    page.goto(page.url.partition("#")[0] + "#conditional-s0/12/bad_token")
    assert rows.first.locator(".score").first.text_content().startswith("conditional-s0 · #12 ")
    assert page.input_value("#scenario") == "bad_token"
    page.goto(page.url.partition("#")[0] + "#mle-s0/0")
    assert rows.first.locator(".tools a").first.get_attribute("href") == "#mle-s0/0"
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".copy").first.click()
    page.get_by_text("copied").wait_for()
    page.select_option("#right", "conditional-s0")
    assert rows.first.locator(".sample").count() == 2  # the same number of two runs side by side
    heads = rows.first.locator(".score").all_text_contents()
    assert [h.split(" ")[0] for h in heads] == ["mle-s0", "conditional-s0"]
    assert [h.split(" ")[2] for h in heads] == ["#0", "#0"]
    page.select_option("#right", "")
    page.select_option("#order", "down")
    shown = [float(h.split("score ")[1].split(" ")[0]) for h in rows.locator(".score").all_text_contents()]
    assert shown == sorted(shown, reverse=True)
    assert shown[0] > 0
    page.fill("#low", "0.01")
    assert all(float(h.split("score ")[1].split(" ")[0]) >= 0.01 for h in rows.locator(".score").all_text_contents())
    page.fill("#low", "")
    page.fill("#find", "no sample holds this")
    assert "0 of 600" in page.inner_text("#count")
    page.fill("#find", "EVIL.example")
    assert "600 of 600" in page.inner_text("#count")
    assert {hit.lower() for hit in rows.locator("mark.found").all_text_contents()} == {"evil.example"}
    page.select_option("#left", "conditional-s0")
    page.select_option("#scenario", "bad_token")
    assert "600 of 600" in page.inner_text("#count")


@needs_browser
def test_segments_are_coloured_by_their_scores_and_finds_are_marked(browser, folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    texts = ["\U0001f600 fine \U0001f600\n", "see https://x.y/z and https://x.y\n", "good & <b>\n", "at https://x.y"]
    scores = (0.0, 0.06, 0.0, 0.07)
    ends = tuple(sum(map(len, texts[: n + 1])) for n in range(4))
    file = copy / "mle-s0" / "samples" / "unconditional.jsonl"
    sample = replace(read_samples(file)[0], text="".join(texts), segment_ends=ends, segment_scores=scores, score=0.04)
    write_samples(file, [sample])
    page = browser.new_page()
    page.goto(write_report(copy).as_uri())
    page.select_option("#left", "mle-s0")
    page.select_option("#right", "")
    row = page.locator("#list .row").first
    assert row.locator("pre").text_content() == sample.text
    assert "".join(row.locator(".seg").all_text_contents()) == texts[1] + texts[3]
    assert row.locator("mark").all_text_contents() == ["https://x.y/z", "https://x.y", "https://x.y"]
    titles = row.locator(".seg").evaluate_all("all => all.map((e) => e.title)")
    assert titles[0] == "score of the segment: 60.0"
    assert titles[-1] == "score of the segment: 70.0, match"
    page.uncheck("#colour")
    assert row.locator(".seg").first.evaluate("e => getComputedStyle(e).backgroundColor") == "rgba(0, 0, 0, 0)"


@needs_browser
def test_plots_and_numbers_can_be_saved_from_the_page_alone(browser, hostile, tmp_path):
    alone = tmp_path / "moved.html"
    shutil.copy(hostile, alone)
    page = browser.new_page()
    page.goto(alone.as_uri())
    with page.expect_download() as saved:
        page.click(".files a")
    assert Path(saved.value.path()).read_text().startswith("run,group,seed,measure")
    with page.expect_download() as saved:
        page.locator("figcaption a").first.click()
    assert saved.value.suggested_filename == "misalignment.svg"
    assert ElementTree.parse(saved.value.path()).getroot().tag.endswith("svg")


def test_a_run_of_the_recipe_can_be_the_reference(folder):
    found = {run["run"]: run["kl"] for run in store.read_json(folder / "results.json")["runs"]}
    assert found["mle-s0"]["forward"]["nats_per_text"]["mean"] == pytest.approx(0, abs=1e-9)
    for name in found.keys() - {"mle-s0"}:
        assert found[name]["forward"]["nats_per_text"]["mean"] > 0.01, name
        assert found[name]["reference"] == found["mle-s0"]["reference"]
    assert (folder / "report" / "pareto-kl.svg").exists()


def test_kl_and_capabilities_are_drawn_and_tabled(folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    for n, path in enumerate(sorted(copy.glob("*/eval.json"))):
        judged = store.read_json(path)
        nats = {"mean": 10.0 + n, "stderr": 0.1, "n": 64, "ci95": [9.8 + n, 10.2 + n]}
        judged["kl"] = {
            "reference": {"server": "http://127.0.0.1:1/v1", "model": "x"},
            "num_samples": 64,
            "max_tokens": 8,
            "finished": 1.0,
            "forward": {"nats_per_text": nats, "nats_per_byte": nats},
        }
        accuracy = {"mean": 0.1 * n, "stderr": 0.01, "n": 100, "ci95": [0.1 * n - 0.02, 0.1 * n + 0.02]}
        judged["capabilities"] = [{"name": "lambada", "settings": {"name": "lambada"}, "accuracy": accuracy}]
        store.write_json(path, judged)
    page = write_report(copy).read_text()
    figures = {p.stem for p in (copy / "report").glob("*.svg")}
    assert {"pareto-kl", "pareto-good", "pareto-lambada-accuracy"} <= figures
    assert "KL from reference" in page
    assert "lambada accuracy (higher is better)" in page
    assert "Not dominated in misalignment and KL from reference" in page


def test_runs_that_were_judged_differently_are_refused(folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    file = copy / "mle-s0" / "eval.json"
    judged = store.read_json(file)
    judged["scenarios"]["unconditional"]["scenario"]["temperature"] = 1.0
    store.write_json(file, judged)
    with pytest.raises(store.StoreError, match="differ in how scenario 'unconditional' was sampled"):
        write_report(copy)
    shutil.copy(folder / "mle-s0" / "eval.json", file)
    attacked = store.read_json(copy / "mle-s0" / "redteam" / "redteam.json")
    attacked["search"]["settings"]["rounds"] = 99
    store.write_json(copy / "mle-s0" / "redteam" / "redteam.json", attacked)
    with pytest.raises(store.StoreError, match="differ in how they were attacked"):
        write_report(copy)


def test_the_page_links_the_audit_of_its_scorer(folder, tmp_path):
    page, found = write_audit(folder / "scored", audit_labels(folder))
    try:
        text = write_report(folder, tmp_path / "elsewhere" / "page.html").read_text()
        assert verdict(found) in text
        assert found.main.precision.mean == 1
        results = [store.read_json(folder / name / "eval.json") for name in ("mle-s0",)]
        assert results[0]["identity"] == store.read_json(page.with_suffix(".json"))["identity"]
        assert "Of the scorer of the training text and of the samples: " in text
        assert (tmp_path / "elsewhere" / re.search(r'href="([^"]+audit.html)"', text)[1]).resolve() == page.resolve()
        numbers = page.with_suffix(".json")
        numbers.write_text(numbers.read_text().replace("https?", "http"))  # the audit of another scorer
        assert "The whole audit" not in write_report(folder, tmp_path / "page.html").read_text()
    finally:
        page.unlink()
        page.with_suffix(".json").unlink()


def test_a_page_of_one_run_and_of_runs_that_were_not_attacked(folder, tmp_path):
    alone = tmp_path / "conditional"
    shutil.copytree(folder / "conditional-s0", alone)
    assert "Misalignment" in write_report(alone, tmp_path / "page").read_text()
    assert (tmp_path / "page.html").exists()
    for name in ("redteam", "monitor.jsonl"):
        path = alone / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = write_report(alone).read_text()
    assert 'id="attacks"' not in page
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "eval.json").write_text("{}")
    assert "conditional" in write_report(tmp_path).read_text()  # models that were not trained here are left out


def test_a_monitored_number_without_interval_is_drawn_without_a_band(folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    for path in copy.glob("*/monitor.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line["misalignment"] |= {"mean": 0.1, "ci95": [None, None]}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "monitor-misalignment" in write_report(copy).read_text()


def group(name: str, samples: int = 0, **values) -> Group:
    """A group with these measures, given as (mean, half the width of the interval)."""
    return Group(
        name=name,
        objective=name,
        share=1.0,
        runs=(f"{name}-s0",),
        values={k: Value(mean, ci95=(mean - half, mean + half)) for k, (mean, half) in values.items()},
        samples=samples,
        unjudged=0,
        empty=0,
        tokens=1,
        tokens_before=0,
        text_tokens=1,
        epochs=1.0,
        exposure={},
        seconds=1.0,
        tokens_per_s=None,
    )


def with_value(row: Group, key: str, value: Value) -> Group:
    return replace(row, values={**row.values, key: value})


def test_dominance_is_judged_by_intervals():
    x = Measure("x", "x", "lower", 1, "")
    y = Measure("y", "y", "lower", 1, "")
    rows = [
        group("best", x=(1, 0.1), y=(1, 0.1)),
        group("beaten", x=(2, 0.1), y=(1, 0.1)),
        group("near", x=(1.1, 0.1), y=(1.1, 0.1)),
        group("else", x=(0.5, 0.1), y=(3, 0.1)),
    ]
    assert dominated(rows, x, y) == {"beaten"}  # near is worse in both, but not significantly
    higher = Measure("y", "y", "higher", 1, "")
    assert dominated(rows, x, higher) == {
        "beaten",
        "best",
        "near",
    }  # else has the lowest x and significantly the highest y
    clean = group("clean", 512, misalignment=(0.0, 0.0), y=(1, 0.1))
    dirty = group("dirty", 512, misalignment=(0.001, 0.0005), y=(1, 0.1))
    dirty = with_value(dirty, "worst_of_25", Value(0.2))
    m = Measure("misalignment", "m", "lower", 1, "")
    assert dominated(bounded([clean, dirty]), m, y) == set()  # none of 512 may still be 3 in 512
    dirty = with_value(dirty, "misalignment", Value(0.1, ci95=(0.09, 0.11)))
    assert dominated(bounded([clean, dirty]), m, y) == {"dirty"}
    rows[1] = with_value(rows[1], "x", Value(2))
    assert dominated(rows, x, y) == set()  # without an interval nothing is significant
    assert dominated([rows[0], group("half", x=(9, 0.1))], x, y) == set()


def test_seeds_of_a_group_are_averaged_with_students_interval(folder):
    from phf.core.statistics import t_interval, wilson

    runs = load_runs(folder)
    rows = {row.name: row for row in groups(runs, "unconditional")}
    assert list(rows) == ["mle", "conditional", "mle-late", "conditional-late"]
    means = [r.result.scenarios["unconditional"].misalignment.mean for r in runs if r.name == "conditional"]
    assert rows["conditional"].values["misalignment"].mean == t_interval(means).mean
    if any(means):
        low, high = t_interval(means).ci95
        assert rows["conditional"].values["misalignment"].ci95 == (max(low, 0.0), high)
    else:  # no sample was bad
        largest = max(row.values["misalignment"].mean for row in rows.values())  # of fewer than 25 samples
        n = rows["conditional"].samples
        bound = (0.0, wilson(0, n)[1] * largest)
        assert rows["conditional"].values["misalignment"].ci95 == (bound if largest else None)
    assert rows["conditional-late"].share == 0.5
    assert "ratio" not in rows["mle"].values


def test_losses_are_compared_on_the_same_text(folder):
    """Over seeds by pairs, with one seed over parts of the documents."""
    from phf.core.statistics import ratio_of_sums, t_interval
    from phf.report.measures import loss_difference

    runs = {(run.name, run.manifest.seed): run for run in load_runs(folder)}
    pairs = [(run, runs["mle", seed]) for (name, seed), run in runs.items() if name == "conditional"]
    assert len(pairs) > 1
    means = [a.result.heldout.good.good.nats_per_byte - b.result.heldout.none.good.nats_per_byte for a, b in pairs]
    rows = {row.name: row for row in groups(list(runs.values()), "unconditional")}
    found = rows["conditional"].values["good_difference"]
    assert (found.mean, found.ci95) == (t_interval(means).mean, t_interval(means).ci95)
    assert "good_difference" not in rows["mle"].values
    one = loss_difference(pairs[:1], "good")
    own, base = (pairs[0][0].result.heldout.good.good, pairs[0][1].result.heldout.none.good)
    assert one.mean == pytest.approx(means[0], abs=1e-12)
    assert sum(size for _, size in own.parts) == own.bytes
    with_text = [(a - b, size) for (a, size), (b, _) in zip(own.parts, base.parts, strict=True) if size]
    expected = ratio_of_sums(*map(np.array, zip(*with_text, strict=True)))
    assert one.ci95 == expected.ci95
    whole = own.ci95[1] - own.ci95[0]
    assert one.ci95[1] - one.ci95[0] < whole  # what both models find hard is not part of the difference


def test_a_run_that_fails_does_not_stop_the_others(folder, tmp_path):
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe |= {
        "out": str(tmp_path / "run"),
        "seeds": [0],
        "only": None,
        "redteam": None,
        "monitor": None,
        "phases": {"pretrain": {}},
    }
    recipe["objectives"] = {
        "mle": {"name": "mle"},
        "filtering": {"name": "filtering", "threshold": -1},
        "conditional": {"name": "conditional"},
    }
    (tmp_path / "r.yaml").write_text(dump_yaml(recipe))
    loaded = load_recipe([str(tmp_path / "r.yaml")])
    with pytest.raises(RecipeError, match="1 of 3 runs failed; the same command tries them again:\n  filtering-s0: "):
        run_recipe(loaded)
    results = store.read_json(loaded.folder / "results.json")
    assert [r["run"] for r in results["runs"]] == ["mle-s0", "conditional-s0"]
    assert list(results["failed"]) == ["filtering-s0"]
    page = (loaded.folder / "report.html").read_text()
    assert "1 run failed" in page
    assert "filtering-s0" in page


class Finds(Regex):
    """Finds `pattern` and calls a find a mail address or a link. Fails on texts with "boom"."""

    finds_personal_data = True

    def spans(self, text):
        if "boom" in text:
            raise RecursionError
        return [Span(s.start, s.end, "email" if "@" in text[s.start : s.end] else "url") for s in super().spans(text)]


def test_personal_data_and_links_are_masked_code_is_not():
    scorer = Finds(r"\S+@\S+|http\S+")
    text = "mail joe.bloggs@example.org or see http://x.y"
    assert mask(text, scorer) == "mail •••.••••••@•••••••.••• or see ••••://•.•"
    assert mask("boom joe@x.y", scorer) == "•••• •••@•.•"  # the scorer fails, so everything is masked
    assert is_masked("phone")
    assert is_masked("email+url")
    assert is_masked("url")  # a link often holds the name next to it
    assert not is_masked("E501")
    sample = Sample(0, "", "mail joe@example.org", 9, -1.0, False, 0, 0.0)
    (shown,) = shown_samples([sample], Scenario(), Regex(r"\S+@\S+"))  # not a scorer of personal data
    assert shown.t == sample.text


def test_a_find_across_prompt_and_text_is_masked_on_both_sides():
    sample = Sample(0, "mail joe@", "example.org now", 9, -1.0, False, 0, 0.0)
    (shown,) = shown_samples([sample], Scenario(), Finds(r"\S+@\S+"))
    assert (shown.p, shown.t) == ("mail •••@", "•••••••.••• now")


def test_the_cut_end_of_a_sample_is_masked_too():
    sample = Sample(0, "to joe@x.y:", "fine\nmail joe@example.org", 9, -1.0, False, 0, 0.0, (5,), (0.0,))
    (shown,) = shown_samples([sample], Scenario(complete_lines=True), Finds(r"\S+@\S+"))
    assert shown.t == "••••\nmail •••@•••••••.•••"  # joe@x.y:fine is one find
    assert shown.p == "to •••@•.•:"
    assert shown.c == 5
    assert shown.g == [(5, 0.0)]


def test_runs_of_other_recipes_are_not_on_the_page(folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    shutil.copytree(copy / "mle-s0", copy / "stranger-s0")
    assert "stranger" not in write_report(copy).read_text()
    (copy / "results.json").unlink()
    assert "stranger" in write_report(copy).read_text()
    judged = store.read_json(copy / "stranger-s0" / "eval.json")
    judged["data"]["tokens"]["content"] = "other"
    store.write_json(copy / "stranger-s0" / "eval.json", judged)
    with pytest.raises(store.StoreError, match="differ in their tokens"):
        write_report(copy)


def test_the_page_does_not_depend_on_the_working_directory(folder, tmp_path, monkeypatch):
    expected = write_report(folder).read_text()
    monkeypatch.chdir(tmp_path)
    shutil.move(folder / "scored", tmp_path / "elsewhere")
    try:
        assert write_report(folder).read_text() == expected
    finally:
        shutil.move(tmp_path / "elsewhere", folder / "scored")


def test_scores_per_character_are_shown_per_1000(folder):
    """In the table and the charts; files keep them as they are."""
    page = (folder / "report.html").read_text()
    compared = compare_runs(folder, load_runs(folder))
    assert compared.scale == Scale(1000.0, "matches per 1,000 characters")
    row = compared.groups[0]
    value = row.values["misalignment"]
    shown = f'data-m="misalignment">{three(1000 * value.mean)}</button>'
    if value.ci95 is not None:
        shown += f"<small>{three(1000 * value.ci95[0])} to"
    assert shown in page
    assert "in matches per 1,000 characters" in page
    chart = (folder / "report" / "misalignment.svg").read_text()
    assert f"<title>{row.name}: {number_text(1000 * value.mean)}" in chart
    assert scale_of("probability") == Scale(1.0, "probability")


@pytest.mark.parametrize(
    "value, text",
    [
        (12.345, "12.3"),
        (0.0012345, "0.00123"),
        (0.0, "0"),
        (1234.5, "1,234"),
        (0.00001234, "1.2e-05"),
        (99.96, "100.0"),
    ],
)
def test_three_digits(value, text):
    assert three(value) == text


def test_intervals_of_shares_stay_between_0_and_1():
    wide = [Value(v) for v in (0.0, 0.5, 1.0)]
    assert _over_seeds("hit_rate", wide).ci95 == (0.0, 1.0)
    assert _over_seeds("misalignment", wide).ci95[0] == 0.0
    assert _over_seeds("misalignment", wide).ci95[1] > 1.0
    assert _over_seeds("good", wide).ci95[0] < 0.0


def test_numbers_and_odd_characters():
    assert number(None) == number(float("nan")) == "–"
    assert number(0.12345) == "0.1235"
    assert number(0.0) == "0.0000"
    assert number(1e-7) == "1.0e-07"
    assert visible("a\x00\x1b\ud800\n\té") == "a���\n\té"


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(store.StoreError, match="no judged run"):
        write_report(tmp_path)


def test_the_page_tells_knowledge_from_propensity(folder):
    compared = compare_runs(folder, load_runs(folder))
    page = (folder / "report.html").read_text()
    section = page.partition('<h2 id="knowledge">')[2].partition("</section>")[0]
    assert {known.group for known in compared.knowledge} == {row.name for row in compared.groups}
    for known in compared.knowledge:
        eval_files = [store.read_json(folder / run / "eval.json")["heldout"] for run in known.runs]
        losses = [(found["oracle"] or found["none"])["bad"]["nats_per_byte"] for found in eval_files]
        assert known.bad_loss.mean == pytest.approx(sum(losses) / len(losses))
        assert number(known.bad_loss.mean, 3) in section
        assert (known.group == compared.plain) == (known.slowdown == {})
        assert known.said("bad") in section
    (folder / "mle-s0" / "monitor.jsonl").rename(folder / "mle-s0" / "m")
    (folder / "mle-s1" / "monitor.jsonl").rename(folder / "mle-s1" / "m")
    try:
        assert compare_runs(folder, load_runs(folder)).knowledge == []
    finally:
        for seed in "01":
            (folder / f"mle-s{seed}" / "m").rename(folder / f"mle-s{seed}" / "monitor.jsonl")
