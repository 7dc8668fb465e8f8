from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from phf.core import folders, locks, store


@dataclass(frozen=True, kw_only=True)
class Scored(folders.Manifest):
    stage: str = "score"
    counts: int = 0


@dataclass(frozen=True, kw_only=True)
class Tokenized(folders.Manifest):
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


def make(out, key="k1", stage="score", **options):
    with folders.stage_folder(out, stage, key, **options):
        pass


def test_a_directory_is_done_only_with_its_manifest_and_key(tmp_path):
    out = tmp_path / "x"
    make(out)
    assert not folders.is_done(out, "k1")
    with pytest.raises(store.StoreError, match="did not finish"):
        folders.read_manifest(out, Scored)
    assert folders.finish(out, Scored(key="k1", counts=3)) == folders.read_manifest(out, Scored)
    assert folders.is_done(out, "k1")
    assert not folders.is_done(out, "k2")
    with pytest.raises(store.StoreError, match="but by `phf score`"):
        folders.read_manifest(out, Tokenized)


def test_begun_work_is_kept_for_the_same_key_and_other_work_is_moved_aside(tmp_path, capsys):
    out = tmp_path / "x"
    make(out)
    (out / "part").write_text("1")
    (out / "note of the user").write_text("mine")
    make(out)
    assert (out / "part").exists()
    make(out, "k2")
    assert [p.name for p in out.iterdir()] == [".started.json"]
    assert (tmp_path / "x.old-1" / "part").read_text() == "1"
    assert (tmp_path / "x.old-1" / "note of the user").read_text() == "mine"
    assert "x.old-1" in capsys.readouterr().err
    (out / "part").write_text("2")
    make(out, "k3")
    assert (tmp_path / "x.old-2" / "part").read_text() == "2"
    make(out, "k4")  # nothing was made under k3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "x.old-1", "x.old-2"]


def test_a_foreign_directory_is_never_touched(tmp_path):
    (tmp_path / "precious").write_text("1")
    with pytest.raises(store.StoreError, match="not empty"):
        make(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]
    make(tmp_path / "x", stage="train")
    with pytest.raises(store.StoreError, match="output of `phf train`"):
        make(tmp_path / "x")
    with pytest.raises(store.StoreError, match="is a file"):
        make(tmp_path / "precious")


def test_a_link_to_another_disk_stays_a_link(tmp_path):
    real = tmp_path / "disk" / "real"
    real.mkdir(parents=True)
    (tmp_path / "x").symlink_to(real)
    make(tmp_path / "x")
    (tmp_path / "x" / "part").write_text("1")
    make(tmp_path / "x", "k2")
    assert (tmp_path / "x").is_symlink()
    assert (real / ".started.json").exists()
    assert (tmp_path / "disk" / "real.old-1" / "part").read_text() == "1"


def test_a_mount_point_keeps_its_place(tmp_path, monkeypatch):
    out = tmp_path / "x"
    make(out)
    (out / "part").write_text("1")
    monkeypatch.setattr(os.path, "ismount", lambda path: os.fspath(path) == os.fspath(out))
    make(out, "k2")
    assert sorted(p.name for p in out.iterdir()) == [".started.json", "content.old-1"]
    assert (out / "content.old-1" / "part").read_text() == "1"
    assert folders.started(out).key == "k2"


def test_one_writer_at_a_time_and_the_error_names_it(tmp_path):
    out = tmp_path / "x"
    with folders.stage_folder(out, "score", "k"):
        for key in ("k", "other"):
            with pytest.raises(locks.Busy, match=rf"written by `phf score` \(process {os.getpid()} on"):
                make(out, key)
        assert not list(tmp_path.glob("*.old-*"))
    make(out, "other")
    assert not (out / ".lock").exists()


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    code = (
        "import sys, time\nfrom phf.core import folders\n"
        "with folders.stage_folder(sys.argv[1], 'score', 'k'):\n    print('held', flush=True)\n    time.sleep(600)"
    )
    out = tmp_path / "x"
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(locks.Busy, match=f"process {process.pid} "):
        make(out)
    process.kill()
    process.wait()
    assert (out / ".lock").exists()
    make(out)
    assert [p.name for p in out.iterdir()] == [".started.json"]


def test_readers_share_a_lock_and_keep_a_writer_out(tmp_path):
    with (
        locks.locked(tmp_path, "eval", shared=True),
        locks.locked(tmp_path, "redteam", shared=True),
        pytest.raises(locks.Busy),
        locks.locked(tmp_path, "train"),
    ):
        pass
    with locks.locked(tmp_path, "train"), pytest.raises(locks.Busy), locks.locked(tmp_path, "eval", shared=True):
        pass


def test_a_lease_on_an_object_store_ends_when_it_is_not_renewed(monkeypatch):
    folder = store.as_path("memory://lease/x")
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(locks, "SETTLE_SECONDS", 0.0)
    taken = pytest.raises(locks.Busy, match=f"process {os.getpid()} ")
    with locks.locked(folder, "score"), taken, locks.locked(folder, "score"):
        pass
    assert not (folder / ".lock").exists()
    (folder / ".lock").write_text('{"lease": "other", "until": 1.0}')  # of a process that was killed
    with locks.locked(folder, "score"):
        pass


def test_on_an_object_store_other_work_is_only_removed_on_request(monkeypatch):
    monkeypatch.setattr(locks, "SETTLE_SECONDS", 0.0)
    out = store.as_path("memory://overwrite/x")
    make(out)
    (out / "part-00000.json").write_text("{}")
    with pytest.raises(store.StoreError, match="--overwrite"):
        make(out, "k2")
    assert (out / "part-00000.json").exists()
    (out / "note").write_text("of the user")
    with pytest.raises(store.StoreError, match="also holds note"):
        make(out, "k2", overwrite=True)
    (out / "note").unlink()
    make(out, "k2", overwrite=True)
    assert folders.started(out).key == "k2"


def damaged(tmp_path, change):
    out = tmp_path / "x"
    with folders.stage_folder(out, "score", "k"):
        (out / "inner").mkdir()
        (out / "inner" / "a.bin").write_bytes(b"0123456789")
        folders.finish(out, Scored(key="k", files=folders.file_marks(out, folders.files_below(out))))
    assert folders.is_done(out, "k")
    change(out / "inner" / "a.bin")
    return out


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda file: file.unlink(), "a.bin is missing"),
        (lambda file: file.write_bytes(b"01234"), "a.bin has 5 bytes instead of 10"),
    ],
)
def test_missing_and_cut_files_are_seen_at_every_open(tmp_path, change, message):
    out = damaged(tmp_path, change)
    for read in (lambda: folders.read_manifest(out, Scored), lambda: folders.is_done(out, "k")):
        with pytest.raises(store.StoreError, match=message):
            read()


def test_a_flipped_bit_is_seen_where_a_stage_is_said_to_be_done(tmp_path):
    out = damaged(tmp_path, lambda file: file.write_bytes(b"0123456788"))
    with pytest.raises(store.StoreError, match="other bytes"):
        folders.is_done(out, "k")


def test_damaged_json_says_what_to_do(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(store.StoreError, match="run its stage again"):
        store.read_json(tmp_path / "manifest.json")


def test_what_a_killed_process_left_half_written_is_no_hindrance(tmp_path):
    out = tmp_path / "x"
    out.mkdir()
    (out / "..started.json.123.partial").write_text("{")
    (out / ".part-00000.parquet.123.partial").write_text("half")
    make(out)
    assert [p.name for p in out.iterdir()] == [".started.json"]


def test_hash_of_a_path_follows_its_content(tmp_path):
    (tmp_path / "a").write_text("1")
    before = store.path_hash(tmp_path)
    (tmp_path / "a").write_text("2")
    assert store.path_hash(tmp_path) != before
    assert store.path_hash("owner/name") is None
