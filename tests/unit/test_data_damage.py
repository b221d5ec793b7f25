"""Stores with a file that is missing, cut off or overwritten: every reader names it, with what to do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from strop.config import Config, DataConfig
from strop.data import prepare as prepare_module
from strop.data import sets
from strop.data.store import TokenStore
from strop.errors import UserError
from tests.unit.data_helpers import tiny_tokenizer, write_jsonl

TOKENIZER = tiny_tokenizer()
ROWS = {
    "text": [{"text": f"{i} apples are there, and {i} sea shells."} for i in range(40)],
    "sft": [{"prompt": f"{i} apples?", "completion": f" {i}"} for i in range(40)],
    "preference": [{"prompt": f"{i}?", "chosen": f" {i}", "rejected": " no", "margin": 1} for i in range(40)],
}
FILES = {
    "text": {
        *("ledger-train.json", "ledger-validation.json", "offsets.npy", "rows.npy", "store.json"),
        "tokens-00000.bin",
    },
    "sft": {
        "ledger.json",
        "offsets.npy",
        "rows.npy",
        "store.json",
        "tokens.bin",
        "trained.bin",
        "values.npy",
    },
}
FILES["preference"] = FILES["sft"]


def read_all(kind, train, cache):
    """What a run does with its data, up to the first batch; the first store."""
    config = Config(data=DataConfig(train=str(train), split="60,40,0"))
    maker = sets.Maker(config, kind, TOKENIZER, "t", cache)
    places = {name: maker.prepare(name)[0] for name in maker.names()}
    for name, place in places.items():
        assert sets.open_set(place, config, name).row_lengths.sum() > 0
    return places["train"]


def damage(file, how):
    if how == "gone":
        file.unlink()
    elif how == "overwritten":
        file.write_bytes(b"\xff" * (file.stat().st_size + 4))
    else:
        os.truncate(file, file.stat().st_size // 2 if how == "half" else 0)


@pytest.mark.parametrize("how", ["gone", "half", "empty", "overwritten"])
@pytest.mark.parametrize("kind", ROWS)
def test_each_file_is_named(tmp_path, kind, how):
    """As the cache finds it and, of text, where data.train names the store itself."""
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS[kind])
    read_all(kind, data, tmp_path / "whole")
    [store] = [path for path in (tmp_path / "whole").iterdir() if "train" in path.name or kind == "text"]
    seen = set()
    for file in sorted(store.iterdir()):
        if file.name == "ledger-test.json":
            continue
        seen.add(file.name)
        cache = tmp_path / file.name
        shutil.copytree(tmp_path / "whole", cache)
        damaged = cache / store.name / file.name
        damage(damaged, how)
        for train in (data, damaged.parent) if kind == "text" else (data,):
            with pytest.raises(UserError) as caught:
                read_all(kind, train, cache)
            assert f"{damaged} is damaged (" in str(caught.value)
            assert f"): delete {damaged.parent} and prepare it again" in str(caught.value)
        shutil.rmtree(damaged.parent)
        read_all(kind, data, cache)
    assert seen == FILES[kind]


def test_fewer_rows_than_there_are(tmp_path):
    """A whole file of another store, or of an interrupted copy over it."""
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS["sft"])
    few = write_jsonl(tmp_path / "few.jsonl", ROWS["sft"][:9])
    whole, other = (read_all("sft", path, tmp_path / "cache") for path in (data, few))
    for name in ("values.npy", "rows.npy"):
        shutil.copy(f"{other}/{name}", f"{whole}/{name}")
        with pytest.raises(UserError, match=rf"{name} is damaged \(\d+ rows, not \d+\)"):
            TokenStore.open(whole)


def test_what_a_killed_writer_left_is_removed(tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS["sft"])
    store = read_all("sft", data, tmp_path / "cache")
    rubble = tmp_path / "cache" / f"{os.path.basename(store)}.tmp-0123456789ab"
    shutil.copytree(store, rubble)
    (rubble / "store.json").unlink()
    other = tmp_path / "cache" / "sft-train-of-others.tmp-0123456789ab"
    other.mkdir()
    read_all("sft", data, tmp_path / "cache")
    assert not rubble.exists()
    assert other.exists()


def test_a_twin_that_is_faster_takes_the_half_away(tmp_path, monkeypatch):
    """Another process writes the same store, and removes ours, between our last row and the other files."""
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS["sft"])
    counted, caches = prepare_module._counted, [tmp_path / "cache"]

    def overtaken(*args):
        yield from counted(*args)
        if caches:
            read_all("sft", data, caches.pop())

    monkeypatch.setattr(prepare_module, "_counted", overtaken)
    store = read_all("sft", data, tmp_path / "cache")
    monkeypatch.undo()
    alone = read_all("sft", data, tmp_path / "alone")
    for name in FILES["sft"] - {"store.json"}:  # which has the times of writing
        assert Path(store, name).read_bytes() == Path(alone, name).read_bytes(), name


def flip(file):
    """A byte in the second half of a file, behind any header, is another one, in place: the size stays."""
    place = file.stat().st_size * 3 // 4
    with open(file, "r+b") as opened:
        opened.seek(place)
        [byte] = opened.read(1)
        opened.seek(place)
        opened.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("kind", ROWS)
def test_other_content_of_the_same_size_is_found_by_the_next_run(tmp_path, kind):
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS[kind])
    store = Path(read_all(kind, data, tmp_path / "cache")) if kind != "text" else None
    if store is None:
        read_all(kind, data, tmp_path / "cache")
        [store] = (tmp_path / "cache").iterdir()
    for name in FILES[kind]:
        if name.endswith(".json"):
            continue
        cache = tmp_path / name
        shutil.copytree(tmp_path / "cache", cache)  # times of writing and all
        flip(cache / store.name / name)
        with pytest.raises(UserError) as caught:
            read_all(kind, data, cache)
        assert str(caught.value).startswith(
            f"{cache / store.name / name} is damaged (its content is not what was written): delete "
        )


def test_a_copy_with_another_time_of_writing_is_the_same_store(tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS["sft"])
    store = Path(read_all("sft", data, tmp_path / "cache"))
    for file in store.iterdir():
        os.utime(file, ns=(0, 0))
    assert Path(read_all("sft", data, tmp_path / "cache")) == store


@pytest.mark.parametrize("kind", ROWS)
def test_a_store_that_is_written_to_while_it_is_mapped(tmp_path, kind):
    """In place it is an error; a twin renamed over it is not, since the mapped files live on."""
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS[kind])
    config = Config(data=DataConfig(train=str(data)))
    place, _ = sets.Maker(config, kind, TOKENIZER, "t", tmp_path / "cache").prepare("train")
    rows = sets.open_set(place, config, "train")
    store = Path(sets.directories(place)[0])
    rows.check_unwritten()
    shutil.copytree(store, tmp_path / "twin")
    shutil.rmtree(store)
    rows.check_unwritten()
    os.rename(tmp_path / "twin", store)
    rows.check_unwritten()
    rows = sets.open_set(place, config, "train")
    tokens = next(store.glob("tokens*.bin"))
    flip(tokens)
    with pytest.raises(UserError, match=rf"{tokens.name} was written to while this run was reading it"):
        rows.check_unwritten()


@pytest.mark.parametrize("kind", ROWS)
def test_the_content_of_a_set_is_that_of_its_tokens(tmp_path, kind):
    """Wherever it lies and whatever its source is called; other rows, or their order, are another content."""

    def content(name, rows, cache="cache"):
        (tmp_path / name).mkdir()
        data = write_jsonl(tmp_path / name / "rows.jsonl", rows)
        config = Config(data=DataConfig(train=str(data)))
        return sets.content(sets.Maker(config, kind, TOKENIZER, "t", tmp_path / cache).prepare("train")[0])

    rows = ROWS[kind]
    first = content("first", rows)
    assert content("second", rows, "elsewhere") == first
    assert len({first, content("fewer", rows[1:]), content("turned", rows[::-1])}) == 3
