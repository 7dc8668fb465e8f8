"""The command line. Floor 6. Imports what a command needs when it runs, so that `phf --help` is quick."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from phf.cli.data import fit_scorer, inspect, push, score, tokenize
from phf.cli.judging import compare, evaluate, redteam, report, sample
from phf.cli.recipes import plan, run
from phf.cli.training import export, train

app = typer.Typer(
    help="Pretrain language models with human feedback: score a corpus, train with any objective, judge the model.\n\n"
    "The whole path at once: `phf run demo`. Or stage by stage: score, inspect, tokenize, train, sample, eval, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

COMMANDS: dict[str, Callable[..., None]] = {
    "score": score,
    "inspect": inspect,
    "fit-scorer": fit_scorer,
    "push": push,
    "export": export,
    "tokenize": tokenize,
    "train": train,
    "sample": sample,
    "eval": evaluate,
    "compare": compare,
    "redteam": redteam,
    "report": report,
    "run": run,
    "plan": plan,
}
for name, command in COMMANDS.items():
    app.command(name)(command)


def main() -> None:
    """Entry point: mistakes of the user are one message and exit code 2, failures of a stage exit code 1."""
    from phf.core.config import ConfigError
    from phf.core.store import StoreError

    try:
        app()
    except (ConfigError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 130:  # what typer makes of Ctrl-C
            print("interrupted; run the same command again to go on", file=sys.stderr)
        raise
    except (RuntimeError, OSError) as error:
        if type(error).__name__ == "Submitted":
            print(f"submitted: {error}", file=sys.stderr)
            sys.exit(75)  # EX_TEMPFAIL: not an error, but the next stage must wait
        expected = isinstance(error, OSError) or type(error).__module__.startswith("phf.")
        if not expected:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
