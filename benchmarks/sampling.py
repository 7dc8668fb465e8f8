"""Samples per second: our sampler against plain `generate`, on a model of the demo's shape.

    python benchmarks/sampling.py --out benchmarks/results/sampling.json

Cases: each side with its defaults, and both in the same number type. By default ours rounds its weights to bfloat16
where the processor is fast at it, and `generate` uses float32. tests/generation checks that both sides sample from
the same distribution.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from _measure import arguments, case, interleaved, write
from phf.generation.loaded import LoadedModel, precision_of
from phf.generation.sample import sample
from phf.generation.scenario import Scenario
from phf.tokens.tokenizer import train_bpe


def main() -> None:
    args = arguments(__doc__ or "", tokens=128, vocab=2048)
    text = (
        Path(__file__).with_name("sampling.py").read_text()
        + Path(torch.__file__).with_name("functional.py").read_text()
    )
    tokenizer = train_bpe([text], args.vocab)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=args.vocab,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=344,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.06,
    )
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config).eval()
    model = LoadedModel(lm, tokenizer, {}, "benchmark")
    rounded = copy.deepcopy(lm).to(torch.bfloat16)
    cases = []
    for batch in (64, 256):
        ours = {
            p: Scenario(num_samples=batch, batch=batch, max_tokens=args.tokens, min_tokens=args.tokens, precision=p)
            for p in ("auto", "fp32")
        }
        default = precision_of(model, ours["auto"])
        prompt = torch.full((batch, 1), tokenizer.eos_token_id)

        def generate(lm: Any, prompt: torch.Tensor = prompt) -> None:
            with torch.inference_mode():
                lm.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=True,
                    temperature=0.7,
                    top_p=0.9,
                    top_k=0,
                    max_new_tokens=args.tokens,
                    min_new_tokens=args.tokens,
                    pad_token_id=tokenizer.eos_token_id,
                )

        runs = {
            "ours": lambda: sample(model, ours["auto"], progress=False),  # noqa: B023
            "ours fp32": lambda: sample(model, ours["fp32"], progress=False),  # noqa: B023
            "generate fp32": lambda: generate(lm),
            "generate bf16": lambda: generate(rounded),
        }
        seconds = interleaved(runs, args.repeats)
        rates = {k: [batch / s for s in v] for k, v in seconds.items()}
        shape = f"batch {batch}, {args.tokens} tokens, vocabulary {args.vocab}"
        pairs = {
            f"{shape}, as used by default ({default}; fp32)": ("ours", "generate fp32"),
            f"{shape}, both fp32": ("ours fp32", "generate fp32"),
            f"{shape}, both bf16": ("ours", "generate bf16"),
        }
        for name, (one, other) in pairs.items():
            if name.endswith("both bf16") and default != "bf16":
                continue
            cases.append(case(name, rates[one], rates[other], "samples/s", lower_is_better=False))
    write(args.out, "sampling", cases)


if __name__ == "__main__":
    main()
