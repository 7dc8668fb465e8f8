from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phf.core.config import ConfigError
from phf.core.types import Document, Rejected
from phf.data import readers as corpus
from phf.data.hub import HFDataset
from phf.data.installed import InstalledPackages, StandardLibrary
from phf.data.readers import Folder, Jsonl, Parquet


def read_all(reader):
    return [item for shard in reader.plan() for item in reader.read(shard)]


def reasons(items):
    return [i.reason for i in items if isinstance(i, Rejected)]


def test_jsonl_sets_bad_rows_aside_with_reasons(tmp_path):
    lines = [
        b'{"text": "fine", "n": 1}',
        b"{not json",
        b"[1]",
        b'{"txt": "no field"}',
        b'{"text": 5}',
        b'{"text": ""}',
        b'{"text": "lone \\ud800 surrogate"}',
        b'{"text": "\xff"}',
        b'{"text": "nul \\u0000 is text"}',
        b"[" * 100_000,
        b'{"text": "' + b"x" * 200 + b'"}',
        b"   ",
        b'{"text": "paired \\ud83d\\ude42", "score": NaN}',
        b'{"text": "last, no newline"}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    items = read_all(Jsonl(str(path), max_chars=100))
    assert [i.text for i in items if isinstance(i, Document)] == [
        "fine",
        "nul \x00 is text",
        "paired 🙂",
        "last, no newline",
    ]
    assert reasons(items) == [
        "malformed JSON",
        "not a JSON object",
        "no field 'text'",
        "text is not a string but int",
        "empty text",
        "lone surrogate",
        "not UTF-8",
        "longer than max_chars",
        "longer than max_chars",
    ]
    assert items[0].meta == {"n": 1}


def test_jsonl_ten_megabyte_line_costs_no_other(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "' + b"y" * 10_000_000 + b'"}\n{"text": "b"}\n')
    items = read_all(Jsonl(str(tmp_path / "a.jsonl"), max_chars=100_000))
    assert [getattr(i, "text", "-") for i in items] == ["a", "-", "b"]
    assert len(read_all(Jsonl(str(tmp_path / "a.jsonl")))[1].text) == 10_000_000


@pytest.mark.parametrize("size", [1, 7, 16, 17, 40, 1000])
def test_jsonl_every_line_is_read_once_wherever_shards_are_cut(tmp_path, monkeypatch, size):
    monkeypatch.setattr(corpus, "SHARD_BYTES", size)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in range(1, 30)))
    assert [len(d.text) for d in read_all(Jsonl(str(path)))] == list(range(1, 30))


def test_jsonl_ids_can_come_from_a_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "key": 7}\n{"text": "b"}\n')
    items = read_all(Jsonl(str(tmp_path / "a.jsonl"), id_field="key"))
    assert items[0].id == "7"
    assert reasons(items) == ["no field 'key'"]


def test_folder_reads_sorted_and_sets_aside_what_is_no_text(tmp_path):
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwith mark")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "d.bin").write_bytes(b"ignored")
    (tmp_path / "e.txt").write_text("")
    items = read_all(Folder(str(tmp_path)))
    assert [(i.id, i.text) for i in items if isinstance(i, Document)] == [("a.txt", "with mark"), ("b.txt", "bee")]
    assert reasons(items) == ["not UTF-8", "empty text"]


def test_fingerprint_follows_content_not_time(tmp_path):
    (tmp_path / "a.txt").write_text("1")
    first = Folder(str(tmp_path)).fingerprint()
    (tmp_path / "a.txt").write_text("1")
    assert Folder(str(tmp_path)).fingerprint() == first
    (tmp_path / "a.txt").write_text("2")
    assert Folder(str(tmp_path)).fingerprint() != first


def test_parquet_by_row_group_with_missing_and_listed_texts(tmp_path):
    table = pa.table({"text": ["a", None, "", "b"], "id": ["w", "x", "y", "z"], "k": [1, 2, 3, 4]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    reader = Parquet(str(tmp_path))
    assert len(reader.plan()) == 2
    items = read_all(reader)
    assert [(i.id, i.text, i.meta["k"]) for i in items if isinstance(i, Document)] == [("w", "a", 1), ("z", "b", 4)]
    assert reasons(items) == ["text is not a string but NoneType", "empty text"]
    pq.write_table(pa.table({"texts": [["One.", " Two."]], "scores": [[0.1, 0.2]]}), tmp_path / "b.parquet")
    assert read_all(Parquet(str(tmp_path / "b.parquet"), field="texts"))[0].text == "One. Two."


def test_parquet_errors_say_what_is_there(tmp_path):
    pq.write_table(pa.table({"texts": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"no column 'text' \(did you mean 'texts'\?\)"):
        Parquet(str(tmp_path / "a.parquet")).plan()
    (tmp_path / "b.parquet").write_bytes(b"no")
    with pytest.raises(ConfigError, match="not a Parquet file"):
        Parquet(str(tmp_path / "b.parquet")).plan()


@pytest.mark.parametrize("streaming", [False, True])
def test_data_set_from_a_local_folder(tmp_path, streaming):
    (tmp_path / "train.jsonl").write_text('{"text": "a", "k": 1}\n{"text": "", "k": 2}\n{"text": "b", "k": 3}\n')
    reader = HFDataset(str(tmp_path), streaming=streaming)
    items = read_all(reader)
    assert [i.text for i in items if isinstance(i, Document)] == ["a", "b"]
    assert reasons(items) == ["empty text"]
    assert reader.fingerprint() == HFDataset(str(tmp_path), streaming=streaming).fingerprint()
    with pytest.raises(ConfigError, match="no column 'txt'"):
        HFDataset(str(tmp_path), field="txt", streaming=streaming).plan()


def test_data_set_saved_to_disk(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["a", "b", "c"]}).save_to_disk(tmp_path / "d")
    assert [i.text for i in read_all(HFDataset(str(tmp_path / "d"), max_docs=2))] == ["a", "b"]
    assert corpus.from_path(str(tmp_path / "d"))["name"] == "dataset"


def test_installed_packages_are_real_text_without_phf():
    items = read_all(InstalledPackages())
    names = [i.id for i in items]
    assert "numpy" in names
    assert "phf" not in names
    assert names == sorted(names)
    assert InstalledPackages().provenance()["packages"]["numpy"]
    assert "\r\n" not in next(i.text for i in items if i.id == "numpy")


def test_standard_library_reads_its_own_files():
    items = read_all(StandardLibrary(max_files=40))
    assert len(items) == 40
    assert any("import" in i.text for i in items if isinstance(i, Document))


def test_missing_and_empty_places_are_errors(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        Folder(str(tmp_path / "none")).plan()
    with pytest.raises(ConfigError, match="no file ending in"):
        Folder(str(tmp_path)).plan()
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        Jsonl(str(tmp_path / "a.jsonl")).plan()
    with pytest.raises(ConfigError, match="did you mean 'installed_packages'"):
        corpus.from_path("installed_package")


def test_metadata_too_deep_and_names_that_are_not_utf8(tmp_path):
    # a limit of our own: Python's depends on who called
    lines = ['{"text": "fine", "m": ' + "[" * n + "]" * n + "}" for n in (99, 100, 900, 100_000)]
    lines += ["[" * n + "]" * n for n in (1500, 100_000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + '\n{"text": "next", "key": "\\ud800"}\n')
    items = read_all(Jsonl(str(tmp_path / "a.jsonl")))
    assert reasons(items) == ["nested too deeply"] * 5
    assert [getattr(item, "text", None) for item in items] == ["fine", *[None] * 5, "next"]
    (tmp_path / "b.jsonl").write_text('{"text": "a", "key": "\\ud800"}\n')
    (item,) = read_all(Jsonl(str(tmp_path / "b.jsonl"), id_field="key"))
    assert item.id.encode()
    folder = tmp_path / "f"
    folder.mkdir()
    with open(bytes(folder) + b"/caf\xe9.txt", "w") as file:
        file.write("text")
    (item,) = read_all(Folder(str(folder)))
    assert item.id.encode()


def test_parquet_bytes_that_are_not_utf8_are_set_aside(tmp_path):
    good = b"fine"
    bad = b"\xff\xfe"
    array = pa.Array.from_buffers(
        pa.string(),
        3,
        [None, pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 4, 6, 10))), pa.py_buffer(good + bad + good)],
    )
    pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
    items = read_all(Parquet(str(tmp_path / "a.parquet")))
    assert [getattr(i, "text", "-") for i in items] == ["fine", "-", "fine"]
    assert reasons(items) == ["not UTF-8"]


def test_a_data_set_without_the_split_is_an_error(tmp_path):
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "d")
    with pytest.raises(ConfigError, match="no split 'tran'"):
        HFDataset(str(tmp_path / "d"), split="tran").plan()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        HFDataset(str(tmp_path / "nothing")).plan()


def test_a_streamed_data_set_gives_exactly_max_docs(tmp_path):
    for n in range(4):
        (tmp_path / f"train-{n}.jsonl").write_text("".join(f'{{"text": "{n}{i}"}}\n' for i in range(9)))
    assert len(read_all(HFDataset(str(tmp_path), streaming=True, max_docs=10))) == 10
