"""The command line. A command imports what it needs when it runs, so that `phf --help` is fast."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from phf.cli.about import explain, ls
from phf.cli.attacking import persist, redteam, tamper
from phf.cli.data import check, inspect, push, score, tokenize
from phf.cli.judging import compare, evaluate, report, sample
from phf.cli.recipes import demo, init, make, plan, price, run
from phf.cli.scorers import audit, fit_scorer, label
from phf.cli.training import export, export_tokens, reference, rows, train
from phf.core.threads import wait_briefly

app = typer.Typer(
    help="Pretrain language models with human feedback: score a corpus, train with any objective, judge the model.\n\n"
    "All stages in one command: `phf demo`, or `phf run` with a recipe of yours. One by one: score, inspect, tokenize, "
    "train, sample, eval, redteam, report, export.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "init": init,
    "run": run,
    "make": make,
    "plan": plan,
    "price": price,
    "score": score,
    "inspect": inspect,
    "label": label,
    "fit-scorer": fit_scorer,
    "audit": audit,
    "tokenize": tokenize,
    "rows": rows,
    "reference": reference,
    "export-tokens": export_tokens,
    "train": train,
    "sample": sample,
    "eval": evaluate,
    "compare": compare,
    "redteam": redteam,
    "tamper": tamper,
    "persist": persist,
    "report": report,
    "export": export,
    "push": push,
    "check": check,
    "ls": ls,
    "help": explain,
}
for name, command in COMMANDS.items():
    app.command(name)(command)


EXTRAS = {
    "demo": "all",
    "run": "report",
    "make": "report",
    "report": "report",
    "inspect": "report",
    "audit": "report",
    "score": "score",
    "push": "score",
    "fit-scorer": "score",
}
"""The extra that a command needs, where it is not `train`."""


def show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"phf {version('phf')}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=show_version)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point. A problem that phf knows is one message on stderr and an exit code: 2 for mistakes in the command or
    its inputs, 1 for a stage that failed."""
    wait_briefly()
    for argument in sys.argv[1:]:  # bytes that are no UTF-8 fail deep inside libraries
        if not argument.isascii() and argument != argument.encode("utf-8", "replace").decode():
            print(f"error: argument {argument!a} is not UTF-8; rename the file", file=sys.stderr)
            sys.exit(2)
        if argument == "" or argument == "out=":
            print("error: an argument is empty; give a name or a path", file=sys.stderr)
            sys.exit(2)
    try:
        app()
    except SystemExit as stop:
        if stop.code == 130:  # typer's exit code for Ctrl-C
            print("interrupted; run the same command again to resume", file=sys.stderr)
        raise
    except Exception as caught:
        from phf.core.extras import named
        from phf.core.types import PhfError

        extra = EXTRAS.get(next(iter(sys.argv[1:]), ""), "train")
        error = named(caught, "this command", extra)
        if not isinstance(error, PhfError | OSError):
            if os.environ.get("PHF_TRACEBACK"):
                raise
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            print(
                f"error: {reason} ({Path(where.filename).name}, line {where.lineno}). phf did not expect this: a "
                "damaged file, or a bug. PHF_TRACEBACK=1 shows more; please report it",
                file=sys.stderr,
            )
            sys.exit(70)  # EX_SOFTWARE
        label, code = (error.label, error.exit_code) if isinstance(error, PhfError) else ("error", 1)
        print(f"{label}: {error}", file=sys.stderr)
        sys.exit(code)
