"""Tokenizing a scored corpus: two processes against one and against `datasets.map`; and exporting against tokenizing.

    python benchmarks/tokenize_corpus.py --out benchmarks/results/tokenize_corpus.json

The text is Python's standard library, `copies` times. `datasets.map` tokenizes the same segments with the same
tokenizer in two processes and saves them, and first reads the Parquet files into its own format; it checks nothing.
`tokens`: in the store.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from _measure import arguments, case, interleaved, write
from phf.data import readers
from phf.data.readers import Jsonl
from phf.data.scored import ScoredCorpus
from phf.data.segment import Lines
from phf.engines.export import export_tokens
from phf.objectives import Conditional
from phf.scorers import Regex
from phf.scoring.score import score_corpus
from phf.tokens.store import TokenStore, tokenize_corpus
from phf.tokens.tokenizer import PretrainedTokenizer, TrainBPE, load_tokenizer

PROCESSES = 2


def library(scored: Path, tokenizer: Path, out: Path) -> None:
    """The segments of a corpus as token ids, by the library's own means."""
    import datasets

    datasets.disable_progress_bars()
    loaded = load_tokenizer(tokenizer)

    def encoded(rows):
        cut = [text for texts in rows["texts"] for text in texts]
        ids = iter(loaded(cut, add_special_tokens=False)["input_ids"])
        return {"ids": [[next(ids) for _ in texts] for texts in rows["texts"]]}

    files = [str(file) for file in ScoredCorpus(scored).files]
    data = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(out / "cache"))
    data.map(encoded, batched=True, num_proc=PROCESSES, remove_columns=data.column_names).save_to_disk(out / "tokens")


def main() -> None:
    args = arguments(__doc__ or "", copies=1)
    readers.SHARD_BYTES = 4_000_000
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        paths = [path for path in sorted(stdlib.rglob("*.py")) if "site-packages" not in path.parts]
        with open(root / "text.jsonl", "w") as file:
            for _ in range(args.copies):
                file.writelines(json.dumps({"text": path.read_text("utf-8", "replace")}) + "\n" for path in paths)
        score_corpus(Jsonl(str(root / "text.jsonl")), Lines(), Regex("TODO"), root / "scored", workers=PROCESSES)
        tokenize_corpus(root / "scored", TrainBPE(8192), root / "first")
        tokenizer = PretrainedTokenizer(str(root / "first" / "tokenizer"))
        tokens = TokenStore.open(root / "first")

        def made(workers: int) -> None:
            shutil.rmtree(root / "out", ignore_errors=True)
            tokenize_corpus(root / "scored", tokenizer, root / "out", workers=workers)

        def by_library() -> None:
            shutil.rmtree(root / "library", ignore_errors=True)
            library(root / "scored", root / "first" / "tokenizer", root / "library")

        def exported() -> None:
            shutil.rmtree(root / "exported", ignore_errors=True)
            export_tokens(root / "first", root / "exported", Conditional())

        runs = {
            "one": lambda: made(1),
            "two": lambda: made(PROCESSES),
            "library": by_library,
            "exported": exported,
        }
        seconds = interleaved(runs, args.repeats)
        count = tokens.manifest.counts.tokens
        rates = {name: [count / s for s in found] for name, found in seconds.items()}
        about = {"unit": "tokens/s", "lower_is_better": False, "tokens": count}
        write(
            args.out,
            "tokenize_corpus",
            [
                case("two processes, against one", rates["two"], rates["one"], **about),
                case("two processes, against datasets.map in two", rates["two"], rates["library"], **about),
                case("export-tokens flat, against tokenizing in one process", rates["exported"], rates["one"], **about),
            ],
        )


if __name__ == "__main__":
    main()
