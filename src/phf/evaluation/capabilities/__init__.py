"""Capabilities: LAMBADA, HumanEval, GLUE finetuning, tasks of lm-evaluation-harness.

    phf eval runs/mine capabilities=[{name: lambada, path: lambada_test.jsonl}]

Each reads a file or folder of yours, or a file of the Hub. Models with control tokens get the good one at the start of
every text and never write control tokens.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from phf.evaluation.capabilities.base import Capability
from phf.evaluation.capabilities.canaries import Memorised
from phf.evaluation.capabilities.glue import Glue
from phf.evaluation.capabilities.humaneval import HumanEval
from phf.evaluation.capabilities.lambada import Lambada
from phf.evaluation.capabilities.lm_eval import LmEval
from phf.evaluation.capabilities.probe import Probe
from phf.evaluation.capabilities.verbatim import Verbatim

AnyCapability = Annotated[
    Lambada | HumanEval | Glue | LmEval | Probe | Verbatim | Memorised, Field(discriminator="name", title="capability")
]

__all__ = ["AnyCapability", "Capability", "Glue", "HumanEval", "Lambada", "LmEval", "Memorised", "Probe", "Verbatim"]
