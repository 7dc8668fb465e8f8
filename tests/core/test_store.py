from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import pytest

from phf.core import store


@dataclass(frozen=True, kw_only=True)
class Scored(store.Manifest):
    stage: str = "score"
    counts: int = 0


@dataclass(frozen=True, kw_only=True)
class Tokenized(store.Manifest):
    stage: str = "tokenize"


def test_canonical_does_not_depend_on_order():
    assert store.fingerprint({"a": 1, "b": [1.5, None]}) == store.fingerprint({"b": (1.5, None), "a": np.int64(1)})
    assert store.fingerprint({"a": 1}) != store.fingerprint({"a": 2})


def test_json_has_no_nan(tmp_path):
    store.write_json(tmp_path / "a.json", {"x": float("nan"), "y": [np.float32(1.5), float("inf")]})
    assert store.read_json(tmp_path / "a.json") == {"x": None, "y": [1.5, None]}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    store.write_text(tmp_path / "a", "old")

    def full_disk(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        store.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_directory_is_done_only_with_its_manifest_and_key(tmp_path):
    out = tmp_path / "x"
    store.begin(out, "score", "k1")
    assert not store.is_done(out, "k1")
    with pytest.raises(store.StoreError, match="did not finish"):
        store.read_manifest(out, Scored)
    assert store.finish(out, Scored(key="k1", counts=3)) == store.read_manifest(out, Scored)
    assert store.is_done(out, "k1")
    assert not store.is_done(out, "k2")
    with pytest.raises(store.StoreError, match="made by `phf score`"):
        store.read_manifest(out, Tokenized)


def test_begun_work_is_kept_for_the_same_key_only(tmp_path):
    out = tmp_path / "x"
    store.begin(out, "score", "k1")
    (out / "part").write_text("1")
    store.begin(out, "score", "k1")
    assert (out / "part").exists()
    store.begin(out, "score", "k2")
    assert not (out / "part").exists()


def test_a_foreign_directory_is_never_removed(tmp_path):
    (tmp_path / "precious").write_text("1")
    with pytest.raises(store.StoreError, match="not empty"):
        store.begin(tmp_path, "score", "k")
    store.begin(tmp_path / "x", "train", "k")
    with pytest.raises(store.StoreError, match="output of `phf train`"):
        store.begin(tmp_path / "x", "score", "k")
    assert (tmp_path / "precious").exists()


def test_damaged_json_says_what_to_do(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(store.StoreError, match="run the stage again"):
        store.read_json(tmp_path / "manifest.json")


def test_what_a_killed_process_left_half_written_is_no_hindrance(tmp_path):
    out = tmp_path / "x"
    out.mkdir()
    (out / "..started.json.123.partial").write_text("{")
    (out / ".part-00000.parquet.123.partial").write_text("half")
    store.begin(out, "score", "k")
    assert [p.name for p in out.iterdir()] == [".started.json"]


def test_hash_of_a_path_follows_its_content(tmp_path):
    (tmp_path / "a").write_text("1")
    before = store.path_hash(tmp_path)
    (tmp_path / "a").write_text("2")
    assert store.path_hash(tmp_path) != before
    assert store.path_hash("owner/name") is None
