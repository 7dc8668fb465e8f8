"""Shards on clusters. Slurm is played by two small scripts that run the array's tasks here; Ray is real."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from helpers import LINK, folder_bytes, tiny_texts, write_jsonl
from phf.data import readers as corpus
from phf.data.readers import Folder, Jsonl
from phf.data.scored import ScoredCorpus
from phf.data.segment import Lines
from phf.scorers import Regex
from phf.scoring.cluster import Slurm, executor
from phf.scoring.score import Submitted, add_scores, score_corpus
from phf.tokens.parts import run_plain
from phf.tokens.store import FILES, tokenize_corpus
from phf.tokens.tokenizer import TrainBPE

pytest.importorskip("datatrove", reason="extra 'cluster' is not installed")

SBATCH = """#!{python}
import os, re, subprocess, sys
script = next(a for a in sys.argv[1:] if not a.startswith("-"))
text = open(script).read()
array = re.search(r"#SBATCH --array=(\\d+)-(\\d+)", text)
for task in range(int(array[1]), int(array[2]) + 1) if array else []:
    env = dict(os.environ, SLURM_ARRAY_TASK_ID=str(task), SLURM_JOB_ID="7", SLURM_JOB_NODELIST="here", RUN_OFFSET="0")
    env.update(SLURM_NODELIST="here", SLURM_CPUS_PER_TASK="1", SLURM_MEM_PER_CPU="1024")
    if str(task) != os.environ.get("FAIL_TASK"):
        subprocess.run(["bash", script], env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job 7")
"""
SRUN = """#!/bin/bash
while [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done
exec "$@"
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text(SBATCH.format(python=sys.executable))
    (tools / "srun").write_text(SRUN)
    (tools / "scontrol").write_text("#!/bin/bash\necho localhost\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    return executor(Slurm(partition="cpu", qos=""))


def three_files(folder: Path) -> Folder:
    folder.mkdir()
    for n in range(3):
        write_jsonl(folder / f"{n}.jsonl", tiny_texts(5, seed=n))
    return Jsonl(str(folder))


def test_slurm_gives_the_same_scores_and_the_second_call_finishes(tmp_path, slurm):
    source = three_files(tmp_path / "c")
    with pytest.raises(Submitted, match=r"3 shards as Slurm job 7.*run the same command again"):
        score_corpus(source, Lines(), LINK, tmp_path / "s", executor=slurm)
    manifest = score_corpus(source, Lines(), LINK, tmp_path / "s", executor=slurm)
    score_corpus(source, Lines(), LINK, tmp_path / "local")
    assert folder_bytes(tmp_path / "s") == folder_bytes(tmp_path / "local")
    assert manifest.counts.documents == 15
    with pytest.raises(Submitted):
        add_scores(tmp_path / "s", Regex("cats"), "cats", executor=slurm)
    add_scores(tmp_path / "s", Regex("cats"), "cats", executor=slurm)
    assert ScoredCorpus(tmp_path / "s").preferences() == ["regex", "cats"]


def test_a_failed_slurm_task_is_submitted_again(tmp_path, slurm, monkeypatch):
    source = three_files(tmp_path / "c")
    monkeypatch.setenv("FAIL_TASK", "1")
    with pytest.raises(Submitted, match="3 shards"):
        score_corpus(source, Lines(), LINK, tmp_path / "s", executor=slurm)
    assert not (tmp_path / "s" / "manifest.json").exists()
    monkeypatch.delenv("FAIL_TASK")
    with pytest.raises(Submitted, match="1 shards"):
        score_corpus(source, Lines(), LINK, tmp_path / "s", executor=slurm)
    assert score_corpus(source, Lines(), LINK, tmp_path / "s", executor=slurm).counts.documents == 15


def test_slurm_tokenizes_into_the_same_store(tmp_path, slurm, monkeypatch):
    score_corpus(three_files(tmp_path / "c"), Lines(), LINK, tmp_path / "s")
    tokenize_corpus(tmp_path / "s", TrainBPE(300), tmp_path / "local")
    array = executor(Slurm(partition="cpu", qos=""), run_plain, "tokenize")
    monkeypatch.setenv("FAIL_TASK", "1")
    with pytest.raises(Submitted, match="3 shards"):
        tokenize_corpus(tmp_path / "s", TrainBPE(300), tmp_path / "t", executor=array)
    assert not (tmp_path / "t" / "manifest.json").exists()
    monkeypatch.delenv("FAIL_TASK")
    with pytest.raises(Submitted, match="1 shards"):
        tokenize_corpus(tmp_path / "s", TrainBPE(300), tmp_path / "t", executor=array)
    tokenize_corpus(tmp_path / "s", TrainBPE(300), tmp_path / "t", executor=array)
    for name in (*FILES, "regex.score.bin", "manifest.json"):
        assert (tmp_path / "t" / name).read_bytes() == (tmp_path / "local" / name).read_bytes(), name


RAY = """
import sys, time
from phf.data import readers as corpus
from phf.scoring import score as annotate
from phf.scoring.cluster import Ray, executor
from phf.scorers import Function
from phf.data.segment import Lines
config = executor(Ray(address=sys.argv[4], mem_per_cpu_gb=0.2))
source = corpus.Jsonl(sys.argv[1])
print("begun", flush=True)
annotate.score_corpus(source, Lines(), Function(sys.argv[3]), sys.argv[2], executor=config)
"""
SLOW_SCORER = """
import time
def score(text):
    time.sleep(0.004)
    return 1.0 if "http" in text else 0.0
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_ray_cluster_of_two_nodes_survives_the_loss_of_one(tmp_path, monkeypatch):
    """One of two nodes is killed while it works. The other node, or a second call, does its shards again. The bytes are
    those of a run in one process."""
    pytest.importorskip("ray", reason="extra 'ray' is not installed")
    folder = tmp_path / "c"
    folder.mkdir()
    for n in range(8):
        write_jsonl(folder / f"{n}.jsonl", tiny_texts(30, seed=n))
    (tmp_path / "slow.py").write_text(SLOW_SCORER)
    (tmp_path / "run.py").write_text(RAY)
    function = f"{tmp_path / 'slow.py'}:score"
    ray = str(Path(sys.executable).parent / "ray")
    env = os.environ | {
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(Path(corpus.__file__).parents[2]),
    }
    token = tmp_path / "token"
    token.write_text("a" * 64)
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    port = 20000 + os.getpid() % 12000  # above Ray's own ports, below those that the system assigns
    address = f"127.0.0.1:{port}"
    place = Path(tempfile.mkdtemp(prefix="ray-phf-", dir="/tmp"))  # paths of sockets must be short
    nodes = []
    try:
        common = [
            "--num-cpus=1",
            "--block",
            "--disable-usage-stats",
            "--include-dashboard=false",
            "--object-store-memory=80000000",
        ]
        temporary = f"--temp-dir={place}"
        for arguments in (
            ["--head", f"--port={port}", temporary, "--node-ip-address=127.0.0.1"],
            [f"--address={address}"],
        ):
            arguments = [a for a in arguments if "dashboard" not in a]
            chosen = common if "--head" in arguments else [c for c in common if "dashboard" not in c]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            start = [ray, "start", *arguments, *chosen]
            nodes.append(subprocess.Popen(start, env=env, start_new_session=True, **quiet))
            time.sleep(12)
            assert nodes[-1].poll() is None, "a Ray node did not start"
        command = [sys.executable, str(tmp_path / "run.py"), str(folder), str(tmp_path / "s"), function, address]
        run = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 150
        while len(list((tmp_path / "s").glob("part-*.json"))) < 2:
            assert run.poll() is None, run.stderr.read()
            assert time.monotonic() < deadline, "no shard was done"
            time.sleep(0.2)
        os.killpg(nodes[1].pid, signal.SIGKILL)
        try:
            run.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            run.kill()
            pytest.fail("the run hangs after the loss of a node")
        if run.returncode:  # the shards of the lost node were not taken over; a second call does them
            again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
            assert again.returncode == 0, again.stderr
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
        for process in psutil.process_iter(["cmdline"]):  # processes of this cluster only
            if any(str(place) in part or address in part for part in process.info["cmdline"] or ()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        shutil.rmtree(place, ignore_errors=True)
    from phf.scorers import Function

    score_corpus(Jsonl(str(folder)), Lines(), Function(function), tmp_path / "local")
    assert folder_bytes(tmp_path / "s") == folder_bytes(tmp_path / "local")
