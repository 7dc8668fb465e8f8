"""Time to the first batch after skipping ahead, and to the first step of a resumed run.

    python benchmarks/resume.py --out benchmarks/results/resume.json

Ours reads by index. The baseline draws the rows before the position and discards them.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from _measure import arguments, case, interleaved, write
from phf.core import folders, store
from phf.core.runs import COMPLETE, RunFolder, complete_checkpoints
from phf.core.types import Edit
from phf.data.readers import Folder
from phf.data.segment import Lines
from phf.objectives import MLE
from phf.scorers import Regex
from phf.scoring.score import score_corpus
from phf.tokens.edited import Stream
from phf.tokens.parts import TokenCounts
from phf.tokens.source_order import SourceOrder
from phf.tokens.store import StoredScores, TokensManifest, TokenStore, tokenize_corpus
from phf.tokens.tokenizer import TrainBPE
from phf.training.config import TrainConfig
from phf.training.lm import FromConfig
from phf.training.train import train

CONTEXT = 256
BATCH = 16
REPLAYED = 2000


def synthetic(folder: Path, documents: int) -> TokenStore:
    """A store of random tokens: `documents` documents of 10 segments of 30 tokens."""
    rng = np.random.default_rng(0)
    segments = documents * 10
    rng.integers(1, 2000, segments * 30, dtype=np.uint16).tofile(folder / "tokens.bin")
    np.arange(30, segments * 30 + 1, 30, dtype=np.int64).tofile(folder / "seg_ends.bin")
    np.arange(10, segments + 1, 10, dtype=np.int64).tofile(folder / "doc_ends.bin")
    np.full(segments, 100, np.uint32).tofile(folder / "seg_bytes.bin")
    np.zeros(documents, np.uint8).tofile(folder / "heldout.bin")
    rng.random(segments, dtype=np.float32).tofile(folder / "given.score.bin")
    identity = {"name": "given"}
    manifest = TokensManifest(
        key="x",
        identity=identity,
        dtype="uint16",
        end_of_text_id=0,
        content="x",
        main="given",
        scores={"given": StoredScores("x", identity, None, unjudged=0)},
        counts=TokenCounts(train_documents=documents),
    )
    folders.finish(folder, manifest)
    return TokenStore.open(folder)


DEMO = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 344,
    "max_position_embeddings": CONTEXT,
}


def stopped_run(folder: Path) -> Path:
    """A run of the demo's shape on a part of this Python's library, stopped after one step."""
    score_corpus(Folder(str(Path(asyncio.__file__).parent)), Lines(), Regex("TODO"), folder / "scored")
    tokenize_corpus(folder / "scored", TrainBPE(2048), folder / "tokens")
    step_on(folder / "run", folder / "tokens", 1)
    return folder / "run"


def step_on(run: Path, tokens: Path, step: int) -> None:
    """Build, resume from the newest checkpoint, train to `step` and save."""
    settings = TrainConfig(tokens=70_000 * BATCH * CONTEXT, context=CONTEXT, batch_rows=BATCH, compile=False)
    train(tokens_dir=tokens, out=run, model=FromConfig(DEMO), objective=MLE(), config=settings, stop_after=step)


def at_step(run: Path, step: int, out: Path) -> Path:
    """A copy of a stopped run that claims to have done `step` steps."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(run, out)
    (checkpoint,) = complete_checkpoints(RunFolder(out).checkpoints)
    checkpoint = checkpoint.rename(RunFolder(out).checkpoint(step))
    for name, key in ((COMPLETE, "step"), ("trainer_state.json", "global_step")):
        store.write_json(checkpoint / name, store.read_json(checkpoint / name) | {key: step})
    return out


def main() -> None:
    args = arguments(__doc__ or "")
    cases = []
    with tempfile.TemporaryDirectory() as name:
        tokens = synthetic(Path(name), 900_000)
        order = SourceOrder(Stream(tokens, lambda block: Edit()), CONTEXT, 0)

        def first_batch(start: int) -> None:
            order.batch(start, start + BATCH)

        def replay(start: int) -> None:
            for at in range(0, start, BATCH):
                first_batch(at)
            first_batch(start)

        for skip in (1, 1000, 1_000_000):
            replayed = min(skip, REPLAYED)
            seconds = interleaved(
                {"ours": lambda s=skip: first_batch(s), "baseline": lambda s=replayed: replay(s)}, args.repeats
            )
            scale = skip / replayed  # a replay of a million rows is measured on its first part
            cases.append(
                case(
                    f"first batch after {skip} rows",
                    seconds["ours"],
                    [s * scale for s in seconds["baseline"]],
                    extrapolated=scale > 1,
                )
            )
        run = stopped_run(Path(name))
        baseline = {c["case"]: c["baseline"] for c in cases}
        for skip in (1, 1000, 1_000_000):
            step = max(skip // BATCH, 1)
            seconds = []
            for _ in range(args.repeats):
                copy = at_step(run, step, Path(name) / "copy")
                start = time.perf_counter()
                step_on(copy, Path(name) / "tokens", step + 1)
                seconds.append(time.perf_counter() - start)
            with_replay = [s + baseline[f"first batch after {skip} rows"] for s in seconds]
            cases.append(case(f"train resumed after {skip} rows, to its next checkpoint", seconds, with_replay))
    write(args.out, "resume", cases)


if __name__ == "__main__":
    main()
