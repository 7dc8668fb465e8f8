"""The command line. Floor 6. Imports what a command needs when it runs, so that `phf --help` is quick."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Pretrain language models with human feedback: score a corpus, train with any objective, judge the model.\n\n"
    "The whole path at once: `phf run demo`. Or stage by stage: score, tokenize, train, sample, eval, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[FILE.yaml|a.b=c]...", help="Recipe files, merged left to right, then settings."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Settings, for example num_samples=64.")
]


def _split(arguments: list[str] | None) -> tuple[list[str], list[str]]:
    arguments = arguments or []
    return [a for a in arguments if "=" not in a], [a for a in arguments if "=" in a]


def _only_overrides(arguments: list[str] | None) -> list[str]:
    from phf.config import ConfigError

    files, overrides = _split(arguments)
    if files:
        raise ConfigError(f"unexpected argument {files[0]!r}: settings have the form a.b=c")
    return overrides


@app.command()
def score(
    corpus: Annotated[
        str,
        typer.Argument(help="A .jsonl or .parquet file, a folder of files, installed_packages or standard_library."),
    ],
    out: Annotated[str, typer.Argument(help="Folder to write the scored corpus into.")],
    settings: Overrides = None,
    scorer: Annotated[
        str, typer.Option(help="pii, pep8, regex (scorer.pattern=...) or lexicon (scorer.path=...).")
    ] = "pii",
    segmenter: Annotated[
        str, typer.Option(help="lines, sentences, paragraphs, documents or windows (segmenter.chars=...).")
    ] = "lines",
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    max_unjudged: Annotated[
        float, typer.Option(min=0, max=1, help="Fail if more than this share of segments cannot be judged.")
    ] = 0.01,
) -> None:
    """Cut a corpus into segments and score each. Run it again to resume.

    Writes Parquet with the columns of the published scored data sets, and a manifest with counts and what was set aside.
    """
    from phf.annotate import score_corpus
    from phf.config import merge, parse_override, validate
    from phf.corpus import AnyCorpus, from_path
    from phf.scorers import AnyScorer
    from phf.segment import AnySegmenter

    config: dict[str, Any] = {"corpus": from_path(corpus), "scorer": {"name": scorer}, "segmenter": {"name": segmenter}}
    for override in _only_overrides(settings):
        config = merge(config, parse_override(override))
    _known_keys(config, ("corpus", "scorer", "segmenter"))
    manifest = score_corpus(
        validate(config["corpus"], AnyCorpus, "corpus"),
        validate(config["segmenter"], AnySegmenter, "segmenter"),
        validate(config["scorer"], AnyScorer, "scorer"),
        out,
        workers,
        max_unjudged,
    )
    counts = manifest["counts"]
    print(
        f"{counts['documents']:,} documents, {counts['segments']:,} segments, {counts['chars']:,} characters; "
        f"{counts['bad_segments'] / counts['segments']:.1%} of segments score above 0, {counts['unjudged']:,} not judged"
    )
    if manifest["rejected"]:
        print("set aside: " + ", ".join(f"{n} x {why}" for why, n in manifest["rejected"].items()))


@app.command()
def tokenize(
    scored: Annotated[
        str, typer.Argument(help="What `phf score` wrote, or a folder of Parquet files with texts and scores.")
    ],
    out: Annotated[str, typer.Argument(help="Folder to write the token store into.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or Hub name of a tokenizer. Default: train a byte-level BPE on the corpus."),
    ] = None,
    vocab_size: Annotated[int, typer.Option(min=257, help="Entries of the BPE that is trained.")] = 8192,
    heldout: Annotated[float, typer.Option(min=0, max=0.99, help="Share of documents kept out of training.")] = 0.05,
) -> None:
    """Tokenise a scored corpus, once for every objective. Run it again to resume."""
    from phf.tokens import PretrainedTokenizer, TrainBPE, tokenize_corpus

    config = TrainBPE(vocab_size) if tokenizer is None else PretrainedTokenizer(tokenizer)
    manifest = tokenize_corpus(scored, config, out, heldout)
    counts = manifest["counts"]
    print(
        f"{counts['documents']:,} documents, {counts['tokens']:,} tokens ({counts['train_tokens']:,} for training), vocabulary {manifest['vocab_size']:,}"
    )
    if counts["roundtrip_lossy"]:
        print(
            f"warning: {counts['roundtrip_lossy']} of {counts['roundtrip_checked']} documents checked do not decode to their text with this tokenizer",
            file=sys.stderr,
        )


@app.command()
def train(
    tokens: Annotated[str, typer.Argument(help="What `phf tokenize` wrote.")],
    out: Annotated[str, typer.Argument(help="Folder of the run.")],
    settings: Settings = None,
) -> None:
    """Train a model with an objective. Run it again to resume.

    Settings are `objective` (objective.name=conditional objective.threshold=0 ...), `model` (model.name=from_config
    with model.config.model_type=llama ..., or model.name=from_weights model.path=...), `train` (train.tokens=1e7
    train.lr=1e-3 ...) and `seed`. Recipe files may hold them too. With torchrun or accelerate launch: unchanged.
    """
    from phf.config import load
    from phf.recipe import TrainStage
    from phf.train import train as train_run

    files, overrides = _split(settings)
    stage = load(files, overrides, TrainStage)
    manifest = train_run(tokens, out, stage.model, stage.objective, stage.train, stage.seed)
    if manifest:
        counts = manifest["counts"]
        print(
            f"{counts['tokens']:,} tokens in {counts['steps']:,} steps ({counts['epochs']:.2f} epochs), {manifest['seconds']:.0f} s; model in {out}/model"
        )


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="A run, a model folder, or a name on the Hub.")],
    out: Annotated[str, typer.Argument(help="JSON lines file to write.")],
    settings: Overrides = None,
) -> None:
    """Write texts with a model: num_samples, max_tokens, temperature, top_p, top_k, control, prompts, seed ... (a.b=c)."""
    from phf.config import load
    from phf.sample import Scenario, load_model, write_samples
    from phf.sample import sample as draw_samples

    scenario = load([], _only_overrides(settings), Scenario)
    samples = draw_samples(load_model(model), scenario)
    write_samples(out, samples)
    print(f"{len(samples):,} samples in {out}")


@app.command(name="eval")
def evaluate(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN... [a.b=c]...", help="Trained runs, then scenario settings.")
    ],
    tokens: Annotated[str | None, typer.Option(help="The token store, if it has moved since training.")] = None,
    threshold: Annotated[float, typer.Option(help="Scores above it are bad.")] = 0.0,
    scorer: Annotated[
        str | None,
        typer.Option(help="Another scorer than the corpus's (pii, pep8, regex, lexicon, with scorer.* settings)."),
    ] = None,
    other_scorer: Annotated[
        bool, typer.Option("--other-scorer", help="Allow a scorer that differs from the corpus's.")
    ] = False,
) -> None:
    """Judge runs: misalignment of samples, held-out loss, diversity. Writes eval.json and samples into each run."""
    from phf.config import merge, parse_override, validate
    from phf.evaluate import evaluate_run
    from phf.report import number
    from phf.sample import Scenario
    from phf.scorers import AnyScorer, Scorer

    folders, overrides = _split(runs)
    config: dict[str, Any] = {}
    for override in overrides:
        config = merge(config, parse_override(override))
    fields = config.pop("scorer", {})
    judge: Scorer | None = None if scorer is None else validate({"name": scorer, **fields}, AnyScorer, "scorer")
    scenario: Scenario = validate(config, Scenario, "scenario")
    results = [
        (run, evaluate_run(run, {"unconditional": scenario}, threshold, tokens, judge, other_scorer)) for run in folders
    ]
    rows = []
    for run, result in results:
        judged = result["scenarios"]["unconditional"]
        heldout = result["heldout"].get("good") or result["heldout"].get("none") or {}
        m = judged["misalignment"]
        rows.append([run, f"{number(m['mean'], 5)} ({number(m['ci95'][0], 5)} to {number(m['ci95'][1], 5)})", *(number((heldout.get(s) or {}).get("nats_per_byte"), 3) for s in ("good", "bad")), str(judged["unjudged"])])  # fmt: skip
    _table(["run", "misalignment (95% interval)", "nats/byte good", "nats/byte bad", "not judged"], rows)


@app.command()
def report(
    folder: Annotated[str, typer.Argument(help="A run, or a folder of runs.")],
    out: Annotated[str | None, typer.Option(help="File to write; default: report.html in the folder.")] = None,
) -> None:
    """Write the page that compares judged runs. It opens from disk and loads nothing."""
    from phf.report import write_report

    print(f"report: {write_report(folder, out)}")


@app.command()
def run(
    recipe: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE [MORE.yaml]... [a.b=c]...",
            help="Recipes by name or file, merged left to right, then settings.",
        ),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the merged recipe, run nothing.")] = False,
) -> None:
    """Run every stage of a recipe that is not done: score, tokenise, train each objective, judge, report.

    Recipes of phf: demo (PII in READMEs), pep8 (the standard library); quick, laid on either, for a fast try.
    """
    from phf.config import dump_yaml, to_plain
    from phf.recipe import load_recipe

    loaded = load_recipe(recipe)
    if dry_run:
        print(dump_yaml(to_plain(loaded)), end="")
        return
    from phf.recipe import run_recipe

    results = run_recipe(loaded)
    show_results(results)
    print(f"\nreport: {loaded.folder}/report.html   numbers: {loaded.folder}/results.json")


def show_results(results: dict[str, Any]) -> None:
    """The comparison as a table in the terminal."""
    from phf.report import number

    rows = []
    for r in results["runs"]:
        m = r["misalignment"]
        rows.append([r["objective"], str(r["seed"]), f"{number(m['mean'], 5)} ± {number(m['stderr'], 5)}", f"{number(m['ci95'][0], 5)} to {number(m['ci95'][1], 5)}",
                     "–" if r["bad_segments"] is None else f"{r['bad_segments']:.1%}", number(r["heldout"]["good"], 3), number(r["heldout"]["bad"], 3),
                     number(r["distinct_2"], 3), f"{r['unjudged']}"])  # fmt: skip
    print(f"\n{results['recipe']}   (misalignment: {results['unit']}; lower is better)\n")
    _table(
        [
            "objective",
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
    if results["quick"]:
        print("\nToo short to conclude anything from: the quick variant only shows that every step works.")


def _known_keys(config: dict[str, Any], known: tuple[str, ...]) -> None:
    from phf.config import ConfigError, did_you_mean

    for key in config:
        if key not in known:
            raise ConfigError(f"unknown setting {key!r}{did_you_mean(key, known)}")


def _table(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    for number, line in enumerate([head, *rows]):
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def main() -> None:
    """Entry point: mistakes of the user are one message and exit code 2, failures of a stage exit code 1."""
    from phf.config import ConfigError
    from phf.store import StoreError

    try:
        app()
    except (ConfigError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except (RuntimeError, OSError) as error:
        expected = isinstance(error, OSError) or type(error).__module__.startswith("phf.")
        if not expected:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
