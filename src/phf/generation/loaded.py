"""A model that is ready for sampling and judging: the LM, its tokenizer and its control tokens."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from phf.core.config import ConfigError, did_you_mean
from phf.core.device import has_fast_bf16
from phf.core.runs import MODEL_RECORD, ModelRecord, model_folder, model_record
from phf.core.text import counted
from phf.core.types import Roles
from phf.data.segment import Documents, Segmenter, known_segmenter
from phf.generation.fast_copy import TESTED_FAMILIES
from phf.generation.scenario import Scenario
from phf.objectives import BAD, GOOD
from phf.tokens.tokenizer import check_model_fits, encode_segments, load_tokenizer
from phf.training.batches import document_positions
from phf.training.fused import PLAIN, LogitShape
from phf.training.lm import pretrained_lm
from phf.training.probe import before_output, check_causal, logit_shape


@dataclass(frozen=True, kw_only=True)
class ModelTokens:
    """The tokenizer of an LM and its control tokens."""

    tokenizer: Any
    control_ids: dict[str, int]
    """Token ids by role: {"good": id, "bad": id}, for example, or empty."""
    path: str
    start: int | None = None
    """The token that starts every text; None: end-of-text, as for phf's own models."""
    segmenter: Segmenter | None = None
    """How the training texts were cut into segments that are tokenized one by one; None: not cut, or not known."""
    threshold: float | None = None
    """Segments with a score above it had the bad token in training; None: not known."""
    conditions_on: tuple[str, ...] = ()
    """The roles whose tokens go before what the model shall write."""
    worst: tuple[str, ...] = ()
    """The roles whose tokens ask for bad text."""
    document_mask: bool = False
    """Whether tokens attended only to their own document in training."""

    def roles_of(self, control: str) -> tuple[str, ...]:
        """The roles that a scenario's `control` means; none for a model without them. Raises ConfigError for a role
        that the model does not have."""
        known = {"good": self.conditions_on, "bad": self.worst, "none": ()}
        if control in self.control_ids:
            return (control,)
        if control not in known:
            hint = did_you_mean(control, [*known, *self.control_ids])
            raise ConfigError(f"{self.path} has no control token for control={control}{hint}")
        return known[control]

    @property
    def of_preference(self) -> str | None:
        """The preference whose scores chose the control tokens, where their roles name one (each)."""
        named = {role.rpartition(":")[0] for role in self.conditions_on}
        return named.pop() or None if len(named) == 1 else None

    @property
    def control(self) -> Roles:
        """The control tokens with their roles."""
        names = {role: str(self.tokenizer.convert_ids_to_tokens(id)) for role, id in self.control_ids.items()}
        return Roles(names, self.conditions_on, self.worst)

    @property
    def is_pair(self) -> bool:
        """Whether the control tokens are one for good segments and one for bad ones."""
        return len(self.control_ids) == 2 and len(self.conditions_on) == len(self.worst) == 1

    def ids_of(self, control: str) -> list[int]:
        """Ids of the control tokens that `control` puts first."""
        return [self.control_ids[role] for role in self.roles_of(control)]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, cut as in training. Without control tokens."""
        pieces = (self.segmenter or Documents()).split(text)
        return [i for ids in encode_segments(self.tokenizer, pieces) for i in ids]

    def asked(self, text: str, chat: bool) -> list[int]:
        """Token ids of a question: by the chat template, or after the token that starts a text. Special tokens in the
        question are text."""
        tokenizer = self.tokenizer
        if not chat:
            bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            return [bos, *encode_segments(tokenizer, [text])[0]]
        for name in tokenizer.all_special_tokens:
            text = text.replace(name, f"{name[:1]} {name[1:]}")
        whole = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        return list(tokenizer(whole, add_special_tokens=False, split_special_tokens=False)["input_ids"])

    def continuation(self, start: Sequence[int], written: Sequence[int]) -> str:
        """The text of `written` after `start`. Both are decoded together, because SentencePiece tokenizers drop the
        space at the beginning of a text but not in its middle."""
        special = {self.start_id, *self.control_ids.values()}
        prompt = [i for i in start if i not in special]
        alone = self._decode(written)
        if not prompt:
            return alone
        before = self._decode(prompt)
        whole = self._decode([*prompt, *written])
        return whole[len(before) :] if whole.startswith(before) else alone

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @property
    def start_id(self) -> int:
        return int(self.tokenizer.eos_token_id if self.start is None else self.start)

    @property
    def positions(self) -> int:
        """The model's longest context."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LoadedModel(ModelTokens):
    """An LM with its tokenizer and its control tokens."""

    lm: Any
    shape: LogitShape = PLAIN

    def hidden(self, input_BT: Tensor) -> Tensor:
        """Hidden states [B, T, D] of rows of documents, read as in training."""
        positions = document_positions(input_BT, self.start_id) if self.document_mask else None
        given = {} if positions is None else {"position_ids": positions}
        found: Tensor = self.lm.base_model(input_ids=input_BT, use_cache=False, **given).last_hidden_state
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [..., V] from hidden states [..., D]. In bfloat16, logits of 32 to 64, such as GPT-2's, would
        have steps of 1/4."""
        head = self.lm.get_output_embeddings()
        layers = before_output(self.lm)
        hidden = hidden if layers is None else layers(hidden)
        return self.shape(head(hidden.to(head.weight.dtype)).float())

    def only_text(self, logits: Tensor) -> Tensor:
        """`logits` [..., V] with control tokens and ids without a token excluded, in place."""
        logits[..., list(self.control_ids.values())] = float("-inf")
        logits[..., self.unused_ids] = float("-inf")
        return logits

    @cached_property
    def unused_ids(self) -> Tensor:
        """Rows of the model's table that belong to no token: padding, and holes of the vocabulary."""
        rows = len(self.lm.get_output_embeddings().weight)
        used = torch.zeros(rows, dtype=torch.bool)
        used[list(self.tokenizer.get_vocab().values())] = True
        return torch.nonzero(~used).squeeze(1).to(self.lm.device)

    def never_written(self, banned: Sequence[int]) -> Tensor:
        """Ids that sampling never draws: `banned`, and those that belong to no token."""
        return torch.tensor([*banned, *self.unused_ids.tolist()], dtype=torch.long, device=self.lm.device)

    @cached_property
    def silent_V(self) -> np.ndarray:
        """Whether each row of the model's table is a control token, which no reader of a sample sees."""
        found = np.zeros(len(self.lm.get_output_embeddings().weight), bool)
        found[list(self.control_ids.values())] = True
        return found

    @property
    def positions(self) -> int:
        return positions_of(self.lm.config)


WELL_KNOWN_TOKENS = ({"good": GOOD, "bad": BAD}, {"good": "<|aligned|>", "bad": "<|misaligned|>"})
"""Control tokens of phf and of the reference implementation. A model without a record that has them is conditional."""


def load_model(path: str | Path, revision: str | None = None) -> LoadedModel:
    """A causal LM from a folder or the Hub, in evaluation mode. For a run's folder, its final model.

    Control tokens are those that `phf.json` next to the model names. A model from elsewhere has those of
    `WELL_KNOWN_TOKENS`, and its texts start with its own beginning-of-text token if it has one.

    Raises ConfigError for a folder or name without a usable model.
    """
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    lm = pretrained_lm(path, revision).eval()
    shape = logit_shape(lm)
    check_causal(lm)
    if torch.cuda.is_available():
        lm = lm.to("cuda")
    tokens = load_model_tokens(path, revision)
    check_model_fits(tokens.tokenizer, len(lm.get_output_embeddings().weight), f"model {path}")
    return LoadedModel(lm=lm, shape=shape, **vars(tokens))


def load_model_tokens(path: str | Path, revision: str | None = None) -> ModelTokens:
    """The tokenizer and the control tokens of a model in a folder or on the Hub, without its weights. Errors and rules
    as `load_model`."""
    source = model_folder(path)
    record = _record(source, revision)
    tokenizer = load_tokenizer(source, revision, as_it_is=record is None)
    guessed = {} if record is not None else _guessed_control_tokens(tokenizer, path)
    roles = (ModelRecord(control_tokens=guessed) if record is None else record).roles
    names = roles.tokens
    vocabulary = tokenizer.get_vocab()
    if unknown := [name for name in names.values() if name not in vocabulary] or (
        ["two roles for one token"] if len(set(names.values())) < len(names) else []
    ):
        raise ConfigError(f"model {path}: {MODEL_RECORD} names control tokens that its tokenizer lacks: {unknown[0]}")
    return ModelTokens(
        tokenizer=tokenizer,
        control_ids={role: vocabulary[name] for role, name in names.items()},
        path=str(path),
        start=None if record is not None else tokenizer.bos_token_id,
        segmenter=None if record is None else known_segmenter(record.segmenter),
        threshold=None if record is None else record.bad_above,
        conditions_on=roles.conditions_on,
        worst=roles.worst,
        document_mask=record is not None and record.document_mask,
    )


def _record(source: str, revision: str | None) -> ModelRecord | None:
    """`phf.json` next to a model, local or on the Hub."""
    from transformers.utils.hub import cached_file

    file = cached_file(source, MODEL_RECORD, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if file is None else model_record(file)


def _guessed_control_tokens(tokenizer: Any, path: str | Path) -> dict[str, str]:
    added = tokenizer.get_added_vocab()
    for names in WELL_KNOWN_TOKENS:
        if all(name in added for name in names.values()):
            print(f"note: {path}: taking {names['good']} and {names['bad']} for its control tokens", file=sys.stderr)
            return names
    return {}


def positions_of(config: Any) -> int:
    """The longest context of a model with this config."""
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def check_room(positions: int, scenario: Scenario, starts: Sequence[Sequence[int]]) -> None:
    """Raise ConfigError unless the model's context holds the starts of its texts and `max_tokens` more."""
    longest = max(map(len, starts), default=0)
    if longest + scenario.max_tokens > positions:
        raise ConfigError(
            f"prompts of up to {counted(longest, 'token')} and max_tokens={scenario.max_tokens} exceed the model's "
            f"{positions} positions"
        )


def precision_of(model: LoadedModel, scenario: Scenario) -> Literal["bf16", "fp32"]:
    """The precision of sampling: the scenario's, or for "auto" what suits the model and the processor."""
    if scenario.precision != "auto":
        return scenario.precision
    tested = model.lm.config.model_type in TESTED_FAMILIES
    return "bf16" if tested and has_fast_bf16(model.lm.device.type) else "fp32"


def prompt_ids(model: ModelTokens, prompt: str, scenario: Scenario) -> list[int]:
    """Token ids that a sample starts with: the start token, then control token and prompt in the scenario's order."""
    control = model.ids_of(scenario.control)
    text = model.encode(prompt)
    middle = [*text, *control] if scenario.control_after_prompt else [*control, *text]
    return [model.start_id, *middle]


def can_be_asked(model: ModelTokens, scenario: Scenario) -> bool:
    """Whether the model has the control tokens that a scenario needs."""
    return scenario.lacks(model.control) is None


def banned_tokens(model: ModelTokens, control: str) -> list[int]:
    """The control tokens that a scenario bans: all that it does not put first. Without any first, those that the model
    conditions on are allowed."""
    allowed = model.roles_of("good" if control == "none" else control)
    return [i for role, i in model.control_ids.items() if role not in allowed]
