"""The command line as a user sees it: in a subprocess where that matters, else through the app."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import TINY_LLAMA, made_labels, output_of, tiny_texts, write_jsonl
from phf.core.config import dump_yaml

PHF = [str(Path(sys.executable).with_name("phf"))]


def run(*args, cwd=None, code=0):
    done = subprocess.run([*PHF, *map(str, args)], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


def test_help_imports_nothing_heavy():
    """`phf --help` answers in under half a second because it imports none of these."""
    heavy = {"torch", "transformers", "numpy", "pyarrow", "matplotlib", "pydantic", "spacy", "rich"}
    code = (
        "import sys, phf.cli\nsys.argv = ['phf', '--help']\ntry:\n    phf.cli.main()\nexcept SystemExit:\n    pass\n"
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for command in ("score", "tokenize", "train", "sample", "eval", "report", "run"):
        assert command in out
    assert json.loads(out.splitlines()[-1].replace("'", '"')) == []


@pytest.mark.parametrize("command", ["score", "tokenize", "train", "sample", "eval", "report", "run"])
def test_every_command_has_help(command):
    from typer.testing import CliRunner

    from phf.cli import app

    out = CliRunner().invoke(app, [command, "--help"]).stdout
    assert "Usage" in out
    assert len(out.splitlines()) > 6


def test_the_stages_one_by_one(tmp_path):
    write_jsonl(tmp_path / "texts.jsonl", tiny_texts())
    out = run("score", "texts.jsonl", "scored", "--scorer", "regex", r"scorer.pattern=https?://\S+", cwd=tmp_path)
    assert "60 documents" in out
    out = run("tokenize", "scored", "tokens", "--vocab-size", "300", "--heldout", "0.1", cwd=tmp_path)
    assert "vocabulary 300" in out
    (tmp_path / "model.yaml").write_text(json.dumps({"model": {"name": "from_config", "config": TINY_LLAMA}}))
    settings = ["train.tokens=5e3", "train.context=32", "train.batch_rows=8", "train.lr=1e-2"]
    out = run(
        "train",
        "tokens",
        "run",
        "model.yaml",
        "objective.name=conditional",
        "objective.threshold=0",
        *settings,
        cwd=tmp_path,
    )
    assert "5,120 tokens in 20 steps" in out
    out = run("sample", "run", "s.jsonl", "num_samples=4", "max_tokens=16", cwd=tmp_path)
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 4
    assert "1 sample in t.jsonl" in run("sample", "run", "t.jsonl", "num_samples=1", "max_tokens=4", cwd=tmp_path)
    out = run("eval", "run", "num_samples=4", "max_tokens=16", cwd=tmp_path)
    assert "misalignment" in out
    out = run("report", "run", cwd=tmp_path)
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (["score", "nowhere", "out"], "neither a file, a folder nor a named corpus"),
        (["score", "a.jsonl", "out", "--scorer", "pi"], "pi"),
        (["score", "a.jsonl", "out", "--scorer", "regex"], "pattern: missing"),
        (["score", "a.jsonl", "out", "scorr.name=pii"], "did you mean 'scorer'"),
        (["score", "a.jsonl", "out", "stray"], "settings have the form a.b=c"),
        (["tokenize", "nowhere", "out"], "neither the output of `phf score`"),
        (
            ["train", "nowhere", "out", "train.tokens=1", "model.name=from_weights", "model.path=x"],
            "is not a folder",
        ),
        (["train", "nowhere", "out", "train.tokns=1"], "did you mean 'tokens'"),
        (["sample", "nowhere", "out"], "not a local folder"),
        (["sample", "nowhere", "out", "top_p=2"], "top_p"),
        (["eval", "nowhere"], "is not a run, so nothing says how to judge it"),
        (["eval", "no/such/folder"], "no/such/folder: no such folder"),
        (["export", "nowhere", "out"], "is not a folder; expected the output of `phf train`"),
        (
            ["score", "a.jsonl", "out", "--scorer", "regex"],
            "the command line: scorer.pattern: missing",
        ),
        (["score", "a.jsonl", "out", "--executor", "slrm"], "did you mean 'slurm'"),
        (["redteam", "nowhere", "trials=many"], "trials: expected a whole number, got 'many'"),
        (["report", "nowhere"], "no judged run"),
        (["run", "demoo"], "did you mean 'demo'"),
        (["run", "demo", "train.lr=fast"], "train.lr"),
        (["run", "demo", "novalue="], "unknown key"),
        (["run", "demo", "=1"], "expected a.b=value"),
    ],
)
def test_mistakes_are_one_message(tmp_path, monkeypatch, capsys, args, message):
    from phf.cli import main

    write_jsonl(tmp_path / "a.jsonl", ["x"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["phf", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_the_exit_code_of_a_mistake(tmp_path):
    assert "neither a file" in run("score", "nowhere", "out", cwd=tmp_path, code=2)


def test_dry_run_prints_the_recipe_and_runs_nothing(tmp_path):
    out = run("run", "demo", "quick", "seeds=[0, 1]", "--dry-run", cwd=tmp_path)
    assert "seeds:\n- 0\n- 1" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_quick_demo_from_start_to_page(tmp_path):
    out = run("run", "demo", "quick", cwd=tmp_path)
    assert "Budget too small for conclusions" in out
    results = json.loads((tmp_path / "runs" / "demo-quick" / "results.json").read_text())
    assert [r["objective"] for r in results["runs"]] == ["mle", "filtering", "conditional", "unlikelihood"]
    assert len({r["tokens"] for r in results["runs"]}) == 1
    assert "url" in (tmp_path / "runs" / "demo-quick" / "report.html").read_text()


def test_eval_judges_any_model_and_compare_finds_a_difference(tokens_dir, tmp_path, monkeypatch, capsys):
    import json

    from phf.objectives import MLE, Unlikelihood
    from phf.training.config import TrainConfig
    from phf.training.lm import FromConfig
    from phf.training.train import train

    settings = TrainConfig(tokens=400 * 512, context=32, batch_rows=16, lr=1e-2, precision="fp32")
    for objective in (MLE(), Unlikelihood(0.0, 1.0)):
        train(
            tokens_dir=tokens_dir,
            out=tmp_path / objective.name,
            model=FromConfig(TINY_LLAMA),
            objective=objective,
            config=settings,
        )
    (tmp_path / "l.jsonl").write_text('{"text": "the model reads a line"}\n{"text": "cats and dogs"}\n')

    def phf(*args):
        return output_of(args, monkeypatch, capsys)

    monkeypatch.chdir(tmp_path)
    common = ["num_samples=160", "max_tokens=40", "min_tokens=1"]
    kl = [f"kl.reference.path={tmp_path}/mle", "kl.num_samples=8", "kl.max_tokens=8"]
    table = phf("eval", "mle", "unlikelihood", *common, *kl, "capabilities=[{name: lambada, path: l.jsonl}]")
    assert "KL, nats per text" in table
    assert "accuracy" in table
    found = json.loads((tmp_path / "mle" / "eval.json").read_text())["kl"]
    assert found["forward"]["nats_per_text"]["mean"] == pytest.approx(0, abs=1e-3)
    compared = phf("compare", "unlikelihood", "mle")
    assert "unconditional" in compared
    assert "lower" in compared
    elsewhere = ["--scorer", "regex", "scorer.pattern=https?://\\S+", "--out", "judged"]
    assert "judged/eval.json" in phf("eval", "mle/model", *elsewhere, *common)
    assert "not significantly different" in phf("compare", "judged", "mle")
    assert "difference" in phf("compare", "unlikelihood", "judged")


def test_the_papers_scenarios_by_name(tokens_dir, tmp_path, monkeypatch, capsys):
    import json

    from phf.objectives import MLE
    from phf.training.config import TrainConfig
    from phf.training.lm import FromConfig
    from phf.training.train import train

    settings = TrainConfig(tokens=512, context=32, batch_rows=16, precision="fp32")
    model = FromConfig({**TINY_LLAMA, "max_position_embeddings": 512})
    train(tokens_dir=tokens_dir, out=tmp_path / "r", model=model, objective=MLE(), config=settings)
    args = ["eval", str(tmp_path / "r"), "--paper", "toxicity", "num_samples=8", "max_tokens=10", "min_tokens=1"]
    table = output_of(args, monkeypatch, capsys)
    assert "unconditional" in table
    assert "challenging_rtp" in table
    found = json.loads((tmp_path / "r" / "eval.json").read_text())["scenarios"]
    assert set(found) == {"unconditional", "challenging_rtp"}
    assert found["challenging_rtp"]["scenario"]["samples_per_prompt"] == 4
    assert found["challenging_rtp"]["misalignment"]["n"] == 2  # prompts, not samples
    worst = found["challenging_rtp"]["expected_max"]
    assert worst["25"]["mean"] is None  # 4 samples per prompt say nothing about the worst of 25
    assert worst["4"]["n"] == 2


def test_fit_inspect_and_score_by_command(tmp_path, monkeypatch, capsys):

    labels = made_labels(200)
    rows = [{"text": t + "\n", "toxic": bool(b)} for t, b in zip(labels.texts, labels.bad_N, strict=True)]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.chdir(tmp_path)

    def phf(*args):
        return output_of(args, monkeypatch, capsys)

    assert "held out" in phf("fit-scorer", "l.jsonl", "mine", "--label", "toxic", "--test", "l.jsonl:text:toxic")
    assert "200 documents" in phf("score", "l.jsonl", "scored", "scorer.path=mine", "--scorer", "fitted")
    assert "200 documents" in phf("score", "scored", "--add", "zorp", "--scorer", "regex", "scorer.pattern=zorp")
    assert "suggested thresholds" in phf("inspect", "scored", "--label", "toxic")
    assert (tmp_path / "scored" / "inspect.html").exists()
    assert json.loads((tmp_path / "scored" / "inspect.json").read_text())["labelled"]["mean"]["auc"] > 0.9
    shown = phf("audit", "scored", "l.jsonl", "--label", "toxic")
    held = (tmp_path / "mine" / "heldout.jsonl").read_text().count("\n")
    assert f"200 segments, {held} labelled" in shown
    assert f"{200 - held} seen by the scorer when it was fitted" in shown
    assert "second scorer zorp (above 0): AUC" in shown
    assert json.loads((tmp_path / "scored" / "audit.json").read_text())["auc"] > 0.9


def test_ctrl_c_tells_how_to_resume(tokens_dir, tmp_path):
    (tmp_path / "m.yaml").write_text(dump_yaml({"model": {"name": "from_config", "config": TINY_LLAMA}}))
    settings = [
        "objective.name=mle",
        "train.tokens=1e7",
        "train.context=32",
        "train.batch_rows=16",
        "train.save_every=5e4",
    ]
    process = subprocess.Popen(
        [*PHF, "train", str(tokens_dir), str(tmp_path / "r"), str(tmp_path / "m.yaml"), *settings],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list((tmp_path / "r" / "checkpoints").glob("*/complete.json")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error.splitlines()[1:] == ["interrupted; run the same command again to resume"]
