"""Commands that say what there is: names to choose from, and what a setting means."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
import textwrap
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import typer

UNIONS = {
    "scorers": "phf.scorers:AnyScorer",
    "objectives": "phf.objectives:AnyObjective",
    "readers": "phf.data.canaries:AnyCorpus",
    "segmenters": "phf.data.segment:AnySegmenter",
    "attackers": "phf.redteaming.attackers:AnyAttacker",
    "capabilities": "phf.evaluation.capabilities:AnyCapability",
    "models": "phf.training.lm:AnyModel",
}
"""Module and name of each kind's type, which is imported when it is asked for."""
KINDS = (*UNIONS, "recipes")
PLACES = {
    "train": "phf.training.config:TrainConfig",
    "model": UNIONS["models"],
    "objective": UNIONS["objectives"],
    "scorer": UNIONS["scorers"],
    "segmenter": UNIONS["segmenters"],
    "corpus": UNIONS["readers"],
    "scenario": "phf.generation.scenario:Scenario",
    "monitor": "phf.evaluation.monitor:Monitor",
    "kl": "phf.evaluation.kl:KL",
    "redteam": "phf.redteaming.config:RedTeam",
    "recipe": "phf.recipes.recipe:Recipe",
}
"""The types of the settings that commands take, by their first name."""


def ls(
    kind: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help=f"{', '.join(KINDS)}. Default: all of them.")
    ] = None,
) -> None:
    """List the names that settings take.

    Of scorers, objectives, recipes and so on.
    """
    from phf.core.config import ConfigError, did_you_mean

    if kind is not None and kind not in KINDS:
        raise ConfigError(f"unknown kind {kind!r}{did_you_mean(kind, KINDS)}")
    indent = "" if kind else "  "
    cut = False
    for one in (kind,) if kind else KINDS:
        if not kind:
            print(f"{one}:")
        rows = list(_recipes() if one == "recipes" else _members_of(one))
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            shown = textwrap.shorten(text, 78 - width - len(indent), placeholder=" ...")
            cut |= shown != text
            print(indent + name.ljust(width + 2) + shown)
    if cut:
        print("phf help KIND.NAME says all, for example: phf help objective.conditional", file=sys.stderr)


def _imported(name: str) -> Any:
    """What "module:name" names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _members_of(kind: str) -> Iterator[tuple[str, str]]:
    """(name, first sentence about it) of the members of a kind of settings."""
    if kind == "models":
        from phf.training.lm import MODELS

        for name, settings in MODELS.items():
            sizes = "its usual sizes"
            if "hidden_size" in settings:
                sizes = f"{settings['num_hidden_layers']} layers of width {settings['hidden_size']}"
            yield name, f"A model from scratch: {settings['model_type']}, {sizes}."
    for cls in _classes(_imported(UNIONS[kind])):
        yield str(_tag(cls)), _first_sentence(cls)


def _recipes() -> Iterator[tuple[str, str]]:
    from phf.recipes.recipe import packaged

    for name, file in packaged().items():
        lines = file.read_text().splitlines()
        title = next((line for line in lines if line.startswith("title:")), lines[0])
        yield name, title.removeprefix("title:").strip("# ")


def explain(
    setting: Annotated[str, typer.Argument(help="For example train.lr, objective.conditional.drop or scenario.top_p.")],
) -> None:
    """Explain a setting: what it means, its type and its default."""
    from phf.core.config import ConfigError, did_you_mean

    first, *path = setting.split("=")[0].split(".")
    if first not in PLACES:
        named_so = [
            f"{place}.{first}"
            for place in PLACES
            if any(f.name == first for cls in _classes(_imported(PLACES[place])) for f in dataclasses.fields(cls))
        ]
        hint = f" (did you mean {' or '.join(named_so)}?)" if named_so else did_you_mean(first, PLACES)
        raise ConfigError(f"unknown setting {first!r}{hint}")
    classes = _classes(_imported(PLACES[first]))
    shown = first
    found: list[tuple[type, Any]] = []
    for part in path:
        found = [(cls, f) for cls in classes for f in dataclasses.fields(cls) if f.name == part]
        named = [cls for cls in classes if _tag(cls) == part]
        if not found and not named:
            known = {f.name for cls in classes for f in dataclasses.fields(cls)} | {_tag(cls) or "" for cls in classes}
            raise ConfigError(f"{shown} has no setting {part!r}{did_you_mean(part, known - {''})}")
        shown += f".{part}"
        classes = named or [c for cls, f in found for c in _classes(typing.get_type_hints(cls)[f.name])]
        found = [] if named else found
    for cls, field in _different(found):
        _print_field(shown, cls, field)
    for cls in classes:
        names = ", ".join(f.name for f in dataclasses.fields(cls) if f.name != "name")
        print(f"{_tag(cls) or shown}: {_first_sentence(cls)}.\n  settings: {names or 'none'}")


def _classes(type_: Any) -> list[type]:
    """The settings classes that a type allows."""
    if dataclasses.is_dataclass(type_) and isinstance(type_, type):
        return [type_]
    return [cls for part in typing.get_args(type_) for cls in _classes(part)]


def _tag(cls: Any) -> str | None:
    return next((f.default for f in dataclasses.fields(cls) if f.name == "name" and isinstance(f.default, str)), None)


def _first_sentence(cls: type) -> str:
    return next(iter(_sentences(cls)), "")


def _sentences(cls: type) -> list[str]:
    """The sentences of a class's docstring, without their full stops."""
    text = " ".join((cls.__doc__ or "").split())
    return [part.rstrip(".") for part in re.split(r"(?<!al)\.\s+(?=[A-Z`])", text)]


def _different(found: list[tuple[type, Any]]) -> list[tuple[type, Any]]:
    """Of the classes that share a setting, the first one with each default."""
    seen: dict[str, tuple[type, Any]] = {}
    for cls, field in found:
        seen.setdefault(repr(field.default), (cls, field))
    return list(seen.values())


def _print_field(path: str, cls: type, field: Any) -> None:
    from pydantic.fields import FieldInfo

    from phf.core.docs import field_docs, type_text

    default = field.default.default if isinstance(field.default, FieldInfo) else field.default
    if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    given = default is not dataclasses.MISSING and "Undefined" not in repr(default)
    hint = typing.get_type_hints(cls, include_extras=True)[field.name]
    print(f"{path} ({_tag(cls) or cls.__name__}): {type_text(hint)}")
    said = [s for c in cls.__mro__ for s in _sentences(c) if f"`{field.name}`" in s] or [_first_sentence(cls)]
    text = field_docs(cls).get(field.name) or ". ".join(said) + "."
    print(textwrap.fill(text, 78, initial_indent="  ", subsequent_indent="  "))
    print(f"  default: {default if default != () else '[]'}" if given else "  must be given")
