"""Objectives: what is done to the token stream (`edit`) and to the loss (`loss`).

`base` is the interface. `paper` has the six objectives of the paper and loss masking, `family` those of later papers,
`compose` those that are made of others. A user's own objective is a subclass of `Objective`, given in Python or by name
(`own`).
"""

from __future__ import annotations

import typing
from typing import Annotated

from pydantic import BeforeValidator, Field

from phf.objectives.base import BAD, GOOD, LossInputs, LossOutputs, Objective, count_targets
from phf.objectives.compose import Each, Schedule, Single
from phf.objectives.family import SGTM, Anchored, Annotate, Attributes, Hide, Metadata, Quantile, Tag, Weights
from phf.objectives.own import Own, spelled_out
from phf.objectives.paper import AWR, MLE, RWR, Conditional, Filtering, Masking, Unlikelihood

AnyObjective = Annotated[
    Single | SGTM | Metadata | Each | Schedule | Own,
    Field(discriminator="name", title="objective"),
    BeforeValidator(spelled_out),
]


def is_built_in(objective: Objective) -> bool:
    """Whether an objective is one of phf's own."""
    return type(objective) in typing.get_args(typing.get_args(AnyObjective)[0])


__all__ = [
    "AWR",
    "BAD",
    "GOOD",
    "MLE",
    "RWR",
    "SGTM",
    "Anchored",
    "Annotate",
    "AnyObjective",
    "Attributes",
    "Conditional",
    "Each",
    "Filtering",
    "Hide",
    "LossInputs",
    "LossOutputs",
    "Masking",
    "Metadata",
    "Objective",
    "Own",
    "Quantile",
    "Schedule",
    "Tag",
    "Unlikelihood",
    "Weights",
    "count_targets",
    "is_built_in",
]
