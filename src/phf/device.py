"""Which device, and which number type on it. Floor 0; torch is imported when asked."""

from __future__ import annotations

from typing import Any


def pick_device(device: str = "auto") -> str:
    """ "cuda" where there is one, unless another is named."""
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def has_quick_bf16(device: str) -> bool:
    """Whether bfloat16 is quicker than float32 there. (float16 never is on a CPU.)"""
    import torch

    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported())
    cpu: Any = torch.cpu
    return bool(
        getattr(cpu, "_is_avx512_bf16_supported", lambda: False)()
        or getattr(cpu, "_is_amx_tile_supported", lambda: False)()
    )
