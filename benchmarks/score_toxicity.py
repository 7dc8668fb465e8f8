"""Scoring sentences with a RoBERTa-base classifier: ours against Detoxify's method (padded batches in order,
float32).

    python benchmarks/score_toxicity.py --out benchmarks/results/score_toxicity.json

The weights are random, because speed does not depend on them, and spread, so that scores differ. The sentences come
from README texts of the installed packages. `largest_difference` is between the scores of the two sides.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaTokenizerFast

from _measure import arguments, case, interleaved, write
from phf.core.types import Document
from phf.data.installed import InstalledPackages
from phf.data.segment import Sentences
from phf.scorers import Toxicity
from phf.scorers.toxicity import load_classifier


def sentences(count: int) -> list[str]:
    source = InstalledPackages()
    cut = Sentences()
    found = []
    for shard in source.plan():
        for item in source.read(shard):
            if isinstance(item, Document) and len(item.text) < 20_000:
                found += [s for s in cut.split(item.text) if s.strip()]
    step = max(len(found) // count, 1)
    return found[::step][:count]


def make_model(folder: Path, texts: list[str]) -> None:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=20_000, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    bpe.save_model(str(folder))
    tokenizer = RobertaTokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=50_265, num_labels=16, max_position_embeddings=514, pad_token_id=1, initializer_range=0.05
    )
    config.id2label = {i: "toxicity" if i == 0 else f"other {i}" for i in range(16)}
    RobertaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)


def main() -> None:
    args = arguments(__doc__ or "", sentences=192, batch=64)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = sentences(args.sentences)
        make_model(folder, texts)
        ours = Toxicity(model=str(folder), labels=("toxicity",), activation="sigmoid")
        loaded = load_classifier(ours)
        tokenizer = loaded.tokenizer.from_pretrained(folder)
        model = RobertaForSequenceClassification.from_pretrained(folder).eval()

        def reference() -> np.ndarray:
            scores = []
            with torch.no_grad():
                for start in range(0, len(texts), args.batch):
                    batch = tokenizer(
                        texts[start : start + args.batch], return_tensors="pt", truncation=True, padding=True
                    )
                    scores.append(torch.sigmoid(model(**batch).logits)[:, 0].numpy())
            return np.concatenate(scores)

        times = interleaved({"ours": lambda: ours.score_texts(texts), "reference": reference}, args.repeats, warmup=1)
        difference = np.abs(np.array(ours.score_texts(texts)) - reference())
        tokens = [len(ids) for ids in loaded.windows(texts)[0]]
    sorted_times = sorted(times["ours"])
    found = case(
        "RoBERTa-base, sentences of READMEs",
        times["ours"],
        times["reference"],
        sentences=len(texts),
        mean_tokens=float(np.mean(tokens)),
        longest=max(tokens),
        dtype=loaded.dtype,
        sentences_per_s=len(texts) / sorted_times[len(sorted_times) // 2],
        largest_difference=float(difference.max()),
        spread=float(np.std(reference())),
    )
    write(args.out, "score_toxicity", [found])


if __name__ == "__main__":
    main()
