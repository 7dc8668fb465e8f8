"""Packages that a plain `pip install phf` does not bring. The token store, its rows and the edits of objectives need
none of them. What needs one says which extra brings it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from phf.core.config import ConfigError

NAMES = {
    "lm_eval": "lm-eval",
    "olmo_core": "ai2-olmo-core",
    "presidio_analyzer": "presidio-analyzer",
    "sklearn": "scikit-learn",
}
"""Packages that an index has under another name than `import` does."""


class MissingPackage(ConfigError, ModuleNotFoundError):
    """A package that is not installed."""

    def __init__(self, message: str, name: str | None = None) -> None:
        ModuleNotFoundError.__init__(self, message, name=name)


@functools.cache
def _extras() -> dict[str, str]:
    """The smallest extra that brings each package, by phf's own metadata."""
    brings: dict[str, set[str]] = {}
    for needed in metadata.requires("phf") or ():
        package = re.match(r"[\w.-]+", needed)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", needed)
        if package and extra and extra[1] not in ("dev", "docs"):
            brings.setdefault(extra[1], set()).add(package[0].lower())
    largest_first = sorted(brings, key=lambda extra: len(brings[extra]), reverse=True)
    return {package: extra for extra in largest_first for package in brings[extra]}


def needs(module: str | None) -> str:
    """What to say of a module that is not there: needs torch: pip install 'phf[train]'."""
    top = (module or "a package").split(".")[0]
    package = NAMES.get(top, top)
    extra = _extras().get(package.lower())
    return f"needs {top}: pip install " + (f"'phf[{extra}]'" if extra else package)


def named(error: Exception, what: str) -> Exception:
    """A missing module of phf's extras as MissingPackage, any other error as it is. `what`: who needs it."""
    if not isinstance(error, ModuleNotFoundError) or isinstance(error, MissingPackage):
        return error
    top = (error.name or "").split(".")[0]
    known = NAMES.get(top, top).lower() in _extras()
    return MissingPackage(f"{what} {needs(top)}", name=error.name) if known else error


@contextlib.contextmanager
def naming_extras(what: str) -> Iterator[None]:
    """Raise MissingPackage for a module of phf's extras that is not there. `what`: who needs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise named(error, what) from None


class _Missing:
    """Stands for a module that is not installed."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":  # inspection asks for these
            raise AttributeError(name)
        raise MissingPackage(f"phf {needs(self._module)}", name=self._module)


def optional(module: str) -> Any:
    """A module, or what raises MissingPackage when it is used."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        return _Missing(module)
