"""The fitted scorer: characters per second on one core, and AUC, against scikit-learn's own pipeline.

    python benchmarks/fitted.py --labels comments.csv:comment:toxic --test tweets.csv:tweet:class:0,1 --out FILE

Baseline: HashingVectorizer (words and pairs, strings of 3 to 5 characters) with LogisticRegression. AUC is measured
on a fifth of the texts, which neither side saw, and on the other source. Without `--labels` the task is made up:
README lines with and without a link. It measures speed only.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline, make_union

from _measure import arguments, case, interleaved, write
from phf.core.types import Document
from phf.data.installed import InstalledPackages
from phf.scorers.fitted import load_fitted
from phf.scorers.fitting import fit_scorer, held_out
from phf.scorers.labels import Labels, read_labels


def labels_from(spec: str) -> Labels:
    path, text, label, *bad = spec.split(":")
    return read_labels(path, text, label, bad[0].split(",") if bad else None)


def made_up() -> Labels:
    source = InstalledPackages()
    lines = []
    for shard in source.plan():
        for item in source.read(shard):
            if isinstance(item, Document):
                lines += [line for line in item.text.split("\n")[:200] if len(line) > 20]
    lines = lines[::5]
    return Labels("README lines", tuple(lines), np.array(["http" in line for line in lines]), {})


def main() -> None:
    args = arguments(__doc__ or "", labels="", test="")
    labels = labels_from(args.labels) if args.labels else made_up()
    tests = [labels_from(args.test)] if args.test else []
    held = held_out(labels, 0.2)
    train = [t for t, h in zip(labels.texts, held, strict=True) if not h]
    union = make_union(
        HashingVectorizer(ngram_range=(1, 2), n_features=2**20, norm="l2"),
        HashingVectorizer(analyzer="char", ngram_range=(3, 5), n_features=2**20, norm="l2"),
    )
    baseline = make_pipeline(union, LogisticRegression(C=10.0, solver="liblinear")).fit(train, labels.bad_N[~held])
    with tempfile.TemporaryDirectory() as folder:
        card = fit_scorer(labels, Path(folder) / "scorer", tests)
        ours = load_fitted(str(Path(folder) / "scorer"))
    texts = [t for t in labels.texts if t][:2000]
    chars = sum(map(len, texts))
    times = interleaved(
        {"ours": lambda: ours.probabilities(texts), "scikit-learn": lambda: baseline.predict_proba(texts)}, args.repeats
    )
    rates = {name: [chars / s for s in seconds] for name, seconds in times.items()}
    held_texts = [t for t, h in zip(labels.texts, held, strict=True) if h]
    more = {"texts": len(texts), "source": labels.source}
    cases = [case("score, one core", rates["ours"], rates["scikit-learn"], "characters/s", False, **more)]
    sets = {"held out": (held_texts, labels.bad_N[held])} | {t.source: (list(t.texts), t.bad_N) for t in tests}
    for name, (texts_of, bad_N) in sets.items():
        auc = card.metrics[name].auc
        theirs = float(roc_auc_score(bad_N, baseline.predict_proba(texts_of)[:, 1]))
        cases.append(
            {"case": f"AUC, {name}", "ours": auc, "baseline": theirs, "unit": "AUC", "ratio": auc / theirs, "n": 1}
        )
    write(args.out, "fitted", cases)


if __name__ == "__main__":
    main()
