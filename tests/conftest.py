"""Shared pieces: a tiny corpus with real PII-like lines, its token store, and a store from given numbers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

# before torch is imported anywhere: tests are many small steps, and two processes of them share two cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # servers of tests are here
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest

from phf.core import store
from phf.data.readers import Jsonl
from phf.data.segment import Lines
from phf.scorers import Regex
from phf.scoring.score import score_corpus
from phf.tokens.store import TokenStore, tokenize_corpus
from phf.tokens.tokenizer import TrainBPE

hypothesis.settings.register_profile("phf", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("phf")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "line",
    "of",
    "text",
    "and",
    "writes",
    "what",
    "it",
    "knows",
    "about",
    "cats",
    "dogs",
    "trees",
    "rivers",
    "and",
    "stones",
]


def tiny_texts(count: int = 60, seed: int = 0) -> list[str]:
    """Documents of a few lines; about one line in four holds a link."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        lines = []
        for _ in range(rng.integers(3, 9)):
            words = " ".join(rng.choice(WORDS, rng.integers(3, 9)))
            link = "see https://example.org/" + str(rng.choice(WORDS)) + " " if rng.random() < 0.25 else ""
            lines.append(("    " if rng.random() < 0.2 else "") + link + words + "\n")
        texts.append("".join(lines))
    return texts


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t, "n": i}) + "\n" for i, t in enumerate(texts)))
    return path


LINK = Regex(r"https?://\S+")


@pytest.fixture(scope="session")
def scored_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    score_corpus(Jsonl(str(write_jsonl(folder / "texts.jsonl", tiny_texts()))), Lines(), LINK, folder / "scored")
    return folder / "scored"


@pytest.fixture(scope="session")
def tokens_dir(scored_dir: Path) -> Path:
    tokenize_corpus(scored_dir, TrainBPE(300), scored_dir.parent / "tokens", heldout=0.1)
    return scored_dir.parent / "tokens"


@pytest.fixture(scope="session")
def tokens(tokens_dir: Path) -> TokenStore:
    return TokenStore.open(tokens_dir)


def make_store(
    folder: Path,
    docs: Sequence[Sequence[Sequence[int]]],
    scores: Sequence[float],
    heldout: Sequence[bool] | None = None,
    end_of_text: int = 0,
) -> TokenStore:
    """A token store holding exactly these ids: documents of segments of tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    segs = [s for d in docs for s in d]
    np.array([t for s in segs for t in s], np.uint16).tofile(folder / "tokens.bin")
    np.array([len(s) for s in segs], np.int64).cumsum().tofile(folder / "seg_ends.bin")
    np.array([len(d) for d in docs], np.int64).cumsum().tofile(folder / "doc_ends.bin")
    np.array([len(s) for s in segs], np.uint32).tofile(folder / "seg_bytes.bin")
    np.array(heldout if heldout is not None else [0] * len(docs), np.uint8).tofile(folder / "heldout.bin")
    np.array(scores, np.float32).tofile(folder / "given.score.bin")
    manifest = {
        "stage": "tokenize",
        "identity": {"name": "given"},
        "dtype": "uint16",
        "content": "x",
        "main": "given",
        "scores": {"given": {}},
        "end_of_text_id": end_of_text,
        "counts": {"train_documents": len(docs)},
    }
    store.write_json(folder / store.MANIFEST, manifest)
    return TokenStore.open(folder)


TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
