"""Fit a scorer to labelled texts and measure how good it is.

    phf fit-scorer labels.csv my-scorer/ --text comment --label toxic --test other.csv

A fifth of the texts, chosen by a hash of the text, is held out from the fit. Area under the ROC curve, precision and
recall at thresholds, and calibration are measured on the held-out texts and on every file given with `--test`. Weights
are stored as safetensors, the rest as JSON; nothing is pickled.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from phf.core import folders, store
from phf.core.config import ConfigError, Plain
from phf.core.locks import LOCK, locked
from phf.core.statistics import auc, auc_gain, bootstrap, weighted_share
from phf.core.text import by_reason
from phf.scorers.fitted import (
    BUCKET_BITS,
    HELD_OUT,
    SCORER_RECORD,
    SEEN,
    WEIGHTS,
    AtThreshold,
    CurvePoint,
    HashedNgrams,
    LearningCurve,
    ScorerMetrics,
    ScorerRecord,
    TransformerScorer,
    feature_matrix,
    seen_hash,
)
from phf.scorers.labels import JUDGE, WEIGHT, Labels, one_each

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
"""Thresholds at which precision and recall are reported."""
CURVE = (8, 4, 2)
"""Parts of the labels that the learning curve fits to, as divisors."""
TRANSFORMER_CURVE = (4, 2)
"""The same for transformers, whose fits take minutes to hours: three quarters more time."""
FOLDS = 5
"""Parts of the texts for choosing the regularization and for calibration; also the fewest texts of a class."""


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
    curve: bool = True,
) -> ScorerRecord:
    """Fit, calibrate and measure a scorer, write it into folder `out`, and return its record.

    Equal texts are all fitted to or all held out. `curve`: fit to parts of the labels too, to say whether more would
    help. Raises ConfigError if one class has too few texts.
    """
    if (base_model is None) == (kind == "transformer"):
        raise ConfigError(
            "--model: name the model to finetune, for example distilbert/distilroberta-base, or a folder"
            if base_model is None
            else "--model is for --kind transformer"
        )
    out = Path(out)
    key = store.fingerprint(
        [kind, base_model, heldout, seed, "fit/2" if kind == "ngrams" and curve else ["fit/3", curve]]
        + [[part.source, part.mark, part.rejected] for part in (labels, *tests)]
        + [store.path_hash(base_model) if base_model else None]
    )
    if (done := folders.kept(out / SCORER_RECORD, key, ScorerRecord)) is not None:
        folders.tidy(out)
        return done
    if out.exists() and not (out / SCORER_RECORD).exists() and any(out.iterdir()):
        raise store.StoreError(f"{out} is not empty and holds no scorer; give another folder")
    held_out(one_each(labels), heldout)  # enough texts of each class, or an error before anything starts
    real = out.resolve()
    aside = real.with_name(f".{real.name}.partial")
    aside.mkdir(parents=True, exist_ok=True)
    with locked(aside, "fit-scorer"):
        for leftover in aside.iterdir():  # of a killed fit
            if leftover.name != LOCK:
                folders.remove_tree(leftover) if leftover.is_dir() else leftover.unlink()
        record = _fit(
            labels, aside, key, tests, kind=kind, base_model=base_model, heldout=heldout, seed=seed, with_curve=curve
        )
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
    with_curve: bool,
) -> ScorerRecord:
    """Fit a scorer, measure it, and write it into folder `aside`."""
    source = labels
    labels = one_each(labels)
    held_N = held_out(labels, heldout)
    fold_N = np.array([int(_hash_unit(t, b"phf fit folds") * FOLDS) for t in labels.texts])
    train = np.flatnonzero(~held_N)
    _say(f"fitting to {len(train):,} texts")
    scorer: HashedNgrams | TransformerScorer
    if kind == "ngrams":
        scorer, chosen, curve = _fit_ngrams(labels, train, fold_N, held_N, seed, with_curve)
        by_order = chosen.ordinal
        _save_ngrams(scorer, aside)
    else:
        scorer, curve = _fit_transformer(
            labels,
            train,
            fold_N=fold_N,
            held_N=held_N,
            folder=aside,
            base_model=base_model,
            seed=seed,
            with_curve=with_curve,
        )
        chosen = None
        by_order = labels.ordered
    ngrams = scorer if isinstance(scorer, HashedNgrams) else None
    seen = np.array(sorted({seen_hash(labels.texts[i]) for i in train}), "<u8").tobytes()
    record = ScorerRecord(
        key=key,
        kind=kind,
        slope=scorer.slope,
        offset=scorer.offset,
        intercept=None if ngrams is None else ngrams.intercept,
        C=None if chosen is None else chosen.strength,
        bucket_bits=None if ngrams is None else BUCKET_BITS,
        weights=None if ngrams is None else store.bytes_hash(ngrams.weights.tobytes()),
        seen=store.bytes_hash(seen),
        base_model=base_model if kind == "transformer" else None,
        source=labels.source,
        labels=source.mark,
        texts=len(labels.texts),
        bad=int(labels.bad_N.sum()),
        rejected=labels.rejected,
        bad_from=labels.bad_from,
        ordinal=by_order,
        curve=curve,
        metrics=_measure_all(scorer, labels, held_N, tests),
        versions=folders.versions(),
    )
    rows: list[Plain] = [{"text": labels.texts[i], "label": int(labels.bad_N[i])} for i in np.flatnonzero(held_N)]
    if labels.level_N is not None:
        for row, level in zip(rows, labels.level_N[held_N], strict=True):
            row["level"] = int(level)
    if labels.judges:
        for row in rows:
            row[JUDGE] = ", ".join(labels.judges)
    if source.weight_N is not None and labels.weight_N is not None:
        for row, weight in zip(rows, labels.weight_N[held_N], strict=True):
            row[WEIGHT] = float(weight)
    store.write_text(aside / HELD_OUT, "".join(json.dumps(row) + "\n" for row in rows))
    (aside / SEEN).write_bytes(seen)
    store.write_json(aside / SCORER_RECORD, record)
    return record


def _measure_all(
    scorer: HashedNgrams | TransformerScorer, labels: Labels, held_N: np.ndarray, tests: Sequence[Labels]
) -> dict[str, ScorerMetrics]:
    """How well a scorer finds the bad texts: of the held-out labels and of each test set, by name."""
    _say("measuring")
    unseen = [labels.texts[i] for i in np.flatnonzero(held_N)]
    weights = _weights(labels, np.flatnonzero(held_N))
    metrics = {"held out": measure(scorer.probabilities(unseen), labels.bad_N[held_N], weights)}
    for test in map(one_each, tests):
        name = test.source if test.source not in metrics else f"{test.source} ({len(metrics)})"
        metrics[name] = measure(scorer.probabilities(test.texts), test.bad_N, test.weight_N)
    return metrics


def _weights(labels: Labels, places: np.ndarray) -> np.ndarray | None:
    return None if labels.weight_N is None else labels.weight_N[places]


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


def platt(logits: np.ndarray, bad: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float]:
    """Slope and offset of the calibrated logit (Platt 1999, with smoothed targets). `weights`: of the texts, for labels
    that were not drawn uniformly."""
    from scipy.optimize import minimize

    share = np.full(len(bad), 1 / len(bad)) if weights is None else weights / weights.sum()
    bad_count = bad.sum()
    good_count = (~bad).sum()
    target = np.where(bad, (bad_count + 1) / (bad_count + 2), 1 / (good_count + 2))

    def loss(ab: np.ndarray) -> tuple[float, np.ndarray]:
        z = ab[0] * logits + ab[1]
        error = 1 / (1 + np.exp(-z)) - target
        value = np.logaddexp(0, z) - target * z
        return float(share @ value), np.array([share @ (error * logits), share @ error])

    # a slope below 0 would turn the scorer around
    bounds = [(0.0, None), (None, None)]
    found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=bounds).x
    return float(found[0]), float(found[1])


@dataclass(frozen=True)
class _Choice:
    """How to fit: the strength of regularization (scikit-learn's C), and whether by the order of the labels."""

    strength: float
    ordinal: bool


def _fit_ngrams(
    labels: Labels, train: np.ndarray, fold_N: np.ndarray, held_N: np.ndarray, seed: int, with_curve: bool
) -> tuple[HashedNgrams, _Choice, LearningCurve | None]:
    """A calibrated scorer, how it was fitted, and what fewer labels give."""
    X = feature_matrix([labels.texts[i] for i in train])
    y = labels.bad_N[train]
    level = None if labels.level_N is None else labels.level_N[train]
    bad_from = labels.bad_from or 1
    fold = fold_N[train]

    def fitted(rows: np.ndarray, how: _Choice) -> tuple[np.ndarray, float]:
        """Weights and intercept of the logit of being bad."""
        if how.ordinal and level is not None:
            return fit_ordinal(X[rows], level[rows], bad_from, how.strength, seed)
        return _fit_logistic(X[rows], y[rows], how.strength, seed)

    _say("choosing the strength of regularization, then calibrating on texts that each fit has not seen")
    # the choice with the best likelihood on one fold, then calibration on predictions of fits without the text's fold
    first = fold == 0
    losses = {}
    for ordinal in (False, True) if labels.ordered else (False,):
        for strength in (3.0, 10.0, 30.0):
            how = _Choice(strength, ordinal)
            weights, intercept = fitted(~first, how)
            logits = X[first] @ weights + intercept
            losses[how] = float(np.logaddexp(0, np.where(y[first], -logits, logits)).mean())
    chosen = min(losses, key=losses.__getitem__)
    unseen = np.zeros(len(y))
    for number in range(FOLDS):
        part = fold == number
        if part.any():
            weights, intercept = fitted(~part, chosen)
            unseen[part] = X[part] @ weights + intercept
    slope, offset = platt(unseen, y, _weights(labels, train))
    weights, intercept = fitted(np.ones(len(y), bool), chosen)
    scorer = HashedNgrams(weights.astype(np.float32), intercept, slope, offset)
    if not with_curve:
        return scorer, chosen, None
    _say("measuring whether more labels would help")
    held = np.flatnonzero(held_N)
    unseen_X = feature_matrix([labels.texts[i] for i in held])
    fits = []
    for rows in (*_growing(labels, train, CURVE), train):
        found, offset_of = (weights, intercept) if rows is train else fitted(np.searchsorted(train, rows), chosen)
        fits.append((len(rows), unseen_X @ found + offset_of))
    return scorer, chosen, _curve(fits, labels, held)


def _growing(labels: Labels, train: np.ndarray, divisors: Sequence[int]) -> list[np.ndarray]:
    """Parts of the texts `train`, each within the next, that have enough of each class."""
    order = np.argsort([_hash_unit(labels.texts[i], b"phf fit curve") for i in train], kind="stable")
    parts = [train[np.sort(order[: len(order) // divisor])] for divisor in divisors]
    return [rows for rows in parts if min(labels.bad_N[rows].sum(), (~labels.bad_N[rows]).sum()) >= FOLDS]


def _fit_logistic(X: Any, y: np.ndarray, strength: float, seed: int) -> tuple[np.ndarray, float]:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, solver="liblinear", random_state=seed, max_iter=200).fit(X, y)
    return model.coef_[0], float(model.intercept_[0])


CUT_SCALE = 10.0
"""Value of the columns that say which cut a row is about: so large that regularization hardly holds cuts back."""


def fit_ordinal(X: Any, level_N: np.ndarray, bad_from: int, strength: float, seed: int) -> tuple[np.ndarray, float]:
    """Weights and intercept of the logit that a text's label is at least `bad_from`, fitted to all labels.

    The model is that of proportional odds (McCullagh 1980): logit P(label >= k) = w.x + c_k, one w for all labels.
    It is fitted as one logistic regression in which each text has a row per k, with a column of its own for each c_k
    (the reduction of Li and Lin, NeurIPS 2006).
    """
    import scipy.sparse

    cuts = [int(level) for level in np.unique(level_N)[1:]]
    if bad_from not in cuts:
        return _fit_logistic(X, level_N >= bad_from, strength, seed)
    blocks = []
    for place in range(len(cuts)):
        marks = np.zeros((X.shape[0], len(cuts)), np.float32)
        marks[:, place] = CUT_SCALE
        blocks.append(scipy.sparse.hstack([X, scipy.sparse.csr_matrix(marks)], format="csr"))
    rows = scipy.sparse.vstack(blocks, format="csr")
    y = np.concatenate([level_N >= cut for cut in cuts])
    weights, intercept = _fit_logistic(rows, y, strength / len(cuts), seed)
    own = X.shape[1]
    return weights[:own], intercept + CUT_SCALE * float(weights[own + cuts.index(bad_from)])


def _curve(fits: Sequence[tuple[int, np.ndarray]], labels: Labels, held: np.ndarray) -> LearningCurve | None:
    """The learning curve of fits to more and more texts, from their logits of the `held` ones; None of a single fit."""
    if len(fits) < 2:
        return None
    bad_N = labels.bad_N[held]
    share_N = _weights(labels, held)
    areas = [auc(logits, bad_N, weight_N=share_N) for _, logits in fits]
    points = [CurvePoint(count, area.auc, area.ci95) for (count, _), area in zip(fits, areas, strict=True)]
    return LearningCurve(points, auc_gain(fits[-1][1], fits[-2][1], bad_N, weight_N=share_N))


def _save_ngrams(scorer: HashedNgrams, folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"weights": scorer.weights}, folder / WEIGHTS)


def _fit_transformer(
    labels: Labels,
    train: np.ndarray,
    fold_N: np.ndarray,
    held_N: np.ndarray,
    folder: Path,
    base_model: str | None,
    seed: int,
    with_curve: bool,
) -> tuple[TransformerScorer, LearningCurve | None]:
    """A classifier that is finetuned on all folds but the first and calibrated on the first, saved into `folder`, and
    what fewer labels give."""
    from phf.scorers.finetuning import finetune

    assert base_model is not None, "fit_scorer has checked it"
    first = train[fold_N[train] == 0]
    rest = train[fold_N[train] != 0]
    held = np.flatnonzero(held_N)
    unseen = [labels.texts[i] for i in held]
    smaller = []
    if with_curve:
        for rows in _growing(labels, rest, TRANSFORMER_CURVE):
            _say(f"learning curve: {len(rows):,} texts")
            part = folder / "part"
            smaller.append((len(rows), finetune(labels, rows, part, base_model, seed).logits(unseen)))
            shutil.rmtree(part)
    _say(f"the scorer: {len(rest):,} texts, and {len(first):,} to calibrate it")
    scorer = finetune(labels, rest, folder, base_model, seed)
    scorer.slope, scorer.offset = platt(
        scorer.logits([labels.texts[i] for i in first]), labels.bad_N[first], _weights(labels, first)
    )
    fits = [*smaller, (len(rest), scorer.logits(unseen))] if smaller else []
    return scorer, _curve(fits, labels, held)


def measure(p_N: np.ndarray, bad_N: np.ndarray, weight_N: np.ndarray | None = None) -> ScorerMetrics:
    """How good the probabilities `p_N` are on texts with the labels `bad_N`. `weight_N`: how many segments of the
    corpus each stands for; intervals of shares are then Wilson's for as many texts as these are worth (Kish 1965)."""
    from sklearn.metrics import average_precision_score

    area = auc(p_N, bad_N, weight_N=weight_N)
    w_N = np.ones(len(p_N)) if weight_N is None else weight_N
    off_N = p_N - bad_N
    bin_N = np.minimum((p_N * 10).astype(int), 9)

    def average_precision(pick: np.ndarray) -> float:
        if not bad_N[pick].any():
            return math.nan
        return float(average_precision_score(bad_N[pick], p_N[pick], sample_weight=w_N[pick]))

    def brier(pick: np.ndarray) -> float:
        return float((w_N * off_N**2)[pick].sum() / w_N[pick].sum())

    def calibration_error(pick: np.ndarray) -> float:
        of_bins = np.bincount(bin_N[pick], (w_N * off_N)[pick], minlength=10)
        return float(np.abs(of_bins).sum() / w_N[pick].sum())

    everything = np.arange(len(p_N))
    units = np.split(everything, len(p_N))
    at = {}
    for threshold in THRESHOLDS:
        chosen = p_N > threshold
        precision, _ = weighted_share(bad_N[chosen], w_N[chosen])
        recall, _ = weighted_share(chosen[bad_N], w_N[bad_N])
        at[str(threshold)] = AtThreshold(
            precision=precision.mean if chosen.any() else None,
            recall=recall.mean,
            share=float(w_N[chosen].sum() / w_N.sum()),
            precision_ci95=precision.ci95,
            recall_ci95=recall.ci95,
        )
    return ScorerMetrics(
        n=len(p_N),
        bad=int(bad_N.sum()),
        auc=area.auc,
        auc_ci95=area.ci95,
        average_precision=average_precision(everything),
        average_precision_ci95=bootstrap(average_precision, units, resamples=200),
        brier=brier(everything),
        brier_ci95=bootstrap(brier, units, resamples=200),
        calibration_error=calibration_error(everything),
        calibration_error_ci95=bootstrap(calibration_error, units, resamples=200),
        at=at,
    )
