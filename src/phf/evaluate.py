"""Judging a model: misalignment of its samples, held-out loss, diversity; with intervals. Floor 5.

    phf eval runs/conditional

Samples are scored by the scorer that scored the corpus (its identity is checked). Held-out loss is in nats per byte of
text on good and on bad segments; control and end-of-text tokens are context, not counted, so that objectives with and
without control tokens compare. A model with control tokens is judged under the corpus's own ("oracle") and with the
good token before every segment.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter

from phf import metrics, store
from phf.annotate import judge_documents
from phf.capabilities import Capability
from phf.config import ConfigError, to_plain
from phf.model import model_folder
from phf.packing import Rows
from phf.reference import KL, kl, reference_hash
from phf.sample import LoadedModel, Scenario, load_model, prompts_path, sample, write_samples
from phf.scorers import AnyScorer, Scorer
from phf.segment import AnySegmenter, Lines, Segmenter
from phf.tokens import TokenStore
from phf.types import Edit, Sample

QUANTILES = (0.5, 0.9, 0.95, 0.99, 1.0)
EXPECTED_MAX = (5, 25)
"""Samples of which the expected worst is reported; the paper's is of 25."""


def is_run(path: str | Path) -> bool:
    """Whether a folder holds a finished run of `phf train`."""
    try:
        return bool(store.read_manifest(path, "train"))
    except store.StoreError:
        return False


def corpus_scorer(manifest: dict[str, Any], allow_other: bool = False) -> Scorer:
    """The scorer that scored the corpus behind a manifest, as installed now.

    Raises ConfigError if it would judge differently (another version or setting) unless `allow_other`.
    """
    if manifest.get("scorer") is None:
        raise ConfigError(
            "the corpus came with scores but without its scorer; name one to judge samples with: phf eval --scorer pii"
        )
    scorer: Scorer = TypeAdapter(AnyScorer).validate_python(manifest["scorer"])
    check_identity(scorer, manifest["identity"], allow_other)
    return scorer


def check_identity(scorer: Scorer, identity: dict[str, Any], allow_other: bool = False) -> None:
    """Raise ConfigError unless `scorer` is the one that scored the corpus."""
    if identity == {"name": "unknown"}:  # scores from elsewhere: whoever names a scorer answers for it
        return
    now = store.jsonable(scorer.identity())
    if now != identity and not allow_other:
        differs = [
            f"{k}: corpus {identity.get(k)!r}, now {now.get(k)!r}"
            for k in sorted(set(now) | set(identity))
            if now.get(k) != identity.get(k)
        ]
        raise ConfigError(
            "samples would be judged by another scorer than the corpus ("
            + "; ".join(differs)
            + "); phf eval --other-scorer allows it"
        )


def scored_text(item: Sample, scenario: Scenario, scorer: Scorer) -> str:
    """The part of a sample that is judged."""
    text = item.text
    if scenario.complete_lines and not item.finished:
        text = scorer.without_cut(text)
    return item.prompt + text if scenario.score_prompt and text else text  # a prompt alone is not the model's


def judge_samples(
    samples: Sequence[Sample], scenario: Scenario, scorer: Scorer, segmenter: Segmenter, threshold: float
) -> tuple[list[Sample], dict[str, Any]]:
    """The samples with their scores, and what they add up to. Lower misalignment is better.

    An empty text, or one on which the scorer fails, is not judged (NaN): left out and counted. Where prompts have
    several samples, the independent unit is the prompt.
    """
    judged_texts = [scored_text(item, scenario, scorer) for item in samples]
    whole = judge_documents(scorer, [[text] if text else [] for text in judged_texts])
    segments = [segmenter.split(text) for text in judged_texts]
    parts = judge_documents(scorer, segments)
    scored = [
        dataclasses.replace(
            item,
            score=scores[0] if scores else float("nan"),
            segment_ends=tuple(itertools.accumulate(map(len, cut))),
            segment_scores=tuple(of_parts),
        )
        for item, (scores, _, _), cut, (of_parts, _, _) in zip(samples, whole, segments, parts, strict=True)
    ]
    failures = Counter(failure for _, failure, _ in whole if failure)
    labels = sum((found for _, _, found in parts), Counter[str]())
    segment_scores = np.array([s for scores, _, _ in parts for s in scores if s == s], np.float32)
    num_segments = len(segment_scores)
    bad_segments = int((segment_scores > np.float32(threshold)).sum())
    scores_N = np.array([s.score for s in scored])
    units_N = by_prompt(scores_N, scenario)
    texts = [s.text for s in scored]
    judged_N = scores_N[~np.isnan(scores_N)]
    unjudged = int(np.isnan(scores_N).sum())
    if len(units_N) == len(scores_N):
        hit_rate = metrics.share_estimate(judged_N > threshold, unjudged)
    else:  # several samples of a prompt are not independent
        shares_N = by_prompt(np.where(np.isnan(scores_N), np.nan, scores_N > threshold), scenario)
        hit_rate = metrics.mean_estimate(shares_N)
        if hit_rate.mean in (0, 1):  # resampling finds nothing else; as wide as of one sample a prompt
            hit_rate = dataclasses.replace(hit_rate, ci95=metrics.wilson(int(hit_rate.mean * hit_rate.n), hit_rate.n))
    several = scenario.samples_per_prompt if scenario.prompts is not None else 1
    result = {
        "misalignment": metrics.mean_estimate(units_N).to_json(),
        "expected_max": {str(k): _expected_max(scores_N, scenario, k) for k in sorted({*EXPECTED_MAX, several} - {1})},
        "hit_rate": hit_rate.to_json(),
        "bad_segments": bad_segments / num_segments if num_segments else None,
        "segments": num_segments,
        "quantiles": {str(q): float(np.quantile(judged_N, q)) for q in QUANTILES} if len(judged_N) else {},
        "labels": dict(labels.most_common()),
        "samples": len(scored),
        "empty": sum(not t for t in texts),
        "unjudged": unjudged,
        "failures": dict(failures),
        "mean_tokens": float(np.mean([s.num_tokens for s in scored])),
        "mean_chars": float(np.mean([len(t) for t in texts])),
        "finished": float(np.mean([s.finished for s in scored])),
        "distinct_1": metrics.distinct_n(texts, 1),
        "distinct_2": metrics.distinct_n(texts, 2),
        "entropy_1": metrics.ngram_entropy(texts, 1),
        "entropy_2": metrics.ngram_entropy(texts, 2),
        "self_bleu_5": metrics.self_bleu(texts, 5),
        "repetition_4": metrics.mean_estimate(
            by_prompt(np.array([metrics.repetition(t) for t in texts]), scenario)
        ).to_json(),
        "compile_rate": metrics.compile_rate([t for t in judged_texts if t])
        if scorer.identity()["name"] == "pep8"
        else None,
        "scenario": to_plain(scenario),
    }
    return scored, result


def _expected_max(scores_N: np.ndarray, scenario: Scenario, k: int) -> dict[str, Any]:
    """Expected worst of k samples: of each prompt, then their mean over prompts; none where prompts have several samples,
    but fewer than k. Where each has one, or there are none, over all samples alike (then without an interval)."""
    nothing = {"mean": None, "stderr": None, "n": 0, "ci95": [None, None]}
    if scenario.prompts is not None and 1 < scenario.samples_per_prompt < k:
        return nothing
    if scenario.prompts is not None and scenario.samples_per_prompt >= k:
        per = scenario.samples_per_prompt
        groups = [scores_N[a : a + per] for a in range(0, len(scores_N), per)]
        return metrics.mean_estimate([metrics.expected_max(g, k) for g in groups]).to_json()
    return {"mean": metrics.expected_max(scores_N, k), "stderr": None, "n": len(scores_N), "ci95": [None, None]}


def compare(a: Sequence[Sample], b: Sequence[Sample]) -> dict[str, Any]:
    """Difference in mean score of two models' samples, a - b (below 0: `a` is less misaligned). The independent unit is the
    prompt, where there are prompts: paired over those that both were given, else two independent groups, each resampled."""
    mean_a, mean_b = _prompt_means(a), _prompt_means(b)
    common = [p for p in mean_a if p in mean_b and isinstance(p, str)]
    if len(common) > 1:
        pairs = metrics.paired_difference([mean_a[p] for p in common], [mean_b[p] for p in common])
        return pairs.to_json() | {"paired": True}
    unit_a, unit_b = (np.array([v for v in m.values() if v == v]) for m in (mean_a, mean_b))
    one, two = metrics.mean_estimate(unit_a), metrics.mean_estimate(unit_b, seed=1)
    base = {"mean": one.mean - two.mean, "n": one.n + two.n, "paired": False}
    if one.n < 2 or two.n < 2:
        return base | {"stderr": None, "ci95": [None, None]}
    rng = np.random.Generator(np.random.Philox(0))
    draws = [rng.choice(unit_a, one.n).mean() - rng.choice(unit_b, two.n).mean() for _ in range(2000)]
    ci = [float(x) for x in np.quantile(draws, [0.025, 0.975])]
    return base | {"stderr": float(np.hypot(one.stderr, two.stderr)), "ci95": ci}


def _prompt_means(samples: Sequence[Sample]) -> dict[str | int, float]:
    """Mean score of each prompt (NaN where none was judged); samples without a prompt are each by themselves."""
    groups: dict[str | int, list[float]] = {}
    for n, item in enumerate(samples):
        groups.setdefault(item.prompt or n, []).append(item.score)
    means: dict[str | int, float] = {}
    for prompt, scores in groups.items():
        judged = [s for s in scores if s == s]
        means[prompt] = sum(judged) / len(judged) if judged else float("nan")
    return means


def by_prompt(scores_N: np.ndarray, scenario: Scenario) -> np.ndarray:
    """Independent units: mean score per prompt where prompts have several samples, else the scores themselves."""
    if scenario.prompts is None or scenario.samples_per_prompt == 1:
        return scores_N
    groups = [
        scores_N[a : a + scenario.samples_per_prompt] for a in range(0, len(scores_N), scenario.samples_per_prompt)
    ]
    return np.array([np.nanmean(g) if not np.isnan(g).all() else np.nan for g in groups])


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


@plain_dataclass(frozen=True)
class HeldoutNats:
    """Held-out text as a model reads it: `nats_S` loss of each segment's text tokens, `seen_S` whether it was read, and
    `bad_S` the model's p(bad) / (p(good) + p(bad)) where the segment begins (NaN where it was not asked)."""

    nats_S: np.ndarray
    seen_S: np.ndarray
    bad_S: np.ndarray


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
    doc_tokens_D = np.bincount(table.doc_S, weights=table.tokens_S, minlength=len(table.train_D))
    heldout_D = np.where(tokens.heldout_D, doc_tokens_D, 0)
    keep_D = heldout_D.cumsum() <= max_tokens  # the same text for every model
    if not (keep_D & tokens.heldout_D).any():
        keep_D = np.arange(len(heldout_D)) <= int(np.argmax(tokens.heldout_D))  # one document that is longer than that
    rows = Rows(tokens, Edit(keep_D, control_S), context, control_ids, split="heldout", pad=True)
    silent = [*model.control_ids.values(), tokens.end_of_text_id]
    nats_S = np.zeros(len(table.score_S))
    seen_S = np.zeros(len(nats_S), bool)
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
        "likelihood_ratio": _auc(ratio_S[seen_S], bad_S[seen_S], table.doc_S[seen_S]),
        "foresight": _auc(foresight_S[ahead_S], bad_S[ahead_S], table.doc_S[ahead_S])
        | {
            "mean_p_bad_before_good": _mean_or_none(foresight_S[ahead_S & ~bad_S]),
            "mean_p_bad_before_bad": _mean_or_none(foresight_S[ahead_S & bad_S]),
        },
        "segments": int(seen_S.sum()),
        "bad_segments": int((seen_S & bad_S).sum()),
    }


def _mean_or_none(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _auc(value_S: np.ndarray, bad_S: np.ndarray, doc_S: np.ndarray, resamples: int = 200) -> dict[str, Any]:
    from sklearn.metrics import roc_auc_score

    if not bad_S.any() or bad_S.all():
        return {"auc": None, "ci95": [None, None]}
    docs, index = np.unique(doc_S, return_inverse=True)
    places = np.split(np.argsort(index, kind="stable"), np.cumsum(np.bincount(index))[:-1])
    rng = np.random.Generator(np.random.Philox(0))
    aucs = []
    for _ in range(resamples):
        pick = np.concatenate([places[d] for d in rng.integers(0, len(docs), len(docs))])
        if 0 < bad_S[pick].sum() < len(pick):
            aucs.append(roc_auc_score(bad_S[pick], value_S[pick]))
    ci = [float(x) for x in np.quantile(aucs, [0.025, 0.975])] if len(docs) > 1 and aucs else [None, None]
    return {"auc": float(roc_auc_score(bad_S, value_S)), "ci95": ci}


def _per_byte(
    nats_S: np.ndarray, bytes_S: np.ndarray, doc_S: np.ndarray, use_S: np.ndarray, tokens_S: np.ndarray
) -> dict[str, Any]:
    """Ratio of sums with a bootstrap interval over documents."""
    docs, index = np.unique(doc_S[use_S], return_inverse=True)
    if len(docs) == 0:
        return {"nats_per_byte": None, "bits_per_byte": None, "bytes": 0, "tokens": 0, "documents": 0, "ci95": None}
    nats_D = np.bincount(index, weights=nats_S[use_S])
    bytes_D = np.bincount(index, weights=bytes_S[use_S].astype(np.float64))
    ratio = metrics.ratio_of_sums(nats_D, bytes_D)
    return {
        "nats_per_byte": ratio.mean,
        "bits_per_byte": ratio.mean / math.log(2),
        "bytes": int(bytes_D.sum()),
        "tokens": int(tokens_S[use_S].sum()),
        "documents": len(docs),
        "ci95": list(ratio.ci95) if len(docs) > 1 else None,
    }


def evaluate_run(
    run: str | Path,
    scenarios: dict[str, Scenario],
    threshold: float = 0.0,
    tokens_dir: str | Path | None = None,
    scorer: Scorer | None = None,
    allow_other_scorer: bool = False,
    heldout_tokens: int = 1_000_000,
    kl_from: KL | None = None,
    capabilities: Sequence[Capability] = (),
) -> dict[str, Any]:
    """Judge a trained run: writes `samples/<scenario>.jsonl` and `eval.json` beside the model and returns the latter.

    Done already with the same settings: returns at once; interrupted before: goes on with the parts that are not done.
    `threshold`: scores above it are bad (hits, and the good and bad slices of the held-out loss).
    """
    run = Path(run)
    manifest = store.read_manifest(run, "train")
    tokens = TokenStore.open(tokens_dir or manifest["tokens_dir"], manifest["train"].get("scores"))
    if tokens.manifest["content"] != manifest["tokens_content"]:
        raise ConfigError(f"{tokens.path} is not the token store that {run} was trained on (its content differs)")
    if scorer is None:
        scorer = corpus_scorer(tokens.manifest, allow_other_scorer)
    else:
        check_identity(scorer, tokens.manifest["identity"], allow_other_scorer)
    about = {
        "run": run.name,
        "objective": manifest["objective"],
        "seed": manifest["seed"],
        "tokens": manifest["counts"]["tokens"],
        "tokens_content": manifest["tokens_content"],
        "data": _data_section(tokens),
    }
    judgement = _Judgement(
        run, manifest["key"], scenarios, threshold, scorer, segmenter_of(tokens), kl_from, capabilities
    )

    def on_heldout(model: LoadedModel) -> dict[str, Any]:
        heldout: dict[str, Any] = {}
        if not tokens.heldout_D.any():
            return heldout
        context, own = manifest["train"]["context"], manifest["objective"].get("threshold")
        controls: tuple[Control, ...] = ("oracle", "good") if model.control_ids else ("none",)
        for control in controls:
            heldout[control] = heldout_loss(
                model, tokens, context, threshold, control, max_tokens=heldout_tokens, control_threshold=own
            )
        if model.control_ids:
            heldout["understanding"] = understanding(
                model, tokens, context, threshold, max_tokens=min(heldout_tokens, 200_000), control_threshold=own
            )
        return heldout

    return judgement.judge(about, heldout_tokens, on_heldout)


def evaluate_model(
    model: str,
    out: str | Path,
    scorer: Scorer,
    scenarios: dict[str, Scenario],
    threshold: float = 0.0,
    segmenter: Segmenter | None = None,
    kl_from: KL | None = None,
    capabilities: Sequence[Capability] = (),
) -> dict[str, Any]:
    """Judge any causal LM, trained here or not, into folder `out`: samples, KL and capabilities as for a run. There is no
    held-out text of its own."""
    segmenter = segmenter or Lines()
    local = Path(model_folder(model))
    key = store.path_hash(local) if local.exists() else model
    judgement = _Judgement(
        Path(out),
        store.fingerprint([model, key]),
        scenarios,
        threshold,
        scorer,
        segmenter,
        kl_from,
        capabilities,
        model,
    )
    return judgement.judge({"run": model, "objective": None}, 0, None)


class _Judgement:
    """One evaluation, in parts that are each kept when they are done (`eval/<part>.json`)."""

    def __init__(
        self, folder: Path, model_key: str, scenarios: dict[str, Scenario], threshold: float, scorer: Scorer,
        segmenter: Segmenter, kl_from: KL | None, capabilities: Sequence[Capability], model: str | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.model_key, self.scenarios, self.threshold = folder, model_key, scenarios, threshold
        self.scorer, self.segmenter, self.kl_from, self.capabilities = scorer, segmenter, kl_from, capabilities
        self.model_path = model if model is not None else str(folder)
        self.loaded: LoadedModel | None = None

    def model(self) -> LoadedModel:
        """Loaded when the first part that is not done asks for it."""
        if self.loaded is None:
            self.loaded = load_model(self.model_path)
        return self.loaded

    def part(
        self, name: str, settings: Any, make: Callable[[], dict[str, Any]], written: Path | None = None
    ) -> dict[str, Any]:
        """What `make` gives, kept under its key. `written`: a file that it writes, which must still be that one."""
        key = store.fingerprint([self.model_key, name, settings, "eval/4"])
        file = self.folder / "eval" / f"{name}.json"
        if file.exists():
            kept = store.read_json(file)
            if kept.get("key") == key and (written is None or kept["written"] == store.path_hash(written)):
                return kept  # type: ignore[no-any-return]
        start = time.perf_counter()
        value = {"key": key, "value": make(), "seconds": time.perf_counter() - start}
        value["written"] = None if written is None else store.path_hash(written)
        store.write_json(file, value)
        return store.jsonable(value)  # type: ignore[no-any-return]

    def judge(
        self, about: dict[str, Any], heldout_tokens: int, on_heldout: Callable[[LoadedModel], dict[str, Any]] | None
    ) -> dict[str, Any]:
        identity = self.scorer.identity()
        names = [type(c).__name__ + str(n) for n, c in enumerate(self.capabilities)]
        plain = {name: to_plain(s) for name, s in self.scenarios.items()}
        cut = to_plain(self.segmenter)
        kl_settings = [to_plain(self.kl_from), cut, reference_hash(self.kl_from)] if self.kl_from is not None else None
        measured = [[to_plain(c), c.inputs()] for c in self.capabilities]
        everything = [plain, self.threshold, identity, heldout_tokens, cut, kl_settings, measured]
        prompts = {
            n: store.path_hash(prompts_path(s.prompts)) for n, s in self.scenarios.items() if s.prompts is not None
        }
        key = store.fingerprint([self.model_key, everything, prompts, "eval/4"])
        done = self.folder / "eval.json"
        if done.exists() and store.read_json(done).get("key") == key:
            return store.read_json(done)  # type: ignore[no-any-return]
        done.unlink(missing_ok=True)  # its samples are about to be replaced
        parts: dict[str, dict[str, Any]] = {}
        skipped = []
        for name, scenario in self.scenarios.items():
            needs = "bad" if scenario.control == "bad" or scenario.guidance is not None else None
            if needs and needs not in self.model().control_ids:
                skipped.append(name)  # asks for the bad token of a model that has none
                continue
            settings = [plain[name], self.threshold, identity, cut, prompts.get(name)]
            parts[f"scenario-{name}"] = self.part(
                f"scenario-{name}", settings, functools.partial(self._scenario, name), self._samples(name)
            )
        if not parts:
            raise ConfigError(f"{self.model_path} has no control tokens, so {', '.join(skipped)} cannot be asked of it")
        if on_heldout is not None:
            settings = [heldout_tokens, self.threshold]
            parts["heldout"] = self.part("heldout", settings, lambda: on_heldout(self.model()))
        if self.kl_from is not None:
            config = self.kl_from
            cache = self.folder.parent / "cache"
            parts["kl"] = self.part("kl", kl_settings, lambda: kl(self.model(), config, self.segmenter, cache))
        for name, capability, settings in zip(names, self.capabilities, measured, strict=True):
            parts[name] = self.part(name, settings, lambda c=capability: c.measure(self.model()))  # type: ignore[misc]
        heldout = dict(parts["heldout"]["value"]) if "heldout" in parts else {}
        result = about | {
            "key": key,
            "identity": identity,
            "scorer": to_plain(self.scorer),
            "threshold": self.threshold,
            "scenarios": {
                n.removeprefix("scenario-"): p["value"] for n, p in parts.items() if n.startswith("scenario-")
            },
            "understanding": heldout.pop("understanding", None),
            "heldout": heldout,
            "kl": parts["kl"]["value"] if "kl" in parts else None,
            "capabilities": [
                {"name": to_plain(c)["name"], "settings": to_plain(c), **parts[n]["value"]}
                for n, c in zip(names, self.capabilities, strict=True)
            ],
            "seconds": {name: part["seconds"] for name, part in parts.items()},
        }
        store.write_json(done, result)
        return store.jsonable(result)  # type: ignore[no-any-return]

    def _scenario(self, name: str) -> dict[str, Any]:
        scenario = self.scenarios[name]
        samples, result = judge_samples(
            sample(self.model(), scenario), scenario, self.scorer, self.segmenter, self.threshold
        )
        write_samples(self._samples(name), samples)
        return result

    def _samples(self, name: str) -> Path:
        return self.folder / "samples" / f"{name}.jsonl"


def segmenter_of(tokens: TokenStore) -> Segmenter:
    """How the corpus was cut; lines where it came cut by somebody else."""
    config = tokens.manifest["segmenter"]
    if config is None or config["name"] == "given":
        config = {"name": "lines"}
    return TypeAdapter(AnySegmenter).validate_python(config)  # type: ignore[no-any-return]


def _data_section(tokens: TokenStore) -> dict[str, Any]:
    """What the page says of the data, so that it does not depend on where the stores lie when it is made."""
    folder = Path(tokens.manifest["scored"])
    scored = store.read_json(folder / store.MANIFEST) if (folder / store.MANIFEST).exists() else {}
    added = folder / "scores" / tokens.preference / store.MANIFEST
    if scored and tokens.preference != scored["identity"]["name"] and added.exists():
        of_added = store.read_json(added)
        scored |= {k: of_added[k] for k in ("identity", "scorer", "labels", "failures") if k in of_added}
        scored["counts"] = scored["counts"] | of_added["counts"]
    return {"tokens": tokens.manifest, "scored": scored}
