"""A part of each layer that can be removed: some attention heads and some neurons, for the objective `sgtm`.

The part is the last key-value heads with the queries that read them, and the last neurons of the MLP. Only the input
columns of two matrices per layer carry what it says to the rest of the model. Outside training the part is switched off
there, so what is judged is what will be released.

Legend: B rows, T positions, F inputs of a matrix.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from phf.core.config import ConfigError
from phf.core.random import key64, mix64
from phf.objectives.base import Removable


@dataclass(frozen=True)
class _Slice:
    """Rows (`dim` 0, with the bias) or columns (`dim` 1) `start` to `stop` of a linear layer."""

    layer: nn.Linear
    dim: int
    start: int
    stop: int

    @property
    def parameters(self) -> list[Tensor]:
        return [p for p in (self.layer.weight, self.layer.bias if self.dim == 0 else None) if p is not None]

    def within(self, values: Tensor) -> Tensor:
        """The slice of a parameter of the layer, or of its gradient."""
        return values.narrow(self.dim, self.start, self.stop - self.start)


@dataclass(frozen=True)
class _Names:
    """The linear layers of one family of models: of the attention and of the MLP, those that read and the one that
    writes. A single layer that reads for the attention holds queries, keys and values one after the other."""

    attention: str
    reads: tuple[str, ...]
    writes: str
    mlp: str
    mlp_reads: tuple[str, ...]
    mlp_writes: str


FAMILIES = (
    _Names("self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj", "mlp", ("gate_proj", "up_proj"), "down_proj"),
    _Names("attn", ("c_attn",), "c_proj", "mlp", ("c_fc",), "c_proj"),
)
"""Llama with all that is named as in Llama (Mistral, Qwen, Gemma, OLMo), and GPT-2."""


class RemovablePart:
    """The part of an LM whose Conv1D layers are ordinary ones already. Switched off until `on` is used.

    Raises ConfigError for a model whose layers are not known, and for a part that would be all or nothing.
    """

    def __init__(self, lm: Any, asked: Removable) -> None:
        self.without = asked.without
        self.weights: list[_Slice] = []
        self._keep: Tensor | None = None
        found = _layers(lm)
        if found is None:
            raise ConfigError(
                f"sgtm does not know the layers of {type(lm).__name__}; it works with models like Llama and GPT-2"
            )
        layers, names = found
        config = lm.config
        queries = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or queries
        if asked.heads >= groups:
            raise ConfigError(f"sgtm: heads={asked.heads} of {groups} key-value heads leaves none for good text")
        for layer in layers:
            attention = getattr(layer, names.attention)
            mlp = getattr(layer, names.mlp)
            writes = getattr(attention, names.writes)
            mlp_writes = getattr(mlp, names.mlp_writes)
            neurons = round(asked.neurons * mlp_writes.in_features)
            if asked.heads == 0 and neurons == 0:
                raise ConfigError(
                    f"sgtm: neurons={asked.neurons:g} of {mlp_writes.in_features} is none, and heads is 0: there is "
                    "no part to remove"
                )
            head = writes.in_features // queries
            self._add(
                [getattr(attention, name) for name in names.reads],
                writes,
                [asked.heads * head * (queries // groups), *[asked.heads * head] * 2],
                [queries * head, *[groups * head] * 2],
            )
            reads = [getattr(mlp, name) for name in names.mlp_reads]
            self._add(reads, mlp_writes, [neurons] * len(reads), [mlp_writes.in_features] * len(reads))

    def _add(self, reads: list[nn.Linear], writes: nn.Linear, taken: list[int], sizes: list[int]) -> None:
        """Take the last `taken` rows of each of the blocks of `sizes` rows that `reads` hold together, and what
        `writes` reads of the first."""
        if not taken[0]:
            return
        start = writes.in_features - taken[0]
        end = 0
        for n, (count, size) in enumerate(zip(taken, sizes, strict=True)):
            end = end + size if len(reads) == 1 else size
            self.weights.append(_Slice(reads[min(n, len(reads) - 1)], 0, end - count, end))
        self.weights.append(_Slice(writes, 1, start, writes.in_features))
        writes.register_forward_pre_hook(lambda layer, inputs: (self._silenced(inputs[0], start), *inputs[1:]))

    def _silenced(self, x_BTF: Tensor, start: int) -> Tensor:
        """The inputs of a matrix that writes, without the part where it is off."""
        part = x_BTF[..., start:]
        part = torch.zeros_like(part) if self._keep is None else part * self._keep.to(part.dtype)
        return torch.cat([x_BTF[..., :start], part], -1)

    @contextlib.contextmanager
    def on(self, keep_B: Tensor) -> Iterator[None]:
        """Switch the part on in the rows where `keep_B` (bool) is true."""
        self._keep = keep_B[:, None, None]
        try:
            yield
        finally:
            self._keep = None

    def drawn(self, ids_BT: Tensor) -> Tensor:
        """Whether each row keeps the part while its good targets are learned: false for a share `without` of the rows,
        drawn by their text."""
        places = torch.arange(1, ids_BT.shape[1] + 1, device=ids_BT.device)
        row_B = ((ids_BT + 1) * places).sum(1)
        drawn = mix64(row_B.cpu().numpy().astype(np.uint64), key64("without the removable part")) / 2.0**64
        return torch.from_numpy(drawn >= self.without).to(ids_BT.device)

    def taught(self, loss: Tensor) -> Tensor:
        """A loss of the same value whose gradient reaches the part alone."""
        held = [(p, s) for s in self.weights for p in s.parameters]
        unique = list(dict.fromkeys(p for p, _ in held))
        gradient_of = dict(zip(unique, torch.autograd.grad(loss, unique, materialize_grads=True), strict=True))
        total = loss.detach()
        for p, s in held:
            term = (s.within(p) * s.within(gradient_of[p])).sum()
            total = total + (term - term.detach())
        return total

    def blocks(self, matrix: nn.Parameter) -> list[tuple[int, int, int]]:
        """(dim, start, stop) of the blocks of a matrix that lie within or outside the part, or nothing if the matrix
        holds nothing of it."""
        mine = sorted((s.dim, s.start, s.stop) for s in self.weights if s.layer.weight is matrix)
        if not mine:
            return []
        dim = mine[0][0]
        edges = sorted({0, matrix.shape[dim], *(edge for _, *pair in mine for edge in pair)})
        return [(dim, a, b) for a, b in itertools.pairwise(edges)]

    def remove(self, seed: int) -> None:
        """Remove the part for good. What it wrote is 0, and what it read gets new random values like the rest of its
        matrix: the model is the same as with zeros, and later training can use the place."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for s in self.weights:
                block = s.within(s.layer.weight)
                if s.dim == 1:
                    block.zero_()
                    continue
                block.copy_(torch.randn(block.shape, generator=generator) * float(s.layer.weight.std()))
                if s.layer.bias is not None:
                    s.within(s.layer.bias).zero_()


def _layers(lm: Any) -> tuple[nn.ModuleList, _Names] | None:
    """The layers of an LM and their names."""
    for module in lm.base_model.children():
        if isinstance(module, nn.ModuleList) and len(module):
            for names in FAMILIES:
                attention, mlp = (getattr(module[0], name, None) for name in (names.attention, names.mlp))
                known = [getattr(attention, name, None) for name in (*names.reads, names.writes)]
                known += [getattr(mlp, name, None) for name in (*names.mlp_reads, names.mlp_writes)]
                if all(isinstance(layer, nn.Linear) for layer in known):
                    return module, names
    return None
