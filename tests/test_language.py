"""The language of everything that people read: no sentence over 40 words, and none of the words that CONTRIBUTING.md
asks to avoid."""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
from pathlib import Path

import pytest
import typer.main

from phf.cli import app

ROOT = Path(__file__).parent.parent
LONGEST = 40
"""Words in a sentence."""
AVOID = {
    r"behind": "after, beyond",
    r"told": "reported",
    r"anew": "again",
    r"mend(?:s|ed|ing)?": "fix",
    r"la(?:id|y(?:ing)?) on": "merged into",
    r"so many": "the number itself",
    r"not to be had": "not available",
    r"quick(?:er|est|ly)?": "fast",
    r"(?:go|goes|going|went|gone) on": "continue, resume",
    r"beg(?:in|ins|an|un)": "start",
    r"set(?:s|ting)? aside": "skip, rename",
    r"nonsense": "wrong",
    r"surely": "significantly",
    r"asked for apart": "separate",
    r"as it was cut": "in the same segments",
    r"beside": "next to, in addition to",
    r"whoever": "anyone who",
    r"anybody": "anyone",
    r"makes? of": "reads as",
    r"in any case": "name the case",
    r"as everywhere": "name the place",
}
BAD_WORD = re.compile(r"\b(?:" + "|".join(AVOID) + r")\b", re.IGNORECASE)
FOR_MODELS = {"attackers.py"}
"""Files with strings that a red LM reads or that choose a mutation: changing them changes results."""

PAGES = sorted(p for pattern in ("*.md", "docs/*.md", ".github/**/*.md") for p in ROOT.glob(pattern))
TEMPLATES = sorted(p for ending in ("html.j2", "yaml", "js") for p in (ROOT / "src" / "phf").rglob(f"*.{ending}"))
COMMENTED = [ROOT / name for name in ("Makefile", "pyproject.toml", ".ci/run", ".github/workflows/ci.yml")]
"""Files of which the comments are read."""


def prose(markdown: str) -> list[str]:
    """The paragraphs, list items, headings and table cells of a page, without code."""
    text = re.sub(r"^( *)```.*?^\1```$", "\n", markdown, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"`[^`]*`", "CODE", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    blocks: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        for item in re.split(r"\n(?=\s*(?:[-*|#]|\d+\.)\s?)", paragraph):
            blocks += item.split("|") if item.lstrip().startswith("|") else [item]
    return [" ".join(b.split()) for b in blocks if b.strip()]


def sentences(block: str) -> list[str]:
    """The sentences of a paragraph."""
    return [s for s in re.split(r"(?<=[.!?])\s+", block) if s]


def num_words(sentence: str) -> int:
    """Words with a letter or digit in them."""
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def complaints(blocks: list[str]) -> list[str]:
    """What is wrong with some text."""
    found = []
    for block in blocks:
        for bad in BAD_WORD.findall(block):
            use = next(better for pattern, better in AVOID.items() if re.fullmatch(pattern, bad, re.IGNORECASE))
            found.append(f"{bad!r} (better: {use}) in: {block[:120]}")
        found += [f"{num_words(s)} words: {s}" for s in sentences(block) if num_words(s) > LONGEST]
    return found


def code_prose(path: Path) -> list[str]:
    """Docstrings, comments and messages of a Python file. Indented examples and programs are left out."""
    source = path.read_text()
    read = tokenize.generate_tokens(io.StringIO(source).readline)
    texts = [token.string.lstrip("# ") for token in read if token.type == tokenize.COMMENT]
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)} - {
        id(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [str(v.value) if isinstance(v, ast.Constant) else "X" for v in node.values]
            message = "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            message = node.value
        else:
            continue
        if id(node) in docstrings:
            lines = inspect.cleandoc(message).splitlines()
            texts.append("\n".join("" if line.startswith("    ") else line for line in lines))
        elif " " in message and ("\n" not in message or "src" in path.parts) and path.name not in FOR_MODELS:
            texts += message.split("\n")
    return [block for text in texts for block in prose(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_pages_are_plain_english(page):
    assert complaints(prose(page.read_text())) == []


@pytest.mark.parametrize("name", sorted(typer.main.get_command(app).commands))
def test_help_texts_are_plain_english(name):
    command = typer.main.get_command(app).commands[name]
    texts = [command.help, *(p.help for p in command.params if getattr(p, "help", None))]
    assert complaints([b for text in texts for b in prose(text)]) == []


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks"])
def test_docstrings_comments_and_messages_are_plain_english(folder):
    found = [
        f"{path.relative_to(ROOT)}: {complaint}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != Path(__file__)
        for complaint in complaints(code_prose(path))
    ]
    assert found == []


@pytest.mark.parametrize("page", TEMPLATES, ids=lambda p: p.name)
def test_templates_and_recipes_are_plain_english(page):
    text = page.read_text()
    if page.suffix == ".j2":
        text = re.sub(r"\{% block style %\}.*?\{% endblock %\}", " ", text, flags=re.DOTALL)
        text = re.sub(r"<(style|script).*?</\1>|\{[%#].*?[%#]\}", " ", text, flags=re.DOTALL)
        text = re.sub(r"\{\{.*?\}\}", "X", text, flags=re.DOTALL)
        text = re.sub(r"<(?!/?(?:b|i|em|code|a|span)\b)[^>]*>", "\n\n", text)
    else:
        mark = "#" if page.suffix == ".yaml" else "//"
        text = "\n\n".join(re.findall(rf"{mark} (.*(?:\n\s*{mark} .*)*)", text))
    assert complaints(prose(text)) == []


@pytest.mark.parametrize("path", COMMENTED, ids=lambda p: p.name)
def test_comments_of_other_files_are_plain_english(path):
    found = re.findall(r"(?:^|\s)#+ (.*(?:\n\s*#+ .*)*)", path.read_text())
    assert found or path.name == "ci.yml"
    assert complaints([block for text in found for block in prose(re.sub(r"\n\s*#+ ", "\n", text))]) == []


def test_the_check_finds_what_it_looks_for():
    assert complaints(["It goes on where it stopped."])
    assert complaints(["He was Told."])
    assert complaints(["word " * 41 + "."])
    assert not complaints(["word " * 40 + "."])
    page = "# A\n\nb `quick` c\n\n```sh\nquick\n```\n\n| x | y |\n- d"
    assert prose(page) == ["# A", "b CODE c", "x", "y", "- d"]
