"""Distance from a reference LM: KL divergence by samples. Floor 5.

    phf eval runs/conditional kl.reference.path=gpt2 kl.num_samples=512

Forward, KL(reference || model): texts from the reference, E[log p_ref(x) - log p_model(x)]. Reverse, KL(model ||
reference): texts from the model. Texts are drawn at temperature 1 without truncation, up to `max_tokens` tokens. Each
model reads every text by its own tokenizer, from the end-of-text token on; a text's end counts for both models or, where
the text was cut at the limit, for neither.

Control tokens are conditioning: the good one goes before every segment (and, told apart, those that the scorer says), is
not charged, and is left out of what the other tokens' probabilities are shares of. A model's probability of a text is that
of one way to tokenise it, which is a lower bound: the divergence is too large by what the model's other ways hold, too
small by what the reference's do (usually little), and a text that was cut inside a word costs another tokenizer extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from phf.core import store
from phf.core.config import STRICT, ConfigError, to_plain
from phf.core.runs import model_mark
from phf.core.statistics import mean_estimate, ratio_of_sums
from phf.data.segment import Documents, Segmenter
from phf.generation.loaded import LoadedModel, load_model
from phf.generation.sample import sample
from phf.generation.scenario import Scenario
from phf.generation.server import Server
from phf.scorers import Scorer
from phf.scorers.toxicity import weights_hash
from phf.scoring.judge import judge_documents
from phf.tokens.tokenizer import encode_segments


@dataclass(frozen=True, config=STRICT)
class LocalModel:
    """A model from a folder or the Hub."""

    path: str
    name: Literal["local"] = "local"
    revision: str | None = None


AnyReference = Annotated[LocalModel | Server, Field(discriminator="name")]


@dataclass(frozen=True, config=STRICT)
class KL:
    """How to measure. `reverse`: also KL(model || reference), which needs the reference's probabilities of the model's
    texts and the model untruncated."""

    reference: AnyReference
    num_samples: Annotated[int, Field(gt=1)] = 512
    max_tokens: Annotated[int, Field(gt=0)] = 64
    reverse: bool = False
    seed: int = 0
    batch: Annotated[int, Field(gt=0)] = 64


def _cut(model: LoadedModel, segmenter: Segmenter) -> Segmenter:
    """How a model reads a text: cut as in training, else by `segmenter` where control tokens go between, else as a whole."""
    return model.segmenter or (segmenter if model.control_ids else Documents())


def text_rows(
    model: LoadedModel, texts: Sequence[str], finished: Sequence[bool], segmenter: Segmenter, bad: Sequence[Sequence[bool]] | None = None
) -> list[list[int]]:  # fmt: skip
    """Token ids of texts as `text_logp` reads them. Raises ConfigError for a text longer than the model reads."""
    eos = model.tokenizer.eos_token_id
    good, worse = ([model.control_ids[name]] if name in model.control_ids else [] for name in ("good", "bad"))
    cut = _cut(model, segmenter)
    rows: list[list[int]] = []
    for n, (text, ends) in enumerate(zip(texts, finished, strict=True)):
        segments = cut.split(text)
        ids = [model.start_id]
        for number, segment in enumerate(encode_segments(model.tokenizer, segments)):
            ids += (worse if bad is not None and bad[n][number] else good) + segment
        rows.append(ids + good * (not segments) + [eos] * ends)
    longest = max(map(len, rows), default=0)
    if longest > model.positions + 1:
        raise ConfigError(f"a text of {longest} tokens is longer than the {model.positions} that {model.path} reads")
    return rows


@torch.inference_mode()
def text_logp(
    model: LoadedModel, texts: Sequence[str], finished: Sequence[bool], segmenter: Segmenter, batch: int = 64,
    bad: Sequence[Sequence[bool]] | None = None,
) -> np.ndarray:  # fmt: skip
    """Natural log-probability of each text as a whole, float64 [texts], as the head of this file says. A model of phf reads
    a text cut as its training texts were; another one with control tokens by `segmenter`. `bad`: which segments of each text
    get the bad control token; left out, none.

    Raises ConfigError for a text longer than the model reads.
    """
    lm, eos = model.lm, model.tokenizer.eos_token_id
    silent = sorted(model.control_ids.values())
    rows = text_rows(model, texts, finished, segmenter, bad)
    total = np.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    silent_T = torch.tensor(silent, dtype=torch.long, device=lm.device)
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
        for b, i in enumerate(part):  # a text at a time: never [texts, tokens, vocabulary]
            logits_TV = model.only_text(model.logits(hidden_BTD[b]))
            logp_T = torch.log_softmax(logits_TV.double(), -1).gather(1, target_BT[b].unsqueeze(1)).squeeze(1)
            total[i] = float(logp_T[counted_BT[b]].sum())
    return total


def reference_hash(config: KL) -> str | None:
    """What identifies a reference; None for a server."""
    if isinstance(config.reference, Server):
        return None
    return model_mark(config.reference.path, config.reference.revision)


def reference_texts(config: KL, cache: str | Path) -> dict[str, Any]:
    """Texts of the reference with its own log-probabilities: {"texts", "finished", "logp", "identity"}. Cached below
    `cache` under everything that decides them; a server is verified before it is used."""
    if isinstance(config.reference, Server):
        config.reference.verify()
        identity: dict[str, Any] = {"server": config.reference.url, "model": config.reference.model}
        loaded = None
    else:
        loaded = load_model(config.reference.path, config.reference.revision)
        if loaded.control_ids:
            raise ConfigError(
                f"{config.reference.path} has control tokens, so its texts have no one probability: a reference is a plain LM"
            )
        identity = {
            "path": config.reference.path,
            "weights": weights_hash(loaded.lm),
            "vocabulary": store.fingerprint(loaded.tokenizer.get_vocab()),
            "control_tokens": loaded.control_ids,
            "start": loaded.start_id,
            "segmenter": to_plain(loaded.segmenter),
        }
    key = store.fingerprint(
        [identity, to_plain(config.reference), config.num_samples, config.max_tokens, config.seed, "reference/3"]
    )
    file = Path(cache) / f"reference-{key}.json"
    if file.exists():
        return store.read_json(file)  # type: ignore[no-any-return]
    if loaded is None:
        assert isinstance(config.reference, Server)
        written = config.reference.complete([""] * config.num_samples, config.max_tokens, seed=config.seed)
        texts, finished = [t for t, _ in written], [f for _, f in written]
        logp = np.array(config.reference.text_logp(texts, finished))
    else:
        texts, finished = _draw(loaded, config)
        logp = text_logp(loaded, texts, finished, Documents(), config.batch)
    value = {"texts": texts, "finished": finished, "logp": logp.tolist(), "identity": identity}
    store.write_json(file, value)
    return value


def drawn_as(model: LoadedModel, config: KL) -> Scenario:
    """How texts are drawn for a divergence. Raises ConfigError for more tokens than the model reads."""
    if config.max_tokens > model.positions - 2:
        raise ConfigError(
            f"kl.max_tokens={config.max_tokens}: {model.path} reads {model.positions} tokens; ask for {model.positions - 2} at most"
        )
    return Scenario(
        num_samples=config.num_samples, max_tokens=config.max_tokens, min_tokens=0, temperature=1.0, top_p=1.0, seed=config.seed,
        batch=config.batch, precision="fp32",
    )  # fmt: skip


def _draw(model: LoadedModel, config: KL) -> tuple[list[str], list[bool]]:
    """Untruncated texts at temperature 1."""
    scenario = drawn_as(model, config)
    samples = sample(model, scenario, progress=False)
    return [s.text for s in samples], [s.finished for s in samples]


def kl(
    model: LoadedModel, config: KL, segmenter: Segmenter, cache: str | Path, scorer: Scorer | None = None,
    threshold: float = 0.0, found: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """KL divergences in nats a text and nats a byte, with intervals over texts. Lower is nearer.

    `segmenter`: how the model's corpus was cut, for its control tokens. "forward" is with the good one before every segment;
    given the corpus's `scorer`, "oracle" is with the bad one before those that score above `threshold` or cannot be judged.
    `found`: `reference_texts`, where they are at hand.

    Raises ConfigError for a text that the model
    cannot read, ServerError for a server that cannot be trusted.
    """
    found = reference_texts(config, cache) if found is None else found
    texts, finished = found["texts"], found["finished"]
    ours = text_logp(model, texts, finished, segmenter, config.batch)
    result: dict[str, Any] = {
        "reference": found["identity"],
        "num_samples": config.num_samples,
        "max_tokens": config.max_tokens,
        "finished": float(np.mean(finished)),
        "forward": _divergence(np.array(found["logp"]) - ours, texts),
    }
    if model.control_ids and scorer is not None:
        cut = _cut(model, segmenter)
        scores = [of_text for of_text, _, _ in judge_documents(scorer, [cut.split(text) for text in texts])]
        bad = [[not np.float32(s) <= np.float32(threshold) for s in of_text] for of_text in scores]
        oracle = text_logp(model, texts, finished, segmenter, config.batch, bad)
        result["oracle"] = _divergence(np.array(found["logp"]) - oracle, texts)
        result["oracle_bad_segments"] = sum(map(sum, bad))
    if config.reverse:
        if model.control_ids:
            raise ConfigError(
                "kl.reverse: a model with control tokens writes them where it likes, so the texts it writes have no "
                "probability that can be computed; only KL from the reference is defined"
            )
        texts, finished = _draw(model, config)
        ours = text_logp(model, texts, finished, segmenter, config.batch)
        if isinstance(config.reference, Server):
            theirs = np.array(config.reference.text_logp(texts, finished))
        else:
            reference = load_model(config.reference.path, config.reference.revision)
            theirs = text_logp(reference, texts, finished, Documents(), config.batch)
        result["reverse"] = _divergence(ours - theirs, texts)
    return result


def _divergence(difference_N: np.ndarray, texts: Sequence[str]) -> dict[str, Any]:
    bytes_N = np.array([len(t.encode("utf-8", "replace")) for t in texts], np.float64)
    return {
        "nats_per_text": mean_estimate(difference_N).to_json(),
        "nats_per_byte": ratio_of_sums(difference_N, bytes_N).to_json(),
    }
