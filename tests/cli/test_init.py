"""`phf init` and `phf demo`: the first recipe."""

from __future__ import annotations

import pytest

from helpers import write_jsonl
from phf.cli.recipes import demo, init
from phf.core.config import ConfigError
from phf.recipes.recipe import load_recipe


def test_init_writes_a_recipe_that_loads_and_keeps_what_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "texts.jsonl", ["a line\n"])
    init("mine.yaml")
    assert "phf run mine.yaml" in capsys.readouterr().out
    recipe = load_recipe(["mine.yaml"])
    assert [variant.name for variant in recipe.variants] == ["mle-s0", "conditional-s0", "unlikelihood-s0"]
    text = (tmp_path / "mine.yaml").read_text()
    assert text.count("#") > 10
    with pytest.raises(ConfigError, match="exists already"):
        init("mine.yaml")
    assert (tmp_path / "mine.yaml").read_text() == text
    with pytest.raises(ConfigError, match="ends in .yaml"):
        init("mine.txt")


def test_demo_is_the_recipe_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="trian: unknown key"):
        demo(["quick", "trian.lr=1"])
