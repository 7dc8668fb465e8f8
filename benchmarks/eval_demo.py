"""Wall time of a whole evaluation of one of the demo's models, by part.

    phf run demo
    python benchmarks/eval_demo.py --run runs/demo/conditional-s0 --reference runs/demo/mle-s0 --out FILE

`ours` is the time of a part in seconds. `baseline` is the time of the whole evaluation.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from _measure import arguments, write
from phf.core import folders
from phf.core.runs import TrainManifest
from phf.evaluation.capabilities.lambada import Lambada
from phf.evaluation.evaluate import evaluate_run
from phf.evaluation.kl import KL, LocalModel
from phf.generation.scenario import Scenario


def main() -> None:
    args = arguments(__doc__ or "", run="runs/demo/conditional-s0", reference="runs/demo/mle-s0", lambada="")
    tokens = folders.read_manifest(args.run, TrainManifest).tokens_dir
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        shutil.copytree(args.run, run, ignore=shutil.ignore_patterns("checkpoints", "eval*", "samples"))
        plain = Scenario(num_samples=512, max_tokens=192)
        scenarios = {"unconditional": plain, "bad_token": Scenario(num_samples=128, max_tokens=192, control="bad")}
        config = KL(LocalModel(str(Path(args.reference).resolve())), num_samples=512, max_tokens=64)
        capabilities = [Lambada(args.lambada, max_passages=500)] if args.lambada else []
        result = evaluate_run(
            run, scenarios, tokens_dir=Path(tokens).resolve(), kl_from=config, capabilities=capabilities
        )
    seconds = result.seconds
    total = sum(seconds.values())
    cases = [
        {"case": part, "ours": s, "baseline": total, "unit": "s", "ratio": total / s, "n": 1}
        for part, s in seconds.items()
    ]
    write(args.out, "eval_demo", cases)


if __name__ == "__main__":
    main()
