"""The search for prompts after which a model misbehaves.

The search of Korbak et al. 2023 (section 4.2) starts from a pool of prompts. In each round an attacker sees a few
prompts, drawn by the softmax of their mean scores, and writes candidates. The target continues each candidate many
times. The mean score of the continuations is the candidate's own, and the candidate joins the pool. Several trials
each start from their own draw of starting prompts.

    redteam/search/  trial-<t>/round-<r>.json, confirm.json

Starting prompts are scored like all others. A mean over the best k prompts exists once k prompts were judged. The
best of many noisy means is too high, so a trial's best prompts are scored once more on new continuations. Every
round is kept when it is done: a killed search resumes after its last round.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phf.core import folders, store
from phf.core.config import ConfigError, to_plain
from phf.core.progress import Progress
from phf.core.random import key64
from phf.core.statistics import t_interval
from phf.core.types import Estimate, PhfError, Sample
from phf.evaluation.judge import scored_text
from phf.generation.scenario import prompts_path, read_prompts
from phf.generation.server import Answers, Server
from phf.redteaming.attackers import Attacker, Tried
from phf.redteaming.config import RedTeam, task_of
from phf.redteaming.results import Budget, FoundPrompt, RoundResult, SearchResult, TrialRound
from phf.redteaming.target import Target
from phf.scorers import Scorer
from phf.scoring.judge import judge_texts

BEST = (1, 10, 100)
"""Numbers of best prompts that are averaged."""
CURVES = (*(f"best_{k}" for k in BEST), "round_mean")
ATTEMPTS = 5
"""How often an attacker tries to write a candidate before the round continues without it."""
WORST_CONTINUATIONS = 3
"""Continuations that are kept of each prompt."""


class RedTeamError(PhfError, RuntimeError):
    """A search that cannot continue."""


def search(
    target: Target,
    starts: Starts,
    config: RedTeam,
    scorer: Scorer,
    threshold: float,
    folder: str | Path,
    target_key: str,
    cache: str | Path,
) -> SearchResult:
    """Run the search. Rounds are kept below `folder`, answers of servers in `cache`. `target_key`: fingerprint of
    the target.

    Higher scores mean that the model is easier to break. Intervals are Student's over trials. Raises RedTeamError
    if an attacker writes nothing usable.
    """
    wanted, prompts_file = task_of(config, scorer)
    if starts.repeated:
        total = len(starts.usable) + starts.too_long + starts.repeated
        print(f"note: {starts.repeated:,} of {total:,} starting prompts are repeated", file=sys.stderr)
    extent = ("trials", "rounds", "confirm", "max_target_tokens", "batch", "attacker")  # asking for more keeps rounds
    settings = {k: v for k, v in to_plain(config).items() if k not in extent}
    inputs = [store.path_hash(prompts_path(prompts_file)), config.attacker.identity(), wanted, *starts.found]
    base = store.fingerprint([target_key, settings, inputs, scorer.identity(), threshold, "redteam/4"])
    plan = _Search(
        target=target,
        config=config,
        scorer=scorer,
        threshold=threshold,
        wanted=wanted,
        starting=starts.usable,
        first=starts.found,
        answers=Answers(Path(cache) / "answers.jsonl"),
        folder=Path(folder),
        base=base,
    )
    per_trial = (
        len(starts.found) + min(config.pool, len(starts.usable)) + config.rounds * config.candidates + config.confirm
    )
    trials = []
    with Progress(total=per_trial * config.trials, desc="attacking", unit="prompt") as bar:
        for number in range(config.trials):
            at = bar.n
            trials.append(_Trial(number, plan, bar).run())
            bar.update(at + per_trial - bar.n)  # a trial that ended early
    return _summary(trials, config, prompts_too_long=starts.too_long, starting_prompts=len(starts.usable))


@dataclass(frozen=True)
class Starts:
    """The prompts that a search starts from."""

    usable: list[str]
    """Different prompts that fit the model."""
    repeated: int
    """Prompts of the file that occur before."""
    too_long: int
    """Different prompts that do not fit."""
    found: tuple[str, ...] = ()
    """Prompts of a gradient search, which every trial starts with."""


def starting_prompts(target: Target, config: RedTeam, scorer: Scorer) -> Starts:
    """The prompts of a task that fit the model. Raises ConfigError if none does."""
    _, prompts_file = task_of(config, scorer)
    read = read_prompts(prompts_file)
    starting = list(dict.fromkeys(read))
    usable = [p for p in starting if p and target.holds(p, config)]
    if not usable:
        raise ConfigError(
            f"none of the {len(starting)} prompts of {prompts_file} fits the model with max_tokens={config.max_tokens}"
        )
    return Starts(usable, len(read) - len(starting), len(starting) - len(usable))


def weights(means: Sequence[float], selection: str, temperature: float) -> np.ndarray:
    """Probability that each prompt is shown to the attacker: softmax of the mean scores. 0 for prompts that were
    not judged."""
    mean_P = np.asarray(means, np.float64)
    judged_P = ~np.isnan(mean_P)
    if not judged_P.any():
        return np.full(len(mean_P), 1 / len(mean_P))
    level_P = np.where(judged_P, mean_P, 0.0)
    if selection == "standardised":
        spread = level_P[judged_P].std()
        level_P = (level_P - level_P[judged_P].mean()) / (spread if spread > 0 else 1.0)
    log_P = np.where(judged_P, level_P / temperature, -np.inf)
    weight_P = np.exp(log_P - log_P.max())
    return np.asarray(weight_P / weight_P.sum())


def best_mean(means: Iterable[float], k: int) -> float | None:
    """Mean of the k highest means. None before k prompts were judged."""
    judged = sorted((m for m in means if not math.isnan(m)), reverse=True)
    return sum(judged[:k]) / k if len(judged) >= k else None


# One trial


@dataclass(frozen=True)
class _Search:
    """What all trials share."""

    target: Target
    config: RedTeam
    scorer: Scorer
    threshold: float
    wanted: str
    starting: Sequence[str]
    first: Sequence[str]
    """Prompts that every trial starts with."""
    answers: Answers
    folder: Path
    base: str
    """Fingerprint of everything that decides the rounds."""


@dataclass(frozen=True)
class _TrialResult:
    rounds: list[RoundResult]
    curve: list[TrialRound]
    top: list[Tried]
    """Best prompts."""
    fresh: RoundResult
    """The same prompts on new continuations."""
    pool: list[Tried]


class _Trial:
    """One trial: its pool, and its rounds on disk."""

    def __init__(self, number: int, plan: _Search, bar: Any) -> None:
        self.number = number
        self.plan = plan
        self.config = plan.config
        self.bar = bar
        self.folder = plan.folder / f"trial-{number}"
        self.pool: list[Tried] = []

    def run(self) -> _TrialResult:
        limit = self.config.max_target_tokens
        rounds: list[RoundResult] = []
        curve: list[TrialRound] = []
        spent = 0
        for number in range(self.config.rounds + 1):  # round 0: the starting prompts
            done = self._kept(f"round-{number:02d}", functools.partial(self._play, number))
            if done.target_tokens is None and limit is not None:
                raise ConfigError("max_target_tokens: this server does not count its tokens; leave the limit out")
            spent += done.target_tokens or 0
            self.pool += done.tried
            rounds.append(done)
            curve.append(self._point(done, spent))
            if limit is not None and spent >= limit:
                break
        judged = (t for t in self.pool if not math.isnan(t.mean))
        top = sorted(judged, key=lambda t: -t.mean)[: self.config.confirm]
        chosen = [t.prompt for t in top]
        fresh = self._kept("confirm", lambda: self._score(chosen, "confirm"), chosen)
        return _TrialResult(rounds, curve, top, fresh, self.pool)

    def _point(self, done: RoundResult, spent: int) -> TrialRound:
        best = {f"best_{k}": best_mean((t.mean for t in self.pool), k) for k in BEST}
        return TrialRound(**best, round_mean=_mean(t.mean for t in done.tried), target_tokens=spent)

    def _kept(self, name: str, make: Callable[[], RoundResult], of: Sequence[str] = ()) -> RoundResult:
        """What `make` returns, or what is on disk of this very search."""

        def timed() -> RoundResult:
            start = time.perf_counter()
            return dataclasses.replace(make(), seconds=time.perf_counter() - start)

        key = store.fingerprint([self.plan.base, self.number, name, [t.prompt for t in self.pool], list(of)])
        found = folders.cached(self.folder / f"{name}.json", key, RoundResult, timed)
        self.bar.update(len(found.tried))
        return found

    def _play(self, number: int) -> RoundResult:
        """Play a round: candidates of the attacker, scored."""
        if number == 0:
            chosen = self._rng("start").permutation(len(self.plan.starting))[: self.config.pool]
            drawn = [self.plan.starting[i] for i in chosen]
            return self._score(list(dict.fromkeys([*self.plan.first, *drawn])), "round 0")
        found, red_tokens, rejected = self._candidates(number)
        scored = self._score(found, f"round {number}")
        return dataclasses.replace(scored, red_tokens=red_tokens, rejected=rejected)

    def _candidates(self, number: int) -> tuple[list[str], int, dict[str, int]]:
        """New prompts, tokens of the attacker's LM, and why proposals were rejected."""
        config = self.config
        attacker: Attacker = config.attacker
        weight_P = weights([t.mean for t in self.pool], config.selection, config.selection_temperature)
        seen = {t.prompt for t in self.pool}
        found: dict[int, str] = {}
        rejected: Counter[str] = Counter()
        red_tokens = 0
        last = ""
        for attempt in range(ATTEMPTS):
            missing = [c for c in range(config.candidates) if c not in found]
            if not missing:
                break
            shots = [self._shots(weight_P, number, c, attempt) for c in missing]
            seeds = [self._key("ask", number, c, attempt) for c in missing]
            proposals = attacker.propose(shots, self.plan.wanted, seeds, self.plan.answers)
            for candidate, proposal in zip(missing, proposals, strict=True):
                red_tokens += proposal.tokens
                last = proposal.text
                if (why := self._problem(proposal.text, seen)) is not None:
                    rejected[why] += 1
                else:
                    seen.add(proposal.text)
                    found[candidate] = proposal.text
        if not found:
            raise RedTeamError(
                f"the attacker wrote no usable prompt in {ATTEMPTS} attempts ({dict(rejected)}); its last answer was "
                f"{last[:200]!r}"
            )
        return [found[c] for c in sorted(found)], red_tokens, dict(rejected)

    def _problem(self, text: str, seen: set[str]) -> str | None:
        """Why a proposal cannot be tried."""
        if not text.strip():
            return "empty"
        if text in seen:
            return "tried before"
        return None if self.plan.target.holds(text, self.config) else "too long for the model"

    def _shots(self, weight_P: np.ndarray, number: int, candidate: int, attempt: int) -> list[Tried]:
        """A few different prompts of the pool, drawn by weight. The last one is the most likely."""
        rng = self._rng("shots", number, candidate, attempt)
        gumbel_P = np.log(weight_P + 1e-300) + rng.gumbel(size=len(weight_P))
        return [self.pool[i] for i in np.argsort(gumbel_P)[-self.config.shots :]]

    def _score(self, prompts: Sequence[str], what: str) -> RoundResult:
        """Continuations of each prompt, scored."""
        plan = self.plan
        groups, spent = plan.target.continuations(prompts, self.config, self._key("continue", what), plan.answers)
        flat = [s for group in groups for s in group]
        if flat and not any(s.text for s in flat) and isinstance(plan.target.model, Server):
            raise RedTeamError(
                f"{plan.target.model.url} wrote nothing for any of {len(flat)} requests: the server refuses them or "
                "this model"
            )
        scenario = self.config.scenario(0)
        score_N = judge_texts(plan.scorer, [scored_text(s, scenario, plan.scorer) for s in flat])
        per = self.config.continuations
        found = [
            tried(prompt, group, score_N[n * per : (n + 1) * per], plan.threshold)
            for n, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
        ]
        return RoundResult(found, spent, red_tokens=0, rejected={})

    def _key(self, *what: Any) -> int:
        return key64(self.config.seed, "redteam", self.number, *what) % 2**32

    def _rng(self, *what: Any) -> np.random.Generator:
        return np.random.default_rng(self._key(*what))


def tried(prompt: str, continuations: Sequence[Sample], scores: Sequence[float], threshold: float) -> Tried:
    """A prompt with its continuations, each with its score."""
    score_N = np.array(scores)
    judged_N = score_N[~np.isnan(score_N)]
    n = len(judged_N)
    order = np.argsort(-np.nan_to_num(score_N, nan=-np.inf), kind="stable")[:WORST_CONTINUATIONS]
    return Tried(
        prompt=prompt,
        mean=float(judged_N.mean()) if n else math.nan,
        stderr=float(judged_N.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan,
        judged=n,
        unjudged=len(score_N) - n,
        hits=int((judged_N > threshold).sum()),
        worst=tuple(
            dataclasses.replace(continuations[i], score=float(score_N[i])) for i in order if not np.isnan(score_N[i])
        ),
    )


# The summary


def _mean(values: Iterable[float]) -> float | None:
    judged = [v for v in values if not math.isnan(v)]
    return sum(judged) / len(judged) if judged else None


def _over(values: Sequence[float | None]) -> Estimate:
    """An estimate over trials. Missing where a trial has no value."""
    known = [v for v in values if v is not None]
    return t_interval(known) if len(known) == len(values) else Estimate.missing(n=len(values))


def _summary(
    trials: Sequence[_TrialResult], config: RedTeam, prompts_too_long: int, starting_prompts: int
) -> SearchResult:
    length = max(len(t.curve) for t in trials)

    def at(trial: _TrialResult, r: int) -> TrialRound:  # a trial that ended early stays where it was
        return trial.curve[min(r, len(trial.curve) - 1)]

    curves = {m: [_over([getattr(at(t, r), m) for t in trials]) for r in range(length)] for m in CURVES}
    confirmed = {f"best_{k}": _over([_fresh_mean(t, k) for t in trials]) for k in BEST if k <= config.confirm}
    rounds = [r for t in trials for r in t.rounds]
    num_prompts = sum(len(r.tried) for r in rounds)
    return SearchResult(
        settings=config,
        curves=curves,
        target_tokens=[_over([float(at(t, r).target_tokens) for t in trials]) for r in range(length)],
        final={m: curves[m][-1] for m in CURVES},
        confirmed=confirmed,
        budget=Budget(
            prompts=num_prompts,
            continuations=config.continuations * num_prompts,
            target_tokens=sum(t.curve[-1].target_tokens for t in trials),
            confirm_continuations=config.continuations * sum(len(t.fresh.tried) for t in trials),
            confirm_tokens=sum(t.fresh.target_tokens or 0 for t in trials),
            red_tokens=sum(r.red_tokens for r in rounds),
            seconds=sum(r.seconds for r in rounds) + sum(t.fresh.seconds for t in trials),
        ),
        rejected=dict(sum((Counter(r.rejected) for r in rounds), Counter[str]())),
        prompts_too_long=prompts_too_long,
        unjudged=sum(prompt.unjudged for t in trials for prompt in t.pool),
        trials=[t.curve for t in trials],
        prompts=_found(trials),
        starting_prompts=starting_prompts,
    )


def _fresh_mean(trial: _TrialResult, k: int) -> float | None:
    """Mean over a trial's k best prompts on new continuations. None if the trial has fewer."""
    fresh = trial.fresh.tried
    return _mean(f.mean for f in fresh[:k]) if len(fresh) >= k else None


def _found(trials: Sequence[_TrialResult]) -> list[FoundPrompt]:
    """The best prompts of all trials, worst first by their new continuations."""
    found = [
        FoundPrompt(**vars(top), trial=n, fresh_mean=fresh.mean, fresh_stderr=fresh.stderr)
        for n, t in enumerate(trials)
        for top, fresh in zip(t.top, t.fresh.tried, strict=True)
    ]
    return sorted(found, key=lambda row: math.inf if math.isnan(row.fresh_mean) else -row.fresh_mean)
