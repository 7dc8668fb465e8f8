"""torch, for the losses. Where it is not installed, the edits of objectives work, and a loss says what is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phf.core.extras import optional

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch")
    Tensor = Any

__all__ = ["Tensor", "torch"]
