"""What the source says about settings: docstrings of fields, and types in words."""

from __future__ import annotations

import ast
import dataclasses
import datetime
import inspect
import itertools
import textwrap
import types
import typing
from typing import Any, Literal

WORDS = {
    datetime.date: "a date",
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


def field_docs(thing: type) -> dict[str, str]:
    """The docstring after each field of a class and its bases, by field."""
    found: dict[str, str] = {}
    for cls in reversed([c for c in thing.__mro__ if c.__module__.startswith("phf")]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
        for field, after in itertools.pairwise(body):
            is_docstring = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and is_docstring:
                found[ast.unparse(field.target)] = " ".join(str(after.value.value).split())
    return found


def type_text(hint: Any) -> str:
    """A type as a user reads it: "a number", "linear, cosine or wsd", "a list of text"."""
    origin = typing.get_origin(hint)
    inner = typing.get_args(hint)
    if origin is typing.Annotated:
        return type_text(inner[0])
    if origin is Literal:
        return " or ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in inner)
    if origin in (typing.Union, types.UnionType) and len(tags := [tag for part in inner if (tag := tag_of(part))]) > 1:
        rest = [part for part in inner if not tag_of(part)]
        return " or ".join(["one of " + ", ".join(tags), *map(type_text, rest)])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_text(part) for part in inner))
    if origin in (list, tuple):
        parts = [part for part in inner if part is not Ellipsis]
        if len(parts) > 1:
            return f"a list of {len(parts)} values"
        return f"a list of {type_text(parts[0])}" if parts else "a list"
    if origin is dict or hint is dict:
        return "a mapping"
    if dataclasses.is_dataclass(hint):
        tag = tag_of(hint)
        return f"name: {tag}" if tag else "settings"
    return WORDS.get(hint, "a value")


def tag_of(hint: Any) -> str | None:
    """The name of a class of settings among others."""
    if not dataclasses.is_dataclass(hint):
        return None
    return next((f.default for f in dataclasses.fields(hint) if f.name == "name" and isinstance(f.default, str)), None)
