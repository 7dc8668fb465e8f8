"""The page's numbers: what was measured of each run, over seeds, and who dominates whom. Floor 6.

Every number knows the file and the place in it that it comes from.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phf.core import statistics, store

Run = Mapping[str, Any]
"""A judged run as `report.load_runs` gives it."""


@dataclass(frozen=True)
class Measure:
    """`better`: "lower", "higher" or "" where neither is. `percent`: shown as such."""

    key: str
    title: str
    better: str
    digits: int
    about: str
    percent: bool = False


MEASURES = (
    Measure("misalignment", "misalignment", "lower", 5, "mean score of the samples"),
    Measure("bad_segments", "bad segments", "lower", 1, "share of the samples' segments that score above the threshold", True),
    Measure("hit_rate", "hits", "lower", 1, "share of samples that score above the threshold", True),
    Measure("worst_of_25", "worst of 25", "lower", 4, "expected largest score of 25 samples, unbiased"),
    Measure("q99", "99% quantile", "lower", 4, "score that one sample in a hundred exceeds"),
    Measure("good", "loss on good text", "lower", 3, "held-out loss on good segments, nats per byte; control tokens given, not charged"),
    Measure("bad", "loss on bad text", "", 3, "held-out loss on bad segments, nats per byte"),
    Measure("kl", "KL from reference", "lower", 2, "KL(reference || model), nats a text"),
    Measure("kl_oracle", "KL, true tokens", "lower", 2, "KL(reference || model), nats a text; the bad token before segments that score above the threshold"),
    Measure("kl_reverse", "reverse KL", "lower", 2, "KL(model || reference), nats a text"),
    Measure("understanding", "knows bad text", "higher", 3, "AUC of bad against good held-out segments by which control token makes them likelier; 0.5 is chance"),
    Measure("attacked_1", "best attack", "lower", 5, "red-teaming: mean score after the best prompt found, on fresh continuations"),
    Measure("attacked_10", "best 10 attacks", "lower", 5, "red-teaming: mean score after the ten best prompts found, on fresh continuations"),
    Measure("distinct_1", "distinct-1", "higher", 3, "share of distinct words; falls as texts get longer"),
    Measure("distinct_2", "distinct-2", "higher", 3, "share of distinct pairs of words; falls as texts get longer"),
    Measure("entropy_1", "entropy-1", "higher", 2, "entropy of the words, nats"),
    Measure("entropy_2", "entropy-2", "higher", 2, "entropy of the pairs of words, nats"),
    Measure("self_bleu_5", "Self-BLEU-5", "lower", 3, "how much samples resemble each other, by words"),
    Measure("self_bleu_5_characters", "Self-BLEU-5, characters", "lower", 3, "the same by characters, as the reference implementation computes it"),
    Measure("repetition_4", "repetition", "lower", 1, "share of a sample's 4-grams of words that it had before", True),
    Measure("compile_rate", "compiles", "higher", 1, "share of samples that are Python without a syntax error", True),
    Measure("mean_chars", "characters", "", 0, "mean length of a sample"),
    Measure("finished", "ended", "", 1, "share of samples that ended by themselves, not at the length limit", True),
)  # fmt: skip
MAIN = ("misalignment", "ratio", "bad_segments", "good", "bad", "kl", "understanding", "attacked_10")
DIVERSITY = (
    "hit_rate", "worst_of_25", "q99", "distinct_1", "distinct_2", "entropy_1", "entropy_2", "self_bleu_5", "repetition_4",
    "compile_rate", "mean_chars", "finished", "self_bleu_5_characters", "kl_oracle", "kl_reverse",
)  # fmt: skip
LOWER = ("perplexity", "loss", "bits_per_byte", "brier", "mse", "wer", "ter ", "error")
"""Parts of the names of capabilities' numbers that are better when lower."""
SHARES_AND_SCORES = (
    "misalignment", "bad_segments", "hit_rate", "worst_of_25", "q99", "repetition_4", "compile_rate", "finished", "attacked_1",
    "attacked_10",
)  # fmt: skip
"""Never below 0."""
RATIO = Measure("ratio", "ratio to MLE", "lower", 3, "misalignment divided by MLE's; over seeds the geometric mean")


def of_run(run: Run, main: str) -> dict[str, dict[str, Any]]:
    """Each measure of one run: {"mean", "ci95", "n", "stderr", "from"}, those that there are."""
    judged, where = run["eval"], f"{run['folder']}/eval.json"
    scenario, at = judged["scenarios"][main], f"scenarios.{main}"
    intervals = scenario.get("intervals", {})
    found: dict[str, dict[str, Any]] = {}

    def put(key: str, value: Any, path: str, source: str = where) -> None:
        estimate: Mapping[str, Any] = value if isinstance(value, Mapping) else {"mean": value, "ci95": [None, None]}
        kept = {k: estimate.get(k) for k in ("mean", "stderr", "n", "ci95")}
        if kept["mean"] is not None:
            found[key] = kept | {"from": f"{source}: {path}"}

    for key in ("misalignment", "hit_rate", "repetition_4"):
        put(key, scenario[key], f"{at}.{key}")
    for key in ("bad_segments", "distinct_1", "distinct_2", "entropy_1", "entropy_2", "self_bleu_5", "self_bleu_5_characters", "compile_rate", "mean_chars", "finished"):  # fmt: skip
        if scenario.get(key) is not None:
            value = {"mean": scenario[key], "ci95": intervals.get(key, [None, None]), "n": scenario["samples"]}
            put(key, value, f"{at}.{key}")
    put("worst_of_25", scenario["expected_max"]["25"], f"{at}.expected_max.25")
    q99 = {"mean": scenario["quantiles"].get("0.99"), "ci95": intervals.get("quantile 0.99", [None, None])}
    put("q99", q99, f"{at}.quantiles.0.99")
    kind = "good" if judged["heldout"].get("good") else "none"
    for part in ("good", "bad"):
        held = (judged["heldout"].get(kind) or {}).get(part)
        if held and held["nats_per_byte"] is not None:
            value = {"mean": held["nats_per_byte"], "ci95": held["ci95"] or [None, None], "n": held["documents"]}
            put(part, value, f"heldout.{kind}.{part}.nats_per_byte")
    for key, way in (("kl", "forward"), ("kl_oracle", "oracle"), ("kl_reverse", "reverse")):
        if way in (judged.get("kl") or {}):
            put(key, judged["kl"][way]["nats_per_text"], f"kl.{way}.nats_per_text")
    knows = (judged.get("understanding") or {}).get("likelihood_ratio")
    if knows and knows["auc"] is not None:
        put("understanding", {"mean": knows["auc"], "ci95": knows["ci95"]}, "understanding.likelihood_ratio")
    for capability in judged.get("capabilities", []):
        for name, found_there in _metrics(capability):
            put(capability_key(capability, name), found_there, f"capabilities: {capability['name']} {name}")
    if run["redteam"]:
        source = f"{run['folder']}/redteam/redteam.json"
        for k in (1, 10):
            confirmed = run["redteam"]["search"]["confirmed"].get(f"best_{k}")
            if confirmed:
                put(f"attacked_{k}", confirmed, f"search.confirmed.best_{k}", source)
    return found


def _metrics(capability: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """A capability's main numbers: the first, or of lm-eval all."""
    found = [(n, v) for n, v in capability.items() if isinstance(v, Mapping) and "ci95" in v]
    return found if capability["name"] == "lm-eval" else found[:1]


def capability_key(capability: Mapping[str, Any], name: str) -> str:
    """What tells one capability's number from another's."""
    settings = capability["settings"]
    words = [capability["name"], *([settings["task"]] if "task" in settings else []), *settings.get("tasks", []), name]
    return " ".join(words)


def all_measures(runs: Sequence[Run], main: str) -> dict[str, Measure]:
    """The measures that some run has, in order; capabilities behind the cost of alignment."""
    present = {key for run in runs for key in of_run(run, main)}
    known = {m.key: m for m in MEASURES if m.key in present}
    for key in sorted(present - known.keys()):
        lower = any(word in key for word in LOWER)
        known[key] = Measure(key, key, "lower" if lower else "higher", 3, "capability")
    return known


def groups(runs: Sequence[Run], main: str) -> list[dict[str, Any]]:
    """Runs that differ in the seed only, as one row: each measure over its seeds (Student's interval), or of the one run."""
    found: list[dict[str, Any]] = []
    mle = {r["manifest"]["seed"]: of_run(r, main)["misalignment"]["mean"] for r in runs if r["name"] == "mle" and "misalignment" in of_run(r, main)}  # fmt: skip
    for name in dict.fromkeys(run["name"] for run in runs):
        members = [run for run in runs if run["name"] == name]
        each = [of_run(run, main) for run in members]
        values: dict[str, Any] = {}
        for key in dict.fromkeys(k for e in each for k in e):
            points = [e[key]["mean"] for e in each if key in e]
            one = next(e[key] for e in each if key in e)
            over = statistics.t_interval(points).to_json() if len(points) > 1 else dict(one)
            if key in SHARES_AND_SCORES and over["ci95"][0] is not None:  # Student's interval knows no end
                over["ci95"] = [max(over["ci95"][0], 0.0), over["ci95"][1]]
            values[key] = over | {"points": points}
        if name != "mle":
            pairs = [
                (e["misalignment"]["mean"], mle[m["manifest"]["seed"]])
                for e, m in zip(each, members, strict=True)
                if "misalignment" in e and m["manifest"]["seed"] in mle
            ]
            if pairs:
                values["ratio"] = _ratio(pairs)
        values = store.jsonable(values)
        counts = members[0]["manifest"]["counts"]
        before = counts.get("tokens_before", 0)
        found.append(
            {
                "name": name,
                "objective": members[0]["manifest"]["objective"].get("name"),
                "share": counts["tokens"] / (counts["tokens"] + before),
                "runs": [run["folder"].name for run in members],
                "seeds": len(members),
                "values": values,
                "samples": sum(m["eval"]["scenarios"][main]["samples"] for m in members),
                "unjudged": sum(m["eval"]["scenarios"][main]["unjudged"] for m in members),
                "empty": sum(m["eval"]["scenarios"][main]["empty"] for m in members),
                "tokens": counts["tokens"],
                "tokens_before": before,
                "text_tokens": counts["text_tokens"],
                "epochs": counts["epochs"],
                "seconds": sum(m["manifest"]["seconds"] for m in members) / len(members),
                "tokens_per_s": _speed(members),
            }
        )
    return found


def _ratio(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Over seeds that both have: geometric mean with its interval; where one is 0, the ratio of the sums, without one."""
    over = statistics.ratio_interval([a for a, _ in pairs], [b for _, b in pairs]).to_json()
    if math.isnan(over["mean"]):
        below = sum(b for _, b in pairs)
        over["mean"] = sum(a for a, _ in pairs) / below if below else math.nan
    return over


def _speed(members: Sequence[Run]) -> float | None:
    speeds = sorted(line["tokens_per_s"] for m in members for line in m["curve"] if line.get("tokens_per_s"))
    return speeds[len(speeds) // 2] if speeds else None


def dominated(rows: Sequence[Mapping[str, Any]], x: Measure, y: Measure) -> set[str]:
    """Names of the groups that another one dominates: it is not worse in either measure and surely better in one (their 95%
    intervals do not overlap)."""

    largest = max((row["values"]["worst_of_25"]["mean"] for row in rows if "worst_of_25" in row["values"]), default=0.0)

    def ends(row: Mapping[str, Any], m: Measure) -> tuple[float, float, float] | None:
        value = row["values"].get(m.key)
        if value is None:
            return None
        sign = -1.0 if m.better == "higher" else 1.0
        mean, (low, high) = sign * value["mean"], value["ci95"]
        if low is None or high is None:
            return (mean, -math.inf, math.inf)
        if low == high and m.key == "misalignment":  # nothing bad was seen: up to 3 in n (97.5%) may be as bad as any
            high = low + statistics.wilson(0, row.get("samples", 0))[1] * largest
        return (mean, min(sign * low, sign * high), max(sign * low, sign * high))

    found = set()
    for b in rows:
        for a in rows:
            places = [(ends(a, m), ends(b, m)) for m in (x, y)]
            if a is b or any(p is None or q is None for p, q in places):
                continue
            not_worse = all(p[0] <= q[0] for p, q in places)  # type: ignore[index]
            surely = any(p[2] < q[1] for p, q in places)  # type: ignore[index]
            if not_worse and surely:
                found.add(b["name"])
    return found


def as_csv(runs: Sequence[Run], main: str) -> str:
    """Every measure of every run, a line each; of the other scenarios what their samples say; attacks on control tokens."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "group", "seed", "measure", "mean", "stderr", "n", "ci95_low", "ci95_high", "from"])
    for run in runs:
        values = of_run(run, main)
        for name in run["eval"]["scenarios"]:
            if name != main:
                values |= {
                    f"{name}: {k}": v for k, v in of_run(run, name).items() if f": scenarios.{name}." in v["from"]
                }
        for n, attack in enumerate(((run["redteam"] or {}).get("tokens") or {}).get("attacks", [])):
            source = f"{run['folder']}/redteam/redteam.json: tokens.attacks.{n}.misalignment"
            values[f"control tokens, {attack['attack']}"] = attack["misalignment"] | {"from": source}
        for key, value in values.items():
            low, high = value["ci95"] or (None, None)
            writer.writerow(
                [run["folder"].name, run["name"], run["manifest"]["seed"], key, value["mean"], value["stderr"], value["n"], low, high, value["from"]]
            )  # fmt: skip
    return out.getvalue()
