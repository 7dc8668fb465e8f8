"""The pages: a comparison of runs, and the scores of a corpus. `phf.report(folder)` is `write_report`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any


class _Report(ModuleType):
    """The package is a function too: the command `phf report` has its name."""

    def __call__(self, folder: str | Path, out: str | Path | None = None, **settings: Any) -> Path:
        from phf.core.config import ConfigError
        from phf.core.extras import naming_extras

        with naming_extras("phf.report", "report"):
            from phf.report.page import write_report

        for value, what in ((folder, "folder"), (out, "out")):
            if not isinstance(value, str | Path) and not (what == "out" and value is None):
                raise ConfigError(f"{what}: expected a path, got {value!r}")
        return write_report(folder, out, **settings)


sys.modules[__name__].__class__ = _Report
