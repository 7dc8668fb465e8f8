"""The floors: imports go down only, and floors 0 to 3 import without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import phf

SOURCE = Path(phf.__file__).parent
FLOORS = [
    {"types", "config", "store", "device"},
    {"corpus", "segment", "metrics"},
    {"scorers", "annotate", "cluster", "fitting", "hub"},
    {"tokens", "packing", "survey"},
    {"objectives", "fused", "attention", "sharding", "model", "trainer", "train"},
    {
        "served",
        "decoding",
        "sample",
        "reference",
        "capabilities",
        "harness",
        "heldout",
        "evaluate",
        "during",
        "attackers",
        "control_attacks",
        "redteam",
        "release",
    },
    {"report", "recipe", "running", "plan", "cli", "__init__", "__main__"},
]
FLOOR = {name: n for n, names in enumerate(FLOORS) for name in names}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "phf":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("phf.")}
    return found


def test_every_module_has_a_floor_and_imports_go_down_only():
    checked = 0
    for path in SOURCE.rglob("*.py"):
        name = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        for imported in imports_of(path):
            assert FLOOR[imported] <= FLOOR[name], (
                f"{name} (floor {FLOOR[name]}) imports {imported} (floor {FLOOR[imported]})"
            )
            checked += 1
    assert checked > 30


def test_floors_0_to_3_import_without_torch():
    modules = [f"phf.{name}" for names in FLOORS[:4] for name in names]
    code = f"import sys, importlib\nsys.modules['torch'] = None\nfor m in {modules!r}: importlib.import_module(m)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_names_are_there():
    modules = {p.stem for p in SOURCE.iterdir()}
    for name in phf.__all__:
        assert getattr(phf, name).__module__.startswith("phf.")
        assert name not in modules, f"phf.{name} would be the function or the module, by what was imported before"


def test_no_pickle_eval_or_remote_code():
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name == "torch.load":  # of weights only, said where it is called
                    assert "weights_only=True" in ast.unparse(node), f"{path}: {name}"
                    continue
                assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "os.system"), f"{path}: {name}"
                assert all(k.arg != "trust_remote_code" for k in node.keywords), path
