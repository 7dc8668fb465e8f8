"""The law of tokenizers over families: the ids of a text decode to the text, no special id occurs, every id fits."""

from __future__ import annotations

import json
import string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from helpers import tiny_texts, write_jsonl
from phf.core.config import ConfigError
from phf.core.extras import MissingPackage
from phf.data.readers import Jsonl
from phf.data.segment import Lines
from phf.scorers import Regex
from phf.scoring.score import score_corpus
from phf.tokens.store import TokenStore, tokenize_corpus
from phf.tokens.tokenizer import (
    PretrainedTokenizer,
    add_control_tokens,
    encode_segments,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    table_size,
)
from phf.tokens.vocabulary import Vocabulary

TEXTS = [*tiny_texts(60), string.printable, "def f(a):\n    if a:\n        return 1\n"] * 3
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(special=("<|endoftext|>",), prefix=False) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(special), initial_alphabet=BYTES, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def sentencepiece(prepend=True, scheme=None) -> Tokenizer:
    """BPE with byte fallback, as in Llama 2 (a normalizer that prepends) or Mistral (Metaspace)."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace
    strip = [decoders.Strip(" ", 1, 0)] if prepend else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    if scheme is not None:
        made.normalizer = None
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        made.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme), decoders.Fuse()]
        )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    made.train_from_iterator([t.replace(" ", "▁") for t in TEXTS], trainer)
    spec = json.loads(made.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
    made = Tokenizer.from_str(json.dumps(spec))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def changed(tokenizer: Tokenizer, change) -> Tokenizer:
    spec = json.loads(tokenizer.to_str())
    change(spec)
    return Tokenizer.from_str(json.dumps(spec))


def truncating() -> Tokenizer:
    made = byte_level()
    made.enable_truncation(8)
    made.enable_padding(length=8, pad_id=0, pad_token="<|endoftext|>")
    return made


def with_gap() -> Tokenizer:
    def far(spec):
        vocab = spec["model"]["vocab"]
        last = max(vocab, key=vocab.get)
        vocab[last] += 300

    return changed(byte_level(), far)


def plain_eos(spec):
    spec["added_tokens"][0]["special"] = False


def no_added(spec):
    spec["added_tokens"] = []


def with_stripping_token() -> Tokenizer:
    made = byte_level(("<|endoftext|>", "<mask>"))
    made.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    return made


GPT = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
LLAMA = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
FAMILIES = {
    "byte-level BPE": (byte_level, GPT),
    "byte-level with a prefix space": (lambda: byte_level(prefix=True), GPT),
    "byte-level, ignoring merges": (
        lambda: changed(byte_level(), lambda s: s["model"].update(ignore_merges=True)),
        GPT,
    ),
    "truncation and padding saved": (truncating, GPT),
    "ids with a hole": (with_gap, GPT),
    "end-of-text not marked as special": (lambda: changed(byte_level(), plain_eos), GPT),
    "end-of-text an ordinary entry": (lambda: changed(byte_level(), no_added), GPT),
    "a special token that takes spaces": (with_stripping_token, GPT | {"mask_token": "<mask>"}),
    "llama 2": (sentencepiece, LLAMA),
    "gemma": (lambda: sentencepiece(prepend=False), LLAMA),
    "mistral": (lambda: sentencepiece(scheme="first"), LLAMA),
    "metaspace always": (lambda: sentencepiece(scheme="always"), LLAMA),
}
CONTROL = ("<|good|>", "<|bad|>")


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    found = {}
    for number, (name, (make, tokens)) in enumerate(FAMILIES.items()):
        folder = root / str(number)
        PreTrainedTokenizerFast(tokenizer_object=make(), **tokens).save_pretrained(str(folder))
        if name == "truncation and padding saved":  # transformers resets them when it saves
            make().save(str(folder / "tokenizer.json"))
        found[name] = folder
    return found


def assert_law(tokenizer, segments: list[str]) -> None:
    ids = [i for part in encode_segments(tokenizer, segments) for i in part]
    assert not set(ids) & set(special_ids(tokenizer))
    assert max(ids, default=0) < table_size(tokenizer)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == "".join(segments)


some_texts = st.lists(
    st.text(st.sampled_from("ab \n\t.é日🙂A0"), min_size=1, max_size=12)
    | st.sampled_from(["<|endoftext|>", "</s>", "<s>", "<unk>", "<mask>", "<|good|>", " <|bad|>", "    if a:\n"]),
    max_size=5,
)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some_texts)
@example(["def half(a):\n", "    if a:\n", "        return 1\n"])
@example(["a </s> b <|endoftext|> c<unk>", " <mask> d"])
def test_the_ids_of_a_text_decode_to_it_and_hold_no_special_token(families, name, segments):
    tokenizer = load_tokenizer(families[name])
    assert_law(tokenizer, segments)
    ids = add_control_tokens(tokenizer, CONTROL)
    assert len(set(ids)) == 2
    assert_law(tokenizer, [*segments, "".join(CONTROL)])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_tokenizer_reads_texts_alike_also_with_plain_from_pretrained(families, name, tmp_path):
    tokenizer = load_tokenizer(families[name])
    add_control_tokens(tokenizer, CONTROL)
    save_tokenizer(tokenizer, tmp_path)
    text = "a long line of words that goes further than eight tokens\n"
    (ids,) = encode_segments(tokenizer, [text])
    assert encode_segments(load_tokenizer(tmp_path), [text]) == [ids]
    assert AutoTokenizer.from_pretrained(str(tmp_path))(text, add_special_tokens=False)["input_ids"] == ids


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_ids_are_read_alike_without_transformers(families, name, tmp_path):
    saved = load_tokenizer(families[name])
    saved.save_pretrained(str(tmp_path))  # as a token store does
    for names in (CONTROL, ("<|good|>", saved.eos_token), CONTROL[::-1]):
        tokenizer = load_tokenizer(tmp_path)
        vocabulary = Vocabulary(tmp_path)
        assert (vocabulary.eos_token, vocabulary.eos_token_id) == (tokenizer.eos_token, tokenizer.eos_token_id)
        assert vocabulary.get_vocab() == tokenizer.get_vocab()
        assert add_control_tokens(vocabulary, names) == add_control_tokens(tokenizer, names)
        assert vocabulary.get_vocab() == tokenizer.get_vocab()
        assert table_size(vocabulary) == table_size(tokenizer)
    with pytest.raises(ConfigError, match="ordinary entry"):
        add_control_tokens(vocabulary, [next(n for n, i in tokenizer.get_vocab().items() if i == 300)])
    with pytest.raises(MissingPackage, match=r"phf\[train\]"):
        encode_segments(vocabulary, ["text"])


@pytest.mark.parametrize("name", ["llama 2", "ids with a hole", "truncation and padding saved"])
def test_a_store_holds_the_texts_that_were_scored(families, name, tmp_path):
    texts = ["def half(a):\n    if a:\n        return a / 2\n" * 9, "see <|endoftext|> </s>\n"]
    score_corpus(Jsonl(str(write_jsonl(tmp_path / "a.jsonl", texts))), Lines(), Regex("x"), tmp_path / "s")
    manifest = tokenize_corpus(tmp_path / "s", PretrainedTokenizer(str(families[name])), tmp_path / "t", heldout=0)
    store = TokenStore.open(tmp_path / "t")
    start = 0
    for text, end in zip(texts, store.doc_ends, strict=True):
        stop = store.seg_ends[end - 1]
        assert store.tokenizer.decode(store.tokens[start:stop], clean_up_tokenization_spaces=False) == text
        start = stop
    assert manifest.vocab_size == table_size(store.tokenizer) > max(store.tokens)
    assert manifest.counts.roundtrip_lossy == 0


def lower() -> Tokenizer:
    made = byte_level()
    made.normalizer = normalizers.Lowercase()
    return made


def word_level() -> Tokenizer:
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(vocab_size=100, special_tokens=["<unk>", "<eos>"], show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    return made


@pytest.mark.parametrize(
    "make, tokens, message",
    [
        (lower, GPT, r"do not decode to its text.* the text is 'A line"),
        (word_level, {"eos_token": "<eos>", "unk_token": "<unk>"}, "cannot write some of its characters"),
    ],
)
def test_a_tokenizer_that_changes_texts_is_an_error_unless_it_is_accepted(tmp_path, make, tokens, message):
    PreTrainedTokenizerFast(tokenizer_object=make(), **tokens).save_pretrained(str(tmp_path / "tok"))
    path = write_jsonl(tmp_path / "a.jsonl", ["A line of text <eos>\n", "more\n"])
    score_corpus(Jsonl(str(path)), Lines(), Regex("x"), tmp_path / "s")
    given_tokenizer = str(tmp_path / "tok")
    with pytest.raises(ConfigError, match=message):
        tokenize_corpus(tmp_path / "s", PretrainedTokenizer(given_tokenizer), tmp_path / "t", heldout=0)
    accepted = PretrainedTokenizer(given_tokenizer, lossy=True)
    assert tokenize_corpus(tmp_path / "s", accepted, tmp_path / "t", heldout=0).counts.roundtrip_lossy > 0
    store = TokenStore.open(tmp_path / "t")
    assert store.end_of_text_id not in np.asarray(store.tokens)
