"""Segmenters: where a document is cut into segments.

Law, tested for any Unicode: no segment is empty, and the segments joined are exactly the text. White space between
sentences belongs to the *following* segment, so a sentence starts with the leading-space token that it has everywhere
else. A newline ends its own line, so indentation stays with its line.
"""

from __future__ import annotations

import functools
import re
from importlib import metadata
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core.config import STRICT, ConfigError, Plain, validate
from phf.core.text import broken_runs
from phf.core.types import Document


class Segmenter:
    """Interface. `ends(text)`: the exclusive ends of the segments in characters, increasing, the last one
    `len(text)`."""

    def ends(self, text: str) -> list[int]:
        raise NotImplementedError

    @property
    def libraries(self) -> dict[str, str]:
        """Versions of the libraries that decide where texts are cut."""
        return {}

    def split(self, text: str) -> list[str]:
        """The segments of `text`. An empty text has none."""
        ends = self.ends(text)
        return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True, config=STRICT)
class Lines(Segmenter):
    r"""One segment per line; each line keeps its "\n". "\n" and "\r\n" end a line; "\x0c" and U+2028 do not."""

    name: Literal["lines"] = "lines"

    def ends(self, text: str) -> list[int]:
        ends = [m.end() for m in re.finditer("\n", text)]
        return ends if not text or (ends and ends[-1] == len(text)) else [*ends, len(text)]


@dataclass(frozen=True, config=STRICT)
class Sentences(Segmenter):
    """Sentences by spaCy's rule-based sentencizer on a blank pipeline, as in the paper's toxicity and PII tasks."""

    name: Literal["sentences"] = "sentences"
    language: str = "en"
    """Language of the rules, in two letters."""

    @property
    def libraries(self) -> dict[str, str]:
        return {"spacy": metadata.version("spacy")}

    def ends(self, text: str) -> list[int]:
        if not text:
            return []
        ends: list[int] = []
        nlp = _sentencizer(self.language)
        with nlp.memory_zone():  # else every new word stays in memory for ever
            for sent in nlp(broken_runs(text)).sents:
                end = sent.start_char + len(sent.text.rstrip())
                if end > (ends[-1] if ends else 0):
                    ends.append(end)
        if not ends:
            return [len(text)]
        ends[-1] = len(text)  # no sentence follows white space at the very end
        return ends


@functools.cache
def _sentencizer(language: str) -> Any:
    import spacy

    try:
        nlp = spacy.blank(language)
    except (ImportError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"segmenter.language: spaCy cannot cut {language!r} into sentences here: {reason}") from None
    nlp.add_pipe("sentencizer")
    nlp.max_length = 2**31  # the limit protects parsers' memory; a sentencizer needs none
    return nlp


@dataclass(frozen=True, config=STRICT)
class Paragraphs(Segmenter):
    """Blank lines end a paragraph and belong to the paragraph that follows."""

    name: Literal["paragraphs"] = "paragraphs"

    def ends(self, text: str) -> list[int]:
        ends = []
        for space in re.finditer(r"\s+", text):
            between = space.start() > 0 and space.end() < len(text)  # a paragraph of white space alone is none
            if between and (blank_line := re.search(r"\n(?=[ \t\r]*\n)", space.group())):
                ends.append(space.start() + blank_line.start() + 1)
        return [*ends, len(text)] if text else []


@dataclass(frozen=True, config=STRICT)
class Documents(Segmenter):
    """The whole document is one segment."""

    name: Literal["documents"] = "documents"

    def ends(self, text: str) -> list[int]:
        return [len(text)] if text else []


@dataclass(frozen=True, config=STRICT)
class Windows(Segmenter):
    """Windows of `chars` characters; the last one may be shorter."""

    chars: Annotated[int, Field(gt=0)]
    name: Literal["windows"] = "windows"

    def ends(self, text: str) -> list[int]:
        return [*range(self.chars, len(text), self.chars), len(text)] if text else []


Cut = Lines | Sentences | Paragraphs | Documents | Windows


@dataclass(frozen=True, config=STRICT)
class Given(Segmenter):
    """The segments that the corpus comes with: a list of strings per document, as in the published scored datasets. A
    document that comes as one string is one segment. `cut`: how they were cut, if that is known; samples and other
    texts are then cut in the same way."""

    cut: Annotated[
        Cut | None, Field(discriminator="name", title="segmenter", exclude_if=lambda value: value is None)
    ] = None
    name: Literal["given"] = "given"

    def ends(self, text: str) -> list[int]:
        return [len(text)] if text else []


def segments_of(document: Document, segmenter: Segmenter) -> tuple[str, ...]:
    """The segments of a document: those that it came with, or as they are cut. An uncut document is one segment."""
    cut = document.segments if isinstance(segmenter, Given) else segmenter.split(document.text)
    return tuple(cut or (document.text,))


AnySegmenter = Annotated[Cut | Given, Field(discriminator="name", title="segmenter")]


def known_segmenter(config: Plain | None) -> Segmenter | None:
    """The segmenter that a manifest names. None if the corpus came in segments and nothing says how they were
    cut."""
    if config is None:
        return None
    found: Segmenter = validate(config, AnySegmenter, "the manifest", prefix="segmenter")
    return found.cut if isinstance(found, Given) else found


def segmenter_from(config: Plain | None) -> Segmenter:
    """The segmenter that a manifest names, or lines if it is not known."""
    return known_segmenter(config) or Lines()
