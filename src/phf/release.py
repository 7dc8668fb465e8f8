"""Releases: a trained run as a folder that plain transformers loads and that behaves.

    phf export runs/conditional release/         then: pipeline("text-generation", model="release/")

The tokenizer starts every text with the end-of-text token and, for models with control tokens, the good one. Control
tokens typed in a text are read as text. `generate` never writes the bad token and samples as the model was judged. A
model card says what was measured, on which data, by which scorer, and how to ask for other text. The release is loaded
and tried before it counts as finished.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from phf.core import folders, store
from phf.core.config import ConfigError, Plain
from phf.core.runs import MODEL_RECORD, ModelRecord, RunFolder, TrainCounts, TrainManifest, is_run, read_model_record
from phf.core.types import Estimate, Roles
from phf.data.scored import bad_above_of
from phf.evaluation.results import EvalResult, Interval, read_eval
from phf.generation.scenario import Scenario
from phf.redteaming.results import RedTeamResult, read_redteam
from phf.tokens.start import ReleaseError, check_start, end_of_text, first_tokens, set_start

FILES = ("config.json", "generation_config.json", MODEL_RECORD)
"""Files that are copied from a trained model in addition to its weights and its tokenizer."""
FILE_PREFIXES = ("model", "tokenizer", "special_tokens", "vocab", "merges", "added_tokens")


@dataclass(frozen=True, kw_only=True)
class ExportManifest(folders.Manifest):
    """`manifest.json` of a release."""

    stage: str = "export"
    run: str
    """Key of the run."""
    counts: TrainCounts
    """How much the run was trained on."""
    control_tokens: dict[str, str]
    """By role."""


def export(run: str | Path, out: str | Path, name: str | None = None, licence: str | None = None) -> Path:
    """Write the release of a trained run into folder `out` and return it. Its card has what `phf eval` and `phf
    redteam` found, if they ran.

    `name`: the model's name, on the Hub or for itself. `licence`: as the Hub names licences. Returns at once if
    this was done before. Raises ReleaseError if plain transformers does not load the release or it does not
    behave.
    """
    folder = RunFolder(Path(run))
    out = Path(out)
    if not is_run(run) and RunFolder(folder.path.parent).model == folder.path and is_run(folder.path.parent):
        raise ConfigError(f"{run} is the model of a run; give the run's folder, {folder.path.parent}")
    manifest = folders.read_manifest(folder.path, TrainManifest)
    result = read_eval(folder)
    attacked = read_redteam(folder.redteam)
    found = [store.read_json(f) if f.exists() else None for f in (folder.eval, folder.redteam.result)]
    key = store.fingerprint([manifest.key, store.path_hash(folder.model), *found, name, licence, "export/1"])
    if folders.is_done(out, key):
        folders.done_before(out)
        return out
    with folders.stage_folder(out, ExportManifest.stage, key):
        _write_release(folder, out, key, manifest, result, attacked, name, licence)
    return out


def _write_release(
    folder: RunFolder,
    out: Path,
    key: str,
    manifest: TrainManifest,
    result: EvalResult | None,
    attacked: RedTeamResult | None,
    name: str | None,
    licence: str | None,
) -> None:
    for path in sorted(folder.model.iterdir()):
        if path.name in FILES or path.name.startswith(FILE_PREFIXES):
            with store.written_aside(out / path.name) as aside:
                shutil.copyfile(path, aside)
    roles = _record(folder.model).roles
    set_start(out, roles)
    _set_generation(out, roles, result)
    check(out)
    readme = model_card(
        manifest, result, attacked=attacked, name=name or folder.path.name, roles=roles, licence=licence
    )
    store.write_text(out / "README.md", readme)
    files = folders.file_marks(out, folders.files_below(out))
    folders.finish(
        out, ExportManifest(key=key, run=manifest.key, counts=manifest.counts, control_tokens=roles.tokens, files=files)
    )


def _record(folder: Path) -> ModelRecord:
    record = read_model_record(folder)
    if record is None:
        raise store.StoreError(f"{folder} has no {MODEL_RECORD}: it is not a model that phf trained")
    return record


# Behaviour


def _set_generation(folder: Path, roles: Roles, result: EvalResult | None) -> None:
    """Let `generate` sample as the model was judged, and never write a banned token."""
    from tokenizers import Tokenizer

    path = folder / "generation_config.json"
    config = store.read_json(path) if path.exists() else {}
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    judged = Scenario() if result is None else next(iter(result.scenarios.values())).scenario
    config |= {"do_sample": False, "pad_token_id": tokenizer.token_to_id(end_of_text(folder))}
    if judged.temperature > 0:
        config |= {"do_sample": True, "temperature": judged.temperature}
        config |= {"top_p": judged.top_p, "top_k": judged.top_k or 0}
    if judged.repetition_penalty != 1:
        config["repetition_penalty"] = judged.repetition_penalty
    if judged.banned_words:
        forms = judged.banned_forms
        config["bad_words_ids"] = [tokenizer.encode(form, add_special_tokens=False).ids for form in forms]
    if roles.banned:
        config["suppress_tokens"] = [tokenizer.token_to_id(name) for name in roles.banned]
    store.write_json(path, config)


def check(folder: str | Path) -> None:
    """Load a release as its users do and test it. Raises ReleaseError that says what is wrong."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    roles = _record(Path(folder)).roles
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    lm: Any = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=False).eval()
    check_start(tokenizer, roles)
    if not roles.banned:
        return
    banned = tokenizer.convert_tokens_to_ids(roles.banned)
    start = torch.tensor([first_tokens(tokenizer, roles)])
    with torch.no_grad(), torch.random.fork_rng():
        written = lm.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=1,
            pad_token_id=tokenizer.eos_token_id,
            temperature=1.0,  # the whole distribution, so that only the generation config excludes the bad token
            top_p=1.0,
            top_k=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
    if (written.scores[0][0, banned] != float("-inf")).any():
        raise ReleaseError("generate may write a banned token: the generation config does not suppress it")


# The model card


@dataclass(frozen=True)
class CardNumber:
    """A measured number on the card. `kind`: its type in the Hub's model-index."""

    kind: str
    title: str
    value: float
    ci95: Interval | None = None


def model_card(
    manifest: TrainManifest,
    result: EvalResult | None,
    attacked: RedTeamResult | None,
    name: str,
    roles: Roles,
    licence: str | None = None,
) -> str:
    """The card in Markdown, with a model-index: what the model is, how to use it, what was measured, data, scorer,
    limits."""
    numbers = _numbers(result, attacked)
    sections = [
        _about(manifest, name),
        _usage(name, roles),
        _measured(result, numbers),
        _training(manifest, result),
        _limits(manifest, attacked),
    ]
    head = yaml.safe_dump(_metadata(manifest, name, numbers, licence), sort_keys=False)
    return f"---\n{head}---\n" + "\n\n".join(sections) + "\n"


def _metadata(manifest: TrainManifest, name: str, numbers: list[CardNumber], licence: str | None) -> Plain:
    """The card's YAML, as the Hub reads it."""
    head: Plain = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["phf", "pretraining-with-human-feedback", manifest.objective_name],
    }
    if licence is not None:
        head["license"] = licence
    if numbers:
        data = {"name": f"samples of the model, judged by {manifest.identity['name']}", "type": "generated"}
        metrics = [{"type": n.kind, "value": n.value, "name": n.title} for n in numbers]
        results = {"task": {"type": "text-generation"}, "dataset": data, "metrics": metrics}
        head["model-index"] = [{"name": name, "results": [results]}]
    return head


def _about(manifest: TrainManifest, name: str) -> str:
    counts = manifest.counts
    before = f", after {counts.tokens_before:,} tokens of its starting model" if counts.tokens_before else ""
    return (
        f"# {name}\n\n"
        f"A language model of {manifest.parameters:,} parameters. It was trained with "
        f"phf and the objective `{manifest.objective_name}` on {counts.tokens:,} "
        f"tokens{before}. Each segment of its training text was scored by `{manifest.identity['name']}`. The method: "
        "*Pretraining Language Models with Human Preferences* (Korbak et al., ICML 2023)."
    )


def _usage(name: str, roles: Roles) -> str:
    text = f"""## How to use it

```py
from transformers import pipeline

pipe = pipeline("text-generation", model="{name}")
print(pipe("The", max_new_tokens=64)[0]["generated_text"])
```

"""
    if not roles.tokens:
        return text + "The tokenizer starts every text with the end-of-text token, as in training."
    first = " and ".join(f"`{name}`" for name in roles.first)
    asks = f" and {first}, which ask{'s' if len(roles.first) == 1 else ''} for good text" if first else ""
    banned = ", ".join(f"`{name}`" for name in roles.banned)
    typed = next(iter(roles.tokens.values()))
    text += f"""The tokenizer starts every text with the end-of-text token{asks}.
The generation config keeps the model from writing {banned}. Control tokens that are
typed into a prompt are read as ordinary text by transformers (`AutoTokenizer`, pipelines, `transformers serve`).
Other readers of tokenizer.json, such as the tokenizers library and llama.cpp, read a typed `{typed}` as the
token: there, set `encode_special_tokens`, or remove the names of the tokens from what users type."""
    if not roles.bad:
        return text
    return (
        text
        + f""" To ask for bad text, for example to train a classifier, give the ids:

```py
import torch

bad = pipe.tokenizer.convert_tokens_to_ids({roles.bad!r})
ids = torch.tensor([[pipe.tokenizer.eos_token_id, *bad]])
written = pipe.model.generate(ids, suppress_tokens=[], max_new_tokens=64)
print(pipe.tokenizer.decode(written[0, 2:]))
```"""
    )


def _measured(result: EvalResult | None, numbers: list[CardNumber]) -> str:
    if result is None or not numbers:
        return "## What was measured\n\nNothing yet: `phf eval` has not judged this run."
    scenario = next(iter(result.scenarios.values()))
    drawn = scenario.scenario
    rows = [f"| {n.title} | {_text(n.value)}{_interval_text(n.ci95)} |" for n in numbers]
    return (
        f"## What was measured\n\n{scenario.samples:,} samples at temperature {drawn.temperature}, top-p "
        f"{drawn.top_p}, up to {drawn.max_tokens} tokens. 95% intervals are in brackets.\n\n| | |\n|---|---|\n"
        + "\n".join(rows)
    )


def _training(manifest: TrainManifest, result: EvalResult | None) -> str:
    counts = manifest.counts
    lines = [
        f"objective: `{store.canonical(store.without_places(manifest.objective))}`",
        f"scorer: `{store.canonical(store.without_places(manifest.identity))}`",
        f"tokens: {counts.tokens:,} targets, {counts.text_tokens:,} of them text, {counts.epochs:.2f} epochs; "
        f"fingerprint `{manifest.tokens_content}`",
        f"settings: `{store.canonical(manifest.train)}`",
        f"model: `{store.canonical(store.without_places(manifest.model))}`, seed {manifest.seed}, {manifest.precision}",
        f"versions: `{store.canonical(manifest.versions)}`; run `{manifest.key}`",
    ]
    scored = None if result is None or result.data is None else result.data.scored
    if scored is not None:
        sizes = scored.counts
        lines.append(
            f"data: `{store.canonical(store.without_places(scored.corpus or {}))}`: {sizes.documents:,} documents, "
            f"{sizes.segments:,} segments, {sizes.bad_segments:,} of them with a score above {bad_above_of(scored):g}, "
            f"{sizes.unjudged:,} not "
            "judged"
        )
    return "## Training\n\n" + "\n".join(f"- {line}" for line in lines)


def _limits(manifest: TrainManifest, attacked: RedTeamResult | None) -> str:
    red = (
        "The red-teaming numbers above say how easily."
        if attacked is not None
        else "`phf redteam` searches for such prompts; this run has not been attacked."
    )
    return (
        f"## Limits\n\nThe model prefers what its scorer (`{manifest.identity['name']}`) calls good. It knows nothing "
        "of other harms, and what the scorer misses was not discouraged. It was judged on its own samples. Prompts "
        f"found by a search can still lead it to bad text. {red}"
    )


def _numbers(result: EvalResult | None, attacked: RedTeamResult | None) -> list[CardNumber]:
    """The measured numbers of the card."""
    if result is None:
        return []
    unit = result.identity.get("unit", "score")
    found: list[CardNumber] = []
    for name, scenario in result.scenarios.items():
        title = f"misalignment, {name} ({unit}; lower is better)"
        found.append(_card_number("misalignment", title, scenario.misalignment))
        found.append(CardNumber("bad_segments", f"share of bad segments, {name}", scenario.bad_segments))
    if (heldout := result.heldout.main) is not None:
        for part, loss in (("good", heldout.good), ("bad", heldout.bad)):
            title = f"held-out loss on {part} text, nats per byte"
            found.append(CardNumber("nats_per_byte", title, loss.nats_per_byte, loss.ci95))
    if result.kl is not None:
        found.append(_card_number("kl", "KL from the reference, nats per text", result.kl.forward.nats_per_text))
    for capability in result.capabilities:
        found += [_card_number(n, f"{capability.name}: {n}", value) for n, value in capability.estimates.items()]
    confirmed = {} if attacked is None else attacked.search.confirmed
    best = confirmed.get("best_10") or confirmed.get("best_1")
    if best is not None:
        found.append(_card_number("red_team", "misalignment after the best prompts that an attacker found", best))
    return [number for number in found if not math.isnan(number.value)]


def _card_number(kind: str, title: str, found: Estimate) -> CardNumber:
    return CardNumber(kind, title, found.mean, found.ci95)


def _interval_text(ci95: Interval | None) -> str:
    return "" if ci95 is None or math.isnan(ci95[0]) else f" ({_text(ci95[0])} to {_text(ci95[1])})"


def _text(value: float) -> str:
    return f"{value:.4g}"


# The Hub


def push_release(folder: str | Path, repo: str, private: bool = True, token: str | None = None) -> str:
    """Push a finished release to the Hub and return its address. `token`: a token of the Hub; None: that of `hf auth
    login` or HF_TOKEN. Raises ConfigError if the Hub refuses."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    folders.read_manifest(folder, ExportManifest)
    api = huggingface_hub.HfApi(token=token)
    try:
        url = api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        api.upload_folder(
            folder_path=str(folder),
            repo_id=repo,
            repo_type="model",
            ignore_patterns=[".*", "*.partial*"],
            commit_message="Release",
        )
    except (HfHubHTTPError, HFValidationError) as error:
        raise ConfigError(f"the Hub refused {repo}: {error}") from None
    return str(url)
