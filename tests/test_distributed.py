"""Two gloo processes against one: the command through torchrun (DDP), and FSDP2 applied to the wrapper by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from conftest import TINY_LLAMA
from phf.model import FromConfig
from phf.objectives import Masking
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
