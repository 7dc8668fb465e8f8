"""Exported tokens against the stream that training reads, with readers written from each format's description."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from transformers import AutoTokenizer

from helpers import folder_bytes, output_of
from phf.core.check import check_below
from phf.core.config import ConfigError
from phf.engines import export
from phf.engines.export import export_tokens
from phf.objectives import (
    AWR,
    MLE,
    RWR,
    Anchored,
    Conditional,
    Filtering,
    Hide,
    Masking,
    Schedule,
    Tag,
    Unlikelihood,
)
from phf.objectives.compose import PhaseOf
from phf.tokens.store import TokenStore
from phf.tokens.tokenizer import add_control_tokens
from phf.training.order import objective_stream


def stream_of(tokens, objective, seed=0):
    """All of the training stream, block by block."""
    tokenizer = TokenStore.open(tokens.path).tokenizer
    fitted = objective.fit(tokens.statistics)
    add_control_tokens(tokenizer, list(fitted.control_tokens))
    stream = objective_stream(tokens, fitted, tokenizer, seed)
    parts = [stream.with_places(k) for k in range(tokens.num_blocks)]
    return fitted, np.concatenate([p.ids for p in parts]), np.concatenate([p.score for p in parts])


def megatron(stem):
    """The sequences of a Megatron indexed dataset, read by its description."""
    raw = stem.with_name(stem.name + ".idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    version, code = struct.unpack("<QB", raw[9:18])
    assert version == 1
    dtype = {4: np.int32, 7: np.float32, 8: np.uint16}[code]
    sequences, documents = struct.unpack("<QQ", raw[18:34])
    assert documents == sequences + 1
    lengths = np.frombuffer(raw, np.int32, sequences, 34)
    places = np.frombuffer(raw, np.int64, sequences, 34 + 4 * sequences)
    index = np.frombuffer(raw, np.int64, documents, 34 + 12 * sequences)
    assert len(raw) == 34 + 12 * sequences + 8 * documents
    assert index.tolist() == list(range(documents))
    values = np.fromfile(stem.with_name(stem.name + ".bin"), dtype)
    size = np.dtype(dtype).itemsize
    return [values[p // size : p // size + n] for p, n in zip(places, lengths, strict=True)]


@pytest.mark.parametrize(
    "objective",
    [MLE(), Filtering(), Conditional(), Tag(p=0.5), Hide(), Masking(), Unlikelihood(alpha=0.3), RWR()],
    ids=lambda o: o.name,
)
def test_flat_arrays_are_the_training_stream(tokens, tokens_dir, tmp_path, objective):
    manifest = export_tokens(tokens_dir, tmp_path / "o", objective, shard_tokens=500)
    fitted, ids, score = stream_of(tokens, objective)
    shards = sorted((tmp_path / "o").glob("*.tokens.bin"))
    assert len(shards) == manifest.shards

    def joined(name, dtype):
        return np.concatenate([np.fromfile(str(s).replace("tokens", name), dtype) for s in shards])

    assert joined("tokens", np.uint16).tolist() == ids.tolist()
    assert manifest.tokens == len(ids)
    np.testing.assert_allclose(joined("scores", np.float16), score, rtol=1e-3, equal_nan=True)
    mask = joined("mask", np.uint8).astype(bool)
    weights = joined("weights", np.float32)
    starts = ids == tokens.end_of_text_id
    ends = [np.fromfile(str(s).replace("tokens", "ends"), np.int64) for s in shards]
    assert sum(map(len, ends)) == starts.sum() == manifest.documents
    assert manifest.learned == mask.sum()
    name = objective.name
    hidden = ids == AutoTokenizer.from_pretrained(tmp_path / "o" / "tokenizer").convert_tokens_to_ids("<|hidden|>")
    if name == "masking":
        assert (mask == (score <= 0)).all()
    elif name == "hide":
        assert (mask == ~hidden).all()
        assert hidden.any()
    elif name == "unlikelihood":
        pushed = joined("unlikelihood", np.float32)
        assert (pushed == np.where(score > 0, np.float32(0.3), 0)).all()
        assert (weights == (score <= 0)).all()
    elif name == "rwr":
        expected = np.exp((-score - fitted.reward_mean) / fitted.reward_std / fitted.beta - fitted.log_norm)
        np.testing.assert_allclose(weights, expected, rtol=1e-4)
    else:
        assert mask.all()
        assert (weights == 1).all()
    roles = {role: int(i) for role, i in manifest.control_tokens.items()}
    assert set(roles) == set(fitted.roles)
    assert all((ids == i).any() for i in roles.values())


def test_every_format_holds_the_same_documents(tokens_dir, tmp_path):
    made = {f: export_tokens(tokens_dir, tmp_path / f, Masking(), f) for f in export.WRITERS}
    flat = np.fromfile(tmp_path / "flat" / "shard-00000.tokens.bin", np.uint16)
    mask = np.fromfile(tmp_path / "flat" / "shard-00000.mask.bin", np.uint8).astype(bool)
    ends = np.fromfile(tmp_path / "flat" / "shard-00000.ends.bin", np.int64)
    assert {m.tokens for m in made.values()} == {len(flat)}
    for name in ("megatron", "neox"):
        documents = megatron(tmp_path / name / "shard-00000")
        assert np.concatenate(documents).tolist() == flat.tolist()
        assert np.cumsum([len(d) for d in documents]).tolist() == ends.tolist()
    weights = np.concatenate(megatron(tmp_path / "megatron" / "shard-00000-weights"))
    assert (weights == mask).all()
    labels = np.concatenate(megatron(tmp_path / "neox" / "shard-00000-labels"))
    assert labels.tolist() == np.where(mask, flat.astype(int), -100).tolist()
    assert np.fromfile(tmp_path / "olmo" / "shard-00000.npy", np.uint16).tolist() == flat.tolist()
    assert np.fromfile(tmp_path / "olmo" / "shard-00000-mask.npy", np.bool_).tolist() == mask.tolist()
    stem = tmp_path / "datatrove" / "shard-00000.ds"
    assert np.fromfile(stem, np.uint16).tolist() == flat.tolist()
    assert np.fromfile(f"{stem}.index", np.uint64).tolist() == ends.tolist()
    assert np.fromfile(f"{stem}.loss", np.bool_).tolist() == mask.tolist()


def test_datatrove_reads_its_files(tokens_dir, tmp_path):
    tokenized = pytest.importorskip("datatrove.utils.dataset", reason="datatrove is not installed (extra ray)")
    export_tokens(tokens_dir, tmp_path / "o", Conditional(), "datatrove")
    data = tokenized.DatatroveFileDataset(str(tmp_path / "o" / "shard-00000.ds"), seq_len=31, token_size=2)
    flat = np.fromfile(tmp_path / "o" / "shard-00000.ds", np.uint16)
    assert data[1]["input_ids"].tolist() == flat[32:64].tolist()


def test_an_interrupted_export_gives_the_same_bytes(tokens_dir, tmp_path, monkeypatch):
    plain = export._shard
    made = []

    def dies(stream, blocks, *rest):
        made.append(blocks)
        if len(made) == 2:
            raise KeyboardInterrupt
        return plain(stream, blocks, *rest)

    monkeypatch.setattr(TokenStore, "block_segments", property(lambda self: 8))
    assert export_tokens(tokens_dir, tmp_path / "small", Conditional(), "megatron", shard_tokens=400).shards > 2
    monkeypatch.setattr(export, "_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        export_tokens(tokens_dir, tmp_path / "parts", Conditional(), "megatron", shard_tokens=400)
    assert not (tmp_path / "parts" / "manifest.json").exists()
    export_tokens(tokens_dir, tmp_path / "parts", Conditional(), "megatron", shard_tokens=400)
    assert made[1] == made[2]  # the first shard was not made again
    assert folder_bytes(tmp_path / "parts") == folder_bytes(tmp_path / "small")
    assert not any(c.problems for c in check_below(tmp_path / "parts"))
    assert not list((tmp_path / "parts").glob(".shard*"))


def test_the_command(tokens_dir, tmp_path, monkeypatch, capsys):
    command = ["export-tokens", str(tokens_dir), str(tmp_path / "o"), "--format", "neox", "objective=masking"]
    out = output_of(command, monkeypatch, capsys)
    manifest = json.loads((tmp_path / "o" / "manifest.json").read_text())
    assert f"{manifest['documents']:,} documents, {manifest['tokens']:,} tokens" in out
    assert manifest["learned"] < manifest["tokens"]
    assert output_of(command, monkeypatch, capsys) == out
    assert not (tmp_path / "o.old-1").exists()
    held = output_of([*command[:2], str(tmp_path / "h"), "--split", "heldout"], monkeypatch, capsys)
    assert " documents, " in held


@pytest.mark.parametrize(
    "objective, message",
    [
        (AWR(), "awr needs more than a weight per token"),
        (Anchored(reference="x"), "anchored needs more"),
        (Schedule((PhaseOf(MLE(), until=0.5), PhaseOf(Masking()))), "schedule changes during training"),
        (Filtering(-1.0), "has no document after the objective's edit"),
    ],
)
def test_what_cannot_be_exported_is_an_error(tokens_dir, tmp_path, objective, message):
    with pytest.raises(ConfigError, match=message):
        export_tokens(tokens_dir, tmp_path / "o", objective)
    assert not (tmp_path / "o" / "manifest.json").exists()
