"""The kinds of settings, and the places where commands take them."""

from __future__ import annotations

import dataclasses
import importlib
import re
import typing
from collections.abc import Iterator
from typing import Any

from phf.core.docs import tag_of

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
    "capability": UNIONS["capabilities"],
    "attacker": UNIONS["attackers"],
    "corpus": UNIONS["readers"],
    "scenario": "phf.generation.scenario:Scenario",
    "monitor": "phf.evaluation.monitor:Monitor",
    "kl": "phf.evaluation.kl:KL",
    "redteam": "phf.redteaming.config:RedTeam",
    "recipe": "phf.recipes.recipe:Recipe",
}
"""The types of the settings that commands take, by their first name."""


def imported(name: str) -> Any:
    """What "module:name" names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def classes_of(type_: Any) -> list[type]:
    """The settings classes that a type allows."""
    if dataclasses.is_dataclass(type_) and isinstance(type_, type):
        return [type_]
    return [cls for part in typing.get_args(type_) for cls in classes_of(part)]


def classes_at(place: str) -> list[type]:
    """The classes of the settings at a place."""
    return classes_of(imported(PLACES[place]))


def first_sentence(cls: type) -> str:
    return next(iter(sentences(cls)), "")


def sentences(cls: type) -> list[str]:
    """The sentences of a class's docstring, without their full stops."""
    text = " ".join((cls.__doc__ or "").split())
    return [part.rstrip(".") for part in re.split(r"(?<!al)\.\s+(?=[A-Z`])", text)]


def members_of(place: str) -> list[str]:
    """Names that the settings at a place can have."""
    named = [tag for cls in classes_at(place) if (tag := tag_of(cls)) is not None]
    return list(dict(described("models"))) if place == "model" else named


def described(kind: str) -> Iterator[tuple[str, str]]:
    """(name, first sentence about it) of the members of a kind of settings."""
    if kind == "models":
        from phf.training.lm import MODELS

        for name, settings in MODELS.items():
            sizes = "its usual sizes"
            if "hidden_size" in settings:
                sizes = f"{settings['num_hidden_layers']} layers of width {settings['hidden_size']}"
            yield name, f"A model from scratch: {settings['model_type']}, {sizes}."
    for cls in classes_of(imported(UNIONS[kind])):
        yield str(tag_of(cls)), first_sentence(cls)
