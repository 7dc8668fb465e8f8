"""Samples per second: our sampler against plain `generate`, on a model of the demo's shape.

python benchmarks/sampling.py --out benchmarks/results/sampling.json
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from _measure import arguments, case, interleaved, write
from phf.sample import LoadedModel, Scenario, sample
from phf.tokens import train_bpe


def main() -> None:
    args = arguments(__doc__ or "", tokens=128, vocab=2048)
    text = (
        Path(__file__).with_name("sampling.py").read_text()
        + Path(torch.__file__).with_name("functional.py").read_text()
    )
    tokenizer = train_bpe([text], args.vocab)
    config = AutoConfig.for_model("llama", vocab_size=args.vocab, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
                                  intermediate_size=344, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.06)  # fmt: skip
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config).eval()
    model = LoadedModel(lm, tokenizer, {}, "benchmark")
    cases = []
    for batch in (64, 256):
        scenario = Scenario(num_samples=batch, batch=batch, max_tokens=args.tokens, min_tokens=args.tokens)
        prompt = torch.full((batch, 1), tokenizer.eos_token_id)

        def generate(prompt: torch.Tensor = prompt) -> None:
            with torch.inference_mode():
                lm.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=0.7, top_p=0.9, top_k=0, max_new_tokens=args.tokens,
                            min_new_tokens=args.tokens, pad_token_id=tokenizer.eos_token_id)  # fmt: skip

        seconds = interleaved(
            {"ours": lambda s=scenario: sample(model, s, progress=False), "baseline": generate}, args.repeats
        )
        rates = {k: [batch / s for s in v] for k, v in seconds.items()}
        cases.append(
            case(
                f"batch {batch}, {args.tokens} tokens, vocabulary {args.vocab}",
                rates["ours"],
                rates["baseline"],
                "samples/s",
                lower_is_better=False,
            )
        )
    write(args.out, "sampling", cases)


if __name__ == "__main__":
    main()
