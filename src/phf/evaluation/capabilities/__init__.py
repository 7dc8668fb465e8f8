"""What a model can still do: LAMBADA, HumanEval, GLUE finetuning. Floor 5.

    phf eval runs/mine capabilities=[{name: lambada, path: lambada_test.jsonl}]

Each takes a file or folder of yours. Models with control tokens are given the good one where a text begins, and control
tokens are never written.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from phf.evaluation.capabilities.base import Capability
from phf.evaluation.capabilities.glue import Glue
from phf.evaluation.capabilities.humaneval import HumanEval
from phf.evaluation.capabilities.lambada import Lambada
from phf.evaluation.capabilities.lm_eval import LmEval

AnyCapability = Annotated[Lambada | HumanEval | Glue | LmEval, Field(discriminator="name")]

__all__ = ["AnyCapability", "Capability", "Glue", "HumanEval", "Lambada", "LmEval"]
