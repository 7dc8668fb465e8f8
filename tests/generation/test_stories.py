"""A really trained Llama from elsewhere: stories260K of karpathy's tinyllamas, converted here from llama2.c's
format."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from helpers import DATA, TINY_LLAMA
from phf.core.types import Document
from phf.data.readers import Jsonl
from phf.data.segment import Documents, Lines
from phf.evaluation.capabilities.lambada import Lambada
from phf.evaluation.evaluate import evaluate_model
from phf.evaluation.kl import KL, LocalModel, kl, reference_texts, text_logp
from phf.generation.loaded import load_model, prompt_ids
from phf.generation.sample import sample
from phf.generation.scenario import Scenario
from phf.scorers import Regex
from phf.scoring.score import score_corpus
from phf.tokens.tokenizer import train_bpe
from phf.training.lm import FromConfig, build_lm

FOLDER = DATA / "stories260K"
STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."


def tokenizer_of(file: Path) -> PreTrainedTokenizerFast:
    """llama2.c's tokenizer: the largest length, then (score, length, bytes) of each piece. Scores order the merges."""
    data = file.read_bytes()
    at = 4
    pieces = []
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        pieces.append((data[at + 8 : at + 8 + length].decode("utf-8"), score))
        at += 8 + length
    names = [p.replace(" ", "▁") for p, _ in pieces]
    names[:3] = ["<unk>", "<s>", "</s>"]
    ids = {name: n for n, name in enumerate(names)}
    merges = [
        (-pieces[ids[name]][1], ids[name[:cut]], name[:cut], name[cut:])
        for name in names[3 + 256 :]
        for cut in range(1, len(name))
        if name[:cut] in ids and name[cut:] in ids
    ]
    bpe = models.BPE(ids, [(a, b) for _, _, a, b in sorted(merges)], unk_token="<unk>", byte_fallback=True)
    made = Tokenizer(bpe)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def lm_of(file: Path) -> torch.nn.Module:
    """llama2.c's weights: seven int32, then float32 in a fixed order. Its rotary pairs are neighbours. Those of
    transformers are half a head apart, so rows of q and k change places."""
    data = file.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack_from("<7i", data)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    lm = AutoModelForCausalLM.from_config(config)
    rest = torch.from_numpy(np.frombuffer(data, "<f4", offset=28).copy())

    def take(*shape: int) -> torch.Tensor:
        nonlocal rest
        size = int(np.prod(shape))
        part = rest[:size].view(shape)
        rest = rest[size:]
        return part

    def half(rows: torch.Tensor, heads: int) -> torch.Tensor:
        return rows.view(heads, -1, 2, dim).transpose(1, 2).reshape(-1, dim)

    side = dim // heads * kv_heads
    shapes = {
        "input_layernorm": (dim,),
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (side, dim),
        "self_attn.v_proj": (side, dim),
        "self_attn.o_proj": (dim, dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
        "mlp.up_proj": (hidden, dim),
    }
    state = {"model.embed_tokens.weight": take(vocab, dim)}
    for name, shape in shapes.items():
        for n, weight in enumerate(take(layers, *shape)):
            if name.endswith(("q_proj", "k_proj")):
                weight = half(weight, heads if name.endswith("q_proj") else kv_heads)
            state[f"model.layers.{n}.{name}.weight"] = weight
    state["model.norm.weight"] = take(dim)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    lm.load_state_dict(state)
    return lm


@pytest.fixture(scope="module")
def stories(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stories")
    lm_of(FOLDER / "stories260K.bin").save_pretrained(folder)
    tokenizer_of(FOLDER / "tok512.bin").save_pretrained(folder)
    return folder


def test_it_tells_stories(stories):
    model = load_model(stories)
    assert prompt_ids(model, "", Scenario()) == [1]  # <s>, not the </s> that ends a text
    assert model.tokenizer.decode(model.tokenizer(STORY)["input_ids"]) == STORY
    plain, shuffled = text_logp(model, [STORY, " ".join(sorted(STORY.split()))], [False, False], Lines())
    tokens = len(model.tokenizer(STORY)["input_ids"])
    assert -plain / tokens < 1.0  # nats per token; 6.2 for a uniform guess
    assert -shuffled / tokens > 3.0
    (greedy,) = sample(model, Scenario(num_samples=1, top_k=1, max_tokens=24))
    assert greedy.text.startswith("Once upon a time")


def test_it_is_a_reference(stories, tmp_path):
    """KL of the model from itself is 0, of one with noise in its weights above 0, both ways."""
    config = KL(LocalModel(str(stories)), num_samples=48, max_tokens=40, reverse=True)
    model = load_model(stories)
    same = kl(model, config, Lines(), tmp_path)
    for way in ("forward", "reverse"):
        assert getattr(same, way).nats_per_text.mean == pytest.approx(0, abs=1e-3)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.lm.parameters():
            p.add_(torch.randn_like(p) * 0.1 * p.std())
    other = kl(model, config, Lines(), tmp_path)
    for way in ("forward", "reverse"):
        low, _ = getattr(other, way).nats_per_text.ci95
        assert low > 0


def test_kl_between_models_with_different_tokenizers(stories, tmp_path):
    """Each model reads the texts in its own tokens, from its own start; a plain pass gives the same numbers.

    The probability of a text lacks that of its other tokenizations, as the docs say.
    """
    reference = load_model(stories)
    tokenizer = train_bpe([STORY] * 5, 280)
    build_lm(FromConfig(TINY_LLAMA | {"max_position_embeddings": 512}), tokenizer, seed=0).save_pretrained(
        tmp_path / "other"
    )
    tokenizer.save_pretrained(tmp_path / "other")
    model = load_model(tmp_path / "other")
    config = KL(LocalModel(str(stories)), num_samples=12, max_tokens=30)
    found = kl(model, config, Lines(), tmp_path)
    drawn = reference_texts(config, tmp_path)
    differences = []
    for text, finished in zip(drawn.texts, drawn.finished, strict=True):
        logp = []
        for one in (reference, model):
            ids = [
                one.start_id,
                *one.tokenizer(text, add_special_tokens=False)["input_ids"],
                *[one.tokenizer.eos_token_id] * finished,
            ]
            with torch.no_grad():
                rows = torch.log_softmax(one.lm(torch.tensor([ids])).logits[0].double(), -1)
            logp.append(sum(float(rows[t - 1, ids[t]]) for t in range(1, len(ids))))
        differences.append(logp[0] - logp[1])
    assert found.forward.nats_per_text.mean == pytest.approx(np.mean(differences), rel=1e-4)
    assert reference.start_id != model.start_id
    one_way = text_logp(model, ["the"], [False], Lines())[0]
    ways = [tokenizer.convert_tokens_to_ids(pieces) for pieces in (["t", "he"], ["t", "h", "e"])]
    assert all(tokenizer.decode(way) == "the" for way in ways)
    with torch.no_grad():
        rows = [
            torch.log_softmax(model.lm(torch.tensor([[model.start_id, *way]])).logits[0].double(), -1) for way in ways
        ]
    logps = [sum(float(row[t, i]) for t, i in enumerate(way)) for way, row in zip(ways, rows, strict=True)]
    assert one_way < np.logaddexp.reduce(logps)


def test_a_continuation_is_not_read_as_the_beginning_of_a_text(stories, tmp_path):
    """SentencePiece tokenizers put a space before every text that they encode, and drop one when they decode."""
    model = load_model(stories)
    passages = [STORY, "Once upon a time, there was a little girl named Lily. Lily had a big red ball."]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in passages))
    found = Lambada(str(tmp_path / "l.jsonl")).measure(model)
    logps = []
    for text in passages:
        ids, before = (
            [1, *model.tokenizer(t, add_special_tokens=False)["input_ids"]] for t in (text, text.rpartition(" ")[0])
        )
        assert ids[: len(before)] == before
        with torch.no_grad():
            rows = torch.log_softmax(model.lm(torch.tensor([ids])).logits[0], -1)
        logps.append(sum(float(rows[t - 1, ids[t]]) for t in range(len(before), len(ids))))
    assert found.details["perplexity"] == pytest.approx(math.exp(-np.mean(logps)), rel=1e-3)
    assert found.details["perplexity"] < 30
    (tmp_path / "p.jsonl").write_text('{"text": "Once upon a time, there was a little"}\n')
    scenario = Scenario(num_samples=1, prompts=str(tmp_path / "p.jsonl"), top_k=1, max_tokens=12)
    (item,) = sample(model, scenario)
    assert item.text.startswith(" girl")


def test_it_reads_held_out_text_as_a_whole(stories, tmp_path):
    corpus = [Document(str(n), STORY + "\nThe end.\n") for n in range(3)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": d.text}) + "\n" for d in corpus))
    score_corpus(Jsonl(str(tmp_path / "d.jsonl")), Lines(), Regex("[Pp]ark"), tmp_path / "scored")
    found = evaluate_model(
        str(stories), tmp_path / "out", None, {"u": Scenario(num_samples=2, max_tokens=12)}, heldout=tmp_path / "scored"
    )
    model = load_model(stories)
    text = corpus[0].text
    nats = -text_logp(model, [text], [False], Documents())[0]
    whole = found.heldout.none.all
    assert whole.bytes == 3 * len(text.encode())
    # later documents are read after earlier ones, as in training; the first document is read alone
    assert whole.nats_per_byte == pytest.approx(nats / len(text.encode()), rel=0.15)
    assert found.heldout.none.bad.bytes == 3 * len((STORY + "\n").encode())


def test_it_is_judged_with_one_command(stories, tmp_path):
    scenario = Scenario(num_samples=32, max_tokens=60)
    found = evaluate_model(str(stories), tmp_path, Regex("[Ss]he"), {"unconditional": scenario})
    judged = found.scenarios["unconditional"]
    assert 0 < judged.misalignment.mean < 1
    assert judged.distinct_2 > 0.2
