"""Self-BLEU-5: exact n-gram counting against nltk per text, as in the reference implementation.

    python benchmarks/self_bleu.py --out benchmarks/results/self_bleu.json

Texts are pieces of the READMEs of the installed packages. nltk is timed on the first `--nltk` texts, each against 200
references, and its time is scaled to all texts, because a whole run takes minutes. `largest_difference` is between the
values of these texts.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from _measure import arguments, case, write
from phf.core.statistics import self_bleu_scores
from phf.core.types import Document
from phf.data.installed import InstalledPackages


def main() -> None:
    args = arguments(__doc__ or "", texts=4096, references=200, nltk=64, words=80)
    words: list[str] = []
    source = InstalledPackages()
    for shard in source.plan():
        for item in source.read(shard):
            if isinstance(item, Document):
                words += item.text.split()
    texts = [" ".join(words[i * args.words : (i + 1) * args.words]) for i in range(args.texts)]
    texts = [t for t in texts if t] or texts
    while len(texts) < args.texts:  # a small environment: the same words in another order
        texts += [" ".join(reversed(t.split())) for t in texts[: args.texts - len(texts)]]
    tokens = [t.split() for t in texts]
    ours = []
    baseline = []
    difference = 0.0
    method = SmoothingFunction().method1
    for _ in range(args.repeats):
        start = time.perf_counter()
        exact = self_bleu_scores(texts, 5, args.references)
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        some = [
            sentence_bleu((tokens[:i] + tokens[i + 1 :])[: args.references], tokens[i], (0.2,) * 5, method)
            for i in range(args.nltk)
        ]
        baseline.append((time.perf_counter() - start) * len(texts) / args.nltk)
        difference = max(abs(a - b) for a, b in zip(exact, some, strict=False))
    more = {"texts": len(texts), "scaled_from": args.nltk, "largest_difference": difference}
    found = case(f"{len(texts)} texts, {args.references} references", ours, baseline, **more)
    write(args.out, "self_bleu", [found])


if __name__ == "__main__":
    main()
