"""Every kind of source gives the same rows; every kind of damage gives one clear message."""

from __future__ import annotations

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from data_helpers import write_jsonl

from strop.config import DataConfig
from strop.data import sources
from strop.data.ledger import BadRow
from strop.data.sources import Row, Source
from strop.errors import UserError

ROWS = [
    {"prompt": "1 + 1?", "completion": "2"},
    {"prompt": "Größe?", "completion": "klein 🙂"},
    {"prompt": "", "completion": "\n\t\u2028"},  # a line separator that splitlines() would cut at
]


def read_all(config, split="train"):
    return [row for source in sources.find(config, split, "sft") for row in sources.read(source)]


def fields(rows):
    return [row.fields for row in rows]


def make(tmp_path, name):
    path = tmp_path / name
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)
    elif name == "list.json":
        path.write_text(json.dumps(ROWS, indent=2))
    elif name == "list.json.gz":
        path.write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    elif name.lower().endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif name == "bom.jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + lines)
    elif name == "crlf.jsonl":
        path.write_bytes(lines.replace(b"}\n", b"}\r\n"))
    elif name == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    else:
        path.write_bytes(lines)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.jsonl.gz",
        "bom.jsonl",
        "crlf.jsonl",
        "list.json",
        "list.json.gz",
        "lines.json",
        "a.parquet",
        "saved",
        "A.JSONL",
        "a.jsonl.GZ",
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, name):
    rows = read_all(DataConfig(train=str(make(tmp_path, name))))
    assert fields(rows) == ROWS
    assert [row.line for row in rows] == [1, 2, 3]


def test_a_saved_dict_of_splits(tmp_path):
    splits = {"train": ROWS[:1], "check": ROWS[1:]}
    saved = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()})
    saved.save_to_disk(tmp_path / "d")
    config = DataConfig(train=str(tmp_path / "d"), hub_validation_split="check")
    assert fields(read_all(config)) == ROWS[:1]
    assert fields(read_all(config, "validation")) == ROWS[1:]
    wrong = DataConfig(train=str(tmp_path / "d"), hub_split="trian")
    with pytest.raises(UserError, match="unknown split 'trian'; it has train, check"):
        read_all(wrong)


def test_a_local_copy_of_a_hub_set(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    copy = tmp_path / "copy"
    (copy / "data").mkdir(parents=True)
    (copy / "README.md").write_text("# A set\n")
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(ROWS), copy / "data" / "train-00000-of-00001.parquet"
    )
    assert fields(read_all(DataConfig(train=str(copy)))) == ROWS
    assert sources.find(DataConfig(train=str(copy)), "validation", "sft") == []


@pytest.mark.parametrize("stem", ["training", "train"])
def test_directories_by_name(tmp_path, stem):
    write_jsonl(tmp_path / f"{stem}.jsonl", ROWS[:2])
    write_jsonl(tmp_path / "validation.jsonl", ROWS[2:])
    config = DataConfig(train=str(tmp_path))
    assert fields(read_all(config)) == ROWS[:2]
    assert fields(read_all(config, "validation")) == ROWS[2:]


def test_a_list_is_read_in_order_and_a_file_has_no_validation(tmp_path):
    a, b = write_jsonl(tmp_path / "a.jsonl", ROWS[:1]), write_jsonl(tmp_path / "b.jsonl", ROWS[1:])
    config = DataConfig(train=[str(b), str(a)])
    rows = read_all(config)
    assert [(row.source, row.line) for row in rows] == [(str(b), 1), (str(b), 2), (str(a), 1)]
    assert sources.find(config, "validation", "sft") == []


def test_empty_lines_are_ignored_but_counted_as_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\n  \t\n{"a": 2}')
    rows = read_all(DataConfig(train=str(tmp_path / "a.jsonl")))
    assert [(row.line, row.fields) for row in rows] == [(2, {"a": 1}), (4, {"a": 2})]


BAD_LINES = [
    (b'{"a" 1}', "not_json", "not JSON: Expecting ':' delimiter (column 6)"),
    (b'{"a": "x', "not_json", "not JSON: Unterminated string starting at (column 7)"),
    (b'{"a": "\xff"}', "not_utf8", "not UTF-8 (byte 8 of the line is 0xff)"),
    (b"[1, 2]", "not_an_object", "a list, not an object of fields"),
    (b'"text"', "not_an_object", "a string, not an object of fields"),
    (b"3", "not_an_object", "a number, not an object of fields"),
    (b"null", "not_an_object", "null, not an object of fields"),
    (b"[" * 100_000, "not_json", None),
    (b"9" * 5000, "not_json", None),
]


@pytest.mark.parametrize(("line", "reason", "message"), BAD_LINES, ids=[str(b[0][:9]) for b in BAD_LINES])
def test_a_bad_line_is_passed_on_with_its_number(tmp_path, line, reason, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    first, bad, last = read_all(DataConfig(train=str(path)))
    assert isinstance(bad, BadRow)
    assert (bad.source, bad.line, bad.reason) == (str(path), 2, reason)
    assert message is None or bad.message == message
    assert (first.fields, last.line) == ({"a": 1}, 3)


def error_of(config, split="train"):
    with pytest.raises(UserError) as caught:
        read_all(config, split)
    return str(caught.value)


def test_missing_file_names_the_nearest(tmp_path):
    write_jsonl(tmp_path / "training.jsonl", ROWS)
    path = tmp_path / "traning.jsonl"
    assert error_of(DataConfig(train=str(path))) == (
        f"data.train: no such file or directory: {path}; did you mean {tmp_path / 'training.jsonl'}?"
    )


def test_missing_directory_names_what_the_last_existing_one_holds(tmp_path):
    (tmp_path / "zzz").mkdir()
    path = tmp_path / "assets" / "demo" / "train.jsonl"
    assert error_of(DataConfig(train=str(path))) == (
        f"data.train: no such file or directory: {path}\n  {tmp_path} holds: zzz"
    )


def test_a_relative_name_below_an_existing_directory_is_a_path(tmp_path, monkeypatch):
    """assets/demo-dpo looks like a hub name; it is one only where there is no directory assets."""
    (tmp_path / "assets" / "demo-sft").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert error_of(DataConfig(train="assets/demo-dpo")) == (
        "data.train: no such file or directory: assets/demo-dpo; did you mean assets/demo-sft?"
    )
    (source,) = sources.find(DataConfig(train="owner/name", hub_subset="en"), "train", "sft")
    assert source == Source("owner/name/en:train", "hub", "owner/name", "en", "train")


def test_directory_without_training_data(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    message = error_of(DataConfig(train=str(tmp_path)))
    assert message.startswith(f"data.train: {tmp_path} has none of training.jsonl, training.jsonl.gz")
    assert message.endswith("it holds: rows.jsonl")


def test_directory_with_two_training_files(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "training.jsonl", ROWS)
    assert error_of(DataConfig(train=str(tmp_path))) == (
        f"{tmp_path} holds both training.jsonl and train.jsonl: name one of them"
    )


def test_whole_files_that_cannot_be_read(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n \n")
    assert error_of(DataConfig(train=str(empty))) == f"{empty}: the data set is empty"
    nothing = tmp_path / "nothing.json"
    nothing.write_text("[]")
    assert error_of(DataConfig(train=str(nothing))) == f"{nothing}: the data set is empty"
    text = tmp_path / "rows.csv"
    text.write_text("a,b\n")
    assert "has none of the endings .jsonl, .jsonl.gz, .json, .json.gz, .parquet" in error_of(
        DataConfig(train=str(text))
    )
    broken = tmp_path / "broken.json"
    broken.write_text('[{"a": 1},\n {"a" 2}]')
    assert error_of(DataConfig(train=str(broken))) == (
        f"{broken}, line 2, column 7: not JSON: Expecting ':' delimiter"
    )
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"a": 1}\n' * 10_000)[:-20])
    assert error_of(DataConfig(train=str(cut))).startswith(f"{cut}: damaged gzip data after line ")
    no_gzip = tmp_path / "plain.jsonl.gz"
    no_gzip.write_text('{"a": 1}\n')
    assert error_of(DataConfig(train=str(no_gzip))).startswith(f"{no_gzip}: damaged gzip data after line 0")
    parquet = make(tmp_path, "a.parquet")
    parquet.write_bytes(parquet.read_bytes()[:-9])
    assert error_of(DataConfig(train=str(parquet))).startswith(f"{parquet}: damaged Parquet after row 0")


def test_values_of_the_keys(tmp_path):
    assert error_of(DataConfig()) == (
        "data.train is not set: a file, a directory, a hub name or a list of these"
    )
    assert error_of(DataConfig(train=3)) == "data.train: a path, a hub name or a list of these, not 3"
    assert error_of(DataConfig(train=[])) == "data.train: a path, a hub name or a list of these, not []"
    path = str(write_jsonl(tmp_path / "a.jsonl", ROWS))
    for wrong in ("98,2", "a,b,c", "-1,1,1", "0,1,1", "nan,1,1", "inf,1,1"):
        assert error_of(DataConfig(train=path, split=wrong)) == (
            f"data.split: three shares such as 98,1,1 (train, validation, test), not {wrong!r}"
        )
    assert "data.split and data.validation are both given" in error_of(
        DataConfig(train=path, split="98,1,1", validation=path)
    )
    assert "data.hub_validation_split is not set" in error_of(
        DataConfig(train=path, validation="owner/name"), "validation"
    )


def test_hub_errors_are_told_apart(monkeypatch):
    """A set that does not exist is the user's error; an unreachable hub is not, unless working offline."""
    config = DataConfig(train="owner/nmae")

    def load(error):
        def raise_it(*args, **kwargs):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", raise_it)

    load(datasets.exceptions.DatasetNotFoundError("Dataset 'owner/nmae' doesn't exist\nmore"))
    assert error_of(config) == (
        "owner/nmae:train: Dataset 'owner/nmae' doesn't exist (neither a local path nor a hub set)"
    )
    load(ConnectionError("Couldn't reach the Hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConnectionError, match="owner/nmae:train is no local path, and the hub cannot be"):
        read_all(config)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert "the hub cannot be reached: Couldn't reach the Hub" in error_of(config)


def test_split_by_content():
    """Shares as asked for within four standard deviations; equal rows together; no dependence on place."""
    rows = [Row("a", i, {"prompt": f"p{i}", "completion": "c"}) for i in range(20_000)]
    sides = [sources.in_split(row, "8,1,1") for row in rows]
    for side, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        deviation = (20_000 * share * (1 - share)) ** 0.5
        assert abs(sides.count(side) - 20_000 * share) < 4 * deviation
    moved = [Row("b", 9, {"completion": "c", "prompt": f"p{i}"}) for i in range(100)]
    assert [sources.in_split(row, "8,1,1") for row in moved] == sides[:100]
    assert {sources.in_split(row, "1,0,0") for row in rows} == {"train"}


def test_digest_follows_content_not_name(tmp_path):
    a, b = write_jsonl(tmp_path / "a.jsonl", ROWS), write_jsonl(tmp_path / "b.jsonl", ROWS)
    (first,), (second,) = (sources.find(DataConfig(train=str(p)), "train", "sft") for p in (a, b))
    assert sources.digest(first) == sources.digest(second)
    write_jsonl(b, ROWS[:2])
    assert sources.digest(first) != sources.digest(second)
