"""Objectives of later papers: tags and sentences in the text, quantile and attribute tokens, hidden text, weights.

Legend: S segments, T tokens of a block or targets, I insertions.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core.config import STRICT, ConfigError
from phf.core.types import Block, Edit, Insertions, Piece
from phf.objectives.base import BAD, HIDDEN, LossInputs, LossOutputs, Objective, Removable
from phf.objectives.paper import MLE, AtThreshold, ByThreshold, at_most, weight_metrics
from phf.objectives.tensors import Tensor, torch
from phf.tokens.statistics import Statistics, Unit


@dataclass(frozen=True, config=STRICT)
class _Marked(AtThreshold):
    """Objectives whose edit treats good and bad segments differently. Unjudged segments count as bad."""

    def _bad(self, block: Block) -> np.ndarray:
        """Whether each segment is bad. Segments without tokens are not."""
        return ~at_most(block.score_S, self.threshold) & (block.tokens_S > 0)


@dataclass(frozen=True, config=STRICT)
class Tag(_Marked):
    """MLE on text in which a tag stands before a random share `p` of the words of bad segments. The tag is a control
    token and a target; ban it when sampling, as scenarios do (SafeLM, arXiv 2504.16980)."""

    p: Annotated[float, Field(gt=0, le=1)] = 0.05
    tag: str = BAD
    """The text that is inserted."""
    name: Literal["tag"] = "tag"

    def __post_init__(self) -> None:
        if not self.tag:
            raise ValueError("tag must not be empty")

    @property
    def roles(self) -> dict[str, str]:
        return {"bad": self.tag}

    def edit(self, block: Block, seed: int) -> Edit:
        drawn_T = (block.uniform_T(seed, "tag") < self.p) & block.word_T & self._bad(block)[block.segment_T]
        token_I = np.flatnonzero(drawn_T)
        segment_I = block.segment_T[token_I]
        return Edit(
            insertions=Insertions(segment_I, token_I - block.start_S[segment_I], np.zeros(len(token_I), np.int64))
        )


@dataclass(frozen=True, config=STRICT)
class Annotate(_Marked):
    """MLE on text with a sentence before or after each bad segment, as ordinary text (Safety Reflection Pretraining,
    arXiv 2606.19168; SPP, arXiv 2608.13482).

    `where`: before each bad segment, after it, or once after the last bad segment of a document. `learned`: whether the
    sentence is a target. `column`: a field of the corpus with what is to be said of the document; it takes the place of
    `{}` in `text`, and documents of which it says nothing stay as they are.
    """

    text: str = " The text above breaks the rules, and I would not write it.\n"
    where: Literal["before", "after", "end"] = "after"
    learned: bool = True
    column: Annotated[str | None, Field(exclude_if=lambda value: value is None)] = None
    name: Literal["annotate"] = "annotate"

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError("text must not be empty")
        if self.column is not None and self.text.count("{}") != 1:
            raise ValueError("text needs one {} for what the column says")

    @property
    def pieces(self) -> tuple[Piece, ...]:
        if self.column is None:
            return (Piece(self.text, learned=self.learned),)
        before, after = self.text.split("{}")
        said = Piece("", learned=self.learned, column=self.column)
        return (Piece(before, learned=self.learned), said, Piece(after, learned=self.learned))

    def edit(self, block: Block, seed: int) -> Edit:
        bad_S = self._bad(block)
        if self.column is not None:
            _, ends_D = block.about(self.column)
            bad_S = bad_S & (np.diff(ends_D, prepend=0) > 0)[block.doc_S]
        if self.where == "end":
            last = {int(block.doc_S[s]): s for s in np.flatnonzero(bad_S)}
            bad_S = np.zeros_like(bad_S)
            bad_S[list(last.values())] = True
        segment_I = np.repeat(np.flatnonzero(bad_S), len(self.pieces))
        piece_I = np.tile(np.arange(len(self.pieces)), int(bad_S.sum()))
        offset_I = np.zeros_like(segment_I) if self.where == "before" else block.tokens_S[segment_I]
        return Edit(insertions=Insertions(segment_I, offset_I, piece_I))


@dataclass(frozen=True, config=STRICT)
class Metadata(Objective):
    """MLE on text in which each document starts with what a column of the corpus says about it, between `before` and
    `after`; documents of which it says nothing stay as they are (MeCo, arXiv 2501.01956).

    `learned`: whether these tokens are targets. `cooldown`: share of the training at its end that is without them.
    """

    column: str
    """Column of the documents' metadata that is put first."""
    before: str = ""
    after: str = "\n\n"
    learned: bool = False
    cooldown: Annotated[float, Field(ge=0, le=1)] = 0.1
    name: Literal["metadata"] = "metadata"

    @property
    def uses_scores(self) -> bool:
        return False

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return (
            Piece(self.before, learned=self.learned),
            Piece("", learned=self.learned, column=self.column),
            Piece(self.after, learned=self.learned),
        )

    @property
    def timeline(self) -> tuple[tuple[Objective, float | None], ...]:
        return ((self, None),) if not self.cooldown else ((self, 1 - self.cooldown), (MLE(), None))

    def edit(self, block: Block, seed: int) -> Edit:
        _, ends_D = block.about(self.column)
        said_D = np.diff(ends_D, prepend=0) > 0
        segment_I = np.flatnonzero(block.first_S & said_D[block.doc_S])
        pieces = 3
        return Edit(
            insertions=Insertions(
                np.repeat(segment_I, pieces),
                np.zeros(pieces * len(segment_I), np.int64),
                np.tile(np.arange(pieces), len(segment_I)),
            )
        )


@dataclass(frozen=True, config=STRICT)
class Quantile(Objective):
    """MLE on text with one of `k` control tokens before each segment, by the quantile of its score; q0 is the best.
    Sample with q0 as prefix and the others banned (Quark, arXiv 2205.13636).

    `edges`: the k - 1 scores between the quantiles, over the training segments of the store; a segment belongs to the
    first quantile whose edge its score does not exceed. Where many scores are equal, some quantiles stay empty.
    Unjudged segments belong to the last. `drop`: share of the tokens that are left out at random.
    """

    k: Annotated[int, Field(ge=2, le=100)] = 5
    drop: Annotated[float, Field(ge=0, le=1)] = 0.01
    edges: tuple[float, ...] | None = None
    name: Literal["quantile"] = "quantile"

    @property
    def roles(self) -> dict[str, str]:
        return {f"q{n}": f"<|q{n}|>" for n in range(self.k)}

    @property
    def conditions_on(self) -> tuple[str, ...]:
        return ("q0",)

    @property
    def worst(self) -> tuple[str, ...]:
        return (f"q{self.k - 1}",)

    @property
    def bad_above(self) -> float | None:
        return None if self.edges is None else self.edges[0]

    def fit(self, statistics: Statistics) -> Objective:
        if self.edges is not None:
            return self
        edges = statistics.quantiles([n / self.k for n in range(1, self.k)])
        if any(map(math.isnan, edges)):
            raise ConfigError("quantile: no training segment was judged")
        return dataclasses.replace(self, edges=tuple(float(np.float32(e)) for e in edges))

    def edit(self, block: Block, seed: int) -> Edit:
        if self.edges is None:
            raise ValueError("quantiles depend on the corpus: call fit(statistics) first")
        piece_S = np.searchsorted(np.array(self.edges, np.float32), block.score_S)  # NaN: the last
        piece_S = np.where(block.tokens_S == 0, -1, piece_S)
        piece_S[block.uniform_S(seed, "drop control tokens") < self.drop] = -1
        return Edit(insertions=Insertions.before(piece_S))


@dataclass(frozen=True, config=STRICT)
class Attributes(Objective):
    """MLE on text with a control token for each of several preferences before each segment: low where its score is at
    most the scorer's threshold, otherwise high. Sample with all low ones as prefix and the high ones banned (SteerLM,
    arXiv 2310.05344).

    `of`: names of the store's preferences. `thresholds`: one number each; None: each scorer's own.
    """

    of: Annotated[tuple[str, ...], Field(min_length=1)]
    thresholds: tuple[float, ...] | None = None
    drop: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of the control tokens that are left out, so that the model also writes without one."""
    name: Literal["attributes"] = "attributes"

    def __post_init__(self) -> None:
        if self.thresholds is not None and len(self.thresholds) != len(self.of):
            raise ValueError(f"thresholds has {len(self.thresholds)} numbers for {len(self.of)} preferences")
        if len(set(self.of)) < len(self.of):
            raise ValueError("of names a preference twice")

    @property
    def roles(self) -> dict[str, str]:
        return {f"{name}={level}": f"<|{name}={level}|>" for name in self.of for level in ("low", "high")}

    @property
    def conditions_on(self) -> tuple[str, ...]:
        return tuple(f"{name}=low" for name in self.of)

    @property
    def worst(self) -> tuple[str, ...]:
        return tuple(f"{name}=high" for name in self.of)

    @property
    def reads(self) -> tuple[str, ...]:
        return self.of

    def fit(self, statistics: Statistics) -> Objective:
        if self.thresholds is not None:
            return self
        return dataclasses.replace(self, thresholds=tuple(statistics.of(name).bad_above for name in self.of))

    def edit(self, block: Block, seed: int) -> Edit:
        if self.thresholds is None:
            raise ValueError("thresholds depend on the corpus: call fit(statistics) first")
        dropped_S = (block.uniform_S(seed, "drop control tokens") < self.drop) | (block.tokens_S == 0)
        parts = []
        for n, (name, threshold) in enumerate(zip(self.of, self.thresholds, strict=True)):
            high_S = ~at_most(block.of(name).score_S, threshold)
            parts.append(Insertions.before(np.where(dropped_S, -1, 2 * n + high_S)))
        return Edit(insertions=Insertions.merged(parts))


@dataclass(frozen=True, config=STRICT)
class Hide(_Marked):
    """MLE on text whose bad tokens are replaced one by one by a hidden token, which is no target (token filtering,
    arXiv 2601.21571). Where the store has scores of tokens, single tokens are hidden, otherwise whole segments."""

    token: str = HIDDEN
    """The token that stands for hidden ones."""
    unit: ClassVar[Unit] = "tokens"
    name: Literal["hide"] = "hide"

    @property
    def roles(self) -> dict[str, str]:
        return {"hidden": self.token}

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return ()

    def edit(self, block: Block, seed: int) -> Edit:
        if block.token_score_T is None:
            return Edit(hidden_T=self._bad(block)[block.segment_T])
        return Edit(hidden_T=~at_most(block.token_score_T, self.threshold))


@dataclass(frozen=True, config=STRICT)
class Anchored(ByThreshold):
    """sum_{score <= threshold} -log p_t + beta sum_{score > threshold} KL(r_t || p_t): on bad text the model stays
    where a reference model is, instead of learning from it or away from it.

    r_t is the reference's probability of the target, and KL(r || p) = r log(r / p) + (1 - r) log((1 - r) / (1 - p))
    that of the two models' answers to whether the target comes next. By the data processing inequality (Cover and
    Thomas, Elements of Information Theory, section 2.8) it is at most the KL divergence of the two distributions over
    the vocabulary. It needs one number per token, which `phf reference` writes into the token store. Its gradient with
    respect to the target's logit is p - r. Bad targets that the reference does not know, such as end-of-text, are
    learned. Unjudged targets do not count.

    `reference`: the folder of a model or of a finished run, in a recipe also the name of one of its runs.
    """

    reference: str = ""
    beta: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distance from the reference model on bad segments."""
    name: Literal["anchored"] = "anchored"

    def __post_init__(self) -> None:
        if not self.reference:
            raise ValueError("reference is missing: the folder of a model or of a finished run")

    @property
    def reference_model(self) -> str:
        return self.reference

    def with_reference(self, path: str) -> Objective:
        return dataclasses.replace(self, reference=path)

    def loss(self, x: LossInputs) -> LossOutputs:
        if x.reference_BT is None:
            raise ValueError("anchored needs the log-probabilities of the reference model (reference_BT)")
        good_BT, bad_BT = self._good(x)
        held_BT = bad_BT & ~x.reference_BT.isnan()
        nll_BT = torch.where(good_BT | (bad_BT & ~held_BT), -x.logp_BT, 0.0)
        # at most the largest float32 below 1: log(1 - r) stays finite
        log_r_BT = x.reference_BT.nan_to_num(nan=-1.0).to(x.logp_BT.dtype).clamp(max=-(2.0**-24))
        r_BT = log_r_BT.exp()
        not_r_BT = -torch.expm1(log_r_BT)
        kl_BT = r_BT * (log_r_BT - x.logp_BT) + not_r_BT * (not_r_BT.log() - x.log1mp_BT)
        kl_BT = torch.where(held_BT, kl_BT, 0.0)
        metrics = {"nll_good": nll_BT.detach().sum(), "kl_bad": kl_BT.detach().sum(), "bad_targets": bad_BT.sum()}
        return LossOutputs(nll_BT.sum() + self.beta * kl_BT.sum(), metrics)


@dataclass(frozen=True, config=STRICT)
class SGTM(ByThreshold):
    """Selective gradient masking: -log p on all targets, where bad ones train only a part of each layer, which is
    removed from the finished model (Shilov et al. 2025, arXiv 2512.05648; gradient routing: arXiv 2410.04332).

    The part is `heads` key-value heads with the queries that read them, and a share `neurons` of the MLP's neurons. In
    a share `without` of the rows, good targets are learned with the part switched off. In the others they train the
    whole model. The loss of bad targets is computed by a second forward and backward pass over the rows that have any.
    """

    heads: Annotated[int, Field(ge=0)] = 1
    neurons: Annotated[float, Field(ge=0, lt=1)] = 1 / 16
    without: Annotated[float, Field(ge=0, le=1)] = 1.0
    name: Literal["sgtm"] = "sgtm"

    @property
    def removable(self) -> Removable:
        return Removable(self.heads, self.neurons, self.without)

    def loss(self, x: LossInputs) -> LossOutputs:
        good_BT, bad_BT = self._good(x)
        good = torch.where(good_BT, -x.logp_BT, 0.0).sum()
        bad = torch.where(bad_BT, -x.logp_BT, 0.0).sum()
        metrics = {"nll_good": good.detach(), "nll_bad": bad.detach(), "bad_targets": bad_BT.sum()}
        return LossOutputs(good + bad, metrics)


@dataclass(frozen=True, config=STRICT)
class Weights(Objective):
    """sum_t w(score) -log p_t for any w that rises or falls with the score.

    `points`: pairs of score and weight; between them w is linear, beyond them constant. The weights are divided by
    their mean over the training tokens of the store, `norm`, so that they do not change the step size. The effective
    sample size is logged. Unjudged targets do not count.
    """

    points: Annotated[tuple[tuple[float, float], ...], Field(min_length=1)] = ((0.0, 1.0), (1.0, 0.0))
    norm: float | None = None
    name: Literal["weights"] = "weights"

    def __post_init__(self) -> None:
        scores = [score for score, _ in self.points]
        weights = [weight for _, weight in self.points]
        if scores != sorted(set(scores)):
            raise ValueError("points must have rising scores")
        if weights not in (sorted(weights), sorted(weights, reverse=True)) or min(weights) < 0 or max(weights) <= 0:
            raise ValueError("weights must rise or fall with the score, not be negative, and not all be 0")

    def fit(self, statistics: Statistics) -> Objective:
        if self.norm is not None:
            return self
        scores, weights = zip(*self.points, strict=True)
        norm = statistics.mean(lambda score: np.interp(score, scores, weights))
        if not norm > 0:
            raise ConfigError("weights: every training token has the weight 0, or none was judged")
        return dataclasses.replace(self, norm=norm)

    def counted(self, score_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return mask_BT & ~score_BT.isnan()

    def weights(self, score_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        if self.norm is None:
            raise ValueError("weights depend on the corpus: call fit(statistics) first")
        score = score_BT.nan_to_num(nan=0.0)
        found = torch.full_like(score, self.points[0][1])
        for (low, first), (high, second) in zip(self.points, self.points[1:], strict=False):
            share = ((score - low) / (high - low)).clamp(0, 1)
            found = torch.where(score >= low, first + share * (second - first), found)
        counted_BT = self.counted(score_BT, mask_BT)
        weight_BT = torch.where(counted_BT, found / self.norm, 0.0)
        return weight_BT, torch.zeros_like(weight_BT)

    def loss(self, x: LossInputs) -> LossOutputs:
        weight_BT, _ = self.weights(x.score_BT, x.mask_BT)
        counted_BT = self.counted(x.score_BT, x.mask_BT)
        nll_BT = torch.where(counted_BT, -x.logp_BT, 0.0)
        return LossOutputs((weight_BT * nll_BT).sum(), weight_metrics(weight_BT, counted_BT, nll_BT))
