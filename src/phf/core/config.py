"""Settings: YAML files merged left to right, then `a.b=c` overrides, then all of it checked at once.

    load(["recipes/pii.yaml", "my.yaml"], ["train.tokens=1e6"], Recipe)

YAML is read with the safe loader, as YAML 1.2: `1e-4` is a number, `no` and `48:00:00` are text. All mistakes are
reported together, each with its path and the place it came from; unknown names come with the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic
import yaml
from pydantic import ConfigDict
from pydantic.fields import FieldInfo

from phf.core.text import counted, first_line
from phf.core.types import PhfError

T = TypeVar("T")

Plain = dict[str, Any]
"""Settings as YAML and JSON hold them, before they are checked."""

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""For every settings dataclass: unknown keys, NaN and infinities are errors."""

RENAMED = {"during": "monitor"}
"""Settings that had another name in earlier versions."""


class ConfigError(PhfError, ValueError):
    """Settings that cannot be used. The message lists every problem with its path."""

    exit_code = 2


# YAML


MAX_NODES = 100_000
"""Values that a YAML file may hold, with those that its aliases repeat."""
MAX_NESTING = 50


class _Loader(yaml.SafeLoader):
    """The safe loader with the scalars of YAML 1.2: 1e-4 and 1E6 are numbers; only true and false are truth values;
    there are no dates and no numbers to the base 60. Duplicate keys are errors; keys are text."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys (<<) repeat what they refer to: bounded, else a few lines grow to gigabytes."""
        super().flatten_mapping(node)
        if len(node.value) > MAX_NODES // 10:
            raise yaml.constructor.ConstructorError(None, None, "merge keys make it too large", node.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


_OWN_SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("float", "int", "bool", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, rx) for tag, rx in resolvers if tag not in _OWN_SCALARS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:[0-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^[-+]?(?: [0-9][0-9_]*\.[0-9_]* | \.[0-9][0-9_]* | [0-9][0-9_]*(?=[eE]) ) (?:[eE][-+]?[0-9]+)?$
        | ^[-+]?\.(?:inf|Inf|INF)$ | ^\.(?:nan|NaN|NAN)$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str) -> Any:
    """The YAML value of `text`. Raises ConfigError with `where` and the line of a mistake."""
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 (a subclass of the safe loader)
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise ConfigError(f"{where}: not valid YAML: {_yaml_problem(error)}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply") from None
    _check_size(value, where)
    return value


def _yaml_problem(error: Exception) -> str:
    """What is wrong in a YAML text, and where."""
    problem = getattr(error, "problem", None)
    mark = getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return first_line(error)
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})"


def _check_size(value: Any, where: str) -> None:
    """Raise ConfigError for a value that nests too deeply, or that aliases make too large."""
    nodes = 0
    waiting = [(value, 0)]
    while waiting:
        part, depth = waiting.pop()
        nodes += 1
        if depth > MAX_NESTING:
            raise ConfigError(f"{where}: nested more than {MAX_NESTING} deep")
        if nodes > MAX_NODES:
            raise ConfigError(f"{where}: holds more than {MAX_NODES:,} values (aliases count where they are used)")
        if isinstance(part, dict | list):
            waiting += [(p, depth + 1) for p in (part.values() if isinstance(part, dict) else part)]


def read_yaml(path: str | Path) -> Plain:
    """Read a YAML file that holds a mapping. An empty file is an empty mapping. Raises ConfigError for any other
    file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
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


def dump_yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)


# Merging


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Plain:
    """Merge `over` into `base`, key by key; a value that is not a mapping replaces the old one.

    A mapping with another `name` replaces its base as a whole: the fields of one variant have no meaning in another.
    """
    if "name" in over and "name" in base and over["name"] != base["name"]:
        return dict(over)
    merged = dict(base)
    for key, value in over.items():
        old = _mapping(merged.get(key))
        new = _mapping(value)
        merged[key] = merge(old, new) if old is not None and new is not None else value
    return merged


def _mapping(value: Any) -> Mapping[str, Any] | None:
    """A value that is a mapping, perhaps as typed on the command line."""
    if isinstance(value, Typed):
        value = value.parsed if not isinstance(value.parsed, str) else {"name": value}  # objective=conditional
    return value if isinstance(value, Mapping) else None


class Typed(str):
    """A value of the command line as it was typed. A setting that is text takes it as it stands; any other takes it as
    YAML, `parsed`. `error`: why it is not valid YAML."""

    parsed: Any
    error: ConfigError | None

    def __new__(cls, text: str, where: str) -> Typed:
        made = super().__new__(cls, text)
        made.error = None
        try:
            made.parsed = parse_yaml(text, where)
        except ConfigError as error:
            made.parsed = None
            made.error = error
        return made

    def as_yaml(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.parsed


def untyped(value: Any, types_: Sequence[Any] = (Any,)) -> Any:
    """`value` with what was typed on the command line as text or as YAML, as the settings at its place need it.
    `types_`: the types that the value may have."""
    options = [o for t in types_ for o in _options(t)]
    if isinstance(value, Typed):
        if str in options and not any(o in (float, int, bool, dict, list, tuple) for o in map(_plain_type, options)):
            return None if type(None) in options and value in ("null", "~", "") else str(value)
        choices = {c for o in options if typing.get_origin(o) is Literal for c in typing.get_args(o)}
        if value in choices:
            return str(value)
        if any(dataclasses.is_dataclass(o) and _has_tag(o, str(value)) for o in options):  # objective=conditional
            return {"name": str(value)}
        parsed = value.as_yaml()
        lists = {_plain_type(o) for o in options} & {list, tuple}
        if lists and isinstance(parsed, str | int | float) and all(_plain_type(o) in (list, tuple) for o in options):
            parsed = [Typed(part, f"override {part!r}") for part in str(value).split(",")]  # report_to=tensorboard
        return untyped(parsed, types_)
    if isinstance(value, Mapping):
        return {key: untyped(part, _types_of(options, value, key)) for key, part in value.items()}
    if isinstance(value, list):
        inner = [a for o in options if _plain_type(o) in (list, tuple) for a in typing.get_args(o) if a is not Ellipsis]
        return [untyped(part, inner or (Any,)) for part in value]
    kinds = set(map(_plain_type, options))
    if isinstance(value, bool) and kinds & {int, float} and not kinds & {bool, str, Any}:
        return str(value).lower()  # not a number, as it would be in Python
    return value


def _plain_type(option: Any) -> Any:
    return typing.get_origin(option) or option


def _types_of(options: Sequence[Any], value: Mapping[str, Any], key: str) -> Sequence[Any]:
    """The types that the setting `key` of `value` may have."""
    classes = [o for o in options if dataclasses.is_dataclass(o)]
    named = [o for o in classes if _has_tag(o, str(value.get("name")))]
    hints = [typing.get_type_hints(o, include_extras=True) for o in named or classes]
    found = [of_class[key] for of_class in hints if key in of_class]
    found += [typing.get_args(o)[-1] for o in options if typing.get_origin(o) is dict]
    return found or (Any,)


def is_setting(argument: str) -> bool:
    """Whether an argument of a command is a setting, a.b=c. The path of a file or folder may hold "=" after a "/"."""
    key, sep, _ = argument.partition("=")
    return bool(sep) and "/" not in key


def parse_override(text: str) -> Plain:
    """`train.lr=1e-3` as nested mappings. The value is `Typed`."""
    path, sep, value = text.partition("=")
    keys = path.strip().split(".")
    if not sep or not all(keys):
        raise ConfigError(f"override {text!r}: expected a.b=value, for example train.lr=1e-3")
    nested: Any = Typed(value, f"override {text!r}")
    for key in reversed(keys):
        nested = {key: nested}
    return typing.cast(Plain, nested)


def apply_overrides(config: Mapping[str, Any], overrides: Iterable[str]) -> Plain:
    """`config` with `a.b=c` overrides merged in, from left to right."""
    merged = dict(config)
    for override in overrides:
        merged = merge(merged, parse_override(override))
    return merged


# Checking


def _options(type_: Any) -> list[Any]:
    """The types in a union or an annotated type."""
    if typing.get_origin(type_) is typing.Annotated:
        return _options(typing.get_args(type_)[0])
    if typing.get_origin(type_) in (typing.Union, types.UnionType):
        return [option for arg in typing.get_args(type_) for option in _options(arg)]
    return [type_]


def _has_tag(option: Any, tag: Any) -> bool:
    """Whether a settings dataclass is the member of its union that is called `tag`."""
    return dataclasses.is_dataclass(option) and any(
        f.name == "name" and f.default == tag for f in dataclasses.fields(option)
    )


def _types_at(type_: Any, loc: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """The types that pydantic's error location `loc` leads to from `type_`, and its path without the tags of unions."""
    found = [type_]
    path = []
    for step in loc:
        inner: list[Any] = []
        tagged: list[Any] = []
        for option in (o for candidate in found for o in _options(candidate)):
            if dataclasses.is_dataclass(option) and isinstance(step, str):
                hints = typing.get_type_hints(option, include_extras=True)
                if step in hints:
                    inner.append(hints[step])
                elif _has_tag(option, step):
                    tagged.append(option)
            elif typing.get_origin(option) in (dict, list, tuple):
                inner += [arg for arg in typing.get_args(option) if arg is not Ellipsis][-1:]
        options = [option for candidate in found for option in _options(candidate)]
        holds = any(dataclasses.is_dataclass(o) or typing.get_origin(o) in (dict, list, tuple) for o in options)
        if holds and (inner or not tagged):  # else the step is the label of a union's member
            path.append(str(step))
        found = inner or tagged
    return found, path


def _union_title(types_: Iterable[Any]) -> str:
    """What the members of a tagged union are: "objective", "scorer". "name" if the union does not say."""
    for type_ in types_:
        for extra in getattr(type_, "__metadata__", ()):
            if isinstance(extra, FieldInfo) and extra.title:
                return extra.title
    return "name"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' if a known word is near, else the list of known words if it is short."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    if near:
        return f" (did you mean {near[0]!r}?)"
    return f" (known: {', '.join(known)})" if 0 < len(known) <= 30 else ""


def _expected(kind: str, limits: Mapping[str, Any]) -> str | None:
    """What pydantic's kind of error asks for, in the words of a user; None if pydantic's own message says it."""
    if kind.startswith(("float_", "decimal_")):
        return "a number"
    if kind.startswith("int_"):
        return "a whole number"
    if kind.startswith("bool_"):
        return "true or false"
    if kind == "string_type":
        return "text"
    if kind == "finite_number":
        return "a finite number"
    if kind in ("tuple_type", "list_type"):
        return "a list, in brackets ([one, another])"
    if kind in ("dict_type", "mapping_type", "model_type", "model_attributes_type", "dataclass_type"):
        return "settings, as a mapping ({name: value}) or with a dot (a.b=value)"
    for comparison, words in (("gt", "more than"), ("ge", "at least"), ("lt", "less than"), ("le", "at most")):
        if comparison in limits:
            return f"{words} {limits[comparison]:g}"
    if kind in ("too_short", "too_long"):
        least = kind == "too_short"
        return f"at {'least' if least else 'most'} {counted(limits['min_length' if least else 'max_length'], 'value')}"
    return None


def _problem(error: Any, type_: Any) -> tuple[list[str], str]:
    """(path, message) of one of pydantic's errors."""
    loc = tuple(error["loc"])
    kind = error["type"]
    given = error["input"]
    found, path = _types_at(type_, loc)
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        parents, path = _types_at(type_, loc[:-1])
        key = str(loc[-1])
        known = {
            f.name for t in parents for o in _options(t) if dataclasses.is_dataclass(o) for f in dataclasses.fields(o)
        }
        renamed = RENAMED.get(key)
        hint = f" (renamed to {renamed!r})" if renamed in known else did_you_mean(key, known)
        within = [name for name in sorted(known) if key in _fields_of(type_, (*loc[:-1], name))]
        if "did you mean" not in hint and within:
            hint = f" (did you mean {' or '.join(f'{name}.{key}' for name in within)}?)"
        return [*path, key], f"unknown key{hint}"
    members = [
        f.default
        for t in found
        for o in _options(t)
        if dataclasses.is_dataclass(o)
        for f in dataclasses.fields(o)
        if f.name == "name"
    ]
    which = f"which {_union_title(found)}? give a name: {', '.join(map(str, members))}"
    if kind in ("missing", "missing_argument"):
        return path, _missing(path, found, list(map(str, members)))
    if kind == "union_tag_not_found" or (kind == "union_tag_invalid" and error["ctx"]["tag"] == "None"):
        return path, which
    if kind == "union_tag_invalid":
        tags = re.findall(r"'([^']*)'", error["ctx"]["expected_tags"])
        tag = str(error["ctx"]["tag"])
        return [*path, "name"], f"unknown {_union_title(found)} {tag!r}{did_you_mean(tag, tags)}"
    if kind == "literal_error":
        values = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        near = difflib.get_close_matches(str(given), values, n=1)
        wanted = error["ctx"]["expected"]
        return path, f"expected {wanted}, got {_short(given)}" + (f" (did you mean {near[0]!r}?)" if near else "")
    wanted = _expected(kind, error.get("ctx", {}))
    near = difflib.get_close_matches(str(given), map(str, members), n=1)
    if len(members) > 1 and isinstance(given, str) and given not in members and near:
        return path, f"unknown {_union_title(found)} {given!r}{did_you_mean(given, map(str, members))}"
    if len(members) > 1 and wanted is not None and wanted.startswith("settings"):
        example = given if given in members else members[0]
        in_list = not path or path[-1].isdigit()
        wanted = "settings, such as " + (f"{{name: {example}}}" if in_list else f"{'.'.join(path)}.name={example}")
    if wanted is not None:
        return path, f"expected {wanted}, got {_short(given)}"
    message = error["msg"].removeprefix("Value error, ")
    return path, message if isinstance(given, Mapping) else f"{message}, got {_short(given)}"


def _missing(path: Sequence[str], types_: Sequence[Any], members: Sequence[str]) -> str:
    """What to give for a setting that is missing."""
    examples = next(
        (e.examples for t in types_ for e in getattr(t, "__metadata__", ()) if getattr(e, "examples", 0)), None
    )
    if len(members) > 1:
        return f"missing: give a name, {', '.join(map(str, examples or members))}"
    needed = [
        f"{'.'.join(path)}.{f.name}"
        for t in types_
        if dataclasses.is_dataclass(t)
        for f in dataclasses.fields(t)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    return f"missing: give {' and '.join(needed)}" if needed else "missing"


def _fields_of(type_: Any, loc: tuple[Any, ...]) -> set[str]:
    """Names of the settings at a place."""
    found, _ = _types_at(type_, loc)
    return {f.name for t in found for o in _options(t) if dataclasses.is_dataclass(o) for f in dataclasses.fields(o)}


Problem = tuple[list[str], str]
"""Something that is wrong with settings: (path, message)."""


def check(value: Any, type_: Any) -> tuple[Any, list[Problem]]:
    """Plain YAML data as a `type_`, and what is wrong with it. With a problem the first is None."""
    value = untyped(value, (type_,))
    try:
        return pydantic.TypeAdapter(type_).validate_python(value), []
    except pydantic.ValidationError as error:
        errors = error.errors(include_url=False)
        inside = {tuple(e["loc"][:n]) for e in errors for n in range(len(e["loc"]))}
        # a list with a bad member counts as too short
        found = [_problem(e, type_) for e in errors if e["type"] != "too_short" or tuple(e["loc"]) not in inside]
        return None, _alternatives(found)


def _alternatives(found: Sequence[Problem]) -> list[Problem]:
    """Problems of the members of a union as one: "expected true or false, or 'auto', got 'maybe'"."""
    merged: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for path, message in found:
        wanted, got, rest = message.rpartition(", got ")
        end = got + rest if wanted.startswith("expected ") else ""
        merged.setdefault((tuple(path), end), []).append(wanted if end else message)
    problems: list[Problem] = []
    for (place, end), texts in merged.items():
        if end:
            texts = [", or ".join([texts[0], *(t.removeprefix("expected ") for t in texts[1:])]) + end]
        problems += [(list(place), text) for text in texts]
    return problems


COMMAND_LINE = "the command line"


def validate(
    value: Any,
    type_: type[T] | Any,
    where: str = "recipe",
    *,
    prefix: str = "",
    before: Mapping[str, Any] | None = None,
) -> T:
    """Plain YAML data as a `type_`.

    `where`: the place that `value` comes from. `prefix`: the setting that `value` is; paths start with it. `before`:
    `value` before settings of the command line were merged into it. What is wrong only with them is reported under the
    command line. A problem of a whole that had other problems before may come from both. Raises ConfigError that lists
    every problem with its path.
    """
    found, problems = check(value, type_)
    if not problems:
        return typing.cast(T, found)
    earlier = None if before is None else check(before, type_)[1]
    lines: dict[str, list[str]] = {}
    for path, message in problems:
        if earlier is None or (path, message) in earlier:
            place = where
        elif where == COMMAND_LINE or not any(other[: len(path)] == path for other, _ in earlier):
            place = COMMAND_LINE
        else:  # an earlier problem hid what else was wrong there
            place = f"{where} with {COMMAND_LINE}"
        setting = ".".join([*([prefix] if prefix else []), *path])
        lines.setdefault(place, []).append(f"{setting}: {message}" if setting else message)
    raise ConfigError(
        "\n".join(
            f"{place}: {of_place[0]}"
            if len(of_place) == 1
            else f"{place} has {len(of_place)} problems:" + "".join(f"\n  {line}" for line in of_place)
            for place, of_place in lines.items()
        )
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def load(
    files: Iterable[str | Path], overrides: Iterable[str], type_: type[T], base: Mapping[str, Any] | None = None
) -> T:
    """Merge recipe files left to right into `base`, then the overrides, and check the result as a `type_`."""
    value: Plain = dict(base or {})
    names = [str(file) for file in files]
    for name in names:
        value = merge(value, read_yaml(name))
    return validate(apply_overrides(value, overrides), type_, " + ".join(names) or COMMAND_LINE, before=value)


def to_plain(config: Any) -> Any:
    """A settings dataclass as plain data, for YAML, JSON and fingerprints."""
    return pydantic.TypeAdapter(type(config)).dump_python(config, mode="json")
