"""Training on a tiny store: golden losses, exact resume, kill -9, accumulation, two processes, what is written."""

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

from helpers import DEFAULT_OBJECTIVES, ROOT, STEP, TINY_LLAMA, TINY_MODEL, losses_of, train_config, weights_of
from phf.core import store
from phf.core.config import ConfigError
from phf.core.device import pick_precision
from phf.core.runs import COMPLETE, complete_checkpoints
from phf.objectives import AWR, MLE, Conditional, Masking, Unlikelihood
from phf.tokens.store import tokenize_corpus
from phf.tokens.tokenizer import TrainBPE
from phf.training.lm import FromConfig, FromWeights, build_lm, set_attention
from phf.training.metrics import chinchilla_loss
from phf.training.train import TrainConfig, micro_batch, pick_compile, train
from phf.training.trainer import PHFTrainer, TrainingError


@pytest.fixture(scope="module")
def trained(tokens_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {
        o.name: (folder / o.name, train(tokens_dir, folder / o.name, TINY_MODEL, o, train_config()))
        for o in DEFAULT_OBJECTIVES
    }


def test_golden_losses(trained):
    """Pinned losses of every objective; regenerate with `python tests/golden/make.py` when they should move."""
    golden = json.loads((ROOT / "tests" / "golden" / "losses.json").read_text())
    assert set(golden) == set(trained)
    for name, (run, _) in trained.items():
        assert losses_of(run) == pytest.approx(golden[name], rel=2e-3), name


@pytest.mark.parametrize("name", [o.name for o in DEFAULT_OBJECTIVES])
def test_every_objective_learns_and_says_what_it_did(trained, name):
    run, manifest = trained[name]
    curve = losses_of(run)
    assert sum(curve[-3:]) < sum(curve[:3])
    assert manifest["counts"]["tokens"] == 20 * STEP
    assert 0 < manifest["counts"]["text_tokens"] <= manifest["counts"]["tokens"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [STEP * n for n in range(1, 21)]
    if name in ("rwr", "awr"):
        assert 0 < lines[-1]["effective_sample_share"] <= 1
    assert (run / "model" / "value_head.safetensors").exists() == (name == "awr")
    assert not list(run.rglob("*.bin"))  # nothing pickled but what the Trainer resumes from
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
    train(tokens_dir, tmp_path / "whole", TINY_MODEL, objective, settings)
    stopped = train(tokens_dir, tmp_path / "parts", TINY_MODEL, objective, settings, stop_after=10)
    assert stopped == {"stage": "train", "step": 10}
    assert not (tmp_path / "parts" / "manifest.json").exists()
    train(tokens_dir, tmp_path / "parts", TINY_MODEL, objective, settings)
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")


def test_resuming_with_dropout_gives_the_same_bytes(tokens_dir, tmp_path):
    model = FromConfig({**TINY_LLAMA, "attention_dropout": 0.2})
    train(tokens_dir, tmp_path / "whole", model, MLE(), train_config(), seed=3)
    train(tokens_dir, tmp_path / "parts", model, MLE(), train_config(), seed=3, stop_after=7)
    train(tokens_dir, tmp_path / "parts", model, MLE(), train_config(), seed=3)
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")


def test_accumulation_is_one_batch(tokens_dir, tmp_path):
    """Denominators are those of the whole batch: masking counts another number of targets in every part of one."""
    train(tokens_dir, tmp_path / "a", TINY_MODEL, Masking(), train_config())
    train(tokens_dir, tmp_path / "b", TINY_MODEL, Masking(), train_config(micro_rows=1))
    assert losses_of(tmp_path / "b") == pytest.approx(losses_of(tmp_path / "a"), rel=1e-4)
    one, sixteen = (
        [json.loads(line)["counted_share"] for line in (tmp_path / r / "metrics.jsonl").read_text().splitlines()]
        for r in "ab"
    )
    assert one == sixteen
    assert max(one) - min(one) > 0.01  # uneven indeed


def test_a_run_goes_on_under_settings_that_decide_nothing(tokens_dir, tmp_path):
    train(tokens_dir, tmp_path / "whole", TINY_MODEL, MLE(), train_config())
    train(tokens_dir, tmp_path / "r", TINY_MODEL, MLE(), train_config(), stop_after=10)
    train(tokens_dir, tmp_path / "r", TINY_MODEL, MLE(), train_config(micro_rows=4, keep=5, save_every=5 * STEP))
    assert not (tmp_path / "r.old-1").exists()
    assert losses_of(tmp_path / "r")[:10] == losses_of(tmp_path / "whole")[:10]
    assert losses_of(tmp_path / "r") == pytest.approx(losses_of(tmp_path / "whole"), rel=1e-4)
    assert store.read_json(tmp_path / "r" / "manifest.json")["train"]["micro_rows"] == 4


def test_done_is_not_done_again_and_other_settings_set_the_run_aside(tokens_dir, tmp_path, capsys):
    first = train(tokens_dir, tmp_path / "r", TINY_MODEL, MLE(), train_config(3))
    stamp = (tmp_path / "r" / "model" / "model.safetensors").stat().st_mtime_ns
    assert train(tokens_dir, tmp_path / "r", TINY_MODEL, MLE(), train_config(3)) == first
    assert (tmp_path / "r" / "model" / "model.safetensors").stat().st_mtime_ns == stamp
    assert capsys.readouterr().err == ""
    train(tokens_dir, tmp_path / "r", TINY_MODEL, Unlikelihood(), train_config(4, keep=7), seed=1)
    assert (tmp_path / "r.old-1" / "model" / "model.safetensors").stat().st_mtime_ns == stamp
    said = capsys.readouterr().err
    assert "training anew, since objective.name, train.tokens, seed changed; what was there is now" in said
    assert "keep" not in said


def test_half_written_checkpoints_do_not_exist(tokens_dir, tmp_path):
    settings = train_config(save_every=5 * STEP)
    train(tokens_dir, tmp_path / "whole", TINY_MODEL, MLE(), settings)
    train(tokens_dir, tmp_path / "r", TINY_MODEL, MLE(), settings, stop_after=10)
    newest = tmp_path / "r" / "checkpoints" / "checkpoint-10"
    (newest / COMPLETE).unlink()
    (newest / "model.safetensors").write_bytes(b"half")
    train(tokens_dir, tmp_path / "r", TINY_MODEL, MLE(), settings)
    assert weights_of(tmp_path / "r") == weights_of(tmp_path / "whole")


def test_the_newest_checkpoints_are_kept(tokens_dir, tmp_path):
    train(tokens_dir, tmp_path / "r", TINY_MODEL, MLE(), train_config(save_every=5 * STEP, keep=2))
    assert [p.name for p in complete_checkpoints(tmp_path / "r" / "checkpoints")] == ["checkpoint-15", "checkpoint-20"]


SCRIPT = """
import sys
from phf.training.lm import FromConfig
from phf.objectives import Conditional
from phf.training.train import TrainConfig, train
settings = TrainConfig(tokens=3000 * 512, context=32, batch_rows=16, lr=1e-2, precision="fp32", save_every=50 * 512, micro_rows=8)
train(sys.argv[1], sys.argv[2], FromConfig({model!r}), Conditional(), settings)
"""


def test_kill_9_then_the_same_command_gives_the_same_bytes(tokens_dir, tmp_path):
    (tmp_path / "t.py").write_text(SCRIPT.replace("{model!r}", repr(TINY_LLAMA)).replace("3000", "400"))
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
    known = PHFTrainer._check_finite  # of the gradient's norm, it would stop one step earlier
    only_loss = lambda self, what, value: known(self, what, value) if what == "loss" else None  # noqa: E731
    monkeypatch.setattr(PHFTrainer, "_check_finite", only_loss)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d+"):
        train(tokens_dir, tmp_path / "r", TINY_MODEL, MLE(), train_config(lr=1e30))
    assert not (tmp_path / "r" / "manifest.json").exists()


def test_a_gradient_that_is_not_finite_stops_before_the_update(tokens_dir, tmp_path, monkeypatch):
    """It comes with a finite loss where a sum of squares overflows; no checkpoint is made of what it would leave."""

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
        train(tokens_dir, tmp_path / "r", TINY_MODEL, MLE(), train_config(save_every=STEP))
    assert _newest(tmp_path / "r") == "checkpoint-4"


def _newest(run):
    return complete_checkpoints(run / "checkpoints")[-1].name


def test_finetuning_goes_on_with_the_value_head_it_was_given(tokens_dir, tmp_path, trained):
    run, _ = trained["awr"]
    kept = load_file(run / "model" / "value_head.safetensors")
    train(tokens_dir, tmp_path / "r", FromWeights(str(run)), AWR(), train_config(1, lr=1e-12))
    head = load_file(tmp_path / "r" / "model" / "value_head.safetensors")
    assert kept["weight"].abs().max() > 1e-3
    torch.testing.assert_close(head, kept, atol=1e-6, rtol=1e-6)
    train(tokens_dir, tmp_path / "plain", FromWeights(str(run)), MLE(), train_config(1))  # which needs none


def test_trackers_see_what_metrics_jsonl_says(tokens_dir, tmp_path, monkeypatch):
    from transformers.integrations import integration_utils

    seen = []

    class Spy(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "spy", Spy)
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["spy"])
    train(tokens_dir, tmp_path / "r", TINY_MODEL, AWR(), train_config(3, report_to=("spy",)))
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    steps = [s for s in seen if "loss" in s]
    assert len(steps) == len(lines) == 3
    for logs, line in zip(steps, lines, strict=True):
        assert {k: logs[k] for k in line if line[k] is not None} == {k: v for k, v in line.items() if v is not None}
        assert "effective_sample_share" in logs


def test_fsdp_through_accelerate_is_refused(tokens_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="FSDP"):
        train(tokens_dir, tmp_path / "r", TINY_MODEL, MLE(), train_config(1))


def test_finetuning_starts_from_the_weights(tokens_dir, tmp_path, trained):
    run, _ = trained["mle"]
    manifest = train(tokens_dir, tmp_path / "r", FromWeights(str(run)), Conditional(), train_config(5))
    assert manifest["counts"]["tokens_before"] == 20 * STEP
    line = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["expected_loss"] == chinchilla_loss(manifest["parameters"], 25 * STEP)
    assert losses_of(tmp_path / "r")[0] < losses_of(run)[0] - 0.3
    assert manifest["control_tokens"] == ["<|good|>", "<|bad|>"]


@pytest.mark.parametrize(
    "rows, world, micro, message",
    [(100, 48, None, "96, 144 would"), (6, 1, 4, r"\[1, 2, 3, 6\] would"), (1, 2, None, "; 2 would")],
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


def test_a_corpus_shorter_than_a_row_is_an_error(tokens_dir, tmp_path):
    with pytest.raises(ConfigError, match="not enough for one row"):
        train(
            tokens_dir,
            tmp_path / "r",
            FromConfig({**TINY_LLAMA, "max_position_embeddings": 10**6}),
            MLE(),
            train_config(context=10**6),
        )


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "wsd"])
def test_schedules_warm_up_and_decay(tokens_dir, tmp_path, schedule):
    train(tokens_dir, tmp_path / "r", TINY_MODEL, MLE(), train_config(20, schedule=schedule, warmup=0.2))
    lr = [json.loads(line)["lr"] for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    rising = [1e-2 * n / 4 for n in range(4)]
    share = np.arange(16) / 16  # of the steps after the warm-up that are done
    falling = {
        "linear": 1 - share,
        "cosine": (1 + np.cos(np.pi * share)) / 2,
        "constant": np.ones(16),
        "wsd": np.where(share < 0.75, 1, (1 + np.cos(np.pi * (share - 0.75) / 0.25)) / 2),
    }[schedule]
    assert lr == pytest.approx([*rising, *(1e-2 * falling)])


def test_warm_up_and_decay_in_tokens_are_those_as_shares():
    shares = train_config(20, schedule="wsd", warmup=0.2, decay=0.25)
    tokens = train_config(20, schedule="wsd", warmup=4 * STEP, decay=5 * STEP)
    assert (shares.warmup_steps, shares.decay_steps) == (tokens.warmup_steps, tokens.decay_steps) == (4, 5)
    assert train_config(20, schedule="wsd", warmup=0.5, decay=1.0).decay_steps == 10
    assert train_config(7, schedule="wsd", warmup=0.5, decay=0.5).decay_steps == 3
    with pytest.raises(ValidationError, match="rises for 30 steps, but tokens=10240 are 20 steps of 16 x 32"):
        train_config(20, warmup=30 * STEP)


def test_expected_loss_is_hoffmanns():
    assert chinchilla_loss(124_000_000, 3_300_000_000) == pytest.approx(
        1.69 + 406.4 / 124e6**0.34 + 410.7 / 3.3e9**0.28
    )


def test_precision_is_never_half():
    assert pick_precision("fp32") is None
    assert pick_precision("bf16") == torch.bfloat16
    assert pick_precision("auto") in (None, torch.bfloat16)


def test_another_store_is_another_run(tokens_dir, tmp_path, capsys):
    first = train(tokens_dir, tmp_path / "r", TINY_MODEL, MLE(), train_config(3))
    tokenize_corpus(tokens_dir.parent / "scored", TrainBPE(280), tmp_path / "tokens", heldout=0.1)
    second = train(tmp_path / "tokens", tmp_path / "r", TINY_MODEL, MLE(), train_config(3))
    assert second["tokens_content"] != first["tokens_content"]
    assert store.read_manifest(tmp_path / "r.old-1", "train") == store.jsonable(first)
    assert "training anew, since the data, the weights or the code changed" in capsys.readouterr().err


def test_milestones_are_kept_for_good(tokens_dir, tmp_path):
    train(
        tokens_dir,
        tmp_path / "r",
        TINY_MODEL,
        MLE(),
        train_config(save_every=0.25, keep=1, milestones=(3 * STEP, 0.3, 9.6 * STEP)),
    )
    assert [p.name for p in complete_checkpoints(tmp_path / "r" / "checkpoints")] == [
        "checkpoint-3",
        "checkpoint-6",
        "checkpoint-10",
        "checkpoint-20",
    ]


def test_gpt2_resumes_to_the_same_bytes(tokens_dir, tmp_path):
    """Through the swap of its transposed layers, and in bfloat16."""
    model = FromConfig({"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64})
    train(tokens_dir, tmp_path / "whole", model, MLE(), train_config(precision="bf16"))
    train(tokens_dir, tmp_path / "parts", model, MLE(), train_config(precision="bf16"), stop_after=10)
    train(tokens_dir, tmp_path / "parts", model, MLE(), train_config(precision="bf16"))
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")


def test_diagnostics_say_where_the_gradient_comes_from(trained):
    lines = {n: json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for n, (run, _) in trained.items()}
    assert lines["masking"]["bad_gradient_share"] == 0
    assert 0 < lines["mle"]["bad_gradient_share"] < 1
    assert lines["rwr"]["bad_gradient_share"] < lines["mle"]["bad_gradient_share"]
    assert -1 <= lines["awr"]["value_correlation"] <= 1
    assert "value_correlation" not in lines["rwr"]


def test_going_on_under_other_conditions_is_said(tokens_dir, tmp_path, capsys):
    train(tokens_dir, tmp_path / "r", TINY_MODEL, MLE(), train_config(), stop_after=5)
    train(tokens_dir, tmp_path / "r", TINY_MODEL, MLE(), train_config(), stop_after=10)
    assert "warning" not in capsys.readouterr().err
    recorded = store.read_json(tmp_path / "r" / "environment.json")
    store.write_json(tmp_path / "r" / "environment.json", recorded | {"threads": 99, "precision": "bf16"})
    train(tokens_dir, tmp_path / "r", TINY_MODEL, MLE(), train_config(micro_rows=4))
    said = capsys.readouterr().err
    assert all(x in said for x in ("threads was 99", "precision was bf16, is fp32", "micro_rows was 16, is 4"))


def test_without_a_compiler_training_goes_on_uncompiled(tokens_dir, tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    train(tokens_dir, tmp_path / "r", TINY_MODEL, MLE(), train_config(3, compile=True))
    assert (
        "training uncompiled and so slower, since torch.compile does not work here: no C++ compiler"
        in capsys.readouterr().err
    )
    assert store.read_json(tmp_path / "r" / "environment.json")["compiled"] is False


def test_an_objective_that_edits_otherwise_is_another_run_with_other_rows(tokens_dir, tmp_path):
    """Two objectives of a user with equal settings: neither the row index nor "done" may be shared."""
    import dataclasses

    import numpy as np

    from phf.core.types import Edit
    from phf.objectives import Objective

    @dataclasses.dataclass(frozen=True)
    class First(Objective):
        pass

    @dataclasses.dataclass(frozen=True)
    class Second(Objective):
        def edit(self, table, seed):
            return Edit(keep_D=np.arange(len(table.train_D)) % 2 == 0)

    a = train(tokens_dir, tmp_path / "r", TINY_MODEL, First(), train_config(3))
    b = train(tokens_dir, tmp_path / "r", TINY_MODEL, Second(), train_config(3))
    assert b["counts"]["stream_tokens"] < a["counts"]["stream_tokens"]


def test_the_output_of_another_stage_is_not_moved_away(tokens_dir, tmp_path):
    store.begin(tmp_path / "scored", "score", "k")
    with pytest.raises(store.StoreError, match="output of `phf score`"):
        train(tokens_dir, tmp_path / "scored", TINY_MODEL, MLE(), train_config(3))
    assert not list(tmp_path.glob("*.old-*"))


def test_a_torn_line_of_metrics_is_no_hindrance(tokens_dir, tmp_path):
    train(tokens_dir, tmp_path / "r", TINY_MODEL, MLE(), train_config(), stop_after=10)
    with open(tmp_path / "r" / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "los')
    manifest = train(tokens_dir, tmp_path / "r", TINY_MODEL, MLE(), train_config())
    assert len(losses_of(tmp_path / "r")) == 20
    assert manifest["seconds"] > 0


def test_weights_that_changed_are_another_start(tokens_dir, tmp_path):
    train(tokens_dir, tmp_path / "base", TINY_MODEL, MLE(), train_config(2))
    first = train(tokens_dir, tmp_path / "tuned", FromWeights(str(tmp_path / "base")), MLE(), train_config(2))
    train(tokens_dir, tmp_path / "base", TINY_MODEL, MLE(), train_config(3))
    second = train(tokens_dir, tmp_path / "tuned", FromWeights(str(tmp_path / "base")), MLE(), train_config(2))
    assert first["key"] != second["key"]


def test_a_tracker_that_is_not_there_is_an_error(tokens_dir, tmp_path):
    with pytest.raises(ConfigError, match="train.report_to: 'wandbb' is not installed"):
        train(tokens_dir, tmp_path / "r", TINY_MODEL, MLE(), train_config(3, report_to=("wandbb",)))


def test_callbacks_are_handed_the_lm(tokens_dir, tmp_path):
    from transformers import PreTrainedModel, TrainerCallback

    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(isinstance(model, PreTrainedModel))

    train(tokens_dir, tmp_path / "r", TINY_MODEL, MLE(), train_config(3), callbacks=(Look(),))
    assert seen == [True] * 3


@pytest.mark.slow
def test_compiled_and_in_bf16_the_bytes_are_the_same_too(tokens_dir, tmp_path):
    """As the demo trains: two runs, and one that was interrupted. Needs deterministic algorithms for the embedding."""
    model = FromConfig({**TINY_LLAMA, "hidden_size": 64, "intermediate_size": 128})
    settings = train_config(30, precision="bf16", compile=True, batch_rows=16)
    for name, stop in (("a", None), ("b", None), ("c", 13), ("c", None)):
        torch.compiler.reset()
        train(tokens_dir, tmp_path / name, model, Conditional(), settings, stop_after=stop)
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b") == weights_of(tmp_path / "c")


def test_a_run_is_compiled_where_that_pays():
    long = TrainConfig(1e9, context=256, batch_rows=16)
    assert pick_compile(long, 10**6)
    assert not pick_compile(long, 10**3)
    assert not pick_compile(TrainConfig(1e9, compile=False), 10**9)
    assert pick_compile(TrainConfig(1e3, compile=True), 1)


def test_the_attention_that_is_asked_for(tokens):
    lm = build_lm(TINY_MODEL, tokens.tokenizer, seed=0)
    assert lm.config._attn_implementation == "sdpa"
    set_attention(lm, "eager")
    assert lm.config._attn_implementation == "eager"
    gemma = build_lm(FromConfig({**TINY_LLAMA, "model_type": "gemma2", "head_dim": 8}), tokens.tokenizer, seed=0)
    with pytest.raises(ConfigError, match="train.attention=sdpa: Gemma2ForCausalLM does not know it"):
        set_attention(gemma, "sdpa")
