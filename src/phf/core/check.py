"""Check that the files of finished folders and checkpoints are what they were when they were written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phf.core import folders, store
from phf.core.runs import COMPLETE, CheckpointMark, damaged_checkpoint


@dataclass(frozen=True)
class Checked:
    """What was found about a folder."""

    folder: Path
    what: str
    """The stage that made it, or checkpoint."""
    files: int
    """Files that were compared with their hash."""
    problems: list[str]
    """What is wrong; empty: nothing."""


def check_below(folder: str | Path) -> Iterator[Checked]:
    """Check a folder and every folder below it that a stage finished, and every whole checkpoint. Raises StoreError if
    there is none."""
    root = store.as_path(folder)
    if not root.is_dir():
        raise store.StoreError(f"{folder} is not a folder")
    found = 0
    for mark in sorted([*root.rglob(folders.MANIFEST), *root.rglob(COMPLETE)]):
        checked = _checkpoint(mark.parent) if mark.name == COMPLETE else _stage(mark)
        if checked is not None:
            found += 1
            yield checked
    if not found:
        raise store.StoreError(f"{folder} holds nothing that phf finished")


def _stage(mark: Path) -> Checked | None:
    try:
        manifest = store.read_json(mark)
    except store.StoreError as error:
        return Checked(mark.parent, "?", 0, [str(error)])
    if not folders.is_of_a_stage(manifest):
        return None  # another program's
    try:
        marks = store.as_record(manifest.get("files") or {}, dict[str, folders.FileMark], mark)
        known = store.as_record(manifest.get("scores") or {}, dict[str, dict[str, Any]], mark)
        columns = store.as_record(manifest.get("columns") or {}, dict[str, folders.FileMark], mark)
        references = store.as_record(manifest.get("references") or {}, dict[str, folders.FileMark], mark)
        counts = store.as_record(manifest.get("counts") or {}, dict[str, Any], mark)
    except store.StoreError as error:
        return Checked(mark.parent, str(manifest["stage"]), 0, [str(error)])
    marks |= references
    marks |= {f"{name}.about.bin": found for name, found in columns.items()}  # of a token store, as the scores below
    for name, scores in known.items():
        segments = counts.get("segments")
        if not isinstance(segments, int):
            return Checked(mark.parent, str(manifest["stage"]), 0, [f"{mark.name}: counts.segments is {segments!r}"])
        if isinstance(scores.get("hash"), str):
            marks[f"{name}.score.bin"] = folders.FileMark(4 * segments, scores["hash"])
        if isinstance(scores.get("token_hash"), str):
            marks[f"{name}.token.bin"] = folders.FileMark(2 * int(counts.get("tokens") or 0), scores["token_hash"])
    problems = folders.damage(mark.parent, marks, hashes=True)
    for file in sorted([*mark.parent.glob("*.json"), *mark.parent.glob("eval/*.json")]):
        if file.name not in marks and not folders.is_partial(file):  # results of judging have no recorded hash
            try:
                store.read_json(file)
            except store.StoreError as error:
                problems.append(str(error))
    return Checked(mark.parent, str(manifest["stage"]), len(marks), problems)


def _checkpoint(folder: Path) -> Checked:
    try:
        mark = store.read_record(folder / COMPLETE, CheckpointMark)
        problem = damaged_checkpoint(folder)
    except store.StoreError as error:
        return Checked(folder, "checkpoint", 0, [str(error)])
    return Checked(folder, "checkpoint", len(mark.files), [] if problem is None else [problem])
