"""phf in torchtitan: losses and gradients against the plain formula, bare and in chunks; rows on several processes."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json

import pytest
import torch

from helpers import ENGINE_OBJECTIVES, found_by
from phf.core.config import ConfigError
from phf.core.types import PhfError
from phf.engines.rows import open_fitted
from phf.objectives import count_targets
from phf.tokens.store import TokenStore
from phf.training.batches import to_tensors
from phf.training.fused import unfused_loss
from phf.training.order import training_order

if importlib.util.find_spec("torchtitan") is None:
    pytest.skip("needs torchtitan, which brings many packages", allow_module_level=True)

from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss, MSELoss
from torchtitan.config import ConfigManager
from torchtitan.models.llama3.config_registry import llama3_debugmodel

from phf.engines.torchtitan.config_registry import ScoredTrainer, fit, with_objective
from phf.engines.torchtitan.rows_and_loss import ObjectiveLoss

CONTEXT, ROWS, VOCABULARY, WIDTH = 32, 8, 320, 16


class Tiny(torch.nn.Module):
    """A body and a head, as torchtitan's models have them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Embedding(VOCABULARY, WIDTH), torch.nn.Linear(WIDTH, WIDTH))
        self.lm_head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
        self._skip_lm_head = False

    def forward(self, ids, positions):
        hidden = self.body(ids)
        return hidden if self._skip_lm_head else self.lm_head(hidden)

    def gradient(self):
        return torch.cat([p.grad.reshape(-1) for p in self.parameters()])


def config_of(tokens_dir, plain, chunks=0, steps=50):
    config = llama3_debugmodel()
    config.loss = ChunkedLossWrapper.Config(num_chunks=chunks) if chunks else CrossEntropyLoss.Config()
    config.training.global_batch_size = ROWS
    config.training.steps = steps
    config.training.seq_len = CONTEXT
    config.training.disable_cuda_graphs = True
    made = with_objective(config, str(tokens_dir), json.dumps(plain))
    fit(made)
    return made


def loader_of(config, world=1, rank=0, batch=ROWS):
    return config.dataloader.build(
        dp_world_size=world, dp_rank=rank, tokenizer=None, seq_len=CONTEXT, local_batch_size=batch // world,
        snapshot_every_n_steps=None,
    )  # fmt: skip


def trainer_of(config):
    """A trainer with its own forward and backward pass and nothing that needs a GPU."""
    trainer = object.__new__(ScoredTrainer)
    trainer.config = config
    trainer.model_parts = [Tiny()]
    trainer.loss_fn = config.loss.build()
    trainer.train_context = contextlib.nullcontext
    trainer.step = 1
    if isinstance(trainer.loss_fn, ChunkedLossWrapper):
        trainer.loss_fn.set_lm_head(trainer.model_parts[0].lm_head)
        trainer.model_parts[0]._skip_lm_head = True
    return trainer


def step_of(trainer, batches):
    """The loss and the gradient of one step of several microbatches, or of several processes."""
    total = sum((labels != -100).sum() for _, labels in batches)
    loss = sum(
        trainer._forward_backward_body(
            given["input"], labels, total, {name: t for name, t in given.items() if name != "input"}
        ).item()
        for given, labels in batches
    )
    return loss, trainer.model_parts[0].gradient()


def expected(tokens_dir, plain, steps=50):
    tokens, tokenizer, objective = open_fitted(str(tokens_dir), None, json.dumps(plain), "torchtitan")
    rows = to_tensors(training_order(tokens, objective, tokenizer, CONTEXT, 0, places=ROWS * steps).batch(0, ROWS))
    model = Tiny()
    out = unfused_loss(
        model.body(rows["input_ids"]).flatten(0, 1), model.lm_head.weight, None, rows["targets"].flatten(),
        rows["scores"].flatten(0, 1), rows["mask"].flatten(), None, objective,
        phase_N=None if "phase" not in rows else rows["phase"].flatten(),
    )  # fmt: skip
    loss = out.loss_sum / count_targets(objective, rows["scores"], rows["mask"], rows.get("phase")).sum()
    loss.backward()
    return loss.item(), model.gradient()


@pytest.mark.parametrize("chunks", [0, 4], ids=["bare", "in chunks"])
@pytest.mark.parametrize("name", ENGINE_OBJECTIVES)
def test_losses_and_gradients_are_the_formula_s(tokens_dir, name, chunks):
    config = config_of(tokens_dir, ENGINE_OBJECTIVES[name], chunks)
    loss, gradient = step_of(trainer_of(config), [next(iter(loader_of(config)))])
    wanted, wanted_gradient = expected(tokens_dir, ENGINE_OBJECTIVES[name])
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert (gradient - wanted_gradient).norm() <= 1e-5 * wanted_gradient.norm()


@pytest.mark.parametrize("chunks", [0, 4], ids=["bare", "in chunks"])
def test_a_sixty_fourth_of_the_weight_gives_a_sixty_fourth_of_the_gradient(tokens_dir, chunks):
    found = {}
    for name in ("mle", "sixty-fourth"):
        config = config_of(tokens_dir, ENGINE_OBJECTIVES[name], chunks)
        found[name] = step_of(trainer_of(config), [next(iter(loader_of(config)))])[1]
    torch.testing.assert_close(found["sixty-fourth"] * 64, found["mle"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("chunks", [0, 4], ids=["bare", "in chunks"])
def test_processes_with_unequal_shares_together_give_the_formula(tokens_dir, chunks):
    config = config_of(tokens_dir, ENGINE_OBJECTIVES["masking"], chunks)
    batches = [next(iter(loader_of(config, world=2, rank=rank))) for rank in (0, 1)]
    shares = [int((labels != -100).sum()) for _, labels in batches]
    assert shares[0] != shares[1]
    loss, gradient = step_of(trainer_of(config), batches)
    wanted, wanted_gradient = expected(tokens_dir, ENGINE_OBJECTIVES["masking"])
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert (gradient - wanted_gradient).norm() <= 1e-5 * wanted_gradient.norm()


def test_a_loader_continues_on_another_number_of_processes(tokens_dir):
    config = config_of(tokens_dir, ENGINE_OBJECTIVES["conditional"])
    whole = list(itertools.islice(loader_of(config), 6))
    pair = [loader_of(config, world=2, rank=rank) for rank in (0, 1)]
    parts = [list(itertools.islice(loader, 3)) for loader in pair]
    assert pair[0].state_dict() == pair[1].state_dict() == {"next_row": 3 * ROWS}
    later = loader_of(config)
    later.load_state_dict(pair[1].state_dict())
    for step, (given, labels) in enumerate(whole):
        if step < 3:
            both = [parts[rank][step] for rank in (0, 1)]
            found = {name: torch.cat([one[name] for one, _ in both]) for name in given}
            found_labels = torch.cat([labels for _, labels in both])
        else:
            found, found_labels = next(iter(later))
        assert torch.equal(found_labels, labels)
        for name, tensor in given.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_positions_start_again_with_each_document_if_that_is_wanted(tokens_dir):
    config = config_of(tokens_dir, ENGINE_OBJECTIVES["mle"])
    whole, _ = next(iter(loader_of(config)))
    assert torch.equal(whole["positions"], torch.arange(CONTEXT).expand(ROWS, CONTEXT))
    config.dataloader.document_mask = True
    apart, _ = next(iter(loader_of(config)))
    starts = apart["input"] == TokenStore.open(tokens_dir).end_of_text_id
    assert torch.equal(apart["positions"] == 0, starts | (torch.arange(CONTEXT) == 0))


def test_the_command_line_reaches_every_model_of_torchtitan(tokens_dir):
    given = ["--module", "phf.engines.torchtitan", "--config", "llama3_debugmodel", "--training.steps", "7"]
    given += ["--dataloader.tokens", str(tokens_dir), "--dataloader.objective", "{name: masking, threshold: 0}"]
    config = ConfigManager().parse_args(given)
    assert isinstance(config, ScoredTrainer.Config)
    assert isinstance(config.loss, ChunkedLossWrapper.Config)
    fit(config)
    objective = config.loss.loss_fn.build().objective
    assert (objective.name, objective.threshold) == ("masking", 0)
    assert not config.validator.enable
    json.dumps(config.to_dict())  # torchtitan writes it next to the run
    with pytest.raises(ValueError, match="Config function 'llama9' not found"):
        ConfigManager().parse_args(["--module", "phf.engines.torchtitan", "--config", "llama9"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.parallelism, "tensor_parallel_degree", 2), "tensor_parallel_degree: a process"),
        (lambda c: setattr(c.parallelism, "context_parallel_degree", 2), "context_parallel_degree: a process"),
        (lambda c: setattr(c.parallelism, "pipeline_parallel_degree", 2), "pipeline_parallel_degree: a process"),
        (lambda c: setattr(c.parallelism, "spmd_backend", "full_dtensor"), "scores are plain tensors"),
        (lambda c: setattr(c.dataloader, "objective", "awr"), "needs a value head"),
        (lambda c: setattr(c.dataloader, "objective", "condtional"), "conditional"),
        (lambda c: setattr(c.dataloader, "objective", "{name: ["), "objective: not YAML"),
        (
            lambda c: setattr(c.dataloader, "objective", json.dumps(ENGINE_OBJECTIVES["schedule"])),
            "disable_cuda_graphs",
        ),
        (lambda c: setattr(c.dataloader, "tokens", "nowhere"), "nowhere"),
        (lambda c: setattr(c.model_spec.model, "vocab_size", 300), "rows of embeddings; the store .* need 30"),
        (lambda c: setattr(c.dataloader, "objective", "{name: mine.py:Mine}"), "own: give training.global_batch_size"),
        (lambda c: setattr(c, "dataloader", llama3_debugmodel().dataloader), "RowLoader reads the scores"),
    ],
)
def test_what_it_does_not_work_with_is_an_error(tokens_dir, change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("from phf import Objective\nclass Mine(Objective):\n    pass\n")
    config = with_objective(llama3_debugmodel(), str(tokens_dir), "conditional")
    change(config)
    with pytest.raises(PhfError, match=message):
        fit(config)


def test_losses_and_models_that_are_no_plain_language_models_are_errors():
    config = llama3_debugmodel()
    config.loss = MSELoss.Config()
    with pytest.raises(ConfigError, match="takes the place of the cross-entropy"):
        with_objective(config)


def test_a_loss_without_scores_is_an_error():
    loss = ObjectiveLoss.Config().build()
    with pytest.raises(ConfigError, match="needs the scores"):
        loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64))


PROGRAM = '''
"""torchtitan's trainer on a CPU: what it asks a GPU about gets an answer, and attention is torch's own."""
import collections, json, os, sys, types
import torch
torch.set_num_threads(1)
import torchtitan.trainer
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.config import ConfigManager
from torchtitan.distributed import utils as distributed
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from phf.engines.rows import open_fitted
from phf.engines.torchtitan.config_registry import with_objective
from phf.objectives import count_targets
from phf.training.batches import to_tensors
from phf.training.fused import unfused_loss
from phf.training.order import training_order

class Device(types.ModuleType):
    __getattr__ = lambda self, name: getattr(torch.cpu, name)
    get_device_name = lambda self, *_: "cpu"
    get_device_properties = lambda self, *_: types.SimpleNamespace(total_memory=1 << 30)
    memory_stats = lambda self, *_: collections.defaultdict(int)
    reset_peak_memory_stats = empty_cache = lambda self, *_: None
    device_count = lambda self: int(os.environ["WORLD_SIZE"]) + 1
    current_device = lambda self: 0

for module in list(sys.modules.values()):
    if getattr(module, "__name__", "").startswith("torchtitan"):
        if getattr(module, "device_type", None) == "cuda":
            module.device_type = "cpu"
        if getattr(module, "device_module", None) is torch.cuda:
            module.device_module = Device("device")
distributed.set_pg_timeouts = lambda **_: None

tokens, objective, out, steps, stop = sys.argv[1:4] + [int(n) for n in sys.argv[4:]]
CONTEXT, ROWS, WORLD = 32, 8, int(os.environ["WORLD_SIZE"])
config = llama3_debugmodel()
for layer in config.model_spec.model.layers:
    layer.attention.inner_attention = ScaledDotProductAttention.Config()
config.training.local_batch_size = 4 // WORLD  # two microbatches
config.training.global_batch_size = ROWS
config.training.seq_len = CONTEXT
config.training.steps = steps
config.training.disable_cuda_graphs = True
config.training.mixed_precision_param = "float32"
config.parallelism.spmd_backend = "partial_dtensor"
config.dump_folder = out
config.hf_assets_path = f"{tokens}/tokenizer"
config.debug.seed = 1
config.debug.enable_structured_logging = False
config.checkpoint = CheckpointManager.Config(enable=True, interval=stop or steps, last_save_model_only=False)
trainer = with_objective(config, tokens, objective).build()
for module in trainer.model_parts[0].modules():
    if isinstance(module, FSDPModule):
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum

found = {"losses": []}
if WORLD == 1 and not stop:
    store, tokenizer, fit = open_fitted(tokens, None, objective, "torchtitan")
    rows = to_tensors(training_order(store, fit, tokenizer, CONTEXT, 0, places=ROWS * steps).batch(0, ROWS))
    model = trainer.model_parts[0]
    with torch.no_grad():  # the head is apart: the loss is computed in chunks
        hidden = model(rows["input_ids"], positions=torch.arange(CONTEXT).expand(ROWS, CONTEXT))
        whole = unfused_loss(
            hidden.flatten(0, 1).float(), model.lm_head.weight, None, rows["targets"].flatten(),
            rows["scores"].flatten(0, 1), rows["mask"].flatten(), None, fit)
    found["formula"] = (whole.loss_sum / count_targets(fit, rows["scores"], rows["mask"]).sum()).item()
trainer.metrics_processor.should_log = lambda step: True
trainer.metrics_processor.log = lambda step, average, *_, **__: found["losses"].append([step, average])
if stop:
    trainer.should_continue_training = lambda: trainer.step < stop
trainer.train()
trainer.close()
if int(os.environ["RANK"]) == 0:
    print("FOUND", json.dumps(found), flush=True)
torch.distributed.destroy_process_group()
'''


def run(folder, world, *arguments):
    (folder / "program.py").write_text(PROGRAM)
    return found_by(folder / "program.py", world, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conditional", "unlikelihood", "masking"])
def test_torchtitan_s_own_trainer_trains_and_continues_on_another_number_of_processes(tokens_dir, tmp_path, name):
    objective = json.dumps(ENGINE_OBJECTIVES[name])
    whole = run(tmp_path, 1, tokens_dir, objective, tmp_path / "whole", 8, 0)
    assert whole["losses"][0][1] == pytest.approx(whole["formula"], rel=1e-5)
    assert whole["losses"][-1][1] < whole["losses"][0][1]
    parts = []
    for world, stop in ((1, 2), (2, 5), (1, 0)):  # torchtitan draws other first weights on other numbers of processes
        parts += run(tmp_path, world, tokens_dir, objective, tmp_path / "parts", 8, stop)["losses"]
    assert [step for step, _ in parts] == list(range(1, 9))
    for (step, loss), (_, wanted) in zip(parts, whole["losses"], strict=True):
        assert loss == pytest.approx(wanted, rel=1e-4), step
