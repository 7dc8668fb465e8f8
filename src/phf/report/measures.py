"""The numbers of a comparison: what was measured of each run and each group, and which groups are dominated.

Every number knows its place: the file and the path in it.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from phf.core import statistics
from phf.core.statistics import AUC
from phf.core.types import Estimate
from phf.evaluation.results import CapabilityResult, HeldoutSection, HeldoutSlice, Interval, ScenarioResult
from phf.report.format import Scale, number, share, three
from phf.report.runs import ReportedRun


@dataclass(frozen=True)
class Measure:
    """Something that is measured of a run."""

    key: str
    title: str
    better: str
    """"lower", "higher", or "" where neither is better."""
    digits: int
    about: str
    percent: bool = False
    """Whether the number is shown in per cent."""
    scale: Scale | None = None
    """How it is shown, if it is a score."""

    def text(self, value: Value) -> str:
        return self._show(value.mean)

    def interval_text(self, value: Value) -> str:
        return "" if value.ci95 is None else " to ".join(map(self._show, value.ci95))

    def _show(self, value: float) -> str:
        if self.scale is not None:
            return self.scale.text(value)
        if self.key == "ratio" or self.key.endswith("_difference"):
            return three(value)
        return (share if self.percent else number)(value, self.digits)


@dataclass(frozen=True)
class Value:
    """A number that was measured, of a run or over the seeds of a group."""

    mean: float
    stderr: float | None = None
    n: int | None = None
    ci95: tuple[float, float] | None = None
    source: str = ""
    """The file and the path in it; of a group's number, those of its first run."""
    points: tuple[float, ...] = ()
    """Of a group: the numbers of its seeds."""

    @classmethod
    def of(cls, found: Estimate, source: str) -> Value:
        stderr = None if math.isnan(found.stderr) else found.stderr
        return cls(found.mean, stderr, found.n, _known_interval(found.ci95), source)


def _known_interval(ci95: Interval | None) -> tuple[float, float] | None:
    """An interval; None if it is missing."""
    return None if ci95 is None or math.isnan(ci95[0]) else ci95


MEASURES = (
    Measure("misalignment", "misalignment", "lower", 5, "mean score of the samples"),
    Measure("ratio", "ratio to MLE", "lower", 3, "misalignment divided by MLE's; over seeds the geometric mean"),
    Measure("bad_segments", "bad segments", "lower", 1, "share of the samples' segments above the threshold", True),
    Measure("hit_rate", "hits", "lower", 1, "share of samples above the threshold", True),
    Measure("worst_of_25", "worst of 25", "lower", 4, "expected largest score of 25 samples (unbiased estimate)"),
    Measure("q99", "99% quantile", "lower", 4, "score that one sample in a hundred exceeds"),
    Measure(
        "good",
        "loss on good text",
        "lower",
        3,
        "held-out loss on good segments, in nats per byte; control tokens are context and add no loss",
    ),
    Measure("bad", "loss on bad text", "", 3, "held-out loss on bad segments, in nats per byte"),
    Measure(
        "good_difference",
        "good, less MLE's",
        "lower",
        4,
        "loss on good text less that of MLE on the same text, in nats per byte; over seeds, or with one seed over "
        "documents",
    ),
    Measure("bad_difference", "bad, less MLE's", "", 4, "loss on bad text less that of MLE, in nats per byte"),
    Measure("kl", "KL from reference", "lower", 2, "KL(reference || model), in nats per text"),
    Measure(
        "kl_oracle",
        "KL, true tokens",
        "lower",
        2,
        "KL(reference || model), in nats per text, with the bad token before segments above the threshold",
    ),
    Measure("kl_reverse", "reverse KL", "lower", 2, "KL(model || reference), in nats per text"),
    Measure(
        "understanding",
        "knows bad text",
        "higher",
        3,
        "AUC of bad against good held-out segments, by the control token that makes them more likely; 0.5 is chance",
    ),
    Measure(
        "attacked_1",
        "best attack",
        "lower",
        5,
        "red-teaming: mean score of new continuations of the best prompt found",
    ),
    Measure(
        "attacked_10",
        "best 10 attacks",
        "lower",
        5,
        "red-teaming: mean score of new continuations of the ten best prompts found",
    ),
    Measure(
        "worst_context",
        "worst context",
        "lower",
        5,
        "attacks on the control tokens: mean score of new samples in the context that is worst for the model, the bad "
        "token itself left out",
    ),
    Measure("distinct_1", "distinct-1", "higher", 3, "share of distinct words; falls as texts get longer"),
    Measure("distinct_2", "distinct-2", "higher", 3, "share of distinct pairs of words; falls as texts get longer"),
    Measure(
        "distinct_1_within",
        "distinct-1 within samples",
        "higher",
        3,
        "mean over samples of the share of distinct words within a sample, as the reference implementation reports it",
    ),
    Measure(
        "distinct_2_within",
        "distinct-2 within samples",
        "higher",
        3,
        "mean over samples of the share of distinct pairs of words within a sample, as the reference implementation "
        "reports it",
    ),
    Measure("entropy_1", "entropy-1", "higher", 2, "entropy of the words, in nats"),
    Measure("entropy_2", "entropy-2", "higher", 2, "entropy of the pairs of words, in nats"),
    Measure("self_bleu_5", "Self-BLEU-5", "lower", 3, "how much samples resemble each other, by words"),
    Measure(
        "self_bleu_5_characters",
        "Self-BLEU-5, characters",
        "lower",
        3,
        "how much samples resemble each other, by characters, as the reference implementation computes it",
    ),
    Measure(
        "repetition_4",
        "repetition",
        "lower",
        1,
        "share of a sample's 4-grams of words that occurred earlier in it",
        True,
    ),
    Measure("compile_rate", "compiles", "higher", 1, "share of samples that are Python without a syntax error", True),
    Measure("mean_chars", "characters", "", 0, "mean length of a sample"),
    Measure("finished", "ended", "", 1, "share of samples that ended with end-of-text", True),
)
MAIN = (
    "misalignment",
    "ratio",
    "bad_segments",
    "good",
    "good_difference",
    "bad",
    "bad_difference",
    "kl",
    "understanding",
    "attacked_10",
    "worst_context",
)
"""Columns of the main table. Capabilities follow."""
DIVERSITY = (
    "hit_rate",
    "worst_of_25",
    "q99",
    "distinct_1",
    "distinct_2",
    "distinct_1_within",
    "distinct_2_within",
    "entropy_1",
    "entropy_2",
    "self_bleu_5",
    "repetition_4",
    "compile_rate",
    "mean_chars",
    "finished",
    "self_bleu_5_characters",
    "kl_oracle",
    "kl_reverse",
)
"""Columns of the table of diversity and tails."""
LOWER_IS_BETTER = (
    "perplexity",
    "loss",
    "bits_per_byte",
    "brier",
    "mse",
    "wer",
    "ter ",
    "error",
    "exposure",
    "extracted",
    "verbatim",
)
"""Parts of the names of capabilities' numbers that are better when lower."""
NEVER_NEGATIVE = (
    "misalignment",
    "bad_segments",
    "hit_rate",
    "worst_of_25",
    "q99",
    "repetition_4",
    "compile_rate",
    "finished",
    "attacked_1",
    "attacked_10",
    "worst_context",
)
"""Student's interval can reach below 0, these numbers cannot."""
AT_MOST_1 = (
    *(measure.key for measure in MEASURES if measure.percent),
    "understanding",
    "distinct_1",
    "distinct_2",
    "distinct_1_within",
    "distinct_2_within",
    "self_bleu_5",
    "self_bleu_5_characters",
)
"""Shares. Student's interval can reach beyond 0 and 1, these numbers cannot."""
SHARE_NAMES = ("extracted", "verbatim", "accuracy", "AUC", "pass@")
"""Parts of the names of capabilities' numbers that are shares."""
SCORES = ("misalignment", "worst_of_25", "q99", "attacked_1", "attacked_10", "worst_context")
"""Measures that are scores."""
SCENARIO_NUMBERS = (
    "bad_segments",
    "distinct_1",
    "distinct_2",
    "distinct_1_within",
    "distinct_2_within",
    "entropy_1",
    "entropy_2",
    "self_bleu_5",
    "self_bleu_5_characters",
    "compile_rate",
    "mean_chars",
    "finished",
)
"""Plain numbers of a scenario's result. Their intervals are in `intervals`."""


OF_PREFERENCES = ("misalignment", "bad_segments", "good", "bad")
"""What is measured by the scorer of every preference."""


def preference_key(key: str, preference: str) -> str:
    """The key of a measure by the scorer of another preference."""
    return f"{key}: {preference}"


# Of one run


def of_run(run: ReportedRun, scenario: str) -> dict[str, Value]:
    """What was measured of a run, by measure; samples are those of `scenario`."""
    file = source_file(run, run.folder.eval)
    found = of_scenario(run.result.scenarios[scenario], f"{file}: scenarios.{scenario}")
    found |= _of_heldout(run.result.heldout, f"{file}: heldout")
    if run.result.kl is not None:
        for key, way in (("kl", "forward"), ("kl_oracle", "oracle"), ("kl_reverse", "reverse")):
            if (divergence := getattr(run.result.kl, way)) is not None:
                found[key] = Value.of(divergence.nats_per_text, f"{file}: kl.{way}.nats_per_text")
    if run.result.understanding is not None:
        source = f"{file}: understanding.likelihood_ratio"
        found["understanding"] = _of_auc(run.result.understanding.likelihood_ratio, source)
    for name, other in run.result.preferences.items():
        source = f"{file}: preferences.{name}"
        if scenario in other.scenarios:
            for key in ("misalignment", "bad_segments"):
                found[preference_key(key, name)] = Value.of(
                    getattr(other.scenarios[scenario], key), f"{source}.scenarios.{scenario}.{key}"
                )
        for key, value in _of_heldout(other.heldout, f"{source}.heldout").items():
            found[preference_key(key, name)] = value
    for capability in run.result.capabilities:
        for name, estimate in capability.main.items():
            found[capability_key(capability, name)] = Value.of(
                estimate, f"{file}: capabilities: {capability.name} {name}"
            )
    for key in ("1", "10"):
        confirmed = None if run.redteam is None else run.redteam.search.confirmed.get(f"best_{key}")
        if confirmed is not None:
            found[f"attacked_{key}"] = Value.of(
                confirmed, f"{source_file(run, run.folder.redteam.result)}: search.confirmed.best_{key}"
            )
    tokens = None if run.redteam is None else run.redteam.tokens
    if tokens is not None and "text" in tokens.worst:
        source = f"{source_file(run, run.folder.redteam.result)}: tokens.worst.text.misalignment"
        found["worst_context"] = Value.of(tokens.worst["text"].misalignment, source)
    return {key: value for key, value in found.items() if not math.isnan(value.mean)}


def of_scenario(result: ScenarioResult, source: str) -> dict[str, Value]:
    """What the samples of a scenario say, by measure. `source`: the file and the path of the result in it."""
    found = {
        key: Value.of(getattr(result, key), f"{source}.{key}") for key in ("misalignment", "hit_rate", "repetition_4")
    }
    for key in SCENARIO_NUMBERS:
        mean = getattr(result, key)
        if mean is not None:
            interval = _known_interval(result.intervals.get(key))
            found[key] = Value(mean, n=result.samples, ci95=interval, source=f"{source}.{key}")
    if "25" in result.expected_max:
        found["worst_of_25"] = Value.of(result.expected_max["25"], f"{source}.expected_max.25")
    if "0.99" in result.quantiles:
        interval = _known_interval(result.intervals.get("quantile 0.99"))
        found["q99"] = Value(result.quantiles["0.99"], ci95=interval, source=f"{source}.quantiles.0.99")
    return {key: value for key, value in found.items() if not math.isnan(value.mean)}


def source_file(run: ReportedRun, file: Path) -> str:
    """The name of a run's file from the folder that holds the run: pages say nothing else about this machine."""
    return file.absolute().relative_to(run.folder.path.absolute().parent).as_posix()


def _of_heldout(heldout: HeldoutSection, source: str) -> dict[str, Value]:
    """The losses on good and bad text. `source`: the file and the path of the section in it."""
    if heldout.main is None:
        return {}
    parts: dict[str, HeldoutSlice] = {"good": heldout.main.good, "bad": heldout.main.bad}
    return {
        part: Value(
            found.nats_per_byte,
            n=found.documents,
            ci95=_known_interval(found.ci95),
            source=f"{source}.{heldout.main_name}.{part}.nats_per_byte",
        )
        for part, found in parts.items()
    }


def _of_auc(found: AUC, source: str) -> Value:
    return Value(found.auc, ci95=_known_interval(found.ci95), source=source)


def capability_key(capability: CapabilityResult, name: str) -> str:
    """What distinguishes a capability's number from those of other capabilities."""
    settings = capability.settings
    task = [settings["task"]] if "task" in settings else []
    return " ".join([capability.name, *task, *settings.get("tasks", []), name])


# Of several runs


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed only: a row of the page's tables."""

    name: str
    objective: str
    share: float
    """Share of all tokens that had feedback."""
    runs: tuple[str, ...]
    values: Mapping[str, Value]
    """By measure: over the seeds (Student's interval), or of the one run."""
    samples: int
    unjudged: int
    empty: int
    tokens: int
    tokens_before: int
    text_tokens: int
    epochs: float
    exposure: Mapping[str, int]
    """How much text the first run read and learned from, by class; empty for runs of earlier versions."""
    seconds: float
    """Training time, mean over runs."""
    tokens_per_s: float | None
    has_noise: bool = False
    """Whether errors were added to the scores that the objective saw."""
    is_plain: bool = False
    """Whether it is the plain training that the others are compared with."""

    @property
    def seeds(self) -> int:
        return len(self.runs)


def all_measures(runs: Sequence[ReportedRun], rows: Sequence[Group]) -> dict[str, Measure]:
    """The measures that some group of runs has, by key. Capabilities come last."""
    present = {key for row in rows for key in row.values}
    known = {m.key: m for m in MEASURES if m.key in present}
    for name in sorted({name for run in runs for name in run.result.preferences}):
        for m in MEASURES:
            key = preference_key(m.key, name)
            if m.key in OF_PREFERENCES and key in present:
                known[key] = replace(
                    m, key=key, title=f"{m.title}, {name}", about=f"{m.about}; by the scorer of {name}"
                )
    for key in sorted(present - known.keys()):
        lower = any(part in key for part in LOWER_IS_BETTER)
        known[key] = Measure(key, key, "lower" if lower else "higher", 3, "capability")
    return known


def groups(runs: Sequence[ReportedRun], scenario: str) -> list[Group]:
    """The runs in groups that differ in the seed only, in the order of their first runs."""
    values = {run.folder.path: of_run(run, scenario) for run in runs}
    name_of_mle = plain_name(runs)
    mle = {run.manifest.seed: run for run in runs if run.name == name_of_mle}
    found = [
        _group(name, [run for run in runs if run.name == name], values, mle, scenario, is_plain=name == name_of_mle)
        for name in dict.fromkeys(run.name for run in runs)
    ]
    return bounded(found)


def bounded(rows: Sequence[Group]) -> list[Group]:
    """The groups. Those of which no sample was bad get an upper end of misalignment: Wilson's for 0 of their samples
    times the largest score that is expected of 25 samples of any group. With fewer samples: times the largest mean."""
    worst = [row.values["worst_of_25"].mean for row in rows if "worst_of_25" in row.values]
    means = [row.values["misalignment"].mean for row in rows if "misalignment" in row.values]
    return [_bounded(row, max(worst or means, default=0.0)) for row in rows]


def _bounded(row: Group, largest: float) -> Group:
    value = row.values.get("misalignment")
    if value is None or value.mean or (value.ci95 is not None and value.ci95[0] < value.ci95[1]):
        return row
    bound = (0.0, statistics.wilson(0, row.samples)[1] * largest)
    return replace(row, values={**row.values, "misalignment": replace(value, ci95=bound if bound[1] else None)})


def plain_name(runs: Sequence[ReportedRun]) -> str | None:
    """The name of the runs of plain training: maximum likelihood from the start. Of several, the one named after its
    objective, else the first."""
    plain = [r.name for r in runs if r.manifest.objective_name == "mle" and not r.manifest.counts.tokens_before]
    return "mle" if "mle" in plain else plain[0] if plain else None


def _group(
    name: str,
    members: Sequence[ReportedRun],
    values: Mapping[Path, dict[str, Value]],
    mle: Mapping[int, ReportedRun],
    scenario: str,
    is_plain: bool,
) -> Group:
    """One group. `values`: of each run, by folder; `mle`: the runs of MLE, by seed."""
    each = [values[run.folder.path] for run in members]
    over_seeds = {
        key: _over_seeds(key, [v[key] for v in each if key in v]) for key in dict.fromkeys(k for v in each for k in v)
    }
    paired = [(run, mle[run.manifest.seed]) for run in members if run.manifest.seed in mle and not is_plain]
    scores = [tuple(values[run.folder.path].get("misalignment") for run in pair) for pair in paired]
    pairs = [(own.mean, base.mean) for own, base in scores if own is not None and base is not None]
    if pairs:
        over_seeds["ratio"] = _ratio(pairs)
    for part in ("good", "bad"):
        difference = loss_difference(paired, part)
        if difference is not None:
            over_seeds[f"{part}_difference"] = difference
    first = members[0].manifest
    judged = [run.result.scenarios[scenario] for run in members]
    counts = first.counts
    return Group(
        name=name,
        objective=first.objective_name,
        share=counts.tokens / (counts.tokens + counts.tokens_before),
        runs=tuple(run.folder_name for run in members),
        values=over_seeds,
        samples=sum(result.samples for result in judged),
        unjudged=sum(result.unjudged for result in judged),
        empty=sum(result.empty for result in judged),
        tokens=counts.tokens,
        tokens_before=counts.tokens_before,
        text_tokens=counts.text_tokens,
        epochs=counts.epochs,
        exposure=counts.exposure,
        seconds=sum(run.manifest.seconds for run in members) / len(members),
        tokens_per_s=_median_speed(members),
        has_noise=first.noise is not None,
        is_plain=is_plain,
    )


def _over_seeds(key: str, found: Sequence[Value]) -> Value:
    """A measure over the seeds that have it."""
    points = tuple(value.mean for value in found)
    if len(points) == 1:
        value = found[0]
    else:
        value = Value.of(statistics.t_interval(points), found[0].source)
        intervals = [one.ci95 for one in found if one.ci95 is not None]
        if value.ci95 is None and len(intervals) == len(found):  # equal seeds
            value = replace(value, ci95=_known_interval(statistics.around(intervals)))
    if value.ci95 is not None:
        low, high = value.ci95
        kind = key.partition(": ")[0]
        is_share = kind in AT_MOST_1 or any(part in kind for part in SHARE_NAMES)
        low = max(low, 0.0) if kind in NEVER_NEGATIVE or is_share else low
        high = min(high, 1.0) if is_share else high
        value = replace(value, ci95=(low, high))
    return replace(value, points=points)


def loss_difference(pairs: Sequence[tuple[ReportedRun, ReportedRun]], part: str) -> Value | None:
    """The loss on good or bad held-out text of runs less that of others on the same text, in nats per byte: Student's
    interval over pairs, or of one pair a bootstrap over parts of the documents. None where it is not known."""
    found: list[tuple[HeldoutSlice, HeldoutSlice]] = []
    for pair in pairs:
        losses = [run.result.heldout.main for run in pair]
        if losses[0] is None or losses[1] is None:
            return None
        own = getattr(losses[0], part)
        base = getattr(losses[1], part)
        if own.bytes != base.bytes or not own.bytes:
            return None
        found.append((own, base))
    if not found:
        return None
    means = [a.nats_per_byte - b.nats_per_byte for a, b in found]
    if len(found) > 1:
        return replace(Value.of(statistics.t_interval(means), ""), points=tuple(means))
    own, base = found[0]
    if own.parts is None or base.parts is None:
        return None
    nats_P = np.array([a - b for (a, _), (b, _) in zip(own.parts, base.parts, strict=True)])
    bytes_P = np.array([size for _, size in own.parts], np.float64)
    with_text = bytes_P > 0
    return Value.of(statistics.ratio_of_sums(nats_P[with_text], bytes_P[with_text]), "")


def _ratio(pairs: Sequence[tuple[float, float]]) -> Value:
    """Over seeds that both have. Where plain training has a 0: the ratio of the sums, without an interval."""
    value = Value.of(statistics.ratio_interval([a for a, _ in pairs], [b for _, b in pairs]), "")
    if math.isnan(value.mean):
        whole = sum(b for _, b in pairs)
        value = replace(value, mean=sum(a for a, _ in pairs) / whole if whole else math.nan)
    return value


def _median_speed(members: Sequence[ReportedRun]) -> float | None:
    speeds = sorted(line.tokens_per_s for run in members for line in run.metrics if line.tokens_per_s)
    return speeds[len(speeds) // 2] if speeds else None


# Comparing


def dominated(rows: Sequence[Group], x: Measure, y: Measure) -> set[str]:
    """Names of the groups that another group dominates: at least as good in both measures and significantly better
    in one, that is, with 95% intervals that do not overlap."""
    found = set()
    for b in rows:
        for a in rows:
            pairs = [(_cost(a, m), _cost(b, m)) for m in (x, y)]
            known = [(p, q) for p, q in pairs if p is not None and q is not None]
            if a is b or len(known) < len(pairs):
                continue
            if all(p.mean <= q.mean for p, q in known) and any(p.high < q.low for p, q in known):
                found.add(b.name)
    return found


@dataclass(frozen=True)
class _Cost:
    """A number whose sign makes lower better, with the ends of its interval."""

    mean: float
    low: float
    high: float


def _cost(row: Group, measure: Measure) -> _Cost | None:
    """A group's number."""
    value = row.values.get(measure.key)
    if value is None:
        return None
    sign = -1.0 if measure.better == "higher" else 1.0
    if value.ci95 is None:
        return _Cost(sign * value.mean, -math.inf, math.inf)
    low, high = value.ci95
    return _Cost(sign * value.mean, min(sign * low, sign * high), max(sign * low, sign * high))


def as_csv(runs: Sequence[ReportedRun], scenario: str) -> str:
    """The numbers of every run, one per line: all measures, the samples of other scenarios, attacks on control
    tokens."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "group", "seed", "measure", "mean", "stderr", "n", "ci95_low", "ci95_high", "from"])
    for run in runs:
        values = of_run(run, scenario)
        for name, result in run.result.scenarios.items():
            if name != scenario:
                found = of_scenario(result, f"{source_file(run, run.folder.eval)}: scenarios.{name}")
                values |= {f"{name}: {key}": value for key, value in found.items()}
        tokens = None if run.redteam is None else run.redteam.tokens
        for n, attack in enumerate([] if tokens is None else tokens.attacks):
            source = f"{source_file(run, run.folder.redteam.result)}: tokens.attacks.{n}.misalignment"
            values[f"control tokens, {attack.attack}"] = Value.of(attack.misalignment, source)
        for key, v in values.items():
            row = [run.folder_name, run.name, run.manifest.seed, key, v.mean, v.stderr, v.n, *(v.ci95 or (None, None))]
            writer.writerow([None if isinstance(x, float) and math.isnan(x) else x for x in row] + [v.source])
    return out.getvalue()
