"""A campaign against every stage: kills, a full disk, a second writer, damaged files.

After any kill the same command gives the same bytes as an undisturbed run, and nothing else is there. `runner.py`
runs the commands.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import TINY_LLAMA
from phf.core.locks import LOCK
from phf.labelling.rubric import parse_rubric, question
from phf.tokens.tokenizer import train_bpe
from phf.training.lm import FromConfig, build_lm

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked")]

TIMES = {"seconds", "tokens_per_s", "model_tflops", "mfu", "waited"}
"""Numbers of the clock."""
NEVER = {"training_args.bin"}
"""Holds the name of the host. It is never read."""
TRAIN = (
    "model.name=tiny model.config.hidden_size=32 model.config.num_hidden_layers=2 model.config.num_attention_heads=2 "
    "model.config.intermediate_size=64 train.tokens=6144 train.context=64 train.batch_rows=8 train.save_every=1024 "
    "train.log_every=3 train.compile=false train.precision=fp32 train.milestones=[4096] objective.name=conditional"
)


@dataclass(frozen=True)
class Stage:
    command: str
    folder: str
    """What it writes."""
    needs: tuple[str, ...] = ()
    """Folders that are there before it runs; `folder` among them: what the stage adds to."""
    points: int = 12
    """At how many changes of the disk it is disturbed."""


STAGES = {
    "score": Stage("score corpus scored --scorer pii", "scored", points=24),
    "add": Stage("score scored --add links --scorer regex scorer.pattern=https?://\\S+", "scored", ("scored",)),
    "label": Stage("label scored labels --rubric rubric.md --n 24 --by score --local judge", "labels", ("scored",)),
    "fit-scorer": Stage("fit-scorer labels.jsonl scorer", "scorer"),
    "tokenize": Stage("tokenize scored tokens --vocab-size 300 --heldout 0.2", "tokens", ("scored",), points=24),
    "train": Stage(f"train tokens run {TRAIN}", "run", ("scored", "tokens"), points=24),
    "eval": Stage(
        "eval run num_samples=8 max_tokens=12 min_tokens=2 --heldout-tokens 800", "run", ("scored", "tokens", "run")
    ),
    "redteam": Stage(
        "redteam run trials=1 rounds=1 pool=3 candidates=2 continuations=2 confirm=1 max_tokens=8 tokens.num_samples=4 "
        "tokens.max_tokens=6 tokens.min_tokens=1",
        "run",
        ("scored", "tokens", "run"),
    ),
    "export": Stage("export run release", "release", ("scored", "tokens", "run")),
}  # fmt: skip


class Runner:
    """The process that forks for commands."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("runner.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
        assert self._answer() == {"ready": True}

    def _answer(self) -> dict:
        return json.loads(self.process.stdout.readline())

    def ask(self, **task) -> dict:
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def __call__(self, command: str, cwd: Path, **more) -> tuple[int, str]:
        log = self.root / "log"
        report = str(self.root / "points")
        code = self.ask(argv=command.split(), cwd=str(cwd), log=str(log), report=report, **more)["code"]
        return code, log.read_text(errors="replace")


@pytest.fixture(scope="session")
def runner(tmp_path_factory):
    runner = Runner(tmp_path_factory.mktemp("runner"))
    yield runner
    runner.process.stdin.close()
    runner.process.wait(20)


WORDS = "the model writes of rivers and stones when it rains in a town by the sea under old trees"


def write_corpus(folder: Path) -> None:
    rng = random.Random(0)
    words = WORDS.split()
    bad = ["mail bob%d@example.com now", "call 555-01%02d please", "see https://example.org/p%d for it"]
    folder.mkdir(parents=True)
    for number in range(3):
        with open(folder / f"part{number}.jsonl", "w", encoding="utf-8") as out:
            for _ in range(25):
                lines = [" ".join(rng.choices(words, k=rng.randint(3, 9))) for _ in range(rng.randint(1, 6))]
                lines.append(rng.choice(bad) % rng.randint(0, 99))
                out.write(json.dumps({"text": "\n".join(lines) + "\n"}) + "\n")
            out.write("not json\n")


@pytest.fixture(scope="session")
def base(runner, tmp_path_factory) -> Path:
    """Every stage, undisturbed. What a stage found is in `STAGE@before`, what it left in `STAGE@after`."""
    root = tmp_path_factory.mktemp("base")
    write_corpus(root / "corpus")
    rng = random.Random(1)
    rows = [{"text": f"{'awful' if n % 2 else 'nice'} {rng.random()}", "label": n % 2} for n in range(120)]
    (root / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "rubric.md").write_text("- 0: no\n- 1: yes\n")
    tokenizer = train_bpe([question(parse_rubric("- 0: no\n- 1: yes"), WORDS)] * 3, 400)
    shape = TINY_LLAMA | {"max_position_embeddings": 512, "initializer_range": 0.3}
    build_lm(FromConfig(shape), tokenizer, seed=0).save_pretrained(root / "judge")
    tokenizer.save_pretrained(root / "judge")
    for name, stage in STAGES.items():
        before = root / f"{name}@before"
        before.mkdir()
        for need in stage.needs:
            shutil.copytree(root / need, before / need)
        code, log = runner(stage.command, root)
        assert code == 0, log
        shutil.copytree(root / stage.folder, root / f"{name}@after" / stage.folder)
    return root


def fresh(base: Path, name: str, root: Path) -> Path:
    """The folder in which a stage is run again, as it was before the stage."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(base / f"{name}@before", root)
    os.symlink(base / "corpus", root / "corpus")
    for name in ("labels.jsonl", "rubric.md", "judge"):
        os.symlink(base / name, root / name)
    return root


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def digest(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl") and path.name != "tokenizer.json":
        rows = [json.loads(line) for line in data.splitlines()] if path.suffix == ".jsonl" else json.loads(data)
        rows = without_times(rows)
        if path.name == "trainer_state.json":  # transformers' own log, whose loss is of the steps since the resume
            rows["log_history"] = [{k: v for k, v in line.items() if k != "loss"} for line in rows["log_history"]]
        if path.name == "complete.json":  # sizes and hashes of files that differ in the clock only
            rows["files"] = sorted(rows["files"])
        data = json.dumps(rows).encode()
    return hashlib.sha256(data).hexdigest()


def digests(root: Path, folder: str) -> dict[str, str]:
    """Hashes of what is in a folder and of what was left next to it."""
    files = [p for p in (root / folder).rglob("*") if p.is_file() and p.name not in NEVER]
    beside = [p for p in root.iterdir() if p.name.startswith(".") or ".old-" in p.name]
    return {str(p.relative_to(root)): digest(p) for p in files} | {p.name: "left over" for p in beside}


def assert_same_result(base: Path, name: str, root: Path, what: str) -> None:
    folder = STAGES[name].folder
    found = digests(root, folder)
    wanted = digests(base / f"{name}@after", folder)
    differs = sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))
    assert not differs, f"{what}: {differs}"


def some_points(runner: Runner, base: Path, name: str, root: Path) -> list[int]:
    """Changes of the disk at which to disturb a stage, spread over all of them. A second run gives the same bytes."""
    stage = STAGES[name]
    fresh(base, name, root)
    code, log = runner(stage.command, root, point=0)
    assert code == 0, log
    assert_same_result(base, name, root, "undisturbed")
    count = int((runner.root / "points").read_text())
    step = max((count - 1) / max(stage.points - 1, 1), 1)
    return sorted({min(round(1 + n * step), count) for n in range(stage.points)})


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_stage_gives_the_same_bytes_when_it_runs_again(runner, base, tmp_path, name):
    killed = 0
    for point in some_points(runner, base, name, tmp_path / "w"):
        root = fresh(base, name, tmp_path / "w")
        code, _ = runner(STAGES[name].command, root, point=point)
        killed += code == -9
        code, log = runner(STAGES[name].command, root)
        assert code == 0, f"after a kill at change {point}: {log}"
        assert_same_result(base, name, root, f"killed at change {point}")
    assert killed >= 3


@pytest.mark.parametrize("name", STAGES)
def test_a_full_disk_is_one_message_and_the_stage_runs_again(runner, base, tmp_path, name):
    points = some_points(runner, base, name, tmp_path / "w")
    for point in points[:: max(len(points) // 6, 1)]:
        root = fresh(base, name, tmp_path / "w")
        code, log = runner(STAGES[name].command, root, point=point, how="full")
        assert "Traceback" not in log, f"full at change {point}: {log}"
        if code != 0:
            assert "No space left" in log or "no space left" in log, f"full at change {point}: {log}"
        code, log = runner(STAGES[name].command, root)
        assert code == 0, f"after a full disk at change {point}: {log}"
        assert_same_result(base, name, root, f"full at change {point}")


@pytest.mark.parametrize("name", STAGES)
def test_a_second_writer_is_refused_and_changes_nothing(runner, base, tmp_path, name):
    stage = STAGES[name]
    points = some_points(runner, base, name, tmp_path / "w")
    root = fresh(base, name, tmp_path / "w")
    report = runner.root / "points"
    for mark in (".paused", ".go"):
        Path(f"{report}{mark}").unlink(missing_ok=True)
    task = {"argv": stage.command.split(), "cwd": str(root), "log": str(tmp_path / "first"), "report": str(report)}
    first = runner.ask(**task, point=points[len(points) // 2], how="pause", background=True)["pid"]
    deadline = time.monotonic() + 120
    while not Path(f"{report}.paused").exists():
        assert time.monotonic() < deadline, (tmp_path / "first").read_text()
        time.sleep(0.02)
    code, log = runner(stage.command, root)
    Path(f"{report}.go").touch()
    first_code = runner.ask(wait=first)["code"]
    assert first_code == 0, (tmp_path / "first").read_text()
    assert code == 2, log
    assert f"process {first} on" in log, log
    assert_same_result(base, name, root, "with a second writer")


def files_of(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.is_file() and p.stat().st_size > 8 and p.name not in (LOCK, *NEVER))


READERS = {
    "scored": "tokenize scored again --vocab-size 300 --heldout 0.2",
    "tokens": f"train tokens other {TRAIN}",
    "run": "export run release",
}
"""A command that reads the folder."""


@pytest.mark.parametrize("folder", READERS)
def test_damaged_files_are_seen(runner, base, tmp_path, folder):
    """A cut or missing file is one message of the next stage, or the stage does not read the file; a flipped bit is
    seen by `phf check`."""
    names = [f.relative_to(base / folder) for f in files_of(base / folder)]
    root = tmp_path / "w"
    listed = 0
    for name in names:
        for damage in ("cut", "gone", "flipped"):
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()
            for need in ("scored", "tokens", "run"):
                shutil.copytree(base / need, root / need)
            file = root / folder / name
            data = file.read_bytes()
            if damage == "cut":
                file.write_bytes(data[: len(data) // 2])
            elif damage == "gone":
                file.unlink()
            else:
                file.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
            checked, report = runner(f"check {folder}", root)
            assert "Traceback" not in report, f"{name} {damage}: {report}"
            recorded = _is_recorded(base / folder, str(name))
            listed += recorded
            if recorded:
                assert checked == 2, f"{name} {damage} is not seen by check: {report}"
            if damage == "flipped" and not recorded:
                continue
            code, log = runner(READERS[folder], root)
            assert "Traceback" not in log, f"{name} {damage}: {log}"
            if code == 0 and recorded and damage != "flipped":
                pytest.fail(f"{name} {damage} was not noticed: {log}")
    assert listed > 5


def _is_recorded(root: Path, name: str) -> bool:
    """Whether a manifest of the folder lists a file (checkpoints have marks of their own)."""
    manifest = json.loads((root / "manifest.json").read_text())
    return name in manifest["files"]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(runner, base, tmp_path):
    root = fresh(base, "train", tmp_path / "w")
    points = some_points(runner, base, "train", tmp_path / "w")
    for file, change in (
        ("optimizer.pt", lambda f: f.unlink()),
        ("model.safetensors", lambda f: f.write_bytes(f.read_bytes()[:-9] + b"\0" * 9)),
        ("scheduler.pt", lambda f: f.write_bytes(b"")),
    ):
        root = fresh(base, "train", tmp_path / "w")
        runner(STAGES["train"].command, root, point=points[-3])
        whole = sorted((root / "run" / "checkpoints").glob("*/complete.json"), key=lambda p: p.stat().st_mtime)
        assert len(whole) >= 2
        change(whole[-1].parent / file)
        code, log = runner(STAGES["train"].command, root)
        assert code == 0, log
        assert f"{whole[-1].parent.name} is damaged ({file}" in log
        shutil.rmtree(next((root / "run" / "checkpoints").glob("*.old-1")))
        assert_same_result(base, "train", root, f"{file} damaged")


def test_a_moved_run_finds_its_tokens(runner, base, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for name in ("scored", "tokens", "run"):
        shutil.copytree(base / name, tmp_path / "elsewhere" / name)
    code, log = runner("eval elsewhere/run num_samples=4 max_tokens=8 min_tokens=1 --heldout-tokens 500", tmp_path)
    assert code == 0, log
