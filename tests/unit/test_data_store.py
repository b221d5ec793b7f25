"""The token store on disk: what was written is read, whole or not at all."""

from __future__ import annotations

import threading
import tracemalloc

import numpy as np
import pytest

from strop.data.store import TokenisedRow, TokenStore
from strop.errors import UserError


def sequence(*ids, trained_from=1):
    return np.array(ids), np.arange(len(ids)) >= trained_from


def pairs():
    yield TokenisedRow("a.jsonl", 1, [sequence(1, 2, 3), sequence(1, 2, 70000, 5, trained_from=2)])
    yield TokenisedRow("a.jsonl", 3, [sequence(7, 8), sequence(7, 9)], value=0.5)
    yield TokenisedRow("b.jsonl", 1, [sequence(4, 4, 4, 4), sequence(4, 4)])


def test_arrays_as_written_by_hand(tmp_path):
    TokenStore.write(tmp_path / "s", pairs(), kind="preference", digest="abc")
    store = TokenStore.open(tmp_path / "s")
    assert store.tokens.tolist() == [1, 2, 3, 1, 2, 70000, 5, 7, 8, 7, 9, 4, 4, 4, 4, 4, 4]
    assert np.flatnonzero(~store.trained).tolist() == [0, 3, 4, 7, 9, 11, 15]
    assert store.offsets.tolist() == [0, 3, 7, 9, 11, 15, 17]
    assert store.row_lengths.tolist() == [7, 4, 6]
    assert [store.row_id(row) for row in range(3)] == [("a.jsonl", 1), ("a.jsonl", 3), ("b.jsonl", 1)]
    assert (store.kind, store.seqs_per_row, store.num_rows, store.digest) == ("preference", 2, 3, "abc")
    assert (store.tokens.dtype, store.trained.dtype, store.offsets.dtype) == (np.int32, np.bool_, np.int64)
    np.testing.assert_array_equal(store.values_R, np.float32([np.nan, 0.5, np.nan]))
    chosen, rejected = store.sequences(1)
    assert (chosen[0].tolist(), rejected[0].tolist()) == ([7, 8], [7, 9])
    assert (chosen[1].tolist(), rejected[1].tolist()) == ([False, True], [False, True])
    with pytest.raises(ValueError, match="read-only"):
        store.tokens[0] = 1


def test_an_error_among_the_rows_leaves_nothing(tmp_path):
    def rows():
        yield from pairs()
        raise UserError("row 4 is bad")

    with pytest.raises(UserError, match="row 4 is bad"):
        TokenStore.write(tmp_path / "s", rows(), kind="preference", digest="abc")
    assert list(tmp_path.iterdir()) == []


def test_two_writers_leave_one_whole_store(tmp_path):
    """Both are past their last row before either renames."""
    barrier = threading.Barrier(2)

    def write(results):
        store = TokenStore.write(
            tmp_path / "s",
            pairs(),
            kind="preference",
            digest="abc",
            finish=lambda aside: (aside / "ledger.json").write_text(str(barrier.wait(30) * 0)),
        )
        results.append(store.tokens.tolist())

    results: list = []
    threads = [threading.Thread(target=write, args=(results,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert results[0] == results[1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]
    names = {
        "tokens.bin",
        "trained.bin",
        "offsets.npy",
        "rows.npy",
        "values.npy",
        "store.json",
        "ledger.json",
    }
    assert {entry.name for entry in (tmp_path / "s").iterdir()} == names


def test_memory_does_not_grow_with_the_tokens(tmp_path):
    """2,000 rows of 8,000 tokens are 64 MB of ids; writing them must not hold 8 MB."""
    ids, trained = np.arange(8000, dtype=np.int32), np.arange(8000) > 0
    rows = (TokenisedRow("a", line, [(ids, trained)]) for line in range(2000))
    tracemalloc.start()
    store = TokenStore.write(tmp_path / "s", rows, kind="sft", digest="x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(store.tokens) == 16_000_000
    assert peak < 8e6


def test_a_cut_file_is_named(tmp_path):
    TokenStore.write(tmp_path / "s", pairs(), kind="preference", digest="abc")
    with open(tmp_path / "s" / "tokens.bin", "ab") as file:
        file.truncate(40)
    with pytest.raises(UserError, match=r"s/tokens\.bin is damaged"):
        TokenStore.open(tmp_path / "s")


def test_a_directory_that_is_no_store(tmp_path):
    with pytest.raises(UserError, match="is not a token store"):
        TokenStore.open(tmp_path)
