"""The names and ids of a saved tokenizer, where transformers is not installed: enough for rows with control tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phf.core.extras import MissingPackage, needs
from phf.core.store import read_json


class Vocabulary:
    """What `tokenizer.json` and `tokenizer_config.json` in a folder say of names and ids. It has the members of a
    tokenizer of transformers that control tokens need; text can be neither encoded nor decoded."""

    def __init__(self, folder: Path) -> None:
        saved = read_json(folder / "tokenizer.json")
        config = read_json(folder / "tokenizer_config.json")
        vocabulary = saved["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [name, log-probability]
            vocabulary = {name: i for i, (name, _) in enumerate(vocabulary)}
        self._model_size = len(vocabulary)
        self._ids: dict[str, int] = vocabulary | {token["content"]: token["id"] for token in saved["added_tokens"]}
        self._added = [token["id"] for token in saved["added_tokens"]]
        self._special = {token["content"] for token in saved["added_tokens"] if token["special"]}
        end = config["eos_token"]
        self.eos_token: str = end["content"] if isinstance(end, dict) else end

    @property
    def eos_token_id(self) -> int:
        return self._ids[self.eos_token]

    @property
    def all_special_tokens(self) -> list[str]:
        return sorted({self.eos_token, *self._special}, key=self._ids.__getitem__)

    def get_vocab(self) -> dict[str, int]:
        """The id of each entry."""
        return dict(self._ids)

    def convert_tokens_to_ids(self, name: str) -> int:
        """The id of an entry. Raises KeyError."""
        return self._ids[name]

    def add_special_tokens(self, tokens: dict[str, list[str]], **_: Any) -> None:
        """Add special tokens, with the ids that the tokenizer gives them."""
        for name in tokens["additional_special_tokens"]:
            self._ids.setdefault(name, max(self._model_size, max(self._added, default=-1) + 1))
            self._added.append(self._ids[name])
            self._special.add(name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise MissingPackage(f"a tokenizer of text {needs('transformers')}", name="transformers")
