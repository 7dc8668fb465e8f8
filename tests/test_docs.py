"""Every code block of the documentation runs, from top to bottom: Python unchanged, commands with smaller sizes.

Each page starts in a folder with what its reader has: texts, labels, a scored corpus, tokens, two judged runs. Commands
that need the Hub, a cluster or a server are only parsed (`ELSEWHERE` says which and why).
"""

from __future__ import annotations

import json
import math
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch

from helpers import ROOT, TINY_LLAMA, tiny_texts
from phf.core.config import dump_yaml, parse_yaml, validate
from phf.data.canaries import Canaries
from phf.objectives import MLE, AnyObjective, Conditional
from phf.scorers import AnyScorer
from phf.training.batches import to_tensors
from phf.training.lm import FromConfig

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCKS = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
ELSEWHERE = {
    r"--executor (slurm|ray)": "a cluster (tests/scoring/test_cluster.py has one)",
    r"\bgpt2\b": "weights on the Hub",
    r"https?://": "a server (tests/evaluation/test_kl.py has one)",
    r"\bphf run paper-\S+(?!.*--list)": "datasets on the Hub, and a GPU for hours",
    r"\bphf push\b": "the Hub (tests/scoring/test_publish.py has one)",
}
SMALL = {
    "tokenize": ["--vocab-size", "300"],
    "train": ["cut-train.yaml", "train.tokens=2e3"],
    "sample": ["num_samples=4", "max_tokens=8", "min_tokens=1"],
    "eval": ["num_samples=4", "max_tokens=8", "min_tokens=1"],
    "redteam": [
        *("trials=2", "rounds=1", "pool=3", "candidates=3", "continuations=2", "confirm=2", "max_tokens=8"),
        *("tokens.num_samples=4", "tokens.max_tokens=8", "tokens.min_tokens=1"),
    ],
    "run": ["cut-run.yaml"],
}
"""Settings that make a command of a page small."""


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """The folder of a reader, with the smallest sizes."""
    from phf.data.readers import Jsonl
    from phf.data.segment import Lines
    from phf.evaluation.evaluate import evaluate_run
    from phf.generation.scenario import Scenario
    from phf.scorers import PII
    from phf.scoring.score import score_corpus
    from phf.tokens.store import tokenize_corpus
    from phf.tokens.tokenizer import TrainBPE
    from phf.training.config import TrainConfig
    from phf.training.train import train

    folder = tmp_path_factory.mktemp("docs")
    texts = tiny_texts()
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t, "bad": "http" in t}) + "\n" for t in texts))
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.txt").write_text(texts[0])
    rng = np.random.default_rng(0)
    for name, text, label in (("labels", "comment", "toxic"), ("other", "tweet", "class")):
        rows = []
        for n, text_of in enumerate(tiny_texts(80, int(rng.integers(1e6)))):
            bad = "http" in text_of
            kind = int(bad) if name == "labels" else (n % 2 if bad else 2)  # in the page's other labels 0 and 1 are bad
            rows.append((text_of.replace("\n", " ").replace(",", ""), kind))
        (folder / f"{name}.csv").write_text(f"{text},{label}\n" + "".join(f"{t},{n}\n" for t, n in rows))
    lines = [line for text in texts[:20] for line in text.splitlines() if "," not in line and '"' not in line]
    labelled = "".join(f"{line},{int('http' in line)}\n" for line in dict.fromkeys(lines))
    (folder / "segments.csv").write_text(f"segment,toxic\n{labelled}")
    (folder / "labels").mkdir()
    every = dict.fromkeys(line for text in texts for line in text.splitlines())
    rows = [{"text": line, "label": 2 * ("http" in line)} for line in every]
    (folder / "labels" / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "labels" / "manifest.json").write_text(json.dumps({"bad_from": 2}))
    (folder / "mine.py").write_text("def score(text):\n    return text.count('e') / len(text)\n")
    own = next(code for kind, code in BLOCKS.findall((ROOT / "docs" / "objective.md").read_text()) if kind == "python")
    (folder / "focal.py").write_text(own)
    (folder / "lambada_test.jsonl").write_text(
        "".join(json.dumps({"text": "the model reads a line"}) + "\n" for _ in range(4))
    )
    (folder / "model.yaml").write_text(dump_yaml({"model": {"name": "from_config", "config": TINY_LLAMA}}))
    small = {"context": 32, "batch_rows": 8, "lr": 1e-2, "precision": "fp32", "compile": False, "save_every": None}
    (folder / "cut-train.yaml").write_text(dump_yaml({"train": small}))
    cut = {
        "corpus": {"name": "jsonl", "path": "texts.jsonl"},
        "tokenizer": {"name": "bpe", "vocab_size": 300},
        "model": {"name": "from_config", "config": TINY_LLAMA},
        "train": small | {"tokens": 2e3},
        "monitor": None,
        "redteam": None,
        "scenarios": {
            name: {"num_samples": 4, "max_tokens": 8, "min_tokens": 1} for name in ("unconditional", "bad_token")
        },
    }
    (folder / "cut-run.yaml").write_text(dump_yaml(cut))
    score_corpus(Jsonl(str(folder / "texts.jsonl")), Lines(), PII(), folder / "scored")
    tokenize_corpus(folder / "scored", TrainBPE(300), folder / "tokens", heldout=0.1)
    settings = TrainConfig(tokens=40 * 512, context=32, batch_rows=16, lr=1e-2, precision="fp32")
    for name, objective in (("mine", Conditional()), ("other", MLE())):
        train(
            tokens_dir=folder / "tokens",
            out=folder / "runs" / name,
            model=FromConfig(TINY_LLAMA),
            objective=objective,
            config=settings,
        )
        evaluate_run(folder / "runs" / name, {"unconditional": Scenario(num_samples=4, max_tokens=8, min_tokens=1)})
    return folder


def commands_of(block: str) -> list[str]:
    """The commands of a shell block, with heredocs and continued lines joined."""
    found = []
    lines = block.splitlines()
    while lines:
        line = lines.pop(0)
        if "<<'EOF'" in line:
            while True:
                line += "\n" + lines.pop(0)
                if line.endswith("\nEOF"):
                    break
        while line.endswith("\\"):
            line = line[:-1] + lines.pop(0)
        line = line if "<<'EOF'" in line else line.split("  #")[0].rstrip()
        if line:
            found.append(line)
    return found


def run_command(command: str) -> None:
    """Run one command of a page. Raises where it fails, is unknown or is not allowed on a page."""
    import typer

    from phf.cli import app

    if command.startswith("cat > "):
        subprocess.run(["bash", "-c", command], check=True)
        return
    if command.startswith("make "):
        targets = set(re.findall(r"^[\w-]+(?=:)", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert command.split()[1] in targets, command
        return
    if install := re.fullmatch(r"pip install '\.\[([\w,]+)\]'", command):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(install[1].split(",")) <= set(extras), command
        return
    if command == "python3 -m venv .venv && . .venv/bin/activate":
        return
    launched = re.match(r"torchrun --nproc-per-node \d+ -m ", command)
    command = command[launched.end() :] if launched else command
    words = shlex.split(command)
    assert words[0] == "phf", f"a page may not run {command!r}"
    name = words[1]
    arguments = words[2:]
    group = typer.main.get_command(app)
    if launched or any(re.search(pattern, command) for pattern in ELSEWHERE):
        group.commands[name].make_context(name, [*arguments])  # checks its options and arguments
        return
    if name == "run" and not {"--list", "--dry-run"} & set(arguments):
        files = [a for a in arguments if "=" not in a]
        for file in files:
            assert Path(file).exists() or file in ("demo", "finetuning", "grid", "pep8", "quick"), file
    smaller = [] if {"--list", "--dry-run"} & set(arguments) else SMALL.get(name, [])
    if "monitor.scenarios" in command:
        smaller += [
            f"monitor.scenarios.unconditional.{setting}"
            for setting in ("num_samples=4", "max_tokens=8", "min_tokens=1")
        ]
    try:
        result = app([name, *arguments, *smaller], standalone_mode=False)
    except SystemExit as error:
        result = error.code
    assert not result, f"{command}: {result}"


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=[pytest.mark.slow] * (p.name == "recipes.md"), id=p.name)  # whole recipes take minutes
        for p in PAGES
        if re.search(r"```(python|sh|yaml)\n", p.read_text())
    ],
)
def test_every_code_block_runs(page, workplace, tmp_path, monkeypatch):
    place = tmp_path / "here"
    shutil.copytree(workplace, place)
    monkeypatch.chdir(place)
    if page.name in ("start.md", "python.md"):  # their readers have only the texts
        for made in ("scored", "tokens", "runs"):
            shutil.rmtree(place / made)
    for manifest in (place / "runs").glob("*/manifest.json"):  # the tokens of the copy
        manifest.write_text(manifest.read_text().replace(str(workplace), str(place)))
    module = types.ModuleType("docs_page")  # dataclasses look up their module
    monkeypatch.setitem(sys.modules, "docs_page", module)
    ran = 0
    for language, block in BLOCKS.findall(page.read_text()):
        if language == "python":
            exec(compile(block, str(page), "exec"), module.__dict__)  # noqa: S102 (our own pages)
            ran += 1
        elif language == "sh":
            for command in commands_of(block):
                run_command(command)
                ran += 1
        elif language == "yaml":
            parts = parse_yaml(block, page.name)
            assert parts.keys() <= {"objectives", "scorer", "preferences", "canaries"}
            if "canaries" in parts:
                validate(parts["canaries"], Canaries, page.name)
            for settings in parts.get("objectives", {}).values():
                validate(settings, AnyObjective, page.name)
            for settings in (*parts.get("preferences", {}).values(), *([parts["scorer"]] if "scorer" in parts else [])):
                validate(settings, AnyScorer, page.name)
            ran += 1
        else:
            assert language == "", f"{page.name}: a block of {language!r} is neither code nor output"
    assert ran
    if page.name == "objective.md":
        check_own_models(module.order)


def check_own_models(order) -> None:
    """The page's own loop and its Hugging Face Trainer each made a model that plain transformers loads. Both have
    learned: their loss is more than a nat below chance."""
    from transformers import AutoModelForCausalLM

    batch = to_tensors(order.batch(0, 32))
    weights = []
    for name in ("mine", "trainers"):
        lm = AutoModelForCausalLM.from_pretrained(name)
        weights.append(torch.nn.utils.parameters_to_vector(lm.parameters()))
        logits = lm(batch["input_ids"]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
        assert loss < math.log(logits.shape[-1]) - 1, name
    assert not torch.equal(*weights)  # the second starts from the first


def test_only_known_commands_are_allowed_on_a_page():
    with pytest.raises(AssertionError, match="a page may not run"):
        run_command("rm -rf /")
    with pytest.raises(Exception, match="No such option"):
        run_command("phf score corpus/ out/ --executor slurm --partition cpu")
    with pytest.raises(KeyError):
        run_command("phf sccore hf://datasets/x gpt2")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_and_links_exist(page):
    from phf.cli import app

    commands = {c.name or c.callback.__name__ for c in app.registered_commands}
    text = page.read_text()
    blocks = "\n".join(block for _, block in BLOCKS.findall(text))
    named = re.findall(r"`phf ([a-z][\w-]+)", text) + re.findall(r"^(?:\$ )?phf ([a-z][\w-]+)", blocks, re.MULTILINE)
    assert set(named) <= commands
    targets = set(re.findall(r"^[\w-]+(?=:)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"`make (\w+)`", text):
        assert target in targets, target
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", ["AGENTS.md", "CONTRIBUTING.md", "RELEASING.md", "docs/architecture.md"])
def test_the_files_that_a_page_names_exist(page):
    packages = {p.name for p in (ROOT / "src" / "phf").iterdir()}
    named = set()
    for text in re.findall(r"`([^`\s]+)`", (ROOT / page).read_text()):
        path = text.split(":")[0].rstrip("/")
        first = path.split("/")[0]
        if "/" in path and not re.search(r"[*<>{}$=()]", path) and (first in packages or (ROOT / first).exists()):
            named.add(ROOT / ("src/phf" if first in packages else "") / path)
    assert named
    assert {p for p in named if not p.exists()} == set()


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)\)", (ROOT / "README.md").read_text()))
    assert linked == {p.name for p in (ROOT / "docs").glob("*.md")}


def test_the_api_page_matches_the_docstrings():
    made = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["page"]()
    assert (ROOT / "docs" / "api.md").read_text() == made, "run: python docs/make_api.py"
    assert "&lt;" not in made


def test_the_findings_are_those_of_the_results():
    made = runpy.run_path(str(ROOT / "docs" / "make_findings.py"))["page"]
    text = (ROOT / "docs" / "findings.md").read_text()
    assert text == made(text), "run: python docs/make_findings.py"
    assert text.partition("<!-- noise: start -->")[0].count("\n| ") == 20


def test_the_schemas_match_the_records(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    made = runpy.run_path(str(ROOT / "docs" / "make_schemas.py"))["schemas"]()
    assert {p.name: p.read_text() for p in (ROOT / "docs" / "schemas").iterdir()} == made, (
        "run: python docs/make_schemas.py"
    )
    for text in made.values():
        jsonschema.Draft202012Validator.check_schema(json.loads(text))


def test_every_field_of_a_result_is_documented():
    for path in (ROOT / "docs" / "schemas").iterdir():
        schema = json.loads(path.read_text())
        records = {"": schema, **schema.get("$defs", {})}
        for name, record in records.items():
            if record.get("additionalProperties") is False or path.stem == "recipe":
                continue  # settings
            undocumented = {k for k, v in record.get("properties", {}).items() if "description" not in v}
            assert undocumented == set(), f"{path.name}: {name}"
