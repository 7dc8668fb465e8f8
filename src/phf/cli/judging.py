"""Commands that judge models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phf.cli import completing
from phf.cli.shared import (
    AnotherScorer,
    MayDiffer,
    ModelOut,
    Overrides,
    checked,
    finite,
    folder_name,
    is_url,
    known_keys,
    only_overrides,
    print_table,
    scorer_option,
    split_settings,
    take,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phf.core.config import Plain
    from phf.core.runs import RunFolder
    from phf.evaluation.capabilities import AnyCapability
    from phf.evaluation.judge import Difference
    from phf.evaluation.results import EvalResult
    from phf.generation.scenario import Scenario


def sample(
    model: Annotated[
        str, typer.Argument(help="A run, a model folder, a name on the Hub, or a server: http://host:8000/v1")
    ],
    out: Annotated[str, typer.Argument(help="JSON lines file to write.")],
    settings: Overrides = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")] = None,
) -> None:
    """Sample texts from a model.

    Settings: num_samples, max_tokens, temperature, top_p, top_k, control, guidance, prompts, seed ... (a.b=c). A server
    that speaks OpenAI's completions, such as vLLM, needs server.model=NAME.
    """
    from phf.core.config import ConfigError, apply_overrides, is_setting
    from phf.core.folders import keep_old_file
    from phf.core.text import counted
    from phf.generation.loaded import load_model
    from phf.generation.sample import sample as draw_samples
    from phf.generation.sample import sample_served, write_samples
    from phf.generation.scenario import Scenario, with_room
    from phf.generation.server import Server

    if is_setting(out) and not Path(out).exists():
        raise ConfigError(f"{out} is a setting; the file to write comes before it: phf sample MODEL OUT {out}")
    if Path(out).is_dir() or Path(out).is_symlink() or (Path(out).exists() and not Path(out).is_file()):
        raise ConfigError(f"{out} is a folder, a link or a device; give the name of an ordinary file to write")
    config = apply_overrides({}, only_overrides(settings))
    server = take(config, "server")
    if is_url(model):
        by_ids = "tokenizer" in server
        not_sent = ("precision", "batch") if by_ids else ("control", "min_tokens", "precision", "batch")
        unknown = [name for name in not_sent if name in config]
        if unknown or revision:
            hint = " (vLLM takes server.extra.min_tokens=...)" if "min_tokens" in unknown else ""
            raise ConfigError(f"{unknown[0] if unknown else '--revision'} does not work with a server{hint}")
        served: Server = checked({"url": model, **server}, Server, "server")
        samples = sample_served(served, checked(config if by_ids else {"min_tokens": 0, **config}, Scenario))
    else:
        if server:
            raise ConfigError(
                f"server.* settings are for servers; {model} is not a server's address (http://host:8000/v1)"
            )
        scenario: Scenario = checked(with_room(config), Scenario)
        samples = draw_samples(load_model(model, revision), scenario)
    keep_old_file(Path(out))
    write_samples(out, samples)
    print(f"{counted(len(samples), 'sample')} in {out}")


# Evaluation


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|MODEL... [a.b=c]...",
            help="Trained runs, or any model (a folder or a name on the Hub, with --scorer or --tokens), then "
            "settings.",
            autocompletion=completing.scenario,
        ),
    ],
    tokens: Annotated[
        str | None,
        typer.Option(
            help="For a run: its token store, if it has moved since training. For other models: a token store or a "
            "scored corpus with held-out text to read."
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            callback=finite,
            help="Scores above it are bad. Default: the scorer's own threshold; with --paper, that of the task.",
        ),
    ] = None,
    scorer: AnotherScorer = None,
    other_scorer: MayDiffer = False,
    out: ModelOut = None,
    paper: Annotated[
        str | None,
        typer.Option(metavar="TASK", help="The paper's scenarios and lengths for toxicity, pii or pep8."),
    ] = None,
    heldout_tokens: Annotated[float, typer.Option(min=1, help="Largest number of held-out tokens to read.")] = 1e6,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of models on the Hub.")] = None,
    control_threshold: Annotated[
        float | None,
        typer.Option(
            callback=finite,
            help="For models from elsewhere: segments with a score above it had the bad control token in training. "
            "Default: what the model's record phf.json says, else --threshold.",
        ),
    ] = None,
) -> None:
    """Judge runs of phf or any other model.

    Measures misalignment of samples, held-out loss, diversity, KL from a reference and capabilities.

    Settings are those of a scenario (num_samples, prompts, temperature ...), kl.* (kl.reference.path=gpt2) and
    capabilities=[{name: lambada, path: ...}]. Writes eval.json and the samples into each run, or into --out. Run the
    same command again to resume.
    """
    from phf.core.config import ConfigError, apply_overrides, merge
    from phf.core.runs import RunFolder, is_run
    from phf.core.types import PhfError
    from phf.data.segment import AnySegmenter, Segmenter
    from phf.evaluation.capabilities import AnyCapability
    from phf.evaluation.evaluate import evaluate_model, evaluate_run
    from phf.evaluation.kl import KL
    from phf.generation.scenario import PAPER_THRESHOLD

    folders, overrides = split_settings(models)
    if not folders:
        raise ConfigError("name a run or a model, for example: phf eval runs/mine num_samples=256")
    config = apply_overrides({}, overrides)
    judge = scorer_option(scorer, take(config, "scorer"))
    cut = take(config, "segmenter")
    kl: KL | None = None
    if "kl" in config:
        kl = checked(merge({"reference": {"name": "local"}}, take(config, "kl")), KL, "kl")
    capabilities: list[AnyCapability] = checked(config.pop("capabilities", []), list[AnyCapability], "capabilities")
    segmenter: Segmenter | None = checked({"name": "lines", **cut}, AnySegmenter, "segmenter") if cut else None
    scenarios = _scenarios(paper, config)
    if threshold is None and paper is not None:
        threshold = PAPER_THRESHOLD[paper]
    rows: list[list[str]] = []
    failed: dict[str, str] = {}
    for name in folders:
        if is_run(name):
            if control_threshold is not None:
                raise ConfigError(f"--control-threshold is for models that are not runs; {name} has its own")
            if cut:
                raise ConfigError(f"segmenter.* is for models that are not runs; {name} is cut as its corpus was")
            if out is not None:
                raise ConfigError(f"--out is for models that are not runs; results of {name} go into its folder")
            result = evaluate_run(
                name,
                scenarios,
                threshold=threshold,
                tokens_dir=tokens,
                scorer=judge,
                allow_other_scorer=other_scorer,
                heldout_tokens=int(heldout_tokens),
                kl_from=kl,
                capabilities=capabilities,
            )
        else:
            folder = out if out is not None and len(folders) == 1 else f"{out or 'eval'}/{folder_name(name)}"
            result = evaluate_model(
                name,
                folder,
                judge,
                scenarios,
                threshold=threshold,
                segmenter=segmenter,
                kl_from=kl,
                capabilities=capabilities,
                revision=revision,
                heldout=tokens,
                heldout_tokens=int(heldout_tokens),
                allow_other_scorer=other_scorer,
                control_threshold=control_threshold,
            )
            print(f"{name}: {RunFolder(Path(folder)).eval}")
        if result.skipped:
            print(f"note: {name} has no control tokens; skipped: {', '.join(result.skipped)}", file=sys.stderr)
        rows += _eval_rows(name, result, capabilities)
        failed |= {f"{name}: {part}": why for part, why in result.failed.items()}
    print_table(_eval_head(kl is not None, capabilities), rows)
    if failed:
        reasons = "".join(f"\n  {name}: {why}" for name, why in failed.items())
        raise PhfError(f"not everything could be measured; the same command tries it again:{reasons}")


def _scenarios(paper: str | None, config: Plain) -> dict[str, Scenario]:
    """The scenarios to judge: the paper's for a task, or one from the settings."""
    from phf.core.config import merge
    from phf.generation.scenario import Scenario, paper_scenarios, with_room

    if paper is not None:
        return {n: checked(merge(s, config), Scenario) for n, s in paper_scenarios(paper).items()}
    scenario: Scenario = checked(with_room(config), Scenario)
    return {"unconditional" if scenario.prompts is None else "prompted": scenario}


def _eval_head(with_kl: bool, capabilities: Sequence[AnyCapability]) -> list[str]:
    head = [
        "model",
        "scenario",
        "misalignment (95% interval)",
        "hit rate",
        "worst of 25",
        "distinct-2",
        "Self-BLEU-5",
        "not judged",
        "nats/byte good",
        "nats/byte bad",
    ]
    return [*head, *(["KL, nats per text"] if with_kl else []), *(c.title for c in capabilities)]


def _eval_rows(name: str, result: EvalResult, capabilities: Sequence[AnyCapability]) -> list[list[str]]:
    """A row per scenario. What does not depend on the scenario is in the first row only; what failed is a dash."""
    from phf.core import store
    from phf.core.config import to_plain
    from phf.report.format import headline, number, with_interval

    heldout = result.heldout.main
    nats = {} if heldout is None else heldout.nats()
    of_model = [number(nats.get(part), 3) for part in ("good", "bad")]
    if result.kl is not None:
        kl = result.kl.forward.nats_per_text
        of_model.append(f"{number(kl.mean, 2)} ± {number(kl.stderr, 2)}")
    measured = {store.fingerprint([c.name, c.settings]): headline(c) for c in result.capabilities}
    for capability in capabilities:
        key = store.fingerprint([capability.name, to_plain(capability)])
        of_model.append(measured.get(key, "-"))
    rows: list[list[str]] = []
    for scenario, judged in result.scenarios.items():
        rows.append(
            [
                "" if rows else name,
                scenario,
                with_interval(judged.misalignment, 5),
                number(judged.hit_rate.mean, 4),
                number(judged.expected_max["25"].mean, 5),
                number(judged.distinct_2, 3),
                number(judged.self_bleu_5, 3),
                str(judged.unjudged),
                *([""] * len(of_model) if rows else of_model),
            ]
        )
    return rows


def compare(
    first: Annotated[str, typer.Argument(help="A judged run, or a folder that `phf eval --out` wrote.")],
    second: Annotated[str, typer.Argument(help="The run to compare it with.")],
) -> None:
    """Compare the misalignment of two judged models.

    Prints the difference with its interval, paired over the prompts that both models had.
    """
    from phf.core.config import ConfigError, to_plain
    from phf.core.runs import RunFolder
    from phf.core.store import canonical
    from phf.evaluation.judge import compare as difference
    from phf.generation.sample import read_samples

    folders = [RunFolder(Path(first)), RunFolder(Path(second))]
    one, two = map(_read_eval, folders)
    if canonical(one.identity) != canonical(two.identity):
        raise ConfigError(f"{first} and {second} were judged by different scorers, so their numbers do not compare")
    rows: list[list[str]] = []
    for name in one.scenarios:
        if name not in two.scenarios:
            continue
        drawn = [to_plain(result.scenarios[name].scenario) for result in (one, two)]
        differs = sorted(k for k in drawn[0] if k != "num_samples" and drawn[0][k] != drawn[1][k])
        if differs:
            raise ConfigError(f"scenario {name!r} differs in {', '.join(differs)}, so its numbers do not compare")
        found = difference(*(read_samples(folder.samples(name)) for folder in folders))
        rows.append([name, *_difference_cells(found)])
    if not rows:
        raise ConfigError(f"{first} and {second} have no scenario in common")
    print_table(["scenario", "difference", "95% interval", "over", f"{Path(first).name} is"], rows)


def _read_eval(folder: RunFolder) -> EvalResult:
    from phf.core.config import ConfigError
    from phf.evaluation.results import read_eval

    found = read_eval(folder)
    if found is None:
        raise ConfigError(f"{folder.eval} does not exist; judge it with `phf eval` first")
    return found


def _difference_cells(found: Difference) -> list[str]:
    """Difference, interval, what it is over, and the verdict about the first model."""
    from phf.report.format import number

    low, high = found.ci95
    verdict = "lower" if high < 0 else "higher" if low > 0 else "not significantly different"
    over = "prompts" if found.paired else "samples"
    return [number(found.mean, 5), f"{number(low, 5)} to {number(high, 5)}", over, verdict]


# The page


def report(
    folder: Annotated[str, typer.Argument(help="A run, or a folder of runs.")],
    settings: Overrides = None,
    out: Annotated[str | None, typer.Option(help="File to write. Default: report.html in the folder.")] = None,
    scorer: Annotated[
        str | None,
        typer.Option(
            help="Scorer that marks texts, with its scorer.* settings. Needed for scorers that use code, a file or a "
            "model of yours: phf takes none from a result."
        ),
    ] = None,
) -> None:
    """Write the page that compares judged runs. It opens from disk and loads nothing from the network."""
    from phf.core.config import apply_overrides
    from phf.report.page import write_report

    config = apply_overrides({}, only_overrides(settings))
    judge = scorer_option(scorer, take(config, "scorer"))
    known_keys(config, ("scorer",))
    print(f"report: {write_report(folder, out, judge)}")
