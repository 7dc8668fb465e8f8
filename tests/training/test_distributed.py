"""Two gloo processes against one: the command under torchrun (DDP), and FSDP2."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from helpers import TINY_LLAMA
from phf.core import store
from phf.core.config import ConfigError, to_plain
from phf.core.runs import NEEDED_TO_RESUME, RunFolder, checkpoint_folder
from phf.objectives import AWR, MLE, Conditional, Masking
from phf.training.config import TrainConfig
from phf.training.folder import common_checkpoint
from phf.training.lm import FromConfig, build_lm
from phf.training.train import train
from phf.training.trainer import TrainingError

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
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONFAULTHANDLER": "1"}
"""accelerate launch does not start several processes on CPUs unless the variable says so. A process that crashes says
where."""


def launched(command, launcher=LAUNCH):
    """Run a command on several processes. gloo rarely corrupts the memory of a process (LOG.md): a run that a signal
    ended is started a second time, and resumes."""
    for again in (True, False):
        ended = subprocess.run([*launcher, *command], env=ONE_THREAD, stderr=subprocess.PIPE, text=True)
        print(ended.stderr, file=sys.stderr)
        if not (again and any(signal in ended.stderr for signal in ("SIGSEGV", "SIGABRT"))):
            break
    ended.check_returncode()


def lines(run, file="metrics.jsonl"):
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


@pytest.mark.parametrize(
    "objective, launch",
    [
        pytest.param("masking", LAUNCH, id="torchrun"),
        pytest.param("sgtm", LAUNCH, id="torchrun-in-parts", marks=pytest.mark.slow),
        pytest.param("awr", ACCELERATE, id="accelerate", marks=pytest.mark.slow),
    ],
)
def test_the_command_on_two_processes_gives_the_curve_of_one(tokens_dir, tmp_path, objective, launch):
    """Each step has the same rows, summed in another order. Float32 losses agree to 1e-4 over 40 steps."""
    (tmp_path / "m.yaml").write_text(json.dumps({"model": {"name": "from_config", "config": TINY_LLAMA}}))
    settings = [
        f"objective.name={objective}",
        "train.tokens=20480",
        "train.context=32",
        "train.batch_rows=16",
        "train.micro_rows=4",
        "train.lr=1e-2",
        "train.precision=fp32",
        "train.log_every=1",
        "monitor.every=10240",
        "monitor.scenarios.plain.num_samples=4",
        "monitor.scenarios.plain.max_tokens=12",
    ]
    for name, launcher in (("one", [sys.executable]), ("two", launch)):
        command = ["-m", "phf", "train", str(tokens_dir), str(tmp_path / name), str(tmp_path / "m.yaml"), *settings]
        launched(command, launcher)
    one = lines(tmp_path / "one")
    two = lines(tmp_path / "two")
    assert len(one) == len(two) == 40
    assert [x["loss"] for x in two] == pytest.approx([x["loss"] for x in one], rel=1e-4)
    assert [x["counted_share"] for x in two] == [x["counted_share"] for x in one]
    assert [x["grad_norm"] for x in two] == pytest.approx([x["grad_norm"] for x in one], rel=1e-2)
    reduced = {"bad_gradient_share", "effective_sample_share", "weight_mean", "value_correlation", "value_loss"}
    for name in reduced & set(one[0]):
        assert [x[name] for x in two] == pytest.approx([x[name] for x in one], rel=1e-3, abs=1e-4), name
    assert objective != "awr" or reduced <= set(one[-1])
    assert store.read_json(tmp_path / "two" / "environment.json")["processes"] == 2
    # one process judges
    one = lines(tmp_path / "one", "monitor.jsonl")
    two = lines(tmp_path / "two", "monitor.jsonl")
    assert [x["tokens"] for x in two] == [x["tokens"] for x in one] == [10240, 20480]
    assert [x["heldout"]["all"] for x in two] == pytest.approx([x["heldout"]["all"] for x in one], rel=1e-3)


@pytest.mark.slow
def test_a_run_of_one_process_resumes_with_two(tokens_dir, tmp_path):
    """The rows and their order stay the same, and so does the curve, even from the middle of a line of metrics."""
    settings = {"tokens": 20480, "context": 32, "batch_rows": 16, "lr": 1e-2, "precision": "fp32", "log_every": 5}
    model = FromConfig(TINY_LLAMA)
    objective = Masking()
    train(tokens_dir=tokens_dir, out=tmp_path / "one", model=model, objective=objective, config=TrainConfig(**settings))
    train(
        tokens_dir=tokens_dir,
        out=tmp_path / "two",
        model=model,
        objective=objective,
        config=TrainConfig(**settings),
        stop_after=17,
    )
    (tmp_path / "m.yaml").write_text(json.dumps({"model": {"name": "from_config", "config": TINY_LLAMA}}))
    asked = ["objective.name=masking", *(f"train.{k}={v}" for k, v in settings.items())]
    command = ["-m", "phf", "train", str(tokens_dir), str(tmp_path / "two"), str(tmp_path / "m.yaml"), *asked]
    launched(command)
    one = lines(tmp_path / "one")
    two = lines(tmp_path / "two")
    assert not (tmp_path / "two.old-1").exists()
    assert [x["step"] for x in two] == list(range(5, 41, 5))
    assert [x["counted_share"] for x in two] == [x["counted_share"] for x in one]
    assert [x["loss"] for x in two[:3]] == [x["loss"] for x in one[:3]]
    for name in ("loss", "nll_good"):
        assert [x[name] for x in two] == pytest.approx([x[name] for x in one], rel=1e-4)


SHARDED = {
    "llama": (TINY_LLAMA, AWR(), {}, 1e-3),
    "muon": (TINY_LLAMA, MLE(), {"optimizer": "muon"}, 3e-2),  # Newton-Schulz in bfloat16
    "untied": ({**TINY_LLAMA, "tie_word_embeddings": False}, Conditional(), {"gradient_checkpointing": True}, 1e-3),
    "gpt2": (
        {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2},
        MLE(),
        {"precision": "bf16", "compile": True},
        1e-2,
    ),
}

SHARDED_RUN = """
import json, os, sys
import torch
from phf.training.config import TrainConfig
from phf.training.lm import FromConfig
from phf.objectives import AWR, MLE, Conditional
from phf.training.train import train

config = TrainConfig(**{settings!r}, shard=True)
train(
    tokens_dir=sys.argv[1],
    out=sys.argv[2],
    model=FromConfig({model!r}),
    objective={objective!r},
    config=config,
    stop_after=int(sys.argv[3]) or None,
)
sys.stdout.flush()
torch.distributed.barrier()
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", SHARDED)
def test_a_sharded_run_is_the_run_of_one_process(tokens_dir, tmp_path, family):
    """`train.shard` under torchrun with accumulated gradients gives the losses, weights and checkpoints of one process.

    An interrupted run resumes to the same bytes. A run of one process resumes sharded, and the other way round.
    """
    config, objective, more, near = SHARDED[family]
    model = FromConfig(config)
    settings = {"tokens": 15360, "context": 32, "batch_rows": 16, "lr": 1e-2, "precision": "fp32", "log_every": 1}
    settings |= {"micro_rows": 4, "save_every": 7680} | more
    (tmp_path / "m.yaml").write_text(json.dumps({"model": to_plain(model), "objective": to_plain(objective)}))
    asked = [*(f"train.{k}={v}" for k, v in settings.items()), "train.shard=true"]

    def alone(run, stop=None):
        train(
            tokens_dir=tokens_dir,
            out=tmp_path / run,
            model=model,
            objective=objective,
            config=TrainConfig(**settings),
            stop_after=stop,
        )

    def sharded(run, stop=0):
        script = SHARDED_RUN.replace("{model!r}", repr(config)).replace("{settings!r}", repr(settings))
        (tmp_path / "s.py").write_text(script.replace("{objective!r}", f"{type(objective).__name__}()"))
        by_hand = [str(tmp_path / "s.py"), str(tokens_dir), str(tmp_path / run), str(stop)]
        command = ["-m", "phf", "train", str(tokens_dir), str(tmp_path / run), str(tmp_path / "m.yaml"), *asked]
        launched(by_hand if stop else command)

    alone("one")
    sharded("two")
    sharded("again", stop=7)
    sharded("again")
    alone("onward", stop=7)
    sharded("onward")
    sharded("back", stop=7)
    alone("back")
    weights = {
        run: load_file(tmp_path / run / "model" / "model.safetensors")
        for run in ("one", "two", "again", "onward", "back")
    }
    first = lines(tmp_path / "one")
    assert len(first) == 30
    for run, found in weights.items():
        assert not (tmp_path / f"{run}.old-1").exists()
        for name in ("loss", "grad_norm") if "optimizer" not in more else ("loss",):
            assert [x[name] for x in lines(tmp_path / run)] == pytest.approx([x[name] for x in first], rel=near)
        assert found.keys() == weights["one"].keys()
        for name, tensor in weights["one"].items():
            if name.endswith(
                "c_attn.bias"
            ):  # the keys' bias gets only rounding errors as gradients, and Adam makes them large
                continue
            assert (found[name] - tensor).norm() <= 10 * near * tensor.norm(), (run, name)
    assert all(torch.equal(weights["again"][name], tensor) for name, tensor in weights["two"].items())
    heads = [(tmp_path / run / "model" / "value_head.safetensors").exists() for run in weights]
    assert heads == [objective.value is not None] * len(weights)


def test_a_model_is_divided_by_its_outermost_blocks(tokens):
    from phf.training.fsdp import decoder_blocks

    mamba = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 3, "state_size": 4}
    lm = build_lm(FromConfig(mamba), tokens.tokenizer, seed=0)
    assert {"MambaBlock", "MambaMixer"} <= set(lm._no_split_modules)
    assert [type(b).__name__ for b in decoder_blocks(lm)] == ["MambaBlock"] * 3
    lm.backbone.layers[2] = lm.backbone.layers[0]
    assert len(decoder_blocks(lm)) == 2  # the same module twice counts once
    lm.backbone.layers[1].mixer.in_proj.weight = lm.backbone.layers[0].mixer.in_proj.weight
    with pytest.raises(ConfigError, match="share weights"):
        decoder_blocks(lm)
    lm._no_split_modules = None
    with pytest.raises(ConfigError, match="MambaForCausalLM does not declare its decoder blocks"):
        decoder_blocks(lm)


def test_all_processes_resume_from_the_checkpoint_of_the_first(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    assert common_checkpoint(run, "key", torch.device("cpu")) is None
    for step in (7, 14):
        checkpoint_folder(run.checkpoints, step).mkdir(parents=True)
        for name in (*NEEDED_TO_RESUME, "complete.json"):
            text = f'{{"step": {step}, "tokens": 0}}' if name == "complete.json" else "x"
            (checkpoint_folder(run.checkpoints, step) / name).write_text(text)
    checkpoint_folder(run.checkpoints, 21).mkdir()  # half written
    assert common_checkpoint(run, "key", torch.device("cpu")) == checkpoint_folder(run.checkpoints, 14)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    for step, found in ((7, checkpoint_folder(run.checkpoints, 7)), (-1, None)):
        monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src, step=step: tensor.fill_(step))
        assert common_checkpoint(run, "key", torch.device("cpu")) == found
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: tensor.fill_(21))
    with pytest.raises(
        TrainingError, match="process 1 does not see .*checkpoint-21.* a file system that all processes share"
    ):
        common_checkpoint(run, "key", torch.device("cpu"))


def test_sharding_needs_processes_and_no_judging(tokens_dir, tmp_path, monkeypatch):
    config = TrainConfig(1e4, context=32, batch_rows=16, shard=True)
    with pytest.raises(ConfigError, match="start this command with torchrun"):
        train(tokens_dir=tokens_dir, out=tmp_path / "r", model=FromConfig(TINY_LLAMA), objective=MLE(), config=config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"judge the checkpoints \(train.milestones\) with phf eval"):
        train(
            tokens_dir=tokens_dir,
            out=tmp_path / "r",
            model=FromConfig(TINY_LLAMA),
            objective=MLE(),
            config=config,
            callbacks=(TrainerCallback(),),
        )
    assert not (tmp_path / "r").exists()


FSDP = """
import json, os, sys
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from phf.training.lm import FromConfig, build_lm
from phf.training.model import PHFModel
from phf.objectives import AWR
from phf.tokens.store import TokenStore
from phf.training.batches import to_tensors
from phf.training.order import training_order

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
store = TokenStore.open(sys.argv[1])
objective = AWR().fit(store.statistics)
model = PHFModel(build_lm(FromConfig({model!r}), store.tokenizer, 0), objective)
for block in model.lm.base_model.layers:
    fully_shard(block)
fully_shard(model)  # embeddings, tied output layer and value head are the root's
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
order, share, losses = training_order(store, objective, store.tokenizer, 32, 0), 8 // world, []
for step in range(10):
    batch = to_tensors(order.batch(8 * step + rank * share, 8 * step + (rank + 1) * share))
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
    # exit here: gloo's threads sometimes abort the interpreter's teardown, which is not tested
sys.stdout.flush()
dist.barrier()
os._exit(0)
"""


def test_fsdp2_on_two_processes_gives_the_curve_of_one(tokens_dir, tmp_path):
    (tmp_path / "f.py").write_text(FSDP.replace("{model!r}", repr(TINY_LLAMA)))
    curves = []
    for processes in (1, 2):
        command = [str(tmp_path / "f.py"), str(tokens_dir), str(tmp_path / f"{processes}.json")]
        launched(command, [*LAUNCH[:4], str(processes), *LAUNCH[5:]])
        curves.append(json.loads((tmp_path / f"{processes}.json").read_text()))
    assert curves[0][-1] < curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
