"""Files of rows and of text in every form, whole and damaged."""

from __future__ import annotations

import bz2
import csv
import datetime
import gzip
import json
import lzma

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phf.core.config import ConfigError, validate
from phf.core.types import Document, Rejected
from phf.data import files
from phf.data.canaries import AnyCorpus
from phf.data.readers import Jsonl, Parquet, Rows, from_path
from phf.data.tables import is_metadata

MARK = "\ufeff"


def read_all(path):
    reader = validate(from_path(str(path)), AnyCorpus)
    return [item for shard in reader.plan() for item in reader.read(shard)]


def texts(path):
    return [item.text for item in read_all(path) if isinstance(item, Document)]


def zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


ROWS = [{"text": "one é", "k": 1}, {"text": "two\nlines", "k": 2}, {"text": "three", "k": 3}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.jsonl", LINES.encode()),
        ("a.JSONL", LINES.encode()),
        ("a.ndjson", LINES.encode()),
        ("a.jsonl", (MARK + LINES).encode()),
        ("a.json", LINES.encode()),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", (MARK + json.dumps(ROWS, indent=2)).encode()),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.jsonl.gz", gzip.compress(LINES[:20].encode(), mtime=0) + gzip.compress(LINES[20:].encode(), mtime=0)),
        ("a.jsonl.bz2", bz2.compress(LINES.encode())),
        ("a.jsonl.xz", lzma.compress(LINES.encode())),
        ("a.jsonl.zst", zst(LINES.encode())),
        ("A.Json.GZ", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
    ],
)
def test_json_of_every_form_gives_the_same_documents(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    for path in (tmp_path / name, tmp_path):  # the file, and the folder that holds it
        found = read_all(path)
        assert [(d.text, d.meta) for d in found] == [(r["text"], {"k": r["k"]}) for r in ROWS]


@pytest.mark.parametrize("name, options", [("a.csv", {}), ("a.tsv", {"delimiter": "\t", "quoting": csv.QUOTE_NONE})])
def test_tables_of_text(tmp_path, name, options):
    rows = [{"text": "one, with a comma", "k": "1"}, {"text": "two é", "k": "2"}]
    for mark in ("", MARK):
        with open(tmp_path / name, "w", encoding="utf-8", newline="") as file:
            file.write(mark)
            writer = csv.DictWriter(file, ["text", "k"], **options)
            writer.writeheader()
            writer.writerows(rows)
        assert [(d.text, d.meta) for d in read_all(tmp_path / name)] == [(r["text"], {"k": r["k"]}) for r in rows]
    with open(tmp_path / name, "ab") as file:
        file.write(b"fine" + (b"," if name == "a.csv" else b"\t") * 3 + b"x\n\xff" + b"," + b"y\n")
    reasons = [item.reason for item in read_all(tmp_path / name) if isinstance(item, Rejected)]
    assert reasons == ["more fields than the header has", "not UTF-8"]
    (tmp_path / name).write_text("txt\nx\n")
    with pytest.raises(ConfigError, match=r"no column 'text' \(did you mean 'txt'"):
        read_all(tmp_path / name)


def test_a_mixed_folder_is_read_whole(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.csv").write_text("text\nc\n")
    pq.write_table(pa.table({"text": ["p"]}), tmp_path / "d.parquet")
    (tmp_path / "README.md").write_text("about the data")
    assert texts(tmp_path) == ["one é", "two\nlines", "three"] * 2 + ["p", "c"]
    left_out = Rows(str(tmp_path)).left_out()
    assert left_out == ["README.md (not .jsonl or .json or .csv or .tsv or .parquet)"]


def test_a_folder_of_rows_and_texts_is_an_error_that_names_both(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "notes.txt").write_text("a text")
    with pytest.raises(ConfigError, match=r"1 files of rows \(a.jsonl\) and 1 of text \(notes.txt\)"):
        from_path(str(tmp_path))


def test_hidden_copies_are_left_out_and_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    for name in ("._a.jsonl", ".ipynb_checkpoints/a.jsonl", ".venv/x/b.jsonl", "__MACOSX/a.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(LINES)
    assert len(texts(tmp_path)) == 3
    assert sorted(Jsonl(str(tmp_path)).left_out()) == sorted(
        f"{name} (hidden)"
        for name in ("._a.jsonl", ".ipynb_checkpoints/a.jsonl", ".venv/x/b.jsonl", "__MACOSX/a.jsonl")
    )


def test_a_compressed_copy_beside_its_file_is_left_out_and_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    assert len(texts(tmp_path)) == 6
    assert Jsonl(str(tmp_path)).left_out() == ["a.jsonl.gz (a copy of a.jsonl, compressed)"]


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_stray_quote_costs_its_line_only(tmp_path, end):
    (tmp_path / "a.csv").write_text(
        'text,n\n"one\nline",1\n"open,2\nthree,3\n"fo""ur",4\n"5" inches,5\n"x,6\nsix,6' + end
    )
    found = read_all(tmp_path / "a.csv")
    assert [i.text if isinstance(i, Document) else i.reason for i in found] == [
        "one\nline",
        """malformed CSV: ',' expected after '"'""",
        "three",
        'fo"ur',
        "5 inches",
        "malformed CSV: unexpected end of data",
        "six",
    ]


def test_files_of_one_name_and_other_content_are_all_read(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "another"}\n'))
    (tmp_path / "b.jsonl.bz2").write_bytes(bz2.compress(LINES.encode()))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    assert len(texts(tmp_path)) == 7
    assert Jsonl(str(tmp_path)).left_out() == ["b.jsonl.gz (a copy of b.jsonl, compressed)"]


@pytest.mark.parametrize("name", ["c.tar", "c.tar.gz", "c.TGZ", "c.zip"])
def test_an_archive_is_an_error(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match="is an archive of files; unpack it"):
        from_path(str(tmp_path / name))


def test_what_is_no_text_under_an_unknown_ending_is_an_error(tmp_path):
    (tmp_path / "a.dat").write_bytes(b"abc\0def")
    (tmp_path / "b.dat").write_text('[{"text": "a"}]')
    for name, message in (("a.dat", "NUL"), ("b.dat", "JSON")):
        with pytest.raises(ConfigError, match=message):
            from_path(str(tmp_path / name))


def test_python_environments_are_no_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "env" / "lib").mkdir(parents=True)
    (tmp_path / "env" / "pyvenv.cfg").write_text("")
    (tmp_path / "env" / "lib" / "b.txt").write_text("not of the corpus")
    assert texts(tmp_path) == ["a text"]


def test_stray_quotes_take_time_that_grows_with_the_file(tmp_path):
    """Each of these rows opens a quote that the next one closes, so the whole file is one row that never ends."""
    (tmp_path / "a.csv").write_text("text,n\n" + '5","abc\n' * 20_000)
    assert len(read_all(tmp_path / "a.csv")) == 20_000


def test_a_stray_quote_in_the_first_row_costs_nothing_else(tmp_path):
    (tmp_path / "a.csv").write_text('text,n\n"hel"lo,1\nworld,2\n')
    assert texts(tmp_path / "a.csv") == ["hello", "world"]
    (tmp_path / "b.csv").write_text("text,text\na,b\n")
    with pytest.raises(ConfigError, match="two columns named 'text'"):
        read_all(tmp_path / "b.csv")


def test_json_lines_under_another_ending_are_not_taken_for_a_text(tmp_path):
    (tmp_path / "data.dat").write_text(LINES)
    with pytest.raises(ConfigError, match="corpus.name=jsonl"):
        from_path(str(tmp_path / "data.dat"))
    (tmp_path / "text.dat").write_text("{curly} text")
    assert texts(tmp_path / "text.dat") == ["{curly} text"]


@pytest.mark.parametrize(
    "pack, name", [(gzip.compress, "a.jsonl.gz"), (bz2.compress, "a.jsonl.bz2"), (zst, "a.jsonl.zst")]
)
def test_a_damaged_compressed_file_is_counted(tmp_path, pack, name):
    rng = np.random.default_rng(0)
    many = "".join(json.dumps({"text": rng.bytes(40).hex()}) + "\n" for _ in range(3000))
    (tmp_path / name).write_bytes(pack(many.encode())[:-2000])
    found = read_all(tmp_path / name)
    assert [item.reason.partition(",")[0] for item in found if isinstance(item, Rejected)] in (
        ["damaged compressed file"],
        ["malformed JSON", "damaged compressed file"],
    )


def test_only_the_columns_that_are_needed_are_read(tmp_path):
    far = pa.array([900_000_000_000_000], pa.timestamp("ms"))
    odd = pa.array([10**12], pa.timestamp("ms", tz="Mars/Phobos"))
    table = pa.table(
        {
            "text": pa.array([b"caf\xc3\xa9"], pa.binary()),
            "id": pa.array([None], pa.string()),
            "far": far,
            "odd": odd,
            "when": pa.array([datetime.date(2024, 5, 1)]),
            "nested": [{"a": "x", "b": 2}],
            "tags": [["x", "y"]],
            "embedding": pa.array([[0.5] * 8], pa.list_(pa.float32())),
            "image": pa.array([b"\xff\xd8"]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    (document,) = read_all(tmp_path / "a.parquet")
    assert (document.text, document.id) == ("café", "a.parquet:0:0")
    assert set(document.meta) == {"id", "far", "odd", "when", "nested", "tags"}
    assert document.meta["when"] == "2024-05-01"
    assert document.meta["far"].startswith("30489-")
    assert document.meta["nested"] == {"a": "x", "b": 2}
    assert not is_metadata(pa.list_(pa.float32()))


def test_bytes_that_are_not_utf8_cost_their_row_only(tmp_path):
    pq.write_table(pa.table({"text": [b"a", b"\xff", None, b"b"]}), tmp_path / "a.parquet")
    found = read_all(tmp_path / "a.parquet")
    assert [getattr(item, "text", None) for item in found] == ["a", None, None, "b"]
    assert [i.reason for i in found if isinstance(i, Rejected)] == ["not UTF-8", "text is not a string but NoneType"]


def test_a_large_row_group_is_read_a_piece_at_a_time(tmp_path, monkeypatch):
    from phf.data import readers

    monkeypatch.setattr(readers, "ROWS_AT_ONCE", 7)
    pq.write_table(pa.table({"text": [f"t{n}" for n in range(30)]}), tmp_path / "a.parquet")
    reader = Parquet(str(tmp_path / "a.parquet"))
    (shard,) = reader.plan()
    assert [item.id for item in reader.read(shard)] == [f"a.parquet:0:{n}" for n in range(30)]


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.jsonl", b'{"a": 1}\n\n{bad\n', "line 3: malformed JSON"),
        ("a.json", b'[{"a": 1}, 5]', "row 1: not a JSON object"),
        ("a.csv", b"a\n1,2\n", "row 0: more fields"),
        ("a.jsonl.gz", b"no gzip", "damaged compressed file"),
        ("a.parquet", b"no", "not a readable Parquet file"),
        ("a.doc", b"x", "expected a file ending in .jsonl"),
    ],
)
def test_files_of_labels_and_prompts_are_read_strictly(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        files.read_rows(tmp_path / name)
    with pytest.raises(ConfigError, match="does not exist"):
        files.read_rows(tmp_path / "none.csv")


def test_a_column_may_be_missing_in_the_first_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b", "label": 1}\n')
    assert len(files.read_rows(tmp_path / "a.jsonl", ("text", "label"))) == 2
    with pytest.raises(ConfigError, match=r"no column 'labl' \(did you mean 'label'"):
        files.read_rows(tmp_path / "a.jsonl", ("labl",))


def test_text_files_are_utf8_or_one_message(tmp_path):
    (tmp_path / "a").write_bytes((MARK + "word").encode())
    assert files.read_text(tmp_path / "a", "lexicon") == "word"
    (tmp_path / "b").write_bytes("é".encode("latin1"))
    with pytest.raises(ConfigError, match=r"lexicon .*b is not UTF-8 text \(byte 0\)"):
        files.read_text(tmp_path / "b", "lexicon")
    with pytest.raises(ConfigError, match="cannot read lexicon"):
        files.read_text(tmp_path / "none", "lexicon")
