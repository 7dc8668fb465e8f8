"""Labelled texts: what scorers are fitted to and audited with."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phf.core import folders, store
from phf.core.config import ConfigError
from phf.core.text import by_reason
from phf.core.types import Rejected
from phf.data.corpus import admit
from phf.data.files import read_rows

TRUE = {"1", "1.0", "true", "yes", "y", "t", "bad", "toxic", "positive"}
FALSE = {"0", "0.0", "false", "no", "n", "f", "good", "nontoxic", "negative"}
LABELS = "labels.jsonl"
"""The labels in a folder of `phf label`."""
WEIGHT = "weight"
"""Column of the segments of the corpus that a text stands for."""
MAX_LEVEL = 100


JUDGE = "judge"
"""Column with the name of who labelled."""


@dataclass(frozen=True)
class Labels:
    """Labelled texts. `bad_N` is True where the text is bad; `rejected` counts skipped rows by reason. Labels with an
    order are in `level_N`, from 0 (fine) up; those from `bad_from` on are bad."""

    source: str
    texts: tuple[str, ...]
    bad_N: np.ndarray
    rejected: dict[str, int]
    level_N: np.ndarray | None = None
    bad_from: int | None = None
    weight_N: np.ndarray | None = None
    """How many segments of the corpus each text stands for; None: equally many."""
    judges: tuple[str, ...] = ()
    """Who labelled, as far as the labels say."""

    @property
    def mark(self) -> str:
        """Fingerprint of texts and labels."""
        digest = hashlib.blake2b(digest_size=16)
        value_N = self.bad_N if self.level_N is None else self.level_N
        for text, value in zip(self.texts, value_N, strict=True):
            digest.update(f"{int(value)}{len(text)}:".encode() + text.encode("utf-8", "surrogatepass"))
        if self.weight_N is not None:
            digest.update(np.asarray(self.weight_N, "<f8").tobytes())
        return digest.hexdigest()

    @property
    def levels(self) -> list[int]:
        """The different labels above 0, of labels with an order; [1] for others."""
        return [1] if self.level_N is None else [int(level) for level in np.unique(self.level_N) if level > 0]

    @property
    def ordered(self) -> bool:
        """Whether the labels have an order that says more than good and bad."""
        return self.level_N is not None and len(self.levels) > 1


def read_labels(
    path: str | Path,
    text: str = "text",
    label: str = "label",
    bad: Sequence[str] | None = None,
    bad_from: int | None = None,
) -> Labels:
    """Labelled texts from a file of rows of any form (JSON lines, JSON, CSV, TSV, Parquet; compressed or not), or from
    a folder of `phf label`.

    `bad`: the values of the label that mean bad. `bad_from`: labels are whole numbers from 0, and those from it on mean
    bad; a folder of `phf label` says so itself. Without both, labels must be true or false, 1 or 0, or the like. Rows
    without a usable text or label are skipped and counted. Raises ConfigError if a column is missing, a label cannot be
    read, or where all texts are of one class.
    """
    path = Path(path).expanduser()
    if bad is not None and bad_from is not None:
        raise ConfigError("give --bad (values) or --bad-from (the first bad one of labels with an order), not both")
    if path.is_dir() and not (path / LABELS).is_file():
        raise ConfigError(f"{path} holds no {LABELS}: `phf label` did not finish there, or it is another folder")
    if path.is_dir():
        if bad is None and bad_from is None:
            bad_from = _bad_from(path)
        path = path / LABELS
    read = _reader(path, bad, bad_from)
    rows = read_rows(path, columns=(text, label))
    texts = []
    weights = []
    values = []
    judges: dict[str, None] = {}
    rejected: Counter[str] = Counter()
    for number, row in enumerate(rows):
        item = admit(str(number), row.get(text), {}, 10_000_000)
        value = str(row.get(label)).strip()
        if isinstance(item, Rejected):
            rejected[item.reason] += 1
        elif row.get(label) is None or not value or value.lower() == "nan":
            rejected["no label"] += 1
        else:
            values.append(read(value))
            texts.append(item.text)
            weights.append(row.get(WEIGHT))
            if isinstance(judge := row.get(JUDGE), str) and judge:
                judges[judge] = None
    if bad is not None:
        _check_named(path, bad, values)
        wanted = {value.strip() for value in bad}
        values = [value in wanted for value in values]
    bad_N = np.array(values, int) >= (bad_from or 1)
    if not len(bad_N):
        skipped = f" (skipped: {by_reason(rejected)})" if rejected else ""
        raise ConfigError(f"{path} holds no labelled text{skipped}")
    if not bad_N.any() or bad_N.all():
        raise ConfigError(
            f"{path}: all {len(bad_N)} usable texts are {'bad' if bad_N.any() else 'good'}; both classes are needed"
        )
    level_N = None if bad_from is None else np.array(values, int)
    weight_N = _weights(path, weights)
    if level_N is not None and level_N.max() == 1:  # no order to learn from
        level_N = None
    first = None if level_N is None else bad_from
    return Labels(path.name, tuple(texts), bad_N, dict(rejected), level_N, first, weight_N, tuple(judges))


def _weights(path: Path, given: Sequence[Any]) -> np.ndarray | None:
    """The column of weights; None for a file without. Raises ConfigError for one that is no positive number."""
    if all(value is None for value in given):
        return None
    found = []
    for value in given:
        try:
            weight = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            weight = math.nan
        if not 0 < weight < math.inf:
            raise ConfigError(f"{path}: the column {WEIGHT!r} holds {str(value)[:40]!r}; weights are positive numbers")
        found.append(weight)
    if not math.isfinite(sum(found)):
        raise ConfigError(f"{path}: the weights in {WEIGHT!r} are too large to be added up")
    return np.array(found)


def one_each(labels: Labels) -> Labels:
    """Different texts with one label each: bad if most of a text's labels are, and of labels with an order the middle
    one on that side. A text with as many labels bad as good is left out and counted. Without weights of its own, a text
    weighs as many times as it occurs with a label."""
    places: dict[str, list[int]] = {}
    for n, text in enumerate(labels.texts):
        places.setdefault(text, []).append(n)
    if len(places) == len(labels.texts):
        return labels
    rejected = Counter(labels.rejected)
    texts = []
    bad = []
    levels = []
    weights = []
    for text, at in places.items():
        votes = int(labels.bad_N[at].sum())
        if 2 * votes == len(at):
            rejected["as many labels bad as good"] += 1
            continue
        is_bad = 2 * votes > len(at)
        texts.append(text)
        bad.append(is_bad)
        weights.append(float(len(at)) if labels.weight_N is None else float(labels.weight_N[at[0]]))
        if labels.level_N is not None:
            given = sorted(int(labels.level_N[n]) for n in at)
            levels.append(given[len(given) // 2] if is_bad else given[(len(given) - 1) // 2])
    level_N = None if labels.level_N is None else np.array(levels, int)
    return Labels(
        labels.source,
        tuple(texts),
        np.array(bad, bool),
        dict(rejected),
        level_N,
        labels.bad_from,
        np.array(weights, np.float64),
        labels.judges,
    )


def _bad_from(folder: Path) -> int | None:
    """The first bad label, as the folder's rubric says."""
    path = folder / folders.MANIFEST
    if not path.is_file():
        raise ConfigError(f"{folder} has no {folders.MANIFEST}: `phf label` did not finish there; run it again")
    found = store.read_json(path)
    first = found.get("bad_from") if isinstance(found, dict) else None
    if not isinstance(first, int) or isinstance(first, bool) or first < 1:
        raise ConfigError(f"{path} does not say from which label on a text is bad; give --bad-from")
    return first


def _reader(path: Path, bad: Sequence[str] | None, bad_from: int | None) -> Any:
    """How a label is read."""

    def whole(value: str) -> int:
        plain = value.removesuffix(".0")
        if not plain.isascii() or not plain.isdecimal() or int(plain) > MAX_LEVEL:
            raise ConfigError(f"{path}: label {value[:40]!r} is no whole number from 0 to {MAX_LEVEL} (--bad-from)")
        return int(plain)

    def either(value: str) -> int:
        if value.lower() not in TRUE | FALSE:
            order = ", or the first bad one with --bad-from" if value.isdecimal() else ""
            raise ConfigError(
                f"{path}: label {value[:40]!r} is neither true nor false; name the values that mean bad with --bad"
                f"{order}"
            )
        return value.lower() in TRUE

    return str if bad is not None else either if bad_from is None else whole


def _check_named(path: Path, bad: Sequence[str], values: Sequence[str]) -> None:
    """Raise ConfigError for a value that no label has."""
    unknown = sorted({value.strip() for value in bad} - {""} - set(values))
    if unknown:
        raise ConfigError(f"{path}: no label is {unknown[0]!r} (--bad); the labels are {sorted(set(values))[:10]}")
