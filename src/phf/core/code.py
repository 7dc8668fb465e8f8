"""A user's own code, named as `module:name` or `path/to/file.py:name`."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from phf.core import store
from phf.core.config import ConfigError, did_you_mean


def load_named(spec: str, what: str) -> Callable[..., Any]:
    """The function or class. Its file is read again after a change. `what` it is, for messages. Raises ConfigError for
    a name that does not lead to one, and for whatever the code raises while it is imported."""
    return _loaded(spec, what, store.signature(spec.rpartition(":")[0]))


@contextlib.contextmanager
def _importing(spec: str, what: str, where: str) -> Iterator[None]:
    """Whatever the user's code raises while it is imported, as one message."""
    try:
        yield
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # SystemExit too: a script that was not meant to be imported
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"{what} {spec!r}: cannot import {where}: {type(error).__name__}: {error} "
            f"({Path(line.filename).name}, line {line.lineno})"
        ) from None


@functools.cache
def _loaded(spec: str, what: str, files: Any) -> Callable[..., Any]:
    where, _, name = spec.rpartition(":")
    if not where or not name.isidentifier():
        raise ConfigError(f"{what} {spec!r}: expected module:name or path/to/file.py:name")
    if where.endswith(".py"):
        path = Path(where).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(f"{what} {spec!r}: there is no file {path}")
        # a name of its own: another file of this name, or this file before a change, may be loaded too
        own = f"{path.stem}_{store.fingerprint([str(path), files])[:8]}"
        found = importlib.util.spec_from_file_location(own, path)
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules[own] = module
        with _importing(spec, what, where):
            found.loader.exec_module(module)
    else:
        with _importing(spec, what, where):
            module = importlib.import_module(where)
    if not callable(getattr(module, name, None)):
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ConfigError(f"{what} {spec!r}: {where} has no {what} {name!r}{did_you_mean(name, known)}")
    found_there: Callable[..., Any] = getattr(module, name)
    return found_there
