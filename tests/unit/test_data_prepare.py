"""Preparation end to end: policies, thresholds, the ledger's sums, the cache."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import re
import time

import numpy as np
import pytest
from data_helpers import tiny_tokenizer, write_jsonl

from strop.config import Config, DataConfig, ModelConfig, SftConfig
from strop.data import prepare as prepare_module
from strop.data.ledger import Ledger
from strop.data.prepare import has_validation, prepare
from strop.data.store import TokenStore
from strop.errors import StorageError, UserError

TOKENIZER = tiny_tokenizer()
GOOD = {"prompt": "How many?", "chosen": " 84", "rejected": " twelve"}
EQUAL = {"prompt": "How many?", "chosen": " 84", "rejected": " 84"}
LONG = {"prompt": "How many?", "chosen": " 84" * 40, "rejected": " 12"}


def rows(n):
    return [{"prompt": f"{i} apples?", "completion": f" {i}"} for i in range(n)]


@pytest.fixture
def run(tmp_path):
    """Prepares rows (or what a configuration names) in a cache of its own."""

    def run(data, kind="preference", split="train", digest="t", sft=None, model=None, **settings):
        if isinstance(data, list):
            data = str(write_jsonl(tmp_path / "a.jsonl", data))
        config = Config(
            data=DataConfig(train=data, **settings), sft=sft or SftConfig(), model=model or ModelConfig()
        )
        return prepare(config, TOKENIZER, digest, tmp_path / "cache", kind, split)

    run.path = tmp_path / "a.jsonl"
    run.cache = tmp_path / "cache"
    return run


def message_of(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_store_and_ledger_agree(run):
    store, ledger = run([GOOD, EQUAL, GOOD], on_bad_row="skip", max_dropped_fraction=0.5)
    entry = ledger.sources[str(run.path)]
    assert (entry.read, entry.used, entry.num_dropped) == (3, 2, 1)
    assert entry.tokens == len(store.tokens) == int(store.offsets[-1])
    assert entry.trained_tokens == int(store.trained.sum())
    assert entry.longest == int(np.diff(store.offsets).max())
    assert entry.dropped["same_pair"].examples == [{"line": 2, "message": "chosen and rejected are the same"}]
    assert [store.row_id(row) for row in range(2)] == [(str(run.path), 1), (str(run.path), 3)]
    assert store.kind == "preference"


def test_bad_row_stops_by_default(run):
    assert message_of(run, [GOOD, EQUAL]) == (
        f"{run.path}, line 2: chosen and rejected are the same\n"
        "  (data.on_bad_row=skip leaves such rows out and counts them)"
    )
    assert list(run.cache.iterdir()) == []


def test_a_line_that_does_not_parse_stops_with_file_and_line(run):
    run.path.write_text(json.dumps(GOOD) + "\n{oops\n")
    assert message_of(run, str(run.path)).splitlines()[0] == (
        f"{run.path}, line 2: not JSON: Expecting property name enclosed in double quotes (column 2)"
    )


def test_over_length_is_dropped_or_an_error(run):
    data = [GOOD] * 30 + [LONG]
    store, ledger = run(data, max_length=40)
    assert store.num_rows == 30
    (reason, dropped), *_ = ledger.sources[str(run.path)].dropped.items()
    assert (reason, dropped.rows) == ("over_length", 1)
    message = message_of(run, data, max_length=40, over_length="error")
    assert re.fullmatch(
        re.escape(f"{run.path}, line 31: ") + r"\d+ tokens, more than data\.max_length=40\n"
        r"  \(data\.over_length=drop leaves such rows out and counts them\)",
        message,
    )


def test_threshold_says_how_many_why_and_which_key(run):
    message = message_of(run, [GOOD] * 6 + [LONG, LONG, EQUAL, {"a": 1}], max_length=40, on_bad_row="skip")
    lines = message.splitlines()
    assert lines[0] == (
        "4 of 10 rows of the train set (40.0%) were dropped, more than data.max_dropped_fraction=0.05 allows"
    )
    assert re.fullmatch(
        re.escape(f"  2 over_length, the first at {run.path}, line 7: ")
        + r"\d+ tokens, more than data\.max_length=40; data\.max_length is the key to raise",
        lines[1],
    )
    assert lines[2].startswith(f"  1 same_pair, the first at {run.path}, line 9: chosen and rejected")
    assert lines[3].startswith(f"  1 wrong_fields, the first at {run.path}, line 10: it has the fields a;")


def test_threshold_is_inclusive(run):
    """1 of 10 at a limit of 0.1 passes."""
    store, _ = run([GOOD] * 9 + [EQUAL], on_bad_row="skip", max_dropped_fraction=0.1)
    assert store.num_rows == 9


def test_threshold_is_checked_again_on_a_cached_store(run):
    run([GOOD] * 9 + [EQUAL], on_bad_row="skip", max_dropped_fraction=0.1)
    message = message_of(run, [GOOD] * 9 + [EQUAL], on_bad_row="skip", max_dropped_fraction=0.05)
    assert message.startswith("1 of 10 rows of the train set (10.0%) were dropped")


def test_no_row_left(run):
    message = message_of(run, [EQUAL], on_bad_row="skip", max_dropped_fraction=1.0)
    assert message.startswith("all 1 rows of the train set were dropped\n  1 same_pair, the first at ")


def test_split_covers_every_row_once(run):
    data = rows(400)
    parts = [_split(run, data, part) for part in ("train", "validation")]
    lines = [{store.row_id(row)[1] for row in range(store.num_rows)} for store, _ in parts]
    assert lines[0] & lines[1] == set()
    assert len(lines[0] | lines[1]) == 400
    assert 0.1 * 400 < len(lines[1]) < 0.3 * 400
    for (store, ledger), other in zip(parts, reversed(parts)):
        entry = ledger.sources[str(run.path)]
        assert (entry.used, entry.other_split) == (store.num_rows, other[0].num_rows)


def _split(run, data, part):
    config = Config(data=DataConfig(train=str(write_jsonl(run.path, data)), split="80,20,0"))
    assert has_validation(config.data, "sft")
    return prepare(config, TOKENIZER, "t", run.cache, "sft", part)


def test_a_split_that_leaves_nothing(run):
    config = Config(data=DataConfig(train=str(write_jsonl(run.path, rows(1))), split="1,1e-9,0"))
    assert message_of(prepare, config, TOKENIZER, "t", run.cache, "sft", "validation") == (
        "the validation set has no rows: data.split gives all 1 rows to the other sets"
    )


def test_has_validation(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", rows(2))
    assert not has_validation(DataConfig(train=str(tmp_path)), "sft")
    assert not has_validation(DataConfig(train=str(tmp_path), split="9,0,1"), "sft")
    write_jsonl(tmp_path / "validation.jsonl", rows(2))
    assert has_validation(DataConfig(train=str(tmp_path)), "sft")
    assert has_validation(DataConfig(train="x.jsonl", validation=str(tmp_path)), "sft")


def test_cache_hit_reads_no_row_and_changes_miss(run, monkeypatch):
    data = rows(300)
    first, first_ledger = run(data, kind="sft")
    monkeypatch.setattr(prepare_module.sources, "read", None)  # calling it would raise
    start = time.monotonic()
    second, ledger = run(str(run.path), kind="sft")
    assert time.monotonic() - start < 0.1
    assert second.path == first.path
    assert dataclasses.asdict(ledger) == dataclasses.asdict(first_ledger)
    monkeypatch.undo()
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    others = [
        run(rows(301), kind="sft"),  # content
        run(data, kind="sft", digest="another tokenizer"),
        run(data, kind="sft", max_length=100),
        run(data, kind="sft", over_length="error"),
        run(data, kind="sft", on_bad_row="skip"),
        run(data, kind="sft", sft=SftConfig(train_on="everything")),
        run(data, kind="sft", model=ModelConfig(chat_template=template)),
    ]
    assert len({store.digest for store, _ in [(first, 0), *others]}) == 1 + len(others)
    back, _ = run(data, kind="sft")
    assert back.path == first.path


def test_a_setting_that_decides_nothing_hits(run):
    first, _ = run([GOOD])
    second, _ = run([GOOD], sft=SftConfig(train_on="everything"), max_dropped_fraction=0.5)
    assert first.path == second.path


def _prepare_in_process(path, cache, barrier, queue):
    barrier.wait(60)
    store, ledger = prepare(Config(data=DataConfig(train=path)), TOKENIZER, "t", cache, "sft")
    queue.put((store.digest, store.tokens[:].tolist(), ledger.used))


def test_two_processes_at_once(run):
    path = str(write_jsonl(run.path, rows(200)))
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_prepare_in_process, args=(path, run.cache, barrier, queue)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert results[0] == results[1]
    assert results[0][2] == 200
    assert len(list(run.cache.iterdir())) == 1


def test_full_disk_is_the_storage_error(run, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TokenStore, "write", full)
    with pytest.raises(StorageError, match=r"No space left on device \(data\.cache_dir\)"):
        run([GOOD])


def test_progress_counts_rows(run):
    seen = []
    config = Config(data=DataConfig(train=str(write_jsonl(run.path, rows(2500)))))
    prepare(config, TOKENIZER, "t", run.cache, "sft", progress=seen.append)
    assert seen == [1000, 2000]


def test_batches_do_not_show(run):
    """1,100 rows are three batches: the same tokens as one at a time, in order."""
    store, _ = run(rows(1100), kind="sft")
    assert [store.row_id(row)[1] for row in range(1100)] == list(range(1, 1101))
    for row in (0, 511, 512, 1023, 1024, 1099):
        (ids, _), *_ = store.sequences(row)
        assert TOKENIZER.decode(ids) == f"{row} apples? {row}</s>"


def test_ledger_file_and_table(run, tmp_path):
    _, ledger = run([GOOD, EQUAL, EQUAL], on_bad_row="skip", max_dropped_fraction=0.9)
    ledger.save(tmp_path / "ledger.json")
    assert dataclasses.asdict(Ledger.load(tmp_path / "ledger.json")) == dataclasses.asdict(ledger)
    record = json.loads((tmp_path / "ledger.json").read_text())
    assert (record["read"], record["used"], record["dropped"]) == (3, 1, 2)
    lines = ledger.table().splitlines()
    assert lines[0] == "train set"
    assert lines[1].split() == ["source", "read", "used", "dropped", "tokens", "trained", "longest"]
    assert lines[2].split()[:4] == [str(run.path), "3", "1", "2"]
    assert lines[3].split() == ["same_pair", "2", "0"]
