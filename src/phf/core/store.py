"""Directories that are either whole or absent, and say what made them. Floor 0.

Each stage of phf writes one directory with a `manifest.json`: what made it, from what (by fingerprint), counts and
versions. The manifest is written last and by rename, so a directory without one is not finished: a rerun completes it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


class StoreError(ValueError):
    """A directory that is not what a stage expected."""


def as_path(path: str | Path) -> Path:
    """A path on this machine, or, for `s3://bucket/...`, `hf://datasets/owner/name` and whatever else fsspec knows, a
    path object over that file system. Raises StoreError where the package for it is missing."""
    if not isinstance(path, str):
        return path
    protocol, sep, _ = path.partition("://")
    if not sep:
        return Path(path).expanduser()
    from upath import UPath

    try:
        found = UPath(path)
        found.fs  # noqa: B018 (made when first asked for)
    except (ImportError, ValueError) as error:
        raise StoreError(f"{path}: cannot open {protocol}:// paths: {error}") from None
    return found  # type: ignore[return-value]


def is_local(path: Path) -> bool:
    """Whether a path from `as_path` is on this machine's own file system."""
    return type(path) is type(Path())


@contextlib.contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """A local file to write in its place. When the block ends well it is flushed to disk and renamed to `path` (in an
    object store: uploaded, which is as whole); when it does not, nothing is left."""
    path = as_path(path)
    if is_local(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    else:
        handle, name = tempfile.mkstemp(suffix=path.suffix)
        os.close(handle)
        aside = Path(name)
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        if is_local(path):
            os.replace(aside, path)
        else:
            path.fs.put_file(str(aside), path.path)  # type: ignore[attr-defined]
    finally:
        aside.unlink(missing_ok=True)


def canonical(value: Any) -> str:
    """JSON with sorted keys and no white space: equal values give equal text. Non-finite floats become strings."""
    return json.dumps(jsonable(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def jsonable(value: Any) -> Any:
    """`value` with NaN and infinities replaced by None, since JSON has neither; tuples become lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if hasattr(value, "item") and not isinstance(value, str):  # numpy scalars
        return jsonable(value.item())
    if isinstance(value, Path):
        return str(value)
    return value


MAX_DEPTH = 100


class TooDeep(ValueError):
    """Lists and mappings in each other more than `MAX_DEPTH` deep."""


def too_deep(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether lists and mappings stand in each other more than `depth` deep. To be asked before anything that calls
    itself for each of them: how deep Python lets that go depends on who called, and a result must not."""
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return False
    return depth == 0 or any(too_deep(v, depth - 1) for v in value)


def parse_json(text: str | bytes) -> Any:
    """JSON that somebody else wrote. Raises ValueError where it is none, its subclass TooDeep where it is nested too
    deeply."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise TooDeep("nested too deeply") from None
    if too_deep(value):
        raise TooDeep("nested too deeply")
    return value


def fingerprint(value: Any) -> str:
    """A short stable hash of plain data (hex, 128 bits)."""
    return bytes_hash(canonical(value).encode("utf-8", "surrogatepass"))


def bytes_hash(data: bytes) -> str:
    """Hash of bytes (hex, 128 bits)."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def text_hash(text: str, person: bytes) -> int:
    """A number in [0, 2**64) that a text decides alone; another one for each `person`, the purpose that it serves."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, person=person).digest()
    return int.from_bytes(digest, "little")


def file_hash(path: str | Path) -> str:
    """Hash of a file's bytes (hex, 128 bits)."""
    digest = hashlib.blake2b(digest_size=16)
    with as_path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def path_hash(path: str | Path) -> str | None:
    """Hash of a file, or of the files of a folder (not below it); None for what is not here, such as a Hub name."""
    path = Path(path)
    if path.is_file():
        return file_hash(path)
    if path.is_dir():
        return fingerprint([[p.name, file_hash(p)] for p in sorted(path.iterdir()) if p.is_file()])
    return None


def write_text(path: str | Path, text: str) -> None:
    """Write a file as a whole: a reader sees the old file or the new one."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    path = as_path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is not valid JSON ({error}); delete its directory and run the stage again") from None


def read_manifest(directory: str | Path, stage: str) -> dict[str, Any]:
    """The manifest of a finished directory made by `stage`; a StoreError that says what to do otherwise."""
    directory = as_path(directory)
    if not directory.is_dir():
        raise StoreError(f"{directory} is not a directory; expected the output of `phf {stage}`")
    if not (directory / MANIFEST).exists():
        raise StoreError(
            f"{directory} has no {MANIFEST}: `phf {stage}` did not finish there; run it again to complete it"
        )
    manifest = read_json(directory / MANIFEST)
    if manifest.get("stage") != stage:
        raise StoreError(f"{directory} was made by `phf {manifest.get('stage')}`; expected the output of `phf {stage}`")
    return manifest  # type: ignore[no-any-return]


def is_done(directory: str | Path, key: str) -> bool:
    """Whether `directory` was finished from exactly these inputs and settings."""
    path = as_path(directory) / MANIFEST
    return path.exists() and read_json(path).get("key") == key


def signature(path: str | Path) -> tuple[Any, ...]:
    """Sizes and modification times of a file, or of the files of a folder: the key of what is kept in memory of it."""
    path = Path(path).expanduser()
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    return tuple((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file())


def refresh(path: Path) -> Path:
    """`path`, whose file system forgets what it remembers of it: other processes have written there."""
    if not is_local(path):
        path.fs.invalidate_cache()  # type: ignore[attr-defined]
    return path


def begin(directory: str | Path, stage: str, key: str, clean: bool = True) -> Path:
    """Prepare to (re)make `directory`. Work begun with the same key is kept for resuming, anything else is removed.

    Only a directory that a stage of phf began is ever removed: another one, if not empty, is an error. `clean`: remove
    what a killed process was writing; not where others may be writing now.
    """
    directory = as_path(directory)
    started = directory / ".started.json"
    half_written = [p for p in directory.glob(".*.partial*") if p.is_file()] if directory.exists() else []
    if directory.exists() and any(p not in half_written for p in directory.iterdir()):
        if started.exists():
            mark = read_json(started)
            if mark != {"stage": stage, "key": key}:
                if mark.get("stage") != stage:
                    raise StoreError(
                        f"{directory} holds the output of `phf {mark.get('stage')}`; give another directory"
                    )
                _empty(directory, started)
        else:
            raise StoreError(f"{directory} is not empty and was not made by `phf {stage}`; give another directory")
    for leftover in half_written if clean else ():
        leftover.unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)
    if not started.exists():
        write_json(started, {"stage": stage, "key": key})
    return directory


def _empty(directory: Path, started: Path) -> None:
    """Remove what a stage began. A kill at any moment leaves a folder that is still known as begun, or none."""
    if is_local(directory):
        dying = directory.with_name(f".{directory.name}.{os.getpid()}.dying")
        directory.rename(dying)  # at once, so that a kill leaves no half of it behind under this name
        shutil.rmtree(dying)
        return
    for path in [directory / MANIFEST, *(p for p in directory.rglob("*") if p.name != started.name), started]:
        if path.exists() and path.is_file():
            path.unlink()


def finish(directory: str | Path, stage: str, key: str, **contents: Any) -> dict[str, Any]:
    """Write the manifest: from here on the directory counts as finished."""
    manifest = {"stage": stage, "key": key, **contents, "versions": versions(), "commit": commit()}
    write_json(as_path(directory) / MANIFEST, manifest)
    return manifest


@functools.cache
def commit() -> str | None:
    """The commit of phf's own source, with "+" where files differ from it; None where it is not run from a repository."""
    here = Path(__file__).resolve().parent
    if not any((above / ".git").exists() for above in list(here.parents)[:3]):
        return None
    try:
        found = [
            subprocess.run(
                ["git", "-C", str(here), *command], capture_output=True, text=True, timeout=10, check=True
            ).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", str(here)])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0].strip() + "+" * bool(found[1].strip())


def versions() -> dict[str, str]:
    """Versions of phf and of what decides its results."""
    found = {"python": platform.python_version()}
    for name in ("phf", "torch", "transformers", "tokenizers", "numpy", "pyarrow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
