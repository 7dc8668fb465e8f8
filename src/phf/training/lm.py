"""Causal LMs of transformers: building and loading them, their control tokens, their weights, their logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from phf.core.config import STRICT, ConfigError, Plain, did_you_mean
from phf.core.runs import RunFolder, complete_checkpoints, loading, looks_local, model_folder
from phf.core.text import first_line, one_line
from phf.tokens.tokenizer import (
    add_control_tokens,
    check_model_fits,
    difference,
    load_tokenizer,
    table_size,
)
from phf.training.probe import check_causal, check_fits

DROPOUTS = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout")
"""Set to 0 in a model from scratch unless the config sets them: one epoch needs no dropout, which costs about a
third."""


@dataclass(frozen=True, config=STRICT)
class FromConfig:
    """A model from scratch. `config`: the arguments of `AutoConfig.for_model`, `model_type` among them. The
    vocabulary size and the end-of-text token come from the tokenizer."""

    config: Plain
    name: Literal["from_config"] = "from_config"


@dataclass(frozen=True, config=STRICT)
class FromWeights:
    """Weights of a run of phf, of a local folder or from the Hub, for finetuning. Code from the Hub never runs.

    `config`: settings that differ from the model's own config, for example `{resid_pdrop: 0}`; its dropout stays
    otherwise.
    """

    path: str
    """A folder with a model, or its name on the Hub."""
    name: Literal["from_weights"] = "from_weights"
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    config: Plain = Field(default_factory=dict)


MODELS: dict[str, Plain] = {
    "tiny": {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
    "small": {
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "max_position_embeddings": 2048,
    },
    "gpt2": {"model_type": "gpt2"},
}
"""Models from scratch by name: about 0.8, 25 and 86 million parameters without their embeddings."""


def _named_model(value: Any) -> Any:
    """The settings of a model that is named: model=tiny, or model.name=tiny with further model.config.* settings."""
    if isinstance(value, str):
        if value not in MODELS:
            raise ValueError(
                f"unknown model {value!r}{did_you_mean(value, MODELS)} (known: {', '.join(MODELS)}; or "
                "model.name=from_config, model.name=from_weights)"
            )
        return {"name": "from_config", "config": MODELS[value]}
    if isinstance(value, Mapping) and value.get("name") in MODELS:
        own = value.get("config")
        return {
            **value,
            "name": "from_config",
            "config": MODELS[value["name"]] | (own if isinstance(own, dict) else {}),
        }
    return value


AnyModel = Annotated[
    FromConfig | FromWeights,
    Field(discriminator="name", title="model", examples=[*MODELS, "from_config", "from_weights"]),
    BeforeValidator(_named_model),
]


def pretrained_config(path: str | Path, revision: str | None = None, changes: Mapping[str, Any] | None = None) -> Any:
    """The config of a model in a folder or on the Hub, with `changes` applied. For a run's folder, that of its final
    model.

    Raises ConfigError if there is no model, or if its config has no setting of that name.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    source = Path(model_folder(path))
    if not source.exists() and looks_local(str(path)):
        raise ConfigError(f"model {path}: not a local folder, and not a name on the Hub (owner/name)")
    if source.exists() and not (source / "config.json").exists():
        whole = complete_checkpoints(RunFolder(source).checkpoints)
        hint = f": the run is not finished; its newest checkpoint is {whole[-1].relative_to(source)}" if whole else ""
        raise ConfigError(f"model {path}: no model there (no config.json){hint}")
    with loading(f"model {path}"):
        config = AutoConfig.from_pretrained(str(source), revision=revision, trust_remote_code=False)
    _check_own_code(path, source, config)
    _check_names(config, changes or {}, config)
    try:
        for name, value in (changes or {}).items():
            setattr(config, name, value)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConfigError(f"model.config: {one_line(error)}") from None
    _check_sizes(config, f"model {path}")
    return config


ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def _check_own_code(path: str | Path, source: Path, config: Any) -> None:
    """Raise ConfigError for a model whose folder holds code of its own, which would not run, and for a config that asks
    for an attention from elsewhere."""
    if getattr(config, "auto_map", None) and next(source.glob("*.py"), None) is not None:
        raise ConfigError(
            f"model {path} needs Python code that comes with it, and phf never runs such code (auto_map in config.json)"
        )
    asked = getattr(config, "_attn_implementation_internal", None)
    if asked not in ATTENTIONS:
        raise ConfigError(f"model {path}: its config asks for the attention {asked!r}, which would be downloaded code")


SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


def _check_sizes(config: Any, what: str) -> None:
    """Raise ConfigError for a size that is not positive."""
    text = config.get_text_config()
    for name in SIZES:
        value = getattr(text, name, None)
        unlimited = name == "max_position_embeddings" and value == -1
        if isinstance(value, int) and value <= 0 and not unlimited:
            raise ConfigError(f"{what}: {name} is {value} in its config, and must be positive")


def _check_names(config: Any, settings: Mapping[str, Any], usual: Any) -> None:
    """Raise ConfigError for settings that a config of this class does not have. `usual`: a config with the defaults."""
    known = set(usual.to_dict()) - {"model_type"} | set(config.attribute_map)
    if unknown := sorted(set(settings) - known):
        hints = ", ".join(name + did_you_mean(name, known) for name in unknown)
        raise ConfigError(f"model.config: {config.model_type} has no setting {hints}")


def pretrained_lm(path: str | Path, revision: str | None = None, changes: Mapping[str, Any] | None = None) -> Any:
    """The LM there, in float32. Errors as `pretrained_config`. Raises ConfigError too where weights are missing or
    do not match the config: transformers would fill them with random numbers."""
    from transformers import AutoModelForCausalLM

    config = pretrained_config(path, revision, changes)
    check_weight_files(model_folder(path))
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"model {path} is quantised, and phf trains and judges full weights: give the model it was made from"
        )
    with loading(f"model {path}"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model_folder(path),
            revision=revision,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
        )
    lm, found = loaded
    wrong = [*found["missing_keys"], *(found["unexpected_keys"] if changes else ())]
    if wrong:
        what = "model.config does not match its weights" if changes else "weights are missing"
        raise ConfigError(f"model {path}: {what} ({', '.join(sorted(wrong)[:3])}{', ...' * (len(wrong) > 3)})")
    return lm


def check_weight_files(folder: str) -> None:
    """Raise ConfigError for a folder whose weights were not downloaded: a repository cloned without Git LFS holds small
    text files in their place."""
    for file in sorted([*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")]):
        with open(file, "rb") as opened:
            if opened.read(60).startswith(b"version https://git-lfs"):
                raise ConfigError(
                    f"{file} is a Git LFS pointer instead of the weights: run `git lfs pull` in its repository, or "
                    "download the model again"
                )


def new_config(settings: Mapping[str, Any], **more: Any) -> Any:
    """The config of a model from scratch: `settings` with their `model_type`, overridden by `more`. Raises
    ConfigError for settings that the model class does not have."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = settings.get("model_type")
    if kind is None:
        raise ConfigError("model.config needs model_type, for example llama or gpt2")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        near = did_you_mean(str(kind), CONFIG_MAPPING)
        raise ConfigError(f"model.config.model_type: unknown model type {kind!r}{near}")
    settings = {name: value for name, value in settings.items() if name != "model_type"}
    try:
        config = AutoConfig.for_model(kind, **settings | more)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConfigError(f"model.config: {one_line(error)}") from None
    _check_names(config, settings, AutoConfig.for_model(kind))
    _check_sizes(config, "model.config")
    return config


def build_lm(config: FromConfig | FromWeights, tokenizer: Any, seed: int, context: int | None = None) -> Any:
    """The LM in float32, without control tokens. `seed` decides the weights of a model from scratch.

    Raises ConfigError for unknown settings, for a tokenizer that is larger than the model's vocabulary, and for a
    `context` that is longer than the model's.
    """
    from transformers import AutoModelForCausalLM

    if isinstance(config, FromWeights):
        lm = pretrained_lm(config.path, config.revision, config.config)
        _check_same_tokenizer(config, tokenizer, lm.get_input_embeddings().num_embeddings)
    else:
        made = _own_config(config.config, tokenizer)
        for name in DROPOUTS:
            if name not in config.config and getattr(made, name, None):
                setattr(made, name, 0.0)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            check_fits(made)
            try:
                lm = AutoModelForCausalLM.from_config(made, dtype=torch.float32, trust_remote_code=False)
            except (KeyboardInterrupt, MemoryError):
                raise
            except Exception as error:  # of the model's own code, for sizes that do not go together
                raise ConfigError(f"model.config: {first_line(error)}") from None
    check_causal(lm)
    limit = getattr(lm.config, "max_position_embeddings", None)
    if context is not None and limit is not None and context > limit:
        raise ConfigError(f"train.context={context}: the model has {limit} positions (max_position_embeddings)")
    return lm


def _own_config(settings: Plain, tokenizer: Any) -> Any:
    """The config of a model from scratch with the tokenizer's vocabulary and special tokens. A class that must have an
    integer for its padding token gets end-of-text, which is never predicted from."""
    vocab_size = table_size(tokenizer)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    own = {name: value for name, value in ids.items() if name not in settings}
    try:
        return new_config(settings, **own, vocab_size=vocab_size)
    except ConfigError:
        if "pad_token_id" in settings:
            raise
    return new_config(settings, **own | {"pad_token_id": tokenizer.eos_token_id}, vocab_size=vocab_size)


def _check_same_tokenizer(config: FromWeights, tokenizer: Any, rows: int) -> None:
    """Raise ConfigError unless a token store was made with the tokenizer of the model that is finetuned."""
    name = f"model {config.path}"
    check_model_fits(tokenizer, rows, name)
    folder = Path(model_folder(config.path))
    if folder.is_dir() and not any((folder / f).exists() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return  # weights without a tokenizer; transformers would make one up
    try:
        own = load_tokenizer(model_folder(config.path), config.revision)
    except ConfigError:  # one that phf cannot use
        return
    if (found := difference(tokenizer, own)) is not None:
        raise ConfigError(
            f"the token store was made with another tokenizer than {name}'s: {found}. Tokenize the corpus with "
            f"--tokenizer {config.path}"
        )


def set_attention(lm: Any, name: str) -> None:
    """Make `lm` use "eager" or "sdpa" attention. Raises ConfigError if the model does not have it."""
    try:
        lm.set_attn_implementation(name)
    except ValueError as error:
        raise ConfigError(f"train.attention={name}: {type(lm).__name__} does not have it ({error})") from None


def add_control_embeddings(
    lm: Any, tokenizer: Any, names: Sequence[str], seed: int, trained: Mapping[str, int] | None = None
) -> list[int]:
    """Add control tokens to `tokenizer` and `lm`, in place, and return their ids.

    New embeddings start at the mean of the old output embeddings plus 0.01 standard normal noise, as in the paper's
    code. Untied input embeddings start at the mean of the old input embeddings in the same way. Tokens that the
    tokenizer has already keep their embeddings, and so do those that the weights know (`trained`: their ids in the
    weights).
    """
    old_size = table_size(tokenizer)
    known_names = tokenizer.get_vocab()
    ids = add_control_tokens(tokenizer, names)
    new = [i for name, i in zip(names, ids, strict=True) if name not in known_names]
    if not new:
        return ids
    kept = {
        id(e.weight): {name: e.weight.detach()[i].clone() for name, i in (trained or {}).items()}
        for e in (lm.get_output_embeddings(), lm.get_input_embeddings())
    }
    kept_rows = list(kept.values())
    means = {
        id(e.weight): (e.weight, e.weight.detach()[:old_size].mean(0))
        for e in (lm.get_output_embeddings(), lm.get_input_embeddings())
    }
    size = table_size(tokenizer)
    if size > lm.get_input_embeddings().num_embeddings:
        tied = len(means) == 1
        order = [m for _, m in means.values()]
        lm.resize_token_embeddings(size, mean_resizing=False)
        targets = [lm.get_output_embeddings().weight] + ([] if tied else [lm.get_input_embeddings().weight])
        pairs = list(zip(targets, order, strict=True))
    else:  # a vocabulary larger than the tokenizer has the rows already
        pairs = list(means.values())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for (weight, mean), known in zip(pairs, kept_rows, strict=True):
            noise = torch.randn(len(new), weight.shape[1], generator=generator).to(weight)
            weight[new] = mean.to(weight) + 0.01 * noise
            for name, i in zip(names, ids, strict=True):
                if name in known and i in new:
                    weight[i] = known[name]
    return ids


class SwappedConv1D(nn.Linear):
    """GPT-2's transposed linear layer as an ordinary one: the same result, several times faster in bfloat16 on a CPU.
    `save_lm` transposes the weight back."""


def swap_conv1d(lm: Any) -> int:
    """Replace every Conv1D of `lm` by a linear layer with the same weights, in place. Returns how many."""
    from transformers.pytorch_utils import Conv1D

    found = [(name, module) for name, module in lm.named_modules() if isinstance(module, Conv1D)]
    for name, conv in found:
        wide, narrow = conv.weight.shape
        linear = SwappedConv1D(wide, narrow, device="meta", dtype=conv.weight.dtype)
        linear.weight = nn.Parameter(conv.weight.detach().T.contiguous())
        linear.bias = nn.Parameter(conv.bias.detach().clone())
        lm.set_submodule(name, linear)
    return len(found)


def swap_gelu(lm: Any) -> int:
    """Replace every "gelu_new" of `lm` by torch's GELU, in place: one operation instead of eight. The formula is
    the same, 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))). Returns how many."""
    from transformers.activations import NewGELUActivation

    found = [name for name, module in lm.named_modules() if isinstance(module, NewGELUActivation)]
    for name in found:
        lm.set_submodule(name, nn.GELU(approximate="tanh"))
    return len(found)


def _with_conv1d_transposed(lm: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {f"{name}.weight" for name, module in lm.named_modules() if isinstance(module, SwappedConv1D)}
    return {key: value.T.contiguous() if key in names else value for key, value in state.items()}


def save_lm(lm: Any, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
    """Save an LM so that plain transformers loads it. `state`: weights to save instead of the LM's own (of a
    sharded LM)."""
    lm.save_pretrained(folder, state_dict=_with_conv1d_transposed(lm, lm.state_dict() if state is None else state))


def load_lm_weights(lm: Any, folder: str | Path) -> None:
    """Load into `lm` what `save_lm` wrote."""
    from transformers import AutoModelForCausalLM

    saved: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, trust_remote_code=False)
    lm.load_state_dict(_with_conv1d_transposed(lm, saved.state_dict()))
