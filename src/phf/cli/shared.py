"""What the commands share: settings on the command line, tables in the terminal.

Modules of the command line import the rest of phf inside functions, so that `phf --help` is fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phf.cli import completing

if TYPE_CHECKING:
    from phf.core.config import Plain
    from phf.scorers import Scorer


def finite(value: float | None) -> float | None:
    """A number of the command line that is no NaN and no infinity."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FILE.yaml|a.b=c]...",
        help="Recipe files, merged from left to right, then settings.",
        autocompletion=completing.stage,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[a.b=c]...", help="Settings, for example num_samples=64.", autocompletion=completing.scenario
    ),
]
AnotherScorer = Annotated[
    str | None,
    typer.Option(
        help="Scorer to use instead of the corpus's. Names and scorer.* settings are those of `phf score`.",
        autocompletion=completing.scorers,
    ),
]
MayDiffer = Annotated[bool, typer.Option("--other-scorer", help="Allow a scorer that differs from the corpus's.")]
OwnThreshold = Annotated[
    float | None, typer.Option(callback=finite, help="Scores above it are bad. Default: the scorer's own threshold.")
]
MovedTokens = Annotated[str | None, typer.Option(help="The token store, if it has moved since training.")]
ModelOut = Annotated[str | None, typer.Option(help="Folder for the results of a model that is not a run.")]


def split_settings(arguments: list[str] | None) -> tuple[list[str], list[str]]:
    """(files or folders, settings of the form a.b=c)"""
    from phf.core.config import is_setting

    arguments = arguments or []
    return [a for a in arguments if not is_setting(a)], [a for a in arguments if is_setting(a)]


def only_overrides(arguments: list[str] | None) -> list[str]:
    """The settings. Raises ConfigError for any other argument."""
    from phf.core.config import ConfigError

    files, overrides = split_settings(arguments)
    if files:
        raise ConfigError(f"unexpected argument {files[0]!r}: settings have the form a.b=c")
    return overrides


def take(config: Plain, name: str) -> Plain:
    """Remove the settings `name.*` from `config` and return them."""
    from phf.core.config import ConfigError, Typed

    value = config.pop(name, {})
    value = value.as_yaml() if isinstance(value, Typed) else value
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: expected {name}.SETTING=VALUE, got {name}={value}")
    return value


def known_keys(config: Plain, known: tuple[str, ...]) -> None:
    """Raise ConfigError for settings whose first part is not known."""
    from phf.core.config import ConfigError, did_you_mean

    for key in config:
        if key not in known:
            raise ConfigError(f"unknown setting {key!r}{did_you_mean(key, known)}")


def checked(value: Any, type_: Any, prefix: str = "") -> Any:
    """Settings of the command line as a `type_`. `prefix`: the setting that `value` is. Raises ConfigError that lists
    every problem."""
    from phf.core.config import COMMAND_LINE, validate

    return validate(value, type_, COMMAND_LINE, prefix=prefix)


def scorer_option(name: str | None, fields: Plain) -> Scorer | None:
    """The scorer of --scorer with its `scorer.*` settings; None if the corpus's own scorer judges."""
    from phf.core.config import ConfigError
    from phf.scorers import AnyScorer

    if name is None:
        if fields:
            raise ConfigError("scorer.* settings need --scorer: without it the corpus's own scorer judges")
        return None
    scorer: Scorer = checked({"name": name, **fields}, AnyScorer, "scorer")
    return scorer


def is_url(model: str) -> bool:
    """Whether a model is on a server."""
    return model.startswith(("http://", "https://"))


def folder_name(model: str) -> str:
    """A folder name for the results of a model from elsewhere."""
    return model.strip("/").replace("/", "--")


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns, the first to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for number, line in enumerate(lines):
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))
