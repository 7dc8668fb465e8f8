"""Fixtures that several test modules use: a tiny scored corpus, its token store, trained runs."""

from __future__ import annotations

import os
from pathlib import Path

# before torch is imported anywhere: tests are many small steps, and two processes of them share two cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # servers of tests are here
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

from helpers import LINK, TINY_LLAMA, tiny_texts, write_jsonl
from phf.data.readers import Jsonl
from phf.data.segment import Lines
from phf.objectives import MLE, Conditional
from phf.scoring.score import score_corpus
from phf.tokens.store import TokenStore, tokenize_corpus
from phf.tokens.tokenizer import TrainBPE
from phf.training.lm import FromConfig
from phf.training.train import TrainConfig, train

hypothesis.settings.register_profile("phf", deadline=None)  # Hypothesis' deadline would fail on a busy machine
hypothesis.settings.load_profile("phf")


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


@pytest.fixture(scope="session")
def runs(tokens_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three trained runs: plain `a` and `b`, of two seeds, and `conditional`."""
    folder = tmp_path_factory.mktemp("runs")
    settings = TrainConfig(tokens=200 * 512, context=32, batch_rows=16, lr=1e-2, precision="fp32")
    for name, objective, seed in (("a", MLE(), 0), ("b", MLE(), 1), ("conditional", Conditional(), 0)):
        train(
            tokens_dir=tokens_dir,
            out=folder / name,
            model=FromConfig(TINY_LLAMA),
            objective=objective,
            config=settings,
            seed=seed,
        )
    return folder
