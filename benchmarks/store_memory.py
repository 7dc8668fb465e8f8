"""Memory and time of reading a token store for training, at a growing number of segments.

    python benchmarks/store_memory.py --out benchmarks/results/store_memory.json

Ours: opening the store, resolving the objective's threshold, the first batch, and 64 batches of 16 rows further on.
Baseline: an edit of the whole corpus at once, as arrays with an entry per segment (phf before November 2026). Each case
is a process of its own. Its figure is the peak of private memory (RssAnon) beyond the imports, in bytes per segment.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from _measure import arguments, case, write
from phf.core import folders
from phf.tokens.parts import TokenCounts
from phf.tokens.store import StoredScores, TokensManifest

SEGMENTS = (5_000_000, 20_000_000, 80_000_000)
TOKENS = 10
"""Tokens of a segment."""
SEGMENTS_OF_DOCUMENT = 20
PIECE = 1 << 20

CHILD = r"""
import re, sys, threading, time
import numpy as np
from phf.core.random import uniforms
from phf.core.types import PieceIds
from phf.objectives import Conditional
from phf.tokens.edited import Stream
from phf.tokens.source_order import SourceOrder
from phf.tokens.store import TokenStore

way, folder = sys.argv[1:]
peak = [0]
done = threading.Event()

def private():
    return int(re.search(r"RssAnon:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], private())

uniforms(10, "warm")
before = private()
threading.Thread(target=watch, daemon=True).start()
started = time.perf_counter()
store = TokenStore.open(folder)
if way == "ours":
    objective = Conditional(0.5).fit(store.statistics)
    pieces = [PieceIds((1,)), PieceIds((2,))]
    order = SourceOrder(Stream(store, lambda block: objective.edit(block, 0), pieces), 256, 0)
    order.batch(0, 1)
    first = time.perf_counter() - started
    for step in range(64):
        order.batch(16 * step, 16 * (step + 1))
else:
    lengths = np.diff(store.seg_ends, prepend=0)
    doc_S = np.repeat(np.arange(len(store.doc_ends)), np.diff(store.doc_ends, prepend=0))
    control_S = np.where(store.score_S <= np.float32(0.5), 0, 1).astype(np.int8)
    control_S[uniforms(len(control_S), 0, "drop control tokens") < 0.01] = -1
    first_S = np.zeros(len(store.seg_ends) + 1, bool)
    first_S[np.r_[0, store.doc_ends[:-1]]] = True
    lengths += first_S[:-1]
    lengths += control_S >= 0
    ends_S = np.where((~store.heldout_D)[doc_S], lengths, 0).cumsum()
    first = time.perf_counter() - started
peak[0] = max(peak[0], private())
done.set()
print(peak[0] - before, first)
"""


def make_store(folder: Path, segments: int) -> None:
    """A store of equal segments with random scores; its tokens are a file of zeros that takes no room."""
    rng = np.random.default_rng(0)
    documents = segments // SEGMENTS_OF_DOCUMENT
    with open(folder / "tokens.bin", "wb") as file:
        file.truncate(2 * TOKENS * segments)
    with (
        open(folder / "seg_ends.bin", "wb") as ends,
        open(folder / "seg_bytes.bin", "wb") as sizes,
        open(folder / "s.score.bin", "wb") as scores,
    ):
        for start in range(0, segments, PIECE):
            count = min(PIECE, segments - start)
            ends.write(((np.arange(start, start + count, dtype=np.int64) + 1) * TOKENS).tobytes())
            sizes.write(np.full(count, 40, np.uint32).tobytes())
            scores.write(rng.random(count, np.float32).tobytes())
    (np.arange(1, documents + 1, dtype=np.int64) * SEGMENTS_OF_DOCUMENT).tofile(folder / "doc_ends.bin")
    np.zeros(documents, np.uint8).tofile(folder / "heldout.bin")
    tokens = TOKENS * segments
    counts = TokenCounts(
        documents=documents, segments=segments, tokens=tokens, train_documents=documents, train_tokens=tokens
    )
    identity = {"name": "s", "unit": "probability"}
    manifest = TokensManifest(
        key="x",
        identity=identity,
        dtype="uint16",
        vocab_size=1000,
        content="x",
        main="s",
        scores={"s": StoredScores("x", identity, None, unjudged=0)},
        end_of_text_id=0,
        counts=counts,
    )
    folders.finish(folder, manifest)


def measure(way: str, folder: Path) -> tuple[float, float]:
    """(bytes, seconds to the first row) of one process."""
    command = [sys.executable, "-c", CHILD, way, str(folder)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    memory, seconds = out.split()
    return float(memory), float(seconds)


def main() -> None:
    args = arguments(__doc__ or "")
    cases = []
    for segments in SEGMENTS:
        with tempfile.TemporaryDirectory() as name:
            make_store(Path(name), segments)
            ours = []
            whole = []
            for _ in range(3):
                ours.append(measure("ours", Path(name)))
                whole.append(measure("whole", Path(name)))
        label = f"{segments // 1_000_000} million segments"
        cases.append(
            case(
                f"memory, {label}",
                [memory / segments for memory, _ in ours],
                [memory / segments for memory, _ in whole],
                "bytes per segment",
            )
        )
        cases.append(case(f"first row, {label}", [s for _, s in ours], [s for _, s in whole], "s"))
        print(json.dumps(cases[-2:]), file=sys.stderr, flush=True)
    write(args.out, "store_memory", cases)


if __name__ == "__main__":
    main()
