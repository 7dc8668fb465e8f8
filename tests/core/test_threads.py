"""Threads spin briefly on a busy machine, and as the user says."""

from __future__ import annotations

import os

import pytest

from phf.core.threads import SPIN, wait_briefly


@pytest.mark.parametrize(
    "load, given, expected",
    [
        (3.0, {}, SPIN),
        (0.1, {}, {}),
        (3.0, {"OMP_WAIT_POLICY": "ACTIVE"}, {}),
        (3.0, {"GOMP_SPINCOUNT": "7"}, {**SPIN, "GOMP_SPINCOUNT": "7"}),
    ],
)
def test_the_load_decides_and_a_users_setting_wins(monkeypatch, load, given, expected):
    for name in (*SPIN, "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    wait_briefly()
    assert {name: os.environ[name] for name in SPIN if name in os.environ} == expected
    for name in SPIN:
        monkeypatch.delenv(name, raising=False)
