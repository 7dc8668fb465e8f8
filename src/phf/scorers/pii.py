"""Personally identifiable information: entities per character, by scrubadub. Floor 2, extra `pii`.

The paper's scorer counts what scrubadub finds (Korbak et al. 2023, section 4). Links and Twitter handles are among its
default entities; in README texts they are nearly all of the hits. Every segment is judged by itself, so an entity that
spans two segments (a user name on one line, its password on the next) is not seen.
"""

from __future__ import annotations

import functools
from importlib import metadata
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from phf.config import STRICT, ConfigError
from phf.scorers.base import Scorer
from phf.types import Span


@dataclass(frozen=True, config=STRICT)
class PII(Scorer):
    """scrubadub's default detectors for US English. Overlapping entities are merged, as scrubadub does."""

    name: Literal["pii"] = "pii"

    def identity(self) -> dict[str, Any]:
        scrubber = _scrubber()
        return {
            "name": self.name,
            "unit": "entities per character",
            "package": "scrubadub",
            "version": metadata.version("scrubadub"),
            "phonenumbers": metadata.version("phonenumbers"),
            "locale": "en_US",
            "detectors": sorted(scrubber._detectors),
        }

    def spans(self, text: str) -> list[Span]:
        return [Span(f.beg, f.end, _label(f)) for f in _scrubber().iter_filth(text)]


def _label(filth: Any) -> str:
    """The kind of entity; of merged ones the kinds joined by '+'."""
    merged = getattr(filth, "filths", None)
    return "+".join(sorted({f.type for f in merged})) if merged else str(filth.type)


@functools.cache
def _scrubber() -> Any:
    try:
        import scrubadub
    except ImportError:
        raise ConfigError("the scorer 'pii' needs scrubadub: pip install 'phf[pii]'") from None
    # The locale decides which phone numbers count; left alone it would be the machine's.
    return scrubadub.Scrubber(locale="en_US")
