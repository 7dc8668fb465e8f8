"""Commands on whole recipes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from phf.cli.shared import print_table


def run(
    recipe: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE [MORE.yaml]... [a.b=c]...",
            help="Recipes by name or file, merged left to right, then settings.",
        ),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the merged recipe, run nothing.")] = False,
    only: Annotated[
        str | None, typer.Option(help="Only one run of the recipe, by its name, or `data`: what all runs share.")
    ] = None,
    list_commands: Annotated[
        bool, typer.Option("--list", help="Print the recipe as independent commands, one a run, and run nothing.")
    ] = False,
) -> None:
    """Run every stage of a recipe that is not done: score, tokenise, train each run, judge, report.

    Recipes of phf: demo (PII in READMEs), pep8 (the standard library), finetuning and grid (on the demo's data), quick (laid
    on any of these, for a fast try); paper-toxicity, paper-pii, paper-pep8 with mle, filtering, conditional, unlikelihood,
    rwr, awr and finetune50, finetune10 laid on them. A run that fails does not stop the others.
    """
    from phf.core.config import dump_yaml, to_plain
    from phf.recipes.recipe import load_recipe

    loaded = load_recipe(recipe)
    if dry_run:
        print(dump_yaml(to_plain(loaded) | {"presets": {}}), end="")
        return
    if list_commands:
        from phf.recipes.run import commands

        for number, block in enumerate(commands(loaded, recipe)):
            print(
                ("# then, in any order or at the same time:" if len(block) > 1 else "# then:") if number else "# first:"
            )
            print("\n".join(block))
        return
    from phf.recipes.run import RecipeError, run_recipe

    try:
        results = run_recipe(loaded, only)
    except RecipeError as error:
        if error.results and error.results["runs"]:
            show_results(error.results)
        raise
    show_results(results)
    if only is None:
        print(f"\nreport: {loaded.folder}/report.html   numbers: {loaded.folder}/results.json")


def plan(
    recipe: Annotated[list[str], typer.Argument(metavar="RECIPE [MORE.yaml]... [a.b=c]...", help="As for `phf run`.")],
    tokens_per_s: Annotated[
        float | None, typer.Option(min=1, help="Training speed, where it is known: target tokens a second.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="What the hardware reaches in bf16 matrix products, in TFLOP/s.")
    ] = None,
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of that rate which training reaches.")
    ] = 0.4,
    memory_gb: Annotated[
        float | None, typer.Option(min=0.1, help="Memory of the device. Default: this machine's.")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes (devices) that train a run together, as torchrun starts them.")
    ] = 1,
    disk_gb: Annotated[float | None, typer.Option(min=0.1, help="Free disk space. Default: this machine's.")] = None,
    score: Annotated[
        bool, typer.Option("--score/--no-score", help="Read some of the corpus and time the scorer on it.")
    ] = True,
) -> None:
    """Say what a recipe takes before anything runs: tokens, steps, FLOPs, memory, disk, the scorer's time, hours.

    Without a given speed, this machine's rate of matrix products is measured. Fails where something cannot fit.
    """
    from phf.recipes.plan import make_plan, told
    from phf.recipes.recipe import load_recipe

    found = make_plan(load_recipe(recipe), tokens_per_s, tflops, utilisation, memory_gb, disk_gb, score, processes)
    rows, lines = told(found)
    print_table(
        ["run", "parameters", "tokens", "steps", "of 20 a parameter", "FLOPs", "memory GB", "disk GB", "hours"], rows
    )
    print()
    print("\n".join(lines))
    if found["problems"]:
        from phf.core.config import ConfigError

        raise ConfigError("this cannot run as it is:\n" + "\n".join(f"  {p}" for p in found["problems"]))


def show_results(results: dict[str, Any]) -> None:
    """The comparison as a table in the terminal."""
    from phf.report.format import number

    rows = []
    best = {found["group"] for found in results["best"].values()}
    for r in results["runs"]:
        m = r["misalignment"]
        rows.append([r["group"] + " *" * (r["group"] in best), str(r["seed"]), f"{number(m['mean'], 5)} ± {number(m['stderr'], 5)}", f"{number(m['ci95'][0], 5)} to {number(m['ci95'][1], 5)}",
                     "–" if r["bad_segments"] is None else f"{r['bad_segments']:.1%}", number(r["heldout"]["good"], 3), number(r["heldout"]["bad"], 3),
                     number(r["distinct_2"], 3), f"{r['unjudged']}"])  # fmt: skip
    print(f"\n{results['recipe']}   (misalignment: {results['unit']}; lower is better)\n")
    print_table(
        [
            "run",
            "seed",
            "misalignment",
            "95% interval",
            "bad segments",
            "nats/byte good",
            "nats/byte bad",
            "distinct-2",
            "not judged",
        ],
        rows,
    )
    if best:
        print(f"\n* best setting. {next(iter(results['best'].values()))['rule']}")
    if results["quick"]:
        print("\nToo short to conclude anything from: the quick variant only shows that every step works.")
