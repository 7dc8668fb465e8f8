"""Objectives: what is done to the token stream (`edit`) and to the loss (`loss`).

`base` is the interface. `paper` has the six objectives of the paper and loss masking. A user's own objective is a
subclass of `Objective`, given in Python.
"""

from __future__ import annotations

import typing
from typing import Annotated

from pydantic import Field

from phf.objectives.base import BAD, GOOD, LossInputs, LossOutputs, Objective
from phf.objectives.paper import AWR, MLE, RWR, Conditional, Filtering, Masking, Unlikelihood

AnyObjective = Annotated[
    MLE | Filtering | Conditional | Unlikelihood | Masking | RWR | AWR,
    Field(discriminator="name", title="objective"),
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
    "AnyObjective",
    "Conditional",
    "Filtering",
    "LossInputs",
    "LossOutputs",
    "Masking",
    "Objective",
    "Unlikelihood",
    "is_built_in",
]
