"""Progress: a line a minute where there is no terminal."""

from __future__ import annotations

import re

import pytest

from phf.core import progress
from phf.core.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_a_line_a_minute(clock, capsys):
    for _ in Progress(range(300), desc="attacking", unit="prompt"):
        clock[0] += 1.0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[0] == "    attacking: 60 of 300 prompts, 1 a second; about 240 s left"
    assert lines[-1].startswith("    attacking: 300 of 300 prompts")


def test_short_work_says_nothing_and_counts(clock, capsys):
    with Progress(total=10, initial=4, desc="scoring", unit="shard") as bar:
        clock[0] += 59
        bar.update(3)
    assert bar.n == 7
    assert capsys.readouterr().err == ""
    clock[0] += 2
    bar.update(1)
    assert re.search(r"scoring: 8 of 10 shards, 0.0656 a second; about 30 s left", capsys.readouterr().err)


def test_silent_work_says_nothing(clock, capsys):
    for _ in Progress(range(3), silent=True):
        clock[0] += 100
    assert capsys.readouterr().err == ""
