"""An objective of the user's own, by name: `objective.name=mine.py:Focal objective.gamma=2`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core.code import load_named
from phf.core.config import STRICT, ConfigError, Plain, did_you_mean, to_plain
from phf.core.types import Block, Edit, Piece
from phf.objectives.base import LossInputs, LossOutputs, Objective, ValueShape
from phf.objectives.tensors import Tensor
from phf.tokens.statistics import Statistics


@dataclass(frozen=True, config=STRICT)
class Own(Objective):
    """An objective of your own: `objective` is `module:Class` or `path/to/file.py:Class`, a frozen dataclass derived
    from `phf.Objective`, and `settings` are its fields. `{name: mine.py:Focal, gamma: 2}` is short for it."""

    objective: str
    settings: Plain = Field(default_factory=dict)
    name: Literal["own"] = "own"

    def __post_init__(self) -> None:
        try:
            _ = self.inner
        except ConfigError as error:
            raise ValueError(str(error)) from None

    @cached_property
    def inner(self) -> Objective:
        """The objective itself."""
        cls: Any = load_named(self.objective, "objective")
        if not (isinstance(cls, type) and issubclass(cls, Objective) and dataclasses.is_dataclass(cls)):
            raise ConfigError(f"{self.objective} is not a dataclass derived from phf.Objective")
        known = [f.name for f in dataclasses.fields(cls) if f.init]
        for setting in self.settings:
            if setting not in known:
                raise ConfigError(f"{self.objective} has no setting {setting!r}{did_you_mean(setting, known)}")
        try:
            made: Objective = pydantic.TypeAdapter(cls).validate_python(dict(self.settings))
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{self.objective}: {where}: {first['msg']}") from None
        return made

    def _with(self, inner: Objective) -> Own:
        return dataclasses.replace(self, settings=to_plain(inner))

    @property
    def bad_above(self) -> float | None:
        return self.inner.bad_above

    @property
    def roles(self) -> dict[str, str]:
        return self.inner.roles

    @property
    def conditions_on(self) -> tuple[str, ...]:
        return self.inner.conditions_on

    @property
    def worst(self) -> tuple[str, ...]:
        return self.inner.worst

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return self.inner.pieces

    @property
    def hidden_token(self) -> str | None:
        return self.inner.hidden_token

    @property
    def timeline(self) -> tuple[tuple[Objective, float | None], ...]:
        return tuple((self if member is self.inner else member, until) for member, until in self.inner.timeline)

    @property
    def preferences(self) -> tuple[str, ...] | None:
        return self.inner.preferences

    @property
    def reference_model(self) -> str | None:
        return self.inner.reference_model

    def with_reference(self, path: str) -> Objective:
        return self if self.reference_model is None else self._with(self.inner.with_reference(path))

    @property
    def value(self) -> ValueShape | None:
        return self.inner.value

    @property
    def value_reaches_trunk(self) -> bool:
        return self.inner.value_reaches_trunk

    def fit(self, statistics: Statistics) -> Objective:
        fitted = self.inner.fit(statistics)
        return self if fitted is self.inner else self._with(fitted)

    def remarks(self, statistics: Statistics) -> list[str]:
        return self.inner.remarks(statistics)

    def edit(self, block: Block, seed: int) -> Edit:
        return self.inner.edit(block, seed)

    def counted(self, score_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return self.inner.counted(score_BT, mask_BT)

    def weights(self, score_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.weights(score_BT, mask_BT)

    def loss(self, x: LossInputs) -> LossOutputs:
        return self.inner.loss(x)


def spelled_out(value: Any) -> Any:
    """`{name: mine.py:Focal, gamma: 2}` as the settings of `Own`."""
    if isinstance(value, Mapping) and isinstance(value.get("name"), str) and ":" in value["name"]:
        settings = {key: part for key, part in value.items() if key != "name"}
        return {"name": "own", "objective": value["name"], "settings": settings}
    return value
