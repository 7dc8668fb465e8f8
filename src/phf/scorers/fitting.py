"""Fit a scorer to labelled texts and measure how good it is.

    phf fit-scorer labels.csv my-scorer/ --text comment --label toxic --test other.csv

A fifth of the texts, chosen by a hash of the text, is held out from the fit. Area under the ROC curve, precision and
recall at thresholds, and calibration are measured on the held-out texts and on every file given with `--test`. Weights
are stored as safetensors, the rest as JSON; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from phf.core import folders, store
from phf.core.config import ConfigError
from phf.core.locks import LOCK, locked
from phf.core.runs import not_found
from phf.core.statistics import auc
from phf.core.text import by_reason
from phf.core.types import Rejected
from phf.data.corpus import admit
from phf.data.files import read_rows
from phf.scorers.fitted import (
    BUCKET_BITS,
    SCORER_RECORD,
    WEIGHTS,
    AtThreshold,
    HashedNgrams,
    ScorerMetrics,
    ScorerRecord,
    TransformerScorer,
    feature_matrix,
)

TRUE = {"1", "1.0", "true", "yes", "y", "t", "bad", "toxic", "positive"}
FALSE = {"0", "0.0", "false", "no", "n", "f", "good", "nontoxic", "negative"}
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
"""Thresholds at which precision and recall are reported."""
FOLDS = 5
"""Parts of the texts for choosing the regularization and for calibration; also the fewest texts of a class."""


@dataclass(frozen=True)
class Labels:
    """Labelled texts. `bad_N` is True where the text is bad; `rejected` counts skipped rows by reason."""

    source: str
    texts: tuple[str, ...]
    bad_N: np.ndarray
    rejected: dict[str, int]


def read_labels(path: str | Path, text: str = "text", label: str = "label", bad: Sequence[str] | None = None) -> Labels:
    """Labelled texts from a file of rows of any form (JSON lines, JSON, CSV, TSV, Parquet; compressed or not).

    `bad`: the values of the label that mean bad. Without `bad`, labels must be true or false, 1 or 0, or the like. Rows
    without a usable text or label are skipped and counted. Raises ConfigError if a column is missing, a label
    cannot be read, or where all texts are of one class.
    """
    path = Path(path).expanduser()
    rows = read_rows(path, columns=(text, label))
    wanted = None if bad is None else {value.strip() for value in bad} - {""}
    seen: set[str] = set()
    texts = []
    labels = []
    rejected: Counter[str] = Counter()
    for number, row in enumerate(rows):
        item = admit(str(number), row.get(text), {}, 10_000_000)
        value = str(row.get(label)).strip()
        if isinstance(item, Rejected):
            rejected[item.reason] += 1
        elif row.get(label) is None or not value or value.lower() == "nan":
            rejected["no label"] += 1
        elif wanted is not None:
            seen.add(value)
            texts.append(item.text)
            labels.append(value in wanted)
        elif value.lower() in TRUE | FALSE:
            texts.append(item.text)
            labels.append(value.lower() in TRUE)
        else:
            raise ConfigError(
                f"{path}: label {value[:40]!r} is neither true nor false; name the values that mean bad with --bad"
            )
    if wanted is not None and wanted - seen:
        raise ConfigError(
            f"{path}: no label is {sorted(wanted - seen)[0]!r} (--bad); the labels are {sorted(seen)[:10]}"
        )
    bad_N = np.array(labels, bool)
    if not len(bad_N):
        skipped = f" (skipped: {by_reason(rejected)})" if rejected else ""
        raise ConfigError(f"{path} holds no labelled text{skipped}")
    if not bad_N.any() or bad_N.all():
        raise ConfigError(
            f"{path}: all {len(bad_N)} usable texts are {'bad' if bad_N.any() else 'good'}; both classes are needed"
        )
    return Labels(path.name, tuple(texts), bad_N, dict(rejected))


def _hash_unit(text: str, person: bytes) -> float:
    return store.text_hash(text, person) / 2**64


def fit_scorer(
    labels: Labels,
    out: str | Path,
    tests: Sequence[Labels] = (),
    kind: Literal["ngrams", "transformer"] = "ngrams",
    base_model: str | None = None,
    heldout: float = 0.2,
    seed: int = 0,
) -> ScorerRecord:
    """Fit, calibrate and measure a scorer, write it into folder `out`, and return its record.

    Equal texts are all fitted to or all held out. Raises ConfigError if one class has too few texts.
    """
    out = Path(out)
    key = store.fingerprint(
        [kind, base_model, heldout, seed, "fit/2"]
        + [[part.source, _labels_hash(part), part.rejected] for part in (labels, *tests)]
        + [store.path_hash(base_model) if base_model else None]
    )
    if (done := folders.kept(out / SCORER_RECORD, key, ScorerRecord)) is not None:
        folders.tidy(out)
        return done
    if out.exists() and not (out / SCORER_RECORD).exists() and any(out.iterdir()):
        raise store.StoreError(f"{out} is not empty and holds no scorer; give another folder")
    held_out(labels, heldout)  # enough texts of each class, or an error before anything starts
    real = out.resolve()
    aside = real.with_name(f".{real.name}.partial")
    aside.mkdir(parents=True, exist_ok=True)
    with locked(aside, "fit-scorer"):
        for leftover in aside.iterdir():  # of a killed fit
            if leftover.name != LOCK:
                folders.remove_tree(leftover) if leftover.is_dir() else leftover.unlink()
        record = _fit(labels, aside, key, tests, kind=kind, base_model=base_model, heldout=heldout, seed=seed)
        folders.sync_files(aside, folders.files_below(aside))
        if out.exists() and any(out.iterdir()):
            print(f"note: {out} held another scorer, which is now {folders.move_aside(out)}", file=sys.stderr)
        folders.put_in_place(aside, out)
    return record


def _fit(
    labels: Labels,
    aside: Path,
    key: str,
    tests: Sequence[Labels],
    kind: Literal["ngrams", "transformer"],
    base_model: str | None,
    heldout: float,
    seed: int,
) -> ScorerRecord:
    """Fit a scorer, measure it, and write it into folder `aside`."""
    held_N = held_out(labels, heldout)
    fold_N = np.array([int(_hash_unit(t, b"phf fit folds") * FOLDS) for t in labels.texts])
    train = np.flatnonzero(~held_N)
    _say(f"fitting to {len(train):,} texts")
    scorer: HashedNgrams | TransformerScorer
    if kind == "ngrams":
        scorer, strength = _fit_ngrams(labels, train, fold_N, seed)
        _save_ngrams(scorer, aside)
    else:
        scorer = _fit_transformer(labels, train, fold_N=fold_N, folder=aside, base_model=base_model, seed=seed)
        strength = None
    ngrams = scorer if isinstance(scorer, HashedNgrams) else None
    record = ScorerRecord(
        key=key,
        kind=kind,
        slope=scorer.slope,
        offset=scorer.offset,
        intercept=None if ngrams is None else ngrams.intercept,
        C=strength,
        bucket_bits=None if ngrams is None else BUCKET_BITS,
        weights=None if ngrams is None else store.bytes_hash(ngrams.weights.tobytes()),
        base_model=base_model if kind == "transformer" else None,
        source=labels.source,
        texts=len(labels.texts),
        bad=int(labels.bad_N.sum()),
        rejected=labels.rejected,
        metrics=_measure_all(scorer, labels, held_N, tests),
        versions=folders.versions(),
    )
    store.write_json(aside / SCORER_RECORD, record)
    return record


def _measure_all(
    scorer: HashedNgrams | TransformerScorer, labels: Labels, held_N: np.ndarray, tests: Sequence[Labels]
) -> dict[str, ScorerMetrics]:
    """How well a scorer finds the bad texts: of the held-out labels and of each test set, by name."""
    _say("measuring")
    unseen = [labels.texts[i] for i in np.flatnonzero(held_N)]
    metrics = {"held out": measure(scorer.probabilities(unseen), labels.bad_N[held_N])}
    for test in tests:
        name = test.source if test.source not in metrics else f"{test.source} ({len(metrics)})"
        metrics[name] = measure(scorer.probabilities(test.texts), test.bad_N)
    return metrics


def held_out(labels: Labels, share: float) -> np.ndarray:
    """Which texts are held out [N]. Raises ConfigError if a class has too few texts on one of the two sides."""
    held_N = np.array([_hash_unit(t, b"phf fit heldout") < share for t in labels.texts])
    for part, name in ((labels.bad_N[~held_N], "for the fit"), (labels.bad_N[held_N], "held out")):
        if min(part.sum(), (~part).sum()) < FOLDS:
            raise ConfigError(
                f"{labels.source}: {part.sum()} bad and {(~part).sum()} good texts {name}; at least {FOLDS} of each "
                f"are needed" + (f" (skipped: {by_reason(labels.rejected)})" if labels.rejected else "")
            )
    return held_N


def _say(text: str) -> None:
    print(f"    {text}", file=sys.stderr, flush=True)


def _labels_hash(labels: Labels) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for text, bad in zip(labels.texts, labels.bad_N, strict=True):
        digest.update(f"{int(bad)}{len(text)}:".encode() + text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def platt(logits: np.ndarray, bad: np.ndarray) -> tuple[float, float]:
    """Slope and offset of the calibrated logit (Platt 1999, with smoothed targets)."""
    from scipy.optimize import minimize

    bad_count = bad.sum()
    good_count = (~bad).sum()
    target = np.where(bad, (bad_count + 1) / (bad_count + 2), 1 / (good_count + 2))

    def loss(ab: np.ndarray) -> tuple[float, np.ndarray]:
        z = ab[0] * logits + ab[1]
        error = 1 / (1 + np.exp(-z)) - target
        value = np.logaddexp(0, z) - target * z
        return float(value.mean()), np.array([(error * logits).mean(), error.mean()])

    found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B").x
    return float(found[0]), float(found[1])


def _fit_ngrams(labels: Labels, train: np.ndarray, fold_N: np.ndarray, seed: int) -> tuple[HashedNgrams, float]:
    """A calibrated scorer, and the strength of regularization (scikit-learn's C) that was chosen."""
    from sklearn.linear_model import LogisticRegression

    X = feature_matrix([labels.texts[i] for i in train])
    y = labels.bad_N[train]
    fold = fold_N[train]

    def fitted(rows: np.ndarray, strength: float) -> Any:
        return LogisticRegression(C=strength, solver="liblinear", random_state=seed, max_iter=200).fit(X[rows], y[rows])

    _say("choosing the strength of regularization, then calibrating on texts that each fit has not seen")
    # the strength with the best likelihood on one fold, then calibration on predictions of fits without the text's fold
    first = fold == 0
    losses = {}
    for strength in (3.0, 10.0, 30.0):
        p = fitted(~first, strength).predict_proba(X[first])[:, 1].clip(1e-6, 1 - 1e-6)
        losses[strength] = -float(np.where(y[first], np.log(p), np.log(1 - p)).mean())
    strength = min(losses, key=losses.__getitem__)
    unseen = np.zeros(len(y))
    for number in range(FOLDS):
        part = fold == number
        if part.any():
            unseen[part] = fitted(~part, strength).decision_function(X[part])
    slope, offset = platt(unseen, y)
    model = fitted(np.ones(len(y), bool), strength)
    return HashedNgrams(model.coef_[0].astype(np.float32), float(model.intercept_[0]), slope, offset), strength


def _save_ngrams(scorer: HashedNgrams, folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"weights": scorer.weights}, folder / WEIGHTS)


def _fit_transformer(
    labels: Labels, train: np.ndarray, fold_N: np.ndarray, folder: Path, base_model: str | None, seed: int
) -> TransformerScorer:
    """Finetune a classifier on all folds but the first and calibrate it on the first. Saves it into `folder`."""
    if base_model is None:
        raise ConfigError("--model: name the model to finetune, for example distilbert/distilroberta-base, or a folder")
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    set_seed(seed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base_model, trust_remote_code=False)
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # of the file's format: the library raises plain Exception
        raise ConfigError(not_found(f"tokenizer {base_model}", error)) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            base_model,
            num_labels=2,
            id2label={0: "good", 1: "bad"},
            label2id={"good": 0, "bad": 1},
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # every format of weights has exceptions of its own
        raise ConfigError(not_found(f"model {base_model}", error)) from None
    model.config.pad_token_id = tokenizer.pad_token_id
    limit = min(tokenizer.model_max_length, 256)
    chosen = train[fold_N[train] != 0]
    rows = [
        {**tokenizer(labels.texts[i], truncation=True, max_length=limit), "labels": int(labels.bad_N[i])}
        for i in chosen
    ]
    if cut := sum(len(row["input_ids"]) == limit for row in rows):
        _say(f"{cut:,} of {len(rows):,} texts are cut after {limit} tokens for the fit")
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=2,
        per_device_train_batch_size=16,
        learning_rate=3e-5,
        warmup_steps=0.06,
        weight_decay=0.01,
        save_strategy="no",
        report_to=[],
        seed=seed,
        logging_steps=50,
        disable_tqdm=not sys.stderr.isatty(),
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="group_by_length",
    )
    Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
    ).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    scorer = TransformerScorer(folder)
    first = train[fold_N[train] == 0]
    scorer.slope, scorer.offset = platt(scorer.logits([labels.texts[i] for i in first]), labels.bad_N[first])
    return scorer


def measure(p_N: np.ndarray, bad_N: np.ndarray) -> ScorerMetrics:
    """How good the probabilities `p_N` are on texts with the labels `bad_N`."""
    from sklearn.metrics import average_precision_score

    area = auc(p_N, bad_N)
    bins = np.minimum((p_N * 10).astype(int), 9)
    error = sum(
        abs(p_N[bins == b].mean() - bad_N[bins == b].mean()) * (bins == b).mean()
        for b in range(10)
        if (bins == b).any()
    )
    at = {}
    for threshold in THRESHOLDS:
        chosen = p_N > threshold
        hits = int((chosen & bad_N).sum())
        at[str(threshold)] = AtThreshold(
            precision=hits / int(chosen.sum()) if chosen.any() else None,
            recall=hits / int(bad_N.sum()),
            share=float(chosen.mean()),
        )
    return ScorerMetrics(
        n=len(p_N),
        bad=int(bad_N.sum()),
        auc=area.auc,
        auc_ci95=area.ci95,
        average_precision=float(average_precision_score(bad_N, p_N)),
        brier=float(((p_N - bad_N) ** 2).mean()),
        calibration_error=float(error),
        at=at,
    )
