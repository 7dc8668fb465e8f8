"""How much of labelled personal data each PII scorer finds, by kind of entity.

    python benchmarks/pii_recall.py --data synth_dataset_v2.json --out benchmarks/results/pii_recall.json

`--data`: JSON with rows of `full_text` and `spans` (`entity_type`, `start_position`, `end_position`), such as the
made-up sentences of microsoft/presidio-research (MIT). An entity counts as found if one of its characters is. `ours` is
the paper's set of detectors, `baseline` scrubadub's default set, `presidio` Presidio's patterns.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _measure import arguments, write
from phf.core.types import Span
from phf.scorers import PII, Presidio
from phf.scorers.pii import recall_by_kind


def span_of(row: dict[str, Any]) -> Span:
    return Span(row["start_position"], row["end_position"], row["entity_type"])


def main() -> None:
    args = arguments(__doc__ or "", data="", sentences=1500)
    if not args.data:
        sys.exit("--data: the labelled sentences are not part of phf; see the first lines of this file")
    data = json.loads(Path(args.data).read_text())[: args.sentences]
    rows = [(row["full_text"], [span_of(s) for s in row["spans"]]) for row in data]
    scorers = {"paper": PII(detectors="paper"), "default": PII(), "presidio": Presidio()}
    recall = {name: recall_by_kind(scorer, rows) for name, scorer in scorers.items()}
    clean = [text for text, spans in rows if not spans]
    alarms = {name: sum(bool(scorer.spans(t)) for t in clean) for name, scorer in scorers.items()}
    cases = [
        {
            "case": kind,
            "ours": found.recall,
            "baseline": recall["default"][kind].recall,
            "presidio": recall["presidio"][kind].recall,
            "unit": "recall",
            "ratio": found.recall / recall["default"][kind].recall if recall["default"][kind].recall else None,
            "n": found.n,
        }
        for kind, found in recall["paper"].items()
    ]
    false_alarms = {"case": "sentences without an entity in which something was found", "unit": "sentences"}
    false_alarms |= {"ours": alarms["paper"], "baseline": alarms["default"], "presidio": alarms["presidio"]}
    cases.append(false_alarms | {"ratio": None, "n": len(clean)})
    write(args.out, "pii_recall", cases)


if __name__ == "__main__":
    main()
