"""Distance from a reference LM: KL divergences estimated from samples.

    phf eval runs/conditional kl.reference.path=gpt2 kl.num_samples=512

Forward, KL(reference || model): E[log p_ref(x) - log p_model(x)] over texts from the reference. Reverse, KL(model
|| reference): the same over texts from the model. Texts are drawn at temperature 1 without truncation, up to
`max_tokens` tokens. Each model reads every text with its own tokenizer after end-of-text. The end of a text counts
for both models, or for neither where the text reached the limit.

Control tokens are context: they add no loss, and text tokens share the probability that they leave. The good token
goes before every segment; "oracle" has the tokens that the scorer implies. The probability of a text is that of one
way to tokenize it, a lower bound. So the divergence is too large by what the model's other ways hold, and too small
by what the reference's do, usually little. A text that was cut inside a word costs a model with another tokenizer
extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from phf.core import store
from phf.core.config import STRICT, ConfigError, to_plain
from phf.core.runs import model_mark
from phf.core.statistics import mean_estimate, ratio_of_sums
from phf.data.segment import Documents, Segmenter
from phf.evaluation.results import Divergence, KLResult, LocalReference, ReferenceIdentity, ServedReference
from phf.generation.loaded import LoadedModel, load_model
from phf.generation.sample import sample
from phf.generation.scenario import Scenario
from phf.generation.server import Server
from phf.scorers import Scorer
from phf.scorers.pretrained import weights_hash
from phf.scoring.judge import judge_documents
from phf.tokens.tokenizer import encode_segments


@settings(frozen=True, config=STRICT)
class LocalModel:
    """A model from a folder or the Hub."""

    path: str
    name: Literal["local"] = "local"
    revision: str | None = None


AnyReference = Annotated[LocalModel | Server, Field(discriminator="name", title="reference")]


@settings(frozen=True, config=STRICT)
class KL:
    """How to measure KL divergences. `reverse`: also measure KL(model || reference), which needs the reference's
    probabilities of the model's texts."""

    reference: AnyReference
    """The model to measure the distance from: local, with a path, or on a server."""
    num_samples: Annotated[int, Field(gt=1)] = 512
    """Texts that the distance is estimated from."""
    max_tokens: Annotated[int, Field(gt=0)] = 64
    """Longest text, in tokens."""
    reverse: bool = False
    seed: int = 0
    """Of the texts that are drawn."""
    batch: Annotated[int, Field(gt=0)] = 64
    """Texts that are computed together."""


def kl(
    model: LoadedModel,
    config: KL,
    segmenter: Segmenter,
    cache: str | Path,
    scorer: Scorer | None = None,
    threshold: float = 0.0,
    reference: ReferenceTexts | None = None,
) -> KLResult:
    """KL divergences in nats per text and nats per byte, with intervals over texts. Lower is nearer.

    `segmenter`: how the model's corpus was cut, for its control tokens. With the corpus's `scorer`, "oracle" puts
    the bad token before segments that score above `threshold` or cannot be judged. `reference`: the reference's
    texts; default: `reference_texts(config, cache)`.

    Raises ConfigError for a text that the model cannot read and for `reverse` of a model with control tokens, and
    ServerError for a server whose probabilities cannot be trusted.
    """
    drawn = reference_texts(config, cache) if reference is None else reference
    theirs_N = np.array(drawn.logp)
    ours_N = text_logp(model, drawn.texts, drawn.finished, segmenter, config.batch)
    oracle = None
    oracle_bad = None
    if model.is_pair and scorer is not None:
        bad = _bad_segments(model, drawn.texts, segmenter, scorer, threshold)
        oracle_N = text_logp(model, drawn.texts, drawn.finished, segmenter, batch=config.batch, bad=bad)
        oracle = _divergence(theirs_N - oracle_N, drawn.texts)
        oracle_bad = sum(map(sum, bad))
    return KLResult(
        reference=drawn.identity,
        num_samples=config.num_samples,
        max_tokens=config.max_tokens,
        finished=float(np.mean(drawn.finished)),
        forward=_divergence(theirs_N - ours_N, drawn.texts),
        oracle=oracle,
        oracle_bad_segments=oracle_bad,
        reverse=_reverse(model, config, segmenter) if config.reverse else None,
    )


def _reverse(model: LoadedModel, config: KL, segmenter: Segmenter) -> Divergence:
    """KL(model || reference)."""
    if model.control_ids:
        raise ConfigError(
            "kl.reverse: a model with control tokens may write them anywhere, so the probability of a text that it "
            "wrote cannot be computed; only KL from the reference is defined"
        )
    texts, finished = _draw(model, config)
    ours_N = text_logp(model, texts, finished, segmenter, config.batch)
    if isinstance(config.reference, Server):
        theirs_N = np.array(config.reference.text_logp(texts, finished))
    else:
        loaded = load_model(config.reference.path, config.reference.revision)
        theirs_N = text_logp(loaded, texts, finished, Documents(), config.batch)
    return _divergence(ours_N - theirs_N, texts)


def _divergence(difference_N: np.ndarray, texts: Sequence[str]) -> Divergence:
    bytes_N = np.array([len(t.encode("utf-8", "replace")) for t in texts], np.float64)
    return Divergence(nats_per_text=mean_estimate(difference_N), nats_per_byte=ratio_of_sums(difference_N, bytes_N))


# Texts of the reference


@dataclass(frozen=True)
class ReferenceTexts:
    """Texts of a reference with its own log-probabilities."""

    texts: list[str]
    finished: list[bool]
    """Whether the text ended before the limit."""
    logp: list[float]
    identity: ReferenceIdentity


def reference_hash(config: KL) -> str | None:
    """What identifies a reference. None for a server."""
    if isinstance(config.reference, Server):
        return None
    return model_mark(config.reference.path, config.reference.revision)


def reference_texts(config: KL, cache: str | Path) -> ReferenceTexts:
    """Draw texts of the reference, or read them from `cache`, where they are kept under everything that decides
    them.

    A server is verified before it is used. Raises ConfigError for a reference with control tokens: the probability
    of its texts is not defined.
    """
    loaded = None
    if isinstance(config.reference, Server):
        config.reference.verify()
        identity: ReferenceIdentity = ServedReference(server=config.reference.url, model=config.reference.model)
    else:
        loaded = load_model(config.reference.path, config.reference.revision)
        if loaded.control_ids:
            raise ConfigError(
                f"{config.reference.path} has control tokens, so the probability of its texts is not defined; a "
                "reference is a plain LM"
            )
        identity = LocalReference(
            path=config.reference.path,
            weights=weights_hash(loaded.lm),
            vocabulary=store.fingerprint(loaded.tokenizer.get_vocab()),
            control_tokens=loaded.control_ids,
            start=loaded.start_id,
            segmenter=to_plain(loaded.segmenter),
        )
    key = store.fingerprint(
        [identity, to_plain(config.reference), config.num_samples, config.max_tokens, config.seed, "reference/3"]
    )
    file = Path(cache) / f"reference-{key}.json"
    if file.exists():
        return store.read_record(file, ReferenceTexts)
    if loaded is None:
        assert isinstance(config.reference, Server)
        written = config.reference.complete([""] * config.num_samples, config.max_tokens, seed=config.seed)
        texts = [t for t, _ in written]
        finished = [f for _, f in written]
        logp = config.reference.text_logp(texts, finished)
    else:
        texts, finished = _draw(loaded, config)
        logp = text_logp(loaded, texts, finished, Documents(), config.batch).tolist()
    value = ReferenceTexts(texts, finished, logp, identity)
    store.write_json(file, value)
    return value


def kl_scenario(model: LoadedModel, config: KL) -> Scenario:
    """How texts are drawn for a divergence. Raises ConfigError for more tokens than the model's context holds."""
    most = model.positions - 2
    if config.max_tokens > most:
        raise ConfigError(f"kl.max_tokens={config.max_tokens}: {model.path} reads {model.positions} tokens; use {most}")
    return Scenario(
        num_samples=config.num_samples,
        max_tokens=config.max_tokens,
        min_tokens=0,
        temperature=1.0,
        top_p=1.0,
        seed=config.seed,
        batch=config.batch,
        precision="fp32",
    )


def _draw(model: LoadedModel, config: KL) -> tuple[list[str], list[bool]]:
    """Texts at temperature 1 without truncation, and whether each ended before the limit."""
    samples = sample(model, kl_scenario(model, config), progress=False)
    return [s.text for s in samples], [s.finished for s in samples]


# Probabilities of whole texts


def _cut(model: LoadedModel, segmenter: Segmenter) -> Segmenter:
    """How a model reads a text: cut as in its training; else by `segmenter` if it has control tokens; else as a
    whole."""
    return model.segmenter or (segmenter if model.control_ids else Documents())


def _bad_segments(
    model: LoadedModel, texts: Sequence[str], segmenter: Segmenter, scorer: Scorer, threshold: float
) -> list[list[bool]]:
    """For each text, which of its segments get the bad token: those that score above `threshold` or cannot be
    judged."""
    cut = _cut(model, segmenter)
    judged = judge_documents(scorer, [cut.split(text) for text in texts])
    return [[not np.float32(s) <= np.float32(threshold) for s in found.scores] for found in judged]


def text_rows(
    model: LoadedModel,
    texts: Sequence[str],
    finished: Sequence[bool],
    segmenter: Segmenter,
    bad: Sequence[Sequence[bool]] | None = None,
) -> list[list[int]]:
    """Token ids of texts as `text_logp` reads them. Raises ConfigError for a text longer than the model's context."""
    eos = model.tokenizer.eos_token_id
    good_token = model.ids_of("good")
    bad_token = model.ids_of("bad")
    cut = _cut(model, segmenter)
    rows: list[list[int]] = []
    for n, (text, ends) in enumerate(zip(texts, finished, strict=True)):
        segments = cut.split(text)
        ids = [model.start_id]
        for number, segment in enumerate(encode_segments(model.tokenizer, segments)):
            ids += (bad_token if bad is not None and bad[n][number] else good_token) + segment
        rows.append(ids + good_token * (not segments) + [eos] * ends)
    longest = max(map(len, rows), default=0)
    if longest > model.positions + 1:
        raise ConfigError(f"a text of {longest} tokens is longer than the {model.positions} that {model.path} reads")
    return rows


@torch.inference_mode()
def text_logp(
    model: LoadedModel,
    texts: Sequence[str],
    finished: Sequence[bool],
    segmenter: Segmenter,
    batch: int = 64,
    bad: Sequence[Sequence[bool]] | None = None,
) -> np.ndarray:
    """Natural log-probability of each whole text, float64 [texts], as the head of this file defines it.

    A model of phf reads a text cut as its training texts were; another model with control tokens reads it cut by
    `segmenter`. `bad`: which segments of each text get the bad token; None: none of them. Raises ConfigError for a text
    longer than the model's context.
    """
    lm = model.lm
    eos = model.tokenizer.eos_token_id
    rows = text_rows(model, texts, finished, segmenter, bad)
    total = np.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    silent_T = torch.tensor(sorted(model.control_ids.values()), dtype=torch.long, device=lm.device)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        width = max(len(rows[i]) for i in part)
        if width < 2:
            continue
        ids_BT = torch.tensor([rows[i] + [eos] * (width - len(rows[i])) for i in part], device=lm.device)
        used_BT = torch.tensor([[t < len(rows[i]) for t in range(width)] for i in part], device=lm.device)[:, 1:]
        hidden_BTD = lm.base_model(input_ids=ids_BT[:, :-1], use_cache=False).last_hidden_state
        target_BT = ids_BT[:, 1:]
        counted_BT = used_BT & ~torch.isin(target_BT, silent_T)
        for b, i in enumerate(part):  # one text at a time: never [texts, tokens, vocabulary]
            logits_TV = model.only_text(model.logits(hidden_BTD[b]))
            logp_T = torch.log_softmax(logits_TV.double(), -1).gather(1, target_BT[b].unsqueeze(1)).squeeze(1)
            total[i] = float(logp_T[counted_BT[b]].sum())
    return total
