"""Segmenters: where one document is cut. Floor 1.

The law (tested for any Unicode): the segments of a document are not empty and joined they are exactly its text.
White space between sentences belongs to the *following* segment, so that a sentence keeps the leading-space token it
has everywhere else; a newline ends its own line, so that indentation is never glued to the line before.
"""

from __future__ import annotations

import functools
import re
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from phf.core.config import STRICT


class Segmenter:
    """Interface: `ends(text)` are the exclusive ends of the segments in characters, increasing, the last `len(text)`."""

    def ends(self, text: str) -> list[int]:
        raise NotImplementedError

    def split(self, text: str) -> list[str]:
        """The segments of `text` (none for an empty text)."""
        ends = self.ends(text)
        return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True, config=STRICT)
class Lines(Segmenter):
    r"""One segment a line; each line keeps its "\n". Only "\n" ends a line ("\r\n" does too, "\x0c" or U+2028 do not)."""

    name: Literal["lines"] = "lines"

    def ends(self, text: str) -> list[int]:
        ends = [m.end() for m in re.finditer("\n", text)]
        return ends if not text or (ends and ends[-1] == len(text)) else [*ends, len(text)]


@dataclass(frozen=True, config=STRICT)
class Sentences(Segmenter):
    """Sentences by spaCy's rule-based sentencizer on a blank pipeline, as the paper has them (REFERENCE: toxicity, PII)."""

    name: Literal["sentences"] = "sentences"
    language: str = "en"

    def ends(self, text: str) -> list[int]:
        if not text:
            return []
        ends: list[int] = []
        for sent in _sentencizer(self.language)(text).sents:
            end = sent.start_char + len(sent.text.rstrip())
            if end > (ends[-1] if ends else 0):
                ends.append(end)
        if not ends:
            return [len(text)]
        ends[-1] = len(text)  # white space at the very end has no following sentence
        return ends


@functools.cache
def _sentencizer(language: str) -> Any:
    import spacy

    nlp = spacy.blank(language)
    nlp.add_pipe("sentencizer")
    nlp.max_length = 2**31  # the limit guards parsers' memory; a sentencizer has no such need
    return nlp


@dataclass(frozen=True, config=STRICT)
class Paragraphs(Segmenter):
    """Blank lines end a paragraph; they belong to the paragraph that follows."""

    name: Literal["paragraphs"] = "paragraphs"

    def ends(self, text: str) -> list[int]:
        inner = [m.start() + 1 for m in re.finditer(r"\n(?=[ \t\r]*\n[\s]*\S)", text)]
        ends: list[int] = []
        for end in inner:  # keep the first newline of a run of blank lines, and no paragraph of white space alone
            if text[(ends[-1] if ends else 0) : end].strip():
                ends.append(end)
        return [*ends, len(text)] if text else []


@dataclass(frozen=True, config=STRICT)
class Documents(Segmenter):
    """The whole document is one segment."""

    name: Literal["documents"] = "documents"

    def ends(self, text: str) -> list[int]:
        return [len(text)] if text else []


@dataclass(frozen=True, config=STRICT)
class Windows(Segmenter):
    """Windows of `chars` characters; the last may be shorter."""

    chars: Annotated[int, Field(gt=0)]
    name: Literal["windows"] = "windows"

    def ends(self, text: str) -> list[int]:
        return [*range(self.chars, len(text), self.chars), len(text)] if text else []


@dataclass(frozen=True, config=STRICT)
class Given(Segmenter):
    """The segments that the corpus comes with (a list of strings for each text, as the published scored data sets have
    it); a text that comes whole is one segment."""

    name: Literal["given"] = "given"

    def ends(self, text: str) -> list[int]:
        return [len(text)] if text else []


AnySegmenter = Annotated[Lines | Sentences | Paragraphs | Documents | Windows | Given, Field(discriminator="name")]


def known_segmenter(config: dict[str, Any] | None) -> Segmenter | None:
    """What a manifest's `segmenter` stands for; None where the corpus came cut by somebody else."""
    if config is None or config["name"] == "given":
        return None
    return TypeAdapter(AnySegmenter).validate_python(config)  # type: ignore[no-any-return]


def segmenter_from(config: dict[str, Any] | None) -> Segmenter:
    """The same; lines where it is not known."""
    return known_segmenter(config) or Lines()
