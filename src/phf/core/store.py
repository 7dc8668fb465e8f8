"""Files and folders that are either whole or absent, and say what made them.

Each stage of phf writes one folder with a `manifest.json`: what made it, fingerprints of its inputs, counts and
versions. The manifest is written last and by rename. A folder without one is not finished; the same command completes
it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from phf.core.types import PhfError

T = TypeVar("T")

MANIFEST = "manifest.json"
STARTED = ".started.json"
"""Written first into a stage's folder: which stage, under which key."""


class StoreError(PhfError, ValueError):
    """A file or folder that is not what a stage expects."""

    exit_code = 2


# Paths


def as_path(path: str | Path) -> Path:
    """A local path, or a path object over another file system for `s3://bucket/...`, `hf://datasets/owner/name` and the
    other protocols that fsspec knows. Raises StoreError if the package for the protocol is missing."""
    if not isinstance(path, str):
        return path
    protocol, sep, _ = path.partition("://")
    if not sep:
        return Path(path).expanduser()
    from upath import UPath

    try:
        found = UPath(path)
        found.fs  # noqa: B018 (UPath opens the file system on first access)
    except (ImportError, ValueError) as error:
        raise StoreError(f"{path}: cannot open {protocol}:// paths: {error}") from None
    return found  # type: ignore[return-value]


def is_local(path: Path) -> bool:
    """Whether a path from `as_path` is on this machine's own file system."""
    return type(path) is type(Path())


def refresh(path: Path) -> Path:
    """`path`, after its file system forgot its cached listings: other processes have written there."""
    if not is_local(path):
        path.fs.invalidate_cache()  # type: ignore[attr-defined]
    return path


# Hashes


def canonical(value: Any) -> str:
    """JSON with sorted keys and no white space: equal values give equal text. NaN and infinities become null."""
    return json.dumps(jsonable(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any) -> str:
    """A short stable hash of plain data (hex, 128 bits)."""
    return bytes_hash(canonical(value).encode("utf-8", "surrogatepass"))


def bytes_hash(data: bytes) -> str:
    """Hash of bytes (hex, 128 bits)."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def text_hash(text: str, person: bytes) -> int:
    """A number in [0, 2**64) that depends on the text and on `person`, the purpose of the hash."""
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
    """Hash of a file, or of the files directly in a folder. None for a path that does not exist, such as a Hub name."""
    path = Path(path)
    if path.is_file():
        return file_hash(path)
    if path.is_dir():
        return fingerprint([[p.name, file_hash(p)] for p in sorted(path.iterdir()) if p.is_file()])
    return None


def signature(path: str | Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and modification time of a file, or of the files in a folder: the key of what memory holds of it."""
    path = Path(path).expanduser()
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    return tuple((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file())


# JSON


class Flat:
    """A record whose JSON is not simply a mapping of its fields."""

    def as_json(self) -> dict[str, Any]:
        raise NotImplementedError


def jsonable(value: Any) -> Any:
    """`value` as plain JSON data: dataclasses become mappings, tuples lists, paths strings, NaN and infinities None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, Flat):
        return jsonable(value.as_json())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "item") and not isinstance(value, str):  # numpy scalars
        return jsonable(value.item())
    if isinstance(value, Path):
        return str(value)
    return value


MAX_DEPTH = 100
"""How deep JSON from elsewhere may nest. Python's own limit depends on the caller, and a result must not."""


class TooDeep(ValueError):
    """Lists and mappings that nest more than `MAX_DEPTH` deep."""


def too_deep(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether lists and mappings nest more than `depth` deep. Check this before any recursion over foreign data."""
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return False
    return depth == 0 or any(too_deep(v, depth - 1) for v in value)


def parse_json(text: str | bytes) -> Any:
    """Parse JSON from elsewhere. Raises ValueError for malformed JSON and its subclass TooDeep for deep nesting."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise TooDeep("nested too deeply") from None
    if too_deep(value):
        raise TooDeep("nested too deeply")
    return value


# Files


@contextlib.contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """A local file to write instead of `path`. When the block succeeds, the file is flushed to disk and renamed to
    `path` (on an object store: uploaded, which is also atomic). When the block fails, nothing is left."""
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


def write_text(path: str | Path, text: str) -> None:
    """Write a file as a whole: a reader sees the old file or the new one."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, value: Any) -> None:
    """Write plain data or a record (a dataclass) as JSON. NaN becomes null."""
    write_text(path, json.dumps(jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file of phf. Raises StoreError if the file is missing or damaged."""
    path = as_path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is not valid JSON ({error}); delete its folder and run the stage again") from None


_adapters: dict[Any, pydantic.TypeAdapter[Any]] = {}
"""Building an adapter takes milliseconds, using it microseconds."""


def as_record(value: Any, type_: type[T], where: str | Path) -> T:
    """Plain JSON data as a record, a dataclass. Unknown keys are ignored: a newer version may have written them. Raises
    StoreError for any other shape."""
    if type_ not in _adapters:
        _adapters[type_] = pydantic.TypeAdapter(type_)
    try:
        found: T = _adapters[type_].validate_python(value)
        return found
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise StoreError(
            f"{where} is not what this version of phf writes ({place}: {first['msg']}); run the stage again"
        ) from None


def read_record(path: str | Path, type_: type[T]) -> T:
    """Read a JSON file as a record. Raises StoreError if the file is missing, damaged or of another shape."""
    return as_record(read_json(path), type_, path)


# Folders of stages


@functools.cache
def commit() -> str | None:
    """The commit of phf's own source, with "+" where files differ from it. None outside a repository."""
    package = Path(__file__).resolve().parents[1]
    if not any((above / ".git").exists() for above in list(package.parents)[:2]):
        return None
    try:
        found = [
            subprocess.run(
                ["git", "-C", str(package), *command], capture_output=True, text=True, timeout=10, check=True
            ).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", str(package)])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0].strip() + "+" * bool(found[1].strip())


def versions() -> dict[str, str]:
    """Versions of phf and of the libraries that its results depend on."""
    found = {"python": platform.python_version()}
    for name in ("phf", "torch", "transformers", "tokenizers", "numpy", "pyarrow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`manifest.json` of a finished folder. Each stage has a subclass with what it writes."""

    stage: str = ""
    """The command that made the folder: score, tokenize, train or export."""
    key: str
    """Fingerprint of the settings and inputs: an equal key means that nothing needs to run again."""
    versions: dict[str, str] = field(default_factory=versions)
    """Versions of Python, phf and the libraries that results depend on."""
    commit: str | None = field(default_factory=commit)
    """Commit of phf's source, with "+" where files differed from it; null outside a repository."""


M = TypeVar("M", bound=Manifest)


@dataclass(frozen=True)
class Started:
    """`.started.json`: which stage started a folder, under which key."""

    stage: str
    key: str


def read_manifest(directory: str | Path, type_: type[M]) -> M:
    """The manifest of a finished folder, as the subclass of its stage. Raises StoreError, with what to do, for an
    unfinished folder and for the folder of another stage."""
    directory = as_path(directory)
    stage = type_.stage
    if not directory.is_dir():
        raise StoreError(f"{directory} is not a folder; expected the output of `phf {stage}`")
    if not (directory / MANIFEST).exists():
        raise StoreError(
            f"{directory} has no {MANIFEST}: `phf {stage}` did not finish there; run it again to complete it"
        )
    found = read_json(directory / MANIFEST)
    made_by = found.get("stage") if isinstance(found, dict) else None
    if made_by != stage:
        raise StoreError(f"{directory} was made by `phf {made_by}`; expected the output of `phf {stage}`")
    return as_record(found, type_, directory / MANIFEST)


def has_manifest(directory: str | Path, type_: type[Manifest]) -> bool:
    """Whether a folder is finished and was made by the stage of `type_`."""
    path = as_path(directory) / MANIFEST
    return path.exists() and read_json(path).get("stage") == type_.stage


def is_done(directory: str | Path, key: str) -> bool:
    """Whether a folder was finished from exactly these inputs and settings."""
    path = as_path(directory) / MANIFEST
    return path.exists() and read_json(path).get("key") == key


def started(directory: Path) -> Started | None:
    """Which stage started a folder; None if none did."""
    path = directory / STARTED
    return read_record(path, Started) if path.exists() else None


def begin(directory: str | Path, stage: str, key: str, clean: bool = True) -> Path:
    """Prepare to make a folder. Work started under the same key is kept for resuming; other work is removed.

    Only a folder that a stage of phf started is ever removed. Any other folder that is not empty is an error. `clean`:
    remove what a killed process was writing; False if other processes may be writing now.
    """
    directory = as_path(directory)
    half_written = [p for p in directory.glob(".*.partial*") if p.is_file()] if directory.exists() else []
    if directory.exists() and any(p not in half_written for p in directory.iterdir()):
        mark = started(directory)
        if mark is None:
            raise StoreError(f"{directory} is not empty and was not made by `phf {stage}`; give another folder")
        if mark.stage != stage:
            raise StoreError(f"{directory} holds the output of `phf {mark.stage}`; give another folder")
        if mark.key != key:
            _empty(directory)
    for leftover in half_written if clean else ():
        leftover.unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)
    if not (directory / STARTED).exists():
        write_json(directory / STARTED, Started(stage, key))
    return directory


def _empty(directory: Path) -> None:
    """Remove what a stage started. A kill at any moment leaves a folder that is still known as started, or none."""
    if is_local(directory):
        dying = directory.with_name(f".{directory.name}.{os.getpid()}.dying")
        directory.rename(dying)  # at once: a kill leaves no half of the folder under its own name
        shutil.rmtree(dying)
        return
    mark = directory / STARTED  # last, so that the folder stays known as started
    for path in [directory / MANIFEST, *(p for p in directory.rglob("*") if p.name != STARTED), mark]:
        if path.exists() and path.is_file():
            path.unlink()


def finish(directory: str | Path, manifest: M) -> M:
    """Write the manifest. From now on the folder counts as finished. Returns the manifest as a reader will see it."""
    write_json(as_path(directory) / MANIFEST, manifest)
    return as_record(jsonable(manifest), type(manifest), directory)


# Values kept in a file


def kept(file: Path, key: str, type_: type[T]) -> T | None:
    """The record in `file` if it was written under `key` by `keep`, else None. None too for a record that this version
    cannot read."""
    if not file.exists():
        return None
    found = read_json(file)
    if not isinstance(found, dict) or found.get("key") != key:
        return None
    try:
        return as_record(found, type_, file)
    except StoreError:
        return None


def keep(file: Path, key: str, value: Any) -> None:
    """Write a record to `file` together with the key that it depends on."""
    write_json(file, {"key": key, **jsonable(value)})


def cached(file: Path, key: str, type_: type[T], make: Callable[[], T]) -> T:
    """The record in `file` if it was written under `key`; else what `make` returns, written there first."""
    if (found := kept(file, key, type_)) is not None:
        return found
    keep(file, key, make())
    again = kept(file, key, type_)
    assert again is not None
    return again
