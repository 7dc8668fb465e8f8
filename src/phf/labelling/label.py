"""Label a sample of a corpus along a rubric: by LLM judges, or by hand.

    labels/  labels.jsonl    a line per label: id, text, label, judge, score, stratum, weight
             answers.jsonl   every answer of a judge or a person, kept before the next is asked for
             rubric.md       the rubric, as it was
             manifest.json   what was drawn, what each judge did, how far they agree

Answers outlive the settings: a larger sample, or a second judge, asks only for what is new.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phf.core import folders, store
from phf.core.config import ConfigError, Plain, to_plain
from phf.core.statistics import ordinal_alpha
from phf.core.text import by_reason, counted, visible
from phf.core.types import Number
from phf.generation.server import Answers
from phf.labelling.by_hand import NOT_YET, SKIPPED, ByHand
from phf.labelling.drawing import Drawing, Drawn, DrawnStratum, Source, draw
from phf.labelling.judges import NO_ANSWER, Cost, Given, Judge, JudgeError, duration, probed, with_progress
from phf.labelling.rubric import Rubric

LABELS = "labels.jsonl"
ANSWERS = "answers.jsonl"
RUBRIC = "rubric.md"


@dataclass(frozen=True)
class JudgeCounts:
    """What a judge did."""

    judge: str
    """Its name in the file of labels."""
    settings: Plain
    """Its settings."""
    labels: dict[str, int]
    """How often it gave each label."""
    without: dict[str, int]
    """Texts without a label, by reason."""
    examples: dict[str, str]
    """What it said the first time, by reason."""
    tokens: int
    """Tokens that its server counted, of answers of earlier calls too; 0 if it counted none."""


@dataclass(frozen=True, kw_only=True)
class LabelManifest(folders.Manifest):
    """`manifest.json` of a folder of labels."""

    stage: str = "label"
    source: str
    """The corpus."""
    drawing: Plain
    """How the texts were drawn."""
    strata: list[DrawnStratum]
    """Where they were drawn from."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Rows of the corpus that are no documents, by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first one of each reason."""
    meanings: list[str]
    """What each label means, from 0 on."""
    bad_from: int
    """Labels from it on mean bad."""
    text: str = ""
    """Fingerprint of the texts and of the rubric."""
    texts: int
    """Texts that were drawn."""
    labels: int
    """Labels in the file."""
    alpha: Number
    """Krippendorff's alpha of texts with several labels, for labels with an order: 1 is agreement, 0 is chance."""
    judges: list[JudgeCounts] = field(default_factory=list)
    """What each judge did."""


def label_corpus(
    source: Source,
    out: str | Path,
    rubric: Rubric,
    judges: Sequence[Judge],
    drawing: Drawing | None = None,
    repeats: int = 1,
    max_without: float = 0.1,
    ask_only_cost: bool = False,
) -> LabelManifest | None:
    """Draw texts from `source`, get `repeats` labels of each from every judge, and write them into folder `out`.

    Prints the cost before anything is asked for; with `ask_only_cost` that is all, and the result is None. Raises
    ConfigError for judges of one name and for settings that do not fit, and JudgeError if a judge does not answer or
    more than the share `max_without` of its texts got no label. Answers are kept for the next call.
    """
    drawing = drawing or Drawing()
    out = Path(out)
    judges = sorted([*_earlier_people(out, source, rubric, drawing, judges), *judges], key=_person)
    titles = [judge.title for judge in judges]
    if len(set(titles)) < len(titles):
        twice = next(title for title in titles if titles.count(title) > 1)
        raise ConfigError(f"two judges have the name {twice!r}, and the labels name their judge")
    key = store.fingerprint(
        [source.fingerprint, rubric.text, to_plain(drawing), [j.identity() for j in judges], repeats, "label/1"]
    )
    if folders.is_done(out, key):
        found = folders.read_manifest(out, LabelManifest)
        if not any({NOT_YET, NO_ANSWER} & judge.without.keys() for judge in found.judges):
            folders.done_before(out)
            return found
    for judge in judges:
        judge.check()
    drawn = draw(source, drawing)
    texts = drawn.texts
    if drawn.rejected:
        print(f"skipped rows: {by_reason(drawn.rejected, drawn.examples)}", file=sys.stderr)
    asked = [item.text for item in texts]
    with folders.stage_folder(out, LabelManifest.stage, "labels", keep_manifest=True):
        answers = Answers(out / ANSWERS)
        costs = [judge.cost(asked, rubric, repeats, answers) for judge in judges]
        for judge, cost in zip(judges, costs, strict=True):
            _print_cost(judge, cost)
        for judge, cost in zip(judges, costs, strict=True):
            _print_time(judge, asked, rubric, answers, cost)
        if ask_only_cost:
            return None
        given = []
        counts = []
        for judge in judges:
            given.append(_labels(judge, asked, rubric, repeats, answers))
            counts.append(_counts(judge, given[-1]))
        if answers.again:
            print(f"requests that were sent again: {by_reason(answers.again)}", file=sys.stderr)
        for one in counts:
            _check(one, len(texts) * repeats, max_without)
        rows = [
            (item, judge.title, found.label)
            for n, item in enumerate(texts)
            for judge, of_judge in zip(judges, given, strict=True)
            for found in of_judge[n]
            if found.label is not None
        ]
        _keep_labels(out, key)
        store.write_text(out / RUBRIC, rubric.text + "\n")
        lines = [json.dumps(_row(item, title, label), ensure_ascii=False) + "\n" for item, title, label in rows]
        store.write_text(out / LABELS, "".join(lines))
        per_text = [
            [found.label for of_judge in given for found in of_judge[n] if found.label is not None]
            for n in range(len(texts))
        ]
        manifest = LabelManifest(
            key=key,
            source=source.name,
            drawing=to_plain(drawing),
            strata=drawn.strata,
            rejected=drawn.rejected,
            examples=drawn.examples,
            meanings=list(rubric.meanings),
            bad_from=rubric.bad_from,
            text=_text_key(source, rubric, drawing),
            texts=len(texts),
            labels=len(rows),
            alpha=ordinal_alpha(per_text),
            judges=counts,
            files=folders.file_marks(out, [LABELS, RUBRIC]),
        )
        return folders.finish(out, manifest)


def _earlier_people(
    out: Path, source: Source, rubric: Rubric, drawing: Drawing, judges: Sequence[Judge]
) -> list[ByHand]:
    """The people who labelled the same texts by the same rubric before, if a person labels now: their labels stay."""
    people = [judge for judge in judges if isinstance(judge, ByHand)]
    if not people or not folders.has_manifest(out, LabelManifest):
        return []
    before = folders.read_manifest(out, LabelManifest)
    if before.text != _text_key(source, rubric, drawing):
        return []
    names = [judge.settings["who"] for judge in before.judges if "who" in judge.settings]
    return [ByHand(who, finished=True) for who in names if who not in [person.who for person in people]]


def _person(judge: Judge) -> str:
    """People in the order of their names, after other judges."""
    return judge.who if isinstance(judge, ByHand) else ""


def _text_key(source: Source, rubric: Rubric, drawing: Drawing) -> str:
    """Fingerprint of the texts and of what is asked about them."""
    return store.fingerprint([source.fingerprint, rubric.text, to_plain(drawing)])


def _row(item: Drawn, judge: str, label: int | None) -> Plain:
    row: Plain = {"id": item.id, "text": item.text, "label": label, "judge": judge}
    return store.jsonable(row | {"score": item.score, "stratum": item.stratum, "weight": item.weight})  # type: ignore[no-any-return]


def _keep_labels(out: Path, key: str) -> None:
    """Keep the labels of other settings under another name, before they are written again."""
    path = out / folders.MANIFEST
    earlier = store.read_json(path) if path.exists() else None
    if isinstance(earlier, dict) and earlier.get("key") != key:
        place = folders.keep_earlier(out, LABELS, folders.MANIFEST, RUBRIC)
        if place is not None:
            print(f"note: {out} held labels of other settings, which are now also in {place}", file=sys.stderr)
    path.unlink(missing_ok=True)


def _labels(judge: Judge, texts: Sequence[str], rubric: Rubric, repeats: int, answers: Answers) -> list[list[Given]]:
    """What a judge says about each text, `repeats` times."""
    found: list[list[Given]] = [[] for _ in texts]
    for repeat in range(repeats):
        given = with_progress(judge, judge.labels(texts, rubric, repeat, answers), len(texts))
        for n, one in enumerate(given):
            found[n].append(one)
    return found


def _print_cost(judge: Judge, cost: Cost) -> None:
    known = f"; {counted(cost.known, 'label')} from before" if cost.known else ""
    tokens = ""
    if cost.tokens_in:
        tokens = f", about {cost.tokens_in:,} tokens of questions"
        if cost.tokens_out:
            tokens += f" and at most {cost.tokens_out:,} of answers, twice that for answers that cannot be read"
    print(f"{judge.title}: {counted(cost.answers, 'label')} to get{tokens}{known}", file=sys.stderr, flush=True)


def _print_time(judge: Judge, texts: Sequence[str], rubric: Rubric, answers: Answers, cost: Cost) -> None:
    """Say how long a judge will take, unless it is a person."""
    if isinstance(judge, ByHand):
        return
    seconds = probed(judge, texts, rubric, answers, cost)
    if seconds is not None:
        print(f"{judge.title}: about {duration(seconds)}, by its first answers", file=sys.stderr, flush=True)


def _counts(judge: Judge, given: Sequence[Sequence[Given]]) -> JudgeCounts:
    labels: Counter[int] = Counter()
    without: Counter[str] = Counter()
    examples: dict[str, str] = {}
    tokens = 0
    for found in (found for of_text in given for found in of_text):
        tokens += found.tokens
        if found.label is not None:
            labels[found.label] += 1
        else:
            without[found.reason] += 1
            if found.said:
                examples.setdefault(found.reason, " ".join(visible(found.said).split())[:200])
    settings: Any = {"who": judge.who} if isinstance(judge, ByHand) else to_plain(judge)
    return JudgeCounts(
        judge.title,
        settings,
        {str(label): labels[label] for label in sorted(labels)},
        dict(sorted(without.items())),
        examples,
        tokens,
    )


def _check(found: JudgeCounts, total: int, max_without: float) -> None:
    """Raise JudgeError if too many texts got no label. Texts that a person left out do not count."""
    spent = f" So far {found.tokens:,} tokens were used." if found.tokens else ""
    without = {reason: n for reason, n in found.without.items() if reason not in (NOT_YET, SKIPPED)}
    if without and not found.labels:
        raise JudgeError(f"{found.judge} gave no label: {by_reason(without, found.examples)}.{spent}")
    share = sum(without.values()) / total
    if share > max_without:
        raise JudgeError(
            f"{found.judge} gave no label for {sum(without.values()):,} of {total:,} texts ({share:.1%}), more than "
            f"the {max_without:.1%} allowed (--max-without): {by_reason(without, found.examples)}. The same command "
            "asks again where there was no answer. Other answers are kept: for new ones, change the rubric, the judge "
            f"or judge.temperature.{spent}"
        )


def print_labels(found: LabelManifest, out: str | Path) -> None:
    """Print what was labelled."""
    for judge in found.judges:
        given = ", ".join(f"{count:,} x {label}" for label, count in judge.labels.items())
        without = f"; without a label: {by_reason(judge.without, judge.examples)}" if judge.without else ""
        tokens = f"; {judge.tokens:,} tokens" if judge.tokens else ""
        print(f"{judge.judge}: {given or 'no label'}{without}{tokens}")
    if not math.isnan(found.alpha):
        print(f"agreement (Krippendorff's alpha, ordinal): {found.alpha:.2f}")
    print(f"labels: {Path(out) / LABELS}   labels from {found.bad_from} on mean bad")
