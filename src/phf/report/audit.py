"""The page of `phf audit`: how right a scorer is on its corpus."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from phf.core import store
from phf.report.format import as_noise, verdict
from phf.report.inspect import masked_agreement, masked_segments, masking_scorers, page_of, write_page
from phf.report.page import environment
from phf.scorers.labels import Labels
from phf.scoring.audit import Audit, audit


def write_audit(
    scored: str | Path,
    labels: Labels,
    out: str | Path | None = None,
    preference: str | None = None,
    threshold: float | None = None,
) -> tuple[Path, Audit]:
    """Write `audit.html` and `audit.json` into the scored folder, or next to `out`, the page. Returns the page's path
    and the numbers. Personal data in texts are masked.

    Raises ConfigError if the folder is remote and `out` is None, and errors as `audit`.
    """
    target = page_of(scored, out, "audit.html")
    scorers = masking_scorers(scored)
    found = audit(scored, labels, preference, threshold)
    found = replace(
        found,
        false_alarms=masked_segments(found.false_alarms, scorers),
        misses=masked_segments(found.misses, scorers),
        others=[replace(other, agreement=masked_agreement(other.agreement, scorers)) for other in found.others],
    )
    template = environment().get_template("audit.html.j2")
    name = store.as_path(scored).name
    write_page(
        target,
        template.render(a=found, name=name, masked=bool(scorers), verdict=verdict(found), noise=as_noise(found)),
        found,
    )
    return target, found
