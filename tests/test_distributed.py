"""Two gloo processes against one: the command through torchrun (DDP), and FSDP2 applied to the wrapper by hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from conftest import TINY_LLAMA
from phf.config import ConfigError, to_plain
from phf.model import FromConfig
from phf.objectives import AWR, MLE, Conditional, Masking
from phf.train import TrainConfig, train

LAUNCH = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc-per-node",
    "2",
    "--rdzv-backend",
    "c10d",
    "--rdzv-endpoint",
    "localhost:0",
]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def lines(run, file="metrics.jsonl"):
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


def test_the_command_under_torchrun_gives_the_curve_of_one_process(tokens_dir, tmp_path):
    """The same rows in each step, sums in another order: float32 losses agree to 1e-4 over 40 steps."""
    (tmp_path / "m.yaml").write_text(json.dumps({"model": {"name": "from_config", "config": TINY_LLAMA}}))
    settings = [
        "objective.name=masking",
        "train.tokens=20480",
        "train.context=32",
        "train.batch_rows=16",
        "train.lr=1e-2",
        "train.precision=fp32",
        "train.log_every=1",
        "during.every=10240",
        "during.scenarios.plain.num_samples=4",
        "during.scenarios.plain.max_tokens=12",
    ]
    for name, launcher in (("one", [sys.executable]), ("two", LAUNCH)):
        command = [
            *launcher,
            "-m",
            "phf",
            "train",
            str(tokens_dir),
            str(tmp_path / name),
            str(tmp_path / "m.yaml"),
            *settings,
        ]
        subprocess.run(command, check=True, env=ONE_THREAD)
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert len(one) == len(two) == 40
    assert [x["loss"] for x in two] == pytest.approx([x["loss"] for x in one], rel=1e-4)
    assert [x["counted_share"] for x in two] == [x["counted_share"] for x in one]
    assert [x["grad_norm"] for x in two] == pytest.approx([x["grad_norm"] for x in one], rel=1e-2)
    one, two = lines(tmp_path / "one", "during.jsonl"), lines(tmp_path / "two", "during.jsonl")  # one process judges
    assert [x["tokens"] for x in two] == [x["tokens"] for x in one] == [10240, 20480]
    assert [x["heldout"]["all"] for x in two] == pytest.approx([x["heldout"]["all"] for x in one], rel=1e-3)


def test_a_run_of_one_process_goes_on_with_two(tokens_dir, tmp_path):
    """The same rows in the same order, from the middle of the run on: the curve of a run that one process does."""
    settings = {"tokens": 20480, "context": 32, "batch_rows": 16, "lr": 1e-2, "precision": "fp32", "log_every": 1}
    model, objective = FromConfig(TINY_LLAMA), Masking()
    train(tokens_dir, tmp_path / "one", model, objective, TrainConfig(**settings))
    train(tokens_dir, tmp_path / "two", model, objective, TrainConfig(**settings), stop_after=17)
    (tmp_path / "m.yaml").write_text(json.dumps({"model": {"name": "from_config", "config": TINY_LLAMA}}))
    asked = ["objective.name=masking", *(f"train.{k}={v}" for k, v in settings.items())]
    subprocess.run(
        [*LAUNCH, "-m", "phf", "train", str(tokens_dir), str(tmp_path / "two"), str(tmp_path / "m.yaml"), *asked],
        check=True, env=ONE_THREAD,
    )  # fmt: skip
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert not (tmp_path / "two.old-1").exists()
    assert [x["counted_share"] for x in two] == [x["counted_share"] for x in one]
    assert [x["loss"] for x in two[:17]] == [x["loss"] for x in one[:17]]
    assert [x["loss"] for x in two] == pytest.approx([x["loss"] for x in one], rel=1e-4)


SHARDED = {
    "llama": (TINY_LLAMA, AWR()),
    "untied": ({**TINY_LLAMA, "tie_word_embeddings": False}, Conditional()),
    "gpt2": ({"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}, MLE()),
}


@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("untied", "gpt2"))])
def test_a_sharded_run_is_the_run_of_one_process(tokens_dir, tmp_path, family):
    """`train.shard` under torchrun, with accumulated gradients: losses, weights and checkpoints as of one process; a run that
    one process began goes on sharded, from its weights and its optimizer's state, and the other way round."""
    model, objective = FromConfig(SHARDED[family][0]), SHARDED[family][1]
    settings = {"tokens": 15360, "context": 32, "batch_rows": 16, "lr": 1e-2, "precision": "fp32", "log_every": 1}
    settings |= {"micro_rows": 4, "save_every": 7680}
    (tmp_path / "m.yaml").write_text(json.dumps({"model": to_plain(model), "objective": to_plain(objective)}))
    train(tokens_dir, tmp_path / "one", model, objective, TrainConfig(**settings))
    train(tokens_dir, tmp_path / "onward", model, objective, TrainConfig(**settings), stop_after=7)
    asked = [*(f"train.{k}={v}" for k, v in settings.items()), "train.shard=true"]
    for run in ("two", "onward"):
        command = [
            *LAUNCH,
            "-m",
            "phf",
            "train",
            str(tokens_dir),
            str(tmp_path / run),
            str(tmp_path / "m.yaml"),
            *asked,
        ]
        subprocess.run(command, check=True, env=ONE_THREAD)
    one, two, onward = (lines(tmp_path / run) for run in ("one", "two", "onward"))
    assert len(one) == 30
    for name in ("loss", "grad_norm"):
        wanted = pytest.approx([x[name] for x in one], rel=1e-3)
        assert [x[name] for x in two] == wanted
        assert [x[name] for x in onward] == wanted
    assert [x["loss"] for x in onward[:7]] == [x["loss"] for x in one[:7]]
    for file in (tmp_path / "one" / "model").glob("*.safetensors"):
        weights = load_file(file)
        for run in ("two", "onward"):
            found = load_file(tmp_path / run / "model" / file.name)
            assert found.keys() == weights.keys()
            for name, tensor in weights.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=1e-4)
    # half of the sharded run, by one process to the end
    whole = tmp_path / "two"
    for gone in ("manifest.json", "checkpoints/checkpoint-30/complete.json"):
        (whole / gone).unlink()
    shutil.rmtree(whole / "model")
    train(tokens_dir, whole, model, objective, TrainConfig(**settings))
    assert not (tmp_path / "two.old-1").exists()
    assert [x["loss"] for x in lines(whole)] == pytest.approx([x["loss"] for x in one], rel=1e-3)


def test_sharding_needs_processes_and_no_judging(tokens_dir, tmp_path, monkeypatch):
    config = TrainConfig(1e4, context=32, batch_rows=16, shard=True)
    with pytest.raises(ConfigError, match="start this command with torchrun"):
        train(tokens_dir, tmp_path / "r", FromConfig(TINY_LLAMA), MLE(), config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"judge the checkpoints \(train.milestones\) with phf eval"):
        train(tokens_dir, tmp_path / "r", FromConfig(TINY_LLAMA), MLE(), config, callbacks=(TrainerCallback(),))
    assert not (tmp_path / "r").exists()


FSDP = """
import json, os, sys
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from phf.model import FromConfig, PHFModel, build_lm
from phf.objectives import AWR
from phf.packing import Order, Rows
from phf.tokens import TokenStore
from phf.trainer import to_tensors

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
store = TokenStore.open(sys.argv[1])
objective = AWR().fit(store.table)
rows = Rows(store, objective.edit(store.table, 0), 32)
model = PHFModel(build_lm(FromConfig({model!r}), store.tokenizer, 0), objective)
for block in model.lm.base_model.layers:
    fully_shard(block)
fully_shard(model)  # embeddings, tied output layer and value head are the root's
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
order, share, losses = Order(rows.num_rows, 0), 8 // world, []
for step in range(10):
    batch = to_tensors(rows.batch(order.rows(8 * step + rank * share, 8 * step + (rank + 1) * share)))
    counted = objective.counted(batch["scores"], batch["mask"]).sum()
    dist.all_reduce(counted)
    loss = model(**batch, denominator=counted)["loss"] * world  # FSDP averages gradients over processes
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach() / world
    dist.all_reduce(total)
    losses.append(total.item())
if rank == 0:
    with open(sys.argv[2], "w") as file:
        json.dump(losses, file)
    # written; gloo's threads sometimes abort the interpreter's teardown, which is not what is tested
sys.stdout.flush()
dist.barrier()
os._exit(0)
"""


def test_fsdp2_on_two_processes_gives_the_curve_of_one(tokens_dir, tmp_path):
    (tmp_path / "f.py").write_text(FSDP.replace("{model!r}", repr(TINY_LLAMA)))
    curves = []
    for processes in (1, 2):
        launcher = [*LAUNCH[:4], str(processes), *LAUNCH[5:]]
        subprocess.run(
            [*launcher, str(tmp_path / "f.py"), str(tokens_dir), str(tmp_path / f"{processes}.json")],
            check=True,
            env=ONE_THREAD,
        )
        curves.append(json.loads((tmp_path / f"{processes}.json").read_text()))
    assert curves[0][-1] < curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
