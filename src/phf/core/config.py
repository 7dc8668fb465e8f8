"""Recipes: YAML files merged left to right, then `a.b=c` overrides, then checked all at once. Floor 0.

    load(["recipes/pii.yaml", "my.yaml"], ["train.tokens=1e6"], Recipe)

YAML is read with the safe loader; numbers in YAML 1.1's blind spot ("1e-4" without a dot is a string there) are read
as numbers. Every mistake is reported in one error with its path, unknown keys with the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml
from pydantic import ConfigDict

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""Settings of every config dataclass: unknown keys are errors, so are NaN and infinities."""


class ConfigError(ValueError):
    """A recipe that cannot be used. The message lists every problem with its path."""


class _Loader(yaml.SafeLoader):
    """The safe loader, with YAML 1.2's floats: 1e-4 and 1E6 are numbers. Duplicate keys are errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rx) for tag, rx in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str) -> Any:
    """The YAML value of `text`; a mistake in it is a ConfigError that names `where` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a subclass of the safe loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that must hold a mapping (an empty file is an empty one)."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read recipe {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    value = parse_yaml(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"recipe {path} must hold a mapping (key: value lines), not a {type(value).__name__}")
    return value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`: mappings merge key by key, anything else replaces.

    A mapping whose `name` changes replaces its base whole: the fields of one variant make no sense in another.
    """
    if "name" in over and "name" in base and over["name"] != base["name"]:
        return dict(over)
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """`train.lr=1e-3` as nested mappings. The value is YAML."""
    path, sep, value = text.partition("=")
    keys = path.strip().split(".")
    if not sep or not all(keys):
        raise ConfigError(f"override {text!r}: expected a.b=value, for example train.lr=1e-3")
    nested: Any = parse_yaml(value, f"override {text!r}")
    for key in reversed(keys):
        nested = {key: nested}
    return typing.cast(dict[str, Any], nested)


def _known_fields(type_: Any, loc: tuple[Any, ...]) -> list[str]:
    """Field names of the config class found by walking `loc` (names, list indices and union tags) from `type_`."""
    candidates = [type_]
    for step in loc:
        following: list[Any] = []
        for candidate in candidates:
            for option in _unwrap(candidate):
                if dataclasses.is_dataclass(option) and isinstance(step, str):
                    hints = typing.get_type_hints(option, include_extras=True)
                    if step in hints:
                        following.append(hints[step])
                    elif any(
                        step == getattr(f, "default", None) for f in dataclasses.fields(option) if f.name == "name"
                    ):
                        following.append(option)
                elif typing.get_origin(option) in (dict, list, tuple):
                    following.extend(a for a in typing.get_args(option)[-1:] if a is not Ellipsis)
        candidates = following
    return sorted(
        {f.name for c in candidates for o in _unwrap(c) if dataclasses.is_dataclass(o) for f in dataclasses.fields(o)}
    )


def _unwrap(type_: Any) -> list[Any]:
    """The alternatives behind Annotated and unions."""
    if typing.get_origin(type_) is typing.Annotated:
        return _unwrap(typing.get_args(type_)[0])
    if typing.get_origin(type_) in (typing.Union, __import__("types").UnionType):
        return [o for a in typing.get_args(type_) for o in _unwrap(a)]
    return [type_]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' where a known word is near, else the list of what is known, if it is short."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    if near:
        return f" (did you mean {near[0]!r}?)"
    return f" (known: {', '.join(known)})" if 0 < len(known) <= 30 else ""


def validate(value: Any, type_: type[T] | Any, where: str = "recipe") -> T:
    """`value` (plain YAML data) as a `type_`. Raises ConfigError listing every problem with its path."""
    try:
        return typing.cast(T, pydantic.TypeAdapter(type_).validate_python(value))
    except pydantic.ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            path = ".".join(str(p) for p in problem["loc"]) or "(top)"
            if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                *parent, key = problem["loc"]
                hint = did_you_mean(str(key), _known_fields(type_, tuple(parent)))
                lines.append(f"  {path}: unknown key{hint}")
            elif problem["type"] in ("missing", "missing_argument"):
                lines.append(f"  {path}: missing")
            elif problem["type"] in ("tuple_type", "list_type"):
                lines.append(f"  {path}: expected a list, in brackets ([one, another]), got {_short(problem['input'])}")
            else:
                lines.append(f"  {path}: {problem['msg']}, got {_short(problem['input'])}")
        raise ConfigError(f"{where} has {len(lines)} problem{'s' * (len(lines) > 1)}:\n" + "\n".join(lines)) from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def load(
    files: Iterable[str | Path], overrides: Iterable[str], type_: type[T], base: Mapping[str, Any] | None = None
) -> T:
    """Recipe files merged left to right over `base`, then overrides, validated as `type_`."""
    value: dict[str, Any] = dict(base or {})
    names = []
    for file in files:
        value = merge(value, read_yaml(file))
        names.append(str(file))
    for override in overrides:
        value = merge(value, parse_override(override))
    return validate(value, type_, " + ".join(names) or "recipe")


def to_plain(config: Any) -> Any:
    """A config dataclass as plain data, for YAML, JSON and fingerprints."""
    return pydantic.TypeAdapter(type(config)).dump_python(config, mode="json")


def dump_yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)
