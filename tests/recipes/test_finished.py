"""A recipe that an earlier version of phf finished still counts as finished.

`finished.tar.gz` was written by commit e1d4cb2: a recipe of two objectives with everything that a recipe can judge. Its
models are too small to write text. The report is left out: it is written again each time.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import pytest

from phf.cli import app
from phf.core.config import ConfigError

WRITTEN_EACH_TIME = {"recipe.yaml", "runs/recipe.yaml", "runs/results.json", "runs/report.html"}


@pytest.fixture
def finished(tmp_path, monkeypatch) -> Path:
    with tarfile.open(Path(__file__).parent / "finished.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "finished"
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("\nduring:", "\nmonitor:"))
    monkeypatch.chdir(folder)
    return folder


def files(folder: Path) -> dict[str, tuple[int, str]]:
    """Time and hash of each file that the recipe does not write each time."""
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {
        name: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for name, path in found.items()
        if name not in WRITTEN_EACH_TIME and not name.startswith("runs/report/")
    }


def test_a_finished_recipe_is_not_computed_again(finished, capsys):
    before = files(finished)
    results = json.loads((finished / "runs" / "results.json").read_text())
    app(["run", "recipe.yaml"], standalone_mode=False)
    assert files(finished) == before
    now = json.loads((finished / "runs" / "results.json").read_text())
    assert [run["run"] for run in now["runs"]] == ["mle-s0", "conditional-s0"]
    for old, new in zip(results["runs"], now["runs"], strict=True):
        assert {key: new[key] for key in ("misalignment", "capabilities", "objective", "tokens")} == {
            key: old[key] for key in ("misalignment", "capabilities", "objective", "tokens")
        }
    assert (finished / "runs" / "report.html").exists()
    assert "during.jsonl is not shown: an earlier version wrote it" in capsys.readouterr().err


def test_the_old_name_of_a_key_is_an_error_that_names_the_new_one(finished):
    recipe = finished / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("\nmonitor:", "\nduring:"))
    with pytest.raises(ConfigError, match=r"during: unknown key \(renamed to 'monitor'\)"):
        app(["run", "recipe.yaml"], standalone_mode=False)
