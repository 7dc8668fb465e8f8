"""One writer per folder: a lock that ends with its process, however that ends.

On this machine's file systems the lock is flock(2) on `.lock`, which the system releases when the process dies, also by
`kill -9`. An object store has no locks: there the file is a lease that its holder renews, and that another process may
take once it has not been renewed for `LEASE_SECONDS`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from phf.core.config import Plain
from phf.core.store import StoreError, is_local, refresh

LOCK = ".lock"
"""Name of the lock file in a folder that is being written."""
LEASE_SECONDS = 300.0
"""How long a lease on an object store is valid after it was last renewed."""
SETTLE_SECONDS = 0.5
"""How long a new lease waits for one that was written at the same time."""


class Busy(StoreError):
    """Another process writes into the folder."""


def _holder(stage: str) -> Plain:
    return {"stage": stage, "pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv)[:500]}


def _busy(folder: Path, text: str) -> Busy:
    """The error that names the process that holds a lock. `text`: what it wrote into the lock file."""
    try:
        found = json.loads(text)
        who = f"`phf {found['stage']}` (process {found['pid']} on {found['host']}: {found['command']})"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return Busy(f"{folder} is being written by {who}; wait until it has ended, or give another folder")


@contextlib.contextmanager
def locked(folder: Path, stage: str, shared: bool = False) -> Iterator[None]:
    """Hold the lock of an existing folder inside the block. Raises Busy, which names the process that holds it.

    `shared`: others may hold it too if they share it; together they keep out a stage that would replace the folder.
    """
    if not is_local(folder):
        with _leased(folder, stage):
            yield
        return
    file = folder / LOCK
    handle = _flock(file, shared)
    if handle is None:
        raise _busy(folder, _text(file))
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(_holder(stage)).encode(), 0)
        yield
    finally:
        _release(handle)


def _flock(file: Path, shared: bool) -> int | None:
    """A handle that holds the lock of a file; None if another process holds it."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError as error:  # a file system without locks
            why = error.strerror
            print(f"note: {file.parent} cannot be locked ({why}); run one command at a time", file=sys.stderr)
            return handle
        with contextlib.suppress(FileNotFoundError):
            if os.stat(file).st_ino == os.fstat(handle).st_ino:
                return handle
        os.close(handle)  # the file was removed or moved with its folder in between


def _release(handle: int) -> None:
    """Release a lock and remove its file, wherever its folder is now."""
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # others may share it: then the file stays
        path = Path(os.readlink(f"/proc/self/fd/{handle}")) if os.path.exists("/proc/self/fd") else None
        if path is not None and path.exists() and path.stat().st_ino == os.fstat(handle).st_ino:
            path.unlink()
    os.close(handle)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


@contextlib.contextmanager
def _leased(folder: Path, stage: str) -> Iterator[None]:
    """Hold the lease of a folder on an object store."""
    file = folder / LOCK
    own = uuid.uuid4().hex

    def write() -> None:
        file.write_text(json.dumps(_holder(stage) | {"lease": own, "until": time.time() + LEASE_SECONDS}))

    def read() -> Plain:
        try:
            found: Plain = json.loads(refresh(file).read_text())
            return found
        except (OSError, ValueError):
            return {}

    def check() -> None:
        found = read()
        if found.get("lease", own) != own and found.get("until", 0) > time.time():
            raise _busy(folder, json.dumps(found))

    check()
    write()
    time.sleep(SETTLE_SECONDS)
    check()  # of two that started at the same time, the one that wrote last continues
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(LEASE_SECONDS / 4):
            with contextlib.suppress(OSError):
                write()

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            if read().get("lease") == own:
                file.unlink()
