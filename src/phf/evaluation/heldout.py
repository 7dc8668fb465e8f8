"""Held-out text as a model reads it: its loss on good and bad segments, and whether it tells them apart.

In nats per byte of text. Control and end-of-text tokens are context: they add no loss. So objectives with and without
control tokens compare, and so do models with different tokenizers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from phf.core import statistics, store
from phf.core.config import ConfigError
from phf.core.runs import places
from phf.core.types import Block, Edit, Insertions, PieceIds, ScoredDocument
from phf.data.scored import ScoredCorpus
from phf.evaluation.results import Foresight, HeldoutLoss, HeldoutResult, HeldoutSlice, Understanding
from phf.generation.loaded import LoadedModel
from phf.tokens.parts import TokenCounts
from phf.tokens.rows import Rows
from phf.tokens.store import TokensManifest, TokenStore, score_file
from phf.tokens.tokenizer import encode_cut, encode_segments

Control = Literal["none", "oracle", "good", "bad"]
"""Which control token goes before each segment; "oracle": the one that the segment's score implies."""

PARTS = 64
"""Parts of the held-out documents, for differences between models."""
UNDERSTANDING_TOKENS = 200_000
"""Held-out tokens that `understanding` reads at most."""


def heldout_section(
    model: LoadedModel,
    tokens: TokenStore,
    context: int,
    threshold: float,
    max_tokens: int,
    control_threshold: float | None,
    brief: bool = False,
) -> HeldoutResult:
    """`heldout_loss` with every kind of control tokens that suits the model, and `understanding`. Empty if
    nothing is held out. `brief`: only the loss that compares with other models."""
    if not tokens.heldout_D.any():
        return HeldoutResult()

    def loss(control: Control) -> HeldoutLoss:
        return heldout_loss(
            model, tokens, context, threshold, control, max_tokens=max_tokens, control_threshold=control_threshold
        )

    if not model.conditions_on:
        return HeldoutResult(none=loss("none"))
    if brief or not model.is_pair:
        return HeldoutResult(good=loss("good"))
    known = understanding(
        model,
        tokens,
        context,
        threshold,
        max_tokens=min(max_tokens, UNDERSTANDING_TOKENS),
        control_threshold=control_threshold,
    )
    return HeldoutResult(oracle=loss("oracle"), good=loss("good"), understanding=known)


def heldout_loss(
    model: LoadedModel,
    tokens: TokenStore,
    context: int,
    threshold: float,
    control: Control,
    batch: int = 16,
    max_tokens: int = 1_000_000,
    control_threshold: float | None = None,
) -> HeldoutLoss:
    """Loss on the held-out documents in nats per byte of text: on all segments, on good ones (score <= threshold)
    and on bad ones. Lower is better on good text. Intervals by bootstrap over documents.

    `control`: the control tokens before the segments; "oracle" takes those that the scores imply at
    `control_threshold` (default: `threshold`). At most the first `max_tokens` tokens of held-out documents are
    read.
    """
    limit = threshold if control_threshold is None else control_threshold
    read = heldout_nats(
        model, tokens, context=context, control=control, limit=limit, batch=batch, max_tokens=max_tokens
    )
    good_S = tokens.score_S <= np.float32(threshold)
    judged_S = ~np.isnan(tokens.score_S)

    def part(use_S: np.ndarray) -> HeldoutSlice:
        return _per_byte(read.nats_S, tokens.seg_bytes, tokens.doc_S, use_S, tokens.tokens_S)

    return HeldoutLoss(
        all=part(read.seen_S), good=part(read.seen_S & good_S), bad=part(read.seen_S & judged_S & ~good_S)
    )


def understanding(
    model: LoadedModel,
    tokens: TokenStore,
    context: int,
    threshold: float,
    batch: int = 16,
    max_tokens: int = UNDERSTANDING_TOKENS,
    control_threshold: float | None = None,
) -> Understanding:
    """Whether a model with control tokens still knows bad text that it does not write, on held-out segments.

    `likelihood_ratio`: log p(segment | bad token) - log p(segment | good token), with the same token before all
    earlier segments, as a classifier of bad segments (score > threshold). `foresight`: p(bad token) where a segment
    starts, after the true control tokens. Intervals by bootstrap over documents.
    """
    limit = threshold if control_threshold is None else control_threshold
    good = heldout_nats(model, tokens, context=context, control="good", limit=limit, batch=batch, max_tokens=max_tokens)
    bad = heldout_nats(model, tokens, context=context, control="bad", limit=limit, batch=batch, max_tokens=max_tokens)
    oracle = heldout_nats(
        model, tokens, context=context, control="oracle", limit=limit, batch=batch, max_tokens=max_tokens
    )
    seen_S = good.seen_S & bad.seen_S & ~np.isnan(tokens.score_S)
    bad_S = tokens.score_S > np.float32(threshold)
    ratio_S = good.nats_S - bad.nats_S
    p_bad_S = oracle.p_bad_S
    asked_S = seen_S & ~np.isnan(p_bad_S)
    foresight = statistics.auc(p_bad_S[asked_S], bad_S[asked_S], tokens.doc_S[asked_S])
    return Understanding(
        likelihood_ratio=statistics.auc(ratio_S[seen_S], bad_S[seen_S], tokens.doc_S[seen_S]),
        foresight=Foresight(
            foresight.auc,
            foresight.ci95,
            mean_p_bad_before_good=_mean_or_none(p_bad_S[asked_S & ~bad_S]),
            mean_p_bad_before_bad=_mean_or_none(p_bad_S[asked_S & bad_S]),
        ),
        segments=int(seen_S.sum()),
        bad_segments=int((seen_S & bad_S).sum()),
    )


def _mean_or_none(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _per_byte(
    nats_S: np.ndarray, bytes_S: np.ndarray, doc_S: np.ndarray, use_S: np.ndarray, tokens_S: np.ndarray
) -> HeldoutSlice:
    """Loss per byte of the segments in `use_S`, with a bootstrap interval over documents."""
    docs, index = np.unique(doc_S[use_S], return_inverse=True)
    if len(docs) == 0:
        return HeldoutSlice(nats_per_byte=math.nan, bits_per_byte=math.nan, bytes=0, tokens=0, documents=0, ci95=None)
    nats_D = np.bincount(index, weights=nats_S[use_S])
    bytes_D = np.bincount(index, weights=bytes_S[use_S].astype(np.float64))
    ratio = statistics.ratio_of_sums(nats_D, bytes_D)
    return HeldoutSlice(
        nats_per_byte=ratio.mean,
        bits_per_byte=ratio.mean / math.log(2),
        bytes=int(bytes_D.sum()),
        tokens=int(tokens_S[use_S].sum()),
        documents=len(docs),
        ci95=ratio.ci95 if len(docs) > 1 else None,
        parts=_parts(docs, nats_D, bytes_D),
    )


def _parts(docs: np.ndarray, nats_D: np.ndarray, bytes_D: np.ndarray) -> list[tuple[float, int]]:
    """Loss and bytes of the documents in parts by their number in the store, parts without text too."""
    part_D = docs % PARTS
    nats_P = np.bincount(part_D, weights=nats_D, minlength=PARTS)
    bytes_P = np.bincount(part_D, weights=bytes_D, minlength=PARTS)
    return [(float(nats), int(size)) for nats, size in zip(nats_P, bytes_P, strict=True)]


# Reading


@dataclass(frozen=True)
class HeldoutNats:
    """Held-out text as a model reads it. `nats_S`: loss of each segment's text tokens. `seen_S`: whether the
    segment was read. `p_bad_S`: p(bad) / (p(good) + p(bad)) where the segment starts, NaN where it was not
    computed."""

    nats_S: np.ndarray
    seen_S: np.ndarray
    p_bad_S: np.ndarray


def heldout_nats(
    model: LoadedModel, tokens: TokenStore, context: int, control: Control, limit: float, batch: int, max_tokens: int
) -> HeldoutNats:
    """Read the first `max_tokens` tokens of the held-out documents. `limit`: the threshold for "oracle" control
    tokens."""
    pieces = [] if control == "none" else [PieceIds(tuple(model.ids_of(role))) for role in ("good", "bad")]
    starting = [piece.ids[0] for piece in pieces if piece.ids]
    keep_D = first_documents(tokens, max_tokens)

    def edit(block: Block) -> Edit:
        documents = slice(block.first_document, block.first_document + block.num_documents)
        inserted = None if control == "none" else Insertions.before(_control_tokens(block, control, limit))
        return Edit(times_D=keep_D[documents], insertions=inserted)

    rows = Rows(tokens, edit, context, pieces, split="heldout", pad=True)
    silent = [*model.control_ids.values(), tokens.end_of_text_id]
    nats_S = np.zeros(len(tokens.score_S))
    seen_S = keep_D[tokens.doc_S] & (tokens.tokens_S == 0)  # read with the segment after it
    p_bad_S = np.full(len(nats_S), np.nan)
    device = model.lm.device
    with torch.inference_mode():
        for start in range(0, rows.num_rows, batch):
            numbers = range(start, min(start + batch, rows.num_rows))
            part = rows.batch(numbers)
            logp, p_bad = token_logp(
                model, torch.from_numpy(part.input_BT).to(device), torch.from_numpy(part.target_BT).to(device)
            )
            logp_BT = logp.cpu().numpy()
            p_bad_BT = p_bad.cpu().numpy() if p_bad is not None else None
            for b, row in enumerate(numbers):
                read = rows.stream(row * context, min(row * context + context + 1, rows.num_tokens))
                ids = read.ids
                seg = read.segment
                assert seg is not None
                text = ~np.isin(ids[1:], silent)
                np.add.at(nats_S, seg[1:][text], -logp_BT[b, : len(text)][text].astype(np.float64))
                seen_S[seg[1:]] = True
                if p_bad_BT is not None and starting:
                    starts = np.isin(ids[1:], starting)
                    p_bad_S[seg[1:][starts]] = p_bad_BT[b, : len(text)][starts]
    return HeldoutNats(nats_S, seen_S, p_bad_S)


def _control_tokens(block: Block, control: Control, limit: float) -> np.ndarray:
    """The control token before each segment: 0 good, 1 bad, -1 none."""
    bad_S = ~(block.score_S <= np.float32(limit))
    choices = {"oracle": bad_S, "good": np.zeros_like(bad_S), "bad": np.ones_like(bad_S)}
    control_S = choices[control].astype(np.int64)
    control_S[block.tokens_S == 0] = -1
    return control_S


def token_logp(
    model: LoadedModel, input_BT: torch.Tensor, target_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log p of each target, float32 [B, T], and p(bad) / (p(good) + p(bad)) there (None unless the model has one token
    for each).

    Never holds [B, T, vocabulary]. Text tokens share the probability that control tokens leave.
    """
    hidden_BTD = model.hidden(input_BT)
    silent_T = torch.tensor(sorted(model.control_ids.values()), dtype=torch.long, device=target_BT.device)
    rows = []
    p_bad = []
    pair = [*model.ids_of("good"), *model.ids_of("bad")]
    for hidden_TD, target_T in zip(hidden_BTD, target_BT, strict=True):
        logits_TV = model.logits(hidden_TD)
        if len(pair) == 2:
            odds_T = logits_TV[:, pair[1]] - logits_TV[:, pair[0]]
            p_bad.append(torch.sigmoid(odds_T))
        logits_TV = model.only_text(logits_TV)
        target_T = torch.where(torch.isin(target_T, silent_T), 0, target_T)  # adds no loss
        rows.append(logits_TV.gather(1, target_T.unsqueeze(1)).squeeze(1) - logits_TV.logsumexp(1))
    return torch.stack(rows), torch.stack(p_bad) if p_bad else None


def first_documents(tokens: TokenStore, max_tokens: int) -> np.ndarray:
    """Mask (bool) of the first held-out documents with at most `max_tokens` tokens together, or of the very first
    one. All models are judged on the same text."""
    ends_D = np.where(tokens.doc_ends > 0, tokens.seg_ends[np.maximum(tokens.doc_ends - 1, 0)], 0)
    doc_tokens_D = np.diff(ends_D, prepend=0)
    keep_D = np.where(tokens.heldout_D, doc_tokens_D, 0).cumsum() <= max_tokens
    if not (keep_D & tokens.heldout_D).any():
        keep_D = np.arange(len(keep_D)) <= int(np.argmax(tokens.heldout_D))
    return np.asarray(keep_D & tokens.heldout_D)


# Models with another tokenizer


class _InMemory(TokenStore):
    """A token store of a few documents that is not on disk."""

    def __init__(self, manifest: TokensManifest, preference: str, arrays: dict[str, np.ndarray]) -> None:
        super().__init__(Path(), manifest, preference)
        self.__dict__["arrays"] = arrays

    def _map(self, path: Path, dtype: Any) -> np.ndarray:
        return np.asarray(self.__dict__["arrays"][path.name].astype(dtype))


BYTES_PER_TOKEN = 4
"""Converts a number of held-out tokens into an amount of text that is the same for every tokenizer."""


def corpus_of(tokens: TokenStore) -> ScoredCorpus:
    """The scored corpus that a token store was made from. Raises ConfigError if it is missing or has changed."""
    found = places(tokens.manifest.scored, tokens.manifest.scored_from_here, tokens.path)
    scored = next((place for place in found if place.exists()), found[-1])
    try:
        corpus = ScoredCorpus(scored, tokens.preference)
    except store.StoreError as error:
        raise ConfigError(
            f"{tokens.path} was made from the scored corpus {scored}, which is needed for its text: {error}"
        ) from None
    if corpus.manifest.content != tokens.manifest.scored_content:
        raise ConfigError(f"{scored} has other text or scores now than when {tokens.path} was made; tokenize it again")
    return corpus


def document_ids(model: LoadedModel, document: ScoredDocument) -> list[list[int]]:
    """The token ids of each segment of a document, cut as the model's training texts were."""
    if model.conditions_on:  # control tokens go before every segment
        return encode_segments(model.tokenizer, list(document.texts))
    pieces = None if model.segmenter is None else model.segmenter.split(document.text)
    return encode_cut(model.tokenizer, document.texts, pieces)


def in_tokens_of(model: LoadedModel, corpus: ScoredCorpus, tokens: TokenStore | None, max_tokens: int) -> TokenStore:
    """Held-out documents of `corpus` in the tokens of a model with its own tokenizer.

    With a token store made from `corpus`: the documents that `heldout_loss` would read. Without: the first
    documents, 4 bytes for each of `max_tokens`. Each document starts and is tokenized like the model's training
    texts. Where these were not cut like the corpus, a token belongs to the segment in which it ends.
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
        parts = document_ids(model, document)
        ids += [i for part in parts for i in part]
        lengths += [len(part) for part in parts]
        sizes += [len(text.encode()) for text in document.texts]
        scores += document.scores
        doc_segs.append(len(document.texts))
    name = corpus.preference or corpus.main
    arrays = {
        "tokens.bin": np.array(ids, np.int64),
        "seg_ends.bin": np.cumsum(lengths),
        "doc_ends.bin": np.cumsum(doc_segs),
        "seg_bytes.bin": np.array(sizes),
        "heldout.bin": np.ones(len(doc_segs)),
        score_file(Path(), name).name: np.array(scores, np.float32),
    }
    manifest = TokensManifest(key="", dtype="int64", end_of_text_id=model.start_id, counts=TokenCounts())
    return _InMemory(manifest, name, arrays)
