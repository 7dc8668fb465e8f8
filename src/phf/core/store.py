"""Files that are either whole or absent: paths, hashes, JSON, and writing by rename."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from phf.core.types import PhfError

T = TypeVar("T")


class StoreError(PhfError, ValueError):
    """A file or folder that is not what a stage expects."""

    exit_code = 2


# Paths


def as_path(path: str | Path) -> Path:
    """A local path, or a path object over another file system for `s3://bucket/...`, `hf://datasets/owner/name` and the
    other protocols that fsspec knows. Raises StoreError if the package for the protocol is missing."""
    if not isinstance(path, str):
        return path
    if "\0" in path:
        raise StoreError(f"{path!r}: a path holds no NUL character")
    protocol, sep, rest = path.partition("://")
    if not sep:
        return Path(path).expanduser()
    from upath import UPath

    if protocol not in ("memory", "hf", "file", "local") and not rest:
        raise StoreError(f"{path}: expected {protocol}://PLACE/...")
    try:
        found = UPath(path)
        found.fs  # noqa: B018 (UPath opens the file system on first access)
    except (ImportError, ValueError, OSError, TypeError) as error:
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


def is_file_name(name: str) -> bool:
    """Whether `name`, which a recipe, a manifest or a caller gives, can be the name of a file: one that does not leave
    its folder and is not hidden there."""
    return re.fullmatch(r"\w[^/\\\0\n]*", name) is not None and len(name) <= 100 and ".old-" not in name


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


_PLACE = re.compile(
    r"(?:file:)?(?:(?<![\w/.])(?!//)(?:~|\.{0,2})/|(?<![\w:/.])/{2,})(?:[^\s'\"<>|:/]+/)*([^\s'\"<>|:/]*)"
    r"|\b[A-Za-z]:\\(?:[^\s\\]+\\)*(\S*)|\\\\(?:[^\s\\]+\\)+(\S*)"
)
"""A path of this machine in a text; the group is its last part."""


def without_places(value: Any) -> Any:
    """Plain data as others may see it: of a path on this machine only the last part is left, also inside messages.
    Names on the Hub, addresses and everything else stay."""
    if isinstance(value, Mapping):
        return {k: v if k == "pattern" else without_places(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(v) for v in value]
    if not isinstance(value, str):
        return value
    if value.startswith("file://"):
        value = value.removeprefix("file://")
    if "://" not in value and "/" in value and "\n" not in value and _exists(value.partition(":")[0]):
        return Path(value).name
    return _PLACE.sub(lambda found: found[1] or found[2] or found[3] or "", value) if len(value) > 1 else value


def _exists(path: str) -> bool:
    with contextlib.suppress(OSError, ValueError):  # too long, or with a NUL
        return Path(path).exists()
    return False


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
        sync(aside)
        if is_local(path):
            os.replace(aside, path)
            sync(path.parent)
        else:
            path.fs.put_file(str(aside), path.path)  # type: ignore[attr-defined]
    finally:
        aside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not sync folders
            raise
    finally:
        os.close(handle)


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
        return parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise StoreError(f"{path} is a folder, not a file") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise StoreError(
            f"{path} is not valid JSON ({error}): it is damaged. Rename it and run its stage again"
        ) from None


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
        what = f"{place}: {first['msg']}" if place else "it is no mapping"
        raise StoreError(f"{where} is not what this version of phf writes ({what}); run the stage again") from None


def read_record(path: str | Path, type_: type[T]) -> T:
    """Read a JSON file as a record. Raises StoreError if the file is missing, damaged or of another shape."""
    return as_record(read_json(path), type_, path)
