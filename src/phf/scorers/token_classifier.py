"""Scores from a classifier of tokens: a text is as bad as its worst token.

    phf score corpus.jsonl scored/ --scorer token_classifier scorer.model=owner/name
    phf tokenize scored/ tokens/ --token-scores --scorer token_classifier scorer.model=owner/name

Any Hugging Face token classifier works. A segment longer than the model's context is read in overlapping windows.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core import store
from phf.core.config import STRICT, ConfigError
from phf.core.device import pick_device
from phf.core.extras import MissingPackage, needs
from phf.core.types import Identity, Span
from phf.scorers.base import Scorer
from phf.scorers.pretrained import (
    fast_tokenizer,
    known_labels,
    label_names,
    load_pretrained,
    padding_id,
    weights_hash,
    window_size,
)

OUTSIDE = "O"
"""The usual name of the label for tokens that are nothing special."""


@dataclass(frozen=True, config=STRICT)
class TokenClassifier(Scorer):
    """The probability that a token classifier gives to `labels` together, for the worst token of a text.

    `model`: a folder or a name on the Hub. `labels`: those that mean bad; all but "O" where the model has it.
    """

    name: Literal["token_classifier"] = "token_classifier"
    model: str | None = None
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    labels: tuple[str, ...] | None = None
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Tokens with a larger probability are faults."""
    max_tokens: Annotated[int, Field(gt=8)] = 512
    """Tokens of a text that are read together."""
    device: str = "auto"
    """For example cuda:1; auto: a GPU if there is one."""

    @property
    def names(self) -> dict[str, str]:
        return {} if self.model is None else {"model": self.model}

    @property
    def bad_above(self) -> float:
        return self.threshold

    @property
    def judges_by_document(self) -> bool:
        return False

    def identity(self) -> Identity:
        loaded = _load(self)
        return {
            "name": self.name,
            "unit": "probability",
            "model": self.model,
            "weights": loaded.weights_hash,
            "tokenizer": loaded.tokenizer_hash,
            "labels": list(loaded.labels),
            "max_tokens": loaded.max_tokens,
        }

    def token_spans(self, text: str) -> list[Span]:
        return _load(self).spans(text)

    def spans(self, text: str) -> list[Span]:
        return [span for span in self.token_spans(text) if span.score > self.threshold]

    def score_text(self, text: str) -> float:
        return max((span.score for span in self.token_spans(text)), default=0.0) if text else float("nan")

    def judge_segments(self, segments: Sequence[str]) -> tuple[list[float], Counter[str]]:
        found = [self.token_spans(segment) for segment in segments]
        scores = [
            max((span.score for span in spans), default=0.0) if segment else float("nan")
            for spans, segment in zip(found, segments, strict=True)
        ]
        return scores, Counter(span.label for spans in found for span in spans if span.score > self.threshold)


class _Loaded:
    """A loaded token classifier."""

    def __init__(self, model: Any, tokenizer: Any, labels: Sequence[str], names: Sequence[str], config: Any) -> None:
        self.labels = labels
        self.names = names
        self.columns = [names.index(label) for label in labels]
        self.max_tokens = window_size(model, tokenizer, config.max_tokens)
        self.pad = padding_id(model, tokenizer) or 0
        self.tokenizer = tokenizer
        self.tokenizer_hash = store.bytes_hash(tokenizer.backend_tokenizer.to_str().encode())
        self.weights_hash = weights_hash(model)
        self.device = pick_device(config.device)
        self.model = model.to(self.device).float().eval()

    def spans(self, text: str) -> list[Span]:
        """A span for each token of the classifier, with its probability of being bad: that of the worst window."""
        import torch

        read = self.tokenizer(
            text,
            truncation=True,
            max_length=self.max_tokens,
            stride=self.max_tokens // 8,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        windows = read["input_ids"]
        if not any(windows):
            return []
        ids = torch.full((len(windows), max(map(len, windows))), self.pad)
        attend = torch.zeros_like(ids)
        for w, window in enumerate(windows):
            ids[w, : len(window)] = torch.tensor(window)
            attend[w, : len(window)] = 1
        with torch.inference_mode():
            out = self.model(input_ids=ids.to(self.device), attention_mask=attend.to(self.device))
        p_WTL = torch.softmax(out.logits.double(), -1).cpu().numpy()
        found: dict[tuple[int, int], Span] = {}
        for p_TL, places in zip(p_WTL, read["offset_mapping"], strict=True):
            for p_L, (start, end) in zip(p_TL, places, strict=False):
                if start == end:  # special tokens
                    continue
                bad_L = p_L[self.columns]
                score = float(min(bad_L.sum(), 1.0))
                if (start, end) not in found or found[start, end].score < score:
                    label = self.names[self.columns[int(np.argmax(bad_L))]]
                    found[start, end] = Span(start, end, label, score)
        return [found[place] for place in sorted(found)]


def _load(config: TokenClassifier) -> _Loaded:
    """The classifier of a scorer, kept in memory until its files change."""
    return _loaded(config, store.signature(config.model or ""))


@functools.lru_cache(2)
def _loaded(config: TokenClassifier, *files: Any) -> _Loaded:
    try:
        from transformers import AutoModelForTokenClassification
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise MissingPackage(f"the scorer 'token_classifier' {needs(error.name)}") from None
    if config.model is None:
        raise ConfigError("scorer.model: name a token classifier on the Hub, or a folder")
    transformers_logging.disable_progress_bar()
    path = config.model
    model = load_pretrained(AutoModelForTokenClassification, "token classifier", path, config.revision)
    tokenizer = fast_tokenizer(path, config.revision)
    names = label_names(model)
    labels = config.labels
    if labels is None and OUTSIDE in names and len(names) > 1:
        labels = tuple(name for name in names if name != OUTSIDE)
    labels = known_labels(labels, names, path)
    if len(set(labels)) == len(names):
        raise ConfigError(
            f"scorer.labels names all labels of {path}, so every token would be bad; leave a good one out"
        )
    return _Loaded(model, tokenizer, labels, names, config)
