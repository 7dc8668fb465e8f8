"""How right is a scorer that was fitted to one source on another one?

python benchmarks/audit_other_source.py tweets.csv:tweet:class:0,1 comments.csv:comment:toxic WORK --out FILE

Fits a scorer to the labels of the first file, scores the texts of the second one with it, and audits it with their
labels. WORK: folder for the scorer and the scored corpus. No text goes into the results.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from _measure import machine
from phf.core import store
from phf.data.readers import Rows
from phf.data.segment import Documents
from phf.scorers import Fitted
from phf.scorers.fitting import fit_scorer
from phf.scorers.labels import Labels, read_labels
from phf.scoring.audit import audit
from phf.scoring.score import score_corpus


def labels_of(spec: str) -> tuple[Path, str, Labels]:
    """(file, column of the text, labels) of FILE:TEXT:LABEL[:BAD,BAD]."""
    path, text, label, *bad = spec.split(":")
    return Path(path), text, read_labels(path, text, label, bad[0].split(",") if bad else None)


def measured(own: str, other: str, work: Path) -> dict[str, Any]:
    _, _, fitted = labels_of(own)
    path, text, labels = labels_of(other)
    card = fit_scorer(fitted, work / "scorer", [labels])
    score_corpus(Rows(str(path), field=text), Documents(), Fitted(str(work / "scorer")), work / "scored")
    found = audit(work / "scored", labels)
    rows = [store.jsonable(row) for row in found.at]
    return {
        "fitted_to": {"source": fitted.source, "texts": card.texts, "bad": card.bad},
        "held_out": card.metrics["held out"],
        "learning_curve": card.curve,
        "other_source": {
            "source": labels.source,
            "texts": found.labelled,
            "bad": found.bad,
            "auc": found.auc,
            "auc_ci95": found.auc_ci95,
        },
        "threshold": found.threshold,
        "at": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("own")
    parser.add_argument("other")
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    found = measured(given.own, given.other, given.work)
    store.write_json(given.out, {"benchmark": "audit_other_source", "machine": machine(), **found})


if __name__ == "__main__":
    main()
