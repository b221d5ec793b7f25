"""Training rows that give away a validation set: those with the prompt of one of its rows.

Prompts (the tokens before the first trained one, of a row's first sequence) are hashed, a chunk of rows at a
time; equal hashes are looked up and compared token by token. A row that has no prompt to speak of (nothing,
or BOS alone: plain text, or everything trained) counts as a whole. Nothing is taken out: the ledger tells.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from strop.data.ledger import EXAMPLES, place
from strop.data.store import CHUNK_ROWS, TokenStore

SHORTEST = 2
"""Tokens of a prompt that says something."""


def leakage(train_store: TokenStore, val_store: TokenStore) -> list[tuple[int, int]]:
    """[(training row, validation row)] for each validation row whose prompt is in the training set too, with
    the first training row that has it."""
    hashes_V = np.concatenate([hashes for _, hashes in _hashed(val_store)])
    order_V = np.argsort(hashes_V, kind="stable")
    sorted_V = hashes_V[order_V]
    found: dict[int, int] = {}
    for begin, hashes in _hashed(train_store):
        first, end = (np.searchsorted(sorted_V, hashes, side=side) for side in ("left", "right"))
        for i in np.flatnonzero(first < end).tolist():
            prompt = _prompt(train_store, begin + i)
            for row in order_V[first[i] : end[i]].tolist():
                if row not in found and np.array_equal(prompt, _prompt(val_store, row)):
                    found[row] = begin + i
    return [(found[row], row) for row in sorted(found)]


def equal_rows(train_store: TokenStore, val_store: TokenStore, pairs: list[tuple[int, int]]) -> int:
    """In how many of these pairs the rows are equal from beginning to end."""
    return sum(
        all(
            np.array_equal(a, b)
            for (a, _), (b, _) in zip(train_store.sequences(train), val_store.sequences(val))
        )
        for train, val in pairs
    )


def record(train_store: TokenStore, val_store: TokenStore) -> dict[str, Any]:
    """What the ledger of a validation set tells of it: rows with a prompt of the training set, those that are
    equal as a whole among them, and examples."""
    pairs = leakage(train_store, val_store)
    examples = [
        f"{place(*val_store.row_id(val))} has the prompt of {place(*train_store.row_id(train))}"
        for train, val in pairs[:EXAMPLES]
    ]
    equal = equal_rows(train_store, val_store, pairs)
    return {"prompts": len(pairs), "rows": equal, "of": val_store.num_rows, "examples": examples}


def _hashed(store: TokenStore) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, uint64 [rows]) of each chunk: Σ w[position] (token + 1) mod 2^64, w random and odd."""
    n = store.seqs_per_row
    for begin in range(0, store.num_rows, CHUNK_ROWS):
        rows = slice(begin, min(begin + CHUNK_ROWS, store.num_rows))
        starts = store.offsets[n * rows.start : n * rows.stop : n]
        lengths = _lengths(store, rows)
        edges = np.concatenate([[0], np.cumsum(lengths)])
        position = np.arange(edges[-1]) - np.repeat(edges[:-1], lengths)
        tokens = store.tokens[np.repeat(starts, lengths) + position].astype(np.uint64)
        terms = (tokens + np.uint64(1)) * _weights(int(lengths.max()))[position]
        yield begin, np.add.reduceat(terms, edges[:-1])


def _lengths(store: TokenStore, rows: slice) -> np.ndarray:
    """int64 [rows]: tokens of each row's first sequence that count."""
    n = store.seqs_per_row
    edges = store.offsets[n * rows.start : n * rows.stop + 1]
    prompts = store.prompt_lengths(rows)[::n]
    return np.where(prompts >= SHORTEST, prompts, np.diff(edges)[::n])


def _weights(length: int) -> np.ndarray:
    """uint64 [length], odd; the same beginning for every length."""
    return np.random.Philox(key=1).random_raw(length) | np.uint64(1)


def _prompt(store: TokenStore, row: int) -> np.ndarray:
    (begin, _), *_ = store.spans(row)
    return store.tokens[begin : begin + int(_lengths(store, slice(row, row + 1))[0])]
