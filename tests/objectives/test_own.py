"""An objective of the user's own by name: on the command line, in recipes, resumed and judged."""

from __future__ import annotations

import json

import pytest
import torch

from helpers import TINY_LLAMA, output_of, train_tiny, weights_of
from phf.core.config import ConfigError, load
from phf.core.runs import TrainManifest, read_model_record
from phf.objectives import MLE, LossInputs, Own
from phf.recipes.recipe import TrainStage, load_recipe

CODE = """
import dataclasses
import torch
from phf import LossInputs, LossOutputs, Objective


@dataclasses.dataclass(frozen=True)
class Focal(Objective):
    gamma: float = 2.0
    scale: float | None = None

    def fit(self, statistics):
        return dataclasses.replace(self, scale=1.0 + statistics.bad_above)

    def loss(self, x: LossInputs) -> LossOutputs:
        one_minus_p = 1 - x.logp_BT.exp()
        nll = torch.where(x.mask_BT, -(one_minus_p**self.gamma) * x.logp_BT, 0.0)
        return LossOutputs(self.scale * nll.sum(), {})


class Other:
    pass


@dataclasses.dataclass(frozen=True)
class Mean(Objective):
    def loss(self, x):
        return LossOutputs(x.logp_BT.mean(), {})


other = 5
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return path


def test_the_command_trains_it_and_a_change_of_its_code_is_another_run(mine, tokens_dir, tmp_path, monkeypatch, capsys):
    model = json.dumps({"name": "from_config", "config": TINY_LLAMA})
    settings = [
        f"model={model}",
        "train.tokens=4096",
        "train.context=32",
        "train.batch_rows=16",
        "train.precision=fp32",
    ]
    run = tmp_path / "run"
    command = ["train", str(tokens_dir), str(run), *settings, f"objective.name={mine}:Focal", "objective.gamma=3"]
    output_of(command, monkeypatch, capsys)
    manifest = TrainManifest(**json.loads((run / "manifest.json").read_text()))
    assert manifest.objective["settings"] == {"gamma": 3.0, "scale": 1.0}
    assert read_model_record(run / "model").objective["name"] == "own"
    first = weights_of(run)
    output_of(command, monkeypatch, capsys)  # done before
    assert not (tmp_path / "run.old-1").exists()
    mine.write_text(CODE.replace("self.gamma)", "(self.gamma + 1))"))
    output_of(command, monkeypatch, capsys)
    assert (tmp_path / "run.old-1").exists()
    assert weights_of(run) != first


def test_with_gamma_0_it_is_maximum_likelihood_and_resumes(mine, tokens_dir, tmp_path):
    own = Own(f"{mine}:Focal", {"gamma": 0})
    train_tiny(tokens_dir, tmp_path / "own", own, steps=6)
    train_tiny(tokens_dir, tmp_path / "mle", MLE(), steps=6)
    assert weights_of(tmp_path / "own") == weights_of(tmp_path / "mle")
    train_tiny(tokens_dir, tmp_path / "parts", own, steps=6, stop_after=2)
    train_tiny(tokens_dir, tmp_path / "parts", own, steps=6)
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "own")


def test_recipes_take_it(mine, tmp_path):
    (tmp_path / "r.yaml").write_text(
        f"base: demo\nobjectives:\n  focal: {{name: '{mine}:Focal', gamma: 1}}\nonly: [mle, focal]\n"
        "grid: {objectives.focal.settings: [{gamma: 1}, {gamma: 2}]}\n"
    )
    recipe = load_recipe([str(tmp_path / "r.yaml")])
    found = [v.objective for v in recipe.variants if v.objective_name == "focal"]
    assert [o.inner.gamma for o in found] == [1, 2]
    x = LossInputs(torch.zeros(2) - 1.0, torch.zeros(2) - 0.5, torch.zeros(2), torch.ones(2, dtype=torch.bool))
    assert found[0].fit(recipe_statistics()).loss(x).loss_sum.item() > 0


def recipe_statistics():
    from phf.tokens.statistics import Statistics

    return Statistics(lambda: iter(()), 0.0)


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("mine.py:Focl", [], "has no objective 'Focl' .did you mean 'Focal'"),
        ("mine.py:Focal", ["objective.gama=2"], "has no setting 'gama' .did you mean 'gamma'"),
        ("mine.py:Focal", ["objective.gamma=much"], "gamma: Input should be a valid number"),
        ("mine.py:Other", [], "is not a dataclass derived from phf.Objective"),
        ("mine.py:other", [], "has no objective 'other'"),
        ("gone.py:Focal", [], "there is no file"),
    ],
)
def test_mistakes_are_one_line(mine, monkeypatch, name, settings, message):
    monkeypatch.chdir(mine.parent)
    asked = [f"objective.name={name}", *settings, "train.tokens=1e5", "model=tiny"]
    with pytest.raises(ConfigError, match=message) as found:
        load([], asked, TrainStage)
    assert len(str(found.value).splitlines()) == 1


def test_a_loss_that_mixes_targets_is_refused(mine, tokens_dir, tmp_path):
    with pytest.raises(ConfigError, match="return sums over targets"):
        train_tiny(tokens_dir, tmp_path / "r", Own(f"{mine}:Mean"), steps=2)
