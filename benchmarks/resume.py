"""Time to the first batch after skipping ahead: ours by index, against drawing and throwing away the rows before it.

python benchmarks/resume.py --out benchmarks/results/resume.json
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from _measure import arguments, case, interleaved, write
from phf import store
from phf.packing import Order, Rows
from phf.tokens import TokenStore
from phf.types import Edit

CONTEXT, BATCH, REPLAYED = 256, 16, 2000


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
    store.write_json(
        folder / store.MANIFEST,
        {"stage": "tokenize", "identity": {"name": "given"}, "dtype": "uint16", "end_of_text_id": 0},
    )
    return TokenStore.open(folder)


def main() -> None:
    args = arguments(__doc__ or "")
    cases = []
    with tempfile.TemporaryDirectory() as name:
        tokens = synthetic(Path(name), 900_000)
        rows = Rows(tokens, Edit(), CONTEXT)
        order = Order(rows.num_rows, 0)

        def first_batch(start: int) -> None:
            rows.batch(order.rows(start, start + BATCH))

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
    write(args.out, "resume", cases)


if __name__ == "__main__":
    main()
