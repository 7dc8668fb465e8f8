"""Training on a tiny store: golden losses, exact resume, kill -9, accumulation, files."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import TrainerCallback

from helpers import (
    DEFAULT_OBJECTIVES,
    ROOT,
    STEP,
    TINY_LLAMA,
    TINY_MODEL,
    losses_of,
    metrics_of,
    train_config,
    train_tiny,
    weights_of,
)
from phf.core import folders, store
from phf.core.config import ConfigError, validate
from phf.core.device import pick_precision
from phf.core.runs import COMPLETE, TrainManifest, complete_checkpoints
from phf.objectives import AWR, MLE, AnyObjective, Conditional, Masking, Unlikelihood
from phf.tokens.store import tokenize_corpus
from phf.tokens.tokenizer import TrainBPE
from phf.training.config import TrainConfig, micro_batch, pick_compile
from phf.training.lm import FromConfig, FromWeights, build_lm, set_attention
from phf.training.metrics import chinchilla_loss
from phf.training.train import train
from phf.training.trainer import PHFTrainer, TrainingError


@pytest.fixture(scope="module")
def trained(tokens_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {
        o.name: (
            folder / o.name,
            train_tiny(tokens_dir, folder / o.name, o),
        )
        for o in DEFAULT_OBJECTIVES
    }


def test_golden_losses(trained):
    """Pinned losses of every objective; regenerate with `python tests/golden/make.py` when they should move."""
    golden = json.loads((ROOT / "tests" / "golden" / "losses.json").read_text())
    assert set(golden) == set(trained)
    for name, (run, _) in trained.items():
        assert losses_of(run) == pytest.approx(golden[name], rel=2e-3), name


@pytest.mark.parametrize("name", [o.name for o in DEFAULT_OBJECTIVES])
def test_every_objective_learns_and_writes_its_files(trained, name):
    run, manifest = trained[name]
    curve = losses_of(run)
    assert sum(curve[-3:]) < sum(curve[:3])
    assert manifest.counts.tokens == 20 * STEP
    assert 0 < manifest.counts.text_tokens <= manifest.counts.tokens
    lines = metrics_of(run)
    assert [line["tokens"] for line in lines] == [STEP * n for n in range(1, 21)]
    if name in ("rwr", "awr"):
        assert 0 < lines[-1]["effective_sample_share"] <= 1
    assert (run / "model" / "value_head.safetensors").exists() == (name == "awr")
    assert not list(run.rglob("*.bin"))  # only what the Trainer resumes from is pickled
    assert json.loads((run / "model" / "phf.json").read_text())["control_tokens"] == (
        {"good": "<|good|>", "bad": "<|bad|>"} if name == "conditional" else {}
    )


@pytest.mark.parametrize("name", ["mle", "conditional", "awr"])
def test_models_and_checkpoints_load_with_plain_transformers(trained, name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _ = trained[name]
    for folder in (run / "model", *complete_checkpoints(run / "checkpoints")):
        lm = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert len(tokenizer) == lm.get_input_embeddings().num_embeddings == (302 if name == "conditional" else 300)
        out = lm.generate(torch.tensor([[tokenizer.eos_token_id]]), max_new_tokens=3, do_sample=False)
        assert out.shape[1] <= 4


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("objective", [MLE(), AWR()], ids=lambda o: o.name)
def test_twenty_steps_are_ten_stop_resume_ten(tokens_dir, tmp_path, objective, accumulate):
    settings = train_config(micro_rows=16 // accumulate)
    train(tokens_dir=tokens_dir, out=tmp_path / "whole", model=TINY_MODEL, objective=objective, config=settings)
    stopped = train(
        tokens_dir=tokens_dir,
        out=tmp_path / "parts",
        model=TINY_MODEL,
        objective=objective,
        config=settings,
        stop_after=10,
    )
    assert stopped is None
    assert not (tmp_path / "parts" / "manifest.json").exists()
    train(tokens_dir=tokens_dir, out=tmp_path / "parts", model=TINY_MODEL, objective=objective, config=settings)
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")


def test_resuming_with_dropout_gives_the_same_bytes(tokens_dir, tmp_path):
    model = FromConfig({**TINY_LLAMA, "attention_dropout": 0.2})
    train_tiny(tokens_dir, tmp_path / "whole", model=model, seed=3)
    train_tiny(tokens_dir, tmp_path / "parts", model=model, seed=3, stop_after=7)
    train_tiny(tokens_dir, tmp_path / "parts", model=model, seed=3)
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")


def test_accumulation_is_one_batch(tokens_dir, tmp_path):
    """Denominators are those of the whole batch. Masking counts another number of targets in each part of a batch."""
    train_tiny(tokens_dir, tmp_path / "a", Masking())
    train_tiny(tokens_dir, tmp_path / "b", Masking(), micro_rows=1)
    assert losses_of(tmp_path / "b") == pytest.approx(losses_of(tmp_path / "a"), rel=1e-4)
    one, sixteen = ([line["counted_share"] for line in metrics_of(tmp_path / r)] for r in "ab")
    assert one == sixteen
    assert max(one) - min(one) > 0.01  # the parts are uneven


def test_a_run_resumes_under_other_settings_that_change_no_result(tokens_dir, tmp_path):
    train_tiny(tokens_dir, tmp_path / "whole")
    train_tiny(tokens_dir, tmp_path / "r", stop_after=10)
    train_tiny(tokens_dir, tmp_path / "r", micro_rows=4, keep=5, save_every=5 * STEP)
    assert not (tmp_path / "r.old-1").exists()
    assert losses_of(tmp_path / "r")[:10] == losses_of(tmp_path / "whole")[:10]
    assert losses_of(tmp_path / "r") == pytest.approx(losses_of(tmp_path / "whole"), rel=1e-4)
    assert store.read_json(tmp_path / "r" / "manifest.json")["train"]["micro_rows"] == 4


def test_a_finished_run_is_not_run_again_and_other_settings_move_it_aside(tokens_dir, tmp_path, capsys):
    first = train_tiny(tokens_dir, tmp_path / "r", steps=3)
    stamp = (tmp_path / "r" / "model" / "model.safetensors").stat().st_mtime_ns
    assert train_tiny(tokens_dir, tmp_path / "r", steps=3) == first
    assert (tmp_path / "r" / "model" / "model.safetensors").stat().st_mtime_ns == stamp
    model, note = capsys.readouterr().err.splitlines()
    assert model == "model: llama, 10,000 parameters"  # of the first call
    assert note.endswith("r is done: it was finished before with the same settings")
    train_tiny(tokens_dir, tmp_path / "r", Unlikelihood(), steps=4, seed=1, keep=7)
    assert (tmp_path / "r.old-1" / "model" / "model.safetensors").stat().st_mtime_ns == stamp
    note = capsys.readouterr().err
    assert "because objective.name, train.tokens, seed changed; what it held is now" in note
    assert "keep" not in note


def test_half_written_checkpoints_do_not_exist(tokens_dir, tmp_path):
    settings = train_config(save_every=5 * STEP)
    train(tokens_dir=tokens_dir, out=tmp_path / "whole", model=TINY_MODEL, objective=MLE(), config=settings)
    train(tokens_dir=tokens_dir, out=tmp_path / "r", model=TINY_MODEL, objective=MLE(), config=settings, stop_after=10)
    newest = tmp_path / "r" / "checkpoints" / "checkpoint-10"
    (newest / COMPLETE).unlink()
    (newest / "model.safetensors").write_bytes(b"half")
    train(tokens_dir=tokens_dir, out=tmp_path / "r", model=TINY_MODEL, objective=MLE(), config=settings)
    assert weights_of(tmp_path / "r") == weights_of(tmp_path / "whole")


def test_the_newest_checkpoints_are_kept(tokens_dir, tmp_path):
    train_tiny(tokens_dir, tmp_path / "r", save_every=5 * STEP, keep=2)
    assert [p.name for p in complete_checkpoints(tmp_path / "r" / "checkpoints")] == ["checkpoint-15", "checkpoint-20"]


SCRIPT = """
import sys
from phf import Conditional, FromConfig, TrainConfig, train

train(
    tokens_dir=sys.argv[1],
    out=sys.argv[2],
    model=FromConfig({model!r}),
    objective=Conditional(),
    config=TrainConfig(
        tokens=400 * 512,
        context=32,
        batch_rows=16,
        micro_rows=8,
        lr=1e-2,
        precision="fp32",
        save_every=50 * 512,
    ),
)
"""


def test_kill_9_then_the_same_command_gives_the_same_bytes(tokens_dir, tmp_path):
    (tmp_path / "t.py").write_text(SCRIPT.replace("{model!r}", repr(TINY_LLAMA)))
    command = [sys.executable, str(tmp_path / "t.py"), str(tokens_dir)]
    whole = subprocess.Popen([*command, str(tmp_path / "whole")])
    killed = subprocess.Popen([*command, str(tmp_path / "killed")])
    while not (tmp_path / "killed" / "checkpoints" / "checkpoint-100" / COMPLETE).exists():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert whole.wait() == 0
    assert not (tmp_path / "killed" / "manifest.json").exists()
    subprocess.run([*command, str(tmp_path / "killed")], check=True)
    assert weights_of(tmp_path / "killed") == weights_of(tmp_path / "whole")


def test_a_loss_that_is_not_finite_stops_before_the_update(tokens_dir, tmp_path, monkeypatch):
    known = PHFTrainer._check_finite  # the norm of the gradient alone would stop training one step earlier
    only_loss = lambda self, what, value: known(self, what, value) if what == "loss" else None  # noqa: E731
    monkeypatch.setattr(PHFTrainer, "_check_finite", only_loss)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d+"):
        train_tiny(tokens_dir, tmp_path / "r", lr=1e30)
    assert not (tmp_path / "r" / "manifest.json").exists()


def test_a_gradient_that_is_not_finite_stops_before_the_update(tokens_dir, tmp_path, monkeypatch):
    """The loss is still finite where the gradient's sum of squares overflows. No checkpoint holds the broken
    weights."""

    def huge(model, *args, **kwargs):
        for p in model.parameters():
            p.grad = torch.full_like(p, 1e30)

    real = PHFTrainer._get_grad_norm

    def norm(trainer, model, grad_norm=None):
        if trainer.state.global_step == 4:
            huge(model)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return real(trainer, model, grad_norm)

    monkeypatch.setattr(PHFTrainer, "_get_grad_norm", norm)
    with pytest.raises(TrainingError, match="norm of the gradient is inf at step 5 "):
        train_tiny(tokens_dir, tmp_path / "r", save_every=STEP)
    assert _newest(tmp_path / "r") == "checkpoint-4"


def _newest(run):
    return complete_checkpoints(run / "checkpoints")[-1].name


def test_finetuning_starts_from_the_value_head_of_its_weights(tokens_dir, tmp_path, trained):
    run, _ = trained["awr"]
    kept = load_file(run / "model" / "value_head.safetensors")
    train_tiny(tokens_dir, tmp_path / "r", AWR(), steps=1, model=FromWeights(str(run)), lr=1e-12)
    head = load_file(tmp_path / "r" / "model" / "value_head.safetensors")
    assert kept["weight"].abs().max() > 1e-3
    torch.testing.assert_close(head, kept, atol=1e-6, rtol=1e-6)
    train_tiny(tokens_dir, tmp_path / "plain", steps=1, model=FromWeights(str(run)))  # which needs none


def test_trackers_get_the_numbers_of_metrics_jsonl(tokens_dir, tmp_path, monkeypatch):
    from transformers.integrations import integration_utils

    seen = []

    class Spy(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "spy", Spy)
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["spy"])
    train_tiny(tokens_dir, tmp_path / "r", AWR(), steps=3, report_to=("spy",))
    lines = metrics_of(tmp_path / "r")
    steps = [s for s in seen if "loss" in s]
    assert len(steps) == len(lines) == 3
    for logs, line in zip(steps, lines, strict=True):
        assert {k: logs[k] for k in line if line[k] is not None} == {k: v for k, v in line.items() if v is not None}
        assert "effective_sample_share" in logs


def test_fsdp_through_accelerate_is_refused(tokens_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="FSDP"):
        train_tiny(tokens_dir, tmp_path / "r", steps=1)


def test_finetuning_starts_from_the_weights(tokens_dir, tmp_path, trained):
    run, _ = trained["mle"]
    manifest = train_tiny(tokens_dir, tmp_path / "r", Conditional(), steps=5, model=FromWeights(str(run)))
    assert manifest.counts.tokens_before == 20 * STEP
    line = metrics_of(tmp_path / "r")[-1]
    assert line["expected_loss"] == chinchilla_loss(manifest.parameters, 25 * STEP)
    assert losses_of(tmp_path / "r")[0] < losses_of(run)[0] - 0.3
    assert manifest.control_tokens == ["<|good|>", "<|bad|>"]


@pytest.mark.parametrize(
    "rows, world, micro, message",
    [(100, 48, None, "use 96, 144"), (6, 1, 4, r"use one of \[1, 2, 3, 6\]"), (1, 2, None, "; use 2")],
)
def test_a_batch_that_does_not_divide_is_an_error(rows, world, micro, message):
    with pytest.raises(ConfigError, match=message):
        micro_batch(TrainConfig(1, batch_rows=rows, micro_rows=micro), world)


@pytest.mark.parametrize(
    "rows, world, expected", [(64, 1, (32, 2)), (64, 4, (16, 1)), (30, 1, (30, 1)), (74, 2, (1, 37)), (66, 1, (22, 3))]
)
def test_micro_batches_multiply_to_the_batch(rows, world, expected):
    assert micro_batch(TrainConfig(1, batch_rows=rows), world) == expected
    assert expected[0] * expected[1] * world == rows


def test_budgets_round_up_to_whole_steps():
    assert TrainConfig(tokens=100, context=16, batch_rows=4).steps == 2
    assert TrainConfig(tokens=128, context=16, batch_rows=4).total_tokens == 128


def test_a_budget_of_source_text_is_that_of_all_phases(tokens_dir, tmp_path):
    """Filtering reads much less of the source text in a row than MLE: a row passes over what is dropped."""
    half = {"objective": {"name": "filtering", "threshold": "median"}, "until": 0.5}
    phases = [half, {"objective": {"name": "mle"}}]
    read = {}
    for name, plain in {
        "mle": {"name": "mle"},
        "filtering": half["objective"],
        "both": {"name": "schedule", "phases": phases},
        "both the other way round": {
            "name": "schedule",
            "phases": [{"objective": {"name": "mle"}, "until": 0.5}, {"objective": half["objective"]}],
        },
    }.items():
        objective = validate(plain, AnyObjective)
        done = train_tiny(tokens_dir, tmp_path / name, objective, budget="source", tokens=20_000)
        read[name] = (done.counts.exposure["source"], done.counts.steps)
    assert all(abs(source - 20_000) < 1_500 for source, _ in read.values()), read  # a step of filtering: about 1,000
    assert read["filtering"][1] < read["both"][1] < read["mle"][1]


def test_a_corpus_shorter_than_a_row_is_an_error(tokens_dir, tmp_path):
    with pytest.raises(ConfigError, match="too few for one row"):
        train_tiny(
            tokens_dir,
            tmp_path / "r",
            model=FromConfig({**TINY_LLAMA, "max_position_embeddings": 10**6}),
            context=10**6,
        )


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "wsd"])
def test_schedules_warm_up_and_decay(tokens_dir, tmp_path, schedule):
    train_tiny(tokens_dir, tmp_path / "r", steps=20, schedule=schedule, warmup=0.2)
    lr = [line["lr"] for line in metrics_of(tmp_path / "r")]
    rising = [1e-2 * n / 4 for n in range(4)]
    share = np.arange(16) / 16  # of the steps after the warm-up
    falling = {
        "linear": 1 - share,
        "cosine": (1 + np.cos(np.pi * share)) / 2,
        "constant": np.ones(16),
        "wsd": np.where(share < 0.75, 1, (1 + np.cos(np.pi * (share - 0.75) / 0.25)) / 2),
    }[schedule]
    assert lr == pytest.approx([*rising, *(1e-2 * falling)])


def test_warm_up_and_decay_may_be_tokens_or_shares():
    shares = train_config(20, schedule="wsd", warmup=0.2, decay=0.25)
    tokens = train_config(20, schedule="wsd", warmup=4 * STEP, decay=5 * STEP)
    assert (shares.warmup_steps, shares.decay_steps) == (tokens.warmup_steps, tokens.decay_steps) == (4, 5)
    assert train_config(20, schedule="wsd", warmup=0.5, decay=1.0).decay_steps == 10
    assert train_config(7, schedule="wsd", warmup=0.5, decay=0.5).decay_steps == 3
    with pytest.raises(ValidationError, match="the warm-up takes 30 steps, but tokens=10240 are 20 steps of 16 x 32"):
        train_config(20, warmup=30 * STEP)


def test_expected_loss_is_that_of_hoffmann():
    assert chinchilla_loss(124_000_000, 3_300_000_000) == pytest.approx(
        1.69 + 406.4 / 124e6**0.34 + 410.7 / 3.3e9**0.28
    )


def test_precision_is_never_half():
    assert pick_precision("fp32") is None
    assert pick_precision("bf16") == torch.bfloat16
    assert pick_precision("auto") in (None, torch.bfloat16)


def test_another_store_is_another_run(tokens_dir, tmp_path, capsys):
    first = train_tiny(tokens_dir, tmp_path / "r", steps=3)
    tokenize_corpus(tokens_dir.parent / "scored", TrainBPE(280), tmp_path / "tokens", heldout=0.1)
    second = train_tiny(tmp_path / "tokens", tmp_path / "r", steps=3)
    assert second.tokens_content != first.tokens_content
    assert folders.read_manifest(tmp_path / "r.old-1", TrainManifest) == first
    assert "because the data, the weights or the code changed" in capsys.readouterr().err


def test_milestones_are_kept(tokens_dir, tmp_path):
    train_tiny(tokens_dir, tmp_path / "r", save_every=0.25, keep=1, milestones=(3 * STEP, 0.3, 9.6 * STEP))
    assert [p.name for p in complete_checkpoints(tmp_path / "r" / "checkpoints")] == [
        "checkpoint-3",
        "checkpoint-6",
        "checkpoint-10",
        "checkpoint-20",
    ]


def test_gpt2_resumes_to_the_same_bytes(tokens_dir, tmp_path):
    """GPT-2 has transposed layers, which phf swaps. In bfloat16."""
    model = FromConfig({"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64})
    train_tiny(tokens_dir, tmp_path / "whole", model=model, precision="bf16")
    train_tiny(tokens_dir, tmp_path / "parts", model=model, stop_after=10, precision="bf16")
    train_tiny(tokens_dir, tmp_path / "parts", model=model, precision="bf16")
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")


def test_diagnostics_show_where_the_gradient_comes_from(trained):
    lines = {n: metrics_of(run)[-1] for n, (run, _) in trained.items()}
    assert lines["masking"]["bad_gradient_share"] == 0
    assert 0 < lines["mle"]["bad_gradient_share"] < 1
    assert lines["rwr"]["bad_gradient_share"] < lines["mle"]["bad_gradient_share"]
    assert -1 <= lines["awr"]["value_correlation"] <= 1
    assert "value_correlation" not in lines["rwr"]


def test_resuming_in_another_environment_is_reported(tokens_dir, tmp_path, capsys):
    train_tiny(tokens_dir, tmp_path / "r", stop_after=5)
    train_tiny(tokens_dir, tmp_path / "r", stop_after=10)
    assert "warning" not in capsys.readouterr().err
    recorded = store.read_json(tmp_path / "r" / "environment.json")
    store.write_json(tmp_path / "r" / "environment.json", recorded | {"threads": 99, "precision": "bf16"})
    train_tiny(tokens_dir, tmp_path / "r", micro_rows=4)
    warning = capsys.readouterr().err
    assert all(x in warning for x in ("threads was 99", "precision was bf16, is fp32", "micro_rows was 16, is 4"))


def test_without_a_compiler_training_is_not_compiled(tokens_dir, tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    train_tiny(tokens_dir, tmp_path / "r", steps=3, compile=True)
    assert (
        "training is not compiled, and so slower, because torch.compile does not work here: no C++ compiler"
        in capsys.readouterr().err
    )
    assert store.read_json(tmp_path / "r" / "environment.json")["compiled"] is False


def test_an_objective_with_another_edit_is_another_run_with_other_rows(tokens_dir, tmp_path):
    """Two objectives of a user have equal settings. They share neither the row index nor the finished run."""
    import dataclasses

    import numpy as np

    from phf.core.types import Edit
    from phf.objectives import Objective

    @dataclasses.dataclass(frozen=True)
    class First(Objective):
        pass

    @dataclasses.dataclass(frozen=True)
    class Second(Objective):
        def edit(self, block, seed):
            return Edit(times_D=(np.arange(block.num_documents) + block.first_document) % 2)

    a = train_tiny(tokens_dir, tmp_path / "r", First(), steps=3)
    b = train_tiny(tokens_dir, tmp_path / "r", Second(), steps=3)
    assert b.counts.exposure["read_good"] < a.counts.exposure["read_good"]
    assert b.counts.exposure["source"] > a.counts.exposure["source"]


def test_the_output_of_another_stage_is_not_moved_away(tokens_dir, tmp_path):
    with folders.stage_folder(tmp_path / "scored", "score", "k"):
        pass
    with pytest.raises(store.StoreError, match="output of `phf score`"):
        train_tiny(tokens_dir, tmp_path / "scored", steps=3)
    assert not list(tmp_path.glob("*.old-*"))


def test_a_torn_line_of_metrics_is_skipped(tokens_dir, tmp_path):
    train_tiny(tokens_dir, tmp_path / "r", stop_after=10)
    with open(tmp_path / "r" / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "los')
    manifest = train_tiny(tokens_dir, tmp_path / "r")
    assert len(losses_of(tmp_path / "r")) == 20
    assert manifest.seconds > 0


def test_other_starting_weights_are_another_run(tokens_dir, tmp_path):
    train_tiny(tokens_dir, tmp_path / "base", steps=2)
    first = train_tiny(tokens_dir, tmp_path / "tuned", steps=2, model=FromWeights(str(tmp_path / "base")))
    train_tiny(tokens_dir, tmp_path / "base", steps=3)
    second = train_tiny(tokens_dir, tmp_path / "tuned", steps=2, model=FromWeights(str(tmp_path / "base")))
    assert first.key != second.key


def test_a_tracker_that_is_not_installed_is_an_error(tokens_dir, tmp_path):
    with pytest.raises(ConfigError, match="train.report_to: 'wandbb' is not an installed tracker"):
        train_tiny(tokens_dir, tmp_path / "r", steps=3, report_to=("wandbb",))


def test_callbacks_get_the_lm(tokens_dir, tmp_path):
    from transformers import PreTrainedModel, TrainerCallback

    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(isinstance(model, PreTrainedModel))

    train_tiny(tokens_dir, tmp_path / "r", steps=3, callbacks=(Look(),))
    assert seen == [True] * 3


@pytest.mark.slow
def test_compiled_runs_in_bf16_give_the_same_bytes_too(tokens_dir, tmp_path):
    """Two runs, and one that was interrupted, with the settings of the demo. Needs deterministic algorithms."""
    model = FromConfig({**TINY_LLAMA, "hidden_size": 64, "intermediate_size": 128})
    settings = train_config(30, precision="bf16", compile=True, batch_rows=16)
    for name, stop in (("a", None), ("b", None), ("c", 13), ("c", None)):
        torch.compiler.reset()
        train(
            tokens_dir=tokens_dir,
            out=tmp_path / name,
            model=model,
            objective=Conditional(),
            config=settings,
            stop_after=stop,
        )
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b") == weights_of(tmp_path / "c")


def test_long_runs_are_compiled():
    long = TrainConfig(1e9, context=256, batch_rows=16)
    assert pick_compile(long, 10**6)
    assert not pick_compile(long, 10**3)
    assert not pick_compile(TrainConfig(1e9, compile=False), 10**9)
    assert pick_compile(TrainConfig(1e3, compile=True), 1)


def test_attention_can_be_chosen(tokens):
    lm = build_lm(TINY_MODEL, tokens.tokenizer, seed=0)
    assert lm.config._attn_implementation == "sdpa"
    set_attention(lm, "eager")
    assert lm.config._attn_implementation == "eager"
    gemma = build_lm(FromConfig({**TINY_LLAMA, "model_type": "gemma2", "head_dim": 8}), tokens.tokenizer, seed=0)
    with pytest.raises(ConfigError, match="train.attention=sdpa: Gemma2ForCausalLM does not have it"):
        set_attention(gemma, "sdpa")
