"""What can be found out about a causal LM by building it without memory, or by one forward pass: its sizes, whether it
sees later tokens, whether it has a key-value cache, what it does to its logits."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phf.core.config import ConfigError
from phf.core.text import first_line
from phf.training import attention
from phf.training.fused import LogitShape


def check_fits(config: Any) -> None:
    """Raise ConfigError for a model from scratch that cannot fit into this machine's memory, before it is built."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            parameters = num_parameters(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    except Exception:  # what is wrong is said when the model is built
        return
    needed = TRAINING_BYTES * parameters
    available = memory_bytes()
    if needed > available:
        raise ConfigError(
            f"the model has {parameters:,} parameters; training it takes at least {needed / 1e9:,.0f} GB "
            f"({TRAINING_BYTES} bytes per parameter), and this machine has {available / 1e9:,.0f}. Set its sizes, for "
            "example model=tiny or model=small, or model.config.hidden_size and num_hidden_layers"
        )


TRAINING_BYTES = 16
"""Bytes per parameter in training: weight, gradient and Adam's two moments in float32."""


def memory_bytes() -> int:
    """Memory of this machine, or of its GPU if it has one and more than that."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # of a container
        with contextlib.suppress(OSError, ValueError):
            host = min(host, int(Path(limit).read_text()))
    return max(host, torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else host


CACHE_NAMES = ("past_key_values", "cache")
"""Names of the argument with the key-value cache, in the versions of transformers that phf works with."""


def cache_name(lm: Any) -> str | None:
    """The argument of a model's trunk that takes the key-value cache; None for a model without one."""
    known = inspect.signature(lm.base_model.forward).parameters
    return next((name for name in CACHE_NAMES if name in known), None)


def check_can_be_sampled(lm: Any, what: str) -> None:
    """Raise ConfigError for a model that phf could train but then neither sample nor judge."""
    if cache_name(lm) is None:
        raise ConfigError(
            f"{what} ({lm.config.model_type}) has no key-value cache, which phf needs to sample and judge a model; use "
            "another model_type, for example gpt2 or llama"
        )


@contextlib.contextmanager
def own_errors(lm: Any) -> Iterator[None]:
    """What a model's own code raises when it runs, as a ConfigError: settings that do not go together."""
    try:
        yield
    except (KeyboardInterrupt, MemoryError, torch.OutOfMemoryError, ConfigError):
        raise
    except Exception as error:
        raise ConfigError(
            f"{type(lm).__name__} cannot run with its config: {type(error).__name__}: {first_line(error)}"
        ) from None


CHECKED_TOKENS = 24
"""Length of the text on which it is checked that a model does not see later tokens."""


def check_causal(lm: Any) -> None:
    """Raise ConfigError for a model whose output at a position depends on later tokens. Trained on next tokens, it
    would copy them: its loss goes to 0 and it learns nothing. One forward pass with the later tokens changed settles it
    for any architecture.
    """
    rows = lm.get_input_embeddings().num_embeddings
    length = min(CHECKED_TOKENS, getattr(lm.config, "max_position_embeddings", None) or CHECKED_TOKENS)
    half = length // 2
    if half == 0 or rows < 3:
        return
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(rows, (1, length), generator=generator)
    second = first.clone()
    second[:, half:] = (first[:, half:] + 1 + torch.randint(rows - 2, (1, length - half), generator=generator)) % rows
    device = lm.get_input_embeddings().weight.device
    with torch.no_grad(), attention.evaluating(lm), own_errors(lm):
        a, b = (lm(input_ids=ids.to(device), use_cache=False).logits[0, :half].float() for ids in (first, second))
    scale = float(a.abs().max())
    if not torch.allclose(a, b, rtol=0, atol=1e-4 * scale + 1e-6):
        flags = [
            f"{name}={value}"
            for name in ("is_causal", "is_decoder", "use_bidirectional_attention", "attn_type")
            if (value := getattr(lm.config, name, None)) is not None
        ]
        raise ConfigError(
            f"{type(lm).__name__} sees later tokens when it predicts a token ({', '.join(flags) or 'not causal'}), so "
            "it cannot be trained on next tokens. Use a causal model"
        )


def before_output(lm: Any) -> Any:
    """The layers of an LM between its trunk and its output embeddings, as a module; None if there are none, as in most
    models. `logit_shape` confirms it."""
    ends = (lm.base_model, lm.get_output_embeddings())
    others = [m for m in lm.children() if not any(part is end for part in m.modules() for end in ends)]
    between = [m for m in others if next(m.parameters(), None) is not None]
    return between[0] if len(between) == 1 else None


SHAPES = {
    "logit_scale": "scale",
    "logits_scaling": "scale",
    "lm_head_multiplier": "scale",
    "final_logit_softcapping": "cap",
}
"""Settings of models' configs that scale or cap logits. A scale may be a factor or a divisor."""


def logit_shape(lm: Any) -> LogitShape:
    """What `lm` does to `hidden @ output embeddings (+ bias)` to get its logits, read from its config and confirmed by
    a tiny forward pass; `hidden` comes after the layers of `before_output`. Without it the fused loss, and every
    probability, would silently be wrong.

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
        layers = before_output(lm)
        hidden = seen[-1] if layers is None else layers(seen[-1])
        ours = nn.functional.linear(hidden.to(weight.dtype), weight, getattr(head, "bias", None))
        return ours.float(), theirs.float()

    try:
        with torch.no_grad(), attention.evaluating(lm), own_errors(lm):
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
