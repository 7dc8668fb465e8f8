"""Commands on text: from a corpus to tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from phf.cli import completing
from phf.cli.shared import (
    Overrides,
    checked,
    finite,
    known_keys,
    only_overrides,
    print_table,
    scorer_option,
    split_settings,
    take,
)
from phf.core.text import by_reason, counted

SCORE_KEYS = ("corpus", "scorer", "segmenter", "executor")


def score(
    corpus: Annotated[
        str,
        typer.Argument(
            help="A file or folder of .jsonl, .json, .csv, .tsv (also compressed), .parquet or text, s3://..., "
            "hf://datasets/owner/name, "
            "installed_packages or standard_library. With --add: a scored corpus."
        ),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="OUT [a.b=c]...", help="Folder for the scored corpus, then settings."),
    ] = None,
    scorer: Annotated[
        str,
        typer.Option(
            help="pii, presidio, pep8, toxicity (scorer.model=...), fitted (scorer.path=...), regex "
            "(scorer.pattern=...), lexicon (scorer.path=...), callable (scorer.function=module:name) or combination "
            "(scorer.scorers=[...]).",
            autocompletion=completing.scorers,
        ),
    ] = "pii",
    segmenter: Annotated[
        str,
        typer.Option(
            help="lines, sentences, paragraphs, documents, windows (segmenter.chars=...) or given (the corpus's own).",
            autocompletion=completing.segmenters,
        ),
    ] = "lines",
    add: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Add scores of another scorer to a scored corpus, under this name."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes. Each gets one of several GPUs.")] = 1,
    max_unjudged: Annotated[
        float, typer.Option(min=0, max=1, help="Fail if more than this share of the segments cannot be judged.")
    ] = 0.01,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="On an object store, remove a result of other settings. In a local folder it is always moved to "
            "OUT.old-1 instead.",
        ),
    ] = False,
    executor: Annotated[
        str, typer.Option(help="local, slurm (executor.partition=...) or ray (executor.address=...).")
    ] = "local",
) -> None:
    """Cut a corpus into segments and score each one. Run the same command again to resume.

    Writes Parquet files with the columns of the published scored datasets, and a manifest with counts and skipped
    rows.
    """
    from phf.core.config import ConfigError, Plain, apply_overrides
    from phf.data.canaries import AnyCorpus
    from phf.data.readers import from_path
    from phf.data.scored import bad_above_of
    from phf.data.segment import AnySegmenter
    from phf.scorers import AnyScorer
    from phf.scoring.score import add_scores, score_corpus, score_plain

    folders, settings = split_settings(arguments)
    wanted = 1 if add is None else 0
    if len(folders) < wanted:  # a folder's name may hold "="
        named = [a for a in settings if a.partition("=")[0] not in SCORE_KEYS and "." not in a.partition("=")[0]]
        folders += named[:wanted]
        settings = [a for a in settings if a not in folders]
    if len(folders) < wanted:
        raise ConfigError("give the folder to write into: phf score CORPUS OUT")
    if len(folders) > wanted:
        raise ConfigError(f"unexpected argument {folders[-1]!r}: settings have the form a.b=c")
    config: Plain = {
        "scorer": {"name": scorer},
        "segmenter": {"name": segmenter},
        "executor": {"name": executor},
    }
    if add is None:
        config["corpus"] = from_path(corpus)
    config = apply_overrides(config, settings)
    known_keys(config, SCORE_KEYS)
    if add is None:
        _keep_path(config["corpus"], corpus, settings)
    runner = _executor(config["executor"], "score", score_plain)
    judge: Any = checked(config["scorer"], AnyScorer, "scorer")
    if add is not None:
        manifest = add_scores(
            corpus,
            judge,
            name=add,
            workers=workers,
            max_unjudged=max_unjudged,
            executor=runner,
            overwrite=overwrite,
        )
    else:
        reader: Any = checked(config["corpus"], AnyCorpus, "corpus")
        cutter: Any = checked(config["segmenter"], AnySegmenter, "segmenter")
        manifest = score_corpus(
            reader,
            cutter,
            scorer=judge,
            out=folders[0],
            workers=workers,
            max_unjudged=max_unjudged,
            executor=runner,
            overwrite=overwrite,
        )
    counts = manifest.counts
    print(
        f"{counted(counts.documents, 'document')}, {counted(counts.segments, 'segment')}, "
        f"{counted(counts.chars, 'character')}; "
        f"{counts.bad_segments / max(counts.segments, 1):.1%} of the segments score above {bad_above_of(manifest):g}, "
        f"{counts.unjudged:,} not judged"
    )
    if manifest.rejected:
        print(f"skipped: {by_reason(manifest.rejected, manifest.examples)}")
    if manifest.failures:
        print(f"not judged: {by_reason(manifest.failures, manifest.examples)}")
    if manifest.bad_above is None and counts.segments and counts.bad_segments > 0.95 * counts.segments:
        print(
            "warning: nearly every segment scores above 0; if these are not counts of faults, say which scores are bad "
            "with scorer.threshold=...",
            file=sys.stderr,
        )


def _keep_path(config: Any, corpus: str, settings: list[str]) -> None:
    """Read the corpus that the command names, with whatever reader the settings choose."""
    from phf.core.config import ConfigError

    if not isinstance(config, dict) or config.get("name") in (None, corpus):
        return
    for setting in settings:
        name, _, path = setting.partition("=")
        if name == "corpus.path" and path not in (corpus, corpus.removeprefix("hf://datasets/")):
            raise ConfigError(f"two corpora: {corpus} and corpus.path={path}; give one")
    config.setdefault("path", corpus)


def _executor(config: Any, stage: str, run: Callable[[Any], None]) -> Any:
    """What runs the shards of a stage elsewhere; None: this machine. `run`: does a job that was sent as JSON."""
    from phf.core.config import ConfigError

    if config["name"] == "local":
        if len(config) > 1:
            raise ConfigError("executor.* settings need --executor slurm or --executor ray")
        return None
    from phf.scoring.cluster import AnyExecutor, executor

    return executor(checked(config, AnyExecutor, "executor"), run, stage)


def inspect(
    scored: Annotated[
        str, typer.Argument(help="The output of `phf score`, or a folder of Parquet files with texts and scores.")
    ],
    out: Annotated[str | None, typer.Option(help="Page to write. Default: inspect.html in the folder.")] = None,
    scores: Annotated[
        str | None, typer.Option(help="Name of the scores to inspect, if `phf score --add` added some.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(callback=finite, help="Scores above it are bad. Default: chosen from the scores.")
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(help="Field of the documents' metadata that is true for bad ones. Adds precision and recall."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="The corpus's token store. Adds the share of its tokens that a threshold hits.")
    ] = None,
) -> None:
    """Look at the scores of a corpus.

    Writes a page with the distribution, thresholds and examples from best to worst, and the numbers as JSON.
    """
    from phf.report.format import number
    from phf.report.inspect import write_inspection

    page, found = write_inspection(scored, out, preference=scores, threshold=threshold, label=label, tokens_dir=tokens)
    levels = ("0.5", "0.9", "0.99", "1.0")
    print_table(
        [found.preference, "count", "score 0", "mean", *(f"quantile {q}" for q in levels)],
        [
            [name, f"{part.n:,}", f"{part.zero:.1%}", number(part.mean, 5)]
            + [number(part.quantiles[q], 5) for q in levels]
            for name, part in (("segments", found.segments), ("documents", found.documents))
        ],
    )
    suggested = found.suggested
    print(
        f"suggested thresholds: {suggested.filtering:.6g} for filtering, "
        f"{suggested.conditional:.6g} for conditional and unlikelihood"
    )
    print(f"page: {page}   numbers: {page.with_suffix('.json')}")


def check(
    folder: Annotated[str, typer.Argument(help="Anything that phf wrote: one stage's folder, a run, a whole recipe.")],
) -> None:
    """Compare every file below a folder with its record.

    The record is the size and hash of each file, which its stage wrote.
    """
    from phf.core.check import check_below
    from phf.core.store import StoreError

    damaged = 0
    for found in check_below(folder):
        damaged += bool(found.problems)
        print(
            f"{found.folder} ({found.what}): " + ("; ".join(found.problems) or f"{counted(found.files, 'file')} whole")
        )
    if damaged:
        raise StoreError(
            f"{counted(damaged, 'folder')} damaged: restore the files from a copy, or rename the folder and run its "
            "stage again"
        )


def push(
    scored: Annotated[str, typer.Argument(help="The output of `phf score`.")],
    repo: Annotated[str, typer.Argument(help="Dataset on the Hub to push to: owner/name.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make a new dataset public. Without this option it is private.")
    ] = False,
) -> None:
    """Push a scored corpus to the Hub.

    The dataset card reports the scorer, the sizes and the failures.
    """
    from phf.scoring.publish import push_scored

    print(f"pushed: {push_scored(scored, repo, private=not public)}")


def tokenize(
    scored: Annotated[
        str, typer.Argument(help="The output of `phf score`, or a folder of Parquet files with texts and scores.")
    ],
    out: Annotated[str, typer.Argument(help="Folder for the token store.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or Hub name of a tokenizer. Default: train a byte-level BPE on the corpus."),
    ] = None,
    vocab_size: Annotated[int, typer.Option(min=257, help="Vocabulary size of a BPE that is trained.")] = 8192,
    heldout: Annotated[float, typer.Option(min=0, max=0.99, help="Share of the documents to hold out.")] = 0.05,
    lossy: Annotated[
        bool,
        typer.Option("--lossy", help="Accept a tokenizer that changes texts, for example to lower case."),
    ] = False,
    column: Annotated[
        list[str] | None,
        typer.Option(
            help="Also tokenize this field of the corpus, which says something about each document "
            "(objective.name=metadata). May be given several times."
        ),
    ] = None,
    token_scores: Annotated[
        bool,
        typer.Option(
            "--token-scores",
            help="Also score single tokens, for scorers that report the places of faults (train.token_scores=true).",
        ),
    ] = False,
    settings: Overrides = None,
    scorer: Annotated[
        str | None,
        typer.Option(help="With --token-scores: the corpus's scorer, where it needs a model (token_classifier)."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes.")] = 1,
    executor: Annotated[
        str, typer.Option(help="local, slurm (executor.partition=...) or ray (executor.address=...).")
    ] = "local",
) -> None:
    """Tokenize a scored corpus, once for all objectives. Run the same command again to resume.

    Settings are those of --scorer (scorer.model=...) and of --executor.
    """
    from phf.core.config import ConfigError, apply_overrides
    from phf.tokens.parts import run_plain
    from phf.tokens.store import tokenize_corpus
    from phf.tokens.tokenizer import PretrainedTokenizer, TrainBPE

    given = apply_overrides({}, only_overrides(settings))
    fields = take(given, "scorer")
    known_keys(given, ("scorer", "executor"))
    runner = _executor({"name": executor, **take(given, "executor")}, "tokenize", run_plain)
    if (scorer or fields) and not token_scores:
        raise ConfigError("--scorer is for --token-scores: the scores of segments are those of the corpus")
    config = TrainBPE(vocab_size) if tokenizer is None else PretrainedTokenizer(tokenizer, lossy=lossy)
    manifest = tokenize_corpus(
        scored,
        config,
        out,
        heldout,
        token_scores,
        columns=column or (),
        scorer=scorer_option(scorer, fields),
        workers=workers,
        executor=runner,
    )
    counts = manifest.counts
    print(
        f"{counted(counts.documents, 'document')}, {counted(counts.tokens, 'token')} ({counts.train_tokens:,} for "
        "training), "
        f"vocabulary {manifest.vocab_size:,}"
    )
    if manifest.rejected:
        print(f"skipped: {by_reason(manifest.rejected, manifest.examples)}")
    if counts.roundtrip_lossy:
        print(
            f"warning: with this tokenizer, {counts.roundtrip_lossy} of {counts.roundtrip_checked} checked documents "
            "do not decode to their text",
            file=sys.stderr,
        )
