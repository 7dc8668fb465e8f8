"""Scoring in shards: the gain of processes, the cost of shards, the cost of resuming.

    python benchmarks/sharding.py --out benchmarks/results/sharding.json

Cases: 2 processes against 1 on the same shards. 1 process in shards against the scorer in one loop over the same texts:
the overhead of reading, segmenting, Parquet and marks. A rerun with half of the shards done against a whole run.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from _measure import arguments, case, interleaved, write
from phf.core.types import Document
from phf.data.installed import StandardLibrary
from phf.data.readers import Jsonl
from phf.data.segment import Lines
from phf.scorers import PEP8
from phf.scoring.score import score_corpus


def main() -> None:
    args = arguments(__doc__ or "", files=16, documents=1500)
    source = StandardLibrary()
    texts = []
    for shard in source.plan():
        texts += [item.text for item in source.read(shard) if isinstance(item, Document) and len(item.text) < 200_000]
    texts = texts[: args.documents]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "corpus").mkdir()
        for n in range(args.files):
            lines = "".join(json.dumps({"text": t}) + "\n" for t in texts[n :: args.files])
            (folder / "corpus" / f"{n:03d}.jsonl").write_text(lines)
        corpus = Jsonl(str(folder / "corpus"))

        def score(workers: int) -> None:
            shutil.rmtree(folder / "out", ignore_errors=True)
            score_corpus(corpus, Lines(), PEP8(), folder / "out", workers)

        def bare() -> None:
            cut = Lines()
            scorer = PEP8()
            for text in texts:
                scorer.score_segments(cut.split(text))

        def resumed() -> None:
            (folder / "out" / "manifest.json").unlink()
            for mark in sorted((folder / "out").glob("part-*.json"))[::2]:
                mark.unlink()
            score_corpus(corpus, Lines(), PEP8(), folder / "out", 1)

        score(1)
        times = interleaved(
            {"one": lambda: score(1), "resumed": resumed, "two": lambda: score(2), "bare": bare}, args.repeats, warmup=0
        )
    chars = sum(map(len, texts))
    more = {"chars": chars, "shards": args.files}
    cases = [
        case("2 processes against 1", times["two"], times["one"], **more),
        case("in shards against the bare scorer", times["one"], times["bare"], **more),
        case("resume with half of the shards done against a whole run", times["resumed"], times["one"], **more),
    ]
    write(args.out, "sharding", cases)


if __name__ == "__main__":
    main()
