"""The baseline of train_step.py, frozen: a training step like the reference implementation's, with current libraries.

Eager attention, float32, unfused AdamW, dropout 0.1, full logits, and the model's own cross-entropy next to the
objective's loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def losses(
    objective: str, logits: torch.Tensor, values: torch.Tensor | None, target: torch.Tensor, score: torch.Tensor
) -> torch.Tensor:
    flat = logits.reshape(-1, logits.shape[-1])
    labels = target.reshape(-1)
    s = score.reshape(-1)
    if objective == "mle":
        return F.cross_entropy(flat, labels)
    nll = F.cross_entropy(flat, labels, reduction="none")
    if objective == "ul":
        p = torch.softmax(flat, -1).gather(1, labels.unsqueeze(1)).squeeze(1)
        unlikelihood = -torch.log(torch.clamp(1 - p, min=1e-20))
        return torch.where(s > 0, unlikelihood, nll).mean()
    if objective == "rwr":
        return (torch.exp(-s / 10) * nll).mean()
    assert objective == "awr"
    assert values is not None
    v = values.reshape(-1)
    weight = torch.exp((-s - v.detach()) / 10).clamp(max=1000)
    return 0.5 * (weight * nll).mean() + 0.5 * F.mse_loss(v, -s)


class ReferenceStep:
    """`config` of a from-scratch LM, dropout included; `__call__` takes one step on a batch."""

    def __init__(
        self,
        config: Any,
        objective: str,
        precision: str = "fp32",
        fused: bool = False,
        only_own_loss: bool = False,
        attention: str = "eager",
    ) -> None:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        self.lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
        width = self.lm.get_output_embeddings().weight.shape[1]
        self.value_head = torch.nn.Linear(width, 1, bias=False) if objective == "awr" else None
        parameters = [*self.lm.parameters(), *(self.value_head.parameters() if self.value_head else [])]
        self.optimizer = torch.optim.AdamW(
            parameters, lr=5e-4, weight_decay=0.1, fused=fused, foreach=False if not fused else None
        )
        self.objective = objective
        self.precision = precision
        self.only_own_loss = only_own_loss

    def __call__(self, batch: dict[str, torch.Tensor]) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            out = self.lm(
                input_ids=batch["input_ids"],
                labels=batch["input_ids"],
                output_hidden_states=self.value_head is not None,
                use_cache=False,
            )
            values = (
                None if self.value_head is None else -torch.sigmoid(self.value_head(out.hidden_states[-1]).squeeze(-1))
            )
        if self.only_own_loss:  # like plain transformers
            loss = out.loss
        else:
            loss = losses(self.objective, out.logits.float(), values, batch["targets"], batch["scores"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.lm.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()
