"""Packed batches against arrays written by hand, and the thread that makes them ahead."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from strop.data.batch import Prefetcher, make_batch
from strop.data.store import TokenisedRow, TokenStore


def sequence(ids, trained):
    return np.array(ids), np.array(trained, dtype=bool)


@pytest.fixture
def store(tmp_path):
    rows = [
        TokenisedRow("a", 1, [sequence([1, 2, 3], [0, 0, 1]), sequence([1, 2, 4, 5], [0, 0, 1, 1])]),
        TokenisedRow("a", 2, [sequence([6, 7], [0, 1]), sequence([6, 8], [0, 1])]),
        TokenisedRow("a", 3, [sequence([9, 9, 9], [0, 1, 1]), sequence([9, 8], [0, 1])]),
    ]
    return TokenStore.write(tmp_path / "s", iter(rows), kind="preference", digest="x")


def test_two_rows_side_by_side(store):
    """Rows in the order asked for, chosen before rejected, positions from 0 in each sequence."""
    ref = np.arange(100, 100 + len(store.tokens), dtype=np.float32)
    batch = make_batch(store, [2, 0], ref)
    assert batch.tokens_T.tolist() == [9, 9, 9, 9, 8, 1, 2, 3, 1, 2, 4, 5]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8, 12]
    assert batch.trained_T.tolist() == [bool(x) for x in (0, 1, 1, 0, 1, 0, 0, 1, 0, 0, 1, 1)]
    assert batch.rows.tolist() == [2, 0]
    assert batch.max_seqlen == 4
    # The store lays its 16 tokens out as rows 0, 1, 2; row 2 begins at 11.
    assert batch.ref_logp_T.tolist() == [0, 112, 113, 0, 115, 0, 0, 102, 0, 0, 105, 106]
    assert not batch.is_dummy
    kinds = [batch.tokens_T.dtype, batch.positions_T.dtype, batch.cu_seqlens.dtype, batch.ref_logp_T.dtype]
    assert kinds == [torch.int64, torch.int64, torch.int32, torch.float32]


def test_no_rows_give_a_dummy_with_nothing_trained(store):
    batch = make_batch(store, np.empty(0, dtype=np.int64), np.zeros(len(store.tokens), np.float32))
    assert batch.is_dummy
    assert batch.cu_seqlens.tolist() == [0, 2, 4]
    assert batch.positions_T.tolist() == [0, 1, 0, 1]
    assert not batch.trained_T.any()
    assert batch.ref_logp_T.tolist() == [0] * 4
    assert len(batch.tokens_T) == 4


def test_where_trained_tokens_stand_is_known_in_every_part(store):
    batch = make_batch(store, np.array([1, 0]))
    first = int(batch.cu_seqlens[1])
    parts = [batch, batch.part(slice(first, None), slice(1, 2)), batch.trained_only(batch.index_N)]
    for one in parts:
        assert torch.equal(one.index_N, one.trained_T.nonzero()[:, 0])
    assert batch.known_N is not None
    assert len(make_batch(store, np.array([], dtype=np.int64)).index_N) == 0


def test_a_batch_is_a_copy(store):
    """Writing into a batch must not reach the mapped file."""
    make_batch(store, [0]).tokens_T.fill_(0)
    assert store.tokens[:3].tolist() == [1, 2, 3]


def test_to_moves_every_tensor(store):
    batch = make_batch(store, [0]).to("meta")
    tensors = (batch.tokens_T, batch.positions_T, batch.cu_seqlens, batch.trained_T)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_prefetcher_keeps_order_and_looks_ahead_no_further_than_depth():
    made: list[int] = []

    def items():
        for i in range(20):
            made.append(i)
            yield i

    got = []
    with Prefetcher(items(), depth=3) as ahead:
        for i in ahead:
            time.sleep(0.002)
            got.append(i)
            assert len(made) <= len(got) + 3 + 1  # 3 wait, one more is in the thread's hand
    assert got == list(range(20))


def test_prefetcher_raises_in_the_consumer_after_the_items_before():
    def items():
        yield 1
        yield 2
        raise OSError("disk gone")

    ahead = Prefetcher(items(), depth=8)
    assert (next(ahead), next(ahead)) == (1, 2)
    with pytest.raises(OSError, match="disk gone"):
        next(ahead)
    assert list(ahead) == []  # over, and it does not hang
    ahead.close()


def test_prefetcher_closes_promptly_while_its_thread_waits():
    def forever():
        while True:
            yield 0

    ahead = Prefetcher(forever(), depth=1)
    assert next(ahead) == 0
    start = time.monotonic()
    ahead.close()
    ahead.close()
    assert time.monotonic() - start < 1
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_prefetcher_works_while_the_consumer_is_busy():
    """The second item is made during the consumer's work on the first."""
    second_made = threading.Event()

    def items():
        yield 1
        second_made.set()
        yield 2

    with Prefetcher(items()) as ahead:
        assert next(ahead) == 1
        assert second_made.wait(5)
