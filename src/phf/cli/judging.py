"""Commands that judge models."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from phf.cli.shared import Overrides, laid_on, mapping, only_overrides, print_table, split_settings

AnotherScorer = Annotated[
    str | None, typer.Option(help="Another scorer than the corpus's (as for `phf score`, with scorer.* settings).")
]
MayDiffer = Annotated[bool, typer.Option("--other-scorer", help="Allow a scorer that differs from the corpus's.")]


def sample(
    model: Annotated[
        str, typer.Argument(help="A run, a model folder, a name on the Hub, or a server: http://host:8000/v1")
    ],
    out: Annotated[str, typer.Argument(help="JSON lines file to write.")],
    settings: Overrides = None,
    revision: Annotated[str | None, typer.Option(help="Of a model on the Hub: a branch, tag or commit.")] = None,
) -> None:
    """Write texts with a model: num_samples, max_tokens, temperature, top_p, top_k, control, guidance, prompts, seed ... (a.b=c).

    Of a server that speaks OpenAI's completions (vLLM, for one): server.model=NAME.
    """
    from phf.core.config import ConfigError, validate
    from phf.generation.loaded import load_model
    from phf.generation.sample import sample as draw_samples
    from phf.generation.sample import sample_served, write_samples
    from phf.generation.scenario import Scenario
    from phf.generation.server import Server

    config = laid_on({}, only_overrides(settings))
    server = mapping(config, "server")
    if model.startswith(("http://", "https://")):
        unknown = [name for name in ("control", "min_tokens", "precision", "batch") if name in config]
        if unknown or revision:
            hint = " (vLLM takes server.extra.min_tokens=...)" if "min_tokens" in unknown else ""
            raise ConfigError(f"{unknown[0] if unknown else '--revision'} cannot be asked of a server{hint}")
        served: Server = validate({"url": model, **server}, Server, "server")
        samples = sample_served(served, validate({"min_tokens": 0, **config}, Scenario, "scenario"))
    else:
        if server:
            raise ConfigError(f"server.* is for servers (http://host:8000/v1), and {model} is none")
        scenario: Scenario = validate(config, Scenario, "scenario")
        samples = draw_samples(load_model(model, revision), scenario)
    write_samples(out, samples)
    print(f"{len(samples):,} samples in {out}")


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|MODEL... [a.b=c]...",
            help="Trained runs, or any model (a folder or a name on the Hub; with --scorer or --tokens), then settings.",
        ),
    ],
    tokens: Annotated[
        str | None,
        typer.Option(
            help="The token store, if it has moved since training. Of any other model: held-out text to read, a token store "
            "(its held-out documents) or a scored corpus."
        ),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Scores above it are bad. Default: 0, with --paper toxicity 0.5.")
    ] = None,
    scorer: AnotherScorer = None,
    other_scorer: MayDiffer = False,
    out: Annotated[str | None, typer.Option(help="Folder for what is found of a model that is not a run.")] = None,
    paper: Annotated[
        str | None, typer.Option(metavar="TASK", help="The paper's scenarios and lengths: toxicity, pii or pep8.")
    ] = None,
    heldout_tokens: Annotated[float, typer.Option(min=1, help="Held-out tokens to read, at most.")] = 1e6,
    revision: Annotated[str | None, typer.Option(help="Of models on the Hub: a branch, tag or commit.")] = None,
    control_threshold: Annotated[
        float | None,
        typer.Option(
            help="Scores above it had the bad control token when a model from elsewhere was trained. Default: what it says, else --threshold."
        ),
    ] = None,
) -> None:
    """Judge runs or any model: misalignment of samples, held-out loss, diversity, KL, capabilities. Run again to resume.

    Settings are those of a scenario (num_samples, prompts, temperature ...), kl.* (kl.reference.path=gpt2) and
    capabilities=[{name: lambada, path: ...}]. Writes eval.json and the samples into each run, or into --out.
    """
    from phf.core.config import ConfigError, merge, validate
    from phf.core.runs import is_run
    from phf.data.segment import AnySegmenter, Segmenter
    from phf.evaluation.capabilities import AnyCapability
    from phf.evaluation.evaluate import evaluate_model, evaluate_run
    from phf.evaluation.kl import KL
    from phf.generation.sample import PAPER_THRESHOLD
    from phf.generation.scenario import Scenario, paper_scenarios
    from phf.report.format import headline, number
    from phf.scorers import AnyScorer, Scorer

    folders, overrides = split_settings(models)
    config = laid_on({}, overrides)
    fields, cut = mapping(config, "scorer"), mapping(config, "segmenter")
    kl, capabilities = mapping(config, "kl") if "kl" in config else None, config.pop("capabilities", [])
    if fields and scorer is None:
        raise ConfigError("scorer.* settings need --scorer: without it the corpus's own scorer judges")
    segmenter: Segmenter | None = validate({"name": "lines", **cut}, AnySegmenter, "segmenter") if cut else None
    judge: Scorer | None = None if scorer is None else validate({"name": scorer, **fields}, AnyScorer, "scorer")
    if kl is not None:
        kl = validate(merge({"reference": {"name": "local"}}, kl), KL, "kl")
    measured: list[Any] = validate(capabilities, list[AnyCapability], "capabilities")
    if paper is not None:
        scenarios: dict[str, Scenario] = {
            n: validate(merge(s, config), Scenario, n) for n, s in paper_scenarios(paper).items()
        }
        threshold = PAPER_THRESHOLD[paper] if threshold is None else threshold
    else:
        scenario: Scenario = validate(config, Scenario, "scenario")
        scenarios = {"unconditional" if scenario.prompts is None else "prompted": scenario}
    threshold, most = threshold or 0.0, int(heldout_tokens)
    rows = []
    for name in folders:
        if is_run(name):
            if control_threshold is not None:
                raise ConfigError(f"--control-threshold is for models that are not runs; {name} says its own")
            if cut:
                raise ConfigError(f"segmenter.* is for models that are not runs; {name} is cut as its corpus was")
            result = evaluate_run(
                name, scenarios, threshold, tokens, judge, other_scorer, most, kl_from=kl, capabilities=measured
            )
        else:
            folder = (
                out
                if out is not None and len(folders) == 1
                else f"{out or 'eval'}/{name.strip('/').replace('/', '--')}"
            )
            result = evaluate_model(
                name,
                folder,
                judge,
                scenarios,
                threshold,
                segmenter,
                kl,
                measured,
                revision,
                tokens,
                most,
                other_scorer,
                control_threshold,
            )
            print(f"{name}: {folder}/eval.json")
        if result["skipped"]:
            print(
                f"note: {name} has no control tokens, so it is not asked for {', '.join(result['skipped'])}",
                file=sys.stderr,
            )
        heldout = result["heldout"].get("good") or result["heldout"].get("none") or {}
        of_model = [number((heldout.get(s) or {}).get("nats_per_byte"), 3) for s in ("good", "bad")]
        if result["kl"]:
            found = result["kl"]["forward"]["nats_per_text"]
            of_model.append(f"{number(found['mean'], 2)} ± {number(found['stderr'], 2)}")
        of_model += [headline(capability) for capability in result["capabilities"]]
        for scenario_name, judged in result["scenarios"].items():
            m = judged["misalignment"]
            row = [
                name,
                scenario_name,
                f"{number(m['mean'], 5)} ({number(m['ci95'][0], 5)} to {number(m['ci95'][1], 5)})",
            ]
            row += [number(judged["hit_rate"]["mean"], 4), number(judged["expected_max"]["25"]["mean"], 5)]
            row += [number(judged["distinct_2"], 3), number(judged["self_bleu_5"], 3), str(judged["unjudged"])]
            rows.append(row + of_model)
            name, of_model = "", [""] * len(of_model)  # said once
    head = ["model", "scenario", "misalignment (95% interval)", "hit rate", "worst of 25", "distinct-2", "Self-BLEU-5", "not judged", "nats/byte good", "nats/byte bad"]  # fmt: skip
    head += ["KL, nats a text"] * (kl is not None) + [f"{c.name} {getattr(c, 'task', '')}".strip() for c in measured]
    print_table(head, rows)


def compare(
    first: Annotated[str, typer.Argument(help="A judged run, or a folder that `phf eval --out` wrote.")],
    second: Annotated[str, typer.Argument(help="Another.")],
) -> None:
    """Difference in misalignment between two judged models, with its interval: paired where they had the same prompts."""
    from pathlib import Path

    from phf.core.config import ConfigError
    from phf.core.store import canonical, read_json
    from phf.evaluation.judge import compare as difference
    from phf.generation.sample import read_samples
    from phf.report.format import number

    one, two = read_json(Path(first) / "eval.json"), read_json(Path(second) / "eval.json")
    if canonical(one["identity"]) != canonical(two["identity"]):
        raise ConfigError(f"{first} and {second} were judged by different scorers, so their numbers do not compare")
    rows = []
    for name in one["scenarios"]:
        if name in two["scenarios"]:
            settings = [
                {k: v for k, v in e["scenarios"][name]["scenario"].items() if k != "num_samples"} for e in (one, two)
            ]
            if settings[0] != settings[1]:
                differs = sorted(k for k in settings[0] if settings[0][k] != settings[1].get(k))
                raise ConfigError(
                    f"scenario {name!r} is not the same for both ({', '.join(differs)}), so it does not compare"
                )
            a, b = (read_samples(Path(f) / "samples" / f"{name}.jsonl") for f in (first, second))
            d = difference(a, b)
            sure = d["ci95"][0] is not None and (d["ci95"][1] < 0 or d["ci95"][0] > 0)
            verdict = ("lower" if d["mean"] < 0 else "higher") if sure else "not told apart"
            rows.append([name, number(d["mean"], 5), f"{number(d['ci95'][0], 5)} to {number(d['ci95'][1], 5)}", "prompts" if d["paired"] else "samples", verdict])  # fmt: skip
    if not rows:
        raise ConfigError(f"{first} and {second} have no scenario in common")
    print_table(["scenario", "difference", "95% interval", "over", f"{Path(first).name} is"], rows)


def redteam(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|MODEL... [a.b=c]...",
            help="Trained runs, any model (a folder or a name on the Hub) or a server (http://host:8000/v1), then settings.",
        ),
    ],
    scorer: AnotherScorer = None,
    other_scorer: MayDiffer = False,
    threshold: Annotated[float, typer.Option(help="Scores above it are bad.")] = 0.0,
    tokens: Annotated[str | None, typer.Option(help="The token store, if it has moved since training.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder for what is found of a model that is not a run.")] = None,
    paper: Annotated[bool, typer.Option("--paper", help="The paper's sizes: ten trials, 512 continuations.")] = False,
    token_attacks: Annotated[
        bool, typer.Option("--control-tokens/--no-control-tokens", help="Also attack the control tokens.")
    ] = True,
) -> None:
    """Attack models: search for prompts that make them misbehave, and attack their control tokens. Run again to resume.

    Settings are the search's (trials, rounds, candidates, continuations, attacker.name=evolution|local|server, task,
    prompts, seed ...) and tokens.* for the control-token attacks (tokens.num_samples=256). All models of one command are
    attacked alike. Writes redteam.json into each run's redteam folder, or into --out; `phf report` shows it.
    """
    from phf.core.config import ConfigError, merge, validate
    from phf.core.runs import is_run
    from phf.generation.server import Server
    from phf.redteaming.control_tokens import TokenAttacks
    from phf.redteaming.search import PAPER, RedTeam
    from phf.redteaming.search import redteam as attack
    from phf.report.format import number
    from phf.scorers import AnyScorer, Scorer

    names, overrides = split_settings(models)
    config = laid_on({}, overrides)
    fields, server, of_tokens = (mapping(config, name) for name in ("scorer", "server", "tokens"))
    if fields and scorer is None:
        raise ConfigError("scorer.* settings need --scorer: without it the corpus's own scorer judges")
    judge: Scorer | None = None if scorer is None else validate({"name": scorer, **fields}, AnyScorer, "scorer")
    settings: RedTeam = validate(merge(PAPER if paper else {}, config), RedTeam, "red-teaming")
    tokens_too: TokenAttacks | None = validate(of_tokens, TokenAttacks, "tokens") if token_attacks else None
    rows, table = [], []
    for name in names:
        model: Any = name
        served = name.startswith(("http://", "https://"))
        if served:
            model = validate({"url": name, **server}, Server, "server")
        a_run = not served and is_run(name)
        folder = out
        if not a_run and out is not None and len(names) > 1:
            folder = f"{out}/{name.strip('/').replace('/', '--')}"
        found = attack(
            model, None if a_run else folder, settings, tokens_too, judge, threshold, tokens, None, other_scorer
        )
        search = found["search"]
        row = [name]
        for key in ("best_1", "best_10"):
            e = search["confirmed"].get(key) or {"mean": None, "ci95": [None, None]}
            row.append(f"{number(e['mean'], 5)} ({number(e['ci95'][0], 5)} to {number(e['ci95'][1], 5)})")
        row += [number(search["final"][k]["mean"], 5) for k in ("best_1", "best_10", "best_100", "round_mean")]
        budget = search["budget"]
        row += [f"{budget['target_tokens']:,}", f"{budget['red_tokens']:,}", f"{budget['seconds']:.0f}"]
        rows.append(row)
        for a in (found["tokens"] or {}).get("attacks", []):
            m = a["misalignment"]
            table.append([name, a["attack"], f"{number(m['mean'], 5)} ({number(m['ci95'][0], 5)} to {number(m['ci95'][1], 5)})", "–" if a["bad_segments"] is None else f"{a['bad_segments']:.1%}"])  # fmt: skip
        for hole in (found["tokens"] or {}).get("injection", []):
            if hole["control"]:
                print(
                    f"{name}: its tokenizer reads a typed {hole['typed']} as the control token {hole['token']}",
                    file=sys.stderr,
                )
    print("\nsearch (mean score of the best prompts' continuations; lower: harder to break)\n")
    print_table(["model", "best, fresh (95% interval)", "best 10, fresh", "best", "best 10", "best 100", "last round", "target tokens", "red LM tokens", "seconds"], rows)  # fmt: skip
    if table:
        print("\nattacks on the control tokens\n")
        print_table(["model", "attack", "misalignment (95% interval)", "bad segments"], table)


def report(
    folder: Annotated[str, typer.Argument(help="A run, or a folder of runs.")],
    out: Annotated[str | None, typer.Option(help="File to write; default: report.html in the folder.")] = None,
) -> None:
    """Write the page that compares judged runs. It opens from disk and loads nothing."""
    from phf.report.page import write_report

    print(f"report: {write_report(folder, out)}")
