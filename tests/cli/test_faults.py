"""Faults that a campaign and a review found: each keeps what the user has, and is one message."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import LINK, phf_inside, tiny_texts, train_tiny, write_jsonl
from phf.core import store
from phf.core.check import check_below
from phf.core.config import ConfigError, parse_yaml, validate
from phf.core.runs import complete_checkpoints, incomplete_checkpoints, places, read_lines, remove_checkpoint
from phf.data.readers import Folder, Jsonl
from phf.data.scored import ScoredCorpus
from phf.data.segment import Lines, known_segmenter
from phf.evaluation.evaluate import evaluate_model
from phf.generation.loaded import load_model
from phf.generation.scenario import Scenario
from phf.scorers import AnyScorer, Function
from phf.scorers.fitting import fit_scorer
from phf.scorers.labels import read_labels
from phf.scoring.score import score_corpus
from phf.tokens.store import TokenStore, tokenize_corpus
from phf.tokens.tokenizer import TrainBPE


def phf(*args, cwd, **env) -> subprocess.CompletedProcess:
    """The command line: in this process, or in one of its own if variables are given."""
    if not env:
        return phf_inside(*args, cwd=cwd)
    return subprocess.run(
        [sys.executable, "-m", "phf", *args], cwd=cwd, capture_output=True, text=True, env=os.environ | env, timeout=300
    )


@pytest.fixture
def scored(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", tiny_texts(20))
    score_corpus(Jsonl(str(path)), Lines(), LINK, tmp_path / "scored")
    return tmp_path / "scored"


def change(file, **changes):
    store.write_json(file, store.read_json(file) | changes)


def test_only_checkpoints_by_name_are_checkpoints_and_user_files_stay(tmp_path):
    for name in ("checkpoint-8", "checkpoint-16", "checkpoint-16.old-1", "checkpoint-8-copy", "checkpoint-best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("x")
        if name not in ("checkpoint-16", "checkpoint-best"):
            (tmp_path / name / "complete.json").write_text("{}")
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["checkpoint-8"]
    assert [p.name for p in incomplete_checkpoints(tmp_path)] == ["checkpoint-16"]
    (tmp_path / "checkpoint-8" / "my notes.txt").write_text("mine")
    remove_checkpoint(tmp_path / "checkpoint-8")
    remove_checkpoint(tmp_path / "checkpoint-16")
    assert [p.name for p in (tmp_path / "checkpoint-8").iterdir()] == ["my notes.txt"]
    assert not (tmp_path / "checkpoint-16").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: (c / "complete.json").write_text('{"step": 1'),
        lambda c: (c / "optimizer.pt").unlink(),
        lambda c: (c / "scheduler.pt").write_bytes(b""),
        lambda c: change(c / "complete.json", key="of another run"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tokens_dir, tmp_path, capsys, spoil):
    whole = train_tiny(tokens_dir, tmp_path / "whole", steps=6, save_every=1024)
    train_tiny(tokens_dir, tmp_path / "r", steps=6, save_every=1024, stop_after=4)
    newest = complete_checkpoints(tmp_path / "r" / "checkpoints")[-1]
    spoil(newest)
    capsys.readouterr()
    assert train_tiny(tokens_dir, tmp_path / "r", steps=6, save_every=1024).key == whole.key
    assert f"{newest} is damaged" in capsys.readouterr().err
    first, second = ((tmp_path / n / "model" / "model.safetensors").read_bytes() for n in ("whole", "r"))
    assert first == second
    assert train_tiny(tokens_dir, tmp_path / "r", steps=6, save_every=1024).key == whole.key


@pytest.mark.parametrize("name", ["../escaped", "/tmp/x", "", 5, None])
def test_a_name_in_a_manifest_cannot_leave_a_folder(scored, tmp_path, name):
    change(scored / "manifest.json", identity={"name": name})
    with pytest.raises(store.StoreError, match="no name that can name a file|identity"):
        tokenize_corpus(scored, TrainBPE(300), tmp_path / "tokens")
    assert not list(tmp_path.parent.glob("*escaped*"))


def test_no_address_is_opened_because_a_manifest_names_it(scored, tmp_path):
    tokenize_corpus(scored, TrainBPE(300), tmp_path / "tokens", heldout=0.2)
    train_tiny(tmp_path / "tokens", tmp_path / "run", steps=1)
    change(tmp_path / "tokens" / "manifest.json", scored="http://127.0.0.1:9/evil", scored_from_here=None)
    with pytest.raises(store.StoreError, match="opens no address that only a manifest names"):
        evaluate_model(
            str(tmp_path / "run" / "model"),
            tmp_path / "out",
            LINK,
            {"u": Scenario(2, max_tokens=4, min_tokens=1)},
            heldout=tmp_path / "tokens",
        )
    assert places("data/tokens", "../tokens", tmp_path / "run")[0] == tmp_path / "tokens"


def test_files_of_the_user_are_kept(scored, tmp_path):
    tokenize_corpus(scored, TrainBPE(300), tmp_path / "tokens", heldout=0.2)
    train_tiny(tmp_path / "tokens", tmp_path / "run", steps=1)
    (tmp_path / "notes.jsonl").write_text("mine")
    done = phf("sample", "run", "notes.jsonl", "num_samples=2", "max_tokens=4", "min_tokens=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "notes.jsonl.old-1").read_text() == "mine"
    (tmp_path / "page.html").write_text("mine")
    (tmp_path / "page.json").write_text("mine")
    for _ in range(2):
        assert phf("inspect", "scored", "--out", "page.html", cwd=tmp_path).returncode == 0
    assert (tmp_path / "page.html.old-1").read_text() == (tmp_path / "page.json.old-1").read_text() == "mine"
    assert not (tmp_path / "page.html.old-2").exists()
    (tmp_path / "mine" / "samples").mkdir(parents=True)
    (tmp_path / "mine" / "samples" / "unconditional.jsonl").write_text("mine")
    refused = phf("eval", "run/model", "--scorer", "regex", "scorer.pattern=x", "--out", "mine", cwd=tmp_path)
    assert (refused.returncode, "was not made by `phf eval`" in refused.stderr) == (2, True)
    assert (tmp_path / "mine" / "samples" / "unconditional.jsonl").read_text() == "mine"


def test_a_scorer_may_be_fitted_into_a_link_and_files_have_ordinary_permissions(tmp_path, tokens_dir):
    rows = [{"text": f"{'awful' if n % 2 else 'nice'} {n}", "label": n % 2} for n in range(100)]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    labels = read_labels(tmp_path / "l.jsonl")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real").mkdir()
    (tmp_path / "scorer").symlink_to(tmp_path / "disk" / "real")
    fit_scorer(labels, tmp_path / "scorer")
    fit_scorer(labels, tmp_path / "scorer", seed=1)
    assert (tmp_path / "scorer").is_symlink()
    assert (tmp_path / "disk" / "real.old-1" / "scorer.json").exists()
    train_tiny(tokens_dir, tmp_path / "run", steps=1)
    for file in (tmp_path / "scorer" / "weights.safetensors", tmp_path / "run" / "model" / "model.safetensors"):
        assert file.stat().st_mode & 0o044 == 0o044


IMPORTS = {
    "raises": "raise RuntimeError('no')",
    "leaves": "import sys; sys.exit(0)",
    "lacks": "import nothing_like_this",
    "broken": "def f(:",
}


@pytest.mark.parametrize("name", IMPORTS)
def test_a_function_whose_file_cannot_be_imported_is_one_message(tmp_path, name):
    (tmp_path / "f.py").write_text(IMPORTS[name])
    with pytest.raises(ConfigError, match=r"cannot import .*f.py: \w+: .*line \d"):
        Function(f"{tmp_path / 'f.py'}:f").score_text("a")


def test_yaml_cannot_grow_by_merge_keys_or_aliases():
    keys = ", ".join(f"k{n}: 1" for n in range(10))
    merges = f"a0: &a0 {{{keys}}}\n" + "".join(
        f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}], x{n}: 1}}\n" for n in range(1, 7)
    )
    aliases = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
    )
    for text in (merges, aliases, "[" * 5000, "a: &a [*a]"):
        with pytest.raises(ConfigError):
            parse_yaml(text, "recipe")


@pytest.mark.parametrize("text", ["[]", "5", "null", '"x"', "{", "", '{"stage": 5}', "[" * 100_000])
def test_manifests_of_any_shape_are_one_message(scored, tmp_path, text):
    (scored / "manifest.json").write_text(text)
    for command in (["tokenize", "scored", "t"], ["inspect", "scored"], ["check", "scored"]):
        done = phf(*command, cwd=tmp_path)
        assert done.returncode == 2, (command, done.stderr)
        assert "Traceback" not in done.stderr


def test_what_stands_in_a_manifest_is_checked(scored, tmp_path):
    with pytest.raises(ConfigError, match="segmenter"):
        known_segmenter({"name": "bogus"})
    with pytest.raises(ConfigError, match="segmenter"):
        known_segmenter({})
    change(scored / "manifest.json", files={"../../etc/passwd": {"size": 1, "hash": "x"}})
    with pytest.raises(store.StoreError, match="not a name in the folder"):
        ScoredCorpus(scored)
    (checked,) = check_below(scored)
    assert checked.problems


def test_an_unexpected_exception_is_one_line_and_a_traceback_on_request(tmp_path):
    code = (
        "import phf.cli, phf.core.check, sys\n"
        "def broken(folder): raise KeyError('context')\n"
        "phf.core.check.check_below = broken\n"
        "sys.argv = ['phf', 'check', '.']\nphf.cli.main()\n"
    )
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert plain.returncode == 70
    assert plain.stderr.startswith("error: KeyError: 'context' (")
    assert len(plain.stderr.splitlines()) == 1
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PHF_TRACEBACK": "1"}
    )
    assert "Traceback" in shown.stderr


def test_torn_lines_are_told(tmp_path, capsys):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n[1]\n{"step": 2}\n{"st')
    assert [line["step"] for line in read_lines(tmp_path / "m.jsonl")] == [1, 2]
    assert "2 lines left out (first: line 2)" in capsys.readouterr().err


def test_links_to_folders_are_read_and_broken_links_told(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.txt").write_text("b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.txt").write_text("a")
    (tmp_path / "c" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "c" / "loop").symlink_to(tmp_path / "c")
    (tmp_path / "c" / "gone.txt").symlink_to(tmp_path / "nothing")
    corpus = Folder(str(tmp_path / "c"))
    assert [item.text for shard in corpus.plan() for item in corpus.read(shard)] == ["a", "b"]
    assert corpus.left_out() == ["gone.txt (a broken link)"]


SCORERS = {
    "exits": "def f(text): raise SystemExit(0)",
    "is no Exception": "class Odd(BaseException): pass\ndef f(text): raise Odd('x')",
    "has no message": "class Odd(Exception):\n    def __str__(self): raise ValueError\ndef f(text): raise Odd",
    "has a surrogate": "def f(text): raise ValueError('\\udc80')",
    "is out of memory": "def f(text): raise MemoryError",
    "overflows": "def f(text): return 1e300",
}


@pytest.mark.parametrize("name", SCORERS)
def test_whatever_a_function_raises_is_a_segment_that_is_not_judged(tmp_path, name):
    (tmp_path / "f.py").write_text(SCORERS[name])
    path = write_jsonl(tmp_path / "a.jsonl", ["one\n", "two\n"])
    function = Function(f"{tmp_path / 'f.py'}:f")
    manifest = score_corpus(Jsonl(str(path)), Lines(), function, tmp_path / "s", max_unjudged=1)
    assert manifest.counts.unjudged == 2
    assert sum(manifest.failures.values()) == 2
    assert "a.jsonl" in next(iter(manifest.examples.values()))


@pytest.mark.parametrize("pattern", ["a{1000000000}", "(?:(?:(?:a{1000}){1000}){1000})", "(", "[z-a]"])
def test_patterns_that_cannot_be_used_are_one_message(pattern):
    with pytest.raises(ConfigError, match="pattern"):
        validate({"name": "regex", "pattern": pattern}, AnyScorer)


def test_devices_and_links_are_not_replaced(scored, tmp_path):
    tokenize_corpus(scored, TrainBPE(300), tmp_path / "tokens", heldout=0.2)
    train_tiny(tmp_path / "tokens", tmp_path / "run", steps=1)
    (tmp_path / "real.jsonl").write_text("mine")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    os.mkfifo(tmp_path / "pipe")
    for place in ("link.jsonl", "pipe", "scored"):
        refused = phf("sample", "run", place, "num_samples=1", "max_tokens=2", "min_tokens=1", cwd=tmp_path)
        assert (refused.returncode, "ordinary file" in refused.stderr) == (2, True), refused.stderr
    assert (tmp_path / "real.jsonl").read_text() == "mine"
    assert (tmp_path / "pipe").is_fifo()


def test_control_tokens_that_the_tokenizer_lacks_are_an_error(scored, tmp_path):
    tokenize_corpus(scored, TrainBPE(300), tmp_path / "tokens", heldout=0.2)
    train_tiny(tmp_path / "tokens", tmp_path / "run", steps=1)
    for tokens in ({"good": "zzz", "bad": "yyy"}, {"good": "a", "bad": "a"}):
        change(tmp_path / "run" / "model" / "phf.json", control_tokens=tokens)
        with pytest.raises(ConfigError, match="control tokens that its tokenizer lacks"):
            load_model(tmp_path / "run" / "model")


@pytest.mark.parametrize("place", [".", ".."])
def test_a_result_that_the_command_runs_in_is_neither_moved_nor_mixed(tmp_path, place):
    write_jsonl(tmp_path / "t.jsonl", ["hello a\n"])
    first = phf("score", "t.jsonl", "s", "--scorer", "regex", "scorer.pattern=a", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    (tmp_path / "s" / "inner").mkdir()
    before = {p: p.read_bytes() for p in (tmp_path / "s").glob("*") if p.is_file()}
    here = tmp_path / "s" if place == "." else tmp_path / "s" / "inner"
    again = phf("score", str(tmp_path / "t.jsonl"), place, "--scorer", "regex", "scorer.pattern=b", cwd=here)
    assert (again.returncode, "the command runs in it" in again.stderr) == (2, True), again.stderr
    assert {p: p.read_bytes() for p in before} == before


def test_an_unknown_threshold_is_the_same_in_every_stage(tmp_path):
    """Scores that came without a scorer: what `inspect` suggests is what an objective takes."""
    rows = {"texts": [[f"line {n}\n"] for n in range(40)], "scores": [[n % 2 * 0.8 + 0.1] for n in range(40)]}
    (tmp_path / "pub").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "pub" / "a.parquet")
    assert "0.5" in phf("inspect", "pub", cwd=tmp_path).stdout
    tokens = tokenize_corpus(tmp_path / "pub", TrainBPE(300), tmp_path / "t", heldout=0)
    assert tokens.scores[tokens.main].bad_above == 0.5
    refused = phf("inspect", "pub/a.parquet", cwd=tmp_path)
    assert (refused.returncode, "is a file" in refused.stderr) == (2, True)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_threshold_is_a_number(scored, tmp_path, value):
    assert phf("inspect", "scored", "--threshold", value, cwd=tmp_path).returncode == 2


def test_a_folder_to_write_into_may_hold_an_equals_sign(tmp_path):
    write_jsonl(tmp_path / "t.jsonl", ["hello a\n"])
    done = phf("score", "t.jsonl", "o=1", "--scorer", "regex", "scorer.pattern=a", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o=1" / "manifest.json").exists()


def test_a_result_inside_the_corpus_is_not_read_as_corpus(tmp_path):
    (tmp_path / "corpus").mkdir()
    write_jsonl(tmp_path / "corpus" / "t.jsonl", ["hello a\n"])
    for _ in range(2):
        done = phf("score", "corpus", "corpus/out", "--scorer", "regex", "scorer.pattern=a", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "1 document," in done.stdout


def test_a_store_without_a_list_of_files_is_checked_by_its_counts(scored, tmp_path):
    tokenize_corpus(scored, TrainBPE(300), tmp_path / "t", heldout=0.2)
    change(tmp_path / "t" / "manifest.json", files={})
    whole = (tmp_path / "t" / "tokens.bin").read_bytes()
    (tmp_path / "t" / "tokens.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(store.StoreError, match="tokens.bin is missing or damaged"):
        TokenStore.open(tmp_path / "t")
    (tmp_path / "t" / "tokens.bin").write_bytes(whole)
    for wrong in ({"end_of_text_id": 99_999_999}, {"dtype": "object"}):
        before = (tmp_path / "t" / "manifest.json").read_text()
        change(tmp_path / "t" / "manifest.json", **wrong)
        with pytest.raises(store.StoreError, match=r"manifest.json (names an unknown type|has an end-of-text id)"):
            TokenStore.open(tmp_path / "t")
        (tmp_path / "t" / "manifest.json").write_text(before)


@pytest.mark.parametrize("tag", ["!!int ''", "!!timestamp x", "!!bool maybe", "!!python/object:os.system x", "!!set 5"])
def test_yaml_tags_are_one_message(tag):
    with pytest.raises(ConfigError):
        parse_yaml(f"a: {tag}", "recipe")
