"""Which rows an optimiser step trains on, and how ranks share them: pure functions, numpy only.

The rows of step k depend on (seed, number of rows, global batch size, k) and on nothing else: no state is
carried, a resume on any number of ranks trains on the same batches. Only then do ranks come in: `pack`
puts a step's rows into bins of at most `max_tokens` tokens, the same number of bins for every rank, since
every micro batch runs collectives that all ranks must enter. As all ranks wait for the slowest in each
micro batch, bins of like cost run at the same time.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence

import numpy as np

ATTENTION_LENGTH = 32768
"""Length at which attention costs as much as the rest of a layer (about 12 x the hidden size; here that of
a model between 1B and 8B). It only weighs the balance between ranks."""


def steps_per_epoch(num_rows: int, global_batch_size: int, limit: int | None = None) -> int:
    """Optimiser steps in a pass over the rows. The last, partial batch is a step with its true count."""
    steps = -(-num_rows // global_batch_size)
    return steps if limit is None else min(steps, limit)


def step_rows(
    num_rows: int, global_batch_size: int, seed: int, step: int, limit: int | None = None
) -> np.ndarray:
    """Row ids int64 [<= global_batch_size] of optimiser step `step` (from 0, over all epochs)."""
    epoch, index = divmod(step, steps_per_epoch(num_rows, global_batch_size, limit))
    begin = index * global_batch_size
    return _permutation(num_rows, seed, epoch)[begin : begin + global_batch_size]


@functools.lru_cache(maxsize=1)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Order of one epoch: argsort of raw Philox words.

    numpy keeps the raw stream of a bit generator and SeedSequence for ever, but may change what
    Generator.permutation does with it, and then a resume under a newer numpy would shuffle anew.
    """
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(num_rows)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


def blend_counts(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Rows that each source gives to an epoch of sum(sizes) rows: its share of them, by largest remainder."""
    total = sum(sizes)
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(x) for x in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def blend(
    slots: np.ndarray, sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int
) -> np.ndarray:
    """Row ids int64 for `slots` of a blend's epoch (as `step_rows` gives them for sum(sizes) rows).

    Slots are dealt out to the sources in the numbers of `blend_counts`. Over the epochs a source gives its
    rows in passes of its own, each in a new order: every row once in a pass, whatever its weight.
    """
    counts = blend_counts(sizes, weights)
    ends, begins = np.cumsum(counts), np.cumsum([0, *sizes])
    out = np.empty(len(slots), dtype=np.int64)
    for source, (size, count, end) in enumerate(zip(sizes, counts, ends)):
        mine = np.flatnonzero((slots >= end - count) & (slots < end))
        draws = epoch * count + slots[mine] - (end - count)
        for turn in np.unique(draws // size).tolist():
            now = draws // size == turn
            out[mine[now]] = begins[source] + _source_order(size, seed, source, turn)[draws[now] % size]
    return out


@functools.lru_cache(maxsize=64)
def _source_order(size: int, seed: int, source: int, turn: int) -> np.ndarray:
    """Order of one pass over one source of a blend, made as `_permutation` is, of a stream of its own."""
    words = np.random.Philox(np.random.SeedSequence([seed, turn, source, 1])).random_raw(size)
    return np.argsort(words, kind="stable")


def pack(
    rows: np.ndarray | Sequence[int],
    lengths: np.ndarray,
    *,
    world_size: int,
    max_tokens: int,
    max_rows: int | None = None,
) -> list[list[np.ndarray]]:
    """[rank][micro batch] -> row ids. Every rank gets the same number of bins, some of them may be empty.

    lengths: int64 [num_rows of the store], indexed by row id. A row longer than max_tokens is a bin of its
    own. Deterministic; rows keep the order of `rows` inside a bin. Best-fit decreasing finds how many bins
    are needed (at most 11/9 of the optimum); that number is rounded up to a multiple of the ranks, and
    longest-first spreads the rows over all of them by cost.
    """
    rows = np.asarray(rows, dtype=np.int64)
    if len(rows) == 0:
        return [[] for _ in range(world_size)]
    sizes = np.asarray(lengths)[rows].tolist()
    costs = [size + size * size / ATTENTION_LENGTH for size in sizes]
    order = sorted(range(len(rows)), key=lambda i: (-sizes[i], i))
    most = len(rows) if max_rows is None else max_rows
    tight = _best_fit(order, sizes, max_tokens, most)
    num_bins = -(-len(tight) // world_size) * world_size
    bins = _spread(order, sizes, costs, num_bins, max_tokens, most)
    if bins is None:  # too tight to balance: take the bins that are known to fit
        bins = tight + [[] for _ in range(num_bins - len(tight))]
    return [[rows[sorted(members)] for members in own] for own in _deal(bins, costs, world_size)]


def eval_bins(
    num_rows: int,
    lengths: np.ndarray,
    *,
    world_size: int,
    max_tokens: int,
    max_rows: int | None = None,
    chunk_rows: int = 4096,
) -> list[list[np.ndarray]]:
    """[rank][micro batch] -> row ids of the rows 0 .. num_rows-1, each exactly once.

    Packed chunk by chunk in order, so that the reads stay local and packing takes linear time.
    """
    ranks: list[list[np.ndarray]] = [[] for _ in range(world_size)]
    for begin in range(0, num_rows, chunk_rows):
        rows = np.arange(begin, min(begin + chunk_rows, num_rows))
        chunk = pack(rows, lengths, world_size=world_size, max_tokens=max_tokens, max_rows=max_rows)
        for own, more in zip(ranks, chunk):
            own.extend(more)
    return ranks


def _best_fit(order: list[int], sizes: list[int], max_tokens: int, most: int) -> list[list[int]]:
    """Each item, largest first, into the fullest bin that still has room for it, else into a new one."""
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (room, bin), sorted
    for item in order:
        at = bisect.bisect_left(open_bins, (sizes[item], -1))
        if at < len(open_bins):
            room, chosen = open_bins.pop(at)
        else:
            room, chosen = max_tokens, len(bins)
            bins.append([])
        bins[chosen].append(item)
        if room > sizes[item] and len(bins[chosen]) < most:
            bisect.insort(open_bins, (room - sizes[item], chosen))
    return bins


def _spread(
    order: list[int], sizes: list[int], costs: list[float], num_bins: int, max_tokens: int, most: int
) -> list[list[int]] | None:
    """Each item, largest first, into the cheapest bin that has room; None if one finds no room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    room = np.full(num_bins, max_tokens, dtype=np.int64)
    cost = np.zeros(num_bins)
    for item in order:
        # An item beyond max_tokens needs an empty bin, and leaves no room in it (a size is at least 1).
        fits = room >= min(sizes[item], max_tokens)
        if not fits.any():
            return None
        chosen = int(np.argmin(np.where(fits, cost, np.inf)))
        bins[chosen].append(item)
        cost[chosen] += costs[item]
        room[chosen] = 0 if len(bins[chosen]) == most else max(0, room[chosen] - sizes[item])
    return bins


def _deal(bins: list[list[int]], costs: list[float], world_size: int) -> list[list[list[int]]]:
    """Bins of like cost into the same micro batch; in each, the dearest to the rank with least so far."""
    bin_costs = [sum(costs[i] for i in members) for members in bins]
    by_cost = sorted(range(len(bins)), key=lambda b: (-bin_costs[b], b))
    ranks: list[list[list[int]]] = [[] for _ in range(world_size)]
    totals = [0.0] * world_size
    for begin in range(0, len(by_cost), world_size):
        idlest_first = sorted(range(world_size), key=lambda rank: (totals[rank], rank))
        for rank, b in zip(idlest_first, by_cost[begin : begin + world_size]):
            ranks[rank].append(bins[b])
            totals[rank] += bin_costs[b]
    return ranks
