"""Commands on scorers: labels, fitting, auditing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from phf.cli.shared import Overrides, checked, finite, known_keys, only_overrides, print_table, take
from phf.core.text import by_reason, counted

if TYPE_CHECKING:
    from phf.core.config import Plain
    from phf.data.corpus import Corpus
    from phf.data.segment import Segmenter
    from phf.labelling.drawing import Source
    from phf.labelling.judges import Judge
    from phf.scorers.fitted import ScorerMetrics
    from phf.scorers.labels import Labels


BadFrom = Annotated[
    int | None,
    typer.Option(min=1, help="Labels are whole numbers from 0 (fine); those from this one on mean bad."),
]
JudgeServer = Annotated[
    str | None, typer.Option(metavar="URL", help="Judge: a model on an OpenAI-compatible server. Needs --model.")
]
JudgeModel = Annotated[str | None, typer.Option(help="The server's name for the model.")]
JudgeHere = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Judge: a chat model in a folder or on the Hub, run here.")
]
ByPerson = Annotated[bool, typer.Option("--by-hand", help="Label yourself, on a page in your browser, by keyboard.")]
Who = Annotated[str, typer.Option(help="With --by-hand: your name in the file of labels.")]
PagePort = Annotated[int, typer.Option(min=0, max=65535, help="With --by-hand: the page's port. 0: a free one.")]
LABEL_KEYS = ("judge", "second", "corpus", "segmenter")


def label(
    corpus: Annotated[
        str, typer.Argument(help="The output of `phf score`, or a corpus as `phf score` reads it (see its --help).")
    ],
    out: Annotated[str, typer.Argument(help="Folder for the labels.")],
    settings: Overrides = None,
    rubric: Annotated[
        str,
        typer.Option(help="Text file that says what each label means: a list of the labels from 0 (fine) on."),
    ] = "rubric.md",
    n: Annotated[int, typer.Option("--n", min=1, help="Texts to label.")] = 1000,
    by: Annotated[
        str, typer.Option(help="Draw them: uniform, by length, or by score (half of them above the threshold).")
    ] = "uniform",
    server: JudgeServer = None,
    model: JudgeModel = None,
    local: JudgeHere = None,
    by_hand: ByPerson = False,
    who: Who = "by hand",
    port: PagePort = 0,
    repeats: Annotated[
        int, typer.Option(min=1, help="Labels of each text by each judge. Needs judge.temperature above 0.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the drawing.")] = 0,
    scores: Annotated[
        str | None, typer.Option(help="Name of the scores to draw by, if `phf score --add` added some.")
    ] = None,
    segmenter: Annotated[
        str, typer.Option(help="How a corpus without scores is cut: the segmenters of `phf score`.")
    ] = "lines",
    max_without: Annotated[
        float, typer.Option(min=0, max=1, help="Fail if a judge gives no label for more than this share of the texts.")
    ] = 0.1,
    cost: Annotated[bool, typer.Option("--cost", help="Print what it will take, and stop.")] = False,
) -> None:
    """Label a sample of a corpus, by an LLM judge or by hand.

    The labels follow a rubric. Then: phf fit-scorer OUT SCORER. Run the same command again to resume; nothing is asked
    for twice. Settings of the judge are judge.*. A second judge has all of second.name=server second.server.url=...
    second.server.model=...
    """
    from phf.core.config import apply_overrides
    from phf.labelling.drawing import Drawing
    from phf.labelling.label import label_corpus, print_labels
    from phf.labelling.rubric import read_rubric

    config = apply_overrides({"segmenter": {"name": segmenter}}, only_overrides(settings))
    known_keys(config, LABEL_KEYS)
    judges = judges_of(config, server, model, local, by_hand, who, port)
    drawing = checked({"n": n, "by": by, "seed": seed}, Drawing)
    wanted = read_rubric(rubric)
    source = _source(corpus, config, scores)
    found = label_corpus(source, out, wanted, judges, drawing, repeats, max_without, ask_only_cost=cost)
    if found is not None:
        print_labels(found, out)


def judges_of(
    config: Plain, server: str | None, model: str | None, local: str | None, by_hand: bool, who: str, port: int
) -> list[Judge]:
    """The judges that options and the settings `judge.*` and `second.*` name. These are removed from `config`."""
    from phf.core.config import ConfigError, merge
    from phf.labelling.by_hand import ByHand
    from phf.labelling.judges import AnyJudge

    if (server is not None) + (local is not None) + by_hand > 1:
        raise ConfigError("give one of --server, --local and --by-hand; a second judge has second.* settings")
    if model is not None and server is None:
        raise ConfigError("--model is the server's name for the model: give --server too")
    named: Plain = {}
    if server is not None:
        named = {"name": "server", "server": {"url": server, **({} if model is None else {"model": model})}}
    elif local is not None:
        named = {"name": "local", "path": local}
    first = merge(named, take(config, "judge"))
    if by_hand and first:
        raise ConfigError("--by-hand has no judge.* settings")
    if not by_hand and "name" not in first:
        raise ConfigError("who labels? Give --server URL --model NAME, --local MODEL, or --by-hand")
    judges: list[Judge] = [ByHand(who, port) if by_hand else checked(first, AnyJudge, "judge")]
    if second := take(config, "second"):
        judges.append(checked(second, AnyJudge, "second"))
    return judges


def read_from(corpus: str, config: Plain) -> tuple[Corpus, Segmenter]:
    """The corpus at a path, and how it is cut, with the settings `corpus.*` and `segmenter.*`."""
    from phf.core.config import merge
    from phf.data.canaries import AnyCorpus
    from phf.data.readers import from_path
    from phf.data.segment import AnySegmenter

    reader: Corpus = checked(merge(from_path(corpus), take(config, "corpus")), AnyCorpus, "corpus")
    segmenter: Segmenter = checked(take(config, "segmenter"), AnySegmenter, "segmenter")
    return reader, segmenter


def _source(corpus: str, config: Plain, scores: str | None) -> Source:
    """The segments of a scored corpus, or of a corpus that is cut here."""
    from phf.core.config import ConfigError
    from phf.data.scored import is_scored
    from phf.labelling.drawing import from_corpus, from_scored

    if is_scored(corpus):
        return from_scored(corpus, scores)
    if scores is not None:
        raise ConfigError(f"--scores: {corpus} is not the output of `phf score`")
    return from_corpus(corpus, *read_from(corpus, config))


def fit_scorer(
    labels: Annotated[
        str, typer.Argument(help="Labelled texts: .jsonl, .csv, .tsv or .parquet, or a folder of `phf label`.")
    ],
    out: Annotated[str, typer.Argument(help="Folder for the scorer.")],
    text: Annotated[str, typer.Option(help="Column with the text.")] = "text",
    label: Annotated[str, typer.Option(help="Column with the label: true or false, 1 or 0, or see --bad.")] = "label",
    bad: Annotated[str | None, typer.Option(help="Values of the label that mean bad, separated by commas.")] = None,
    bad_from: BadFrom = None,
    test: Annotated[
        list[str] | None,
        typer.Option(help="Other labelled texts to measure on: FILE or FILE:TEXT:LABEL[:BAD,BAD]. May be repeated."),
    ] = None,
    kind: Annotated[str, typer.Option(help="ngrams (fast) or transformer (finetunes --model).")] = "ngrams",
    model: Annotated[str | None, typer.Option(help="Model to finetune: a folder or a name on the Hub.")] = None,
    curve: Annotated[
        bool, typer.Option(help="Fit to parts of the labels too, to say whether more labels would help.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split and the fit.")] = 0,
) -> None:
    """Fit a scorer to your own labels. Then: phf score CORPUS OUT --scorer fitted scorer.path=FOLDER

    The scorer is measured on a fifth of the texts, which the fit does not see. Its probabilities are calibrated.
    """
    from phf.core.config import ConfigError, did_you_mean
    from phf.report.format import curve_text
    from phf.scorers.fitted import HELD_OUT
    from phf.scorers.fitting import fit_scorer as fit
    from phf.scorers.labels import read_labels

    kinds = ("ngrams", "transformer")
    if kind not in kinds:
        raise ConfigError(f"unknown --kind {kind!r}{did_you_mean(kind, kinds)}")
    tests = [_test_set(spec, text, label, bad, bad_from) for spec in test or []]
    fitted = read_labels(labels, text, label, bad.split(",") if bad else None, bad_from)
    card = fit(fitted, out, tests, cast(Literal["ngrams", "transformer"], kind), model, seed=seed, curve=curve)
    skipped = f"; skipped: {by_reason(card.rejected)}" if card.rejected else ""
    print(f"{counted(card.texts, 'text')}, {card.bad:,} of them bad{skipped}")
    print_table(
        ["measured on", "texts", "bad", "AUC", "precision", "recall", "calibration error"],
        [_metrics_row(name, found) for name, found in card.metrics.items()],
    )
    print(f"in brackets: 95% intervals; precision and recall are at 0.5; other thresholds are in {out}/scorer.json")
    if card.bad_from is not None:
        order = "; the fit used the order of the labels" if card.ordinal else ""
        if not card.ordinal and kind == "ngrams" and fitted.ordered:
            order = "; the fit was better without the order of the labels"
        print(f"labels from {card.bad_from} on mean bad{order}")
    if card.curve is not None:
        print(curve_text(card.curve))
    print(f"to audit it on its corpus with labels that the fit did not see: phf audit SCORED {out}/{HELD_OUT}")


def audit(
    scored: Annotated[
        str, typer.Argument(help="The output of `phf score`, or a folder of Parquet files with texts and scores.")
    ],
    labels: Annotated[
        str,
        typer.Argument(
            help="Labels of some of its segments, drawn at random or by score: .jsonl, .csv, ..., or a folder of "
            "`phf label`. Not those that its scorer was fitted to."
        ),
    ],
    text: Annotated[str, typer.Option(help="Column with the segment's text.")] = "text",
    label: Annotated[str, typer.Option(help="Column with the label: true or false, 1 or 0, or see --bad.")] = "label",
    bad: Annotated[str | None, typer.Option(help="Values of the label that mean bad, separated by commas.")] = None,
    bad_from: BadFrom = None,
    scores: Annotated[
        str | None, typer.Option(help="Name of the scores to audit, if `phf score --add` added some.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(callback=finite, help="Scores above it are bad. Default: the scorer's own.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Page to write. Default: audit.html in the folder.")] = None,
) -> None:
    """Measure how right a scorer is, with labels.

    The labels are of some segments of its corpus. Precision, recall and what a threshold discards, weighted to the
    whole corpus, with intervals. Compares the corpus's other scores too. Writes a page, and the numbers as JSON.
    """
    from phf.report.audit import write_audit
    from phf.report.format import as_noise, number, share, share_with_interval, verdict
    from phf.scorers.labels import read_labels

    given = read_labels(labels, text, label, bad.split(",") if bad else None, bad_from)
    page, found = write_audit(scored, given, out, scores, threshold)
    print(
        f"{counted(found.segments, 'segment')}, {found.labelled:,} labelled, {found.bad:,} of them bad; "
        f"AUC {number(found.auc, 3)}" + (f"; labelled by {', '.join(found.judges)}" if found.judges else "")
    )
    if found.left_out:
        print(f"labels without use: {by_reason(found.left_out)}")
    print_table(
        ["threshold", "above it", "precision", "recall", "good text above it"],
        [
            [
                f"{row.threshold:.6g}",
                share(row.called_bad),
                *map(share_with_interval, (row.precision, row.recall, row.clean_discarded)),
            ]
            for row in found.at
        ],
    )
    print(verdict(found))
    print(f"to train as if a perfect scorer were as wrong: {as_noise(found)}")
    print(f"or with its errors where they are, by score: train.scorer_noise={page.with_suffix('.json')}")
    for other in found.others:
        at = other.at
        print(
            f"second scorer {other.agreement.name} (above {at.threshold:.6g}): AUC {number(other.auc, 3)}, "
            f"precision {share(at.precision.mean)}, recall {share(at.recall.mean)}"
        )
    if found.not_compared:
        print(f"the labels say nothing on the scores {', '.join(found.not_compared)}: all on one side, or of one class")
    print(f"page: {page}   numbers: {page.with_suffix('.json')}")


def _test_set(spec: str, text: str, label: str, bad: str | None, bad_from: int | None) -> Labels:
    """The labelled texts of `--test FILE` or `--test FILE:TEXT:LABEL[:BAD,BAD]`."""
    from phf.scorers.labels import read_labels

    path, *columns = spec.split(":")
    if not columns:
        return read_labels(path, text, label, bad.split(",") if bad else None, bad_from)
    label = columns[1] if len(columns) > 1 else label
    named = columns[2].split(",") if len(columns) > 2 else None
    return read_labels(path, columns[0], label, named, None if named else bad_from)


def _metrics_row(name: str, found: ScorerMetrics) -> list[str]:
    from phf.report.format import number

    def within(value: float | None, ci95: tuple[float, float]) -> str:
        low, high = ci95
        return f"{number(value, 3)} ({number(low, 3)} to {number(high, 3)})"

    half = found.at["0.5"]
    return [
        name,
        f"{found.n:,}",
        f"{found.bad:,}",
        within(found.auc, found.auc_ci95),
        within(half.precision, half.precision_ci95),
        within(half.recall, half.recall_ci95),
        within(found.calibration_error, found.calibration_error_ci95),
    ]
