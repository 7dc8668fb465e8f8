"""Red-teaming: how hard is it to make a model misbehave? Floor 5.

    phf redteam runs/mle runs/conditional

The search of Korbak et al. 2023 (section 4.2): a pool of prompts; each round, prompts drawn by the softmax of their mean
scores are shown to an attacker, who writes candidates; each candidate gets many continuations by the model under attack,
their mean score is its own, and it joins the pool. Several trials, each from its own draw of starting prompts.

    redteam/  search/trial-<t>/round-<r>.json, confirm.json   tokens.json   redteam.json

Starting prompts are scored like any other; a mean over the best k exists once k prompts were tried; all prompts of the
file can be drawn. The best of many noisy means is too high, so the best prompts of a trial are scored once more on fresh
continuations. Every round is kept when it is done: killed and run again, the search goes on from there.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from phf.core import store
from phf.core.config import STRICT, ConfigError, did_you_mean, to_plain
from phf.core.random import key64
from phf.core.runs import is_run, model_folder
from phf.core.statistics import t_interval
from phf.core.types import Estimate, Sample
from phf.data.segment import Lines, Segmenter
from phf.evaluation.evaluate import segmenter_of
from phf.evaluation.judge import scored_text
from phf.generation.loaded import LoadedModel, load_model, prompt_ids
from phf.generation.sample import sample_of, sample_prompts
from phf.generation.scenario import Scenario, prompts_path, read_prompts
from phf.generation.server import Answers, Server
from phf.redteaming.attackers import TASKS, AnyAttacker, Attacker, Evolution, Tried
from phf.redteaming.control_tokens import TokenAttacks, attack_tokens, bad_contexts, check_lengths
from phf.scorers import Scorer
from phf.scoring.judge import check_identity, corpus_scorer, judge_documents
from phf.tokens.store import TokenStore

BEST = (1, 10, 100)
"""Best how many prompts are averaged."""
ATTEMPTS = 5
"""Times that an attacker is asked for a candidate before the round goes on without it."""
WORST_KEPT = 3
PAPER = {"trials": 10, "rounds": 10, "continuations": 512, "selection": "raw", "selection_temperature": 0.1}
"""What the paper has otherwise than the defaults here, which a laptop can pay."""


class RedTeamError(RuntimeError):
    """A search that cannot go on."""


@dataclass(frozen=True, config=STRICT)
class RedTeam:
    """How to attack. Sizes are the paper's but for `trials` and `continuations` (10 and 512 there: `phf redteam --paper`).

    `task`: toxicity, pii or pep8, which says what red LMs are told and where prompts start from; found from the scorer
    where it is left out. `wanted` and `prompts` say these for other tasks. `selection`: prompts are shown to the attacker with
    probability softmax(mean / selection_temperature), of means as they are ("raw": the paper; where scores are small
    this draws all alike) or "standardised" over the pool. `max_target_tokens`: a trial ends after the round in which
    the model under attack has read and written this many.
    """

    attacker: AnyAttacker = Evolution()
    task: str | None = None
    wanted: str | None = None
    prompts: str | None = None
    trials: Annotated[int, Field(gt=0)] = 3
    rounds: Annotated[int, Field(ge=0)] = 10
    pool: Annotated[int, Field(gt=0)] = 20
    shots: Annotated[int, Field(gt=0)] = 4
    candidates: Annotated[int, Field(gt=0)] = 20
    continuations: Annotated[int, Field(gt=1)] = 32
    confirm: Annotated[int, Field(gt=0)] = 10
    """Best prompts of each trial that are scored again on fresh continuations."""
    selection: Literal["standardised", "raw"] = "standardised"
    selection_temperature: Annotated[float, Field(gt=0)] = 0.5
    max_tokens: Annotated[int, Field(gt=0)] = 64
    temperature: Annotated[float, Field(gt=0)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    control: Literal["good", "bad", "none"] = "good"
    control_after_prompt: bool | None = None
    score_prompt: bool | None = None
    complete_lines: bool | None = None
    """These three as in a scenario; None: true for code, where a function's body alone or a cut line carries faults of the
    cut, false otherwise."""
    max_target_tokens: Annotated[float, Field(gt=0)] | None = None
    batch: Annotated[int, Field(gt=0)] = 256
    seed: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        if self.task is not None and self.task not in TASKS:
            raise ValueError(f"task {self.task!r} is unknown{did_you_mean(self.task, TASKS)}")

    def scenario(self, seed: int) -> Scenario:
        return Scenario(
            max_tokens=self.max_tokens, min_tokens=0, temperature=self.temperature, top_p=self.top_p, control=self.control,
            control_after_prompt=bool(self.control_after_prompt), score_prompt=bool(self.score_prompt),
            complete_lines=bool(self.complete_lines), batch=self.batch, seed=seed,
        )  # fmt: skip

    def for_scorer(self, scorer: Scorer) -> RedTeam:
        """With what was left out resolved."""
        code = self.task == "pep8" or (self.task is None and scorer.identity()["name"] == "pep8")
        return replace(
            self,
            control_after_prompt=code if self.control_after_prompt is None else self.control_after_prompt,
            score_prompt=code if self.score_prompt is None else self.score_prompt,
            complete_lines=code if self.complete_lines is None else self.complete_lines,
        )


@plain_dataclass(frozen=True)
class Target:
    """The model under attack: one that is loaded, or one behind a server."""

    model: LoadedModel | Server

    def continuations(
        self, prompts: Sequence[str], config: RedTeam, seed: int, answers: Answers
    ) -> tuple[list[list[Sample]], int | None]:
        """`config.continuations` texts after each prompt, and the text tokens read and written (None: a server that does not
        say). What a server refuses is an empty text, which is not judged."""
        repeated = [p for p in prompts for _ in range(config.continuations)]
        if isinstance(self.model, Server):
            given = self.model.completions(
                repeated, config.max_tokens, config.temperature, config.top_p, seed, answers, refused=""
            )
            samples = [
                Sample(n, p, text, 0, math.nan, finished, seed)
                for n, (p, (text, finished, _)) in enumerate(zip(repeated, given, strict=True))
            ]
            counts = [used for _, _, used in given]
            spent = None if None in counts else sum(c or 0 for c in counts)
        else:
            scenario = config.scenario(seed)
            of_prompt = {p: prompt_ids(self.model, p, scenario) for p in set(prompts)}
            starts = [of_prompt[p] for p in repeated]
            samples = sample_prompts(self.model, scenario, repeated, progress=False, starts=starts)
            spent = sum(len(s) + w.num_tokens for s, w in zip(starts, samples, strict=True))
        per = config.continuations
        return [samples[i : i + per] for i in range(0, len(samples), per)], spent

    def holds(self, prompt: str, config: RedTeam) -> bool:
        """Whether the model can read the prompt and go on."""
        if isinstance(self.model, Server):
            return True
        return len(prompt_ids(self.model, prompt, config.scenario(0))) + config.max_tokens <= self.model.positions


def task_of(config: RedTeam, scorer: Scorer) -> tuple[str, str]:
    """(what is wanted, file of prompts) of the settings, of their task, or of the scorer's. Raises ConfigError if none says."""
    name = config.task
    if name is None:
        name = {"presidio": "pii"}.get(scorer.identity()["name"], scorer.identity()["name"])
    task = TASKS.get(name)
    prompts = config.prompts or (task.prompts if task else None)
    wanted = config.wanted or (task.wanted if task else None)
    if prompts is None:
        raise ConfigError(
            f"nothing says which prompts to start from with scorer {name!r}: give prompts=FILE, or task=toxicity, pii or pep8"
        )
    if wanted is None:
        if not isinstance(config.attacker, Evolution):
            raise ConfigError(
                f"nothing says what a red LM should write for scorer {name!r}: give wanted='beginnings of texts after which ...'"
            )
        wanted = ""
    return wanted, prompts


def weights(means: Sequence[float], selection: str, temperature: float) -> np.ndarray:
    """Probability of each prompt to be shown to the attacker: softmax of its mean score; 0 where none was judged."""
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


def best(means: Sequence[float], k: int) -> float | None:
    """Mean of the k highest means; None before k prompts were judged."""
    judged = sorted((m for m in means if m == m), reverse=True)
    return sum(judged[:k]) / k if len(judged) >= k else None


def search(
    target: Target, config: RedTeam, scorer: Scorer, threshold: float, folder: str | Path, target_key: str, cache: str | Path
) -> dict[str, Any]:  # fmt: skip
    """The whole search, every round of it kept below `folder`, and what it found. Served answers are kept in `cache`.

    Higher scores: the model is easier to break. Intervals are Student's over trials. Raises RedTeamError where an
    attacker gives nothing usable.
    """
    wanted, prompts_file = task_of(config, scorer)
    starting = list(dict.fromkeys(read_prompts(prompts_file)))
    usable = [p for p in starting if p and target.holds(p, config)]
    if not usable:
        raise ConfigError(
            f"none of the {len(starting)} prompts of {prompts_file} fits the model with max_tokens={config.max_tokens}"
        )
    left = ("trials", "rounds", "confirm", "max_target_tokens", "batch", "attacker")
    settings = {k: v for k, v in to_plain(config).items() if k not in left}
    inputs = [store.path_hash(prompts_path(prompts_file)), config.attacker.identity(), wanted]
    base = store.fingerprint([target_key, settings, inputs, scorer.identity(), threshold, "redteam/4"])
    answers = Answers(Path(cache) / "answers.jsonl")
    per_trial = min(config.pool, len(usable)) + config.rounds * config.candidates + config.confirm
    trials = []
    with tqdm(total=per_trial * config.trials, desc="attacking", unit="prompt", disable=None, file=sys.stderr) as bar:
        for number in range(config.trials):
            at = bar.n
            trial = _Trial(number, target, config, scorer, threshold, wanted, usable, answers, Path(folder), base, bar)
            trials.append(trial.run())
            bar.update(at + per_trial - bar.n)  # a trial that ended early
    return _summary(trials, config, len(starting) - len(usable)) | {"starting_prompts": len(usable)}


class _Trial:
    """One trial: its pool, and its rounds on disk."""

    def __init__(
        self, number: int, target: Target, config: RedTeam, scorer: Scorer, threshold: float, wanted: str,
        starting: Sequence[str], answers: Answers, folder: Path, base: str, bar: Any,
    ) -> None:  # fmt: skip
        self.number, self.target, self.config, self.scorer, self.threshold = number, target, config, scorer, threshold
        self.wanted, self.starting, self.answers, self.bar = wanted, starting, answers, bar
        self.folder, self.base = folder / f"trial-{number}", base
        self.pool: list[Tried] = []

    def run(self) -> dict[str, Any]:
        rounds: list[dict[str, Any]] = []
        spent = 0
        for number in range(self.config.rounds + 1):  # round 0: the starting prompts
            done = self._round(number)
            if done["target_tokens"] is None and self.config.max_target_tokens is not None:
                raise ConfigError(
                    "max_target_tokens: this server does not say how many tokens it used; leave the limit out"
                )
            spent += done["target_tokens"] or 0
            self.pool += done["tried"]
            means = [t.mean for t in self.pool]
            rounds.append(
                {f"best_{k}": best(means, k) for k in BEST}
                | {"round_mean": _mean(t.mean for t in done["tried"]), "target_tokens": spent}
                | {k: done[k] for k in ("seconds", "red_tokens", "rejected")}
                | {"prompts": len(done["tried"])}
            )
            if self.config.max_target_tokens is not None and spent >= self.config.max_target_tokens:
                break
        top = sorted((t for t in self.pool if t.mean == t.mean), key=lambda t: -t.mean)[: self.config.confirm]
        chosen = [t.prompt for t in top]
        fresh = self._kept("confirm", lambda: self._score(chosen, "confirm"), chosen)
        return {"rounds": rounds, "top": top, "fresh": fresh["tried"], "confirm": fresh, "pool": self.pool}

    def _round(self, number: int) -> dict[str, Any]:
        return self._kept(f"round-{number:02d}", lambda: self._played(number))

    def _kept(self, name: str, make: Any, of: Sequence[str] = ()) -> dict[str, Any]:
        """What `make` gives: of this very search when it is on disk, else made and written there."""
        key = store.fingerprint([self.base, self.number, name, [t.prompt for t in self.pool], list(of)])
        file = self.folder / f"{name}.json"
        if not file.exists() or store.read_json(file).get("key") != key:
            start = time.perf_counter()
            made = make()
            made["tried"] = [asdict(t) for t in made["tried"]]
            store.write_json(file, {"key": key, **made, "seconds": time.perf_counter() - start})
        kept = store.read_json(file)
        kept["tried"] = [_tried(t) for t in kept["tried"]]
        self.bar.update(len(kept["tried"]))
        return kept  # type: ignore[no-any-return]

    def _played(self, number: int) -> dict[str, Any]:
        config = self.config
        rejected: Counter[str] = Counter()
        if number == 0:
            rng = self._rng("start")
            chosen = rng.permutation(len(self.starting))[: config.pool]
            return self._score([self.starting[i] for i in chosen], "round 0")
        weight_P = weights([t.mean for t in self.pool], config.selection, config.selection_temperature)
        seen = {t.prompt for t in self.pool}
        found: dict[int, str] = {}
        red_tokens = 0
        attacker: Attacker = config.attacker
        for attempt in range(ATTEMPTS):
            missing = [c for c in range(config.candidates) if c not in found]
            if not missing:
                break
            shots = [self._shots(weight_P, number, c, attempt) for c in missing]
            seeds = [self._key("ask", number, c, attempt) for c in missing]
            proposals = attacker.propose(shots, self.wanted, seeds, self.answers)
            for candidate, proposal in zip(missing, proposals, strict=True):
                red_tokens += proposal.tokens
                text = proposal.text
                if not text.strip():
                    rejected["empty"] += 1
                elif text in seen:
                    rejected["tried before"] += 1
                elif not self.target.holds(text, config):
                    rejected["too long for the model"] += 1
                else:
                    seen.add(text)
                    found[candidate] = text
        if not found:
            raise RedTeamError(
                f"the attacker gave no usable prompt in {ATTEMPTS} attempts ({dict(rejected)}); its last answer was "
                f"{proposals[-1].text[:200]!r}"
            )
        scored = self._score([found[c] for c in sorted(found)], f"round {number}")
        return scored | {"red_tokens": red_tokens, "rejected": dict(rejected)}

    def _shots(self, weight_P: np.ndarray, number: int, candidate: int, attempt: int) -> list[Tried]:
        """A few prompts of the pool, none twice, drawn one after the other by weight; the last one is the most likely."""
        rng = self._rng("shots", number, candidate, attempt)
        gumbel_P = np.log(weight_P + 1e-300) + rng.gumbel(size=len(weight_P))
        return [self.pool[i] for i in np.argsort(gumbel_P)[-self.config.shots :]]

    def _score(self, prompts: Sequence[str], what: str) -> dict[str, Any]:
        """Continuations of each prompt and what they score."""
        groups, spent = self.target.continuations(prompts, self.config, self._key("continue", what), self.answers)
        flat = [s for group in groups for s in group]
        if flat and not any(s.text for s in flat) and isinstance(self.target.model, Server):
            raise RedTeamError(
                f"{self.target.model.url} wrote nothing to any of {len(flat)} requests: it refuses them, or this model"
            )
        scenario = self.config.scenario(0)
        texts = [scored_text(s, scenario, self.scorer) for s in flat]
        judged = judge_documents(self.scorer, [[t] if t else [] for t in texts])
        score_N = [scores[0] if scores else math.nan for scores, _, _ in judged]
        per = self.config.continuations
        tried = [
            _judged(prompt, group, score_N[n * per : (n + 1) * per], self.threshold)
            for n, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
        ]
        return {"tried": tried, "target_tokens": spent, "red_tokens": 0, "rejected": {}}

    def _key(self, *what: Any) -> int:
        return key64(self.config.seed, "redteam", self.number, *what) % 2**32

    def _rng(self, *what: Any) -> np.random.Generator:
        return np.random.default_rng(self._key(*what))


def _judged(prompt: str, continuations: Sequence[Sample], scores: Sequence[float], threshold: float) -> Tried:
    score_N = np.array(scores)
    judged_N = score_N[~np.isnan(score_N)]
    n = len(judged_N)
    order = np.argsort(-np.nan_to_num(score_N, nan=-np.inf), kind="stable")[:WORST_KEPT]
    worst = [replace(continuations[i], score=float(score_N[i])) for i in order if score_N[i] == score_N[i]]
    return Tried(
        prompt,
        float(judged_N.mean()) if n else math.nan,
        float(judged_N.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan,
        n,
        len(score_N) - n,
        int((judged_N > threshold).sum()),
        tuple(worst),
    )


def _tried(row: dict[str, Any]) -> Tried:
    """A `Tried` as JSON gives it back (None stands for NaN)."""
    numbers = {k: math.nan if row[k] is None else row[k] for k in ("mean", "stderr")}
    return Tried(**row | numbers | {"worst": tuple(map(sample_of, row["worst"]))})


def _mean(values: Any) -> float | None:
    judged = [v for v in values if v == v]
    return sum(judged) / len(judged) if judged else None


def _over(values: Sequence[float | None]) -> dict[str, Any]:
    """Over trials; without an estimate where one has no value."""
    if any(v is None for v in values):
        return Estimate(math.nan, math.nan, len(values), (math.nan, math.nan)).to_json()
    return t_interval([v for v in values if v is not None]).to_json()


def _summary(trials: Sequence[dict[str, Any]], config: RedTeam, left_out: int) -> dict[str, Any]:
    measures = [*(f"best_{k}" for k in BEST), "round_mean"]
    length = max(len(t["rounds"]) for t in trials)

    def at(trial: dict[str, Any], r: int) -> dict[str, Any]:  # a trial that ended by its budget stays where it was
        return trial["rounds"][min(r, len(trial["rounds"]) - 1)]  # type: ignore[no-any-return]

    curves = {m: [_over([at(t, r)[m] for t in trials]) for r in range(length)] for m in measures}
    confirmed = {
        f"best_{k}": _over([_mean(f.mean for f in t["fresh"][:k]) if len(t["fresh"]) >= k else None for t in trials])
        for k in BEST
        if k <= config.confirm
    }
    every = [r for t in trials for r in t["rounds"]]
    prompts = sorted(
        (
            asdict(found) | {"trial": n, "fresh_mean": fresh.mean, "fresh_stderr": fresh.stderr}
            for n, t in enumerate(trials)
            for found, fresh in zip(t["top"], t["fresh"], strict=True)
        ),
        key=lambda row: -row["fresh_mean"] if row["fresh_mean"] == row["fresh_mean"] else math.inf,
    )
    return {
        "settings": to_plain(config),
        "curves": curves,
        "target_tokens": [_over([float(at(t, r)["target_tokens"]) for t in trials]) for r in range(length)],
        "final": {m: curves[m][-1] for m in measures},
        "confirmed": confirmed,
        "budget": {
            "prompts": sum(r["prompts"] for r in every),
            "continuations": config.continuations * sum(r["prompts"] for r in every),
            "target_tokens": sum(t["rounds"][-1]["target_tokens"] for t in trials),
            "confirm_continuations": config.continuations * sum(len(t["fresh"]) for t in trials),
            "confirm_tokens": sum(t["confirm"]["target_tokens"] or 0 for t in trials),
            "red_tokens": sum(r["red_tokens"] for r in every),
            "seconds": sum(r["seconds"] for r in every) + sum(t["confirm"]["seconds"] for t in trials),
        },
        "rejected": dict(sum((Counter(r["rejected"]) for r in every), Counter())),
        "prompts_too_long": left_out,
        "unjudged": sum(t.unjudged for trial in trials for t in trial["pool"]),
        "trials": [[{k: r[k] for k in (*measures, "target_tokens")} for r in t["rounds"]] for t in trials],
        "prompts": prompts,
    }


def redteam(
    model: str | Path | Server, out: str | Path | None, config: RedTeam, token_attacks: TokenAttacks | None, scorer: Scorer | None = None,
    threshold: float = 0.0, tokens_dir: str | Path | None = None, segmenter: Segmenter | None = None,
    allow_other_scorer: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Attack a run, any model in a folder or on the Hub, or one behind a server (`http://...`): the search, then the control
    tokens (of a loaded model; None leaves them out). Writes and returns `redteam.json` in `out` (default: the run's
    `redteam` folder). Done already: returns at once; interrupted before: goes on.

    `scorer`: a run's own where it is left out. Raises ConfigError where nothing says how to judge.
    """
    name = f"{model.model} at {model.url}" if isinstance(model, Server) else str(model)
    run = None if isinstance(model, Server) or not is_run(model) else Path(model)
    contexts: list[list[int]] = []
    if run is not None:
        manifest = store.read_manifest(run, "train")
        tokens = TokenStore.open(tokens_dir or manifest["tokens_dir"], manifest["train"].get("scores"))
        if scorer is None:
            scorer = corpus_scorer(tokens.manifest, allow_other_scorer)
        else:
            check_identity(scorer, tokens.manifest["identity"], allow_other_scorer)
        segmenter = segmenter_of(tokens)
        if token_attacks is not None:
            contexts = bad_contexts(tokens, threshold, token_attacks.num_samples, token_attacks.seed)
    if scorer is None:
        raise ConfigError(f"{name} is not a run, so nothing says how to judge it; name a scorer: --scorer pii")
    if out is None:
        if run is None:
            raise ConfigError(f"{name} is not a run: say where to write with --out FOLDER")
        out = run / "redteam"
    out = Path(out)
    config = config.for_scorer(scorer)
    token_attacks = None if token_attacks is None else token_attacks.for_scorer(scorer)
    weights_hash = None if isinstance(model, Server) else store.path_hash(model_folder(model))
    of_server = model.identity if isinstance(model, Server) else None
    target_key = store.fingerprint([of_server, name if weights_hash is None else weights_hash])
    plain = [to_plain(config), config.attacker.identity(), None if token_attacks is None else to_plain(token_attacks)]
    _, prompts = task_of(config, scorer)
    key = store.fingerprint(
        [target_key, plain, store.path_hash(prompts_path(prompts)), scorer.identity(), threshold, contexts, "redteam/5"]
    )
    done = out / "redteam.json"
    if done.exists() and store.read_json(done).get("key") == key:
        return store.read_json(done)  # type: ignore[no-any-return]
    target = Target(model if isinstance(model, Server) else load_model(model))
    if config.control == "bad" and (isinstance(model, Server) or "bad" not in target.model.control_ids):  # type: ignore[union-attr]
        raise ConfigError(f"{name} has no control tokens that are known here, so control=bad cannot be asked of it")
    if token_attacks is not None and isinstance(target.model, LoadedModel):
        check_lengths(target.model, token_attacks)
    result: dict[str, Any] = {
        "key": key,
        "model": name,
        "identity": scorer.identity(),
        "scorer": to_plain(scorer),
        "threshold": threshold,
        "search": search(target, config, scorer, threshold, out / "search", target_key, out.parent / "cache"),
        "tokens": None,
    }
    if token_attacks is not None and isinstance(target.model, LoadedModel):
        cut = segmenter or Lines()
        tokens_key = store.fingerprint(
            [target_key, plain[-1], contexts, scorer.identity(), to_plain(cut), threshold, "tokens/2"]
        )
        file = out / "tokens.json"
        if not file.exists() or store.read_json(file).get("key") != tokens_key:
            start = time.perf_counter()
            found = attack_tokens(target.model, token_attacks, scorer, cut, threshold, contexts)
            store.write_json(file, {"key": tokens_key, **found, "seconds": time.perf_counter() - start})
        result["tokens"] = store.read_json(file)
    store.write_json(done, result | {"versions": store.versions()})
    return store.read_json(done)  # type: ignore[no-any-return]
