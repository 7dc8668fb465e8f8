"""Compare training at two commits exactly: every loss and every byte of the weights.

    make golden-exact REV=main~3        this working tree against a commit

Both sides score, tokenize and train the tiny corpus of the tests by the same commands, each with its own source. All
objectives train in float32; two more runs cover bfloat16 and the compiled model. Exit status 1 where a value differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from helpers import TINY_LLAMA, tiny_texts, write_jsonl  # noqa: E402

OBJECTIVES = ("mle", "filtering", "conditional", "unlikelihood", "masking", "rwr", "awr")
TINY_GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
TRAIN = {"tokens": 20 * 16 * 32, "context": 32, "batch_rows": 16, "lr": 1e-2, "log_every": 1}
FP32 = {"precision": "fp32", "compile": False}
RUNS = {
    **{name: (TINY_LLAMA, name, FP32) for name in OBJECTIVES},
    "awr-gpt2-bf16": (TINY_GPT2, "awr", {"precision": "bf16", "compile": False}),
    "conditional-compiled": (TINY_LLAMA, "conditional", {"precision": "fp32", "compile": True}),
}
"""Name of a run: (model's config, objective, training settings)."""


def phf(source: Path, folder: Path, *arguments: str) -> bool:
    """One command of the phf in `source`, run in `folder`. False if another commit does not know the objective."""
    environment = {**os.environ, "PYTHONPATH": str(source / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "phf", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    if "unknown objective" in done.stderr and source != ROOT:
        return False
    if done.returncode:
        sys.exit(f"phf {' '.join(arguments)} of {source} failed:\n{done.stderr}")
    return True


def train_all(source: Path, folder: Path) -> dict[str, tuple[list[float], bytes]]:
    """(losses, bytes of the weights) of every run, trained by the phf in `source`."""
    write_jsonl(folder / "texts.jsonl", tiny_texts())
    phf(source, folder, "score", "texts.jsonl", "scored", "--scorer", "regex", r"scorer.pattern='https?://\S+'")
    phf(source, folder, "tokenize", "scored", "tokens", "--vocab-size", "300", "--heldout", "0.1")
    found = {}
    for name, (model, objective, settings) in RUNS.items():
        recipe = {
            "model": {"name": "from_config", "config": model},
            "objective": {"name": objective},
            "train": TRAIN | settings,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(recipe))  # JSON is YAML
        if not phf(source, folder, "train", "tokens", f"runs/{name}", f"{name}.yaml"):
            continue
        lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        weights = (folder / "runs" / name / "model" / "model.safetensors").read_bytes()
        found[name] = [json.loads(line)["loss"] for line in lines], weights
        print(f"{source.name}: trained {name}", file=sys.stderr)
    return found


def compare(ours: dict[str, tuple[list[float], bytes]], theirs: dict[str, tuple[list[float], bytes]]) -> bool:
    """Print a line for each run; whether all are identical."""
    same = True
    for name, (losses, weights) in ours.items():
        if name not in theirs:
            print(f"{name:22} not known at the other commit")
            continue
        other_losses, other_weights = theirs[name]
        steps = sum(a == b for a, b in zip(losses, other_losses, strict=True))
        equal = weights == other_weights
        same &= equal and steps == len(losses)
        verdict = "identical" if equal else "DIFFER"
        print(f"{name:22} losses identical in {steps} of {len(losses)} steps, weights {verdict}")
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("revision", help="the commit to compare the working tree with")
    revision = parser.parse_args().revision
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tree = folder / "theirs-source"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "-q", "--detach", str(tree), revision], check=True)
        try:
            for side in ("ours", "theirs"):
                (folder / side).mkdir()
            same = compare(train_all(ROOT, folder / "ours"), train_all(tree, folder / "theirs"))
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)
    sys.exit(not same)


if __name__ == "__main__":
    main()
