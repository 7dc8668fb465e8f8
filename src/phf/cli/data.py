"""Commands on texts: from a corpus to tokens."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from phf.cli.shared import known_keys, laid_on, print_table, split_settings


def score(
    corpus: Annotated[
        str,
        typer.Argument(
            help="A .jsonl or .parquet file, a folder of files, s3://..., hf://datasets/owner/name, installed_packages or "
            "standard_library. With --add: a scored corpus."
        ),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="OUT [a.b=c]...", help="Folder to write the scored corpus into, then settings."),
    ] = None,
    scorer: Annotated[
        str,
        typer.Option(
            help="pii, presidio, pep8, toxicity (scorer.model=...), fitted (scorer.path=...), regex (scorer.pattern=...), "
            "lexicon (scorer.path=...), callable (scorer.function=module:name) or combination (scorer.scorers=[...])."
        ),
    ] = "pii",
    segmenter: Annotated[
        str,
        typer.Option(
            help="lines, sentences, paragraphs, documents, windows (segmenter.chars=...) or given (the corpus's own)."
        ),
    ] = "lines",
    add: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Score a scored corpus once more, beside the scores it has, under this name."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    max_unjudged: Annotated[
        float, typer.Option(min=0, max=1, help="Fail if more than this share of segments cannot be judged.")
    ] = 0.01,
    executor: Annotated[
        str, typer.Option(help="local, slurm (executor.partition=...) or ray (executor.address=...).")
    ] = "local",
) -> None:
    """Cut a corpus into segments and score each. Run it again to resume.

    Writes Parquet with the columns of the published scored data sets, and a manifest with counts and what was set aside.
    """
    from phf.core.config import ConfigError, validate
    from phf.data.readers import AnyCorpus, from_path
    from phf.data.segment import AnySegmenter
    from phf.scorers import AnyScorer
    from phf.scoring.score import add_scores, score_corpus

    folders, settings = split_settings(arguments)
    if len(folders) != (add is None):
        raise ConfigError(
            "give the folder to write into: phf score CORPUS OUT"
            if add is None and not folders
            else f"unexpected argument {folders[-1]!r}: settings have the form a.b=c"
        )
    config: dict[str, Any] = {
        "scorer": {"name": scorer},
        "segmenter": {"name": segmenter},
        "executor": {"name": executor},
    }
    if add is None:
        config["corpus"] = from_path(corpus)
    config = laid_on(config, settings)
    known_keys(config, ("corpus", "scorer", "segmenter", "executor"))
    elsewhere = None
    if config["executor"] != {"name": "local"}:
        from phf.scoring.cluster import AnyExecutor
        from phf.scoring.cluster import executor as make_executor

        elsewhere = make_executor(validate(config["executor"], AnyExecutor, "executor"))
    judge: Any = validate(config["scorer"], AnyScorer, "scorer")
    if add is not None:
        manifest = add_scores(corpus, judge, add, workers, max_unjudged, elsewhere)
    else:
        manifest = score_corpus(
            validate(config["corpus"], AnyCorpus, "corpus"),
            validate(config["segmenter"], AnySegmenter, "segmenter"),
            judge,
            folders[0],
            workers,
            max_unjudged,
            elsewhere,
        )
    counts = manifest["counts"]
    print(
        f"{counts['documents']:,} documents, {counts['segments']:,} segments, {counts['chars']:,} characters; "
        f"{counts['bad_segments'] / max(counts['segments'], 1):.1%} of segments score above 0, {counts['unjudged']:,} not judged"
    )
    if manifest["rejected"]:
        print("set aside: " + ", ".join(f"{n} x {why}" for why, n in manifest["rejected"].items()))


def inspect(
    scored: Annotated[
        str, typer.Argument(help="What `phf score` wrote, or a folder of Parquet files with texts and scores.")
    ],
    out: Annotated[str | None, typer.Option(help="Page to write; default: inspect.html in the folder.")] = None,
    scores: Annotated[str | None, typer.Option(help="Which scores, where `phf score --add` added some.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Scores above it are bad. Default: found from the scores.")
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(help="Field of the documents' metadata that is true for bad ones: precision and recall."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="The corpus's token store: what share of its tokens a threshold calls bad.")
    ] = None,
) -> None:
    """Look at the scores: distribution, thresholds, examples from best to worst. Writes a page and the numbers as JSON."""
    from phf.report.format import number
    from phf.report.inspect import write_inspection

    page, found = write_inspection(scored, out, scores, threshold, label, tokens)
    levels = ("0.5", "0.9", "0.99", "1.0")
    print_table(
        [found["preference"], "count", "score 0", "mean", *(f"quantile {q}" for q in levels)],
        [
            [name, f"{found[name]['n']:,}", f"{found[name]['zero']:.1%}", number(found[name]["mean"], 5)]
            + [number(found[name]["quantiles"][q], 5) for q in levels]
            for name in ("segments", "documents")
        ],
    )
    suggested = found["suggested"]
    print(
        f"suggested thresholds: filtering {suggested['filtering']:.6g}, conditional and unlikelihood {suggested['conditional']:.6g}"
    )
    print(f"page: {page}   numbers: {page.with_suffix('.json')}")


def fit_scorer(
    labels: Annotated[str, typer.Argument(help="Labelled texts: .jsonl, .csv, .tsv or .parquet.")],
    out: Annotated[str, typer.Argument(help="Folder to write the scorer into.")],
    text: Annotated[str, typer.Option(help="Column with the text.")] = "text",
    label: Annotated[str, typer.Option(help="Column with the label: true or false, 1 or 0, or see --bad.")] = "label",
    bad: Annotated[str | None, typer.Option(help="Values of the label that mean bad, separated by commas.")] = None,
    test: Annotated[
        list[str] | None,
        typer.Option(help="Other labelled texts to measure on: FILE or FILE:TEXT:LABEL[:BAD,BAD]. May be repeated."),
    ] = None,
    kind: Annotated[str, typer.Option(help="ngrams (quick) or transformer (finetunes --model).")] = "ngrams",
    model: Annotated[str | None, typer.Option(help="Model to finetune: a folder or a name on the Hub.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Fit a scorer to your own labels. Then: phf score CORPUS OUT --scorer fitted scorer.path=FOLDER

    A fifth of the texts is kept out of the fit to measure on; probabilities are calibrated.
    """
    from phf.core.config import ConfigError, did_you_mean
    from phf.report.format import number
    from phf.scorers.fitting import fit_scorer as fit
    from phf.scorers.fitting import read_labels

    if kind not in ("ngrams", "transformer"):
        raise ConfigError(f"--kind {kind!r}{did_you_mean(kind, ('ngrams', 'transformer'))}")
    tests = []
    for spec in test or []:
        path, *columns = spec.split(":")
        columns += [text, label][len(columns) :] if len(columns) < 2 else []
        values = (
            columns[2].split(",")
            if len(columns) > 2
            else (bad.split(",") if bad and len(spec.split(":")) == 1 else None)
        )
        tests.append(read_labels(path, columns[0], columns[1], values))
    card = fit(read_labels(labels, text, label, bad.split(",") if bad else None), out, tests, kind, model, seed=seed)  # type: ignore[arg-type]
    rows = []
    for name, m in card["metrics"].items():
        half = m["at"]["0.5"]
        rows.append([name, f"{m['n']:,}", f"{m['bad']:,}", f"{number(m['auc'], 3)} ({number(m['auc_ci95'][0], 3)} to {number(m['auc_ci95'][1], 3)})", number(half["precision"], 3), number(half["recall"], 3), number(m["calibration_error"], 3)])  # fmt: skip
    print(
        f"{card['texts']:,} texts, {card['bad']:,} of them bad"
        + (f"; set aside: {card['rejected']}" if card["rejected"] else "")
    )
    print_table(["measured on", "texts", "bad", "AUC (95% interval)", "precision", "recall", "calibration error"], rows)
    print(f"precision and recall above 0.5; more in {out}/scorer.json")


def push(
    scored: Annotated[str, typer.Argument(help="What `phf score` wrote.")],
    repo: Annotated[str, typer.Argument(help="Data set on the Hub to write to: owner/name.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make a new data set public; it is private otherwise.")
    ] = False,
) -> None:
    """Push a scored corpus to the Hub, with a card that says what scored it, how much, and what failed."""
    from phf.scoring.publish import push_scored

    print(f"pushed: {push_scored(scored, repo, private=not public)}")


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
    from phf.tokens.store import tokenize_corpus
    from phf.tokens.tokenizer import PretrainedTokenizer, TrainBPE

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
