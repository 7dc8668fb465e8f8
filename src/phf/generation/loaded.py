"""TODO."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from phf.core import store
from phf.core.config import ConfigError
from phf.core.device import has_quick_bf16
from phf.core.runs import MODEL_CARD, model_folder
from phf.data.segment import Documents, Segmenter, known_segmenter
from phf.generation.decoding import QUICK
from phf.generation.scenario import Scenario
from phf.tokens.tokenizer import encode_segments, load_tokenizer
from phf.training.fused import PLAIN, LogitShape
from phf.training.lm import logit_shape, pretrained_lm


@plain_dataclass(frozen=True)
class LoadedModel:
    """An LM ready for judging, its tokenizer and its control tokens ({"good": id, "bad": id} or empty)."""

    lm: Any
    tokenizer: Any
    control_ids: dict[str, int]
    path: str
    start: int | None = None
    """What a text begins with; None: the end-of-text token, as in phf's own models."""
    shape: LogitShape = PLAIN
    segmenter: Segmenter | None = None
    """How its training texts were cut into segments, each tokenised by itself; None: not at all, or not known."""
    threshold: float | None = None
    """Scores above it had the bad token in training, as far as is known."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without control tokens, cut as in training."""
        pieces = (self.segmenter or Documents()).split(text)
        return [i for ids in encode_segments(self.tokenizer, pieces) for i in ids]

    def continuation(self, start: Sequence[int], written: Sequence[int]) -> str:
        """The text of `written` behind `start`: some tokenizers (SentencePiece's) drop the space that a text begins with, but
        not one in its middle."""
        special = {self.start_id, *self.control_ids.values()}
        spoken = [i for i in start if i not in special]
        alone = self._decode(written)
        if not spoken:
            return alone
        before, whole = self._decode(spoken), self._decode([*spoken, *written])
        return whole[len(before) :] if whole.startswith(before) else alone

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [..., V] from hidden states [..., D]. Never those of a copy rounded to bfloat16, which has steps of
        1/4 among logits of 32 to 64, where GPT-2's lie."""
        head = self.lm.get_output_embeddings()
        return self.shape(head(hidden.to(head.weight.dtype)).float())

    def only_text(self, logits: Tensor) -> Tensor:
        """`logits` [..., V] of which control tokens and the padding of the vocabulary have no share (in place)."""
        logits[..., list(self.control_ids.values())] = float("-inf")
        logits[..., len(self.tokenizer) :] = float("-inf")
        return logits

    @property
    def start_id(self) -> int:
        return int(self.tokenizer.eos_token_id if self.start is None else self.start)

    @property
    def positions(self) -> int:
        """How many tokens the model reads at most."""
        return getattr(self.lm.config, "max_position_embeddings", None) or sys.maxsize


CONTROL_TOKENS = ({"good": "<|good|>", "bad": "<|bad|>"}, {"good": "<|aligned|>", "bad": "<|misaligned|>"})
"""By which a model that does not say so is known to be conditional: phf's, and the reference implementation's."""


def load_model(path: str | Path, revision: str | None = None) -> LoadedModel:
    """Any causal LM from a folder or the Hub, in evaluation mode. A run's folder stands for its final model. Control
    tokens are those that `phf.json` beside the model names or, of a model trained elsewhere, those of `CONTROL_TOKENS`;
    such a model's texts begin with its own beginning-of-text token, where it has one."""
    from transformers.utils import logging as hf_logging
    from transformers.utils.hub import cached_file

    hf_logging.disable_progress_bar()
    source = model_folder(path)
    lm = pretrained_lm(path, revision).eval()
    shape = logit_shape(lm)
    if torch.cuda.is_available():
        lm = lm.to("cuda")
    tokenizer = load_tokenizer(source, revision)
    card = cached_file(source, MODEL_CARD, revision=revision, _raise_exceptions_for_missing_entries=False)
    about = store.read_json(card) if card is not None else {"control_tokens": _known_control_tokens(tokenizer, path)}
    control_ids = {k: tokenizer.convert_tokens_to_ids(v) for k, v in about["control_tokens"].items()}
    segmenter = known_segmenter(about.get("segmenter"))
    threshold = (about.get("objective") or {}).get("threshold")
    return LoadedModel(
        lm, tokenizer, control_ids, str(path), None if card is not None else tokenizer.bos_token_id, shape, segmenter,
        threshold if isinstance(threshold, int | float) else None,
    )  # fmt: skip


def _known_control_tokens(tokenizer: Any, path: str | Path) -> dict[str, str]:
    added = tokenizer.get_added_vocab()
    for names in CONTROL_TOKENS:
        if all(name in added for name in names.values()):
            print(f"note: {path}: {names['good']} and {names['bad']} are taken for its control tokens", file=sys.stderr)
            return names
    return {}


def check_lengths(model: LoadedModel, scenario: Scenario, starts: Sequence[Sequence[int]]) -> None:
    """Raise ConfigError unless the model can read what its texts begin with and as many tokens behind it as are asked for."""
    longest = max(map(len, starts), default=0)
    if longest + scenario.max_tokens > model.positions:
        raise ConfigError(
            f"prompts of up to {longest} tokens and max_tokens={scenario.max_tokens} exceed the model's {model.positions} positions"
        )


def precision_of(model: LoadedModel, scenario: Scenario) -> Literal["bf16", "fp32"]:
    """What a scenario's `precision` stands for with this model, here."""
    if scenario.precision != "auto":
        return scenario.precision
    return "bf16" if model.lm.config.model_type in QUICK and has_quick_bf16(model.lm.device.type) else "fp32"


def prompt_ids(model: LoadedModel, prompt: str, scenario: Scenario) -> list[int]:
    """What a text begins with, the control token, the prompt as text (or the control token after it)."""
    control = [model.control_ids[scenario.control]] if scenario.control in model.control_ids else []
    text = model.encode(prompt)
    middle = [*text, *control] if scenario.control_after_prompt else [*control, *text]
    return [model.start_id, *middle]


def other_token(model: LoadedModel, scenario: Scenario) -> list[int]:
    """The control token that a scenario bans: the one that it does not ask for."""
    other = {"good": "bad", "bad": "good", "none": "bad"}[scenario.control]
    return [model.control_ids[other]] if other in model.control_ids else []
