"""What Tab completes: names and settings. Nothing is imported before a shell asks."""

from __future__ import annotations

import os
from collections.abc import Iterable


def kinds(incomplete: str) -> list[str]:
    from phf.cli.places import KINDS

    return _fitting(KINDS, incomplete)


def scorers(incomplete: str) -> list[str]:
    return _members("scorer", incomplete)


def segmenters(incomplete: str) -> list[str]:
    return _members("segmenter", incomplete)


def help_words(incomplete: str) -> list[str]:
    """Places of settings, and after a dot what is there."""
    from phf.cli.places import PLACES, members_of

    place, dot, _ = incomplete.partition(".")
    if not dot:
        return _fitting(PLACES, incomplete)
    return _fitting([f"{place}.{name}" for name in (*members_of(place), *_fields(place))], incomplete)


def recipes(incomplete: str) -> list[str]:
    """Recipes of phf, and their settings. Files are the shell's business."""
    from phf.recipes.recipe import packaged

    named = _fitting(packaged(), incomplete)
    return named or _settings(incomplete, "recipe")


def stage(incomplete: str) -> list[str]:
    """Settings of a training stage."""
    return _settings(incomplete, None)


def scenario(incomplete: str) -> list[str]:
    """Settings of samples."""
    return _settings(incomplete, "scenario")


def attack(incomplete: str) -> list[str]:
    """Settings of red-teaming."""
    return _settings(incomplete, "redteam")


def _settings(incomplete: str, own: str | None) -> list[str]:
    """Settings a.b=c. `own`: the place whose settings need no first part."""
    from phf.cli.places import PLACES, members_of

    before, incomplete = _after_equals(incomplete)
    name, equals, value = (before, "=", incomplete) if before else incomplete.partition("=")
    if equals:
        place = name.removesuffix(".name")
        found = _fitting(members_of(place) if place in PLACES else (), value)
        return found if before else [f"{name}={member}" for member in found]
    place, dot, _ = incomplete.partition(".")
    if dot:
        return _fitting([f"{place}.{field}=" for field in _fields(place)], incomplete)
    whole = [f"{place}=" if len(members_of(place)) > 1 else f"{place}." for place in PLACES if place != own]
    return _fitting([*whole, *(f"{field}=" for field in (_fields(own) if own else ()))], incomplete)


def _after_equals(incomplete: str) -> tuple[str, str]:
    """(name, value) where bash has cut "name=value" into three words; ("", incomplete) elsewhere."""
    words = os.environ.get("COMP_WORDS", "").split()
    number = int(os.environ.get("COMP_CWORD") or 0)
    if incomplete == "" and 0 < number < len(words) and words[number] == "=":
        return words[number - 1], ""
    if 1 < number <= len(words) and words[number - 1] == "=":
        return words[number - 2], incomplete
    return "", incomplete


def _members(place: str, incomplete: str) -> list[str]:
    from phf.cli.places import members_of

    return _fitting(members_of(place), incomplete)


def _fields(place: str) -> list[str]:
    """Names of the settings at a place."""
    import dataclasses

    from phf.cli.places import PLACES, classes_at

    if place not in PLACES:
        return []
    names = (field.name for cls in classes_at(place) for field in dataclasses.fields(cls))
    return [name for name in dict.fromkeys(names) if name != "name"]


def _fitting(words: Iterable[str], incomplete: str) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]
