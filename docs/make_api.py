"""Write docs/api.md from the docstrings of phf's public names: python docs/make_api.py"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
from pathlib import Path

import phf
from phf.core.docs import field_docs

HEAD = """# API

The public names of phf, from their docstrings. `python docs/make_api.py` writes this page. All other names are in
ordinary modules with a docstring at the top. `help(phf.NAME)` shows the same text.
"""


def signature(thing: object) -> str:
    """The parameters with their types and simple defaults."""
    try:
        parameters = inspect.signature(thing).parameters.values()  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""
    shown = []
    keywords_only = False
    for p in parameters:
        if p.kind == p.KEYWORD_ONLY and not keywords_only:
            keywords_only = True
            shown.append("*")
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        keywords_only |= p.kind == p.VAR_POSITIONAL
        if p.default is inspect.Parameter.empty:
            default = ""
        elif isinstance(p.default, int | float | str | bool | tuple | None):
            default = f"={p.default!r}"
        else:
            default = "=..."
        kind = type_text(p.annotation)
        if kind:
            default = f" = {default[1:]}" if default else ""
            kind = f": {kind}"
        shown.append(f"{star}{p.name}{kind}{default}")
    return f"({', '.join(shown)})"


class _Plain(ast.NodeTransformer):
    """`Annotated[float, Field(gt=0)]` as `float`."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.value, ast.Name) and node.value.id == "Annotated" and isinstance(node.slice, ast.Tuple):
            return node.slice.elts[0]
        return node


def type_text(annotation: object) -> str:
    """A type as people write it; nothing for none."""
    if annotation is inspect.Parameter.empty:
        return ""
    if not isinstance(annotation, str):
        return (
            annotation.__name__ if isinstance(annotation, type) else re.sub(r"\b(?:\w+\.)+(?=\w)", "", str(annotation))
        )
    return ast.unparse(_Plain().visit(ast.parse(annotation, mode="eval")))


def as_markdown(doc: str) -> str:
    """A docstring as Markdown: `<` and `|` outside code are text."""
    if "```" in doc:
        return doc
    lines = []
    for line in doc.split("\n"):
        if line.startswith("    "):  # a code block
            lines.append(line)
            continue
        parts = re.split(r"(`[^`]*`)", line)
        lines.append("".join(p if p.startswith("`") else p.replace("<", r"\<").replace("|", r"\|") for p in parts))
    return "\n".join(lines)


def entry(name: str) -> str:
    thing = getattr(phf, name)
    doc = inspect.getdoc(thing) or ""
    lines = [f"### {name}", "", f"`{name}{signature(thing)}`", ""]
    if not (dataclasses.is_dataclass(thing) and re.match(rf"{name}\(", doc)):
        lines += [as_markdown(doc), ""]
    if inspect.isclass(thing) and (docs := field_docs(thing)):
        lines += [*(f"- `{field}`: {as_markdown(text)}" for field, text in docs.items()), ""]
    return "\n".join(lines)


def public_names() -> list[tuple[str, str]]:
    """(module, name) in the order of `phf/__init__.pyi`."""
    stub = ast.parse(Path(phf.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    return [
        (f"phf.{node.module}", alias.name)
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]


def page() -> str:
    parts = [HEAD]
    for module, names in itertools.groupby(public_names(), key=lambda pair: pair[0]):
        parts.append(f"## {module}\n")
        parts += [entry(name) for _, name in names]
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(page(), encoding="utf-8")
