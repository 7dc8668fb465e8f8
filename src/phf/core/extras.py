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
    "olmo_core": "ai2-olmo-core",
    "sklearn": "scikit-learn",
}
"""Packages that an index has under another name than `import` does."""


class MissingPackage(ConfigError, ModuleNotFoundError):
    """A package that is not installed."""

    def __init__(self, message: str, name: str | None = None) -> None:
        ModuleNotFoundError.__init__(self, message, name=name)


@functools.cache
def _extras() -> dict[str, set[str]]:
    """The packages that each extra brings, by phf's own metadata; the smallest extra first."""
    brings: dict[str, set[str]] = {}
    for needed in metadata.requires("phf") or ():
        package = re.match(r"[\w.-]+", needed)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", needed)
        if package and extra and extra[1] not in ("dev", "docs"):
            brings.setdefault(extra[1], set()).add(_plain(package[0]))
    return dict(sorted(brings.items(), key=lambda item: len(item[1])))


def _plain(name: str) -> str:
    """The form in which names of packages are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _package(module: str | None) -> str:
    top = (module or "").split(".")[0]
    return _plain(NAMES.get(top, top))


def needs(module: str | None, extra: str | None = None) -> str:
    """What to say of a module that is not there: needs torch: pip install 'phf[train]'. `extra`: the one to name if it
    brings the package; else it is the smallest that does."""
    package = _package(module)
    bring = [name for name, packages in _extras().items() if package in packages]
    chosen = extra if extra in bring else next(iter(bring), None)
    return f"needs {(module or 'a package').split('.')[0]}: pip install " + (
        f"'phf[{chosen}]'" if chosen else package or "it"
    )


def named(error: Exception, what: str, extra: str | None = None) -> Exception:
    """A missing module of phf's extras as MissingPackage, any other error as it is. `what`: who needs it. `extra`: as
    for `needs`."""
    if not isinstance(error, ModuleNotFoundError) or isinstance(error, MissingPackage):
        return error
    if not any(_package(error.name) in packages for packages in _extras().values()):
        return error
    return MissingPackage(f"{what} {needs(error.name, extra)}", name=error.name)


@contextlib.contextmanager
def naming_extras(what: str, extra: str | None = None) -> Iterator[None]:
    """Raise MissingPackage for a module of phf's extras that is not there. The arguments are those of `named`."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise named(error, what, extra) from None


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
