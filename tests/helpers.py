"""Helpers of several test modules: a tiny corpus with links, tiny models of several families, settings, inputs.

Fixtures are in conftest.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from phf.core import folders
from phf.core.config import dump_yaml, merge
from phf.core.runs import TrainManifest, read_lines
from phf.core.types import Block
from phf.labelling.rubric import answer_text
from phf.objectives import AWR, MLE, RWR, Conditional, Filtering, Masking, Objective, Unlikelihood
from phf.scorers import Regex
from phf.scorers.labels import Labels
from phf.tokens.parts import TokenCounts
from phf.tokens.store import StoredScores, TokensManifest, TokenStore
from phf.training.config import TrainConfig
from phf.training.lm import FromConfig, FromWeights
from phf.training.train import train

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def phf_inside(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command line in this process, which spares the seconds that imports take."""
    from phf.cli import main

    out = io.StringIO()
    errors = io.StringIO()
    code = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        patch.setattr(sys, "argv", ["phf", *args])
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return subprocess.CompletedProcess(args, code, out.getvalue(), errors.getvalue())


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


def tiny_recipe(folder: Path, texts: int = 60, **settings: Any) -> str:
    """A recipe file that trains and judges tiny models on lines with links, in seconds; results go to `folder`/run.
    `settings`: those that differ."""
    recipe = {
        "out": str(folder / "run"),
        "corpus": {"name": "jsonl", "path": str(write_jsonl(folder / "t.jsonl", tiny_texts(texts)))},
        "segmenter": {"name": "lines"},
        "scorer": {"name": "regex", "pattern": "https?"},
        "tokenizer": {"name": "bpe", "vocab_size": 300},
        "heldout": 0.2,
        "model": {"name": "from_config", "config": TINY_LLAMA},
        "train": {"tokens": 20 * STEP, "context": 32, "batch_rows": 16, "lr": 0.02, "compile": False},
        "objectives": {name: {"name": name} for name in ("mle", "conditional", "filtering")},
        "scenarios": {"unconditional": {"num_samples": 16, "max_tokens": 40}},
    }
    file = folder / "r.yaml"
    file.write_text(dump_yaml(merge(recipe, settings)))
    return str(file)


def whole_block(tokens: TokenStore) -> Block:
    """A store as one block."""
    return tokens.block(0, size=len(tokens.seg_ends))


def pieces_before(objective: Objective, tokens: TokenStore, seed: int = 0) -> np.ndarray:
    """Number of the piece that an objective inserts before each segment of a store; -1: none."""
    block = whole_block(tokens)
    found = objective.edit(block, seed).insertions
    piece_S = np.full(block.num_segments, -1)
    piece_S[found.segment_I] = found.piece_I
    return piece_S


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
    identity = {"name": "given"}
    manifest = TokensManifest(
        key="x",
        identity=identity,
        dtype="uint16",
        content="x",
        main="given",
        scores={"given": StoredScores("x", identity, None, unjudged=0)},
        end_of_text_id=end_of_text,
        counts=TokenCounts(train_documents=len(docs)),
    )
    folders.finish(folder, manifest)
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


GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}


QWEN = {**TINY_LLAMA, "model_type": "qwen2"}


NEOX = {
    "model_type": "gpt_neox",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


UNTIED = {**TINY_LLAMA, "tie_word_embeddings": False}


FAMILIES = {"llama": TINY_LLAMA, "llama untied": UNTIED, "gpt2": GPT2, "qwen2": QWEN, "gpt_neox": NEOX}


TINY_MODEL = FromConfig(TINY_LLAMA)


STEP = 16 * 32
"""Tokens of a step of `train_config`."""


PLAIN = MLE()


def train_config(steps: int = 20, **settings: Any) -> TrainConfig:
    """Training of the tiny model, `steps` of 16 rows of 32 tokens."""
    return TrainConfig(
        **{
            "tokens": steps * STEP,
            "context": 32,
            "batch_rows": 16,
            "lr": 1e-2,
            "precision": "fp32",
            "log_every": 1,
            **settings,
        }
    )


def train_tiny(
    tokens_dir: Path,
    out: Path,
    objective: Objective = PLAIN,
    steps: int = 20,
    model: FromConfig | FromWeights = TINY_MODEL,
    seed: int = 0,
    stop_after: int | None = None,
    callbacks: tuple[Any, ...] = (),
    **settings: Any,
) -> TrainManifest:
    """Train the tiny model for `steps` steps. `settings`: those of `train_config` that differ."""
    return train(
        tokens_dir=tokens_dir,
        out=out,
        model=model,
        objective=objective,
        config=train_config(steps, **settings),
        seed=seed,
        stop_after=stop_after,
        callbacks=callbacks,
    )


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, as they are in the file."""
    return read_lines(run / "metrics.jsonl")


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(run)]


def weights_of(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


DEFAULT_OBJECTIVES = [MLE(), Filtering(), Conditional(), Unlikelihood(), Masking(), RWR(), AWR()]


def made_labels(count: int = 400, seed: int = 0) -> Labels:
    rng = np.random.default_rng(seed)
    bad = rng.random(count) < 0.3
    good_words = ["river", "stone", "tree", "cloud", "bird"]
    bad_words = ["zorp", "glarn", "vex"]
    texts = [
        " ".join(rng.choice(good_words, 6)) + (" " + rng.choice(bad_words) if b else "") + f" {rng.integers(1000)}"
        for b in bad
    ]
    return Labels("made", tuple(texts), bad, {})


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """The Parquet files and the manifest of a folder."""
    return {
        p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix == ".parquet" or p.name == "manifest.json"
    }


CLASSIFIER_WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "you",
    "are",
    "an",
    "awful",
    "bird",
    "who",
    "sings",
    "##s",
    ".",
    ",",
    "!",
]


def tiny_classifier(folder: Path, family: str, labels: list[str]) -> Path:
    """A BERT or RoBERTa of random weights, large enough to give scores that differ."""
    from transformers import (
        AutoModelForSequenceClassification,
        BertConfig,
        BertTokenizerFast,
        RobertaConfig,
        RobertaTokenizerFast,
    )

    folder.mkdir(parents=True, exist_ok=True)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "initializer_range": 0.5,
    }
    if family == "bert":
        (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CLASSIFIER_WORDS]))
        tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"))
        config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=48, **shape)
    else:
        from tokenizers import ByteLevelBPETokenizer

        bpe = ByteLevelBPETokenizer()
        specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        bpe.train_from_iterator([" ".join(CLASSIFIER_WORDS)], vocab_size=300, special_tokens=specials)
        bpe.save_model(str(folder))
        tokenizer = RobertaTokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
        config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=50, pad_token_id=1, **shape)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


NAN = float("nan")


STATS = {"reward_mean": -0.3, "reward_std": 0.25}


OBJECTIVE_GRID = [
    MLE(),
    Filtering(0.5),
    Conditional(0.5),
    Unlikelihood(0.0, alpha=1.0),
    Unlikelihood(0.5, alpha=0.01),
    Unlikelihood(0.0, alpha=0.3, by="score"),
    Unlikelihood(0.0, alpha=0.0),
    Masking(0.0),
    RWR(10.0, rewards="raw"),
    RWR(0.5, log_norm=0.7, **STATS),
    RWR(1e-2, log_norm=120.0, **STATS),
    RWR(1e6, **STATS),
    AWR(0.1, rewards="raw", alpha=0.5),
    AWR(1.0, alpha=0.05, **STATS),
    AWR(1e-3, alpha=1.0, **STATS),
    AWR(1e6, alpha=0.0, **STATS),
    AWR(0.2, alpha=0.5, max_weight=2.0, head="negative_sigmoid", **STATS),
    AWR(0.5, alpha=0.5, fixed_value=0.0, **STATS),
    AWR(0.5, alpha=0.25, fixed_value=-0.3, rewards="raw"),
]


def loss_inputs(n, v, d, dtype=torch.float64, scale=1.0, seed=0, masked=0.2):
    """Arguments of the fused loss for `n` targets, a vocabulary of `v` tokens and width `d`: hidden states, output
    weights, bias, targets, scores, mask and values."""
    g = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(n, d, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(v, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    value = (-torch.rand(n, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
    target = torch.randint(0, v, (n,), generator=g)
    score = torch.tensor([0.0, 0.25, 0.5, 1.0, NAN])[torch.randint(0, 5, (n,), generator=g)]
    mask = torch.rand(n, generator=g) >= masked
    return hidden, weight, bias, target, score, mask, value


def output_of(args, monkeypatch, capsys) -> str:
    """What a command that succeeds prints."""
    from phf.cli import main

    monkeypatch.setattr(sys, "argv", ["phf", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    return capsys.readouterr().out


@contextlib.contextmanager
def rule_judge() -> Iterator[RuleJudge]:
    """A `RuleJudge` that answers inside the block."""
    server = RuleJudge()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()


ENGINE_OBJECTIVES = {
    "mle": {"name": "mle"},
    "conditional": {"name": "conditional"},
    "unlikelihood": {"name": "unlikelihood"},
    "masking": {"name": "masking"},
    "rwr": {"name": "rwr"},
    "weights": {"name": "weights", "points": [[0, 1], [0.01, 0.2]]},
    "sixty-fourth": {"name": "weights", "points": [[0, 1]], "norm": 64},
    "tag": {"name": "tag"},
    "hide": {"name": "hide"},
    "schedule": {
        "name": "schedule",
        "phases": [{"objective": {"name": "mle"}, "until": 0.01}, {"objective": {"name": "unlikelihood"}}],
    },
}
"""What the adapters of other trainers are tested with."""


def found_by(program: Path, world: int, *arguments: Any) -> Any:
    """What a program prints after FOUND, as JSON, on `world` processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    command = [sys.executable, *launch, str(program), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=500
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(lines[-1].removeprefix("FOUND "))


class JsonServer(ThreadingHTTPServer):
    """A server on loopback that answers each POST by `answer_to`: (status, value) of a path and a body."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, value = self.server.answer_to(self.path, body)  # type: ignore[attr-defined]
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def answer_to(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        raise NotImplementedError


class RuleJudge(ThreadingHTTPServer):
    """A judge on a server that answers by a rule: it labels 2 where the text holds a link, else 0. `faults`: what it
    does with a text instead, by what the text holds."""

    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _RuleAnswer)
        self.asked = []
        self.faults = {}
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def fault_of(self, text):
        return next((fault for mark, fault in self.faults.items() if mark in text), None)


class _RuleAnswer(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = asked["messages"][0]["content"] if "messages" in asked else asked["prompt"]
        text = json.loads(re.search(r"on the next line\..*\n(.*)\n", said)[1])
        self.server.asked.append(text)
        fault = self.server.fault_of(text)
        label = answer_text(2 if "http" in text else 0) if fault is None else fault
        status = 200
        value = {"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": label}}]}
        if isinstance(label, int):
            status = label
        elif not isinstance(label, str):
            value = label
        elif "prompt" in asked:
            value["choices"][0]["text"] = label
        data = json.dumps(value | {"usage": {"total_tokens": 7}}).encode() if isinstance(value, dict) else value
        self.send_response(status)
        self.end_headers()
        self.wfile.write(data)
