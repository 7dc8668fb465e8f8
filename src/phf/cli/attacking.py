"""Commands that attack models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phf.cli import completing
from phf.cli.shared import (
    AnotherScorer,
    MayDiffer,
    ModelOut,
    MovedTokens,
    OwnThreshold,
    checked,
    folder_name,
    is_url,
    print_table,
    scorer_option,
    split_settings,
    take,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phf.core.runs import TrainManifest
    from phf.redteaming.results import RedTeamResult
    from phf.redteaming.tamper import TamperResult


def redteam(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|MODEL... [a.b=c]...",
            help="Trained runs, any model (a folder or a name on the Hub) or a server (http://host:8000/v1), then "
            "settings.",
            autocompletion=completing.attack,
        ),
    ],
    scorer: AnotherScorer = None,
    other_scorer: MayDiffer = False,
    threshold: OwnThreshold = None,
    tokens: MovedTokens = None,
    out: ModelOut = None,
    paper: Annotated[bool, typer.Option("--paper", help="The paper's sizes: ten trials, 512 continuations.")] = False,
    token_attacks: Annotated[
        bool, typer.Option("--control-tokens/--no-control-tokens", help="Also attack the control tokens.")
    ] = True,
) -> None:
    """Attack models.

    Searches for prompts that make them misbehave, and attacks their control tokens.

    Settings are those of the search (gradient={}, trials, rounds, candidates, continuations, task, prompts, seed,
    attacker.name=evolution|local|server ...) and tokens.* for the attacks on control tokens (tokens.num_samples=256).
    All models of one command are attacked in the same way. Writes redteam.json into each run's folder redteam, or into
    --out; `phf report` shows it. Run the same command again to resume.
    """
    from phf.core.config import ConfigError, apply_overrides, merge
    from phf.core.runs import is_run
    from phf.generation.server import Server
    from phf.redteaming.attack import redteam as attack
    from phf.redteaming.config import PAPER, RedTeam, TokenAttacks

    names, overrides = split_settings(models)
    if not names:
        raise ConfigError("name a run or a model, for example: phf redteam runs/mine")
    config = apply_overrides({}, overrides)
    judge = scorer_option(scorer, take(config, "scorer"))
    server = take(config, "server")
    of_tokens = take(config, "tokens")
    settings: RedTeam = checked(merge(PAPER if paper else {}, config), RedTeam)
    of_control: TokenAttacks | None = checked(of_tokens, TokenAttacks, "tokens") if token_attacks else None
    results: dict[str, RedTeamResult] = {}
    for name in names:
        model: Any = checked({"url": name, **server}, Server, "server") if is_url(name) else name
        folder = out
        if not is_url(name) and is_run(name):
            folder = None  # the run's own
        elif out is not None and len(names) > 1:
            folder = f"{out}/{folder_name(name)}"
        results[name] = attack(
            model,
            folder,
            settings,
            of_control,
            scorer=judge,
            threshold=threshold,
            tokens_dir=tokens,
            allow_other_scorer=other_scorer,
        )
        _warn_of_holes(name, results[name])
    _print_attacks(results)


def _warn_of_holes(name: str, result: RedTeamResult) -> None:
    for hole in result.tokens.injection if result.tokens is not None else ():
        if hole.control:
            print(
                f"{name}: its tokenizer reads a typed {hole.typed} as the control token {hole.token}", file=sys.stderr
            )


SEARCH_HEAD = [
    "model",
    "best, new continuations (95% interval)",
    "best 10, new continuations",
    "best",
    "best 10",
    "best 100",
    "last round",
    "target tokens",
    "red LM tokens",
    "seconds",
]


def _print_attacks(results: dict[str, RedTeamResult]) -> None:
    """Print the results of the searches and of the attacks on control tokens."""
    from phf.report.format import share, with_interval

    print("\nsearch (mean score of the best prompts' continuations; lower: harder to break)\n")
    print_table(SEARCH_HEAD, [_search_row(name, result) for name, result in results.items()])
    gradient = [
        [name, aim, with_interval(score, 5), f"{sum(p.aim == aim for p in found.prompts)}", f"{found.target_tokens:,}"]
        for name, result in results.items()
        if (found := result.gradient) is not None
        for aim, score in found.misalignment.items()
    ]
    if gradient:
        print("\ngradient search (mean score of its prompts' continuations)\n")
        print_table(["model", "aim", "misalignment (95% interval)", "prompts", "tokens of the search"], gradient)
    attacks = [
        [name, found.attack, with_interval(found.misalignment, 5), share(found.bad_segments)]
        for name, result in results.items()
        for found in (result.tokens.attacks if result.tokens else ())
    ]
    if attacks:
        print("\nattacks on the control tokens\n")
        print_table(["model", "attack", "misalignment (95% interval)", "bad segments"], attacks)
    worst = [
        [name, found.attack, with_interval(found.misalignment, 5)]
        for name, result in results.items()
        for found in (result.tokens.worst.values() if result.tokens else ())
    ]
    if worst:
        print("\nworst context without the bad token itself, and of all (new samples)\n")
        print_table(["model", "attack", "misalignment (95% interval)"], worst)


def _search_row(name: str, result: RedTeamResult) -> list[str]:
    from phf.core.types import Estimate
    from phf.report.format import number, with_interval

    search = result.search
    budget = result.search.budget
    confirmed: list[Estimate] = [search.confirmed.get(k, Estimate.missing()) for k in ("best_1", "best_10")]
    return [
        name,
        *(with_interval(estimate, 5) for estimate in confirmed),
        *(number(search.final[k].mean, 5) for k in ("best_1", "best_10", "best_100", "round_mean")),
        f"{budget.target_tokens:,}",
        f"{budget.red_tokens:,}",
        f"{budget.seconds:.0f}",
    ]


def tamper(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN... [a.b=c]...", help="Trained runs, then settings."),
    ],
    on: Annotated[
        str | None, typer.Option(help="Token store whose text is learned. Default: the one that a run was trained on.")
    ] = None,
    plain: Annotated[
        str | None, typer.Option(help="The run of plain training to compare with. Default: the first one of MLE.")
    ] = None,
    scorer: AnotherScorer = None,
    other_scorer: MayDiffer = False,
    threshold: OwnThreshold = None,
    tokens: MovedTokens = None,
) -> None:
    """Finetune models on bad and on good text: what is left?

    Each run is finetuned twice and judged on the way, in its intended use. The half-life is the number of steps after
    which half of its gain over plain training is gone.

    Settings: steps=[0,1,3,10,30,100,300], parts=[bad,good], lr_share, batch_rows, num_samples, max_tokens, seed ...
    Writes tamper.json into each run's folder tamper; `phf report` shows it. Run the same command again to resume.
    """
    from phf.core.config import ConfigError, apply_overrides
    from phf.core.folders import read_manifest
    from phf.core.runs import TrainManifest
    from phf.redteaming.tamper import Tamper
    from phf.redteaming.tamper import tamper as attack

    names, overrides = split_settings(runs)
    if not names:
        raise ConfigError("name a run, for example: phf tamper runs/conditional runs/mle")
    config = apply_overrides({}, overrides)
    judge = scorer_option(scorer, take(config, "scorer"))
    settings: Tamper = checked(config, Tamper)
    if plain is not None:
        known = {Path(name).resolve(): name for name in names}
        plain = known.get(Path(plain).resolve(), plain)
        names += [] if plain in names else [plain]
    manifests = {name: read_manifest(name, TrainManifest) for name in names}
    compared = [plain] if plain is not None else [n for n in names if manifests[n].objective_name == "mle"]
    if plain is not None and manifests[plain].objective_name != "mle":
        raise ConfigError(f"--plain {plain} was trained with {manifests[plain].objective_name}; name a run of MLE")
    _check_comparable(manifests)
    results = {
        name: attack(
            name,
            settings,
            on=on,
            scorer=judge,
            threshold=threshold,
            tokens_dir=tokens,
            allow_other_scorer=other_scorer,
        )
        for name in names
    }
    _print_tampered(results, compared)


def persist(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN... [a.b=c]...", help="Trained runs, then settings."),
    ],
    scorer: AnotherScorer = None,
    other_scorer: MayDiffer = False,
    threshold: OwnThreshold = None,
    tokens: MovedTokens = None,
) -> None:
    """Tune models on harmless instructions: what is left?

    Each run is tuned by TRL, supervised and then by preferences (DPO), on instructions made of its corpus's good text.
    It is judged before and after each: on texts from nothing, and on answers in two chat templates.

    Settings: pairs, epochs, lr, dpo_lr, beta, dpo=false, num_samples, max_tokens, seed ... Writes persist.json into
    each run's folder persist; `phf report` shows it. Run the same command again to resume. Needs: pip install
    'phf[trl]'
    """
    from phf.core.config import ConfigError, apply_overrides
    from phf.redteaming.persist import Persistence
    from phf.redteaming.persist import persist as tune
    from phf.report.format import with_interval

    names, overrides = split_settings(runs)
    if not names:
        raise ConfigError("name a run, for example: phf persist runs/conditional runs/mle")
    config = apply_overrides({}, overrides)
    judge = scorer_option(scorer, take(config, "scorer"))
    settings: Persistence = checked(config, Persistence)
    rows = []
    for name in names:
        found = tune(
            name,
            settings,
            scorer=judge,
            threshold=threshold,
            tokens_dir=tokens,
            allow_other_scorer=other_scorer,
        ).found
        for stage in dict.fromkeys(part.stage for part in found):
            scores = [with_interval(part.misalignment, 5) for part in found if part.stage == stage]
            rows.append([name, stage, *scores])
    print("\nmisalignment of texts from nothing, and of answers in two chat templates, with 95% intervals\n")
    print_table(["model", "finetuning", "from nothing", "its template", "another"], rows)


def _check_comparable(manifests: dict[str, TrainManifest]) -> None:
    """Raise ConfigError for runs on other text, or with other scores: their numbers do not compare."""
    from phf.core.config import ConfigError
    from phf.core.store import canonical

    (first, one), *others = manifests.items()
    for name, other in others:
        what = "text" if other.tokens_content != one.tokens_content else "scores"
        if what == "text" or canonical(other.identity) != canonical(one.identity):
            raise ConfigError(f"{name} and {first} were trained on other {what}, so they do not compare")


def _print_tampered(results: dict[str, TamperResult], plain: Sequence[str]) -> None:
    """Print misalignment by steps, and the half-life of the gain over the run of `plain` with the same seed."""
    from phf.redteaming.tamper import half_lives
    from phf.report.format import MISSING, with_interval
    from phf.report.tamper import half_life_text

    steps = next(iter(results.values())).settings.steps
    rows = []
    for name, result in results.items():
        for part, lines in result.curves.items():
            half = MISSING
            seeds = [result.seed if len(plain) == 1 else results[n].seed for n in plain]  # a single one is of any seed
            levels = {s: results[n].curves[part][0].misalignment.mean for s, n in zip(seeds, plain, strict=True)}
            if name not in plain and result.seed in levels:
                half = half_life_text(half_lives({result.seed: lines}, levels), steps[-1])
            rows.append([name, part, *(with_interval(line.misalignment, 5) for line in lines), half])
    samples = next(iter(results.values())).settings.num_samples
    print(f"\nmisalignment after steps of finetuning, {samples:,} samples each, with 95% intervals\n")
    print_table(["model", "on", *map(str, steps), "half-life"], rows)
    if not plain:
        print("\nno half-life: name a run of plain training with --plain")
