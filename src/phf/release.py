"""Releases: a run as a folder that plain transformers loads and that behaves. Floor 5.

    phf export runs/conditional release/         then: pipeline("text-generation", model="release/")

The tokenizer begins every text with the end-of-text token and, for models with control tokens, the good one; a control
token that somebody types is read as text; `generate` never writes the bad one and samples as the model was judged. A
model card says what was measured, on what data, by which scorer, and how to ask for something else. What is written is
loaded again and tried before it counts as finished.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from phf.core import store
from phf.core.config import ConfigError
from phf.core.runs import MODEL_CARD

FILES = ("config.json", "generation_config.json", MODEL_CARD)
"""What is taken from a trained model beside its weights and its tokenizer."""


class ReleaseError(RuntimeError):
    """A release that does not behave as it should."""


def export(run: str | Path, out: str | Path, name: str | None = None, licence: str | None = None) -> Path:
    """Write the release of a trained run into folder `out` and return it. With what `phf eval` found, if it was judged.

    `name`: the model's on the Hub or its own; `licence`: as the Hub names them. Raises ReleaseError if plain transformers
    does not load what was written, or it does not behave.
    """
    run, out = Path(run), Path(out)
    manifest = store.read_manifest(run, "train")
    model = run / "model"
    judged = store.read_json(run / "eval.json") if (run / "eval.json").exists() else None
    red = run / "redteam" / "redteam.json"
    attacked = store.read_json(red) if red.exists() else None
    key = store.fingerprint([manifest["key"], store.path_hash(model), judged, attacked, name, licence, "export/1"])
    if store.is_done(out, key):
        return out
    store.begin(out, "export", key)
    for path in sorted(model.iterdir()):
        if path.name in FILES or path.name.startswith(
            ("model", "tokenizer", "special_tokens", "vocab", "merges", "added_tokens")
        ):
            with store.written_aside(out / path.name) as aside:
                shutil.copyfile(path, aside)
    roles = store.read_json(model / MODEL_CARD)["control_tokens"]
    _begin_with(out, roles)
    _generation(out, roles, judged)
    check(out)
    store.write_text(out / "README.md", model_card(manifest, judged, attacked, name or run.name, roles, licence))
    store.finish(out, "export", key, run=manifest["key"], counts=manifest["counts"], control_tokens=roles)
    return out


def _begin_with(folder: Path, roles: Mapping[str, str]) -> None:
    """Let the tokenizer put end-of-text and the good token before every text, behind whatever it does already."""
    from tokenizers import Tokenizer, processors

    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    config = store.read_json(folder / "tokenizer_config.json")
    eos = _eos(folder)
    first = [eos, *([roles["good"]] if "good" in roles else [])]
    pieces = [
        f"first{n}" for n in range(len(first))
    ]  # stand for the tokens, whose names may hold what a template reads
    known = [{"id": p, "ids": [tokenizer.token_to_id(t)], "tokens": [t]} for p, t in zip(pieces, first, strict=True)]
    template = processors.TemplateProcessing(single=[*pieces, "$A"], pair=[*pieces, "$A", "$B"], special_tokens=known)
    before = tokenizer.post_processor
    keep = before is not None and type(before).__name__ == "ByteLevel"
    tokenizer.post_processor = processors.Sequence([before, template]) if keep else template
    store.write_text(path, tokenizer.to_str(pretty=True))
    positions = store.read_json(folder / "config.json").get("max_position_embeddings")
    changes: dict[str, Any] = {"split_special_tokens": True, "add_bos_token": None, "add_eos_token": None}
    changes |= {"pad_token": eos, "padding_side": "left"}  # for pipelines that go by batches
    changes |= {} if positions is None else {"model_max_length": positions}
    config = {k: v for k, v in (config | changes).items() if v is not None}
    store.write_json(folder / "tokenizer_config.json", config)


def _eos(folder: Path) -> str:
    eos = store.read_json(folder / "tokenizer_config.json")["eos_token"]
    return str(eos["content"] if isinstance(eos, dict) else eos)


def _generation(folder: Path, roles: Mapping[str, str], judged: Mapping[str, Any] | None) -> None:
    """Sampling as the model was judged; the bad token is never written."""
    from tokenizers import Tokenizer

    path = folder / "generation_config.json"
    config = store.read_json(path) if path.exists() else {}
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings = next(iter(judged["scenarios"].values()))["scenario"] if judged else {}
    config |= {
        "do_sample": True,
        "temperature": settings.get("temperature", 0.7),
        "top_p": settings.get("top_p", 0.9),
        "top_k": settings.get("top_k") or 0,
        "pad_token_id": tokenizer.token_to_id(_eos(folder)),
    }
    if "bad" in roles:
        config["suppress_tokens"] = [tokenizer.token_to_id(roles["bad"])]
    store.write_json(path, config)


def check(folder: str | Path) -> None:
    """Load a release as anybody would and try it. Raises ReleaseError saying what is wrong."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    folder = Path(folder)
    roles = store.read_json(folder / MODEL_CARD)["control_tokens"]
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    lm: Any = AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    first = [tokenizer.eos_token_id, *([tokenizer.convert_tokens_to_ids(roles["good"])] if roles else [])]
    text = "A text " + " ".join(roles.values())
    ids = tokenizer(text)["input_ids"]
    if ids[: len(first)] != first:
        raise ReleaseError(f"the tokenizer begins a text with {ids[: len(first)]}, not with {first}")
    control = {tokenizer.convert_tokens_to_ids(name) for name in roles.values()}
    if control & set(ids[len(first) :]):
        raise ReleaseError(f"the tokenizer reads a typed control token as the token: {text!r}")
    if tokenizer.decode(ids, skip_special_tokens=True) != text:
        raise ReleaseError(
            f"the tokenizer does not give back {text!r} but {tokenizer.decode(ids, skip_special_tokens=True)!r}"
        )
    if not roles:
        return
    bad = tokenizer.convert_tokens_to_ids(roles["bad"])
    start = torch.tensor([first])
    whole = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}  # so that nothing else leaves it out
    with torch.no_grad(), torch.random.fork_rng():
        written = lm.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=1, pad_token_id=tokenizer.eos_token_id, **whole,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    if written.scores[0][0, bad] != float("-inf"):
        raise ReleaseError("generate may write the bad token: the generation config does not suppress it")


def model_card(
    manifest: Mapping[str, Any], judged: Mapping[str, Any] | None, attacked: Mapping[str, Any] | None, name: str,
    roles: Mapping[str, str], licence: str | None = None,
) -> str:  # fmt: skip
    """The card: what it is, how to use it, what was measured, its data, scorer and limits; with a model-index."""
    objective, counts = manifest["objective"], manifest["counts"]
    identity = manifest["identity"]
    rows = _measured(judged, attacked)
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["phf", "pretraining-with-human-feedback", str(objective.get("name"))],
    }
    if licence is not None:
        head["license"] = licence
    if rows:
        metrics = [{"type": kind, "value": value, "name": title} for kind, title, value, _ in rows]
        data = {"name": f"samples of the model, judged by {identity['name']}", "type": "generated"}
        head["model-index"] = [
            {"name": name, "results": [{"task": {"type": "text-generation"}, "dataset": data, "metrics": metrics}]}
        ]
    lines = [
        f"# {name}",
        "",
        f"A language model of {manifest['parameters']:,} parameters, trained with [phf](https://pypi.org/project/phf/) by the objective "
        f"`{objective.get('name')}` on {counts['tokens']:,} tokens"
        + (f" (behind {counts['tokens_before']:,} of its starting model)" if counts.get("tokens_before") else "")
        + f", each segment of its training text scored by `{identity['name']}`: *Pretraining Language Models with Human Preferences* "
        "(Korbak et al., ICML 2023).",
        "",
        "## How to use it",
        "",
        "```py",
        "from transformers import pipeline",
        "",
        f'pipe = pipeline("text-generation", model="{name}")',
        'print(pipe("The", max_new_tokens=64)[0]["generated_text"])',
        "```",
        "",
    ]
    if roles:
        lines += [
            f"The tokenizer begins every text with the end-of-text token and `{roles['good']}`, the token of good text, and the "
            f"generation config never lets the model write `{roles['bad']}`, the token of bad text. Control tokens that are typed "
            "into a prompt are read as ordinary text. To ask for something else, give the ids yourself:",
            "",
            "```py",
            "import torch",
            "",
            'bad = pipe.tokenizer.convert_tokens_to_ids("' + roles["bad"] + '")',
            "ids = torch.tensor([[pipe.tokenizer.eos_token_id, bad]])",
            "written = pipe.model.generate(ids, suppress_tokens=[], max_new_tokens=64)  # bad text, on purpose: for classifiers and red teams",
            "print(pipe.tokenizer.decode(written[0, 2:]))",
            "```",
            "",
        ]
    else:
        lines += ["The tokenizer begins every text with the end-of-text token, as in training.", ""]
    if rows:
        scenario = next(iter((judged or {})["scenarios"].values()))
        lines += [
            "## What was measured",
            "",
            f"{scenario['samples']:,} samples at temperature {scenario['scenario']['temperature']}, top-p {scenario['scenario']['top_p']}, up to "
            f"{scenario['scenario']['max_tokens']} tokens; in brackets 95% intervals.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {title} | {_number(value)}{'' if ci is None else f' ({_number(ci[0])} to {_number(ci[1])})'} |" for _, title, value, ci in rows),
            "",
        ]  # fmt: skip
    else:
        lines += ["## What was measured", "", "Nothing yet: `phf eval` has not judged this run.", ""]
    lines += [
        "## Training",
        "",
        f"- objective: `{store.canonical(objective)}`",
        f"- scorer: `{store.canonical(identity)}`",
        f"- tokens: {counts['tokens']:,} targets, {counts['text_tokens']:,} of them text, {counts['epochs']:.2f} epochs; fingerprint `{manifest['tokens_content']}`",
        f"- settings: `{store.canonical(manifest['train'])}`",
        f"- model: `{store.canonical(_without_places(manifest['model']))}`, seed {manifest['seed']}, {manifest['precision']}",
        f"- versions: `{store.canonical(manifest['versions'])}`; run `{manifest['key']}`",
        *_data_lines(judged),
        "",
        "## Limits",
        "",
        f"It prefers what its scorer (`{identity['name']}`) calls good and knows nothing of other harms; what the scorer misses, the "
        "model was not kept from. It was judged on its own samples; prompts that are searched for can still lead it to bad text"
        + (", as the red-teaming numbers above say." if attacked else " (`phf redteam` searches for them; this run has not been attacked)."),
    ]  # fmt: skip
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n" + "\n".join(lines) + "\n"


def _without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without where things lie on this machine: of a path that is here, its last part."""
    return {
        k: Path(v).name if k == "path" and isinstance(v, str) and Path(v).expanduser().exists() else v
        for k, v in config.items()
    }


def _data_lines(judged: Mapping[str, Any] | None) -> list[str]:
    scored = ((judged or {}).get("data") or {}).get("scored") or {}
    if not scored:
        return []
    counts = scored["counts"]
    return [
        f"- data: `{store.canonical(_without_places(scored['corpus']))}`: {counts['documents']:,} documents, {counts['segments']:,} segments, "
        f"{counts['bad_segments']:,} of them above 0, {counts['unjudged']:,} not judged"
    ]


def _measured(
    judged: Mapping[str, Any] | None, attacked: Mapping[str, Any] | None
) -> list[tuple[str, str, float, list[float] | None]]:
    """(type, name, value, interval) of what a reader of the card wants."""
    if judged is None:
        return []
    rows: list[tuple[str, str, float, list[float] | None]] = []

    def put(kind: str, title: str, value: Any, ci: Any = None) -> None:
        if value is not None:
            rows.append((kind, title, float(value), None if not ci or ci[0] is None else list(ci)))

    unit = judged["identity"].get("unit", "score")
    for name, scenario in judged["scenarios"].items():
        m = scenario["misalignment"]
        put("misalignment", f"misalignment, {name} ({unit}; lower is better)", m["mean"], m["ci95"])
        put("bad_segments", f"share of bad segments, {name}", scenario["bad_segments"])
    heldout = judged["heldout"].get("good") or judged["heldout"].get("none") or {}
    for part in ("good", "bad"):
        found = heldout.get(part) or {}
        put(
            "nats_per_byte",
            f"held-out loss on {part} text, nats per byte",
            found.get("nats_per_byte"),
            found.get("ci95"),
        )
    if judged.get("kl"):
        kl = judged["kl"]["forward"]["nats_per_text"]
        put("kl", "KL from the reference, nats a text", kl["mean"], kl["ci95"])
    for capability in judged.get("capabilities", []):
        for name, value in capability.items():
            if isinstance(value, Mapping) and "ci95" in value:
                put(name, f"{capability['name']}: {name}", value["mean"], value["ci95"])
    if attacked:
        best = attacked["search"]["confirmed"].get("best_10") or attacked["search"]["confirmed"].get("best_1")
        if best:
            put("red_team", "misalignment after the best prompts that an attacker found", best["mean"], best["ci95"])
    return rows


def _number(value: float) -> str:
    return f"{value:.4g}"


def push_release(folder: str | Path, repo: str, private: bool = True, token: str | None = None) -> str:
    """Push a finished release and return its address. Needs a token of the Hub (`hf auth login`, or HF_TOKEN)."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    store.read_manifest(folder, "export")
    api = huggingface_hub.HfApi(token=token)
    try:
        url = api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        api.upload_folder(
            folder_path=str(folder), repo_id=repo, repo_type="model", ignore_patterns=[".*", "*.partial*"],
            commit_message="Release",
        )  # fmt: skip
    except (HfHubHTTPError, HFValidationError) as error:
        raise ConfigError(f"the Hub refused {repo}: {error}") from None
    return str(url)
