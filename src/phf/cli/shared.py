"""What the commands share: settings on the command line, tables in the terminal."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[FILE.yaml|a.b=c]...", help="Recipe files, merged left to right, then settings."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Settings, for example num_samples=64.")
]


def split_settings(arguments: list[str] | None) -> tuple[list[str], list[str]]:
    arguments = arguments or []
    return [a for a in arguments if "=" not in a], [a for a in arguments if "=" in a]


def laid_on(config: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`a.b=c` settings laid on `config`."""
    from phf.core.config import merge, parse_override

    for override in overrides:
        config = merge(config, parse_override(override))
    return config


def only_overrides(arguments: list[str] | None) -> list[str]:
    from phf.core.config import ConfigError

    files, overrides = split_settings(arguments)
    if files:
        raise ConfigError(f"unexpected argument {files[0]!r}: settings have the form a.b=c")
    return overrides


def mapping(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Takes the settings `name.*` out of `config`."""
    from phf.core.config import ConfigError

    value = config.pop(name, {})
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: expected {name}.SETTING=VALUE, got {name}={value}")
    return value


def known_keys(config: dict[str, Any], known: tuple[str, ...]) -> None:
    from phf.core.config import ConfigError, did_you_mean

    for key in config:
        if key not in known:
            raise ConfigError(f"unknown setting {key!r}{did_you_mean(key, known)}")


def print_table(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    for number, line in enumerate([head, *rows]):
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))
