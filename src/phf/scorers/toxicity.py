"""Toxicity: the probability that a Hugging Face sequence classifier gives to each segment.

    phf score corpus.jsonl scored/ --scorer toxicity --segmenter sentences scorer.model=unitary/toxic-bert

Any other sequence classifier works as well. The paper scored with Detoxify's `toxicity` output. Texts are sorted by
length, batched under a token budget and computed in bfloat16 where that is fast. A segment longer than the model's
context is judged in overlapping windows, and its score is the worst window's; Detoxify truncates it silently.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core import store
from phf.core.config import STRICT, ConfigError, Plain
from phf.core.device import has_fast_bf16, pick_device
from phf.core.extras import MissingPackage, needs
from phf.core.types import Identity
from phf.scorers.base import TextScorer
from phf.scorers.pretrained import (
    fast_tokenizer,
    known_labels,
    label_names,
    load_pretrained,
    padding_id,
    weights_hash,
    window_size,
)

PRESETS: dict[str, Plain] = {
    "unitary/toxic-bert": {"labels": ("toxic",), "activation": "sigmoid"},
    "unitary/unbiased-toxic-roberta": {"labels": ("toxicity",), "activation": "sigmoid"},
    "unitary/multilingual-toxic-xlm-roberta": {"labels": ("toxicity",), "activation": "sigmoid"},
}
"""What the labels of well-known classifiers mean, used where the settings do not say."""

DETOXIFY = {
    "original": ("toxic_original-c1212f89.ckpt", "v0.1-alpha", "bert-base-uncased"),
    "unbiased": ("toxic_debiased-c7548aa0.ckpt", "v0.3-alpha", "roberta-base"),
    "multilingual": ("multilingual_debiased-0b549669.ckpt", "v0.4-alpha", "xlm-roberta-base"),
}
"""Detoxify's own releases: file, version, and the model whose config and tokenizer they use."""

LABEL_NAMES = {"toxic": "toxicity", "identity_hate": "identity_attack", "severe_toxic": "severe_toxicity"}
"""Detoxify's output names for the class names in its checkpoints."""


@dataclass(frozen=True, config=STRICT)
class Toxicity(TextScorer):
    """The probability that a sequence classifier gives to the worst of `labels`.

    `model`: a folder or a name on the Hub. `checkpoint`: a file in Detoxify's format, or "original", "unbiased" or
    "multilingual" for Detoxify's releases; config and tokenizer then come from `model`. `labels` and `activation` are
    optional for well-known models (unitary/*, Detoxify's) and for classifiers of one or two classes whose names say
    which one is bad.
    """

    name: Literal["toxicity"] = "toxicity"
    model: str | None = None
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    checkpoint: str | None = None
    labels: tuple[str, ...] | None = None
    activation: Literal["sigmoid", "softmax"] | None = None
    max_tokens: Annotated[int, Field(gt=8)] = 512
    """Tokens of a text that are read; longer ones are cut."""
    overlap: Annotated[int, Field(ge=0)] | None = None
    """Tokens that neighbouring windows share. None: 64, or a quarter of a short context."""
    tokens_per_batch: Annotated[int, Field(gt=0)] = 512
    """Tokens that are computed together."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the classifier."""
    device: str = "auto"
    """For example cuda:1; auto: a GPU if there is one."""

    def __post_init__(self) -> None:
        if self.overlap is not None and self.overlap >= self.max_tokens - 4:
            raise ValueError(f"overlap ({self.overlap}) must be well below max_tokens ({self.max_tokens})")

    @property
    def names(self) -> dict[str, str]:
        given = {"model": self.model, "checkpoint": self.checkpoint}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def bad_above(self) -> float:
        return 0.5

    def identity(self) -> Identity:
        loaded = load_classifier(self)
        return {
            "name": self.name,
            "unit": "probability",
            "model": self.checkpoint or loaded.path,
            "weights": loaded.weights_hash,
            "settings": loaded.settings_hash,
            "labels": list(loaded.labels),
            "activation": loaded.activation,
            "max_tokens": loaded.max_tokens,
            "overlap": loaded.overlap,
            "dtype": loaded.dtype,
        }

    def score_texts(self, texts: Sequence[str]) -> list[float]:
        found: list[float] = load_classifier(self).probabilities(texts).tolist()
        return found


class Classifier:
    """A loaded sequence classifier. `columns`: the logits that belong to `labels`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        path: str,
        labels: Sequence[str],
        columns: Sequence[int],
        activation: str,
        dtype: str,
        device: str,
        config: Toxicity,
    ) -> None:
        import torch

        self.path = path
        self.labels = labels
        self.columns = columns
        self.activation = activation
        self.dtype = dtype
        self.device = device
        self.tokens_per_batch = config.tokens_per_batch
        overlap = config.overlap
        self.max_tokens = window_size(model, tokenizer, config.max_tokens)
        self.tokenizer = tokenizer
        parts = tokenizer.backend_tokenizer.to_str() + str(
            sorted((k, str(v)) for k, v in model.config.to_dict().items())
        )
        self.settings_hash = store.bytes_hash(parts.encode())
        self.before, self.after = special_tokens(tokenizer)
        room = self.max_tokens - len(self.before) - len(self.after)
        self.overlap = min(64, room // 4) if overlap is None else overlap
        if room <= self.overlap:
            raise ConfigError(f"scorer.overlap={overlap}: {path} reads {room} tokens at a time; give a smaller overlap")
        self.weights_hash = weights_hash(model)
        self.pad = padding_id(model, tokenizer)
        self.model = model.to(device=device, dtype=getattr(torch, dtype)).eval()

    def windows(self, texts: Sequence[str]) -> tuple[list[list[int]], np.ndarray]:
        """Token ids of every window of every text, and the number of the text that each window belongs to."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        room = self.max_tokens - len(self.before) - len(self.after)
        ids: list[list[int]] = []
        owner: list[int] = []
        for number, encoding in enumerate(backend.encode_batch(list(texts), add_special_tokens=False)):
            tokens = encoding.ids
            start = 0
            while True:
                ids.append(self.before + tokens[start : start + room] + self.after)
                owner.append(number)
                if start + room >= len(tokens):
                    break
                start += room - self.overlap
        return ids, np.array(owner, np.int64)

    def logits(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Logits of every window, float32 [windows, classes], and the number of the text that each belongs to."""
        import torch

        ids, owner = self.windows(texts)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        pad = self.pad or 0
        rows: list[Any] = [None] * len(ids)
        with torch.inference_mode():
            start = 0
            while start < len(order):
                end = start + 1
                while (
                    self.pad is not None  # else texts are read one by one
                    and end < len(order)
                    and (end + 1 - start) * len(ids[order[end]]) <= self.tokens_per_batch
                ):
                    end += 1
                batch = [ids[i] for i in order[start:end]]
                width = max(map(len, batch))
                input_ids = torch.tensor([row + [pad] * (width - len(row)) for row in batch], device=self.device)
                mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=self.device)
                out = self.model(input_ids=input_ids, attention_mask=mask).logits.float().cpu().numpy()
                for i, row in zip(order[start:end], out, strict=True):
                    rows[i] = row
                start = end
        return np.stack(rows), owner

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """Probability of the worst label in the worst window of each text, float64 [texts]."""
        if not texts:
            return np.zeros(0)
        logits, owner = self.logits(texts)
        logits = logits.astype(np.float64)
        if self.activation == "sigmoid":
            p = 1 / (1 + np.exp(-logits))
        else:
            p = np.exp(logits - logits.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
        worst = np.zeros(len(texts))
        np.maximum.at(worst, owner, p[:, list(self.columns)].max(1))
        return worst


BAD_NAMES = {
    "abusive", "bad", "hate", "hateful", "harmful", "insult", "negative", "nsfw", "obscene", "offensive", "profane",
    "profanity", "spam", "threat", "toxic", "toxicity", "unsafe",
}  # fmt: skip
"""Names of labels that say that a text is bad."""
GOOD_NAMES = {"acceptable", "benign", "clean", "good", "ham", "harmless", "neutral", "normal", "ok", "positive", "safe"}
"""Names of labels that say that a text is good."""


def bad_label(names: Sequence[str]) -> str | None:
    """The bad one of one or two labels, by their names; None if the names do not say."""
    kinds = [_kind(name) for name in names]
    if len(names) == 1:
        return None if kinds[0] == "good" else names[0]
    if len(names) != 2 or kinds in (["bad", "bad"], ["good", "good"]) or kinds == [None, None]:
        return None
    return names[kinds.index("bad")] if "bad" in kinds else names[1 - kinds.index("good")]


def _kind(name: str) -> str | None:
    words = re.findall("[a-z]+", name.lower().replace("nontoxic", "non toxic"))
    negated = any(word in ("not", "no", "non", "un") for word in words)
    if any(word in BAD_NAMES for word in words):
        return "good" if negated else "bad"
    if any(word in GOOD_NAMES for word in words):
        return "bad" if negated else "good"
    return None


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after every text."""
    encoding = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True)
    inner = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
    return encoding.ids[: inner[0]], encoding.ids[inner[-1] + 1 :]


def load_classifier(config: Toxicity) -> Classifier:
    """The classifier of a scorer, kept in memory until its files change."""
    return _loaded(config, store.signature(config.model or ""), store.signature(config.checkpoint or ""))


@functools.lru_cache(4)
def _loaded(config: Toxicity, *files: Any) -> Classifier:
    try:
        from transformers import AutoModelForSequenceClassification
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise MissingPackage(f"the scorer 'toxicity' {needs(error.name)}") from None
    transformers_logging.disable_progress_bar()
    if config.checkpoint is None and config.model is None:
        raise ConfigError(
            "scorer.model: name a classifier on the Hub, for example scorer.model=unitary/unbiased-toxic-roberta, or a "
            "folder; without network, fit one to labelled texts with `phf fit-scorer`"
        )
    if config.checkpoint is not None:
        model, path, names = _detoxify(config.checkpoint, config.model, config.revision)
    else:
        assert config.model is not None
        path = config.model
        model = load_pretrained(AutoModelForSequenceClassification, "sequence classifier", path, config.revision)
        names = label_names(model)
    tokenizer = fast_tokenizer(path, config.revision)
    known: Plain = (
        PRESETS.get(path, {}) if config.checkpoint is None else {"labels": ("toxicity",), "activation": "sigmoid"}
    )
    labels = config.labels or known.get("labels")
    if labels is None and (found := bad_label(names)) is not None:
        labels = (found,)
    labels = known_labels(labels, names, path)
    kind = {"multi_label_classification": "sigmoid", "single_label_classification": "softmax"}
    usual = kind.get(model.config.problem_type, {1: "sigmoid", 2: "softmax"}.get(len(names)))
    activation: str | None = config.activation or known.get("activation") or usual
    if model.config.problem_type == "regression" and config.activation is None:
        raise ConfigError(
            f"{path} predicts a number (problem_type: regression), not a probability; if its one output is the logit "
            "of bad text, give scorer.activation=sigmoid, else use scorer.name=callable"
        )
    if activation == "softmax" and len(set(labels)) == len(names):
        raise ConfigError(
            f"scorer.labels names all labels of {path}, and with softmax one of them always applies, so every text "
            "would be bad; leave the good one out, or give scorer.activation=sigmoid"
        )
    if activation is None:
        raise ConfigError(
            f"scorer.activation: {path} has {len(names)} labels; give sigmoid (each label by itself) or softmax "
            "(exactly one label applies)"
        )
    device = pick_device(config.device)
    dtype = config.dtype if config.dtype != "auto" else ("bfloat16" if has_fast_bf16(device) else "float32")
    columns = [names.index(label) for label in labels]
    return Classifier(
        model=model,
        tokenizer=tokenizer,
        path=path,
        labels=labels,
        columns=columns,
        activation=activation,
        dtype=dtype,
        device=device,
        config=config,
    )


def _detoxify(checkpoint: str, base: str | None, revision: str | None) -> tuple[Any, str, list[str]]:
    """The model in a Detoxify checkpoint, where its config comes from, and the names of its outputs.

    The checkpoint is loaded with `weights_only=True`: anything but tensors and plain values is refused.
    """
    import torch
    import transformers

    if checkpoint in DETOXIFY:
        file, version, default_base = DETOXIFY[checkpoint]
        url = f"https://github.com/unitaryai/detoxify/releases/download/{version}/{file}"
        try:
            loaded = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        except OSError as error:
            raise ConfigError(
                f"scorer.checkpoint: cannot download {url} ({error}); download the file and give its path"
            ) from None
    else:
        default_base = None
        if not Path(checkpoint).is_file():
            raise ConfigError(f"scorer.checkpoint: {checkpoint} is neither a file nor one of {', '.join(DETOXIFY)}")
        loaded = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict) or not {"config", "state_dict"} <= set(loaded):
        raise ConfigError(
            f"scorer.checkpoint: {checkpoint} has no config and state_dict, unlike Detoxify's checkpoints"
        )
    arch = loaded["config"]["arch"]["args"]
    path = base or default_base or arch["model_type"]
    state = {k: v for k, v in loaded["state_dict"].items() if not k.endswith("position_ids")}
    config = transformers.AutoConfig.from_pretrained(
        path, revision=revision, num_labels=int(arch["num_classes"]), trust_remote_code=False
    )
    model = transformers.AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ConfigError(
            f"scorer.checkpoint: {checkpoint} does not fit {path}: "
            f"missing {list(missing)[:3]}, unexpected {list(unexpected)[:3]}"
        )
    classes = [LABEL_NAMES.get(c, c) for c in loaded["config"]["dataset"]["args"]["classes"]]
    names = classes + [f"output {i}" for i in range(len(classes), int(arch["num_classes"]))]
    return model, path, names
