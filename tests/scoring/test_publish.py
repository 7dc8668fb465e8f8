"""Scored corpora on a Hub: pushed, loaded, streamed and scored again. The Hub is a real server on loopback; the client
runs in processes of its own, because it reads its address when it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from fakehub import FakeHub
from helpers import LINK, TINY_LLAMA
from phf.core import store
from phf.data.scored import ScoredCorpus
from phf.generation.sample import read_samples
from phf.scorers import Regex
from phf.scoring.publish import data_card
from phf.scoring.score import add_scores
from phf.tokens.tokenizer import train_bpe
from phf.training.lm import FromConfig, build_lm


@pytest.fixture
def hub(tmp_path):
    with FakeHub() as running:
        running.env = os.environ | {
            "HF_ENDPOINT": running.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": "hf_test",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        yield running


def phf(hub, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "phf", *arguments], env=hub.env, capture_output=True, text=True)


@pytest.fixture
def scored(scored_dir, tmp_path):
    """A copy, with other scores in addition to its own."""
    import shutil

    folder = tmp_path / "scored"
    shutil.copytree(scored_dir, folder)
    add_scores(folder, Regex("cats"), "cats")
    return folder


def test_a_pushed_corpus_loads_streams_and_can_be_tokenized(hub, scored, tmp_path):
    pushed = phf(hub, "push", str(scored), "me/tiny-scored")
    assert pushed.returncode == 0, pushed.stderr
    files = hub.repos["datasets", "me/tiny-scored"]
    assert {
        "part-00000.parquet",
        "manifest.json",
        "README.md",
        "scores/cats/part-00000.parquet",
        "scores/cats/manifest.json",
    } == set(files)
    code = """
import datasets, json, sys
whole = datasets.load_dataset("me/tiny-scored", split="train")
streamed = list(datasets.load_dataset("me/tiny-scored", split="train", streaming=True))
assert whole.to_list() == streamed
print(json.dumps([r["texts"] for r in streamed]))
"""
    loaded = subprocess.run([sys.executable, "-c", code], env=hub.env, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    import json

    own = ScoredCorpus(scored)
    assert json.loads(loaded.stdout) == [list(d.texts) for d in own.read(own.files[0])]
    done = phf(hub, "tokenize", "hf://datasets/me/tiny-scored", str(tmp_path / "tokens"), "--vocab-size", "300")
    assert done.returncode == 0, done.stderr
    local = phf(hub, "tokenize", str(scored), str(tmp_path / "local"), "--vocab-size", "300")
    assert local.returncode == 0, local.stderr
    for name in ("tokens.bin", "regex.score.bin", "cats.score.bin", "seg_ends.bin"):
        assert (tmp_path / "tokens" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_published_dataset_can_be_scored_again_in_its_segments(hub, scored, tmp_path, streaming):
    assert phf(hub, "push", str(scored), "me/tiny-scored").returncode == 0
    settings = [f"scorer.pattern={LINK.pattern}", "corpus.field=texts", f"corpus.streaming={streaming}"]
    options = ["--scorer", "regex", "--segmenter", "given"]
    done = phf(hub, "score", "hf://datasets/me/tiny-scored", str(tmp_path / "again"), *options, *settings)
    assert done.returncode == 0, done.stderr
    first = ScoredCorpus(scored)
    again = ScoredCorpus(tmp_path / "again")
    assert [(d.texts, d.scores) for d in first.read(first.files[0])] == [
        (d.texts, d.scores) for f in again.files for d in again.read(f)
    ]


def test_one_file_of_a_data_set_is_a_corpus(hub, scored, tmp_path):
    assert phf(hub, "push", str(scored), "me/tiny-scored").returncode == 0
    path = "hf://datasets/me/tiny-scored/part-00000.parquet"
    done = phf(hub, "score", path, str(tmp_path / "s"), "--scorer", "pep8", "corpus.field=texts")
    assert done.returncode == 0, done.stderr


def test_a_capability_reads_files_of_the_hub(hub, tmp_path):
    rows = [{"text": "the model reads a line"}, {"text": "cats and dogs"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "l.parquet")
    files = {
        "data/l.jsonl": "".join(json.dumps(r) + "\n" for r in rows).encode(),
        "l.parquet": (tmp_path / "l.parquet").read_bytes(),
    }
    hub.repos["datasets", "me/lambada"] = files
    code = """
import sys
from phf.evaluation.capabilities import Glue, HumanEval, Lambada
from phf.evaluation.capabilities.base import local_file, rows_of
from phf.core.config import ConfigError
at = "hf://datasets/me/lambada/"
one, two = (rows_of(at + name, ["text"]) for name in ("data/l.jsonl", "l.parquet"))
assert one == two and [r["text"] for r in one][1] == "cats and dogs", (one, two)
assert len({*Lambada(at + "data/l.jsonl").inputs(), *Lambada(at + "l.parquet").inputs()}) == 2
for wrong in (at + "no.jsonl", "hf://datasets/me"):
    try:
        local_file(wrong)
    except ConfigError as error:
        assert wrong in str(error)
    else:
        raise AssertionError(wrong)
"""
    done = subprocess.run([sys.executable, "-c", code], env=hub.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_model_of_the_hub_is_judged_again_where_its_name_stands_for_another_commit(hub, tmp_path):
    tokenizer = train_bpe(["the model reads a line"] * 3, 260)

    def push(seed):
        lm = build_lm(FromConfig(TINY_LLAMA), tokenizer, seed)
        lm.save_pretrained(tmp_path / str(seed))
        tokenizer.save_pretrained(tmp_path / str(seed))
        hub.repos["models", "me/tiny"] = {f.name: f.read_bytes() for f in (tmp_path / str(seed)).iterdir()}

    def judged(*options):
        out = str(tmp_path / "out")
        settings = ["scorer.pattern=e", "num_samples=4", "max_tokens=8", "min_tokens=1"]
        done = phf(hub, "eval", "me/tiny", "--out", out, "--scorer", "regex", *settings, *options)
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "out" / "eval.json").read_text())
        return found["key"], [s.logp for s in read_samples(tmp_path / "out" / "samples" / "unconditional.jsonl")]

    push(0)
    first = judged("--revision", "v2")
    push(1)
    hub.commit = "b" * 40
    second = judged("--revision", "v2")
    assert second[0] != first[0]
    assert second[1] != first[1]
    assert any("/resolve/v2/config.json" in path for _, path in hub.log)


def test_what_is_not_there_or_not_ours_is_said(hub, tmp_path):
    missing = phf(hub, "score", "hf://datasets/me/nothing", str(tmp_path / "s"), "--scorer", "pep8")
    assert missing.returncode == 2
    assert "me/nothing" in missing.stderr
    assert "Traceback" not in missing.stderr
    (tmp_path / "empty").mkdir()
    refused = phf(hub, "push", str(tmp_path / "empty"), "me/x")
    assert refused.returncode == 2
    assert "neither the output of `phf score` nor a folder of Parquet files" in refused.stderr


def test_the_card_names_the_scorer_and_failures(scored):
    card = data_card(ScoredCorpus(scored), "me/tiny")
    head = yaml.safe_load(card.split("---")[1])
    assert head["configs"][0]["data_files"][0]["path"] == "part-*.parquet"
    counts = ScoredCorpus(scored).manifest.counts
    assert f"| segments | {counts.segments:,} |" in card
    assert "None: every segment was judged." in card
    assert "`scores/cats/`: matches per character" in card
    assert "Scored by `regex`" in card
    corpus = ScoredCorpus(scored)
    assert str(Path(corpus.manifest.corpus["path"]).parent) not in card  # no place on this machine


def test_a_place_with_spaces_is_shared_by_its_name(tmp_path):
    (tmp_path / "my dir" / "sub dir").mkdir(parents=True)
    assert store.without_places({"path": str(tmp_path / "my dir" / "sub dir")}) == {"path": "sub dir"}


@pytest.mark.parametrize(
    "value, public",
    [
        ({"path": "/home/me/data/a.jsonl"}, {"path": "a.jsonl"}),
        ({"path": "~/words.txt", "n": 1}, {"path": "words.txt", "n": 1}),
        ({"paths": ["./a", "../b/c"]}, {"paths": ["a", "c"]}),
        ({"function": "/home/me/mine.py:score"}, {"function": "mine.py:score"}),
        ({"about": "cannot read a:/home/me/x y"}, {"about": "cannot read a:x y"}),
        ({"a": "//home/me/x.txt", "b": "file:/home/me/x"}, {"a": "x.txt", "b": "x"}),
        ({"a": "\\\\srv\\share\\x"}, {"a": "x"}),
        ({"path": "owner/name", "url": "https://h/v1"}, {"path": "owner/name", "url": "https://h/v1"}),
        (
            {"path": "hf://datasets/a/b", "pattern": "/etc/passwd"},
            {"path": "hf://datasets/a/b", "pattern": "/etc/passwd"},
        ),
    ],
)
def test_what_is_shared_names_no_place_on_this_machine(value, public):
    assert store.without_places(value) == public
