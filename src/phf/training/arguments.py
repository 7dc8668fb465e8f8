"""The arguments of the Hugging Face Trainer for a run."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import TrainingArguments

from phf.core.device import pick_device
from phf.training.config import TrainConfig


def can_compile() -> bool:
    """Whether torch.compile works here. On a CPU it needs a C++ compiler and Python's headers. Prints a note if not."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(4, device=pick_device()))
    except Exception as error:  # whatever is missing, the uncompiled model gives the same result, only slower
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        print(
            f"note: training is not compiled, and so slower, because torch.compile does not work here: {reason}",
            file=sys.stderr,
        )
        return False
    return True


SCHEDULERS = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
    "wsd": "warmup_stable_decay",
}
"""transformers' names of the schedules."""


def trainer_arguments(
    config: TrainConfig, folder: Path, micro: int, accumulate: int, seed: int, judged: bool
) -> TrainingArguments:
    """The Trainer's settings. `judged`: one process judges the model while the others wait."""
    on_gpu = torch.cuda.is_available()
    timeout_s = 7 * 86_400 if judged else 4 * 3600 if config.shard else 1800  # a large model takes long to write
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulate,
        learning_rate=config.lr,
        lr_scheduler_type=SCHEDULERS[config.schedule],
        lr_scheduler_kwargs={"num_decay_steps": config.decay_steps} if config.schedule == "wsd" else {},
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        max_grad_norm=config.clip,
        optim="adamw_torch_fused",
        logging_steps=min(config.log_every, config.steps),
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_steps,
        seed=seed,
        use_cpu=not on_gpu,
        ignore_data_skip=True,
        remove_unused_columns=False,
        label_names=[],
        dataloader_num_workers=config.workers if config.workers is not None else int(on_gpu),
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        ddp_timeout=timeout_s,
        report_to=list(config.report_to) or "none",
        run_name=folder.parent.name,
    )
    if arguments.n_gpu > 1:
        print("note: only one GPU is used; to use all of them, start this command with torchrun", file=sys.stderr)
        arguments._n_gpu = 1
    return arguments
