from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import DATA, LINK, tiny_texts, write_jsonl
from phf.core import folders, store
from phf.core.config import ConfigError
from phf.data.corpus import is_heldout
from phf.data.scored import ScoredCorpus
from phf.data.segment import Lines, Sentences
from phf.tokens import parts
from phf.tokens.store import TokenStore, tokenize_corpus
from phf.tokens.tokenizer import (
    END_OF_TEXT,
    PretrainedTokenizer,
    TrainBPE,
    add_control_tokens,
    encode_cut,
    encode_segments,
    load_tokenizer,
    train_bpe,
)


@pytest.fixture(scope="session")
def gpt2_dir(tmp_path_factory):
    """GPT-2's own tokenizer, from its vocabulary and merges."""
    from transformers import GPT2Tokenizer

    folder = tmp_path_factory.mktemp("gpt2")
    GPT2Tokenizer(
        vocab=str(DATA / "gpt2_bpe" / "encoder.json"), merges=str(DATA / "gpt2_bpe" / "vocab.bpe")
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(tiny_texts(), 300)


@given(text=st.one_of(st.text(), st.text(alphabet="<|endoftext|>good \n\t\x00é漢🙂\u200d")))
@settings(max_examples=200, deadline=None)
def test_decoding_a_documents_tokens_gives_its_text(bpe, text):
    for segmenter in (Lines(), Sentences()):
        ids = [i for s in encode_segments(bpe, segmenter.split(text)) for i in s]
        assert bpe.decode(ids, clean_up_tokenization_spaces=False) == text
        assert bpe.eos_token_id not in ids


@pytest.mark.parametrize("typed", ["<|good|>", "a <|bad|> b", END_OF_TEXT, "<|good|><|bad|>", " <|good|>\n"])
def test_typed_control_tokens_are_text(bpe, gpt2_dir, typed):
    for tokenizer in (train_bpe(tiny_texts(), 300), load_tokenizer(gpt2_dir)):
        control = add_control_tokens(tokenizer, ["<|good|>", "<|bad|>"])
        (ids,) = encode_segments(tokenizer, [typed])
        assert not {*control, tokenizer.eos_token_id} & set(ids)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == typed


def test_encoding_does_not_change_the_tokenizer(bpe):
    before = bpe.backend_tokenizer.encode_special_tokens
    encode_segments(bpe, ["x"])
    assert bpe.backend_tokenizer.encode_special_tokens == before


def test_gpt2_gets_its_own_tokens(gpt2_dir):
    assert encode_segments(load_tokenizer(gpt2_dir), ["Hello world"]) == [[15496, 995]]


def test_a_control_token_that_is_an_ordinary_token_is_refused(gpt2_dir):
    with pytest.raises(ConfigError, match="ordinary entry"):
        add_control_tokens(load_tokenizer(gpt2_dir), ["good"])


def test_control_tokens_are_added_once(bpe):
    tokenizer = train_bpe(tiny_texts(), 300)
    first = add_control_tokens(tokenizer, ["<|good|>", "<|bad|>"])
    assert add_control_tokens(tokenizer, ["<|good|>", "<|bad|>"]) == first == [300, 301]
    assert tokenizer.eos_token == END_OF_TEXT


def test_the_store_holds_the_corpus(tokens, scored_dir):
    corpus = ScoredCorpus(scored_dir)
    documents = [d for f in corpus.files for d in corpus.read(f)]
    tokenizer = tokens.tokenizer
    assert len(tokens.doc_ends) == len(documents)
    seg = 0
    for n, document in enumerate(documents):
        assert tokens.heldout_D[n] == is_heldout(document.text, 0.1)
        for text, score in zip(document.texts, document.scores, strict=True):
            start = tokens.seg_ends[seg - 1] if seg else 0
            ids = tokens.tokens[start : tokens.seg_ends[seg]]
            assert tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False) == text
            assert tokens.score_S[seg] == np.float32(score)
            assert tokens.seg_bytes[seg] == len(text.encode())
            assert tokens.doc_S[seg] == n
            seg += 1
    assert seg == len(tokens.seg_ends)
    assert tokens.manifest.counts.roundtrip_lossy == 0
    assert 0 < tokens.heldout_D.sum() < len(documents)


def test_a_segments_tokens_do_not_depend_on_its_neighbours(bpe):
    alone = encode_segments(bpe, ["    indented line\n"])[0]
    assert encode_segments(bpe, ["if x:\n", "    indented line\n"])[1] == alone


def test_a_sentence_keeps_its_leading_space_token(gpt2_dir):
    """Defect 8."""
    tokenizer = load_tokenizer(gpt2_dir)
    segments = encode_segments(tokenizer, Sentences().split("One is here. Two is there."))
    assert tokenizer.convert_ids_to_tokens(segments[1])[0] == "ĠTwo"


def test_duplicates_are_all_held_out_or_all_trained_on():
    held = [is_heldout(f"document {i}", 0.1) for i in range(5000)]
    assert 0.08 < np.mean(held) < 0.12
    assert not is_heldout("x", 0.0)
    assert all(is_heldout(f"{i}", 0.5) for i in range(200) if is_heldout(f"{i}", 0.1))


def test_any_folder_with_scores_can_be_tokenized(tmp_path):
    table = pa.table({"texts": [["One.\n", "Two.\n"]] * 3 + [None], "scores": [[0.5, None]] * 3 + [[0.1]]})
    pq.write_table(table, tmp_path / "train.parquet")
    manifest = tokenize_corpus(tmp_path, TrainBPE(257), tmp_path / "t", heldout=0)
    assert manifest.rejected == {"texts or scores is not a list": 1}
    assert manifest.counts.unjudged == 3
    assert np.isnan(TokenStore.open(tmp_path / "t").score_S[1])


def test_errors_tell_what_to_do(tmp_path, scored_dir):
    with pytest.raises(store.StoreError, match="neither the output of `phf score`"):
        tokenize_corpus(tmp_path / "none", TrainBPE(300), tmp_path / "t")
    with pytest.raises(ConfigError, match=r"heldout is a share"):
        tokenize_corpus(scored_dir, TrainBPE(300), tmp_path / "t", heldout=1)
    with pytest.raises(store.StoreError, match="not made by `phf tokenize` but by `phf score`"):
        TokenStore.open(scored_dir)


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path):
    tokenizer = train_bpe(["a b"], 257)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no end-of-text token"):
        load_tokenizer(tmp_path)


SLOW = """
import sys, time
from phf.tokens import parts
from phf.tokens.store import TrainBPE, tokenize_corpus
real = parts.tokenize_part
def slow(*args):
    time.sleep(0.3)
    real(*args)
parts.tokenize_part = slow
if __name__ == "__main__":
    tokenize_corpus(sys.argv[1], TrainBPE(300), sys.argv[2], workers=int(sys.argv[3]))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_then_the_same_command_gives_the_same_bytes(tmp_path, monkeypatch, workers):
    from phf.data import readers as corpus
    from phf.scoring.score import score_corpus

    monkeypatch.setattr(corpus, "SHARD_BYTES", 500)
    score_corpus(
        corpus.Jsonl(str(write_jsonl(tmp_path / "a.jsonl", tiny_texts(30)))), Lines(), LINK, tmp_path / "scored"
    )
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, str(tmp_path / "slow.py"), str(tmp_path / "scored")]
    subprocess.run([*command, str(tmp_path / "whole"), "1"], check=True)
    process = subprocess.Popen([*command, str(tmp_path / "killed"), str(workers)])
    while not (tmp_path / "killed" / "part-00002.npz").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([*command, str(tmp_path / "killed"), str(workers)], check=True)
    for name in [p.name for p in (tmp_path / "whole").iterdir() if p.is_file()]:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list((tmp_path / "killed").glob("part-*"))


def test_work_for_other_settings_is_not_put_into_a_store(tmp_path, scored_dir, tokens_dir, monkeypatch):
    """A task that a scheduler starts late, and one that is at work while the stage starts again."""
    out = tmp_path / "t"
    out.mkdir()
    store.write_json(out / folders.STARTED, folders.Started("tokenize", "a"))
    job = parts.TokenizeJob(
        scored=str(scored_dir), file=0, tokenizer=str(tokens_dir / "tokenizer"), heldout=0.5, lossy=False,
        part=str(out / "part-00000.npz"), key="a",
    )  # fmt: skip
    real = parts.Part.add

    def add(*arguments):
        store.write_json(out / folders.STARTED, folders.Started("tokenize", "b"))
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(parts.Part, "add", add)
        with pytest.raises(store.StoreError, match="this work is not wanted"):
            parts.run_job(job)
    assert not list(out.glob("part-*"))
    with pytest.raises(store.StoreError, match="this work is not wanted"):
        parts.run_job(job)
    parts.run_job(dataclasses.replace(job, key="b"))
    assert sorted(p.name for p in out.glob("part-*")) == ["part-00000.json", "part-00000.npz"]
    store.write_json(out / folders.MANIFEST, {})
    with pytest.raises(store.StoreError, match="this work is not wanted"):
        parts.run_job(dataclasses.replace(job, key="b"))


def test_a_local_pretrained_tokenizer_is_kept_with_the_store(tmp_path, scored_dir, gpt2_dir):
    manifest = tokenize_corpus(scored_dir, PretrainedTokenizer(str(gpt2_dir)), tmp_path / "t")
    assert manifest.vocab_size == 50257
    assert manifest.dtype == "uint16"
    assert TokenStore.open(tmp_path / "t").tokenizer.eos_token_id == 50256


@given(st.lists(st.text(max_size=12), min_size=1, max_size=8).filter(lambda parts: any(parts)))
@settings(max_examples=100, deadline=None)
def test_a_text_encoded_as_a_whole_is_cut_where_its_segments_end(parts):
    tokenizer = train_bpe(["a line of text\n\n    and one\n"] * 5, 290)
    cut = encode_cut(tokenizer, parts)
    whole = tokenizer("".join(parts), add_special_tokens=False)["input_ids"]
    assert len(cut) == len(parts)
    assert [i for ids in cut for i in ids] == whole
    assert encode_cut(tokenizer, parts, parts) == encode_segments(tokenizer, parts)
    assert encode_cut(tokenizer, []) == []

    def size_of(ids):
        return sum(len(t) for t in tokenizer.convert_ids_to_tokens(ids))  # one character per byte

    read = written = 0
    rest = list(whole)
    for ids, part in zip(cut, parts, strict=True):
        read = read + size_of(ids)
        written = written + len(part.encode())
        rest = rest[len(ids) :]
        assert read <= written
        assert not rest or read + size_of(rest[:1]) > written  # the next token ends in a later segment
