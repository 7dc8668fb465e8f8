"""The extras: what a plain `pip install phf` can do, and what says which extra is missing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib

import pytest

from helpers import ROOT
from phf.core.extras import NAMES, MissingPackage, named, needs, optional

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {package: module for module, package in NAMES.items()} | {"pyyaml": "yaml", "universal-pathlib": "upath"}
HIDE = """
import os, sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in os.environ["HIDDEN"].split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
"""


def modules(requirements: list[str]) -> set[str]:
    """Names for `import` of requirements."""
    packages = {re.match(r"[\w.-]+", text)[0].lower() for text in requirements} - {"phf"}
    return {MODULES.get(package, package.replace("-", "_")) for package in packages}


BASE = modules(PROJECT["dependencies"])
EXTRAS = {extra: modules(needed) for extra, needed in PROJECT["optional-dependencies"].items()}


@pytest.fixture
def plain(tmp_path):
    """Runs Python as if only what a plain `pip install phf` brings were installed."""
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(HIDE)
    hidden = set().union(*EXTRAS.values()) - BASE

    def run(*arguments, but=()):
        env = {"PYTHONPATH": str(tmp_path / "hide"), "HIDDEN": " ".join(hidden - set(but)), "PATH": "/usr/bin:/bin"}
        return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=env)

    return run


def test_every_package_that_phf_imports_is_a_dependency():
    """Also those that other packages bring today."""
    found = set()
    for path in (ROOT / "src" / "phf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "optional":
                found.add(ast.literal_eval(node.args[0]).split(".")[0])
    own = set(sys.stdlib_module_names) | {"phf", "pydantic_core"}  # the last is a part of pydantic
    assert found - own <= BASE.union(*(EXTRAS[extra] for extra in EXTRAS if extra not in ("all", "dev", "docs")))


def test_a_plain_installation_reads_the_rows_of_every_objective(plain, tokens_dir):
    script = ROOT / "tests" / "plain_install.py"
    whole = subprocess.run([sys.executable, script, tokens_dir], capture_output=True, text=True, check=True).stdout
    found = plain(script, tokens_dir)
    assert found.stderr == ""
    assert found.stdout == whole
    assert len(whole.splitlines()) == 12


@pytest.mark.parametrize(
    ("code", "extra"),
    [
        ("import phf; phf.train('tokens', 'out', 'tiny')", "train"),
        ("from phf import fused_loss", "train"),
        ("from phf import MLE; MLE().loss(None)", "train"),
        ("from phf import Regex; Regex('a')", "score"),
        ("from phf import PEP8; PEP8().spans('a = 1')", "score"),
        ("from phf import PHFModel", "train"),
        ("import phf; phf.report('runs')", "report"),
    ],
)
def test_what_needs_an_extra_says_which(plain, code, extra):
    found = plain("-c", code)
    assert f"pip install 'phf[{extra}]'" in found.stderr


def test_commands_say_which_extra_they_need(plain, tokens_dir, tmp_path):
    assert "export-tokens" in plain("-m", "phf", "--help").stdout
    for command, extra in (
        (["train", tokens_dir, tmp_path / "out", "model=tiny"], "train"),
        (["score", ROOT / "README.md", tmp_path / "out", "--scorer", "pep8"], "score"),
        (["report", tmp_path], "report"),
        (["compare", tmp_path, tmp_path], "train"),
        (["push", tmp_path, "a/b"], "score"),
    ):
        found = plain("-m", "phf", *command)
        assert found.returncode == 2
        assert re.fullmatch(rf"error: [^\n]*pip install 'phf\[{extra}\]'\n", found.stderr), found.stderr


def test_engines_need_torch_but_not_transformers(plain, tokens_dir, tmp_path):
    code = "import phf.engines.export, phf.training.fused, phf.training.batches; from phf import MLE; MLE().loss"
    assert plain("-c", code, but=("torch",)).stderr == ""
    export = f"import phf; phf.export_tokens({str(tokens_dir)!r}, {str(tmp_path / 'out')!r}, phf.MLE())"
    found = plain("-c", export, but=("torch",))
    assert "MissingPackage: export-tokens needs transformers: pip install 'phf[train]'" in found.stderr
    assert not (tmp_path / "out").exists()


def test_the_name_of_an_extra(tmp_path):
    assert needs("sklearn.metrics") == "needs sklearn: pip install 'phf[score]'"
    assert needs("huggingface_hub") == "needs huggingface_hub: pip install 'phf[score]'"
    assert needs("scipy.special", "train") == "needs scipy: pip install 'phf[train]'"
    assert needs("ray") == "needs ray: pip install 'phf[ray]'"
    assert needs("torch", "score") == "needs torch: pip install 'phf[train]'"  # score does not bring it
    assert needs("nothing_at_all") == "needs nothing_at_all: pip install nothing-at-all"
    assert optional("json").dumps([]) == "[]"
    absent = optional("nothing_at_all")
    with pytest.raises(MissingPackage, match="phf needs nothing_at_all"):
        absent.member()
    assert not hasattr(absent, "__wrapped__")
    other = ModuleNotFoundError("No module named 'mine'", name="mine")
    assert named(other, "it") is other  # a mistake in a user's own file keeps its message
