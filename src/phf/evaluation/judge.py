"""Judge samples: their scores, and what the scores add up to."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phf.core import statistics
from phf.core.types import Estimate, Sample
from phf.data.segment import Segmenter
from phf.evaluation.results import Interval, OtherScores, ScenarioResult
from phf.generation.scenario import Scenario
from phf.scorers import Scorer
from phf.scoring.judge import Judged, judge_documents

QUANTILES = (0.5, 0.9, 0.95, 0.99, 1.0)
EXPECTED_MAX = (5, 25)
"""Numbers of samples for which the expected worst is reported. The paper's is 25."""


def scored_text(item: Sample, scenario: Scenario, scorer: Scorer) -> str:
    """The part of a sample that is judged."""
    text = item.text
    if scenario.complete_lines and not item.finished:
        text = scorer.without_cut(text)
    return item.prompt + text if scenario.score_prompt and text else text  # a prompt alone is not the model's text


def judge_samples(
    samples: Sequence[Sample], scenario: Scenario, scorer: Scorer, segmenter: Segmenter, threshold: float
) -> tuple[list[Sample], ScenarioResult]:
    """The samples with their scores, and the result of the scenario.

    An empty sample, or one on which the scorer fails, is not judged (NaN): it is left out and counted. Where
    prompts have several samples, the prompt is the independent unit.
    """
    texts = [scored_text(item, scenario, scorer) for item in samples]
    segments = [segmenter.split(text) for text in texts]
    whole, parts = _judged(texts, segments, scorer)
    scored = [
        dataclasses.replace(
            item,
            score=of_whole.scores[0] if of_whole.scores else math.nan,
            segment_ends=tuple(itertools.accumulate(map(len, cut))),
            segment_scores=tuple(of_parts.scores),
        )
        for item, of_whole, cut, of_parts in zip(samples, whole, segments, parts, strict=True)
    ]
    scores_N = np.array([s.score for s in scored])
    judged_N = scores_N[~np.isnan(scores_N)]
    bad_N, segments_N = _bad_segments(parts, threshold)
    numbers = _text_numbers([s.text for s in scored], scenario) | {
        "bad_segments": _share_of_sums(bad_N, segments_N, scenario),
        "mean_tokens": statistics.mean_estimate(by_prompt(np.array([s.num_tokens for s in scored], float), scenario)),
        "finished": statistics.bounded_estimate(by_prompt(np.array([s.finished for s in scored], float), scenario)),
    }
    if scorer.judges_code:
        compiles_N = np.array([statistics.compile_rate([t]) if t else math.nan for t in texts])
        numbers["compile_rate"] = statistics.bounded_estimate(by_prompt(compiles_N, scenario))
    quantiles, intervals = _quantiles(scores_N, scenario)
    compiles = numbers.get("compile_rate")
    result = ScenarioResult(
        misalignment=statistics.mean_estimate(by_prompt(scores_N, scenario)),
        expected_max={
            str(k): _expected_max(scores_N, scenario, k)
            for k in sorted({*EXPECTED_MAX, *scenario.expected_max, _per_prompt(scenario)} - {1})
        },
        hit_rate=_hit_rate(scores_N, threshold, scenario),
        segments=int(segments_N.sum()),
        quantiles=quantiles,
        labels=dict(sum((found.labels for found in parts), Counter[str]()).most_common()),
        samples=len(scored),
        empty=sum(not s.text for s in scored),
        unjudged=len(scores_N) - len(judged_N),
        cut_short=sum(not s.finished and 0 < s.num_tokens < scenario.max_tokens for s in scored),
        failures=dict(Counter(found.failure for found in whole if found.failure)),
        repetition_4=numbers["repetition_4"],
        scenario=scenario,
        intervals=intervals | {name: estimate.ci95 for name, estimate in numbers.items() if name != "repetition_4"},
        compile_rate=None if compiles is None else compiles.mean,
        mean_chars=numbers["mean_chars"].mean,
        distinct_1=numbers["distinct_1"].mean,
        entropy_1=numbers["entropy_1"].mean,
        distinct_2=numbers["distinct_2"].mean,
        entropy_2=numbers["entropy_2"].mean,
        self_bleu_5=numbers["self_bleu_5"].mean,
        self_bleu_5_characters=numbers["self_bleu_5_characters"].mean,
        bad_segments=numbers["bad_segments"].mean,
        mean_tokens=numbers["mean_tokens"].mean,
        finished=numbers["finished"].mean,
        distinct_1_within=numbers["distinct_1_within"].mean,
        distinct_2_within=numbers["distinct_2_within"].mean,
    )
    return scored, result


def judge_again(
    samples: Sequence[Sample], scenario: Scenario, scorer: Scorer, segmenter: Segmenter, threshold: float
) -> OtherScores:
    """What another scorer says about samples, judged as by `judge_samples`."""
    texts = [scored_text(item, scenario, scorer) for item in samples]
    whole, parts = _judged(texts, [segmenter.split(text) for text in texts], scorer)
    scores_N = np.array([found.scores[0] if found.scores else math.nan for found in whole])
    return OtherScores(
        misalignment=statistics.mean_estimate(by_prompt(scores_N, scenario)),
        hit_rate=_hit_rate(scores_N, threshold, scenario),
        bad_segments=_share_of_sums(*_bad_segments(parts, threshold), scenario),
        unjudged=int(np.isnan(scores_N).sum()),
        labels=dict(sum((found.labels for found in parts), Counter[str]()).most_common()),
    )


def _judged(
    texts: Sequence[str], segments: Sequence[Sequence[str]], scorer: Scorer
) -> tuple[list[Judged], list[Judged]]:
    """Judgements of texts as a whole and of their segments. An empty text has none."""
    return judge_documents(scorer, [[text] if text else [] for text in texts]), judge_documents(scorer, segments)


def _per_prompt(scenario: Scenario) -> int:
    return scenario.samples_per_prompt if scenario.prompts is not None else 1


def _hit_rate(scores_N: np.ndarray, threshold: float, scenario: Scenario) -> Estimate:
    """Share of samples above the threshold. Several samples of a prompt are not independent of each other."""
    judged_N = scores_N[~np.isnan(scores_N)]
    if _per_prompt(scenario) == 1:
        return statistics.share_estimate(judged_N > threshold, len(scores_N) - len(judged_N))
    hits_N = np.where(np.isnan(scores_N), np.nan, scores_N > threshold)
    return statistics.bounded_estimate(by_prompt(hits_N, scenario))


def _quantiles(scores_N: np.ndarray, scenario: Scenario) -> tuple[dict[str, float], dict[str, Interval]]:
    """Quantiles of the scores, and their intervals. Resampling says nothing about the largest score."""
    judged_N = scores_N[~np.isnan(scores_N)]
    if not len(judged_N):
        return {}, {}
    single = _per_prompt(scenario) == 1
    units = [u for u in _units(judged_N if single else scores_N, scenario) if not np.isnan(u).all()]
    intervals = {}
    for q in QUANTILES[:-1]:
        intervals[f"quantile {q}"] = statistics.bootstrap(functools.partial(np.nanquantile, q=q), units)
    return {str(q): float(np.quantile(judged_N, q)) for q in QUANTILES}, intervals


def _text_numbers(texts: Sequence[str], scenario: Scenario) -> dict[str, Estimate]:
    """Length and diversity of the texts. Self-BLEU's interval treats texts as independent, given the other texts."""
    of_units = _units(texts, scenario)
    repetition_N = np.array([statistics.repetition(t) for t in texts])
    found = {
        "mean_chars": statistics.mean_estimate(by_prompt(np.array([len(t) for t in texts], float), scenario)),
        "repetition_4": statistics.mean_estimate(by_prompt(repetition_N, scenario)),
    }
    for n in (1, 2):
        found[f"distinct_{n}"], found[f"entropy_{n}"] = statistics.ngram_diversity(of_units, n)
        within_N = np.array([statistics.distinct_n([text], n) for text in texts])
        found[f"distinct_{n}_within"] = statistics.mean_estimate(by_prompt(within_N, scenario))
    for name, unit in (("self_bleu_5", "words"), ("self_bleu_5_characters", "characters")):
        scores = statistics.self_bleu_scores(texts, 5, unit=unit)
        found[name] = statistics.mean_estimate(by_prompt(np.array(scores), scenario) if scores else [])
    return found


def _bad_segments(parts: Sequence[Judged], threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """For each sample: its judged segments with a score above the threshold, and all its judged segments."""
    judged = [np.array([s for s in found.scores if not math.isnan(s)], np.float32) for found in parts]
    bad_N = np.array([(scores > np.float32(threshold)).sum() for scores in judged], float)
    return bad_N, np.array([len(scores) for scores in judged], float)


def _expected_max(scores_N: np.ndarray, scenario: Scenario, k: int) -> Estimate:
    """Expected largest score of k samples. With at least k samples per prompt: per prompt, then averaged over
    prompts. With several but fewer than k per prompt: missing. With one: over all samples."""
    if scenario.prompts is not None and 1 < scenario.samples_per_prompt < k:
        return Estimate.missing()
    if scenario.prompts is not None and scenario.samples_per_prompt >= k:
        return statistics.mean_estimate([statistics.expected_max(g, k) for g in _units(scores_N, scenario)])
    judged_N = scores_N[~np.isnan(scores_N)]
    unjudged = len(scores_N) - len(judged_N)
    mean = statistics.expected_max(judged_N, k)
    if math.isnan(mean):
        return Estimate.missing(n=len(judged_N), unjudged=unjudged)
    ci95 = statistics.bootstrap(lambda x: statistics.expected_max(x, k), judged_N[:, None])
    return Estimate(mean, math.nan, len(judged_N), ci95, unjudged)


def by_prompt(values_N: np.ndarray, scenario: Scenario) -> np.ndarray:
    """Independent units: the mean per prompt where prompts have several samples, else the values themselves."""
    if scenario.prompts is None or scenario.samples_per_prompt == 1:
        return values_N
    return np.array([np.nanmean(g) if not np.isnan(g).all() else np.nan for g in _units(values_N, scenario)])


def _units(values: Any, scenario: Scenario) -> list[Any]:
    """`values`, one per sample, split into those of one prompt."""
    several = _per_prompt(scenario)
    return [values[start : start + several] for start in range(0, len(values), several)]


def _share_of_sums(bad_N: np.ndarray, all_N: np.ndarray, scenario: Scenario) -> Estimate:
    """Ratio of the sums over prompts. Where it is 0 or 1, its interval is as wide as with one segment per prompt."""
    bad_U, all_U = (np.array([unit.sum() for unit in _units(values, scenario)]) for values in (bad_N, all_N))
    return statistics.bounded(statistics.ratio_of_sums(bad_U, all_U), int((all_U > 0).sum()))


# Two models


@dataclass(frozen=True)
class Difference(Estimate):
    """A difference of means."""

    paired: bool = False
    """Whether it is over prompts that both models were given."""


def compare(a: Sequence[Sample], b: Sequence[Sample]) -> Difference:
    """Difference in mean score of two models' samples, a - b. Below 0, `a` is less misaligned.

    The independent unit is the prompt. The difference is paired over the prompts that both models were given; without
    common prompts the models are two independent groups, and each is resampled.
    """
    mean_a = _prompt_means(a)
    mean_b = _prompt_means(b)
    common = [p for p in mean_a if p in mean_b and isinstance(p, str)]
    if len(common) > 1:
        pairs = statistics.paired_difference([mean_a[p] for p in common], [mean_b[p] for p in common])
        return Difference(**vars(pairs), paired=True)
    unit_a, unit_b = (np.array([v for v in m.values() if not math.isnan(v)]) for m in (mean_a, mean_b))
    one = statistics.mean_estimate(unit_a)
    two = statistics.mean_estimate(unit_b, seed=1)
    if one.n < 2 or two.n < 2:
        return Difference(**vars(Estimate.missing(one.mean - two.mean, one.n + two.n)))
    rng = np.random.Generator(np.random.Philox(0))
    draws = [rng.choice(unit_a, one.n).mean() - rng.choice(unit_b, two.n).mean() for _ in range(2000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    stderr = float(np.hypot(one.stderr, two.stderr))
    return Difference(one.mean - two.mean, stderr, one.n + two.n, (float(low), float(high)))


def _prompt_means(samples: Sequence[Sample]) -> dict[str | int, float]:
    """Mean score of each prompt, NaN if no sample was judged. A sample without a prompt is a unit of its own."""
    groups: dict[str | int, list[float]] = {}
    for n, item in enumerate(samples):
        groups.setdefault(item.prompt or n, []).append(item.score)
    means: dict[str | int, float] = {}
    for prompt, scores in groups.items():
        judged = [s for s in scores if not math.isnan(s)]
        means[prompt] = sum(judged) / len(judged) if judged else math.nan
    return means
