"""A linear probe: does a model know bad text when it reads it?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core.config import STRICT, ConfigError
from phf.core.statistics import auc
from phf.core.types import Estimate
from phf.data.scored import ScoredCorpus, bad_above_of
from phf.evaluation.capabilities.base import Capability
from phf.evaluation.heldout import corpus_of, in_tokens_of
from phf.evaluation.results import CapabilityResult
from phf.generation.loaded import LoadedModel
from phf.tokens.store import TokenStore, is_token_store


@dataclass(frozen=True, config=STRICT)
class Probe(Capability):
    """How well a linear classifier tells bad segments from good ones by the model's hidden states: area under the ROC
    curve, on documents that the classifier has not seen. It measures what the model knows, where samples show what it
    does (Alain and Bengio 2016, arXiv 1610.01644).

    `path`: a token store, whose held-out documents are read, or a scored corpus, of which the first documents are read.
    For a run it is the run's own store if it is left out. No control token is read.
    """

    path: str | None = None
    name: Literal["probe"] = "probe"
    layer: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Which hidden states, as a share of the depth: 0 are the embeddings, 1 is the last layer."""
    context: Annotated[int, Field(gt=8)] = 256
    """Tokens that are read together, at most as many as the model reads."""
    max_tokens: Annotated[int, Field(gt=0)] = 200_000
    """Tokens to read at most."""

    def of_text(self, tokens: str) -> Self:
        return replace(self, path=tokens) if self.path is None else self

    def inputs(self) -> list[str | None]:
        if self.path is None:
            return [None]
        corpus, tokens = self._text()
        return [corpus.manifest.content if tokens is None else tokens.manifest.content]

    def _text(self) -> tuple[ScoredCorpus, TokenStore | None]:
        """The scored corpus, and the token store made from it if the path names one."""
        if self.path is None:
            raise ConfigError("probe: give path=TOKENS, a token store or a scored corpus")
        if not is_token_store(self.path):
            return ScoredCorpus(self.path), None
        tokens = TokenStore.open(self.path)
        return corpus_of(tokens), tokens

    def measure(self, model: LoadedModel) -> CapabilityResult:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        corpus, tokens = self._text()
        limit = bad_above_of(corpus.manifest) if tokens is None else tokens.bad_above
        text = in_tokens_of(model, corpus, tokens, self.max_tokens)
        hidden_SD = np.stack(list(_hidden_means(model, text, self.layer, min(self.context, model.positions))))
        use_S = ~np.isnan(text.score_S) & ~np.isnan(hidden_SD[:, 0])
        bad_S = text.score_S > np.float32(limit)
        fitted_S = use_S & (text.doc_S % 2 == 0)
        asked_S = use_S & (text.doc_S % 2 == 1)
        for half_S in (fitted_S, asked_S):
            if not 0 < bad_S[half_S].sum() < half_S.sum():
                raise ConfigError(
                    f"probe: {self.path} needs good and bad segments in both halves of the documents that are read"
                )
        scale = StandardScaler().fit(hidden_SD[fitted_S])
        classifier = LogisticRegression(C=0.1, max_iter=2000, class_weight="balanced")
        classifier.fit(scale.transform(hidden_SD[fitted_S]), bad_S[fitted_S])
        value_S = classifier.decision_function(scale.transform(hidden_SD[asked_S]))
        found = auc(value_S, bad_S[asked_S], text.doc_S[asked_S])
        right = [float((value_S[bad_S[asked_S] == bad] > 0).mean()) for bad in (True, False)]
        return self.result(
            {"AUC": Estimate(found.auc, math.nan, int(asked_S.sum()), found.ci95)},
            balanced_accuracy=(right[0] + 1 - right[1]) / 2,
            fitted_segments=int(fitted_S.sum()),
            bad_segments=int(bad_S[asked_S].sum()),
        )


@torch.inference_mode()
def _hidden_means(model: LoadedModel, text: TokenStore, layer: float, context: int) -> Iterator[np.ndarray]:
    """The mean hidden state of each segment's tokens, [D]; NaN for a segment without tokens. Documents are read in
    pieces of `context` tokens, each after the start token."""
    trunk = model.lm.base_model
    number = round(layer * model.lm.config.num_hidden_layers)
    first_S = 0
    for last_S in text.doc_ends:
        begin = int(text.seg_ends[first_S - 1]) if first_S else 0
        ids = np.asarray(text.tokens[begin : int(text.seg_ends[last_S - 1])]).astype(np.int64)
        states = []
        for start in range(0, len(ids), context - 1):
            piece = torch.tensor([[model.start_id, *ids[start : start + context - 1]]], device=model.lm.device)
            found = trunk(input_ids=piece, use_cache=False, output_hidden_states=True).hidden_states[number]
            states.append(found[0, 1:].float().cpu().numpy())
        state_TD = np.concatenate(states) if states else np.zeros((0, model.lm.config.hidden_size), np.float32)
        at = 0
        for length in text.tokens_S[first_S:last_S]:
            part = state_TD[at : at + int(length)]
            yield part.mean(0) if len(part) else np.full(state_TD.shape[1], np.nan, np.float32)
            at += int(length)
        first_S = int(last_S)
