"""Write losses.json again: `python tests/golden/make.py`. Losses that are equal up to rounding stay. Only for a new
objective or when losses should change; give the reason in the commit."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers import (
    DEFAULT_OBJECTIVES,
    LINK,
    losses_of,
    tiny_texts,
    train_tiny,
    write_jsonl,
)
from phf.data.readers import Jsonl
from phf.data.segment import Lines
from phf.scoring.score import score_corpus
from phf.tokens.store import tokenize_corpus
from phf.tokens.tokenizer import TrainBPE

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    score_corpus(Jsonl(str(write_jsonl(folder / "texts.jsonl", tiny_texts()))), Lines(), LINK, folder / "scored")
    tokenize_corpus(folder / "scored", TrainBPE(300), folder / "tokens", heldout=0.1)
    kept = Path(__file__).with_name("losses.json")
    before = json.loads(kept.read_text()) if kept.exists() else {}
    golden = {}
    for objective in DEFAULT_OBJECTIVES:
        train_tiny(folder / "tokens", folder / objective.name, objective)
        losses = losses_of(folder / objective.name)
        old = before.get(objective.name, [])
        same = len(old) == len(losses) and all(
            math.isclose(a, b, rel_tol=1e-5) for a, b in zip(old, losses, strict=True)
        )
        golden[objective.name] = old if same else losses
    kept.write_text(json.dumps(golden, indent=1) + "\n")
