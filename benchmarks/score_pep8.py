"""PEP8 scoring: ours against a `pycodestyle.Checker` per document, as in the reference implementation.

    python benchmarks/score_pep8.py --out benchmarks/results/score_pep8.json --files 300

Counts are compared on every file of the standard library: `differing` of `compared` files differ. Some are timed.
"""

from __future__ import annotations

import multiprocessing
import sys
import sysconfig
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pycodestyle

from _measure import arguments, case, interleaved, write
from phf.scorers import PEP8


class CountLines(pycodestyle.BaseReport):
    def __init__(self, options) -> None:
        super().__init__(options)
        self.rows: Counter[int] = Counter()

    def error(self, line_number, offset, text, check):
        code = super().error(line_number, offset, text, check)
        if code:
            self.rows[line_number] += 1
        return code


def or_none(score, text: str) -> list[float] | None:
    """Scores, or None if pycodestyle itself fails on the text."""
    try:
        return score(text)
    except (IndexError, RecursionError, UnicodeError):
        return None


def reference(text: str) -> list[float]:
    """Violations per character of each line, with a style guide, a report and a checker per document."""
    style = pycodestyle.StyleGuide(parse_argv=False, config_file=False, quiet=2, reporter=CountLines)
    lines = text.splitlines(keepends=True)
    report = style.init_report(CountLines)
    pycodestyle.Checker(lines=list(lines), options=style.options, report=report).check_all()
    rows: Counter[int] = Counter()
    for row, count in report.rows.items():  # an error at the end of the file is reported one line below it
        rows[min(max(row, 1), len(lines))] += count
    return [rows[n] / len(line) for n, line in enumerate(lines, 1)]


def ours(text: str) -> list[float]:
    return PEP8().score_segments(text.splitlines(keepends=True))


def all_of(score, texts: list[str]) -> None:
    for text in texts:
        or_none(score, text)


def main() -> None:
    args = arguments(__doc__ or "", files=300)
    paths = sorted(p for p in Path(sysconfig.get_paths()["stdlib"]).rglob("*.py") if "site-packages" not in p.parts)
    # UTF-8 files in which only "\n" ends a line: both sides then see the same lines
    texts = []
    for path in paths:
        text = path.read_bytes().decode("utf-8", "replace")
        if text and len(text.splitlines()) == text.count("\n") + (not text.endswith("\n")) and "\r" not in text:
            texts.append(text)
    differing = sum(or_none(ours, t) != or_none(reference, t) for t in texts)
    compared = len(texts)
    texts = texts[:: max(len(texts) // args.files, 1)]
    chars = sum(map(len, texts))
    times = interleaved(
        {"ours": partial(all_of, ours, texts), "reference": partial(all_of, reference, texts)}, args.repeats, 0
    )
    more = {"files": len(texts), "chars": chars, "compared": compared, "differing": differing}
    cases = [case("standard library, 1 process", times["ours"], times["reference"], **more)]
    parts = [texts[n::16] for n in range(16)]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(all_of, ours), [t[:2] for t in parts]))  # starts both workers
        both = interleaved(
            {
                "ours": lambda: list(pool.map(partial(all_of, ours), parts)),
                "reference": partial(all_of, reference, texts),
            },
            args.repeats,
            0,
        )
    cases.append(case("standard library, 2 processes against 1", both["ours"], both["reference"], **more))
    samples = [t[i : i + 400] for t in texts for i in range(0, min(len(t), 8000), 800)][:2000]
    differing = sum(or_none(ours, t) != or_none(reference, t) for t in samples)
    short = interleaved(
        {"ours": partial(all_of, ours, samples), "reference": partial(all_of, reference, samples)}, args.repeats, 0
    )
    cases.append(
        case("samples of 400 characters", short["ours"], short["reference"], samples=len(samples), differing=differing)
    )
    write(args.out, "score_pep8", cases)


if __name__ == "__main__":
    main()
