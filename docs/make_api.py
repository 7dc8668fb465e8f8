"""Writes docs/api.md from the docstrings of phf's public names: python docs/make_api.py"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
from pathlib import Path

import phf

HEAD = """# API

The public names of phf, from their docstrings (`python docs/make_api.py` writes this page). Everything else is an ordinary module
with a docstring at its top; `help(phf.NAME)` says the same.
"""


def signature(thing: object) -> str:
    """The parameters by name, with defaults; types are in the source."""
    try:
        parameters = inspect.signature(thing).parameters.values()  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""
    shown = []
    for p in parameters:
        plain = p.default is inspect.Parameter.empty or not isinstance(
            p.default, int | float | str | bool | tuple | None
        )
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        shown.append(
            f"{star}{p.name}"
            + ("" if plain and p.default is inspect.Parameter.empty else "=..." if plain else f"={p.default!r}")
        )
    return f"({', '.join(shown)})"


def fields(thing: type) -> dict[str, str]:
    """What is said behind each field of a class, its bases' first."""
    found: dict[str, str] = {}
    for cls in reversed([c for c in thing.__mro__ if c.__module__.startswith("phf")]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
        for field, behind in itertools.pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(behind, ast.Expr)
                and isinstance(behind.value, ast.Constant)
            ):
                found[ast.unparse(field.target)] = " ".join(str(behind.value.value).split())
    return found


def as_text(doc: str) -> str:
    return doc if "```" in doc else doc.replace("<", "&lt;").replace("|", "\\|")


def entry(name: str) -> str:
    thing = getattr(phf, name)
    doc = inspect.getdoc(thing) or ""
    lines = [f"### {name}", "", f"`{name}{signature(thing)}`", ""]
    if not (dataclasses.is_dataclass(thing) and re.match(rf"{name}\(", doc)):
        lines += [as_text(doc), ""]
    if inspect.isclass(thing) and (said := fields(thing)):
        lines += [*(f"- `{field}`: {as_text(text)}" for field, text in said.items()), ""]
    return "\n".join(lines)


def page() -> str:
    parts = [HEAD]
    for module, names in phf._PUBLIC.items():
        parts.append(f"## {module}\n")
        parts += [entry(name) for name in names]
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(page(), encoding="utf-8")
