"""Data that could be read in two ways, or not at all: refused with the key or file named, not in silence."""

from __future__ import annotations

import errno
import os
import time

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from strop import config as configuration
from strop.config import Config, DataConfig
from strop.data import documents, parts, prepare_text, sets, sources
from strop.data.adapt import TABLE
from strop.data.ledger import BadRow
from strop.data.render import Options, Renderer
from strop.data.sources import Row, Source
from strop.errors import StorageError, UserError
from tests.unit.data_helpers import tiny_tokenizer, write_jsonl

TOKENIZER = tiny_tokenizer()
TEXTS = [f"Document {i}, of a few words, and {i * i} is its square." for i in range(100)]


def error_of(function, *args, **keys) -> str:
    with pytest.raises(UserError) as raised:
        function(*args, **keys)
    return str(raised.value)


def maker(tmp_path, *entries, **data):
    names = [str(entry) for entry in entries]
    return sets.Maker(
        Config(data=DataConfig(train=names, **data)), "text", TOKENIZER, "t", tmp_path / "cache"
    )


@pytest.mark.parametrize("mark", ["README.md", "data/more.jsonl"])
def test_texts_and_data_files_in_what_may_be_a_hub_set(tmp_path, mark):
    """`datasets` would read web.jsonl alone; without README.md and data/ all of them are documents."""
    folder = tmp_path / "texts"
    (folder / "data").mkdir(parents=True)
    for i in range(3):
        (folder / f"chapter{i}.txt").write_text(TEXTS[i])
    write_jsonl(folder / "web.jsonl", [{"text": text} for text in TEXTS[3:12]])
    (folder / mark).write_text('{"text": "# About"}\n')
    message = error_of(documents.find, str(folder), "data.train", "train", DataConfig())
    assert message.startswith(f"data.train: {folder} holds ")
    assert "texts such as chapter0.txt: name the files" in message
    (folder / mark).unlink()
    (folder / "data").rmdir()
    found = documents.find(str(folder), "data.train", "train", DataConfig())
    assert [os.path.basename(source.path) for source in found] == [
        *("chapter0.txt", "chapter1.txt", "chapter2.txt", "web.jsonl")
    ]


def test_a_copy_of_a_hub_set_and_texts_with_a_readme_are_told_apart(tmp_path):
    copy, texts = tmp_path / "copy", tmp_path / "texts"
    for folder in (copy, texts):
        folder.mkdir()
        (folder / "README.md").write_text("# About")
    write_jsonl(copy / "web.jsonl", [{"text": "a"}])
    (copy / ".cache").mkdir()
    (copy / ".cache" / "note.txt").write_text("hidden")
    (texts / "chapter.txt").write_text("b")
    assert [s.format for s in documents.find(str(copy), "data.train", "train", DataConfig())] == ["hub"]
    assert [s.format for s in documents.find(str(texts), "data.train", "train", DataConfig())] == ["text"] * 2


MESSAGES = [{"role": "user", "content": "from messages"}, {"role": "assistant", "content": "told"}]


def rendered(fields, **data):
    options = Options.of(Config(data=DataConfig(**data)), "sft")
    row = Renderer("sft", TOKENIZER, TOKENIZER.chat_template, options)(Row("a.jsonl", 1, fields))
    return (row.reason, row.message) if isinstance(row, BadRow) else [item.text for item in row.texts]


def test_a_template_goes_before_messages():
    row = {"messages": MESSAGES, "question": "Q", "answer": "A"}
    both = {"prompt_template": "{question}? ", "completion_template": "{answer}!"}
    assert rendered(row, **both) == ["Q? A!"]
    assert rendered({**row, "completion": "C"}, prompt_template="{question}? ") == ["Q? C"]
    assert rendered(row, prompt_template="{question}? ") == (
        "wrong_fields",
        "data.prompt_template goes before its messages, but the other half is not there; it has the fields "
        "messages, question, answer",
    )
    assert rendered({"messages": MESSAGES}, **both) == (
        "wrong_fields",
        "data.prompt_template wants {question}; the row's fields are messages",
    )


@pytest.mark.parametrize(("algo", "takes"), [("sft", True), ("kto", False), ("dpo", False), ("cpt", False)])
def test_a_completion_template_is_for_sft(tmp_path, algo, takes):
    file = tmp_path / "c.yaml"
    file.write_text("model: {path: m}\ndata: {train: t.jsonl}\n")
    words = ["data.completion_template={answer}"]
    if takes:
        assert configuration.load(algo, file, words).data.completion_template == "{answer}"
    else:
        message = error_of(configuration.load, algo, file, words)
        assert f"data.completion_template is '{{answer}}'; it must be null for {algo}" in message


@pytest.mark.parametrize("held", [None, "train"])
def test_a_saved_set_has_no_splits(tmp_path, held):
    folder = tmp_path / "saved"
    rows = [{"prompt": "a", "completion": str(i)} for i in range(3)]
    datasets.Dataset.from_list(rows, split=held).save_to_disk(folder)

    def read(split, **keys):
        config = DataConfig(**keys)
        return [row.fields for source in sources.find(config, split, "sft") for row in sources.read(source)]

    assert read("train", train=str(folder), hub_split=held) == rows
    for key in ("nonsense", "validation"):
        message = error_of(read, "train", train=str(folder), hub_split=key)
        assert message.startswith(f"data.hub_split={key}: {folder} is one set without splits")
    for key in ("validation", "train"):
        message = error_of(read, "validation", train=str(folder), hub_validation_split=key)
        assert message.startswith(f"data.hub_validation_split={key}: {folder} is one set without splits")
        assert (
            key
            == error_of(documents.beside, str(folder), DataConfig(hub_validation_split=key))
            .split("=", 1)[1]
            .split(":")[0]
        )
    assert read("validation", train=str(folder)) == []
    assert read("validation", train="x.jsonl", validation=str(folder)) == rows
    (folder / "state.json").write_text("{")
    assert error_of(read, "train", train=str(folder)).startswith(f"{folder}: damaged state.json")


def test_two_stores_with_an_entry_of_the_same_name_stand_in_the_ledger(tmp_path, monkeypatch):
    stores = []
    for name, texts in (("a", TEXTS[:30]), ("b", TEXTS[30:])):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        write_jsonl(tmp_path / name / "texts.jsonl", [{"text": text} for text in texts])
        made, _ = maker(tmp_path, "texts.jsonl").prepare("train")
        stores.append(made[0][0])
    place, ledger = maker(tmp_path, *stores).prepare("train")
    assert sum(end - begin for _, begin, end in place) == 100
    assert ledger.used == 100
    assert [(entry.name, entry.used) for entry in ledger.sources.values()] == [
        *(("texts.jsonl", 30), (f"{stores[1]}: texts.jsonl", 70))
    ]
    assert list(ledger.sources) == [entry.name for entry in ledger.sources.values()]


def test_an_error_leaves_no_half_of_a_corpus(tmp_path, monkeypatch):
    """Of this process, or of one that was killed long ago; a young one's may be in use."""
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])

    def full(*args, **keys):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(prepare_text.corpus, "write_index", full)
        for _ in range(3):
            with pytest.raises(StorageError):
                maker(tmp_path, file).prepare("train")
    [work] = (tmp_path / "cache").iterdir()
    assert [path.name for path in work.iterdir() if path.is_dir()] == []
    for name, age in (("corpus-0ld", 2 * prepare_text.STALE_S), ("corpus-new", 60)):
        (work / name).mkdir()
        (work / name / "tokens").write_bytes(b"half")
        os.utime(work / name, (time.time() - age,) * 2)
    with monkeypatch.context() as patched:
        patched.setattr(prepare_text.corpus, "write_index", full)
        with pytest.raises(StorageError):
            maker(tmp_path, file).prepare("train")
    assert [path.name for path in work.iterdir() if path.is_dir()] == ["corpus-new"]
    assert maker(tmp_path, file).prepare("train")[1].used == 100
    assert not work.exists()


def test_damaged_pages_of_parquet(tmp_path):
    """The footer is whole: the damage is found in the middle of the documents."""
    file = tmp_path / "a.parquet"
    table = pyarrow.Table.from_pylist([{"text": text} for text in TEXTS])
    pyarrow.parquet.write_table(table, file, compression="snappy", row_group_size=50, use_dictionary=False)
    content = bytearray(file.read_bytes())
    begin = pyarrow.parquet.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    content[begin + 30 : begin + 300] = b"\xff" * 270
    file.write_bytes(content)
    message = error_of(maker(tmp_path, file).prepare, "train")
    assert message.startswith(f"{file}: damaged Parquet after row 50 (")


def test_sets_that_datasets_cannot_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    (broken / "data").mkdir(parents=True)
    empty.mkdir()
    for folder in (empty, broken):
        (folder / "README.md").write_text("# About")
    (broken / "data" / "train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    for folder, why in ((empty, "doesn't contain any data files"), (broken, "JSON parse error")):
        config = DataConfig(train=str(folder))
        [source] = sources.find(config, "train", "sft")
        message = error_of(lambda source=source: list(sources.read(source)))
        assert message.startswith(f"{folder}:train: ")
        assert why in message
        assert "neither a local path" not in message


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 100_000])
def test_json_that_no_parser_takes(tmp_path, value):
    file = tmp_path / "a.json"
    file.write_text('[{"a": ' + value)
    source = Source(str(file), "json", str(file))
    message = error_of(lambda: list(sources.read(source)))
    assert message.startswith(f"{file}: not readable JSON: ")


def test_many_small_files_are_grouped_in_a_moment():
    """300,000 documents of 13 bytes are 3.7 MiB, one part: no sum over all held ones for each."""
    pieces = [documents.Piece(i, 0, 13, 1, 13) for i in range(300_000)] + [documents.Piece(0, 0, 1, 1, 2**22)]
    begin = time.process_time()
    found = parts.group([*pieces, *pieces[:10]])
    assert time.process_time() - begin < 20
    assert [len(part) for part in found] == [300_001, 10]


def fraction_that_passes(tmp_path, rows, kind, **data):
    """The least data.max_dropped_fraction of 0, 0.01, ... with which the rows are prepared."""
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    for percent in range(101):
        own = DataConfig(train=str(file), on_bad_row="skip", max_dropped_fraction=percent / 100, **data)
        try:
            sets.Maker(Config(data=own), kind, TOKENIZER, "t", tmp_path / "cache").prepare("train")
            return percent
        except UserError as error:
            if "max_dropped_fraction" not in str(error):
                raise
    raise AssertionError("never")


@pytest.mark.parametrize("bad", [{"prompt": "p", "chosen": "a", "rejected": "a"}, {"no": "pair"}, [1]])
def test_a_file_of_pairs_is_judged_alike_by_rm_and_kto(tmp_path, bad):
    """20 bad ones of 100: as 80 pairs or as 160 halves, a fifth of the lines."""
    good = [{"prompt": "p", "chosen": "a", "rejected": f"b{i}"} for i in range(80)]
    rows = [*good, *[bad] * 20]
    assert fraction_that_passes(tmp_path, rows, "preference") == 20
    assert fraction_that_passes(tmp_path, rows, "unpaired") == 20


def test_a_half_of_a_pair_that_is_too_long_is_half_a_line(tmp_path):
    """And the ledger that is read back knows it: 10 of 100 pairs with one half too long."""
    rows = [{"prompt": "p", "chosen": "a", "rejected": f"b{i}" + "x" * 99 * (i < 10)} for i in range(100)]
    assert fraction_that_passes(tmp_path, rows, "preference", max_length=50) == 10
    assert fraction_that_passes(tmp_path, rows, "unpaired", max_length=50) == 5


def test_rows_left_out_on_purpose_dilute_nothing(tmp_path, monkeypatch):
    """90 ties of 100 rows, and one bad row: one of ten, not of a hundred."""
    (tmp_path / "tie_adapter.py").write_text("def ties(row):\n    return None if 'tie' in row else row\n")
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"tie": 1}] * 90 + [{"prompt": "p", "completion": f"{i}"} for i in range(9)] + [{"no": "row"}]
    assert fraction_that_passes(tmp_path, rows, "sft", adapter="tie_adapter:ties") == 10


@pytest.mark.parametrize("train", ["gsm8k", ["gsm8k", "a.jsonl"]])
def test_arguments_for_no_adapter(tmp_path, monkeypatch, train):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    config = DataConfig(train=train, adapter_args={"field": "x"})
    message = error_of(sources.find, config, "train", "sft")
    assert message == "data.adapter_args: there is no data.adapter to take them"


def test_a_secret_that_config_yaml_does_not_keep_is_asked_for(tmp_path):
    """A run's config.yaml as the configuration of another run."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    config = DataConfig(train=str(path), adapter="mine:A", adapter_args={"login": {"api_key": "[secret]"}})
    message = error_of(sources.find, config, "train", "sft")
    assert message.startswith("data.adapter_args: [secret] stands for a secret that a run's config.yaml does")


def test_a_directory_of_texts_called_as_a_known_set_is_said(tmp_path, monkeypatch, caplog):
    name = next(iter(TABLE))
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    sources.say_path.cache_clear()
    with caplog.at_level("INFO"):
        documents.find(name, "data.train", "train", DataConfig())
    assert f"data.train: {name} is taken from here" in caplog.text
