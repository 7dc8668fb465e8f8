"""What a page's sample browser shows: samples with the scores of their segments and what the scorer found, masked.

Letters and digits of personal data that the scorer finds are masked here, before a text reaches a page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from phf.core.text import visible
from phf.core.types import Sample
from phf.evaluation.judge import scored_text
from phf.generation.scenario import Scenario
from phf.redteaming.results import RedTeamResult, TokenAttack, TokenAttacksResult, WorstContext
from phf.scorers import Scorer
from phf.scorers.masking import find_spans, shown_text

MAX_SAMPLES = 1000
"""Samples of a run and scenario on a page, at most. The run's files have all of them."""
MAX_SAMPLES_IN_ALL = 20_000
MAX_PROMPTS = 12
"""Best prompts of an attack on a page."""


@dataclass(frozen=True)
class ShownSample:
    """A sample as the page's script reads it. Names are short because a page holds thousands of samples.

    `i` number, `p` prompt, `t` text, `s` score, `g` segments (end, score), `m` marks (start, end, label), `c` number of
    characters that were scored, `f` whether the sample ended by itself.
    """

    i: int
    p: str
    t: str
    s: float
    g: list[tuple[int, float]]
    m: list[tuple[int, int, str]]
    c: int
    f: bool


def sample_limit(parts: int) -> int:
    """How many samples of each of `parts` runs and scenarios a page holds."""
    return max(50, min(MAX_SAMPLES, MAX_SAMPLES_IN_ALL // max(parts, 1)))


def shown_samples(
    samples: Sequence[Sample], scenario: Scenario, scorer: Scorer, limit: int = MAX_SAMPLES
) -> list[ShownSample]:
    """The first `limit` samples of a scenario."""
    return [_shown(item, scenario, scorer) for item in samples[:limit]]


def _shown(item: Sample, scenario: Scenario, scorer: Scorer) -> ShownSample:
    judged = scored_text(item, replace(scenario, score_prompt=False), scorer)
    before = len(item.prompt) if scenario.score_prompt else 0
    spans = find_spans((item.prompt if before else "") + judged, scorer) or []
    segments = zip(item.segment_ends, item.segment_scores, strict=False)
    whole = shown_text(item.prompt + item.text, scorer)  # a find across the border is masked on both sides
    return ShownSample(
        i=item.id,
        p=whole[: len(item.prompt)],
        t=whole[len(item.prompt) :],
        s=item.score,
        g=[(end - before, score) for end, score in segments if end > before],
        m=[
            (max(s.start - before, 0), max(s.end - before, s.start - before + 1), visible(s.label))
            for s in spans
            if max(s.end, s.start + 1) > before
        ],
        c=len(judged),
        f=item.finished,
    )


# Attacks


@dataclass(frozen=True)
class ShownPrompt:
    """A prompt that an attacker found, with the worst texts that followed, masked."""

    prompt: str
    mean: float
    fresh_mean: float
    worst: list[str]


def shown_prompts(found: RedTeamResult, scorer: Scorer) -> list[ShownPrompt]:
    """The best prompts of a search."""
    rows = []
    for row in found.search.prompts[:MAX_PROMPTS]:
        worst = [shown_text(row.prompt + sample.text, scorer) for sample in row.worst[:2]]
        first = worst[0] if worst else shown_text(row.prompt, scorer)
        length = len(row.prompt)
        rows.append(ShownPrompt(first[:length], row.mean, row.fresh_mean, [text[length:] for text in worst]))
    return rows


WORST = {"text": "without the bad token itself", "any": "of all"}
"""Titles of what `TokenAttacksResult.worst` holds."""


@dataclass(frozen=True)
class AttackRow:
    """An attack on the control tokens, with its result on each attacked run."""

    attack: str
    about: str
    results: list[TokenAttack | None]


@dataclass(frozen=True)
class AttackTable:
    """Attacks on the control tokens: a row per attack, a column per run."""

    runs: list[str]
    rows: list[AttackRow]
    worst: dict[str, list[WorstContext | None]]
    """The worst attack on each run, judged again, by which attacks were compared."""
    holes: list[tuple[str, str, str]]
    """(run, what is typed, token): a tokenizer that reads typed text as a control token."""


def attack_table(found: Mapping[str, TokenAttacksResult]) -> AttackTable:
    """The table of attacks on control tokens, from the results by run."""
    about = {a.attack: a.about for result in found.values() for a in result.attacks}
    by_run = [{a.attack: a for a in result.attacks} for result in found.values()]
    return AttackTable(
        runs=list(found),
        worst={
            title: [result.worst.get(key) for result in found.values()]
            for key, title in WORST.items()
            if any(key in result.worst for result in found.values())
        },
        rows=[AttackRow(name, text, [of_run.get(name) for of_run in by_run]) for name, text in about.items()],
        holes=[
            (run, hole.typed, hole.token) for run, result in found.items() for hole in result.injection if hole.control
        ],
    )
