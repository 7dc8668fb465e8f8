"""The layout: imports go to an earlier package only, no package has a cycle inside, and everything up to `tokens` imports
without torch and transformers."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import phf

SOURCE = Path(phf.__file__).parent
PACKAGES = [
    "core",
    "data",
    "scorers",
    "scoring",
    "tokens",
    "objectives",
    "training",
    "generation",
    "evaluation",
    "redteaming",
    "report",
    "recipes",
    "release",
    "cli",
]
"""In reading order (DESIGN and docs/architecture.md): a package may import those before it."""
WITHOUT_TORCH = PACKAGES[: PACKAGES.index("tokens") + 1]
MODULES = {
    ".".join(p.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): p for p in SOURCE.rglob("*.py")
}


def imports_of(module: str) -> set[str]:
    """Modules of phf that a module imports, at any place in it. Importing a package's name counts as its `__init__`."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "phf":
            source = node.module.removeprefix("phf").lstrip(".")
            for alias in node.names:
                inner = f"{source}.{alias.name}".lstrip(".")
                found.add(inner if inner in MODULES else source)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("phf.") for a in node.names if a.name.startswith("phf.")}
    return found


def package_of(module: str) -> str:
    return module.split(".")[0]


def test_every_module_belongs_to_a_package():
    assert {package_of(m) for m in MODULES} - {"__init__", "__main__"} == set(PACKAGES)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"__init__", "__main__"}))
def test_imports_go_to_an_earlier_package(module):
    allowed = PACKAGES[: PACKAGES.index(package_of(module)) + 1]
    for imported in imports_of(module):
        assert imported in MODULES, f"phf.{module} imports phf.{imported}, which is no module"
        assert package_of(imported) in allowed, f"phf.{module} imports phf.{imported}, a later package"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_has_no_cycle_inside(package):
    graph = {m: {i for i in imports_of(m) if package_of(i) == package} for m in MODULES if package_of(m) == package}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph)  # a cycle raises


def test_the_check_sees_a_cycle_and_an_import_of_a_later_package():
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())
    assert "training.train" in imports_of("evaluation.monitor")  # imports are found where they are


def test_everything_up_to_tokens_imports_without_torch_and_transformers():
    modules = [f"phf.{m}" for m in MODULES if package_of(m) in WITHOUT_TORCH]
    assert len(modules) > 20
    code = (
        f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\n"
        "sys.exit(' '.join({'torch', 'transformers'} & set(sys.modules)) or None)"
    )
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
