"""The folders that stages write: what made them, one writer at a time, damage, and nothing lost.

Each stage of phf writes one folder with a `manifest.json`: what made it, fingerprints of its inputs, counts, versions,
and size and hash of every file. The manifest is written last and by rename. A folder without one is not finished; the
same command completes it. What other settings made is moved to `NAME.old-N`, never removed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from phf.core import store
from phf.core.locks import LOCK, Busy, locked
from phf.core.store import StoreError, as_path, is_local, read_json, read_record, write_json
from phf.core.text import counted

T = TypeVar("T")

MANIFEST = "manifest.json"
CLUSTER = ".cluster"
"""Folder of what was handed to a scheduler."""
STARTED = ".started.json"
"""Written first into a stage's folder: which stage, under which key."""
OLD = ".old-"
"""In the name of a folder that was moved aside."""


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


# Files of a folder


@dataclass(frozen=True)
class FileMark:
    """What a file was when its stage finished."""

    size: int
    """In bytes."""
    hash: str
    """Of its bytes (hex, 128 bits)."""


def file_marks(folder: Path, names: Iterable[str]) -> dict[str, FileMark]:
    """Size and hash of files of a folder, by their name below it."""
    return {name: FileMark((folder / name).stat().st_size, store.file_hash(folder / name)) for name in names}


def files_below(folder: Path, *parts: str) -> list[str]:
    """Names of the files in a folder, or in `parts` of it, below it. Hidden files are left out."""
    roots = [folder / part for part in parts] if parts else [folder]
    found = [f for root in roots for f in ([root] if root.is_file() else root.rglob("*"))]
    names = [f.relative_to(folder).as_posix() for f in found if f.is_file()]
    return sorted(n for n in names if not any(part.startswith(".") for part in n.split("/")))


def _is_inside(name: str) -> bool:
    """Whether a name that a manifest lists stays in the manifest's folder."""
    return not name.startswith("/") and ".." not in name.split("/")


def damage(folder: Path, files: dict[str, FileMark], hashes: bool = False) -> list[str]:
    """What is wrong with files that a manifest lists: missing, of another size or, with `hashes`, of other bytes."""
    found = []
    for name, mark in files.items():
        if not _is_inside(name):
            found.append(f"{name!r} is not a name in the folder")
            continue
        path = folder / name
        try:
            size = path.stat().st_size
        except OSError:
            found.append(f"{name} is missing")
            continue
        if size != mark.size:
            found.append(f"{name} has {size:,} bytes instead of {mark.size:,}")
        elif hashes and store.file_hash(path) != mark.hash:
            found.append(f"{name} has other bytes than when it was written")
    return found


def check_files(folder: Path, files: dict[str, FileMark], hashes: bool = False) -> None:
    """Raise StoreError for a folder with damaged files."""
    if found := damage(folder, files, hashes):
        more = f", and {counted(len(found) - 1, 'other file')}" if len(found) > 1 else ""
        raise StoreError(
            f"{folder} is damaged: {found[0]}{more}. Restore it from a copy, or rename it and run its stage again"
        )


def sync_files(folder: Path, files: Iterable[str]) -> None:
    """Wait until files and the folders that name them are on the disk. Files get ordinary permissions."""
    parents = {folder}
    umask = os.umask(0)
    os.umask(umask)
    for name in files:
        if not (folder / name).stat().st_mode & 0o077:  # some libraries make files that only their owner can read
            (folder / name).chmod(0o666 & ~umask)
        store.sync(folder / name)
        parents.add((folder / name).parent)
    for parent in parents:
        store.sync(parent)


# Manifests


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
    files: dict[str, FileMark] = field(default_factory=dict)
    """Size and hash of the folder's files; empty in folders of earlier versions."""


M = TypeVar("M", bound=Manifest)


@dataclass(frozen=True)
class Started:
    """`.started.json`: which stage started a folder, under which key."""

    stage: str
    key: str


def read_manifest(directory: str | Path, type_: type[M]) -> M:
    """The manifest of a finished folder, as the subclass of its stage. Raises StoreError, with what to do, for an
    unfinished folder, for the folder of another stage, and where files are missing or have another size."""
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
        raise StoreError(f"{directory} was not made by `phf {stage}`" + (f" but by `phf {made_by}`" if made_by else ""))
    manifest = store.as_record(found, type_, directory / MANIFEST)
    if is_local(directory):
        check_files(directory, manifest.files)
    return manifest


def has_manifest(directory: str | Path, type_: type[Manifest]) -> bool:
    """Whether a folder is finished and was made by the stage of `type_`."""
    path = as_path(directory) / MANIFEST
    found = read_json(path) if path.exists() else None
    return isinstance(found, dict) and found.get("stage") == type_.stage


def done_before(what: str | Path) -> None:
    """Say that a result was there already."""
    print(f"note: {what} is done: it was finished before with the same settings", file=sys.stderr)


def is_done(directory: str | Path, key: str) -> bool:
    """Whether a folder was finished from exactly these inputs and settings. Raises StoreError if it was, and its files
    are damaged."""
    directory = as_path(directory)
    path = directory / MANIFEST
    found = read_json(path) if path.exists() else None
    if not isinstance(found, dict) or found.get("key") != key:
        return False
    files = store.as_record(found.get("files") or {}, dict[str, FileMark], path)
    check_files(directory, files, hashes=True)
    tidy(directory)
    return True


def tidy(*directories: Path) -> None:
    """Remove the locks that processes left when they were killed after their work was done."""
    for directory in directories:
        if is_local(directory) and (directory / LOCK).exists():
            with contextlib.suppress(Busy), locked(directory, ""):
                pass


def started(directory: Path) -> Started | None:
    """Which stage started a folder; None if none did."""
    path = directory / STARTED
    return read_record(path, Started) if path.exists() else None


def check_wanted(directory: Path, key: str) -> None:
    """Raise StoreError unless a folder still waits for work under this key: a scheduler may start work late, and other
    settings may have taken the folder since."""
    mark = started(store.refresh(directory))
    if mark is None or mark.key != key or (directory / MANIFEST).exists():
        raise StoreError(f"{directory} is finished or belongs to other settings by now; this work is not wanted")


def finish(directory: str | Path, manifest: M) -> M:
    """Write the manifest. From now on the folder counts as finished. Returns the manifest as a reader will see it."""
    directory = as_path(directory)
    if is_local(directory):
        sync_files(directory, manifest.files)
    write_json(directory / MANIFEST, manifest)
    return store.as_record(store.jsonable(manifest), type(manifest), directory)


# Stages


@contextlib.contextmanager
def stage_folder(
    directory: str | Path,
    stage: str,
    key: str,
    *,
    shared: bool = False,
    overwrite: bool = False,
    keep_manifest: bool = False,
    because: Callable[[], str] | None = None,
) -> Iterator[Path]:
    """Hold a folder for a stage inside the block. Work that was started under the same key is there for resuming;
    other work is moved aside first, and a note on stderr names its new place and what changed (`because`).

    A folder that is not empty and was not made by this stage is an error. `shared`: other machines write into the
    folder too, so what a killed one was writing stays; they may also do so where they did before (`CLUSTER`).
    `overwrite`: on an object store, where nothing can be moved aside, remove the files of other work. `keep_manifest`:
    the folder is finished and stays so while something is added to it. Raises StoreError and Busy.
    """
    directory = as_path(directory)
    _check_ours(directory, stage)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise StoreError(f"{directory} is a link to nothing; remove it, or make the folder that it names") from None
    except NotImplementedError:
        raise StoreError(f"{directory}: nothing can be written to such an address") from None
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(directory, stage))
        mark = _check_ours(directory, stage)
        if mark is not None and mark.key != key and _has_work(directory):
            if is_local(directory):
                changed = "settings or inputs" if because is None else because()
                place = move_aside(directory)
                print(
                    f"note: starting again in {directory}, because {changed} changed; what it held is now {place}",
                    file=sys.stderr,
                )
                if not (directory / LOCK).exists():  # else its content was moved, not the folder
                    directory.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(locked(directory, stage))
            elif overwrite:
                _remove_own(directory)
            else:
                raise StoreError(
                    f"{directory} holds a result of other settings or inputs; give another folder, or --overwrite to "
                    "remove it"
                )
        if not shared and not (directory / CLUSTER).exists():
            remove_leftovers(directory)
        if not keep_manifest:
            (directory / MANIFEST).unlink(missing_ok=True)
        if mark is None or mark.key != key:
            write_json(directory / STARTED, Started(stage, key))
        yield directory


def is_of_a_stage(manifest: Any) -> bool:
    """Whether the content of a manifest is that of one of phf's stages, not another program's."""
    return isinstance(manifest, dict) and {"stage", "key"} <= manifest.keys()


def _check_ours(directory: Path, stage: str) -> Started | None:
    """Which key a folder was started under; None for a new or empty one. Raises StoreError for any other folder."""
    if directory.exists() and not directory.is_dir():
        raise StoreError(f"{directory} is a file; give a folder for the output of `phf {stage}`")
    if not directory.exists():
        return None
    mark = started(directory)
    if mark is not None:
        if mark.stage != stage:
            raise StoreError(f"{directory} holds the output of `phf {mark.stage}`; give another folder")
        return mark
    if any(p.name != LOCK and not is_partial(p) and OLD not in p.name for p in directory.iterdir()):
        raise StoreError(f"{directory} is not empty and was not made by `phf {stage}`; give another folder")
    return None


def _has_work(directory: Path) -> bool:
    return any(p.name not in (STARTED, LOCK) and not is_partial(p) for p in directory.iterdir())


def is_partial(path: Path) -> bool:
    """Whether a file or folder was being written when its process ended."""
    return path.name.startswith(".") and ".partial" in path.name


def remove_leftovers(directory: Path) -> None:
    """Remove what killed processes were writing, in the folder and below it."""
    if not is_local(directory):
        return
    for path in [p for p in directory.rglob(".*") if is_partial(p) and not _is_alive(p)]:
        if path.is_dir() and not path.is_symlink():
            remove_tree(path)
        else:
            path.unlink(missing_ok=True)


def _is_alive(path: Path) -> bool:
    """Whether the process that writes a partial file still runs here."""
    numbers = [part for part in path.name.split(".") if part.isdigit()]
    return bool(numbers) and int(numbers[-1]) != os.getpid() and os.path.exists(f"/proc/{numbers[-1]}")


def remove_tree(folder: Path) -> None:
    """Remove a folder that phf itself made and nobody else has seen."""
    shutil.rmtree(folder, ignore_errors=True)


def move_aside(folder: Path) -> Path:
    """Move a folder's content to the first free `NAME.old-N` and return that place. A folder that is a link is moved
    where it is; a mount point cannot be renamed, so its content moves into `old-N` inside."""
    real = folder.resolve()
    if Path.cwd().is_relative_to(real):
        raise StoreError(
            f"{real} holds a result of other settings or inputs, and it cannot be moved aside, because the command "
            "runs in it; run it from another folder, or give another folder to write into"
        )
    if os.path.ismount(real):
        return _move_inside(real)
    aside = _free(real)
    real.rename(aside)
    if real != folder.absolute():
        real.mkdir()
    return aside


def put_in_place(aside: Path, folder: Path) -> None:
    """Rename a finished folder to `folder`, an absent or empty one. A link stays a link, a mount point its place."""
    real = folder.resolve()
    if os.path.ismount(real):
        for path in aside.iterdir():
            if path.name != LOCK:
                shutil.move(path, real / path.name)
        return
    if real.exists():
        real.rmdir()
    aside.rename(real)


def _free(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}{OLD}{number}")).exists():
        number += 1
    return aside


def _move_inside(folder: Path) -> Path:
    """Move a folder's content into the first `old-N` in it that is not complete. Its mark moves last, so that a killed
    move is continued."""
    number = 1
    while ((aside := folder / f"content{OLD}{number}") / STARTED).exists():
        number += 1
    aside.mkdir(exist_ok=True)
    for path in sorted(folder.iterdir(), key=lambda p: (p.name == STARTED, p.name)):
        if OLD not in path.name and path.name != LOCK:
            path.rename(aside / path.name)
    return aside


def _remove_own(directory: Path) -> None:
    """Remove the files that a stage wrote into a folder on an object store: those that its manifest lists, its parts
    and its marks. The mark that says who made the folder goes last."""
    listed = read_json(directory / MANIFEST).get("files", {}) if (directory / MANIFEST).exists() else {}
    own = [directory / MANIFEST, *(directory / n for n in listed if _is_inside(n))]
    own += [p for p in directory.glob("part-*") if p.suffix in (".parquet", ".json")]
    for path in dict.fromkeys([*own, directory / STARTED]):
        if path.exists():
            path.unlink()
    rest = [p.name for p in store.refresh(directory).iterdir() if p.name != LOCK]
    if rest:
        raise StoreError(
            f"{directory} also holds {', '.join(sorted(rest)[:5])}, which phf did not write; move that first"
        )


def keep_old_file(file: Path) -> None:
    """Move a file that a command is about to write, and that it may not have made, to the first free `NAME.old-N`. A
    note says so."""
    if file.is_dir():
        raise StoreError(f"{file} is a folder; give the name of a file")
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise StoreError(f"{file} is a link or a device; give the name of an ordinary file")
    if file.exists():
        aside = _free(file)
        file.rename(aside)
        print(f"note: {file} was there already; it is now {aside}", file=sys.stderr)


def is_our_page(file: Path) -> bool:
    """Whether a file is a page that phf wrote, which it may write again."""
    try:
        with open(file, "rb") as opened:
            return PAGE_MARK.encode() in opened.read(2000)
    except OSError:
        return False


PAGE_MARK = '<meta name="generator" content="phf">'
"""At the start of every page of phf."""


def keep_earlier(folder: Path, *names: str) -> Path | None:
    """Keep what is in `names` below a folder, which is about to be written again, in the first free `NAME.old-N` (of
    the first name). Files are linked, not copied: writing by rename leaves the links as they are. None if there is
    nothing."""
    files = [
        f for name in names for f in ([folder / name] if (folder / name).is_file() else (folder / name).rglob("*"))
    ]
    files = [f for f in files if f.is_file() and not is_partial(f) and f.name != LOCK]
    if not files:
        return None
    aside = _free(folder / Path(names[0]).stem)
    for file in files:
        target = aside / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, target)
        except OSError:  # a file system without links
            shutil.copy2(file, target)
    return aside


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
        return store.as_record(found, type_, file)
    except StoreError:
        return None


def keep(file: Path, key: str, value: Any) -> None:
    """Write a record to `file` together with the key that it depends on."""
    write_json(file, {"key": key, **store.jsonable(value)})


def cached(file: Path, key: str, type_: type[T], make: Callable[[], T]) -> T:
    """The record in `file` if it was written under `key`; else what `make` returns, written there first."""
    if (found := kept(file, key, type_)) is not None:
        return found
    keep(file, key, make())
    again = kept(file, key, type_)
    assert again is not None
    return again
