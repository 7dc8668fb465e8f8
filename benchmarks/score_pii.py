"""PII scoring with the paper's set of detectors: ours against scrubadub with the same ones.

    python benchmarks/score_pii.py --out benchmarks/results/score_pii.json

The baseline runs scrubadub's detectors of dates of birth and Skype names and the paper's detector of addresses on every
text. Both sides must find the same entities: `differing` counts the texts on which they do not.
"""

from __future__ import annotations

import datetime
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pyap
import scrubadub
from scrubadub.detectors.base import Detector
from scrubadub.detectors.date_of_birth import DateOfBirthDetector
from scrubadub.detectors.skype import SkypeDetector

from _measure import arguments, case, interleaved, write
from phf.core.types import Document
from phf.data.installed import InstalledPackages
from phf.data.segment import Sentences
from phf.scorers import PII


class PlainAddresses(Detector):
    """As in the paper's code: every address that pyap finds, searched again in the text."""

    name = "address"
    filth_cls = scrubadub.filth.AddressFilth

    def iter_filth(self, text, document_name=None):
        for address in pyap.parse(text, country="US"):
            if "coverage" in address.full_address.lower():
                continue
            pattern = re.escape(address.full_address).replace(",\\ ", "\\s*([\\n,]\\s*)+").replace(r"\ ", r"\s+")
            for match in re.finditer(r"\b" + pattern + r"\b", text, re.MULTILINE | re.UNICODE):
                yield self.filth_cls(
                    beg=match.start(),
                    end=match.end(),
                    text=match.group(),
                    detector_name=self.name,
                    document_name=document_name,
                    locale=self.locale,
                )


def main() -> None:
    args = arguments(__doc__ or "", sentences=3000)
    source = InstalledPackages()
    cut = Sentences()
    texts = []
    for shard in source.plan():
        for item in source.read(shard):
            if isinstance(item, Document) and len(item.text) < 30_000:
                texts += [s for s in cut.split(item.text) if s.strip()]
    texts = texts[:: max(len(texts) // args.sentences, 1)][: args.sentences]
    baseline = scrubadub.Scrubber(locale="en_US")
    for detector in (DateOfBirthDetector, SkypeDetector, PlainAddresses):
        baseline.add_detector(detector(locale="en_US"))
    ours = PII(detectors="paper", reference_date=datetime.date.today())

    def plain(text: str) -> list[tuple[int, int]]:
        return [(f.beg, f.end) for f in baseline.iter_filth(text)]

    def fast(text: str) -> list[tuple[int, int]]:
        return [(s.start, s.end) for s in ours.spans(text)]

    differing = sum(plain(t) != fast(t) for t in texts)
    times = interleaved(
        {"ours": lambda: [fast(t) for t in texts], "scrubadub": lambda: [plain(t) for t in texts]},
        args.repeats,
        warmup=0,
    )
    chars = sum(map(len, texts))
    middle = sorted(times["ours"])[len(times["ours"]) // 2]
    more = {"texts": len(texts), "chars": chars, "chars_per_s": chars / middle, "differing": differing}
    more["entities"] = sum(len(fast(t)) for t in texts)
    found = case("paper's set, sentences of READMEs", times["ours"], times["scrubadub"], **more)
    write(args.out, "score_pii", [found])


if __name__ == "__main__":
    main()
