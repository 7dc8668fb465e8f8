"""The layout: imports go to earlier packages only, no package has a cycle inside, and everything up to `tokens` imports
without torch and transformers."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import phf
from helpers import ROOT

SOURCE = Path(phf.__file__).parent
PACKAGES = [
    "core",
    "data",
    "scorers",
    "scoring",
    "tokens",
    "objectives",
    "training",
    "engines",
    "generation",
    "evaluation",
    "labelling",
    "redteaming",
    "report",
    "recipes",
    "release",
    "functions",
    "cli",
]
"""In reading order (docs/architecture.md). A package may import the ones before it."""
WITHOUT_TORCH = PACKAGES[: PACKAGES.index("tokens") + 1]
MODULES = {
    ".".join(p.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): p for p in SOURCE.rglob("*.py")
}


@functools.cache
def imports_of(module: str) -> set[str]:
    """Modules of phf that a module imports, at any place in it, and the packages that these imports load first."""
    return imports_in(MODULES[module].read_text())


def imports_in(source: str) -> set[str]:
    """The same of a source text. Raises ValueError for an import whose module the text does not name in full."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            if node.level or node.module == "phf":
                raise ValueError(f"import by the module's full name: {ast.unparse(node)}")
            if node.module and node.module.startswith("phf."):
                home = node.module.removeprefix("phf.")
                for alias in node.names:
                    found.add(inner if (inner := f"{home}.{alias.name}") in MODULES else home)
        elif isinstance(node, ast.Import):
            if any(a.name == "phf" or a.name.startswith("phf.") for a in node.names):
                raise ValueError(f"import names, not modules: {ast.unparse(node)}")
        elif isinstance(node, ast.Call):
            call = ast.unparse(node)
            if "phf" in call and call.startswith(("importlib.", "import_module", "__import__")):
                raise ValueError(f"import with a statement: {call}")
    return found | {".".join(parts[:n]) for m in found for parts in [m.split(".")] for n in range(1, len(parts))}


def package_of(module: str) -> str:
    return module.split(".")[0]


def test_every_module_belongs_to_a_package():
    assert {package_of(m) for m in MODULES} - {"__init__", "__main__"} == set(PACKAGES)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"__init__", "__main__"}))
def test_imports_go_to_an_earlier_package(module):
    allowed = PACKAGES[: PACKAGES.index(package_of(module)) + 1]
    for imported in imports_of(module):
        assert imported in MODULES, f"phf.{module} imports phf.{imported}, which is not a module"
        assert package_of(imported) in allowed, f"phf.{module} imports phf.{imported}, a later package"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_has_no_cycle_inside(package):
    graph = {m: {i for i in imports_of(m) if package_of(i) == package} for m in MODULES if package_of(m) == package}
    for module, imported in graph.items():  # a module is loaded after the packages around it
        imported -= {outer for outer in imported if f"{module}.".startswith(f"{outer}.")}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph)  # a cycle raises


def test_the_check_finds_cycles_and_imports():
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())
    assert "training.config" in imports_of("evaluation.monitor")  # also those inside functions
    assert "training.train" in imports_of("cli.training")
    assert imports_in("from phf.evaluation.capabilities.base import Capability") == {
        "evaluation.capabilities.base",
        "evaluation.capabilities",
        "evaluation",
    }


@pytest.mark.parametrize(
    "source",
    [
        "from ..training.train import train",
        "from . import training",
        "import phf",
        "import phf.training.train",
        "from phf import train",
        "import importlib; importlib.import_module('phf.training.train')",
    ],
)
def test_imports_that_the_check_cannot_follow_are_errors(source):
    with pytest.raises(ValueError, match="import"):
        imports_in(source)


def test_everything_up_to_tokens_imports_without_torch_and_transformers():
    modules = [f"phf.{m}" for m in MODULES if package_of(m) in WITHOUT_TORCH]
    assert len(modules) > 20
    code = (
        f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\n"
        "sys.exit(' '.join({'torch', 'transformers'} & set(sys.modules)) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist_and_do_not_collide_with_packages():
    modules = {p.stem for p in SOURCE.iterdir()}
    assert len(phf.__all__) > 50
    assert set(phf.__all__) <= set(dir(phf))
    for name in set(phf.__all__) - {"report"}:
        assert getattr(phf, name).__module__.startswith("phf.")
        assert name not in modules, f"phf.{name} would be the function or the module, depending on earlier imports"
    assert phf.report is sys.modules["phf.report"]  # both at once
    assert callable(phf.report)


def test_no_pickle_eval_or_remote_code():
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name == "torch.load":  # allowed for weights only
                    assert "weights_only=True" in ast.unparse(node), f"{path}: {name}"
                    continue
                sandboxed = path.name == "_sandboxed.py" and name == "exec"
                unsafe = ("eval", "exec", "pickle.load", "pickle.loads", "os.system")
                assert sandboxed or name not in unsafe, f"{path}: {name}"
                trusts = [ast.unparse(k.value) for k in node.keywords if k.arg == "trust_remote_code"]
                assert set(trusts) <= {"False"}, path
                loads = name.startswith("Auto") and name.endswith((".from_pretrained", ".from_config"))
                assert trusts or not loads, f"{path}: {name} without trust_remote_code=False"


@pytest.mark.slow
def test_type_checkers_see_the_public_names(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import phf\n\nphf.train('tokens', 'out', 'tiny', seed='one')\nphf.Scenario(num_samples='many')\n"
    )
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", str(program)], capture_output=True, text=True, cwd=ROOT
    )
    assert 'Argument "seed" to "train" has incompatible type "str"' in checked.stdout
    assert 'Argument "num_samples" to "Scenario" has incompatible type "str"' in checked.stdout


def test_one_value_per_assignment():
    """`a, b = x, y` only where the values depend on each other, as in a swap."""
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Tuple)
                and isinstance(node.value, ast.Tuple)
            ):
                targets = [ast.unparse(t) for t in node.targets[0].elts]
                read = {ast.unparse(n) for n in ast.walk(node.value) if isinstance(n, ast.Name | ast.Attribute)}
                if not set(targets) & read:
                    found.append(f"{path.relative_to(SOURCE)}:{node.lineno}")
    assert found == []


def test_free_form_data_stay_rare():
    spelled = sum(path.read_text().count("dict[str, Any]") for path in SOURCE.rglob("*.py"))
    assert 10 < spelled <= 40
