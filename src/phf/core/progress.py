"""Progress of long work: a bar in a terminal, a line a minute in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

LINE_EVERY = 60.0
"""Seconds between lines in a log file."""


class Progress(tqdm):  # type: ignore[misc]
    """tqdm's bar on standard error. Where that is no terminal, a line a minute says how far the work is, at which rate
    and how long it will still take."""

    def __init__(self, iterable: Iterable[Any] | None = None, *, silent: bool = False, **settings: Any) -> None:
        self.silent = silent
        self.what = str(settings.get("desc", ""))
        self.counted_in = str(settings.get("unit", "step"))
        super().__init__(iterable, disable=True if silent else None, file=sys.stderr, **settings)
        self.started = self.said = time.monotonic()
        self.first = self.n

    def __iter__(self) -> Iterator[Any]:
        if not self.disable:
            yield from super().__iter__()
            return
        for item in self.iterable:
            yield item
            self.update()

    def update(self, n: float | None = 1) -> Any:
        if not self.disable:
            return super().update(n)
        self.n += n or 0
        now = time.monotonic()
        if not self.silent and now - self.said >= LINE_EVERY:
            self.said = now
            print(self.line(now), file=sys.stderr, flush=True)
        return None

    def line(self, now: float) -> str:
        rate = (self.n - self.first) / max(now - self.started, 1e-9)
        of = f" of {self.total:,.0f}" if self.total else ""
        left = f"; about {(self.total - self.n) / rate:,.0f} s left" if self.total and rate > 0 else ""
        return f"    {self.what}: {self.n:,.0f}{of} {self.counted_in}s, {rate:.3g} a second{left}"
