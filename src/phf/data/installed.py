"""Readers of texts that every installation has: no network needed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core.config import STRICT, Plain
from phf.core.store import file_hash, fingerprint
from phf.data.corpus import SURROGATE, Corpus, Item, Shard, admit, chunks, read_text_file


@dataclass(frozen=True, config=STRICT)
class InstalledPackages(Corpus):
    """The descriptions (README texts) of the Python packages in phf's environment, from their `dist-info/METADATA`.

    Every installation has this text, without network. `exclude`: packages to leave out.
    """

    name: Literal["installed_packages"] = "installed_packages"
    exclude: tuple[str, ...] = ("phf",)
    max_chars: Annotated[int, Field(gt=0)] = 10_000_000
    """Longest document that is read, in characters; longer ones are skipped and counted."""

    def _packages(self) -> list[tuple[str, str, str]]:
        """(normalized name, version, description) sorted by name. Of two installations of one package the first
        counts."""
        found: dict[str, tuple[str, str, str]] = {}
        for dist in importlib.metadata.distributions():
            meta: Any = dist.metadata
            name = re.sub(r"[-_.]+", "-", str(meta["Name"] or "")).lower()
            if name and name not in self.exclude and name not in found:
                payload = meta.get_payload() or meta.get("Description") or ""
                found[name] = (name, str(meta["Version"]), payload if isinstance(payload, str) else "")
        return [found[name] for name in sorted(found)]

    def plan(self) -> list[Shard]:
        return [{"start": a, "end": b} for a, b in chunks(len(self._packages()))]

    def read(self, shard: Shard) -> Iterator[Item]:
        for name, version, text in self._packages()[shard["start"] : shard["end"]]:
            # email.message gives undecodable bytes as surrogates; the replacement character marks them in the text
            text = SURROGATE.sub("\ufffd", text).replace("\r\n", "\n")
            yield admit(name, text, {"package": name, "version": version}, self.max_chars)

    def fingerprint(self) -> str:
        return fingerprint(
            [[n, v, hashlib.blake2b(t.encode("utf-8", "replace")).hexdigest()[:16]] for n, v, t in self._packages()]
        )

    def provenance(self) -> Plain:
        return {"packages": {name: version for name, version, text in self._packages() if text}}


@dataclass(frozen=True, config=STRICT)
class StandardLibrary(Corpus):
    """The Python files of the running interpreter's standard library, without installed packages."""

    name: Literal["standard_library"] = "standard_library"
    max_files: Annotated[int, Field(gt=0)] | None = None
    """Largest number of files to read; None: all."""
    max_chars: Annotated[int, Field(gt=0)] = 1_000_000
    """Longest document that is read, in characters; longer ones are skipped and counted."""

    def _paths(self) -> tuple[Path, list[Path]]:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(
            p for p in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(p.relative_to(root).parts)
        )
        return root, files[: self.max_files]

    def plan(self) -> list[Shard]:
        return [{"start": a, "end": b} for a, b in chunks(len(self._paths()[1]), 128)]

    def read(self, shard: Shard) -> Iterator[Item]:
        root, files = self._paths()
        for path in files[shard["start"] : shard["end"]]:
            yield read_text_file(path, str(path.relative_to(root)), self.max_chars)

    def fingerprint(self) -> str:
        root, files = self._paths()
        return fingerprint([[str(p.relative_to(root)), file_hash(p)] for p in files])
