"""What scorers share that read a Hugging Face classifier: loading, labels, and how much it reads at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from phf.core.config import ConfigError, did_you_mean
from phf.core.runs import loading


def load_pretrained(kind: Any, what: str, path: str, revision: str | None) -> Any:
    """The model at `path` of an Auto class. `what`: what it is, for messages. Raises ConfigError for anything else."""
    with loading(f"{what} {path}"):
        model, info = kind.from_pretrained(path, revision=revision, output_loading_info=True, trust_remote_code=False)
    if info["missing_keys"]:
        raise ConfigError(f"{path} is no {what}: its weights lack {', '.join(sorted(info['missing_keys'])[:3])}")
    return model


def fast_tokenizer(path: str, revision: str | None) -> Any:
    """The tokenizer at `path`. Raises ConfigError where there is none, or none that says where its tokens are."""
    from transformers import AutoTokenizer

    with loading(f"tokenizer {path}"):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ConfigError(f"the tokenizer of {path} has no fast version (tokenizer.json)")
    return tokenizer


def label_names(model: Any) -> list[str]:
    """The names of a classifier's outputs, in order."""
    return [model.config.id2label[i] for i in range(model.config.num_labels)]


def known_labels(labels: Sequence[str] | None, names: Sequence[str], path: str) -> tuple[str, ...]:
    """`labels`, if a classifier has them. Raises ConfigError that names what is wrong."""
    if labels is None:
        raise ConfigError(
            f"scorer.labels: which of the labels of {path} mean bad? Name them: scorer.labels=[{names[-1]}] (known: "
            f"{', '.join(names)})"
        )
    for label in labels:
        if label not in names:
            raise ConfigError(f"scorer.labels: {path} has no label {label!r}{did_you_mean(label, names)}")
    return tuple(labels)


def window_size(model: Any, tokenizer: Any, most: int) -> int:
    """How many tokens the classifier reads at a time, special tokens included; at most `most`."""
    positions = getattr(model.config, "max_position_embeddings", None) or most
    # RoBERTa's positions start after its padding token
    reserved = model.config.pad_token_id + 1 if "roberta" in model.config.model_type else 0
    return int(min(most, positions - reserved, tokenizer.model_max_length))


def padding_id(model: Any, tokenizer: Any) -> int | None:
    """The padding token that a model expects, by its config, else by its tokenizer; None if neither knows one. A
    classifier with a decoder finds the last token of a text by it, so a wrong one gives a wrong score."""
    rows = model.get_input_embeddings().weight.shape[0]
    of_model = model.config.get_text_config().pad_token_id
    for id in (of_model, tokenizer.pad_token_id):
        if isinstance(id, int) and 0 <= id < rows:
            model.config.get_text_config().pad_token_id = id
            return id
    return None


def weights_hash(model: Any) -> str:
    """Hash of the names and values of all weights (hex, 128 bits)."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
