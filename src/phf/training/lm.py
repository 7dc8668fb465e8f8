"""Causal LMs of transformers: building and loading them, their control tokens, their weights, their logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from phf.core.config import STRICT, ConfigError, Plain, did_you_mean
from phf.core.runs import RunFolder, complete_checkpoints, model_folder, not_found
from phf.training import attention
from phf.training.fused import LogitShape

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
    name: Literal["from_weights"] = "from_weights"
    revision: str | None = None
    config: Plain = Field(default_factory=dict)


AnyModel = Annotated[FromConfig | FromWeights, Field(discriminator="name", title="model")]


def pretrained_config(path: str | Path, revision: str | None = None, changes: Mapping[str, Any] | None = None) -> Any:
    """The config of a model in a folder or on the Hub, with `changes` applied. For a run's folder, that of its final
    model.

    Raises ConfigError if there is no model, or if its config has no setting of that name.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    source = Path(model_folder(path))
    if not source.exists() and (str(path).count("/") > 1 or str(path).startswith((".", "/", "~"))):
        raise ConfigError(f"model {path}: not a local folder, and not a name on the Hub (owner/name)")
    if source.exists() and not (source / "config.json").exists():
        whole = complete_checkpoints(RunFolder(source).checkpoints)
        hint = f": the run is not finished; its newest checkpoint is {whole[-1].relative_to(source)}" if whole else ""
        raise ConfigError(f"model {path}: no model there (no config.json){hint}")
    try:
        config = AutoConfig.from_pretrained(str(source), revision=revision)
    except (OSError, ValueError, StrictDataclassError) as error:
        what = f"model {path}"
        raise ConfigError(f"{what}: {error}" if source.exists() else not_found(what, error)) from None
    _check_names(config, changes or {}, config)
    try:
        for name, value in (changes or {}).items():
            setattr(config, name, value)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConfigError(f"model.config: {error}") from None
    return config


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
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model_folder(path), revision=revision, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"model {path}: {error}") from None
    lm, found = loaded
    wrong = [*found["missing_keys"], *(found["unexpected_keys"] if changes else ())]
    if wrong:
        what = "model.config does not match its weights" if changes else "weights are missing"
        raise ConfigError(f"model {path}: {what} ({', '.join(sorted(wrong)[:3])}{', ...' * (len(wrong) > 3)})")
    return lm


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
        raise ConfigError(f"model.config: {error}") from None
    _check_names(config, settings, AutoConfig.for_model(kind))
    return config


def build_lm(config: FromConfig | FromWeights, tokenizer: Any, seed: int, context: int | None = None) -> Any:
    """The LM in float32, without control tokens. `seed` decides the weights of a model from scratch.

    Raises ConfigError for unknown settings, for a tokenizer that is larger than the model's vocabulary, and for a
    `context` that is longer than the model's.
    """
    from transformers import AutoModelForCausalLM

    if isinstance(config, FromWeights):
        lm = pretrained_lm(config.path, config.revision, config.config)
        if lm.get_input_embeddings().num_embeddings < len(tokenizer):
            raise ConfigError(
                f"model {config.path} has {lm.get_input_embeddings().num_embeddings} embeddings, but the tokenizer of "
                f"the token store has {len(tokenizer)} entries: tokenize the corpus with this model's own tokenizer"
            )
    else:
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
        own = {name: value for name, value in ids.items() if name not in config.config}
        made = new_config(config.config, **own, vocab_size=len(tokenizer))
        for name in DROPOUTS:
            if name not in config.config and getattr(made, name, None):
                setattr(made, name, 0.0)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                lm = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
            except (ValueError, KeyError) as error:
                raise ConfigError(f"model.config: {error}") from None
    limit = getattr(lm.config, "max_position_embeddings", None)
    if context is not None and limit is not None and context > limit:
        raise ConfigError(f"train.context={context}: the model has {limit} positions (max_position_embeddings)")
    return lm


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
    from phf.tokens.tokenizer import add_control_tokens

    old_size = len(tokenizer)
    ids = add_control_tokens(tokenizer, names)
    new = [i for i in ids if i >= old_size]
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
    if len(tokenizer) > lm.get_input_embeddings().num_embeddings:
        tied = len(means) == 1
        order = [m for _, m in means.values()]
        lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
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

    saved: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    lm.load_state_dict(_with_conv1d_transposed(lm, saved.state_dict()))


SHAPES = {
    "logit_scale": "scale",
    "logits_scaling": "scale",
    "lm_head_multiplier": "scale",
    "final_logit_softcapping": "cap",
}
"""Settings of models' configs that scale or cap logits. A scale may be a factor or a divisor."""


def logit_shape(lm: Any) -> LogitShape:
    """What `lm` does to `hidden @ output embeddings (+ bias)` to get its logits, read from its config and confirmed
    by a tiny forward pass. Without it the fused loss, and every probability, would silently be wrong.

    Raises ConfigError if config and forward pass disagree, and for weights that give NaN or infinite logits.
    """
    head = lm.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise ConfigError(f"{type(lm).__name__} has no output embeddings")
    config = lm.config.get_text_config()
    said = {kind: getattr(config, name) for name, kind in SHAPES.items() if getattr(config, name, None)}
    factor = float(said.get("scale", 1.0))
    cap = said.get("cap")
    ours, theirs = _large_logits(lm, head)
    if not theirs.isfinite().all():
        raise ConfigError(f"{type(lm).__name__}: the logits are NaN or infinite, so its weights are broken")
    near = max(1e-3, 4 * torch.finfo(head.weight.dtype).eps)
    for shape in (LogitShape(scale, cap) for scale in dict.fromkeys((factor, 1 / factor, 1.0))):
        if torch.allclose(theirs, shape(ours), rtol=near, atol=near * float(theirs.abs().max())):
            return shape
    raise ConfigError(
        f"{type(lm).__name__} changes its logits after the output layer in a way that phf does not know, so its "
        "probabilities cannot be computed from its hidden states"
    )


def _large_logits(lm: Any, head: Any) -> tuple[Tensor, Tensor]:
    """(hidden @ output embeddings + bias, the logits of `lm`), float32 [1, 4, V]. The output embeddings are
    enlarged until the logits are about 100: those of a new model are too small to show a cap."""
    seen: list[Tensor] = []
    hook = lm.base_model.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
    name = next(n for n, p in lm.named_parameters() if p is head.weight)
    inputs = {
        "input_ids": torch.arange(4, device=head.weight.device).unsqueeze(0) % len(head.weight),
        "use_cache": False,
    }

    def both(weight: Tensor) -> tuple[Tensor, Tensor]:
        seen.clear()
        theirs = torch.func.functional_call(lm, {name: weight}, (), inputs).logits
        if not seen:  # a model that does not call its trunk as a whole
            own = {n: weight for n, p in lm.base_model.named_parameters() if p is head.weight}
            torch.func.functional_call(lm.base_model, own, (), inputs)
        ours = nn.functional.linear(seen[-1].to(weight.dtype), weight, getattr(head, "bias", None))
        return ours.float(), theirs.float()

    try:
        with torch.no_grad(), attention.evaluating(lm):
            largest = float(both(head.weight)[0].abs().max())
            if largest == 0:  # all factors would agree
                return both(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0)).to(head.weight))
            return both(head.weight * (100 / largest))
    finally:
        hook.remove()


def flops_per_token(lm: Any, context: int) -> float:
    """Operations per token of training, forward and backward: 6 per multiplied parameter, and 12 x layers x heads x
    width of a head x context for attention.

    Source: Chowdhery et al. 2022 (PaLM), appendix B. As there, positions that the causal mask hides count. Tables that
    are only looked up do not count. All experts of a mixture count.
    """
    output = lm.get_output_embeddings().weight
    tables = {id(m.weight): m.weight.numel() for m in lm.modules() if isinstance(m, nn.Embedding)}
    tables.pop(id(output), None)
    config = lm.config.get_text_config()

    def said(name: str) -> int:
        value = getattr(config, name, None)
        return value if isinstance(value, int) else 0  # absent, or different in each layer

    heads = said("num_attention_heads")
    width = heads * said("head_dim") or said("hidden_size")
    attention = 12 * said("num_hidden_layers") * width * context if heads else 0
    return float(6 * (num_parameters(lm) - sum(tables.values())) + attention)


def num_parameters(lm: Any, embeddings: bool = True) -> int:
    """Number of distinct parameters. `embeddings`: count input and output embeddings too."""
    total = int(sum(p.numel() for p in lm.parameters()))
    if embeddings:
        return total
    ends = {id(e.weight): e.weight.numel() for e in (lm.get_input_embeddings(), lm.get_output_embeddings())}
    return total - int(sum(ends.values()))
