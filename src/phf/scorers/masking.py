"""Hide personal data in texts that are shown: the letters and digits of what a scorer finds become dots."""

from __future__ import annotations

import re

from phf.core.config import ConfigError
from phf.core.text import visible
from phf.core.types import Span
from phf.scorers.base import Scorer

UNMASKED = ("match", "word")
"""Labels whose text is shown. PEP8's codes (a letter and digits) are shown too."""


def find_spans(text: str, scorer: Scorer) -> list[Span] | None:
    """What the scorer finds. None if it fails on the text: such a text is not judged anywhere in phf."""
    if not text:
        return []
    try:
        return scorer.spans(text)
    except (KeyboardInterrupt, MemoryError, ConfigError):
        raise
    except Exception:
        return None


def mask(text: str, scorer: Scorer) -> str:
    """`text` with the letters and digits of personal data replaced; all of them where the scorer fails."""
    spans = find_spans(text, scorer)
    if spans is None:
        spans = [Span(0, len(text), "not judged")]
    for span in spans:
        if is_masked(span.label):
            masked = "".join("•" if c.isalnum() else c for c in text[span.start : span.end])
            text = text[: span.start] + masked + text[span.end :]
    return text


_LINK = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)


def mask_links(text: str) -> str:
    """`text` with the letters and digits of links replaced. A link next to a name that is masked often holds it."""
    return _LINK.sub(lambda m: "".join("•" if c.isalnum() else c for c in m.group()), text)


def without_personal_data(text: str, scorer: Scorer) -> str:
    """`text` with personal data and links masked if the scorer looks for personal data."""
    return mask_links(mask(text, scorer)) if scorer.finds_personal_data else text


def shown_text(text: str, scorer: Scorer) -> str:
    """`text` as a page shows it: without personal data."""
    return visible(without_personal_data(text, scorer))


def is_masked(label: str) -> bool:
    """Whether finds of this kind are masked: everything personal, links too. Coding style is shown."""
    is_code = len(label) == 4 and label[0] in "EWCN" and label[1:].isdigit()
    return not is_code and label not in UNMASKED
