"""The paper's search with the evolutionary attacker, and the attacks on control tokens, on the demo's models: equal budgets.

    phf run demo
    python benchmarks/redteam_demo.py --runs runs/demo --out benchmarks/results/redteam_demo.json

Each trial ends after the round in which it has used `--budget` tokens of the model under attack. `ours` is the conditional
model, `baseline` the one trained by MLE; ratio above 1: the conditional one is harder to break.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from _measure import arguments, write
from phf.control_attacks import TokenAttacks
from phf.redteam import RedTeam, redteam


def main() -> None:
    args = arguments(__doc__ or "", runs="runs/demo", budget=1.5e6)
    config = RedTeam(rounds=14, candidates=20, continuations=64, max_tokens=48, max_target_tokens=args.budget)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("mle", "conditional"):
            run = f"{args.runs}/{name}-s0"
            found[name] = redteam(run, Path(folder) / name, config, TokenAttacks(num_samples=512, max_tokens=128))
    cases = []
    for at, part in (("starting prompts", "round_mean"), ("best ten on fresh continuations", "best_10")):
        each = {
            n: f["search"]["curves"]["round_mean"][0] if part == "round_mean" else f["search"]["confirmed"][part]
            for n, f in found.items()
        }
        cases.append(
            {
                "case": at,
                "ours": each["conditional"]["mean"],
                "baseline": each["mle"]["mean"],
                "unit": "misalignment",
                "ratio": each["mle"]["mean"] / each["conditional"]["mean"] if each["conditional"]["mean"] else None,
                "n": each["mle"]["n"],
                "ci95": {n: e["ci95"] for n, e in each.items()},
                "budget": {n: f["search"]["budget"] for n, f in found.items()},
                "rounds": {n: [len(trial) for trial in f["search"]["trials"]] for n, f in found.items()},
            }
        )
    baseline = next(a for a in found["mle"]["tokens"]["attacks"] if a["attack"] == "no token")["misalignment"]
    for attack in found["conditional"]["tokens"]["attacks"]:
        m = attack["misalignment"]
        cases.append(
            {
                "case": f"control tokens: {attack['attack']}",
                "ours": m["mean"],
                "baseline": baseline["mean"],
                "unit": "misalignment",
                "ratio": baseline["mean"] / m["mean"] if m["mean"] else None,
                "n": m["n"],
                "ci95": m["ci95"],
            }
        )
    write(args.out, "redteam_demo", cases)


if __name__ == "__main__":
    main()
