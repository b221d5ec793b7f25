"""The order of the rows and their packing: exact cover, capacity, equal numbers of bins, near the optimum."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.data import plan


@pytest.mark.parametrize(
    ("num_rows", "batch", "limit", "steps"),
    [
        (1, 1, None, 1),
        (1, 16, None, 1),  # fewer rows than a batch: one partial step
        (16, 16, None, 1),
        (17, 16, None, 2),  # the left-over row is a step
        (160, 16, 3, 3),
        (16, 16, 3, 1),  # a limit beyond the epoch changes nothing
    ],
)
def test_steps_per_epoch(num_rows, batch, limit, steps):
    assert plan.steps_per_epoch(num_rows, batch, limit) == steps


@given(
    num_rows=st.integers(1, 200),
    batch=st.integers(1, 50),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 3),
)
def test_an_epoch_visits_every_row_once(num_rows, batch, seed, epoch):
    steps = plan.steps_per_epoch(num_rows, batch)
    rows = [plan.step_rows(num_rows, batch, seed, epoch * steps + i) for i in range(steps)]
    assert [len(r) for r in rows[:-1]] == [batch] * (steps - 1)
    assert len(rows[-1]) == num_rows - batch * (steps - 1)
    assert sorted(np.concatenate(rows).tolist()) == list(range(num_rows))


def test_order_is_the_sorted_philox_stream():
    """Written out without numpy's shuffling, and pinned: a change would break every resume."""
    words = np.random.Philox(np.random.SeedSequence([42, 1])).random_raw(10).tolist()
    expected = sorted(range(10), key=lambda i: words[i])
    # 10 rows, batches of 4: steps 3, 4 and 5 are the second epoch.
    got = [plan.step_rows(10, 4, 42, step).tolist() for step in (3, 4, 5)]
    assert got == [expected[:4], expected[4:8], expected[8:]]
    assert [row for batch in got for row in batch] == GOLDEN


GOLDEN = [7, 3, 4, 2, 5, 9, 6, 8, 0, 1]


def test_epochs_and_seeds_differ_and_repeat():
    def order(seed, step):
        return plan.step_rows(100, 100, seed, step).tolist()

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert [order(0, 0), order(0, 1), order(1, 0), order(1, 1)] == orders


def test_limited_epochs_begin_anew():
    """limit 2 of 25 steps: step 2 is the first of epoch 1, not the third of epoch 0."""
    full = plan.step_rows(100, 100, 7, 1)
    assert plan.step_rows(100, 4, 7, 2, limit=2).tolist() == full[:4].tolist()


SIZES = st.lists(st.integers(1, 120), min_size=1, max_size=60)


def check_bins(ranks, rows, lengths, world_size, max_tokens, max_rows):
    assert len(ranks) == world_size
    assert len({len(own) for own in ranks}) == 1
    flat = [members for own in ranks for members in own]
    assert sorted(np.concatenate(flat).tolist()) == sorted(rows)
    for members in flat:
        assert members.dtype == np.int64
        assert len(members) <= (max_rows or len(rows))
        total = int(lengths[members].sum())
        assert total <= max_tokens or len(members) == 1
    return flat


@given(
    sizes=SIZES,
    world_size=st.integers(1, 9),
    max_tokens=st.integers(40, 300),
    max_rows=st.none() | st.integers(1, 5),
)
def test_pack_covers_fits_and_matches(sizes, world_size, max_tokens, max_rows):
    """120 tokens against a limit down to 40: rows longer than the limit are among them."""
    # Only odd row ids are packed: lengths are looked up by row id, not by place.
    lengths = np.zeros(2 * len(sizes), dtype=np.int64)
    lengths[1::2] = sizes
    rows = list(range(1, 2 * len(sizes), 2))
    ranks = plan.pack(rows, lengths, world_size=world_size, max_tokens=max_tokens, max_rows=max_rows)
    flat = check_bins(ranks, rows, lengths, world_size, max_tokens, max_rows)
    again = plan.pack(rows, lengths, world_size=world_size, max_tokens=max_tokens, max_rows=max_rows)
    assert [[m.tolist() for m in own] for own in again] == [[m.tolist() for m in own] for own in ranks]
    # No more bins than first-fit decreasing may need, and the round-up to the ranks.
    if max_rows is None and max(sizes) <= max_tokens:
        lower = -(-sum(sizes) // max_tokens)
        assert len(flat) <= -(-max(2 * lower, 1) // world_size) * world_size


def optimum(sizes, capacity):
    """Fewest bins, by trying every assignment."""

    def fits(remaining, rooms):
        if not remaining:
            return True
        head, *tail = remaining
        for i, room in enumerate(rooms):
            new = room >= head and room not in rooms[:i]
            if new and fits(tail, [*rooms[:i], room - head, *rooms[i + 1 :]]):
                return True
        return False

    ordered = sorted(sizes, reverse=True)
    return next(n for n in range(1, len(sizes) + 1) if fits(ordered, [capacity] * n))


@given(sizes=st.lists(st.integers(1, 100), min_size=1, max_size=9))
def test_pack_is_within_eleven_ninths_of_the_optimum(sizes):
    """Best-fit decreasing needs at most 11/9 OPT + 4 bins; small sets can be solved exactly."""
    ranks = plan.pack(range(len(sizes)), np.array(sizes), world_size=1, max_tokens=100)
    assert len(ranks[0]) <= 11 / 9 * optimum(sizes, 100) + 6 / 9


def test_fewer_rows_than_ranks_gives_empty_bins():
    ranks = plan.pack([3, 5], np.full(6, 10), world_size=4, max_tokens=100)
    assert sorted(len(own[0]) for own in ranks) == [0, 0, 1, 1]
    assert [len(own) for own in ranks] == [1] * 4


def test_no_rows_give_no_bins():
    assert plan.pack([], np.array([1]), world_size=2, max_tokens=10) == [[], []]


def test_rows_longer_than_the_limit_are_alone():
    ranks = plan.pack([0, 1, 2, 3], np.array([50, 150, 50, 100]), world_size=1, max_tokens=100)
    assert sorted(m.tolist() for m in ranks[0]) == [[0, 2], [1], [3]]


def test_equal_rows_are_shared_equally():
    """64 rows of 100 tokens on 8 ranks, 4 to a bin: everybody gets 2 bins of 4."""
    ranks = plan.pack(range(64), np.full(64, 100), world_size=8, max_tokens=400)
    assert [[len(m) for m in own] for own in ranks] == [[4, 4]] * 8


def test_ranks_finish_together():
    """Log-normal lengths, as in chat data: the slowest ranks are within 15 % of the mean."""
    lengths = np.minimum(np.random.default_rng(0).lognormal(5.5, 0.7, 512).astype(np.int64) + 10, 4096)
    ranks = plan.pack(range(512), lengths, world_size=8, max_tokens=8192)
    cost = np.array([[sum(n + n * n / 32768 for n in lengths[m]) for m in own] for own in ranks])
    assert cost.max(axis=0).sum() <= 1.15 * cost.mean(axis=0).sum()
    assert cost.sum(axis=1).max() <= 1.05 * cost.sum(axis=1).mean()


def test_bins_are_dealt_to_the_rank_with_least_so_far():
    """Rows of 400, 300, 200 and 100, one to a bin: 400 beside 300, then 200 to the rank that had 300."""
    lengths = np.array([400, 300, 200, 100])
    ranks = plan.pack(range(4), lengths, world_size=2, max_tokens=400, max_rows=1)
    assert [[m.tolist() for m in own] for own in ranks] == [[[0], [3]], [[1], [2]]]


def test_a_row_beyond_the_limit_does_not_spoil_the_balance():
    """It fills one of 4 bins; the 6 others of 50 are spread over 3 bins of 2, not put 3 and 3 and 0."""
    lengths = np.array([500, *[50] * 6])
    ranks = plan.pack(range(7), lengths, world_size=4, max_tokens=150)
    assert sorted(len(own[0]) for own in ranks) == [1, 2, 2, 2]


def test_a_long_row_counts_more_than_its_tokens():
    """One row of 32768 costs 65536; the same tokens in short rows cost little more than their number. With
    two bins and room enough, the long row's bin gets fewer tokens than the other."""
    lengths = np.array([32768, *[256] * 256])
    ((first,), (second,)) = plan.pack(range(257), lengths, world_size=2, max_tokens=100_000)
    long_bin, other = (first, second) if 0 in first else (second, first)
    assert lengths[long_bin].sum() < lengths[other].sum()


@given(sizes=SIZES, world_size=st.integers(1, 4), chunk=st.integers(1, 70), num_rows=st.integers(1, 60))
def test_eval_bins_cover_the_first_rows_in_order_of_chunks(sizes, world_size, chunk, num_rows):
    num_rows = min(num_rows, len(sizes))
    lengths = np.array(sizes)
    ranks = plan.eval_bins(num_rows, lengths, world_size=world_size, max_tokens=128, chunk_rows=chunk)
    check_bins(ranks, list(range(num_rows)), lengths, world_size, 128, None)
    for own in ranks:
        chunks = [int(m[0]) // chunk for m in own if len(m)]
        assert chunks == sorted(chunks)
