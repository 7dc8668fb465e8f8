"""Red-teaming: how hard is it to make a model misbehave?

phf redteam runs/mle runs/conditional

redteam/  search/   tokens.json   redteam.json
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from phf.core import folders, store
from phf.core.config import ConfigError, to_plain
from phf.core.locks import locked
from phf.core.random import key64
from phf.core.runs import RedTeamFolder, RunFolder, is_run, model_folder, not_a_run
from phf.core.statistics import mean_estimate
from phf.core.types import Roles
from phf.data.segment import Lines, Segmenter
from phf.evaluation.evaluate import open_run
from phf.evaluation.judge import scored_text
from phf.generation.loaded import LoadedModel, load_model
from phf.generation.scenario import Scenario, prompts_path
from phf.generation.served import ServedModel, served_model
from phf.generation.server import Answers, Server
from phf.redteaming.config import RedTeam, TokenAttacks, has_prompts, task_of
from phf.redteaming.control_tokens import (
    Contexts,
    attack_tokens,
    check_attack_room,
    heldout_bad_segments,
    heldout_contexts,
)
from phf.redteaming.gradient import GradientResult, gradient_prompts, possible_aims
from phf.redteaming.results import RedTeamResult, TokenAttacksResult
from phf.redteaming.search import Starts, search, starting_prompts, tried
from phf.redteaming.target import Target
from phf.scorers import Scorer
from phf.scoring.judge import judge_texts
from phf.tokens.store import TokenStore


def redteam(
    model: str | Path | Server,
    out: str | Path | None = None,
    config: RedTeam = RedTeam(),
    token_attacks: TokenAttacks | None = TokenAttacks(),
    *,
    scorer: Scorer | None = None,
    threshold: float | None = None,
    tokens_dir: str | Path | None = None,
    segmenter: Segmenter | None = None,
    allow_other_scorer: bool = False,
    main: bool = False,
) -> RedTeamResult:
    """Attack a run, any model in a folder or on the Hub, or on a server: the search first, then the control
    tokens.

    Writes `redteam.json` into `out` (default: the run's folder `redteam`) and returns it. Returns at once if
    this was done with the same settings, and resumes after an interruption. `token_attacks`: None leaves them out; so
    does a server that is asked in text, without `tokenizer`. `scorer`: by default the run's own. `threshold`: scores
    above it are bad (default: the scorer's own). `main`: as in `open_run`.

    Raises ConfigError if nothing says how to judge the model or where to write, and errors as `search` and
    `open_run`.
    """
    plan = _prepare(
        model=model,
        out=out,
        config=config,
        token_attacks=token_attacks,
        scorer=scorer,
        threshold=threshold,
        tokens_dir=tokens_dir,
        segmenter=segmenter,
        allow_other_scorer=allow_other_scorer,
        main=main,
    )
    file = plan.folder.result
    folder = plan.folder.path
    for key in (plan.key, plan.earlier_key):
        if (done := folders.kept(file, key, RedTeamResult)) is None:
            continue
        folders.tidy(folder, *([] if plan.run is None else [plan.run]))
        folders.done_before(file)
        return done
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        if plan.run is not None:  # nobody may train another run into the folder
            held.enter_context(locked(plan.run, "redteam", shared=True))
        held.enter_context(locked(folder, "redteam"))
        folders.remove_leftovers(folder)
        target, starts = _target(plan)
        if file.exists():
            earlier = folders.keep_earlier(
                folder, file.name, plan.folder.search.name, plan.folder.tokens.name, GRADIENT
            )
            print(f"note: {file} is of other settings; that result is kept in {earlier}", file=sys.stderr)
        store.write_json(file, _attack(plan, target, starts))
    return store.read_record(file, RedTeamResult)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Everything that decides an attack."""

    model: str | Path | Server
    name: str
    """The model, for messages and results."""
    folder: RedTeamFolder
    run: Path | None
    """The folder of the attacked run; None for other models."""
    config: RedTeam
    token_attacks: TokenAttacks | None
    scorer: Scorer
    segmenter: Segmenter
    threshold: float
    draw: Callable[[bool], Contexts]
    """Draws held-out text for the attacks on control tokens; True: other text, to judge the worst attack again."""
    target_key: str
    """Fingerprint of the model."""
    bad_segments: Callable[[], list[list[int]]]
    """Token ids of held-out bad text, for a gradient search."""

    @cached_property
    def contexts(self) -> Contexts:
        return self.draw(False)

    @cached_property
    def key(self) -> str:
        """Fingerprint of the model and of all settings."""
        return self._fingerprint(vars(self.contexts), "redteam/6")

    @property
    def earlier_key(self) -> str:
        """The key of earlier versions, which had fewer attacks on control tokens. What they finished stays finished."""
        return self._fingerprint(self.contexts.bad, "redteam/5")

    def _fingerprint(self, contexts: Any, version: str) -> str:
        attacks = None if self.token_attacks is None else to_plain(self.token_attacks)
        plain = [to_plain(self.config), self.config.attacker.identity(), attacks]
        prompts_hash = store.path_hash(prompts_path(task_of(self.config, self.scorer)[1]))
        identity = self.scorer.identity()
        return store.fingerprint([self.target_key, plain, prompts_hash, identity, self.threshold, contexts, version])


def _prepare(
    *,
    model: str | Path | Server,
    out: str | Path | None,
    config: RedTeam,
    token_attacks: TokenAttacks | None,
    scorer: Scorer | None,
    threshold: float | None,
    tokens_dir: str | Path | None,
    segmenter: Segmenter | None,
    allow_other_scorer: bool,
    main: bool,
) -> _Plan:
    """The attack with everything resolved that the arguments leave open. Errors as `redteam`."""
    name = f"{model.model} at {model.url}" if isinstance(model, Server) else str(model)
    run = None if isinstance(model, Server) or not is_run(model) else Path(model)
    draw: Callable[[bool], Contexts] = _no_contexts
    bad_segments: Callable[[], list[list[int]]] = list
    if config.gradient is not None and isinstance(model, Server):
        raise ConfigError("gradient: a server gives no gradients; leave it out")
    if run is not None:
        opened = open_run(run, tokens_dir, scorer, allow_other_scorer, main)
        scorer = opened.scorer
        segmenter = opened.segmenter
        threshold = opened.threshold(threshold)
        limit = opened.corpus_limit(threshold)
        bad_segments = partial(heldout_bad_segments, opened.tokens, limit, BAD_SEGMENTS, config.seed)
        if token_attacks is not None:
            draw = partial(heldout_contexts, opened.tokens, limit, token_attacks.num_samples, token_attacks.seed)
    if scorer is None:
        what = f"{name} is not a run" if isinstance(model, Server) else not_a_run(name)
        raise ConfigError(
            f"{what}, so nothing says how to judge it; name a scorer: --scorer pii, in Python scorer='pii'"
        )
    if threshold is None:
        threshold = scorer.bad_above or 0.0
    if out is not None:
        folder = RedTeamFolder(Path(out))
    elif run is not None:
        folder = RunFolder(run).redteam
    else:
        raise ConfigError(f"{name} is not a run: give the folder to write into with --out FOLDER")
    if run is not None and not has_prompts(config, scorer):
        config = replace(config, prompts=own_prompts(run, opened.tokens, bad_segments()))
    return _Plan(
        model=model,
        name=name,
        folder=folder,
        run=run,
        config=config.for_scorer(scorer),
        token_attacks=None if token_attacks is None else token_attacks.for_scorer(scorer),
        scorer=scorer,
        segmenter=segmenter or Lines(),
        threshold=threshold,
        draw=draw,
        target_key=_target_key(model, name),
        bad_segments=bad_segments,
    )


OWN_PROMPTS = "redteam-prompts.jsonl"


def own_prompts(run: Path, tokens: TokenStore, bad: Sequence[Sequence[int]]) -> str:
    """A file of starting prompts for a scorer without a task: the first halves of held-out bad segments. Raises
    ConfigError if there are none."""
    texts = [tokens.tokenizer.decode(ids[: max(len(ids) // 2, 1)]).strip() for ids in bad]
    rows = [json.dumps({"text": text}) for text in dict.fromkeys(texts) if text]
    if not rows:
        raise ConfigError(
            f"{run}: no held-out segment is bad, so there are no prompts to start from: give prompts=FILE"
        )
    path = (run / OWN_PROMPTS).resolve()
    text = "".join(f"{row}\n" for row in rows)
    if not path.exists() or path.read_text() != text:
        store.write_text(path, text)
    return str(path)


GRADIENT = "gradient.json"
BAD_SEGMENTS = 64
"""Held-out bad segments that a gradient search draws its targets from."""


def _no_contexts(fresh: bool) -> Contexts:
    """Models from elsewhere have no held-out text."""
    return Contexts()


def _target(plan: _Plan) -> tuple[Target, Starts]:
    """The loaded model, and the prompts to start from. Raises ConfigError for everything that would stop the attack,
    before an earlier result is moved."""
    plan.config.attacker.check()
    if not isinstance(plan.model, Server):
        target = Target(load_model(plan.model))
    elif plan.model.tokenizer is None:
        target = Target(plan.model)
    else:
        target = Target(served_model(plan.model, Answers(plan.folder.cache / "answers.jsonl")))
    model = None if isinstance(target.model, Server) else target.model
    if (why := Scenario(control=plan.config.control).lacks(Roles() if model is None else model.control)) is not None:
        raise ConfigError(f"{plan.name} {why}")
    if plan.token_attacks is not None and model is not None:
        check_attack_room(model, plan.token_attacks)
    if plan.config.gradient is not None and isinstance(model, LoadedModel):
        possible_aims(model, plan.config.gradient, plan.bad_segments())
    return target, starting_prompts(target, plan.config, plan.scorer)


def _attack(plan: _Plan, target: Target, starts: Starts) -> RedTeamResult:
    """Search for prompts and attack the control tokens."""
    model = None if isinstance(target.model, Server) else target.model
    gradient = _search_by_gradient(plan, target, starts)
    if gradient is not None:
        usable = [row.prompt for row in gradient.prompts if target.holds(row.prompt, plan.config)]
        starts = replace(starts, found=tuple(dict.fromkeys(usable)))
    found = search(
        target,
        starts,
        plan.config,
        plan.scorer,
        plan.threshold,
        folder=plan.folder.search,
        target_key=plan.target_key,
        cache=plan.folder.cache,
    )
    tokens: TokenAttacksResult | None = None
    if model is not None and plan.token_attacks is not None:
        tokens = _attack_tokens(plan, model, plan.token_attacks)
    return RedTeamResult(
        key=plan.key,
        model=plan.name,
        identity=plan.scorer.identity(),
        scorer=to_plain(plan.scorer),
        threshold=plan.threshold,
        search=found,
        tokens=tokens,
        gradient=gradient,
        versions=folders.versions(),
    )


def _search_by_gradient(plan: _Plan, target: Target, starts: Starts) -> GradientResult | None:
    """The gradient search, or its result if this was done before; None without it."""
    config = plan.config.gradient
    if config is None:
        return None
    model = target.model
    assert isinstance(model, LoadedModel)
    bad = plan.bad_segments()
    seed = plan.config.seed
    scenario = plan.config.scenario(seed)

    def searched() -> GradientResult:
        start = time.perf_counter()
        found, spent = gradient_prompts(model, config, scenario, starts.usable, bad, seed)
        rows = [row for row in found if target.holds(row.prompt, plan.config)]
        again = key64(seed, "gradient") % 2**32
        answers = Answers(plan.folder.cache / "answers.jsonl")
        groups, written = target.continuations([row.prompt for row in rows], plan.config, again, answers)
        flat = [sample for group in groups for sample in group]
        score_N = judge_texts(plan.scorer, [scored_text(s, scenario, plan.scorer) for s in flat])
        per = plan.config.continuations
        means = [
            tried(row.prompt, group, score_N[n * per : (n + 1) * per], plan.threshold).mean
            for n, (row, group) in enumerate(zip(rows, groups, strict=True))
        ]
        of_aim = {
            aim: mean_estimate([mean for mean, row in zip(means, rows, strict=True) if row.aim == aim])
            for aim in dict.fromkeys(row.aim for row in rows)
        }
        return GradientResult(
            prompts=found,
            misalignment=of_aim,
            target_tokens=spent,
            continuation_tokens=written or 0,
            seconds=time.perf_counter() - start,
        )

    plain = [to_plain(config), to_plain(scenario), plan.config.continuations, bad, starts.usable]
    key = store.fingerprint([plan.target_key, *plain, plan.scorer.identity(), plan.threshold, "gradient/2"])
    return folders.cached(plan.folder.path / GRADIENT, key, GradientResult, searched)


def _attack_tokens(plan: _Plan, model: LoadedModel | ServedModel, config: TokenAttacks) -> TokenAttacksResult:
    """Attack the control tokens, or read the result if this was done before."""
    plain = [to_plain(config), vars(plan.contexts), plan.scorer.identity(), to_plain(plan.segmenter), plan.threshold]

    def attacked() -> TokenAttacksResult:
        start = time.perf_counter()
        result = attack_tokens(
            model,
            config,
            plan.scorer,
            segmenter=plan.segmenter,
            threshold=plan.threshold,
            contexts=plan.contexts,
            fresh=plan.draw(True),
        )
        return replace(result, seconds=time.perf_counter() - start)

    key = store.fingerprint([plan.target_key, *plain, "tokens/4"])
    return folders.cached(plan.folder.tokens, key, TokenAttacksResult, attacked)


def _target_key(model: str | Path | Server, name: str) -> str:
    """Fingerprint of the target: its weights, or what a server says about itself."""
    if isinstance(model, Server):
        return store.fingerprint([model.identity, name])
    weights = store.path_hash(model_folder(model))
    return store.fingerprint([None, name if weights is None else weights])
