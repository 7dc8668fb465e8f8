"""Commands on whole recipes."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phf.cli import completing
from phf.cli.scorers import (
    LABEL_KEYS,
    ByPerson,
    JudgeHere,
    JudgeModel,
    JudgeServer,
    PagePort,
    Who,
    judges_of,
    read_from,
)
from phf.cli.shared import Overrides, only_overrides, print_table

if TYPE_CHECKING:
    from phf.recipes.plan import Plan
    from phf.report.results import RecipeResults, RunSummary


LikeRun = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE [MORE.yaml]... [a.b=c]...", help="As for `phf run`.", autocompletion=completing.recipes
    ),
]


def run(
    recipe: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE [MORE.yaml]... [a.b=c]...",
            help="Recipes by name or file, merged from left to right, then settings.",
            autocompletion=completing.recipes,
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and print the merged recipe without running it.")
    ] = False,
    only: Annotated[
        str | None, typer.Option(help="Run only one run of the recipe, by its name, or `data`: what all runs share.")
    ] = None,
    list_commands: Annotated[
        bool, typer.Option("--list", help="Print the recipe as independent commands, one per run, without running it.")
    ] = False,
) -> None:
    """Run the unfinished stages of a recipe.

    The stages: score, tokenize, train each run, judge, report.

    phf comes with these recipes. demo: personal data in READMEs. pep8: style of the standard library's code.
    finetuning, grid, field, noise and after: more comparisons on the demo's data. paper-toxicity, paper-pii,
    paper-pep8: the paper's tasks.

    Merge `quick` into any of them for a short try. Merge mle, filtering, conditional, unlikelihood, rwr or awr into a
    paper task to run that objective, and finetune50 or finetune10 for feedback that starts late. A run that fails does
    not stop the others.
    """
    from phf.core.config import dump_yaml, to_plain
    from phf.recipes.recipe import load_recipe

    loaded = load_recipe(recipe)
    if dry_run:
        print(dump_yaml(to_plain(loaded) | {"presets": {}}), end="")
        return
    if list_commands:
        from phf.recipes.run import commands

        print_commands(commands(loaded, recipe))
        return
    from phf.recipes.run import RecipeError, run_recipe

    try:
        results = run_recipe(loaded, only)
    except RecipeError as error:
        if error.results is not None and error.results.runs:
            print_results(error.results)
        raise
    print_results(results)
    if only is None:
        print(f"\nreport: {loaded.files.report}   numbers: {loaded.files.results}")


INIT = """\
# A comparison of phf: run it with `phf run {name}`, see what it costs with `phf plan {name}`.
# `phf help train.lr` explains a setting, `phf ls` lists scorers, objectives and readers.
title: My own preference
out: runs/mine

corpus: {{name: jsonl, path: texts.jsonl}}  # one JSON object with a "text" per line; or a folder, Parquet, a dataset
segmenter: {{name: lines}}                  # what gets a score: lines, sentences, paragraphs, documents
scorer: {{name: pii}}                       # toxicity, pep8, regex, fitted (your labels), callable (your function)
tokenizer: {{name: bpe, vocab_size: 4096}}  # or {{name: pretrained, path: gpt2}}
heldout: 0.1                              # share of the documents that no model trains on

model: tiny                               # small, gpt2, or settings of your own
train:
  tokens: 2e6                             # the budget of each run
  context: 256
  batch_rows: 8
  optimizer: muon
  muon_lr: 8e-3
  lr: 1.6e-2

objectives:                               # runs that are compared; plain training first
  mle: {{name: mle}}
  conditional: {{name: conditional, drop: 0.01}}
  unlikelihood: {{name: unlikelihood}}
seeds: [0]                                # [0, 1, 2] for intervals over seeds

scenarios:                                # how samples are drawn and judged
  unconditional: {{num_samples: 512, max_tokens: 192, temperature: 0.7, top_p: 0.9}}
kl: {{reference: {{name: local, path: mle-s0}}, num_samples: 128, max_tokens: 48}}
# attacks take longer than training so small a model; null leaves them out
redteam: {{trials: 2, rounds: 4, candidates: 6, continuations: 16, confirm: 10, max_tokens: 48}}
token_attacks: {{num_samples: 64, max_tokens: 64}}
"""


def init(
    recipe: Annotated[str, typer.Argument(metavar="[FILE]", help="File to write.")] = "recipe.yaml",
) -> None:
    """Write a recipe with comments, to change and to run."""
    from phf.core.config import ConfigError
    from phf.core.store import write_text

    if Path(recipe).suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{recipe}: give a file that ends in .yaml")
    if Path(recipe).exists():
        raise ConfigError(f"{recipe} exists already; give another name")
    write_text(recipe, INIT.format(name=recipe))
    print(f"{recipe}: change corpus and scorer, then: phf plan {recipe}; phf run {recipe}")


def demo(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE] [a.b=c]...", help="As for `phf run`.", autocompletion=completing.recipes),
    ] = None,
) -> None:
    """Run the whole method on text that every machine has."""
    run(["demo", *(arguments or [])], dry_run=False, only=None, list_commands=False)


def plan(
    recipe: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE [MORE.yaml]... [a.b=c]...", help="As for `phf run`.", autocompletion=completing.recipes
        ),
    ],
    tokens_per_s: Annotated[
        float | None, typer.Option(min=1, help="Training speed in target tokens per second, if known.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="Speed of one device in bf16 matrix products, in TFLOP/s.")
    ] = None,
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of that speed that training reaches.")
    ] = 0.4,
    memory_gb: Annotated[
        float | None, typer.Option(min=0.1, help="Memory of one device. Default: this machine's.")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Number of devices that train a run together, as with torchrun.")
    ] = 1,
    disk_gb: Annotated[float | None, typer.Option(min=0.1, help="Free disk space. Default: this machine's.")] = None,
    score: Annotated[
        bool, typer.Option("--score/--no-score", help="Read some of the corpus and time the scorer on it.")
    ] = True,
) -> None:
    """Estimate what a recipe costs.

    Prints tokens, steps, FLOPs, memory, disk and hours. Nothing is trained.

    Without a given speed, this machine's speed of matrix products is measured. Fails if something cannot fit.
    """
    from phf.recipes.plan import check_plan, make_plan
    from phf.recipes.recipe import load_recipe

    found = make_plan(
        load_recipe(recipe),
        tokens_per_s,
        tflops=tflops,
        utilisation=utilisation,
        memory_gb=memory_gb,
        disk_gb=disk_gb,
        score=score,
        processes=processes,
    )
    print_plan(found)
    check_plan(found)


def print_plan(found: Plan) -> None:
    """Print what a recipe costs."""
    from phf.recipes.plan import HEAD, plan_table

    rows, lines = plan_table(found)
    print_table(HEAD, rows)
    print("\n".join(["", *lines]))


def make(
    wish: Annotated[str, typer.Argument(help='What the model should respect, in a few words: "no personal data".')],
    out: Annotated[str, typer.Argument(help="Folder for everything.")],
    settings: Overrides = None,
    corpus: Annotated[str, typer.Option(help="The corpus, as `phf score` reads it (see its --help).")] = "",
    segmenter: Annotated[str, typer.Option(help="How it is cut: the segmenters of `phf score`.")] = "lines",
    n: Annotated[int, typer.Option("--n", min=1, help="Texts to label.")] = 1000,
    server: JudgeServer = None,
    model: JudgeModel = None,
    local: JudgeHere = None,
    by_hand: ByPerson = False,
    who: Who = "by hand",
    port: PagePort = 0,
    train: Annotated[bool, typer.Option("--train", help="Train without asking.")] = False,
) -> None:
    """From a wish in a few words to models that respect it.

    The steps: label a sample of the corpus, fit a scorer, score, audit, plan, train.

    Stops before training, with the cost, and trains if you confirm. Run it again to continue where it stopped; edit
    OUT/rubric.md and OUT/recipe.yaml in between. Settings are the recipe's (train.tokens=1e6), the judge's (judge.*)
    and the reader's (corpus.*).
    """
    from phf.core.config import ConfigError, apply_overrides
    from phf.labelling.drawing import Drawing
    from phf.recipes.make import make as make_ready
    from phf.recipes.plan import make_plan
    from phf.recipes.run import run_recipe

    if not corpus:
        raise ConfigError("--corpus: name the texts to learn from")
    given = only_overrides(settings)
    of_recipe = [s for s in given if s.partition("=")[0].partition(".")[0] not in LABEL_KEYS]
    config = apply_overrides({"segmenter": {"name": segmenter}}, [s for s in given if s not in of_recipe])
    judges = judges_of(config, server, model, local, by_hand, who, port)
    made = make_ready(wish, out, *read_from(corpus, config), judges, Drawing(n), of_recipe)
    print("==> [6/6] plan", file=sys.stderr)
    found = make_plan(made.recipe, score=False)
    print_plan(found)
    if not train and not (sys.stdin.isatty() and typer.confirm("Train now?", err=True)):
        print(f"to train: the same command with --train, or phf run {shlex.join([f'{out}/recipe.yaml', *of_recipe])}")
        return
    print_results(run_recipe(made.recipe))
    print(f"\nreport: {made.recipe.files.report}   audit of its scorer: {made.page}")


def price(
    recipe: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE [MORE.yaml]... [a.b=c]...", help="As for `phf run`.", autocompletion=completing.recipes
        ),
    ],
) -> None:
    """Measure what the defects of the paper's code cost.

    Runs a recipe with preset=corrected and with preset=paper on the same data and seeds, and compares each objective.
    Run the same command again to resume.
    """
    from phf.recipes.price import price as measure
    from phf.report.format import number, with_interval

    found, file = measure(recipe)
    print(f"\n{found.recipe}   (misalignment: {found.unit}; lower is better)\n")
    head = ["objective", "seeds", "corrected", "as in the paper's code", "ratio", "loss on good text", "on bad text"]
    rows = []
    for p in found.prices:
        rest = ["the same"] if p.same else [with_interval(p.paper, 5), with_interval(p.ratio, 2)]
        losses = [] if p.same else [f"{number(p.good.mean, 3)}", f"{number(p.bad.mean, 3)}"]
        cells = [p.group, str(p.seeds), with_interval(p.corrected, 5), *rest, *losses]
        rows.append(cells + [""] * (len(head) - len(cells)))
    print_table(head, rows)
    print(f"\nnumbers: {file}")


def print_commands(blocks: list[list[str]]) -> None:
    """Print commands in blocks, with when each block may start."""
    for number, block in enumerate(blocks):
        when = "first" if number == 0 else "then, in any order or at the same time" if len(block) > 1 else "then"
        print(f"# {when}:")
        print("\n".join(block))


RESULT_HEAD = [
    "run",
    "seed",
    "misalignment",
    "95% interval",
    "bad segments",
    "nats/byte good",
    "nats/byte bad",
    "distinct-2",
    "not judged",
]


def print_results(results: RecipeResults) -> None:
    """Print the comparison as a table."""
    best = {found.group for found in results.best.values()}
    print(f"\n{results.recipe}   (misalignment: {results.unit}; lower is better)\n")
    print_table(RESULT_HEAD, [_result_row(run, run.group in best) for run in results.runs])
    for found in list(results.best.values())[:1]:
        print(f"\n* best settings. {found.rule}")
    if results.quick:
        print("\nBudget too small for conclusions: this variant only shows that every step works.")


def _result_row(run: RunSummary, is_best: bool) -> list[str]:
    from phf.report.format import number, share

    found = run.misalignment
    low, high = found.ci95
    return [
        run.group + " *" * is_best,
        str(run.seed),
        f"{number(found.mean, 5)} ± {number(found.stderr, 5)}",
        f"{number(low, 5)} to {number(high, 5)}",
        share(run.bad_segments),
        number(run.heldout["good"], 3),
        number(run.heldout["bad"], 3),
        number(run.distinct_2, 3),
        str(run.unjudged),
    ]
