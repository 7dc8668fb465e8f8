"""The module that is trained: an LM, perhaps a value head, and the objective. Its forward pass returns the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from phf.core.config import ConfigError
from phf.core.runs import model_folder, read_model_record
from phf.objectives import Objective, count_targets
from phf.objectives.base import LossOutputs, ValueShape
from phf.tokens.tokenizer import load_tokenizer
from phf.training import attention
from phf.training.batches import document_positions
from phf.training.fused import fused_loss
from phf.training.lm import swap_conv1d, swap_gelu
from phf.training.probe import before_output, logit_shape
from phf.training.removable import RemovablePart

VALUE_HEAD_FILE = "value_head.safetensors"


def trained_control_tokens(path: str | Path) -> dict[str, int]:
    """Control tokens that the weights in a folder know, with their ids there. Empty for models from elsewhere."""
    folder = Path(model_folder(path))
    record = read_model_record(folder)
    if record is None or not record.control_tokens:
        return {}
    tokenizer = load_tokenizer(folder)
    return {name: tokenizer.convert_tokens_to_ids(name) for name in record.control_tokens.values()}


def trained_value_head(path: str | Path, objective: Objective) -> Path | None:
    """The file of the value head that was trained with the weights in a folder, if `objective` needs a head of its
    kind."""
    file = Path(model_folder(path)) / VALUE_HEAD_FILE
    if objective.value is None or not file.exists():
        return None
    return file if set(load_file(file)) == set(ValueHead(1, objective.value).state_dict()) else None


class ValueHead(nn.Module):
    """Predicted reward from the hidden state, computed in float32: "linear" is w.h + b, "negative_sigmoid" is
    -sigmoid(w.h) as in the paper. w and b start at 0; 0 is the mean of standardised rewards."""

    def __init__(self, width: int, kind: ValueShape) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(1)) if kind == "linear" else None

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            wide = self.weight.dtype
            logit_BT = hidden_BTD.to(wide) @ self.weight
            return logit_BT + self.bias if self.bias is not None else -torch.sigmoid(logit_BT)


class PHFModel(nn.Module):
    """An LM, the value head that its objective needs (or none) and the objective. `forward` returns the loss.

    `autocast`: bfloat16 for mixed precision; None: the autocast around the call (`torch.autocast`, a Trainer's
    `bf16`), else the weights' own type. `compile`: compile the LM's trunk and the elementwise parts of the loss,
    never this module. `fast_attention`: use phf.training.attention where the LM would use "sdpa". `end_of_text`: its
    id, where no token shall attend to another document than its own; documents start with it. Some parts of the
    LM are replaced in place by faster ones that compute the same. GPT-2's Conv1D layers are among them and have
    transposed weights: save such an LM with `save_lm`.
    """

    def __init__(
        self,
        lm: Any,
        objective: Objective,
        autocast: torch.dtype | None = None,
        compile: bool = False,
        chunk: int | None = None,
        fast_attention: bool = True,
        end_of_text: int | None = None,
    ) -> None:
        super().__init__()
        self.lm = lm
        self.objective = objective
        self.autocast_dtype = autocast
        self.compiled = compile
        self.chunk = chunk
        self.progress = 0.0
        """Share of the training that is done; the trainer sets it."""
        width = lm.get_output_embeddings().weight.shape[1]
        self.value_head = None if objective.value is None else ValueHead(width, objective.value)
        self.logit_shape = logit_shape(lm)
        swap_conv1d(lm)
        swap_gelu(lm)
        if fast_attention:
            attention.swap(lm)
        elif lm.config._attn_implementation == attention.NAME:
            lm.set_attn_implementation("sdpa")
        self.part = None if objective.removable is None else RemovablePart(lm, objective.removable)
        self.end_of_text = end_of_text
        if end_of_text is not None and not attention.keeps_documents_apart(lm, end_of_text):
            raise ConfigError(
                f"train.document_mask: {type(lm).__name__} does not keep the documents of a row apart; leave it out"
            )
        if compile:
            lm.base_model.compile(dynamic=False)

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor,
        scores: Tensor,
        mask: Tensor,
        denominator: Tensor | float | None = None,
        phase: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> dict[str, Any]:
        """`input_ids`, `targets`, `scores` (for several preferences [B, T, preferences]), `mask`, `phase` and
        `reference` are [B, T]. Returns {"loss", "metrics"}: the sum over counted
        targets divided by `denominator` (default: the number of counted targets in the batch), and sums of metrics."""
        counted = count_targets(self.objective, scores, mask, phase).sum()
        if denominator is None:
            denominator = counted.clamp(min=1)
        if self.part is None:
            out = self._loss(input_ids, targets, scores, mask, denominator, phase, reference)
        else:
            out = self._in_parts(self.part, input_ids, targets, scores, mask, denominator)
        return {"loss": out.loss_sum, "metrics": out.metrics | {"counted": counted, "targets": mask.sum()}}

    def _in_parts(
        self,
        part: RemovablePart,
        input_ids: Tensor,
        targets: Tensor,
        scores: Tensor,
        mask: Tensor,
        denominator: Tensor | float,
    ) -> LossOutputs:
        """The loss of the good targets, which reaches the whole model, and that of the bad ones, which reaches only its
        removable part."""
        assert self.objective.bad_above is not None, "an objective with a removable part tells good from bad"
        bad_BT = mask & (scores > self.objective.bad_above)
        rows_B = bad_BT.any(1)
        taught: Tensor | float = 0.0
        metrics: dict[str, Tensor] = {}
        if rows_B.any():
            with part.on(rows_B[rows_B]):
                bad = self._loss(input_ids[rows_B], targets[rows_B], scores[rows_B], bad_BT[rows_B], denominator)
                taught = part.taught(bad.loss_sum)
            metrics = bad.metrics
        with part.on(part.drawn(input_ids)):
            good = self._loss(input_ids, targets, scores, mask & ~bad_BT, denominator)
        metrics = {name: value + metrics.get(name, 0) for name, value in good.metrics.items()}
        return LossOutputs(good.loss_sum + taught, metrics)

    def _loss(
        self,
        input_ids: Tensor,
        targets: Tensor,
        scores: Tensor,
        mask: Tensor,
        denominator: Tensor | float,
        phase: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> LossOutputs:
        """The loss divided by `denominator`, and sums of metrics."""
        device = input_ids.device.type
        dtype = self.autocast_dtype
        if dtype is None and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        # every weight is used once, so caching its cast would only take memory
        autocast = torch.autocast(device, dtype=dtype, enabled=dtype is not None, cache_enabled=False)
        with autocast:
            hidden_BTD = self._hidden(input_ids)
            layers = before_output(self.lm)
            output_BTD = hidden_BTD if layers is None else layers(hidden_BTD)
        head = self.lm.get_output_embeddings()
        value_N = None
        if self.value_head is not None:
            reaches = self.objective.value_reaches_trunk
            value_N = self.value_head(hidden_BTD if reaches else hidden_BTD.detach()).flatten()
        if isinstance(denominator, Tensor):
            denominator = denominator.to(torch.promote_types(hidden_BTD.dtype, torch.float32))
        divide_last = (dtype or hidden_BTD.dtype) == torch.float16  # gradients divided first would underflow
        out = fused_loss(
            output_BTD.flatten(0, 1),
            head.weight,
            bias_V=getattr(head, "bias", None),
            target_N=targets.flatten(),
            score_N=scores.flatten(0, 1),
            mask_N=mask.flatten(),
            value_N=value_N,
            phase_N=None if phase is None else phase.flatten(),
            reference_N=None if reference is None else reference.flatten(),
            progress=self.progress,
            objective=self.objective,
            chunk=self.chunk,
            dtype=dtype or hidden_BTD.dtype,
            compiled=self.compiled,
            shape=self.logit_shape,
            scale=1.0 if divide_last else 1 / denominator,
        )
        return LossOutputs(out.loss_sum / denominator, out.metrics) if divide_last else out

    def _hidden(self, input_ids: Tensor) -> Tensor:
        """Hidden states [B, T, D] of the trunk."""
        given: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
        if self.end_of_text is None:
            with attention.whole_rows():
                found: Tensor = self.lm.base_model(**given).last_hidden_state
        else:
            given["position_ids"] = document_positions(input_ids, self.end_of_text)
            found = self.lm.base_model(**given).last_hidden_state
        return found

    def save_value_head(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        if self.value_head is not None:
            state = self.value_head.state_dict() if state is None else state
            save_file({k: v.detach().contiguous() for k, v in state.items()}, Path(folder) / VALUE_HEAD_FILE)

    def load_value_head(self, folder: str | Path) -> None:
        if self.value_head is not None:
            self.value_head.load_state_dict(load_file(Path(folder) / VALUE_HEAD_FILE))
