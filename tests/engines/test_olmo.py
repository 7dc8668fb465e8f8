"""phf in OLMo-core: losses and gradients against the plain formula on one and on two processes, and resume."""

from __future__ import annotations

import importlib.util
import json

import pytest

from helpers import ENGINE_OBJECTIVES, LINK, found_by, tiny_texts, write_jsonl
from phf.data.readers import Jsonl
from phf.data.segment import Lines
from phf.scoring.score import score_corpus
from phf.tokens.store import tokenize_corpus
from phf.tokens.tokenizer import TrainBPE

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("olmo_core") is None, reason="needs ai2-olmo-core, which brings many packages"
)

PROGRAM = """
import json, os, sys
from pathlib import Path
import numpy as np, torch, torch.distributed as dist
torch.set_num_threads(1)
from olmo_core.distributed.parallel import DataParallelType
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import AdamWConfig
from olmo_core.train import Duration, TrainerConfig, prepare_training_environment, teardown_training_environment
from olmo_core.train.callbacks import Callback, CheckpointerCallback
from olmo_core.train.train_module.transformer.config import TransformerDataParallelConfig
from phf.core.config import validate
from phf.engines.olmo import RowLoader, ScoredTrainModule, export_to_hf
from phf.objectives import AnyObjective
from phf.tokens.store import TokenStore
from phf.tokens.tokenizer import add_control_tokens, table_size
from phf.training.batches import to_tensors
from phf.training.fused import unfused_loss
from phf.training.order import training_order

CONTEXT, ROWS = 32, 8
folder, mode, settings, *rest = sys.argv[1:]
world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
if world > 1:
    prepare_training_environment(backend="gloo", shared_filesystem=True)
tokens = TokenStore.open(f"{folder}/tokens")

def made(plain):
    objective = validate(plain, AnyObjective).fit(tokens.statistics)
    tokenizer = tokens.tokenizer
    add_control_tokens(tokenizer, list(objective.control_tokens))
    order = training_order(tokens, objective, tokenizer, CONTEXT, 0, places=400)
    torch.manual_seed(0)
    model = TransformerConfig.olmo2_14M(vocab_size=320, n_layers=2).build(init_device="cpu")
    model.init_weights(max_seq_len=CONTEXT, device=torch.device("cpu"))
    import olmo_core.distributed.parallel as parallel
    parallel._WORLD_MESH = None
    data = TransformerDataParallelConfig(name=DataParallelType.fsdp) if world > 1 else None
    module = ScoredTrainModule(
        model=model, optim=AdamWConfig(lr=1e-3), rank_microbatch_size=2 * CONTEXT, max_sequence_length=CONTEXT,
        dp_config=data, device=torch.device("cpu"), objective=objective)
    loader = RowLoader(order, ROWS, CONTEXT, objective, work_dir=f"{folder}/work", dp_world_size=world, dp_rank=rank,
                       fs_local_rank=rank)
    return objective, tokenizer, order, module, loader

def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

if mode == "gradients":
    found = {}
    for name, plain in json.loads(settings).items():
        objective, _, order, module, loader = made(plain)
        metrics = {}
        module.record_metric = lambda *a, **k: None
        module.record_ce_loss = lambda value, *a, **k: metrics.update(loss=value.detach().clone())
        batch = loader.get_mock_batch()
        shares = [(batch["labels"] != -100).sum().item()]
        module.train_batch({k: v.clone() for k, v in batch.items()})
        got = torch.cat([whole(p.grad).reshape(-1) for p in module.model.parameters() if p.grad is not None])
        loss = metrics["loss"].clone()
        if world > 1:
            dist.all_reduce(loss)
            loss /= world
        torch.manual_seed(0)
        plain_model = TransformerConfig.olmo2_14M(vocab_size=320, n_layers=2).build(init_device="cpu")
        with torch.no_grad():
            for mine, theirs in zip(plain_model.parameters(), module.model.parameters()):
                mine.copy_(whole(theirs))
        rows = to_tensors(order.batch(0, ROWS))
        hidden = []
        plain_model.lm_head.w_out.register_forward_pre_hook(lambda m, given: hidden.append(given[0]))
        plain_model(rows["input_ids"])
        counted = torch.zeros_like(rows["mask"])
        from phf.objectives import count_targets
        counted = count_targets(objective, rows["scores"], rows["mask"], rows.get("phase"))
        out = unfused_loss(
            hidden[0].flatten(0, 1), plain_model.lm_head.w_out.weight, None, rows["targets"].flatten(),
            rows["scores"].flatten(0, 1), rows["mask"].flatten(), None, objective,
            phase_N=None if "phase" not in rows else rows["phase"].flatten())
        want = out.loss_sum / counted.sum()
        want.backward()
        expected = torch.cat([p.grad.reshape(-1) for p in plain_model.parameters() if p.grad is not None])
        error = ((got - expected).norm() / expected.norm()).item()
        found[name] = {"loss": loss.item(), "want": want.item(), "error": error, "norm": expected.norm().item()}
    if rank == 0:
        print("FOUND", json.dumps(found), flush=True)
else:
    objective, tokenizer, order, module, loader = made(json.loads(settings))
    out, steps, stop = rest[0], int(rest[1]), int(rest[2])
    losses = []
    class Record(Callback):
        def log_metrics(self, step, metrics):
            if "train/CE loss" in metrics:
                losses.append([step, metrics["train/CE loss"]])
    config = TrainerConfig(
        save_folder=out, device="cpu", max_duration=Duration.steps(steps), metrics_collect_interval=1,
        hard_stop=Duration.steps(stop) if stop else None, cancel_check_interval=10, no_evals=True,
        callbacks={"checkpointer": CheckpointerCallback(save_interval=1000, save_async=False), "record": Record()})
    trainer = config.build(module, loader)
    trainer.maybe_load_checkpoint(out)
    trainer.fit()
    state = {k: whole(v).detach().clone() for k, v in module.model.state_dict().items()}
    if rank == 0:
        export_to_hf(module.model, state, tokens, objective, CONTEXT, out + "-hf")
        print("FOUND", json.dumps(losses), flush=True)
if world > 1:
    teardown_training_environment()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("olmo")
    score_corpus(Jsonl(str(write_jsonl(folder / "t.jsonl", tiny_texts(60)))), Lines(), LINK, folder / "s")
    tokenize_corpus(folder / "s", TrainBPE(300), folder / "tokens", heldout=0.1)
    (folder / "program.py").write_text(PROGRAM)
    return folder


def run(place, world, *arguments):
    return found_by(place / "program.py", world, place, *arguments)


@pytest.mark.parametrize("world", [1, 2])
def test_losses_and_gradients_are_the_formula_s(place, world):
    """With two processes, their shares of counted targets differ."""
    found = run(place, world, "gradients", json.dumps(ENGINE_OBJECTIVES))
    assert found.keys() == ENGINE_OBJECTIVES.keys()
    for name, one in found.items():
        assert one["loss"] == pytest.approx(one["want"], rel=1e-5), name
        assert one["error"] < 1e-5, name
    assert found["sixty-fourth"]["norm"] == pytest.approx(found["mle"]["norm"] / 64, rel=1e-4)


@pytest.mark.slow
def test_a_run_stopped_on_two_processes_goes_on_on_one_and_is_judged(place, tmp_path):
    from phf.evaluation.evaluate import evaluate_model
    from phf.generation.scenario import Scenario

    settings = json.dumps(ENGINE_OBJECTIVES["conditional"])
    whole = run(place, 1, "fit", settings, tmp_path / "whole", 12, 0)
    first = run(place, 2, "fit", settings, tmp_path / "parts", 12, 5)
    second = run(place, 1, "fit", settings, tmp_path / "parts", 12, 0)
    losses = dict(whole)
    parts = {**dict(first), **dict(second)}
    for step in range(1, 13):
        assert parts[step] == pytest.approx(losses[step], rel=1e-4), step
    assert [step for step, _ in second] == list(range(6, 13))
    judged = evaluate_model(
        str(tmp_path / "whole-hf"), tmp_path / "eval", LINK, {"u": Scenario(num_samples=4, max_tokens=16)},
        heldout=place / "tokens", heldout_tokens=500,
    )  # fmt: skip
    assert judged.heldout.good is not None
    assert judged.scenarios["u"].samples == 4
