"""Held-out text as a model reads it: loss on good and bad segments, and whether it knows them apart. Floor 5.

In nats per byte of text: control and end-of-text tokens are context, not counted, so that objectives with and without
control tokens compare, and models with any tokenizer.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from phf.core import statistics, store
from phf.core.config import ConfigError
from phf.core.types import Edit, ScoredDocument
from phf.data.scored import ScoredCorpus
from phf.generation.loaded import LoadedModel
from phf.tokens.rows import Rows
from phf.tokens.store import TokenStore
from phf.tokens.tokenizer import encode_cut, encode_segments


def token_logp(
    model: LoadedModel, input_BT: torch.Tensor, target_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log p of each target, float32 [B, T], and p(bad) / (p(good) + p(bad)) there (None without control tokens), without
    holding [B, T, vocabulary]. Control tokens are left out of what a text token's probability is a share of."""
    hidden_BTD = model.lm.base_model(input_ids=input_BT, use_cache=False).last_hidden_state
    silent_T = torch.tensor(sorted(model.control_ids.values()), dtype=torch.long, device=target_BT.device)
    rows, bad = [], []
    for hidden_TD, target_T in zip(hidden_BTD, target_BT, strict=True):
        logits_TV = model.logits(hidden_TD)
        if model.control_ids:
            odds_T = logits_TV[:, model.control_ids["bad"]] - logits_TV[:, model.control_ids["good"]]
            bad.append(torch.sigmoid(odds_T))
        logits_TV = model.only_text(logits_TV)
        target_T = torch.where(torch.isin(target_T, silent_T), 0, target_T)  # not charged
        rows.append(logits_TV.gather(1, target_T.unsqueeze(1)).squeeze(1) - logits_TV.logsumexp(1))
    return torch.stack(rows), torch.stack(bad) if bad else None


Control = Literal["none", "oracle", "good", "bad"]


@dataclasses.dataclass(frozen=True)
class HeldoutNats:
    """Held-out text as a model reads it: `nats_S` loss of each segment's text tokens, `seen_S` whether it was read, and
    `bad_S` the model's p(bad) / (p(good) + p(bad)) where the segment begins (NaN where it was not asked)."""

    nats_S: np.ndarray
    seen_S: np.ndarray
    bad_S: np.ndarray


def first_documents(tokens: TokenStore, max_tokens: int) -> np.ndarray:
    """Which documents (bool) to keep so that the held-out ones have at most `max_tokens` tokens, or are one: the same text
    for every model."""
    table = tokens.table
    doc_tokens_D = np.bincount(table.doc_S, weights=table.tokens_S, minlength=len(table.train_D))
    keep_D = np.where(tokens.heldout_D, doc_tokens_D, 0).cumsum() <= max_tokens
    if not (keep_D & tokens.heldout_D).any():
        keep_D = np.arange(len(keep_D)) <= int(np.argmax(tokens.heldout_D))
    return np.asarray(keep_D & tokens.heldout_D)


def heldout_nats(
    model: LoadedModel, tokens: TokenStore, context: int, control: Control, limit: float, batch: int, max_tokens: int
) -> HeldoutNats:
    """Read the first `max_tokens` tokens of held-out documents. `control`: which control token goes before each segment;
    "oracle": the one that its score says, at threshold `limit`."""
    table = tokens.table
    control_S: np.ndarray | None = None
    if control != "none":
        is_bad_S = ~(table.score_S.astype(np.float32) <= np.float32(limit))
        control_S = {"oracle": is_bad_S, "good": np.zeros_like(is_bad_S), "bad": np.ones_like(is_bad_S)}[
            control
        ].astype(np.int8)
        control_S[table.tokens_S == 0] = -1
    control_ids = [model.control_ids[k] for k in ("good", "bad")] if control != "none" else []
    keep_D = first_documents(tokens, max_tokens)
    rows = Rows(tokens, Edit(keep_D, control_S), context, control_ids, split="heldout", pad=True)
    silent = [*model.control_ids.values(), tokens.end_of_text_id]
    nats_S = np.zeros(len(table.score_S))
    seen_S = keep_D[table.doc_S] & (table.tokens_S == 0)  # read with what comes behind
    bad_S = np.full(len(nats_S), np.nan)
    device = model.lm.device
    with torch.inference_mode():
        for start in range(0, rows.num_rows, batch):
            numbers = range(start, min(start + batch, rows.num_rows))
            part = rows.batch(numbers)
            logp, bad = token_logp(
                model, torch.from_numpy(part.input_BT).to(device), torch.from_numpy(part.target_BT).to(device)
            )
            logp_BT = logp.cpu().numpy()
            bad_BT = bad.cpu().numpy() if bad is not None else None
            for b, row in enumerate(numbers):
                ids, seg = rows.stream(row * context, min(row * context + context + 1, rows.num_tokens))
                text = ~np.isin(ids[1:], silent)
                np.add.at(nats_S, seg[1:][text], -logp_BT[b, : len(text)][text].astype(np.float64))
                seen_S[seg[1:]] = True
                if bad_BT is not None and control_ids:
                    begins = np.isin(ids[1:], control_ids)
                    bad_S[seg[1:][begins]] = bad_BT[b, : len(text)][begins]
    return HeldoutNats(nats_S, seen_S, bad_S)


def heldout_loss(
    model: LoadedModel,
    tokens: TokenStore,
    context: int,
    threshold: float,
    control: Control,
    batch: int = 16,
    max_tokens: int = 1_000_000,
    control_threshold: float | None = None,
) -> dict[str, Any]:
    """Loss on the held-out documents in nats per byte of text, on all, good (score <= threshold) and bad segments.

    Lower is better on good text. Intervals by bootstrap over documents. `control`: no control tokens, those that the
    scores say (at `control_threshold`, the objective's own), or the good one before every segment; the model is given
    them and not charged for them. At most the first `max_tokens` tokens of held-out documents are read.
    """
    limit = threshold if control_threshold is None else control_threshold
    read = heldout_nats(model, tokens, context, control, limit, batch, max_tokens)
    return _slices(read, tokens, threshold)


def _slices(read: HeldoutNats, tokens: TokenStore, threshold: float) -> dict[str, Any]:
    table = tokens.table
    good_S = table.score_S.astype(np.float32) <= np.float32(threshold)
    judged_S = ~np.isnan(table.score_S)
    slices = {"all": read.seen_S, "good": read.seen_S & good_S, "bad": read.seen_S & judged_S & ~good_S}
    return {
        name: _per_byte(read.nats_S, tokens.seg_bytes, table.doc_S, use_S, table.tokens_S)
        for name, use_S in slices.items()
    }


def understanding(
    model: LoadedModel, tokens: TokenStore, context: int, threshold: float, batch: int = 16, max_tokens: int = 200_000,
    control_threshold: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Whether a model with control tokens still knows bad text that it does not write, on held-out segments.

    `likelihood_ratio`: log p(segment | bad token) - log p(segment | good token), all segments before it under the same
    token, as a classifier of bad segments (score > threshold). `foresight`: p(bad token) where a segment begins, given
    the true control tokens before. AUC with bootstrap intervals over documents: 0.5 is chance, 1 perfect.
    """
    table = tokens.table
    limit = threshold if control_threshold is None else control_threshold
    read = {c: heldout_nats(model, tokens, context, c, limit, batch, max_tokens) for c in ("good", "bad", "oracle")}
    seen_S = read["good"].seen_S & read["bad"].seen_S & ~np.isnan(table.score_S)
    bad_S = table.score_S.astype(np.float32) > np.float32(threshold)
    ratio_S = read["good"].nats_S - read["bad"].nats_S
    foresight_S = read["oracle"].bad_S
    ahead_S = seen_S & ~np.isnan(foresight_S)
    return {
        "likelihood_ratio": statistics.auc(ratio_S[seen_S], bad_S[seen_S], table.doc_S[seen_S]),
        "foresight": statistics.auc(foresight_S[ahead_S], bad_S[ahead_S], table.doc_S[ahead_S])
        | {
            "mean_p_bad_before_good": _mean_or_none(foresight_S[ahead_S & ~bad_S]),
            "mean_p_bad_before_bad": _mean_or_none(foresight_S[ahead_S & bad_S]),
        },
        "segments": int(seen_S.sum()),
        "bad_segments": int((seen_S & bad_S).sum()),
    }


def _mean_or_none(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _per_byte(
    nats_S: np.ndarray, bytes_S: np.ndarray, doc_S: np.ndarray, use_S: np.ndarray, tokens_S: np.ndarray
) -> dict[str, Any]:
    """Ratio of sums with a bootstrap interval over documents."""
    docs, index = np.unique(doc_S[use_S], return_inverse=True)
    if len(docs) == 0:
        return {"nats_per_byte": None, "bits_per_byte": None, "bytes": 0, "tokens": 0, "documents": 0, "ci95": None}
    nats_D = np.bincount(index, weights=nats_S[use_S])
    bytes_D = np.bincount(index, weights=bytes_S[use_S].astype(np.float64))
    ratio = statistics.ratio_of_sums(nats_D, bytes_D)
    return {
        "nats_per_byte": ratio.mean,
        "bits_per_byte": ratio.mean / math.log(2),
        "bytes": int(bytes_D.sum()),
        "tokens": int(tokens_S[use_S].sum()),
        "documents": len(docs),
        "ci95": list(ratio.ci95) if len(docs) > 1 else None,
    }


def heldout_section(
    model: LoadedModel, tokens: TokenStore, context: int, threshold: float, max_tokens: int, control_threshold: float | None
) -> dict[str, Any]:  # fmt: skip
    """`heldout_loss` in each way that the model can be asked and, under "understanding", `understanding`; nothing where
    nothing is held out."""
    if not tokens.heldout_D.any():
        return {}
    controls: tuple[Control, ...] = ("oracle", "good") if model.control_ids else ("none",)
    found: dict[str, Any] = {}
    for control in controls:
        found[control] = heldout_loss(
            model, tokens, context, threshold, control, max_tokens=max_tokens, control_threshold=control_threshold
        )
    if model.control_ids:
        found["understanding"] = understanding(
            model, tokens, context, threshold, max_tokens=min(max_tokens, 200_000), control_threshold=control_threshold
        )
    return found


class _InMemory(TokenStore):
    """A token store of a few documents that is on no disk."""

    def __init__(self, manifest: dict[str, Any], preference: str, arrays: dict[str, np.ndarray]) -> None:
        super().__init__(Path(), manifest, preference)
        self.__dict__["arrays"] = arrays

    def _map(self, name: str, dtype: Any) -> np.ndarray:
        return np.asarray(self.__dict__["arrays"][name].astype(dtype))


BYTES_PER_TOKEN = 4
"""By which a number of tokens of held-out text stands for an amount of text that is the same for every tokenizer."""


def corpus_of(tokens: TokenStore) -> ScoredCorpus:
    """The scored corpus that a token store was made of. Raises ConfigError where it is no longer there as it was."""
    scored = tokens.manifest["scored"]
    try:
        corpus = ScoredCorpus(scored, tokens.preference)
    except store.StoreError as error:
        raise ConfigError(
            f"{tokens.path} was made of the scored corpus {scored}, which is needed for its text: {error}"
        ) from None
    if corpus.manifest["content"] != tokens.manifest["scored_content"]:
        raise ConfigError(f"{tokens.path} was made of other text or scores than {scored} holds now; tokenise it again")
    return corpus


def in_tokens_of(model: LoadedModel, corpus: ScoredCorpus, tokens: TokenStore | None, max_tokens: int) -> TokenStore:
    """Held-out documents in the tokens of a model that has a tokenizer of its own: those of a token store made of `corpus`
    that `heldout_loss` would read or, without one, the first of the corpus, of 4 bytes for each of `max_tokens`. Each begins
    as the model's texts do, and is tokenised as they were: where that is not by the corpus's own segments, a token belongs to
    the segment in which it ends.
    """
    keep_D = None if tokens is None else first_documents(tokens, max_tokens)
    last = math.inf if keep_D is None else int(np.flatnonzero(keep_D)[-1]) if keep_D.any() else -1
    ids: list[int] = []
    lengths: list[int] = []
    sizes: list[int] = []
    scores: list[float] = []
    doc_segs: list[int] = []
    documents = (d for file in corpus.files for d in corpus.read(file) if isinstance(d, ScoredDocument))
    for number, document in enumerate(documents):
        if number > last or (keep_D is None and sum(sizes) >= BYTES_PER_TOKEN * max_tokens):
            break
        if keep_D is not None and not keep_D[number]:
            continue
        if model.control_ids:  # which go before every segment
            parts = encode_segments(model.tokenizer, list(document.texts))
        else:
            pieces = None if model.segmenter is None else model.segmenter.split(document.text)
            parts = encode_cut(model.tokenizer, document.texts, pieces)
        ids += [i for part in parts for i in part]
        lengths += [len(part) for part in parts]
        sizes += [len(text.encode()) for text in document.texts]
        scores += document.scores
        doc_segs.append(len(document.texts))
    arrays = {
        "tokens.bin": np.array(ids, np.int64),
        "seg_ends.bin": np.cumsum(lengths),
        "doc_ends.bin": np.cumsum(doc_segs),
        "seg_bytes.bin": np.array(sizes),
        "heldout.bin": np.ones(len(doc_segs)),
        f"{corpus.preference or corpus.main}.score.bin": np.array(scores, np.float32),
    }
    manifest = {"dtype": "int64", "end_of_text_id": model.start_id}
    return _InMemory(manifest, corpus.preference or corpus.main, arrays)
