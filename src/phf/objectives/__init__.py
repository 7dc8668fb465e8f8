"""Objectives: what is done to the token stream (`edit`) and to the loss (`loss`).

`base` is the interface; `paper` has the six objectives of the paper and loss masking. A user's own is a subclass of
`Objective`, given in Python.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from phf.objectives.base import BAD, GOOD, LossInputs, LossOutputs, Objective
from phf.objectives.paper import AWR, MLE, RWR, Conditional, Filtering, Masking, Unlikelihood

AnyObjective = Annotated[
    MLE | Filtering | Conditional | Unlikelihood | Masking | RWR | AWR, Field(discriminator="name")
]

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
]
