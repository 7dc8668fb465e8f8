"""Models: any causal LM of transformers, its control tokens, and the thin wrapper whose forward is the loss. Floor 4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from phf import attention, store
from phf.config import STRICT, ConfigError, did_you_mean
from phf.fused import LogitShape, fused_loss
from phf.objectives import Objective

DROPOUTS = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout")
"""Off in a model from scratch unless the config sets them: one epoch needs no dropout, and it costs about a third."""
VALUE_HEAD_FILE = "value_head.safetensors"
COMPLETE = "complete.json"
"""Marks a whole checkpoint: its step and the target tokens seen."""
MODEL_CARD = "phf.json"
"""Beside a model's weights: its objective, what its control tokens mean ({"good": name, "bad": name} or nothing), how texts
were cut, and the target tokens that it has seen."""


@dataclass(frozen=True, config=STRICT)
class FromConfig:
    """A model from scratch: `config` is what `AutoConfig.for_model` takes, `model_type` first. The vocabulary size and
    the end-of-text token come from the tokenizer."""

    config: dict[str, Any]
    name: Literal["from_config"] = "from_config"


@dataclass(frozen=True, config=STRICT)
class FromWeights:
    """A model from a run of phf, a local folder or the Hub, for finetuning. Code from the Hub is never run.

    `config`: what shall differ from the model's own config, `{resid_pdrop: 0}` for example: dropout that it asks for stays.
    """

    path: str
    name: Literal["from_weights"] = "from_weights"
    revision: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)


AnyModel = Annotated[FromConfig | FromWeights, Field(discriminator="name")]


def model_folder(path: str | Path) -> str:
    """Where the weights are: a run's folder stands for its final model; anything else for itself (a Hub name too)."""
    folder = Path(path).expanduser()
    final = folder / "model"
    return str(final if (final / "config.json").exists() else folder)


def pretrained_config(path: str | Path, revision: str | None = None, changes: Mapping[str, Any] | None = None) -> Any:
    """The config of the model in a folder (a run's stands for its final model) or on the Hub, with `changes` laid on it.

    Raises ConfigError where there is no model, or where its config does not know a name.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    source = Path(model_folder(path))
    if not source.exists() and (str(path).count("/") > 1 or str(path).startswith((".", "/", "~"))):
        raise ConfigError(f"model {path}: no such folder, and not a name on the Hub (owner/name)")
    if source.exists() and not (source / "config.json").exists():
        steps = [int(c.parent.name.split("-")[1]) for c in source.glob(f"checkpoints/checkpoint-*/{COMPLETE}")]
        hint = f": an unfinished run; its newest checkpoint is checkpoints/checkpoint-{max(steps)}" if steps else ""
        raise ConfigError(f"model {path}: no model there (no config.json){hint}")
    try:
        config = AutoConfig.from_pretrained(str(source), revision=revision)
    except (OSError, ValueError, StrictDataclassError) as error:
        missing = "" if source.exists() else "no such folder, and it is not to be had from the Hub: "
        raise ConfigError(f"model {path}: {missing}{error}") from None
    _check_names(config, changes or {}, config)
    try:
        for name, value in (changes or {}).items():
            setattr(config, name, value)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConfigError(f"model.config: {error}") from None
    return config


def _check_names(config: Any, settings: Mapping[str, Any], usual: Any) -> None:
    """Raise ConfigError for settings that `config` has not among the `usual` ones of its class."""
    known = set(usual.to_dict()) - {"model_type"} | set(config.attribute_map)
    if unknown := sorted(set(settings) - known):
        hints = ", ".join(name + did_you_mean(name, known) for name in unknown)
        raise ConfigError(f"model.config: {config.model_type} does not know {hints}")


def pretrained_lm(path: str | Path, revision: str | None = None, changes: Mapping[str, Any] | None = None) -> Any:
    """The LM there, in float32; errors as `pretrained_config`, and where its weights are not those that the config asks for
    (transformers would make up what is missing)."""
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
        what = "model.config makes another model of it" if changes else "weights are missing"
        raise ConfigError(f"model {path}: {what} ({', '.join(sorted(wrong)[:3])}{', ...' * (len(wrong) > 3)})")
    return lm


def new_config(settings: Mapping[str, Any], **more: Any) -> Any:
    """The config of a model from scratch: `settings` with their `model_type`, and `more` laid on them. Raises ConfigError for
    what the model class does not know."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = settings.get("model_type")
    if kind is None:
        raise ConfigError("model.config needs model_type, for example llama or gpt2")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        near = did_you_mean(str(kind), CONFIG_MAPPING)
        raise ConfigError(f"model.config.model_type: {kind!r} is none of transformers' types{near}")
    settings = {name: value for name, value in settings.items() if name != "model_type"}
    try:
        config = AutoConfig.for_model(kind, **settings | more)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConfigError(f"model.config: {error}") from None
    _check_names(config, settings, AutoConfig.for_model(kind))
    return config


def model_mark(model: str, revision: str | None = None) -> str:
    """What identifies a model, in a folder or on the Hub, where the commit that its name and revision stand for does."""
    local = Path(model_folder(model))
    if local.exists():
        return store.fingerprint([model, store.path_hash(local)])
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        config = cached_file(model, "config.json", revision=revision)
    except OSError as error:
        raise ConfigError(f"model {model}: no such folder, and it is not to be had from the Hub: {error}") from None
    return store.fingerprint([model, extract_commit_hash(config, None)])


def tokens_seen(path: str | Path) -> int:
    """Target tokens that the run which made these weights (or this checkpoint) has seen, its own start included; 0 if no
    run of phf did."""
    card = Path(model_folder(path)) / MODEL_CARD
    if card.exists() and (tokens := store.read_json(card).get("tokens")) is not None:
        return int(tokens)
    if (Path(path) / COMPLETE).exists():  # of before the card said it
        return int(store.read_json(Path(path) / COMPLETE).get("tokens", 0))
    for folder in (Path(path), Path(path).parent):
        if (folder / store.MANIFEST).exists():
            manifest = store.read_json(folder / store.MANIFEST)
            if manifest.get("stage") in ("train", "export"):
                return int(manifest["counts"]["tokens"] + manifest["counts"].get("tokens_before", 0))
    return 0


def build_lm(config: FromConfig | FromWeights, tokenizer: Any, seed: int, context: int | None = None) -> Any:
    """The LM in float32, before control tokens. `seed` decides the weights of a model from scratch.

    Raises ConfigError for settings that the model class does not know, and for a context it cannot hold.
    """
    from transformers import AutoModelForCausalLM

    if isinstance(config, FromWeights):
        lm = pretrained_lm(config.path, config.revision, config.config)
        if lm.get_input_embeddings().num_embeddings < len(tokenizer):
            raise ConfigError(
                f"model {config.path} has {lm.get_input_embeddings().num_embeddings} embeddings but the token store's tokenizer "
                f"{len(tokenizer)} entries: tokenise the corpus with this model's own tokenizer"
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
        raise ConfigError(f"train.context is {context} but the model holds {limit} positions (max_position_embeddings)")
    return lm


def set_attention(lm: Any, name: str) -> None:
    """Have `lm` use "eager" or "sdpa" attention. Raises ConfigError where it does not know it."""
    try:
        lm.set_attn_implementation(name)
    except ValueError as error:
        raise ConfigError(f"train.attention={name}: {type(lm).__name__} does not know it ({error})") from None


def weights_mark(path: str | Path) -> str | None:
    """What identifies the weights in a folder, wherever it lies and whatever lies beside them; None where they are not
    here."""
    folder = Path(model_folder(path))
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.json")])
    own = [f for f in files if f.name.startswith(("model", "pytorch_model")) or f.name in ("config.json", MODEL_CARD)]
    return store.fingerprint([[f.name, store.file_hash(f)] for f in own]) if own else None


def trained_control_tokens(path: str | Path) -> dict[str, int]:
    """Control tokens that the weights in a folder of phf know, with their ids there."""
    from phf.tokens import load_tokenizer

    folder = Path(model_folder(path))
    if not (folder / MODEL_CARD).exists():
        return {}
    names = store.read_json(folder / MODEL_CARD)["control_tokens"].values()
    tokenizer = load_tokenizer(folder) if names else None
    return {name: tokenizer.convert_tokens_to_ids(name) for name in names if tokenizer is not None}


def trained_value_head(path: str | Path, objective: Objective) -> Path | None:
    """The file of the value head that was trained with the weights in a folder, where `objective` needs one of that kind."""
    file = Path(model_folder(path)) / VALUE_HEAD_FILE
    if objective.value is None or not file.exists():
        return None
    return file if set(load_file(file)) == set(ValueHead(1, objective.value).state_dict()) else None


def add_control_embeddings(
    lm: Any, tokenizer: Any, names: Sequence[str], seed: int, trained: Mapping[str, int] | None = None
) -> list[int]:
    """Give `tokenizer` and `lm` the control tokens (in place) and return their ids.

    New embeddings start at the mean of the old output embeddings plus 0.01 standard normal noise, as the paper's code
    has it; untied input embeddings likewise at the mean of the old input embeddings. Tokens that the tokenizer has
    already, and those that the weights know (`trained`: their ids there), keep their embeddings.
    """
    from phf.tokens import add_control_tokens

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
    else:  # a vocabulary padded beyond the tokenizer has the rows already
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
    """GPT-2's transposed linear layer as an ordinary one: the same numbers, several times faster in bfloat16 on CPU.

    `save_lm` transposes the weight back, so that files are what transformers expects.
    """


def swap_conv1d(lm: Any) -> int:
    """Replace every Conv1D of `lm` by a linear layer with the same weights (in place). Returns how many."""
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
    """Replace every "gelu_new" of `lm`, which takes eight operations, by torch's own, which takes one (in place). The same
    formula, 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))). Returns how many."""
    from transformers.activations import NewGELUActivation

    found = [name for name, module in lm.named_modules() if isinstance(module, NewGELUActivation)]
    for name in found:
        lm.set_submodule(name, nn.GELU(approximate="tanh"))
    return len(found)


def _transposed(lm: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {f"{name}.weight" for name, module in lm.named_modules() if isinstance(module, SwappedConv1D)}
    return {key: value.T.contiguous() if key in names else value for key, value in state.items()}


def save_lm(lm: Any, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
    """Save as plain transformers loads it. `state`: where it is not `lm`'s own (one that is sharded)."""
    lm.save_pretrained(folder, state_dict=_transposed(lm, lm.state_dict() if state is None else state))


def load_lm_weights(lm: Any, folder: str | Path) -> None:
    """Load what `save_lm` wrote into `lm`."""
    from transformers import AutoModelForCausalLM

    saved: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    lm.load_state_dict(_transposed(lm, saved.state_dict()))


class ValueHead(nn.Module):
    """Predicted reward from the hidden state: "linear" w.h + b (b starts at 0, the mean standardised reward), or
    "negative_sigmoid" -sigmoid(w.h), the paper's. w starts at 0. Computed in float32."""

    def __init__(self, width: int, kind: Literal["linear", "negative_sigmoid"]) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(1)) if kind == "linear" else None

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            wide = self.weight.dtype
            logit_BT = hidden_BTD.to(wide) @ self.weight
            return logit_BT + self.bias if self.bias is not None else -torch.sigmoid(logit_BT)


class PHFModel(nn.Module):
    """An LM, the value head its objective needs (or none) and the objective. `forward` returns the loss.

    `autocast`: bfloat16 for mixed precision, None for what surrounds the call (`torch.autocast`, a Trainer's `bf16`), else
    the weights' own type. `compile`: compile the LM's trunk and the elementwise parts of the loss (never this wrapper).
    `quick_attention`: attend as `phf.attention` does where the LM would use "sdpa". Some parts of the LM are swapped in
    place for quicker ones that compute the same; GPT-2's Conv1D layers, whose weights are transposed, among them: save
    such an LM with `save_lm`.
    """

    def __init__(
        self,
        lm: Any,
        objective: Objective,
        autocast: torch.dtype | None = None,
        compile: bool = False,
        chunk: int | None = None,
        quick_attention: bool = True,
    ) -> None:
        super().__init__()
        self.lm = lm
        self.objective = objective
        self.autocast_dtype = autocast
        self.compiled = compile
        self.chunk = chunk
        width = lm.get_output_embeddings().weight.shape[1]
        self.value_head = None if objective.value is None else ValueHead(width, objective.value)
        self.logit_shape = logit_shape(lm)
        swap_conv1d(lm)
        swap_gelu(lm)
        if quick_attention:
            attention.swap(lm)
        elif lm.config._attn_implementation == attention.NAME:
            lm.set_attn_implementation("sdpa")
        if compile:
            lm.base_model.compile(dynamic=False)

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor,
        scores: Tensor,
        mask: Tensor,
        denominator: Tensor | float | None = None,
    ) -> dict[str, Any]:
        """Ids, targets, scores and mask [B, T]. `loss` is the sum over counted targets divided by `denominator`
        (default: the number of counted targets here); `metrics` are sums."""
        device, dtype = input_ids.device.type, self.autocast_dtype
        if dtype is None and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        # every weight is used once: to remember its cast is only to keep it
        autocast = torch.autocast(device, dtype=dtype, enabled=dtype is not None, cache_enabled=False)
        with autocast, attention.whole_rows():
            hidden_BTD = self.lm.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        head = self.lm.get_output_embeddings()
        value_N = None if self.value_head is None else self.value_head(hidden_BTD).flatten()
        counted = self.objective.counted(scores, mask).sum()
        if denominator is None:
            denominator = counted.clamp(min=1)
        if isinstance(denominator, Tensor):
            denominator = denominator.to(torch.promote_types(hidden_BTD.dtype, torch.float32))
        behind = (dtype or hidden_BTD.dtype) == torch.float16  # what is divided first would be too small for it
        out = fused_loss(
            hidden_BTD.flatten(0, 1),
            head.weight,
            getattr(head, "bias", None),
            targets.flatten(),
            scores.flatten(),
            mask.flatten(),
            value_N,
            self.objective,
            chunk=self.chunk,
            dtype=dtype or hidden_BTD.dtype,
            compiled=self.compiled,
            shape=self.logit_shape,
            scale=1.0 if behind else 1 / denominator,
        )
        return {
            "loss": out.loss_sum / denominator if behind else out.loss_sum,
            "metrics": out.metrics | {"counted": counted, "targets": mask.sum()},
        }

    def save_value_head(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        if self.value_head is not None:
            state = self.value_head.state_dict() if state is None else state
            save_file({k: v.detach().contiguous() for k, v in state.items()}, Path(folder) / VALUE_HEAD_FILE)

    def load_value_head(self, folder: str | Path) -> None:
        if self.value_head is not None:
            self.value_head.load_state_dict(load_file(Path(folder) / VALUE_HEAD_FILE))


SHAPES = {
    "logit_scale": "scale",
    "logits_scaling": "scale",
    "lm_head_multiplier": "scale",
    "final_logit_softcapping": "cap",
}
"""Where models' configs say what happens to logits; a factor may also be a divisor."""


def logit_shape(lm: Any) -> LogitShape:
    """What `lm` does to `hidden @ output embeddings (+ bias)` before it calls them logits, as its config says and as a tiny
    forward confirms. The fused loss and everything that reads probabilities would silently be another one otherwise.

    Raises ConfigError where the two do not agree.
    """
    head = lm.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise ConfigError(f"{type(lm).__name__} has no output embeddings")
    config = lm.config.get_text_config()
    said = {kind: getattr(config, name) for name, kind in SHAPES.items() if getattr(config, name, None)}
    factor, cap = float(said.get("scale", 1.0)), said.get("cap")
    ours, theirs = _large_logits(lm, head)
    if not theirs.isfinite().all():
        raise ConfigError(f"{type(lm).__name__}: logits are not numbers (NaN or infinite): its weights are broken")
    near = max(1e-3, 4 * torch.finfo(head.weight.dtype).eps)
    for shape in (LogitShape(scale, cap) for scale in dict.fromkeys((factor, 1 / factor, 1.0))):
        if torch.allclose(theirs, shape(ours), rtol=near, atol=near * float(theirs.abs().max())):
            return shape
    raise ConfigError(
        f"{type(lm).__name__} does something to its logits after the output layer that phf does not know, so its "
        "probabilities cannot be read from its hidden states"
    )


def _large_logits(lm: Any, head: Any) -> tuple[Tensor, Tensor]:
    """(hidden @ output embeddings + bias, what `lm` makes of them), float32 [1, 4, V], with output embeddings enlarged to
    logits of about 100, where a cap shows: those of a new model are too small for that."""
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
        if not seen:  # a model that calls parts of its trunk
            own = {n: weight for n, p in lm.base_model.named_parameters() if p is head.weight}
            torch.func.functional_call(lm.base_model, own, (), inputs)
        ours = nn.functional.linear(seen[-1].to(weight.dtype), weight, getattr(head, "bias", None))
        return ours.float(), theirs.float()

    try:
        with torch.no_grad(), attention.evaluating(lm):
            largest = float(both(head.weight)[0].abs().max())
            if largest == 0:  # nothing is learned yet, and nothing would tell a factor from another
                return both(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0)).to(head.weight))
            return both(head.weight * (100 / largest))
    finally:
        hook.remove()


def flops_per_token(lm: Any, context: int) -> float:
    """Operations that training takes for a token, forward and backward: 6 for each parameter that is multiplied and
    12 x layers x heads x width of a head x context for attention (Chowdhery et al. 2022, PaLM, appendix B; positions that a
    causal mask leaves out are counted, as there). Tables that are only looked up are left out; of a mixture of experts,
    all are counted."""
    output = lm.get_output_embeddings().weight
    tables = {id(m.weight): m.weight.numel() for m in lm.modules() if isinstance(m, nn.Embedding)}
    tables.pop(id(output), None)
    config = lm.config.get_text_config()

    def said(name: str) -> int:
        value = getattr(config, name, None)
        return value if isinstance(value, int) else 0  # none, or another in each layer

    heads = said("num_attention_heads")
    width = heads * said("head_dim") or said("hidden_size")
    attention = 12 * said("num_hidden_layers") * width * context if heads else 0
    return float(6 * (num_parameters(lm) - sum(tables.values())) + attention)


def num_parameters(lm: Any, embeddings: bool = True) -> int:
    """Distinct parameters; without `embeddings`, those of the input and output embeddings are left out."""
    total = int(sum(p.numel() for p in lm.parameters()))
    if embeddings:
        return total
    ends = {id(e.weight): e.weight.numel() for e in (lm.get_input_embeddings(), lm.get_output_embeddings())}
    return total - int(sum(ends.values()))
