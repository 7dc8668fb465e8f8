"""The documentation's Python blocks run, top to bottom, on a tiny token store; its commands exist."""

from __future__ import annotations

import re
import shutil
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=lambda p: p.name)
def test_python_blocks_run(page, tmp_path, monkeypatch, tokens_dir):
    shutil.copytree(tokens_dir, tmp_path / "tokens")
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("docs_page")  # dataclasses look their module up
    monkeypatch.setitem(sys.modules, "docs_page", module)
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, str(page), "exec"), module.__dict__)  # noqa: S102 (our own pages)
    assert module.__dict__.keys() > {"__name__"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_and_links_exist(page):
    from phf.cli import app

    commands = {c.name or c.callback.__name__ for c in app.registered_commands}
    text = page.read_text()
    for command in re.findall(r"^(?:\$ )?phf ([\w-]+)", text, re.MULTILINE):
        assert command in commands, command
    targets = set(re.findall(r"^[\w-]+(?=:)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"`make (\w+)`", text):
        assert target in targets, target
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link
