"""Commands that say what there is: names to choose from, and what a setting means."""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
import textwrap
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import typer

from phf.cli.completing import help_words, kinds
from phf.cli.places import (
    KINDS,
    PLACES,
    classes_at,
    classes_of,
    described,
    first_sentence,
    members_of,
    sentences,
)
from phf.core.docs import tag_of


def ls(
    kind: Annotated[
        str | None,
        typer.Argument(metavar="[KIND]", help=f"{', '.join(KINDS)}. Default: all of them.", autocompletion=kinds),
    ] = None,
) -> None:
    """List the names that settings take.

    Of scorers, objectives, recipes and so on.
    """
    from phf.core.config import ConfigError, did_you_mean

    kind = next((k for k in KINDS if kind in (k, _one_of(k))), kind)
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"unknown kind {kind!r}{did_you_mean(kind, KINDS)}")
    indent = "" if kind else "  "
    cut = False
    for one in (kind,) if kind else KINDS:
        if not kind:
            print(f"{one}:")
        rows = list(_recipes() if one == "recipes" else described(one))
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            shown = textwrap.shorten(text, 78 - width - len(indent), placeholder=" ...")
            cut |= shown != text
            print(indent + name.ljust(width + 2) + shown)
    if cut:
        example = {"recipes": "recipe.demo", "models": "model"}.get(kind or "", f"{_one_of(kind or 'objectives')}.NAME")
        print(f"phf help {example} says all", file=sys.stderr)


def _recipes() -> Iterator[tuple[str, str]]:
    from phf.recipes.recipe import packaged

    for name, file in packaged().items():
        lines = file.read_text().splitlines()
        title = next((line for line in lines if line.startswith("title:")), lines[0])
        yield name, title.removeprefix("title:").strip("# ")


def explain(
    context: typer.Context,
    setting: Annotated[
        str | None,
        typer.Argument(
            help="For example train.lr, objective.conditional, scenario.top_p or the name of a scorer. Default: where "
            "settings are.",
            autocompletion=help_words,
        ),
    ] = None,
) -> None:
    """Explain a setting: what it means, its type and its default."""
    from phf.core.config import ConfigError

    if setting is None:
        print("phf help PLACE, PLACE.SETTING or PLACE.NAME explains settings. Places:")
        for place in PLACES:
            classes = classes_at(place)
            about = ", ".join(tag_of(cls) or "" for cls in classes) if len(classes) > 1 else first_sentence(classes[0])
            print("  " + place.ljust(12) + textwrap.shorten(about, 66, placeholder=" ..."))
        return
    commands: Iterable[str] = getattr(context.parent.command, "commands", ()) if context.parent else ()
    first, *path = setting.split("=")[0].split(".")
    first = _one_of(first if first in KINDS else first.lower() if first.lower() in PLACES else first)
    if first == "recipe" and len(path) == 1 and _explain_recipe(path[0]):
        if path[0] not in {f.name for cls in classes_at("recipe") for f in dataclasses.fields(cls)}:
            return
        print(f"{setting} is a setting too:")
    if first not in PLACES:
        named = [place for place in PLACES if first in members_of(place)]
        if not named and not path and _explain_recipe(first):
            return
        if not named:
            raise ConfigError(f"unknown setting {first!r}{_where(first, commands)}")
        named_models = dict(described("models"))
        for place in named:
            if place == "model" and first in named_models:
                print(f"model.{first}: {named_models[first]}")
            else:
                _explain(place, [first, *path])
        return
    models = dict(described("models")) if first == "model" else {}
    if len(path) == 1 and path[0] in models:
        print(f"model.{path[0]}: {models[path[0]]}")
        return
    _explain(first, path)


def _one_of(kind: str) -> str:
    """The place of a kind of settings that is called as `phf ls` calls it."""
    singular = {"readers": "corpus", "reader": "corpus", "capabilities": "capability", "recipes": "recipe"}
    return singular.get(kind, kind.removesuffix("s") if kind in KINDS else kind)


def _where(name: str, commands: Iterable[str]) -> str:
    """A hint for an unknown first part of a setting: where settings or names like it are."""
    from phf.core.config import did_you_mean

    if name in commands:
        return f"; phf {name} --help explains this command"
    named_so = [
        f"{place}.{name}"
        for place in PLACES
        if any(f.name == name for cls in classes_at(place) for f in dataclasses.fields(cls))
    ]
    if named_so:
        return f" (did you mean {' or '.join(named_so)}?)"
    return did_you_mean(name, [*PLACES, *(member for place in PLACES for member in members_of(place))])


def _explain_recipe(name: str) -> bool:
    """Print what a recipe of phf says about itself, if there is one of this name."""
    from phf.recipes.recipe import packaged

    file = packaged().get(name)
    if file is None:
        return False
    head = itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
    print(textwrap.fill(" ".join(line.strip("# ") for line in head), 80))
    print(f"  settings: {file}")
    return True


def _explain(first: str, path: Sequence[str]) -> None:
    from phf.core.config import ConfigError, did_you_mean

    classes = classes_at(first)
    shown = first
    found: list[tuple[type, Any]] = []
    for part in path:
        found = [(cls, f) for cls in classes for f in dataclasses.fields(cls) if f.name == part]
        named = [cls for cls in classes if tag_of(cls) == part]
        if not found and not named:
            known = {f.name for cls in classes for f in dataclasses.fields(cls)} | {
                tag_of(cls) or "" for cls in classes
            }
            raise ConfigError(f"{shown} has no setting {part!r}{did_you_mean(part, known - {''})}")
        shown += f".{part}"
        classes = named or [c for cls, f in found for c in classes_of(typing.get_type_hints(cls)[f.name])]
        found = [] if named else found
    for cls, field in _different(found):
        _print_field(shown, cls, field)
    if len(classes) == 1 and not found:
        _print_class(shown, classes[0])
        return
    for cls in classes:
        names = ", ".join(f.name for f in dataclasses.fields(cls) if f.name != "name")
        print(f"{tag_of(cls) or shown}: {first_sentence(cls)}.\n  settings: {names or 'none'}")


def _print_class(shown: str, cls: type) -> None:
    """Everything about one class of settings."""
    print(f"{shown}:")
    for paragraph in re.split(r"\n\s*\n", (cls.__doc__ or "").strip()):
        print(textwrap.fill(" ".join(paragraph.split()), 80, initial_indent="  ", subsequent_indent="  "))
    for field in dataclasses.fields(cls):
        if field.name != "name":
            _print_field(field.name, cls, field, whole=False)


def _different(found: list[tuple[type, Any]]) -> list[tuple[type, Any]]:
    """Of the classes that share a setting, the first one with each default."""
    seen: dict[str, tuple[type, Any]] = {}
    for cls, field in found:
        seen.setdefault(repr(field.default), (cls, field))
    return list(seen.values())


def _print_field(path: str, cls: type, field: Any, whole: bool = True) -> None:
    """What a setting means. `whole`: with its class, and with the sentences of the class's text that name it."""
    from phf.core.docs import field_docs, type_text

    hint = typing.get_type_hints(cls, include_extras=True)[field.name]
    default = _default(field)
    given = "must be given" if default is None else f"default: {default}"
    text = field_docs(cls).get(field.name, "")
    if not whole:
        print(textwrap.fill(f"{path} ({type_text(hint)}; {given})", 80, subsequent_indent="  "))
    else:
        print(f"{path} ({tag_of(cls) or cls.__name__}): {type_text(hint)}")
        text = text or ". ".join(s for c in cls.__mro__ for s in sentences(c) if f"`{field.name}`" in s) + "."
    if text:
        print(textwrap.fill(text, 78, initial_indent="  ", subsequent_indent="  "))
    if whole:
        print(f"  {given}")


def _default(field: Any) -> str | None:
    """The default of a field as YAML; None: it has none."""
    import yaml
    from pydantic.fields import FieldInfo
    from pydantic_core import PydanticUndefined, to_jsonable_python

    default: Any = field.default
    factory: Any = field.default_factory
    if isinstance(default, FieldInfo):
        default, factory = default.default, default.default_factory
    if default is dataclasses.MISSING or default is PydanticUndefined:
        if factory in (dataclasses.MISSING, None):
            return None
        default = factory()
    if isinstance(default, float):
        return f"{default:g}"
    text = yaml.safe_dump(to_jsonable_python(default), default_flow_style=True, width=10**6)
    return str(text).removesuffix("\n").removesuffix("...").strip()
