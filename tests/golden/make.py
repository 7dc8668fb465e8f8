"""Write losses.json anew: `python tests/golden/make.py`. Only when losses should move; say why in the commit."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers import (
    DEFAULT_OBJECTIVES,
    LINK,
    TINY_MODEL,
    losses_of,
    tiny_texts,
    train_config,
    write_jsonl,
)
from phf.data.readers import Jsonl
from phf.data.segment import Lines
from phf.scoring.score import score_corpus
from phf.tokens.store import tokenize_corpus
from phf.tokens.tokenizer import TrainBPE
from phf.training.train import train

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    score_corpus(Jsonl(str(write_jsonl(folder / "texts.jsonl", tiny_texts()))), Lines(), LINK, folder / "scored")
    tokenize_corpus(folder / "scored", TrainBPE(300), folder / "tokens", heldout=0.1)
    golden = {}
    for objective in DEFAULT_OBJECTIVES:
        train(folder / "tokens", folder / objective.name, TINY_MODEL, objective, train_config())
        golden[objective.name] = losses_of(folder / objective.name)
    Path(__file__).with_name("losses.json").write_text(json.dumps(golden, indent=1) + "\n")
