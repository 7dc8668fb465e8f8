"""Finetune a small transformer as a scorer, on labels with or without an order."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phf.core.runs import loading
from phf.scorers.fitted import TransformerScorer
from phf.scorers.labels import Labels

if TYPE_CHECKING:
    from torch import Tensor

MAX_TOKENS = 256
"""Tokens of a text that are read in the fit."""


def finetune(labels: Labels, rows: np.ndarray, folder: Path, base_model: str, seed: int) -> TransformerScorer:
    """A classifier of two classes, good and bad, finetuned on the texts `rows` and saved into `folder`, not calibrated.

    With an order in the labels, the model is that of proportional odds (McCullagh 1980), as for n-grams. The logit of
    P(label >= k) is the logit of being bad plus a number of its own for each k. The number is 0 for the label from
    which on texts are bad.

    Raises ConfigError for a model that cannot be loaded.
    """
    import torch
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

    set_seed(seed)
    tokenizer = _tokenizer(base_model)
    model = _classifier(base_model)
    model.config.pad_token_id = tokenizer.pad_token_id
    loss = None
    target_N = labels.bad_N.astype(np.int64)
    if labels.ordered and labels.level_N is not None:
        target_N = labels.level_N
        loss = OrdinalLoss([int(level) for level in np.unique(target_N[rows])[1:]], labels.bad_from or 1)
        model.register_parameter("cuts", loss.offset_K)
    limit = min(tokenizer.model_max_length, MAX_TOKENS)
    texts = [
        {**tokenizer(labels.texts[i], truncation=True, max_length=limit), "labels": int(target_N[i])} for i in rows
    ]
    if cut := sum(len(row["input_ids"]) == limit for row in texts):
        print(f"    {cut:,} of {len(texts):,} texts are cut after {limit} tokens for the fit", file=sys.stderr)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=2,
        per_device_train_batch_size=16,
        learning_rate=3e-5,
        warmup_steps=0.06,
        weight_decay=0.01,
        save_strategy="no",
        report_to=[],
        seed=seed,
        logging_steps=50,
        disable_tqdm=not sys.stderr.isatty(),
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="group_by_length",
    )
    Trainer(
        model=model,
        args=arguments,
        train_dataset=texts,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_loss_func=loss,
    ).train()
    if loss is not None:
        del model.cuts
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    return TransformerScorer(folder)


class OrdinalLoss:
    """Mean over texts of -log P(is the label at least k?), summed over the `cuts` k. `offset_K`: trained with the
    model."""

    def __init__(self, cuts: list[int], bad_from: int) -> None:
        import torch

        self.cuts = cuts
        self.own = [k != bad_from for k in cuts]
        self.offset_K = torch.nn.Parameter(torch.zeros(len(cuts)))

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        import torch

        logits = outputs["logits"].float()
        z_N = logits[:, 1] - logits[:, 0]
        own_K = torch.tensor(self.own, device=z_N.device)
        z_NK = z_N[:, None] + torch.where(own_K, self.offset_K, 0.0)
        reached_NK = labels[:, None] >= torch.tensor(self.cuts, device=z_N.device)
        return (
            torch.nn.functional.binary_cross_entropy_with_logits(z_NK, reached_NK.float(), reduction="none")
            .sum(1)
            .mean()
        )


def _tokenizer(base_model: str) -> Any:
    from transformers import AutoTokenizer

    with loading(f"tokenizer {base_model}"):
        tokenizer = AutoTokenizer.from_pretrained(base_model, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _classifier(base_model: str) -> Any:
    from transformers import AutoModelForSequenceClassification

    with loading(f"model {base_model}"):
        return AutoModelForSequenceClassification.from_pretrained(
            base_model,
            num_labels=2,
            id2label={0: "good", 1: "bad"},
            label2id={"good": 0, "bad": 1},
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
