"""The tokenizer of a release: it starts every text with end-of-text and the tokens that the model conditions on,
and reads control tokens that are typed in a text as text."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from phf.core import store
from phf.core.config import Plain
from phf.core.types import PhfError, Roles
from phf.tokens.tokenizer import save_tokenizer


class ReleaseError(PhfError, RuntimeError):
    """A release that does not behave as it should."""


def set_start(folder: Path, roles: Roles) -> None:
    """Let the tokenizer put end-of-text and the tokens that the model conditions on before every text, after what its
    post-processor does already."""
    from tokenizers import Tokenizer, processors

    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    eos = end_of_text(folder)
    first = [eos, *roles.first]
    # placeholders, because the names of tokens may hold characters with a meaning in templates
    pieces = [f"first{n}" for n in range(len(first))]
    known = [{"id": p, "ids": [tokenizer.token_to_id(t)], "tokens": [t]} for p, t in zip(pieces, first, strict=True)]
    template = processors.TemplateProcessing(single=[*pieces, "$A"], pair=[*pieces, "$A", "$B"], special_tokens=known)
    before = tokenizer.post_processor
    keep = before is not None and type(before).__name__ == "ByteLevel"
    tokenizer.post_processor = processors.Sequence([before, template]) if keep else template
    store.write_text(path, tokenizer.to_str(pretty=True))
    positions = store.read_json(folder / "config.json").get("max_position_embeddings")
    changes: Plain = {"split_special_tokens": True, "add_bos_token": None, "add_eos_token": None}
    changes |= {"pad_token": eos, "padding_side": "left"}  # for pipelines that read batches
    changes |= {} if positions is None else {"model_max_length": positions}
    config = store.read_json(folder / "tokenizer_config.json") | changes
    store.write_json(folder / "tokenizer_config.json", {k: v for k, v in config.items() if v is not None})


def end_of_text(folder: Path) -> str:
    """The end-of-text token of the tokenizer in a folder."""
    eos = store.read_json(folder / "tokenizer_config.json")["eos_token"]
    return str(eos["content"] if isinstance(eos, dict) else eos)


def first_tokens(tokenizer: Any, roles: Roles) -> list[int]:
    """Ids of the tokens that every text starts with."""
    return [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(roles.first)]


def check_start(tokenizer: Any, roles: Roles, quiet: bool = False) -> None:
    """Raise ReleaseError unless texts start with `first_tokens`, typed control tokens are text, and decoding gives a
    text back, or one with the same tokens, which is noted unless `quiet`."""
    first = first_tokens(tokenizer, roles)
    text = "A text " + " ".join(roles.tokens.values())
    ids = tokenizer(text)["input_ids"]
    if ids[: len(first)] != first:
        raise ReleaseError(f"the tokenizer starts a text with {ids[: len(first)]}, not with {first}")
    control = {tokenizer.convert_tokens_to_ids(name) for name in roles.tokens.values()}
    if control & set(ids[len(first) :]):
        raise ReleaseError(f"the tokenizer reads a typed control token as the token: {text!r}")
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    if decoded == text:
        return
    if tokenizer(decoded)["input_ids"] != ids:
        raise ReleaseError(f"the tokenizer decodes the tokens of {text!r} to {decoded!r}")
    if not quiet:
        print(f"note: the tokenizer changes texts: it reads {text!r} as {decoded!r}", file=sys.stderr)


def try_start(tokenizer: Any, roles: Roles, model_type: str) -> None:
    """Make the tokenizer of a release from one that has the control tokens `roles`, and test it: what cannot be
    released is better not trained. Raises ReleaseError that says what is wrong."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tokenizer(tokenizer, folder)
        store.write_json(folder / "config.json", {"model_type": model_type})
        set_start(folder, roles)
        check_start(AutoTokenizer.from_pretrained(name, trust_remote_code=False), roles, quiet=True)
