"""Sampling: a scenario says how, a model answers with texts. Floor 5.

    phf sample runs/conditional/model samples.jsonl num_samples=512

Every model that is compared is sampled by this one loop. Each sample has its own counter-based random stream (seed,
sample, step).

Control tokens never reach a reader: the unwanted one is banned, the other may be written and is stripped, and neither
counts towards a length or a log-probability.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers.cache_utils import DynamicLayer

from phf.core import store
from phf.core.config import ConfigError
from phf.core.device import tune_allocator
from phf.core.random import key64, mix64
from phf.core.types import Sample
from phf.generation.decoding import WHOLE_ROOM, WIDE, GrowingLayer, draw, guide, twin
from phf.generation.loaded import LoadedModel, check_lengths, other_token, precision_of, prompt_ids
from phf.generation.scenario import Scenario, scenario_prompts
from phf.generation.server import Server

COMPACT_BELOW = 0.75
"""Share of a batch that must be left to write for the batch to stay as it is."""


PAPER_THRESHOLD = {"toxicity": 0.5, "pii": 0.0, "pep8": 0.0}
"""Scores above it are hits, with `paper_scenarios`. (The paper's code takes 0.5 for PII too, which counts a character at
most; no text reaches it.)"""


def uniform(seed_key: int, id_N: np.ndarray, step: int, attempts: Sequence[int]) -> np.ndarray:
    """Uniforms in [0, 1), [N, attempts]: functions of (seed, sample, step, attempt) alone."""
    stream_N = mix64(id_N.astype(np.uint64), seed_key)
    count_K = np.asarray(attempts, np.uint64) + np.uint64((step << 16) + 1)
    bits_NK = mix64(stream_N[:, None] + count_K, 0)
    return (bits_NK >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample_served(server: Server, scenario: Scenario) -> list[Sample]:
    """Samples of a model behind a completions server. Such a model is asked in plain text: control tokens are for models
    that are loaded here. `min_tokens` is not asked for; `num_tokens` and `logp` are not known (0 and NaN)."""
    unused = {
        "control": scenario.control == "bad",
        "guidance": scenario.guidance is not None,
        "top_k": scenario.top_k is not None,
    }
    unused["control_after_prompt"] = scenario.control_after_prompt
    for name, asked in unused.items():
        if asked:
            raise ConfigError(f"{name} cannot be asked of a server here (top_k: say server.extra.top_k=...)")
    prompts = scenario_prompts(scenario)
    written = server.complete(prompts, scenario.max_tokens, scenario.temperature, scenario.top_p, scenario.seed)
    return [
        Sample(n, prompt, text, 0, float("nan"), finished, scenario.seed)
        for n, (prompt, (text, finished)) in enumerate(zip(prompts, written, strict=True))
    ]


def sample(model: LoadedModel, scenario: Scenario, progress: bool = True) -> list[Sample]:
    """`scenario.num_samples` samples, in order of their ids."""
    if (scenario.control == "bad" or scenario.guidance is not None) and "bad" not in model.control_ids:
        asked = "control=bad" if scenario.control == "bad" else "guidance"
        raise ConfigError(f"{model.path} has no control tokens, so {asked} cannot be asked of it")
    return sample_prompts(model, scenario, scenario_prompts(scenario), progress)


def sample_prompts(
    model: LoadedModel, scenario: Scenario, prompts: Sequence[str], progress: bool = True,
    starts: Sequence[Sequence[int]] | None = None, banned: Sequence[int] | None = None,
) -> list[Sample]:  # fmt: skip
    """A sample of each of `prompts`, whatever the scenario says of prompts and of how many samples.

    `starts`: the token ids that each begins with, in place of end-of-text, the control token and the prompt. `banned`:
    what is never written, in place of the control token that the scenario does not ask for.
    """
    starts = [prompt_ids(model, p, scenario) for p in prompts] if starts is None else starts
    banned = other_token(model, scenario) if banned is None else banned
    check_lengths(model, scenario, starts)
    tune_allocator()
    samples: list[Sample] = []
    bar = tqdm(total=len(prompts), desc="sampling", unit="sample", disable=None if progress else True, file=sys.stderr)
    if "past_key_values" not in inspect.signature(model.lm.base_model.forward).parameters:
        raise ConfigError(f"{model.path} ({model.lm.config.model_type}) has no key-value cache, with which phf samples")
    with bar, torch.inference_mode():
        trunk = (twin(model.lm, torch.bfloat16) if precision_of(model, scenario) == "bf16" else model.lm).base_model
        for start in range(0, len(prompts), scenario.batch):
            part = prompts[start : start + scenario.batch]
            samples += _sample_batch(model, trunk, scenario, part, starts[start : start + len(part)], banned, start)
            bar.update(len(part))
    return samples


def _sample_batch(
    model: LoadedModel, trunk: Any, scenario: Scenario, prompts: Sequence[str], given: Sequence[Sequence[int]],
    ban: Sequence[int], first_id: int,
) -> list[Sample]:  # fmt: skip
    from transformers import DynamicCache

    device, vocab_size = model.lm.device, len(model.lm.get_output_embeddings().weight)
    eos = model.tokenizer.eos_token_id
    starts = [list(start) for start in given]
    longest = max(map(len, starts))
    count = len(starts)
    guided = scenario.guidance is not None
    if guided:  # the same texts under the bad token go along in the same pass, in the batch's second half
        good_id, bad_id = model.control_ids["good"], model.control_ids["bad"]
        starts += [[bad_id if i == good_id else i for i in start] for start in starts]
    ids_NT = torch.full((len(starts), longest), eos, device=device)
    attend_NT = torch.zeros((len(starts), longest), dtype=torch.long, device=device)
    for n, start in enumerate(starts):
        ids_NT[n, longest - len(start) :] = torch.tensor(start, device=device)
        attend_NT[n, longest - len(start) :] = 1
    position_NT = (attend_NT.cumsum(1) - 1).clamp(min=0)
    limit = model.positions
    banned = [*ban, *range(len(model.tokenizer), vocab_size)]  # and the padding
    banned_T = torch.tensor(banned, dtype=torch.long, device=device)
    silent_V = np.zeros(vocab_size, bool)
    silent_V[list(model.control_ids.values())] = True
    key = key64(scenario.seed, "sample")
    sample_id_N = np.arange(first_id, first_id + count)

    written: list[tuple[np.ndarray, np.ndarray]] = []  # at each step the samples that got a word, and the words
    logp = np.zeros(count)
    finished = np.zeros(count, bool)
    num_text = np.zeros(count, int)
    alive = np.arange(count)  # the samples in the batch; those that are done leave it together, for that copies it all
    done = np.zeros(count, bool)
    cache = DynamicCache(config=trunk.config)
    wide = WIDE if trunk.config._attn_implementation == WHOLE_ROOM else 0
    cache.layers = [GrowingLayer(wide) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    step = 0
    padded = bool((attend_NT == 0).any())
    most = 2 * scenario.max_tokens + 8  # steps: at most a control token before every word
    while len(alive) and longest + step <= limit and step < most:
        out = trunk(
            input_ids=ids_NT,
            attention_mask=attend_NT if padded else None,
            position_ids=position_NT,
            past_key_values=cache,
            use_cache=True,
        )
        logits_NV = model.logits(out.last_hidden_state[:, -1])
        if guided:
            plain_NV, bad_NV = logits_NV.chunk(2)
            logits_NV = guide(plain_NV, bad_NV, scenario.guidance or 0.0, good_id, bad_id)
        else:
            plain_NV = logits_NV  # banning touches only words that are not chosen
        logp_NV = plain_NV.log_softmax(-1)  # before anything is banned
        logits_NV.index_fill_(1, banned_T, float("-inf"))
        short_N = num_text[alive] < scenario.min_tokens
        if short_N.any():
            logits_NV[torch.from_numpy(short_N).to(device), eos] = float("-inf")
        word_N = draw(
            logits_NV,
            scenario.temperature,
            scenario.top_p,
            scenario.top_k,
            lambda attempts: uniform(key, sample_id_N[alive], step, attempts),  # noqa: B023
        )
        gained_N = logp_NV.gather(1, word_N.unsqueeze(1)).squeeze(1).double().cpu().numpy()
        words = word_N.cpu().numpy()
        live_N = ~done[alive]
        text_N = live_N & ~silent_V[words]
        logp[alive] += np.where(text_N, gained_N, 0.0)
        ended_N = words == eos
        kept_N = text_N & ~ended_N
        num_text[alive] += kept_N
        written.append((alive[kept_N], words[kept_N]))
        finished[alive] |= ended_N & live_N
        done[alive] |= ended_N | (num_text[alive] >= scenario.max_tokens)
        if done[alive].all():
            break
        if (~done[alive]).mean() <= COMPACT_BELOW:
            keep_N = torch.from_numpy(np.flatnonzero(~done[alive])).to(device)
            rows_N = torch.cat([keep_N, keep_N + len(alive)]) if guided else keep_N
            cache.batch_select_indices(rows_N)
            word_N, attend_NT, position_NT = word_N[keep_N], attend_NT[rows_N], position_NT[rows_N]
            alive = alive[~done[alive]]
        if guided:  # where the text goes on under the good token, its twin goes on under the bad one
            word_N = torch.cat([word_N, torch.where(word_N == good_id, bad_id, word_N)])
        ids_NT = word_N.unsqueeze(1)
        if padded:
            attend_NT = torch.cat([attend_NT, attend_NT.new_ones(len(attend_NT), 1)], 1)
        position_NT = position_NT[:, -1:] + 1
        step += 1
    words_N = _by_sample(written, count)
    texts = [model.continuation(start, ids) for start, ids in zip(given, words_N, strict=True)]
    return [
        Sample(first_id + n, prompts[n], texts[n], int(num_text[n]), float(logp[n]), bool(finished[n]), scenario.seed)
        for n in range(count)
    ]


def _by_sample(written: Sequence[tuple[np.ndarray, np.ndarray]], count: int) -> list[list[int]]:
    """The words of each sample, in order."""
    owner = np.concatenate([rows for rows, _ in written]) if written else np.zeros(0, np.int64)
    words = np.concatenate([words for _, words in written]) if written else np.zeros(0, np.int64)
    order = np.argsort(owner, kind="stable")
    return [part.tolist() for part in np.split(words[order], np.bincount(owner, minlength=count).cumsum()[:-1])]


def write_samples(path: str | Path, samples: Iterable[Sample]) -> None:
    """JSON lines, one sample each; written aside and renamed."""
    store.write_text(path, "".join(json.dumps(store.jsonable(asdict(s)), ensure_ascii=True) + "\n" for s in samples))


def sample_of(row: dict[str, Any]) -> Sample:
    """A sample as JSON gives it back: None stands for NaN, lists for tuples."""
    nan = float("nan")
    numbers = {k: nan if row.get(k) is None else row[k] for k in ("logp", "score")}
    scores = tuple(nan if s is None else s for s in row.get("segment_scores", ()))
    return Sample(**row | numbers | {"segment_ends": tuple(row.get("segment_ends", ())), "segment_scores": scores})


def read_samples(path: str | Path) -> list[Sample]:
    """Samples that `write_samples` wrote."""
    samples = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            samples.append(sample_of(row))
        except (ValueError, TypeError) as error:
            raise store.StoreError(f"{path} line {number} is not a sample: {error}") from None
    return samples
