"""GLUE: finetuning on a task of language understanding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core import store
from phf.core.config import STRICT, ConfigError
from phf.core.statistics import share_estimate
from phf.core.types import Estimate
from phf.data.files import read_rows
from phf.evaluation.capabilities.base import Capability, local_file, prefix_ids, tell_cut
from phf.evaluation.results import CapabilityResult
from phf.generation.loaded import LoadedModel

GLUE: dict[str, tuple[str, tuple[tuple[str, ...], ...]]] = {
    "cola": ("matthews", (("sentence", "label"),)),
    "sst2": ("accuracy", (("sentence", "label"),)),
    "mrpc": ("f1", (("sentence1", "sentence2", "label"), ("#1 String", "#2 String", "Quality"))),
    "qqp": ("f1", (("question1", "question2", "label"), ("question1", "question2", "is_duplicate"))),
    "stsb": ("pearson", (("sentence1", "sentence2", "label"), ("sentence1", "sentence2", "score"))),
    "mnli": ("accuracy", (("premise", "hypothesis", "label"), ("sentence1", "sentence2", "gold_label"))),
    "qnli": ("accuracy", (("question", "sentence", "label"),)),
    "rte": ("accuracy", (("sentence1", "sentence2", "label"),)),
    "wnli": ("accuracy", (("sentence1", "sentence2", "label"),)),
}
"""GLUE's tasks (Wang et al. 2018): the metric, and the columns (texts, label) of the Hub's nyu-mll/glue and of
GLUE's own files."""
COLA = ("source", "label", "mark", "sentence")
"""Columns of CoLA's own files, which have no header."""


class GlueData(NamedTuple):
    """Training and dev set of a task."""

    metric: str
    train: list[str]
    dev: list[str]
    target_N: np.ndarray
    """Labels of `train`: class numbers, or values for regression."""
    truth_M: np.ndarray
    """Labels of `dev`."""
    classes: int
    """1: regression."""
    skipped: int
    """Rows without one of the columns."""


@dataclass(frozen=True, config=STRICT)
class Glue(Capability):
    """Finetuning on a GLUE task as in the paper: at most `epochs` epochs, the best one by the dev set, with early
    stopping after `patience` epochs without a better one. A copy is finetuned; the model itself does not change.

    `train` and `dev`: .tsv, .jsonl or .parquet files, local or hf://datasets/... `task`: one of GLUE's (cola, sst2,
    mrpc, qqp, stsb, mnli, qnli, rte, wnli), which sets columns and metric, or a name of your own. `metric`:
    accuracy, f1 (of the label that sorts last: 1 of 0 and 1), matthews (correlation), or pearson (numeric labels;
    regression).
    """

    train: str
    dev: str
    name: Literal["glue"] = "glue"
    task: str = "task"
    text: str | None = None
    """Column with the text; None: the task's."""
    text2: str | None = None
    """Column with the second text; None: the task's, or none."""
    label: str | None = None
    """Column with the label; None: the task's."""
    metric: Literal["accuracy", "f1", "matthews", "pearson"] | None = None
    epochs: Annotated[int, Field(gt=0)] = 6
    patience: Annotated[int, Field(gt=0)] = 1
    lr: Annotated[float, Field(gt=0)] = 2e-5
    """Learning rate of finetuning."""
    batch: Annotated[int, Field(gt=0)] = 32
    """Texts in a step."""
    max_train: Annotated[int, Field(gt=0)] | None = None
    """Largest number of texts to train on; None: all."""
    seed: int = 0
    """Of the head's first values and of the order."""

    def inputs(self) -> list[str | None]:
        return [store.path_hash(local_file(p)) for p in (self.train, self.dev)]

    def measure(self, model: LoadedModel) -> CapabilityResult:
        devices = [model.lm.device] if model.lm.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # dropout has its own random stream
            torch.manual_seed(self.seed)
            return self._measure(model)

    def check(self, model: LoadedModel) -> None:
        self.read()

    def read(self) -> GlueData:
        """The data of the task. Raises ConfigError if columns or labels do not suit it."""
        usual, layouts = GLUE.get(self.task, ("accuracy", (("text", "label"),)))
        metric = self.metric or usual
        train, train_skipped = self._rows(self.train, layouts)
        dev, dev_skipped = self._rows(self.dev, layouts)
        train = train[: self.max_train]
        truth_of = self._numbers if metric == "pearson" else self._classes
        target_N, truth_M, classes = truth_of([label for _, label in train], [label for _, label in dev])
        return GlueData(
            metric=metric,
            train=[t for t, _ in train],
            dev=[t for t, _ in dev],
            target_N=target_N,
            truth_M=truth_M,
            classes=classes,
            skipped=train_skipped + dev_skipped,
        )

    def _measure(self, model: LoadedModel) -> CapabilityResult:
        data = self.read()
        classifier = _Classifier(model, data.classes, self.seed)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=self.lr, weight_decay=0.01)
        rng = np.random.Generator(np.random.Philox(self.seed))
        best = -math.inf
        best_epoch = 0
        best_guess = np.zeros(len(data.dev))
        history: list[float] = []
        for epoch in range(1, self.epochs + 1):
            self._train_epoch(classifier, optimizer, data, rng.permutation(len(data.train)))
            guess_M = _guesses(classifier, data)
            value = glue_score(data.metric, data.truth_M, guess_M, data.classes - 1)
            history.append(value)
            if value > best:
                best = value
                best_epoch = epoch
                best_guess = guess_M
            elif epoch - best_epoch >= self.patience:
                break
        estimates: dict[str, Estimate] = {}
        if data.metric != "accuracy":
            picks = (rng.integers(0, len(data.truth_M), len(data.truth_M)) for _ in range(500))
            draws = [glue_score(data.metric, data.truth_M[pick], best_guess[pick], data.classes - 1) for pick in picks]
            low, high = np.quantile(draws, [0.025, 0.975])
            ci95 = (float(low), float(high))
            estimates[data.metric] = Estimate(best, float(np.std(draws)), len(data.truth_M), ci95)
        if data.classes > 1:
            estimates["accuracy"] = share_estimate(best_guess == data.truth_M)
        return self.result(
            estimates,
            epoch=best_epoch,
            history=history,
            train=len(data.train),
            dev=len(data.dev),
            skipped=data.skipped,
        )

    def _train_epoch(
        self, classifier: _Classifier, optimizer: torch.optim.Optimizer, data: GlueData, order: np.ndarray
    ) -> None:
        classifier.train()
        for start in range(0, len(order), self.batch):
            part = order[start : start + self.batch]
            out = classifier([data.train[i] for i in part])
            target = torch.tensor(data.target_N[part], device=out.device)
            loss = F.cross_entropy(out, target) if data.classes > 1 else F.mse_loss(out[:, 0], target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def _classes(self, train: Sequence[str], dev: Sequence[str]) -> tuple[np.ndarray, np.ndarray, int]:
        labels = sorted(set(train))
        unknown = set(dev) - set(labels)
        if unknown:
            raise ConfigError(f"glue {self.task}: labels of the dev set do not occur in training: {sorted(unknown)}")
        if len(labels) < 2:
            raise ConfigError(f"glue {self.task}: every row of {self.train} has the label {labels[0]!r}")
        target_N, truth_M = (np.array([labels.index(label) for label in part]) for part in (train, dev))
        return target_N, truth_M, len(labels)

    def _numbers(self, train: Sequence[str], dev: Sequence[str]) -> tuple[np.ndarray, np.ndarray, int]:
        try:
            return np.array(train, np.float32), np.array(dev, np.float32), 1
        except ValueError as error:
            raise ConfigError(f"glue {self.task}: metric=pearson needs numeric labels: {error}") from None

    def _rows(self, path: str, layouts: Sequence[tuple[str, ...]]) -> tuple[list[tuple[str, str]], int]:
        """(text, label) of each row, and how many rows lack a column, as some of QQP's do. The columns are those of
        the first of `layouts` that the file has, except those given in the settings."""
        rows = read_rows(local_file(path))
        names = list(rows[0]) if rows else []
        if self.task == "cola" and len(names) == len(COLA) and "sentence" not in names:
            rows = [
                dict(zip(COLA, row.values(), strict=False)) for row in [dict(zip(names, names, strict=True)), *rows]
            ]
            names = list(COLA)
        *texts, label = next((layout for layout in layouts if set(layout) <= set(names)), layouts[0])
        columns = [
            column for column in (self.text or texts[0], self.text2 or (texts[1] if len(texts) > 1 else None)) if column
        ]
        needed = [*columns, self.label or label]
        for column in needed:
            if column not in names:
                raise ConfigError(f"{path} has no column {column!r}, only {', '.join(names)}")
        whole = [row for row in rows if all(row.get(column) not in (None, "") for column in needed)]
        if not whole:
            raise ConfigError(f"{path}: no row has all of {', '.join(needed)}")
        pairs = [("\n".join(str(row[c]) for c in columns), str(row[needed[-1]])) for row in whole]
        return pairs, len(rows) - len(whole)


def glue_score(metric: str, truth_N: np.ndarray, guess_N: np.ndarray, positive: int = 1) -> float:
    """Accuracy, F1 of the class `positive`, or a correlation (0 if all guesses are equal). Higher is better."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if metric == "pearson":
        constant = truth_N.std() == 0 or guess_N.std() == 0
        return 0.0 if constant else float(np.corrcoef(truth_N, guess_N)[0, 1])
    if metric == "f1":
        return float(f1_score(truth_N, guess_N, labels=[positive], average="macro", zero_division=0))
    return float({"accuracy": accuracy_score, "matthews": matthews_corrcoef}[metric](truth_N, guess_N))


def _guesses(classifier: _Classifier, data: GlueData) -> np.ndarray:
    """Guessed classes or values for the dev set."""
    classifier.eval()
    with torch.inference_mode():
        outs = [classifier(data.dev[s : s + 64]).cpu() for s in range(0, len(data.dev), 64)]
    out_M = torch.cat(outs).numpy()
    guess_M: np.ndarray = out_M.argmax(-1) if data.classes > 1 else out_M[:, 0]
    return guess_M


class _Classifier(torch.nn.Module):
    """A copy of an LM with a linear classifier on the last token's hidden state."""

    def __init__(self, model: LoadedModel, classes: int, seed: int) -> None:
        import copy

        super().__init__()
        self.encode = model.encode
        self.body = copy.deepcopy(model.lm.base_model)
        self.start = prefix_ids(model)
        self.limit = min(model.positions, 256)
        width = model.lm.get_output_embeddings().weight.shape[1]
        generator = torch.Generator().manual_seed(seed)
        self.head = torch.nn.Linear(width, classes)
        with torch.no_grad():
            self.head.weight.normal_(0, 0.02, generator=generator)
            self.head.bias.zero_()
        self.head.to(model.lm.device)

    def forward(self, texts: Sequence[str]) -> torch.Tensor:
        room = self.limit - len(self.start)
        encoded = [self.encode(text) for text in texts]
        tell_cut(sum(len(ids) > room for ids in encoded), len(encoded), f"texts were cut after {room} tokens")
        rows = [self.start + ids[:room] for ids in encoded]
        width = max(map(len, rows))
        device = self.head.weight.device
        ids = torch.tensor([r + [self.start[0]] * (width - len(r)) for r in rows], device=device)
        hidden = self.body(input_ids=ids, use_cache=False).last_hidden_state
        last = torch.tensor([len(r) - 1 for r in rows], device=device)
        found: torch.Tensor = self.head(hidden[torch.arange(len(rows), device=device), last])
        return found
