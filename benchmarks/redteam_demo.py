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
from phf.redteaming.control_tokens import TokenAttacks
from phf.redteaming.search import RedTeam, redteam


def compared(name: str, ours: dict, baseline: dict, more: dict) -> dict:
    a, b = ours["mean"], baseline["mean"]
    return {
        "case": name,
        "ours": a,
        "baseline": b,
        "unit": "misalignment",
        "ratio": b / a if a else None,
        "n": ours["n"],
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
    searches = {name: f["search"] for name, f in found.items()}
    cases = []
    for at, each in (
        ("starting prompts", {n: s["curves"]["round_mean"][0] for n, s in searches.items()}),
        ("best ten on fresh continuations", {n: s["confirmed"]["best_10"] for n, s in searches.items()}),
    ):
        more = {
            "ci95": {n: e["ci95"] for n, e in each.items()},
            "budget": {n: s["budget"] for n, s in searches.items()},
            "rounds": {n: [len(trial) for trial in s["trials"]] for n, s in searches.items()},
        }
        cases.append(compared(at, each["conditional"], each["mle"], more))
    plain = next(a for a in found["mle"]["tokens"]["attacks"] if a["attack"] == "no token")["misalignment"]
    for attack in found["conditional"]["tokens"]["attacks"]:
        m = attack["misalignment"]
        cases.append(compared(f"control tokens: {attack['attack']}", m, plain, {"ci95": m["ci95"]}))
    write(args.out, "redteam_demo", cases)


if __name__ == "__main__":
    main()
