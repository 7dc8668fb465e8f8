"""Judging a model: misalignment of its samples, held-out loss, diversity; with intervals. Floor 5.

    phf eval runs/conditional

Samples are scored by the scorer that scored the corpus (its identity is checked). Held-out loss is in nats per byte of
text on good and on bad segments; control and end-of-text tokens are context, not counted, so that objectives with and
without control tokens compare. A model with control tokens is judged under the corpus's own ("oracle") and with the
good token before every segment.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter

from phf import metrics, store
from phf.annotate import judge_documents
from phf.config import ConfigError, to_plain
from phf.packing import Rows
from phf.sample import LoadedModel, Scenario, load_model, sample, write_samples
from phf.scorers import AnyScorer, Scorer
from phf.segment import AnySegmenter, Segmenter
from phf.tokens import TokenStore
from phf.types import Edit, Sample

QUANTILES = (0.5, 0.9, 0.95, 0.99, 1.0)


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
    return item.prompt + text if scenario.score_prompt else text


def judge_samples(
    samples: Sequence[Sample], scenario: Scenario, scorer: Scorer, segmenter: Segmenter, threshold: float
) -> tuple[list[Sample], dict[str, Any]]:
    """The samples with their scores, and what they add up to. Lower misalignment is better.

    An empty text, or one on which the scorer fails, is not judged (NaN): left out and counted. Where prompts have
    several samples, the independent unit is the prompt.
    """
    judged_texts = [scored_text(item, scenario, scorer) for item in samples]
    whole = judge_documents(scorer, [[text] if text else [] for text in judged_texts])
    parts = judge_documents(scorer, [segmenter.split(text) for text in judged_texts])
    scored = [
        dataclasses.replace(item, score=scores[0] if scores else float("nan"))
        for item, (scores, _, _) in zip(samples, whole, strict=True)
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
        hit_rate = metrics.mean_estimate(
            by_prompt(np.where(np.isnan(scores_N), np.nan, scores_N > threshold), scenario)
        )
    result = {
        "misalignment": metrics.mean_estimate(units_N).to_json(),
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
        "distinct_2": metrics.distinct_n(texts, 2),
        "entropy_2": metrics.ngram_entropy(texts, 2),
        "scenario": to_plain(scenario),
    }
    return scored, result


def by_prompt(scores_N: np.ndarray, scenario: Scenario) -> np.ndarray:
    """Independent units: mean score per prompt where prompts have several samples, else the scores themselves."""
    if scenario.prompts is None or scenario.samples_per_prompt == 1:
        return scores_N
    groups = [
        scores_N[a : a + scenario.samples_per_prompt] for a in range(0, len(scores_N), scenario.samples_per_prompt)
    ]
    return np.array([np.nanmean(g) if not np.isnan(g).all() else np.nan for g in groups])


def token_logp(model: LoadedModel, input_BT: torch.Tensor, target_BT: torch.Tensor) -> torch.Tensor:
    """log p of each target, float32 [B, T], without holding [B, T, vocabulary]."""
    hidden_BTD = model.lm.base_model(input_ids=input_BT, use_cache=False).last_hidden_state
    head = model.lm.get_output_embeddings()
    rows = []
    for hidden_TD, target_T in zip(hidden_BTD, target_BT, strict=True):
        logits_TV = head(hidden_TD).float()
        rows.append(logits_TV.gather(1, target_T.unsqueeze(1)).squeeze(1) - logits_TV.logsumexp(1))
    return torch.stack(rows)


def heldout_loss(
    model: LoadedModel,
    tokens: TokenStore,
    context: int,
    threshold: float,
    control: Literal["none", "oracle", "good"],
    batch: int = 16,
    max_tokens: int = 1_000_000,
    control_threshold: float | None = None,
) -> dict[str, Any]:
    """Loss on the held-out documents in nats per byte of text, on all, good (score <= threshold) and bad segments.

    Lower is better on good text. Intervals by bootstrap over documents. `control`: no control tokens, those that the
    scores say (at `control_threshold`, the objective's own), or the good one before every segment; the model is given
    them and not charged for them. At most the first `max_tokens` tokens of held-out documents are read.
    """
    table = tokens.table
    control_S: np.ndarray | None = None
    control_ids = [model.control_ids[k] for k in ("good", "bad")] if control != "none" else []
    good_S = table.score_S.astype(np.float32) <= np.float32(threshold)
    if control == "oracle":
        limit = threshold if control_threshold is None else control_threshold
        control_S = np.where(table.score_S.astype(np.float32) <= np.float32(limit), 0, 1).astype(np.int8)
    elif control == "good":
        control_S = np.zeros(len(good_S), np.int8)
    if control_S is not None:
        control_S[table.tokens_S == 0] = -1
    doc_tokens_D = np.bincount(table.doc_S, weights=table.tokens_S, minlength=len(table.train_D))
    keep_D = np.where(tokens.heldout_D, doc_tokens_D, 0).cumsum() <= max_tokens  # the same text for every model
    rows = Rows(tokens, Edit(keep_D, control_S), context, control_ids, split="heldout", pad=True)
    silent = [*model.control_ids.values(), tokens.end_of_text_id]
    nats_S = np.zeros(len(good_S))
    seen_S = np.zeros(len(good_S), bool)
    with torch.inference_mode():
        for start in range(0, rows.num_rows, batch):
            numbers = range(start, min(start + batch, rows.num_rows))
            part = rows.batch(numbers)
            device = model.lm.device
            logp_BT = (
                token_logp(
                    model, torch.from_numpy(part.input_BT).to(device), torch.from_numpy(part.target_BT).to(device)
                )
                .cpu()
                .numpy()
            )
            for b, row in enumerate(numbers):
                ids, seg = rows.stream(row * context, min(row * context + context + 1, rows.num_tokens))
                text = ~np.isin(ids[1:], silent)
                np.add.at(nats_S, seg[1:][text], -logp_BT[b, : len(text)][text].astype(np.float64))
                seen_S[seg[1:]] = True
    judged_S = ~np.isnan(table.score_S)
    slices = {"all": seen_S, "good": seen_S & good_S, "bad": seen_S & judged_S & ~good_S}
    return {
        name: _per_byte(nats_S, tokens.seg_bytes, table.doc_S, use_S, table.tokens_S) for name, use_S in slices.items()
    }


def _per_byte(
    nats_S: np.ndarray, bytes_S: np.ndarray, doc_S: np.ndarray, use_S: np.ndarray, tokens_S: np.ndarray
) -> dict[str, Any]:
    """Ratio of sums with a bootstrap interval over documents."""
    docs, index = np.unique(doc_S[use_S], return_inverse=True)
    if len(docs) == 0:
        return {"nats_per_byte": None, "bytes": 0, "tokens": 0, "documents": 0, "ci95": None}
    nats_D = np.bincount(index, weights=nats_S[use_S])
    bytes_D = np.bincount(index, weights=bytes_S[use_S].astype(np.float64))
    rng = np.random.Generator(np.random.Philox(0))
    ratios = np.empty(2000)
    for n in range(len(ratios)):  # one at a time: documents can be many
        pick = rng.integers(0, len(docs), len(docs))
        ratios[n] = nats_D[pick].sum() / bytes_D[pick].sum()
    ci = [float(x) for x in np.quantile(ratios, [0.025, 0.975])] if len(docs) > 1 else None
    return {
        "nats_per_byte": float(nats_D.sum() / bytes_D.sum()),
        "bytes": int(bytes_D.sum()),
        "tokens": int(tokens_S[use_S].sum()),
        "documents": len(docs),
        "ci95": ci,
    }


def evaluate_run(
    run: str | Path,
    scenarios: dict[str, Scenario],
    threshold: float = 0.0,
    tokens_dir: str | Path | None = None,
    scorer: Scorer | None = None,
    allow_other_scorer: bool = False,
    heldout_tokens: int = 1_000_000,
) -> dict[str, Any]:
    """Judge a trained run: writes `samples/<scenario>.jsonl` and `eval.json` beside the model and returns the latter.

    Done already with the same settings: returns at once.
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
    segmenter = segmenter_of(tokens)
    plain = {name: to_plain(s) for name, s in scenarios.items()}
    prompts = [store.path_hash(s.prompts) for s in scenarios.values() if s.prompts is not None]
    key = store.fingerprint([manifest["key"], plain, threshold, scorer.identity(), heldout_tokens, prompts, "eval/2"])
    done = run / "eval.json"
    if done.exists() and store.read_json(done).get("key") == key:
        return store.read_json(done)  # type: ignore[no-any-return]
    model = load_model(run)
    results: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for name, scenario in scenarios.items():
        if scenario.control == "bad" and not model.control_ids:
            continue  # asks for the bad token of a model that has none
        start = time.perf_counter()
        samples, results[name] = judge_samples(sample(model, scenario), scenario, scorer, segmenter, threshold)
        seconds[name] = time.perf_counter() - start
        write_samples(run / "samples" / f"{name}.jsonl", samples)
    if not results:
        raise ConfigError(f"{run} has no control tokens, so control=bad cannot be asked of it")
    start = time.perf_counter()
    heldout: dict[str, Any] = {}
    if tokens.heldout_D.any():
        for control in ("oracle", "good") if model.control_ids else ("none",):
            heldout[control] = heldout_loss(
                model,
                tokens,
                manifest["train"]["context"],
                threshold,
                control,
                max_tokens=heldout_tokens,
                control_threshold=manifest["objective"].get("threshold"),
            )
    seconds["heldout"] = time.perf_counter() - start
    result = {
        "key": key,
        "run": run.name,
        "objective": manifest["objective"],
        "seed": manifest["seed"],
        "tokens": manifest["counts"]["tokens"],
        "identity": scorer.identity(),
        "scorer": to_plain(scorer),
        "tokens_content": manifest["tokens_content"],
        "data": _data_section(tokens),
        "threshold": threshold,
        "scenarios": results,
        "heldout": heldout,
        "seconds": seconds,
    }
    store.write_json(done, result)
    return store.jsonable(result)  # type: ignore[no-any-return]


def segmenter_of(tokens: TokenStore) -> Segmenter:
    """How the corpus was cut; lines where it came cut by somebody else."""
    config = tokens.manifest["segmenter"]
    if config is None or config["name"] == "given":
        config = {"name": "lines"}
    return TypeAdapter(AnySegmenter).validate_python(config)  # type: ignore[no-any-return]


def _data_section(tokens: TokenStore) -> dict[str, Any]:
    """What the page says of the data, so that it does not depend on where the stores lie when it is made."""
    scored = Path(tokens.manifest["scored"]) / store.MANIFEST
    return {"tokens": tokens.manifest, "scored": store.read_json(scored) if scored.exists() else {}}
