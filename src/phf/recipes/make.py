"""From a wish in a few words to a trained model: label, fit, score, audit, plan, and then a recipe to run.

    phf make "no personal data" runs/private --corpus texts.jsonl --server http://host:8000/v1 --model NAME

Every step writes into one folder and does not run again once it is done:

    rubric.md     what the labels mean; made from the wish, to be edited
    labels/       phf label
    scorer/       phf fit-scorer
    recipe.yaml   phf run; to be edited
    run/          the recipe's own folder: scored corpus, tokens, runs, report
    run/scored/audit.html   phf audit, with the labels that the fit did not see
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phf.core import folders, store
from phf.core.config import ConfigError, Plain, dump_yaml, to_plain
from phf.core.text import counted
from phf.data.corpus import Corpus
from phf.data.segment import Segmenter
from phf.labelling.drawing import Drawing, from_corpus
from phf.labelling.judges import Judge
from phf.labelling.label import label_corpus, print_labels
from phf.labelling.rubric import read_rubric, rubric_for
from phf.recipes.plan import check_plan, make_plan
from phf.recipes.recipe import Recipe, load_recipe
from phf.recipes.run import run_recipe
from phf.report.audit import write_audit
from phf.report.format import curve_text, plain, verdict
from phf.scorers.fitted import HELD_OUT, ScorerRecord
from phf.scorers.fitting import fit_scorer
from phf.scorers.labels import read_labels
from phf.scoring.audit import Audit

STEPS = ("rubric and recipe", "label", "fit", "score and tokenize", "audit", "plan")


@dataclass(frozen=True)
class Made:
    """What `make` got ready."""

    recipe: Recipe
    scorer: ScorerRecord
    audit: Audit
    page: Path
    """Of the audit."""


def make(
    wish: str,
    out: str | Path,
    corpus: Corpus,
    segmenter: Segmenter,
    judges: Sequence[Judge],
    drawing: Drawing | None = None,
    settings: Sequence[str] = (),
) -> Made:
    """Get everything ready for training models that respect a wish. Nothing is trained.

    `settings`: overrides of the recipe (train.tokens=1e6). Files of `out` that exist are used as they are: the rubric
    and the recipe may be edited between two calls. Raises ConfigError if there are too few bad labels to fit to.
    """
    if not wish.strip():
        raise ConfigError('say in a few words what the model should respect: phf make "no personal data" OUT ...')
    out = Path(out)
    wish = " ".join(wish.split())
    _check_ours(out, Asked(wish, to_plain(corpus), to_plain(segmenter)))
    _say("rubric and recipe")
    file = _kept(out / "rubric.md", rubric_for(wish), "edit it to say better what is bad, and run again")
    rubric = read_rubric(file)
    recipe_file = _kept(
        out / "recipe.yaml", dump_yaml(_recipe(wish, out, corpus, segmenter)), "edit it to train otherwise"
    )
    recipe = load_recipe([str(recipe_file), *settings])  # mistakes are found before labels are paid for
    check_plan(make_plan(recipe, score=False))
    _say("label")
    name = str(to_plain(corpus).get("path", to_plain(corpus)["name"]))
    labelled = label_corpus(from_corpus(name, corpus, segmenter), out / "labels", rubric, judges, drawing)
    assert labelled is not None
    print_labels(labelled, out / "labels")
    _say("fit")
    try:
        scorer = fit_scorer(read_labels(out / "labels"), out / "scorer")
    except ConfigError as error:
        raise ConfigError(
            f"{error}. Label more texts (--n), say more of what is bad in {file}, or draw them by a first scorer: "
            "phf score, phf label --by score, phf fit-scorer"
        ) from None
    print(f"AUC {scorer.metrics['held out'].auc:.3f} on {counted(scorer.metrics['held out'].n, 'text')} held out")
    if scorer.curve is not None:
        print(curve_text(scorer.curve))
    _say("score and tokenize")
    run_recipe(recipe, only="data")
    _say("audit")
    page, audit = write_audit(recipe.files.scored, read_labels(out / "scorer" / HELD_OUT))
    print(verdict(audit))
    print(f"page: {page}")
    return Made(recipe, scorer, audit, page)


MADE = "made.json"


@dataclass(frozen=True)
class Asked:
    """`made.json`: what a folder of `phf make` was made from."""

    wish: str
    corpus: Plain
    segmenter: Plain


def _check_ours(out: Path, asked: Asked) -> None:
    """Make the folder. Raises ConfigError for one that something else made, or that was made from something else."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a folder")
    mark = out / MADE
    if mark.exists():
        before = store.read_record(mark, Asked)
        for name, now, then in (
            ("wish", asked.wish, before.wish),
            ("corpus", asked.corpus, before.corpus),
            ("segmenter", asked.segmenter, before.segmenter),
        ):
            if store.canonical(now) != store.canonical(then):
                raise ConfigError(f"{out} was made with another {name} ({plain(then)}); give another folder")
        return
    if out.is_dir() and any(not folders.is_partial(path) for path in out.iterdir()):
        raise ConfigError(f"{out} is not empty and was not made by `phf make`; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    store.write_json(mark, asked)


def _say(step: str) -> None:
    print(f"==> [{STEPS.index(step) + 1}/{len(STEPS)}] {step}", file=sys.stderr, flush=True)


def _kept(file: Path, text: str, hint: str) -> Path:
    """Write a file that is not there yet."""
    if not file.exists():
        store.write_text(file, text)
        print(f"    wrote {file}: {hint}", file=sys.stderr, flush=True)
    return file


def _recipe(wish: str, out: Path, corpus: Corpus, segmenter: Segmenter) -> Plain:
    return {
        "base": "demo",
        "title": wish,
        "about": "The scorer was fitted to labels of a sample of the corpus. The audit says how right it is.",
        "out": str(out / "run"),
        "corpus": to_plain(corpus),
        "segmenter": to_plain(segmenter),
        "scorer": {"name": "fitted", "path": str(out / "scorer")},
        "objectives": {
            "filtering": {"name": "filtering", "threshold": "median"},
            "conditional": {"name": "conditional", "threshold": 0.5, "drop": 0.01},
            "unlikelihood": {"name": "unlikelihood", "threshold": 0.5, "alpha": 1},
        },
        "redteam": None,
        "only": ["mle", "filtering", "conditional", "unlikelihood"],
    }
