"""Every code block of the documentation runs, top to bottom: Python as it is, commands with their sizes cut down.

Each page starts in a folder with what a reader of it would have: texts, labels, a scored corpus, tokens, two judged runs.
Commands that need the Hub, a cluster or a server are only parsed (`ELSEWHERE` says which and why).
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
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import ROOT, TINY_LLAMA, tiny_texts
from phf.core.config import dump_yaml
from phf.objectives import MLE, Conditional
from phf.training.lm import FromConfig
from phf.training.trainer import to_tensors

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCKS = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
ELSEWHERE = {
    r"--executor (slurm|ray)": "a cluster (tests/test_cluster.py has one)",
    r"\bgpt2\b": "weights on the Hub",
    r"https?://": "a server (tests/test_redteam.py, tests/test_reference.py have one)",
    r"\bphf run paper-\S+(?!.*--list)": "data sets on the Hub, and a GPU for hours",
    r"\bphf push\b": "the Hub (tests/test_hub.py has one)",
}
CUTS = {
    "tokenize": ["--vocab-size", "300"],
    "train": ["cut-train.yaml", "train.tokens=2e3"],
    "sample": ["num_samples=4", "max_tokens=8", "min_tokens=1"],
    "eval": ["num_samples=4", "max_tokens=8", "min_tokens=1"],
    "redteam": [
        "trials=2", "rounds=1", "pool=3", "candidates=3", "continuations=2", "confirm=2", "max_tokens=8", "tokens.num_samples=4",
        "tokens.max_tokens=8", "tokens.min_tokens=1",
    ],
    "run": ["cut-run.yaml"],
}  # fmt: skip


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """What a reader of any page has, in the smallest size."""
    from phf.data.readers import Jsonl
    from phf.data.segment import Lines
    from phf.evaluation.evaluate import evaluate_run
    from phf.generation.scenario import Scenario
    from phf.scorers import PII
    from phf.scoring.score import score_corpus
    from phf.tokens.store import tokenize_corpus
    from phf.tokens.tokenizer import TrainBPE
    from phf.training.train import TrainConfig, train

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
            kind = int(bad) if name == "labels" else (n % 2 if bad else 2)  # the page's other labels: 0 and 1 are bad
            rows.append((text_of.replace("\n", " ").replace(",", ""), kind))
        (folder / f"{name}.csv").write_text(f"{text},{label}\n" + "".join(f"{t},{n}\n" for t, n in rows))
    (folder / "mine.py").write_text("def score(text):\n    return text.count('e') / len(text)\n")
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
        "during": None,
        "redteam": None,
        "scenarios": {"unconditional": {"num_samples": 4, "max_tokens": 8, "min_tokens": 1}, "bad_token": {"num_samples": 4, "max_tokens": 8, "min_tokens": 1}},
    }  # fmt: skip
    (folder / "cut-run.yaml").write_text(dump_yaml(cut))
    score_corpus(Jsonl(str(folder / "texts.jsonl")), Lines(), PII(), folder / "scored")
    tokenize_corpus(folder / "scored", TrainBPE(300), folder / "tokens", heldout=0.1)
    settings = TrainConfig(tokens=40 * 512, context=32, batch_rows=16, lr=1e-2, precision="fp32")
    for name, objective in (("mine", Conditional()), ("other", MLE())):
        train(folder / "tokens", folder / "runs" / name, FromConfig(TINY_LLAMA), objective, settings)
        evaluate_run(folder / "runs" / name, {"unconditional": Scenario(num_samples=4, max_tokens=8, min_tokens=1)})
    return folder


def commands_of(block: str) -> list[str]:
    """A shell block's commands: heredocs and continued lines whole."""
    found, lines = [], block.splitlines()
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
    """One command of a page. Raises where it fails, is unknown, or is none that a page may have."""
    import typer

    from phf.cli import app

    if command.startswith("cat > "):
        subprocess.run(["bash", "-c", command], check=True)
        return
    if command.startswith("make "):
        targets = set(re.findall(r"^[\w-]+(?=:)", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert command.split()[1] in targets, command
        return
    launched = re.match(r"torchrun --nproc-per-node \d+ -m ", command)
    command = command[launched.end() :] if launched else command
    words = shlex.split(command)
    assert words[0] == "phf", f"a page may not run {command!r}"
    name, arguments = words[1], words[2:]
    group = typer.main.get_command(app)
    if launched or any(re.search(pattern, command) for pattern in ELSEWHERE):
        group.commands[name].make_context(name, [*arguments])  # its options and arguments exist
        return
    if name == "run" and not {"--list", "--dry-run"} & set(arguments):
        files = [a for a in arguments if "=" not in a]
        for file in files:  # what the page's own file says of the run's size gives way
            assert Path(file).exists() or file in ("demo", "finetuning", "grid", "pep8", "quick", "demo"), file
    cuts = [] if {"--list", "--dry-run"} & set(arguments) else CUTS.get(name, [])
    if "during.scenarios" in command:
        cuts += [f"during.scenarios.unconditional.{cut}" for cut in ("num_samples=4", "max_tokens=8", "min_tokens=1")]
    try:
        result = app([name, *arguments, *cuts], standalone_mode=False)
    except SystemExit as error:
        result = error.code
    assert not result, f"{command}: {result}"


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=[pytest.mark.slow] * (p.name == "recipes.md"), id=p.name)  # whole recipes: minutes
        for p in PAGES
        if re.search(r"```(python|sh)\n", p.read_text())
    ],
)
def test_every_code_block_runs(page, workplace, tmp_path, monkeypatch):
    place = tmp_path / "here"
    shutil.copytree(workplace, place)
    monkeypatch.chdir(place)
    if page.name == "start.md":  # begins with the texts alone
        for made in ("scored", "tokens", "runs"):
            shutil.rmtree(place / made)
    for manifest in (place / "runs").glob("*/manifest.json"):  # the copy's own tokens
        manifest.write_text(manifest.read_text().replace(str(workplace), str(place)))
    module = types.ModuleType("docs_page")  # dataclasses look their module up
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
        else:
            assert language == "", f"{page.name}: a block of {language!r} is neither run nor plain output"
    assert ran
    if page.name == "objective.md":
        check_own_models(module.rows)


def check_own_models(rows) -> None:
    """The loop of one's own and the Trainer of one's own each made a model that plain transformers loads and that has
    learned: less than a nat below chance is not learning."""
    from transformers import AutoModelForCausalLM

    batch, weights = to_tensors(rows.batch(np.arange(32))), []
    for name in ("mine", "trainers"):
        lm = AutoModelForCausalLM.from_pretrained(name)
        weights.append(torch.nn.utils.parameters_to_vector(lm.parameters()))
        logits = lm(batch["input_ids"]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
        assert loss < math.log(logits.shape[-1]) - 1, name
    assert not torch.equal(*weights)  # the second goes on from the first


def test_only_known_commands_may_stand_in_a_page():
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
    for command in re.findall(r"(?:^|`)(?:\$ )?phf ([a-z][\w-]+)", text, re.MULTILINE):
        assert command in commands, command
    targets = set(re.findall(r"^[\w-]+(?=:)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"`make (\w+)`", text):
        assert target in targets, target
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)\)", (ROOT / "README.md").read_text()))
    assert linked == {p.name for p in (ROOT / "docs").glob("*.md")}


def test_the_api_page_is_what_the_docstrings_say():
    made = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["page"]()
    assert (ROOT / "docs" / "api.md").read_text() == made, "run: python docs/make_api.py"
