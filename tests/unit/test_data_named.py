"""Where data sets known by a name are found: on the hub, in the working directory, in copies; offline."""

from __future__ import annotations

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from adapter_rows import GSM8K, ONE_TO_ONE, SQUAD, TREES, TULU_TURNS, ULTRA, adapted, helpsteer3
from data_helpers import write_jsonl

from strop.config import DataConfig, PrepareConfig
from strop.data import adapt, documents, sources
from strop.data.prepare import has_validation
from strop.data.sources import Row, Source
from strop.errors import UserError


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No network: a request would fail, and nothing may ask for one."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path


def find(kind="preference", split="train", **settings):
    return sources.find(DataConfig(**settings), split, kind)


def test_names_stand_for_hub_sets():
    [source] = find(train="helpsteer3")
    assert source == Source(
        "nvidia/HelpSteer3/preference:train",
        "hub",
        "nvidia/HelpSteer3",
        "preference",
        "train",
        adapt.Use("helpsteer3", "preference"),
    )
    assert find(train="nvidia/HelpSteer3") == [source]  # the same set by its full name
    [validation] = find(split="validation", train="helpsteer3")
    assert (validation.name, validation.split) == ("nvidia/HelpSteer3/preference:validation", "validation")
    assert has_validation(DataConfig(train="helpsteer3"), "preference")
    assert not has_validation(DataConfig(train="tulu3-sft"), "sft")
    splits = {
        kind: [find(kind, split, train="ultrafeedback")[0].split for split in ("train", "validation")]
        for kind in ("preference", "sft")
    }
    assert splits == {"preference": ["train_prefs", "test_prefs"], "sft": ["train_sft", "test_sft"]}
    [other] = find("sft", train="openmathinstruct2", hub_split="train_1M")
    assert other.name == "nvidia/OpenMathInstruct-2:train_1M"
    [judged] = find("unpaired", train="hh")  # takes pairs apart
    assert (judged.split, judged.adapter) == ("train", adapt.Use("hh", "unpaired"))
    [explicit] = find("sft", "validation", train="x.jsonl", validation="gsm8k")
    assert explicit.name == "openai/gsm8k/main:test"


def test_a_hub_set_as_it_is():
    [raw] = find(train="nvidia/HelpSteer3", adapter="none")
    assert raw == Source("nvidia/HelpSteer3:train", "hub", "nvidia/HelpSteer3", None, "train")
    assert find(split="validation", train="nvidia/HelpSteer3", adapter="none") == []
    [own] = find(train="nvidia/HelpSteer3", adapter="rows:make")
    assert (own.subset, own.adapter) == (None, adapt.Use("rows:make", "preference"))


def test_something_here_of_that_name_wins_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    sources.say_path.cache_clear()
    (tmp_path / "gsm8k").mkdir()
    write_jsonl(tmp_path / "gsm8k" / "train.jsonl", [{"prompt": "a", "completion": "b"}])
    with caplog.at_level("INFO"):
        [source] = find("sft", train="gsm8k")
        find("sft", train="gsm8k")
    assert source == Source("gsm8k/train.jsonl", "jsonl", "gsm8k/train.jsonl")
    assert caplog.messages == [
        "data.train: gsm8k is taken from here, where something has this name, and not from the hub"
    ]


def error_of(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_names_that_cannot_be_meant(tmp_path):
    path = str(write_jsonl(tmp_path / "a.jsonl", [GSM8K]))
    assert error_of(find, "sft", train=path, adapter="helpster") == (
        "data.adapter: no adapter is called 'helpster'; did you mean helpsteer3? "
        "(or package.module:name, or none)"
    )
    assert "there are helpsteer3, tulu3-preference," in error_of(find, "sft", train=path, adapter="x")
    served = (
        "helpsteer3 holds preference pairs, and this algorithm needs answers to be learnt, as in tulu3-sft, "
        "ultrafeedback, squad, oasst1, oasst2, openmathinstruct2, gsm8k, math"
    )
    assert error_of(find, "sft", train="helpsteer3") == f"data.train: {served}"
    assert error_of(find, "sft", train=path, adapter="helpsteer3") == f"data.adapter: {served}"
    assert error_of(find, "sft", train=path, adapter="gsm8k", adapter_args={"a": 1}) == (
        "data.adapter_args: gsm8k takes none; they are for a class of your own"
    )
    assert error_of(find, "sft", train="gsm8k", adapter="math") == (
        "data.adapter: gsm8k brings its own adapter, so math would have nothing to do; name the set "
        "openai/gsm8k to have it read by another one"
    )
    assert error_of(find, "sft", "validation", train="x.jsonl", validation="tulu3-sft") == (
        "data.hub_validation_split is not set: which split of allenai/tulu-3-sft-mixture is for validation? "
        "(data.split makes one)"
    )


def test_a_copy_without_the_subset(offline):
    """Left as `datasets` finds it, with the key that helps."""
    (offline / "gsm8k").mkdir()
    (offline / "gsm8k" / "README.md").write_text("# A set\n")
    write_jsonl(offline / "gsm8k" / "test.jsonl", [GSM8K])
    settings = {"train": str(offline / "gsm8k"), "adapter": "gsm8k"}
    assert "BuilderConfig 'main' not found. Available: ['default']" in error_of(
        find, "sft", "validation", **settings
    )
    [source] = find("sft", "validation", **settings, hub_subset="default")
    assert [row.fields for row in sources.read(source)] == [ONE_TO_ONE[10][3]]


def test_a_mistyped_name_is_told_the_nearest(monkeypatch):
    def away(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", away)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    [source] = find(train="helpstear3")
    assert error_of(list, sources.read(source)).endswith("Couldn't reach the Hub; did you mean helpsteer3?")


# ------------------------------------------------------------------------------------------- local copies


def read_all(kind, split="train", **settings):
    found = sources.find(DataConfig(**settings), split, kind)
    return [row.fields for source in found for row in sources.read(source) if isinstance(row, Row)]


def test_a_saved_dict_of_splits(offline):
    splits = {"train_prefs": [ULTRA], "test_prefs": [ULTRA, ULTRA], "train_sft": [ULTRA]}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    saved.save_to_disk(offline / "uf")
    settings = {"train": str(offline / "uf"), "adapter": "ultrafeedback"}
    pair = ONE_TO_ONE[4][3]
    assert read_all("preference", **settings) == [pair]
    assert read_all("preference", "validation", **settings) == [pair, pair]
    assert read_all("sft", **settings) == [{"messages": ULTRA["messages"]}]
    assert find("sft", "validation", **settings) == []  # test_sft was not saved
    datasets.Dataset.from_list([SQUAD]).save_to_disk(offline / "one")
    assert read_all("sft", train=str(offline / "one"), adapter="squad") == [ONE_TO_ONE[7][3]]
    assert find("sft", "validation", train=str(offline / "one"), adapter="squad") == []


def test_a_copy_of_the_repository(offline):
    """Laid out as nvidia/HelpSteer3: subsets in folders, named in the head of README.md."""
    copy = offline / "HelpSteer3"
    (copy / "preference").mkdir(parents=True)
    (copy / "README.md").write_text(
        "---\nconfigs:\n- config_name: preference\n  data_files:\n"
        "  - split: train\n    path: preference/train.jsonl.gz\n"
        "  - split: validation\n    path: preference/validation.jsonl.gz\n---\n# HelpSteer3\n"
    )
    for name, rows in (("train", [helpsteer3(-2), helpsteer3(0)]), ("validation", [helpsteer3(3)])):
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (copy / "preference" / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines))
    better = {"prompt": TULU_TURNS, "chosen": "Wren.", "rejected": "Trout.", "margin": 2.0}
    worse = {"prompt": TULU_TURNS, "chosen": "Trout.", "rejected": "Wren.", "margin": 3.0}
    for place in (copy, copy / "preference"):
        settings = {"train": str(place), "adapter": "nvidia/HelpSteer3"}
        assert read_all("preference", **settings) == [better]
        assert read_all("preference", "validation", **settings) == [worse]
    assert read_all(
        "preference", train=str(copy / "preference" / "train.jsonl.gz"), adapter="helpsteer3"
    ) == [better]


def test_message_trees_in_a_local_copy(offline):
    copy = offline / "oasst"
    (copy / "data").mkdir(parents=True)
    (copy / "README.md").write_text("# Trees\n")
    table = pyarrow.Table.from_pylist(TREES)
    pyarrow.parquet.write_table(table, copy / "data" / "train-00000-of-00001.parquet", row_group_size=3)
    wanted = [row.fields for row in adapted("oasst1", "sft", TREES) if isinstance(row, Row)]
    assert read_all("sft", train=str(copy), adapter="oasst1") == wanted
    assert find("sft", "validation", train=str(copy), adapter="oasst1") == []
    file = str(copy / "data" / "train-00000-of-00001.parquet")
    assert read_all("sft", train=file, adapter="oasst1") == wanted


def test_a_set_in_the_hub_cache(monkeypatch):
    """What `datasets` is asked for; offline it answers from its cache or says that it cannot."""
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([GSM8K])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_all("sft", train="gsm8k") == [ONE_TO_ONE[10][3]]
    assert asked == [(("openai/gsm8k", "main"), {"split": "train"})]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "json"])
def test_text_of_a_named_set(tmp_path, suffix):
    """Pieces of a source go through the adapter too."""
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GSM8K, GSM8K]), path)
    elif suffix == "json":
        path.write_text(json.dumps([GSM8K, GSM8K]))
    else:
        write_jsonl(path, [GSM8K, GSM8K])
    [source] = documents.find(str(path), "data.train", "train", DataConfig(adapter="gsm8k"))
    config = PrepareConfig(text_key="content")  # of rows without an adapter
    read = [d for piece in documents.pieces(0, source, config) for d in documents.read(source, piece, config)]
    assert [(d.line, d.text) for d in read] == [(n, "One and one?\n\n1+1=<<1+1=2>>2\n#### 2") for n in (1, 2)]
