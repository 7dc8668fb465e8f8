from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phf.data.segment import Documents, Lines, Paragraphs, Sentences, Windows

SEGMENTERS = [Lines(), Sentences(), Paragraphs(), Documents(), Windows(7)]
TEXT = st.one_of(st.text(), st.text(alphabet=" .!?\n\r\tab\x0b\x0c\u2028é漢🙂\x00"))


@pytest.mark.parametrize("segmenter", SEGMENTERS, ids=lambda s: s.name)
@given(text=TEXT)
@settings(max_examples=200, deadline=None)
def test_segments_joined_are_the_text_and_none_is_empty(segmenter, text):
    segments = segmenter.split(text)
    assert "".join(segments) == text
    assert all(segments)
    assert bool(segments) == bool(text)


def test_a_newline_ends_its_own_line():
    assert Lines().split("a\n    b\n\nc") == ["a\n", "    b\n", "\n", "c"]
    assert Lines().split("a\r\nb\x0cc\u2028d") == ["a\r\n", "b\x0cc\u2028d"]


def test_space_between_sentences_belongs_to_the_following_one():
    """Defect 8: a sentence must start with the leading-space token that it has everywhere else."""
    assert Sentences().split("One is here. Two is there!  Three?") == ["One is here.", " Two is there!", "  Three?"]
    assert Sentences().split("One.\n\nTwo. ") == ["One.", "\n\nTwo. "]


def test_paragraphs_keep_blank_lines_with_the_following_one():
    assert Paragraphs().split("a\nb\n\nc\n\n\nd\n") == ["a\nb\n", "\nc\n", "\n\nd\n"]


def test_windows():
    assert Windows(3).split("abcdefgh") == ["abc", "def", "gh"]
