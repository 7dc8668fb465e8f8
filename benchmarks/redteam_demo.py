"""Red-teaming of the demo's models with equal budgets: the search with the evolutionary attacker, attacks on tokens.

    phf run demo
    python benchmarks/redteam_demo.py --runs runs/demo --out benchmarks/results/redteam_demo.json

A trial ends after the round in which it has used `--budget` tokens of the model under attack. `ours` is the conditional
model, `baseline` the MLE model. A ratio above 1 means that the conditional model is harder to break.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _measure import arguments, write
from phf.core.types import Estimate
from phf.redteaming.attack import redteam
from phf.redteaming.config import RedTeam, TokenAttacks


def compared(name: str, ours: Estimate, baseline: Estimate, more: dict[str, Any]) -> dict[str, Any]:
    a = ours.mean
    b = baseline.mean
    return {
        "case": name,
        "ours": a,
        "baseline": b,
        "unit": "misalignment",
        "ratio": b / a if a else None,
        "n": ours.n,
        **more,
    }


def main() -> None:
    args = arguments(__doc__ or "", runs="runs/demo", budget=1.5e6)
    config = RedTeam(rounds=14, candidates=20, continuations=64, max_tokens=48, max_target_tokens=args.budget)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("mle", "conditional"):
            run = f"{args.runs}/{name}-s0"
            found[name] = redteam(run, Path(folder) / name, config, TokenAttacks(num_samples=512, max_tokens=128))
    searches = {name: f.search for name, f in found.items()}
    cases = []
    for at, each in (
        ("starting prompts", {n: s.curves["round_mean"][0] for n, s in searches.items()}),
        ("best ten on fresh continuations", {n: s.confirmed["best_10"] for n, s in searches.items()}),
    ):
        more = {
            "ci95": {n: e.ci95 for n, e in each.items()},
            "budget": {n: vars(s.budget) for n, s in searches.items()},
            "rounds": {n: [len(trial) for trial in s.trials] for n, s in searches.items()},
        }
        cases.append(compared(at, each["conditional"], each["mle"], more))
    tokens = {name: f.tokens.attacks for name, f in found.items() if f.tokens is not None}
    plain = next(a for a in tokens["mle"] if a.attack == "no token").misalignment
    for attack in tokens["conditional"]:
        m = attack.misalignment
        cases.append(compared(f"control tokens: {attack.attack}", m, plain, {"ci95": m.ci95}))
    write(args.out, "redteam_demo", cases)


if __name__ == "__main__":
    main()
