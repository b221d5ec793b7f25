"""Training rows that give away a validation set: those with the prompt of one of its rows.

Prompts (the tokens before the first trained one, of a row's first sequence) are hashed, a chunk of rows at
a time; equal hashes are looked up and compared token by token. A row that has no prompt to speak of (nothing,
or BOS alone: plain text, or everything trained) counts as a whole. Nothing is taken out: the ledger tells.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from strop.data.ledger import EXAMPLES, place
from strop.data.store import TokenStore

CHUNK_TOKENS = 2_000_000
"""In memory at a time, or one row."""
SHORTEST = 2
"""Tokens of a prompt that says something."""


def leakage(train_store: TokenStore, val_store: TokenStore) -> list[tuple[int, int]]:
    """[(training row, validation row)] for each validation row whose prompt is in the training set too, with
    the first training row that has it."""
    return _matches(train_store, val_store, whole=False)


def equal_rows(train_store: TokenStore, val_store: TokenStore) -> list[tuple[int, int]]:
    """The same for rows that are equal from beginning to end."""
    return _matches(train_store, val_store, whole=True)


def record(train_store: TokenStore, val_store: TokenStore) -> dict[str, Any]:
    """What the ledger of a validation set tells of it: rows with a prompt of the training set, those of them
    that are training rows as a whole, and examples."""
    pairs = leakage(train_store, val_store)
    examples = [
        f"{place(*val_store.row_id(val))} has the prompt of {place(*train_store.row_id(train))}"
        for train, val in pairs[:EXAMPLES]
    ]
    rows = len(equal_rows(train_store, val_store)) if pairs else 0
    return {"prompts": len(pairs), "rows": rows, "of": val_store.num_rows, "examples": examples}


def _matches(train_store: TokenStore, val_store: TokenStore, whole: bool) -> list[tuple[int, int]]:
    hashes_V = np.concatenate([hashes for _, hashes in _hashed(val_store, whole)])
    order_V = np.argsort(hashes_V, kind="stable")
    sorted_V = hashes_V[order_V]
    found: dict[int, int] = {}
    for begin, hashes in _hashed(train_store, whole):
        first, end = (np.searchsorted(sorted_V, hashes, side=side) for side in ("left", "right"))
        for i in np.flatnonzero(first < end).tolist():
            tokens = _tokens(train_store, begin + i, whole)
            for row in order_V[first[i] : end[i]].tolist():
                if row not in found and np.array_equal(tokens, _tokens(val_store, row, whole)):
                    found[row] = begin + i
    return [(found[row], row) for row in sorted(found)]


def _hashed(store: TokenStore, whole: bool) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, uint64 [rows]) of each chunk: Σ w[position] (token + 1) mod 2^64, w random and odd."""
    edges_R = store.offsets[:: store.seqs_per_row]
    end = 0
    while end < store.num_rows:
        begin = end
        end = max(begin + 1, int(np.searchsorted(edges_R, edges_R[begin] + CHUNK_TOKENS, side="right")) - 1)
        lengths = _lengths(store, slice(begin, end), whole)
        edges = np.concatenate([[0], np.cumsum(lengths)])
        position = np.arange(edges[-1]) - np.repeat(edges[:-1], lengths)
        tokens = store.tokens[np.repeat(edges_R[begin:end], lengths) + position].astype(np.uint64)
        terms = (tokens + np.uint64(1)) * _weights(int(lengths.max()))[position]
        yield begin, np.add.reduceat(terms, edges[:-1])


def _lengths(store: TokenStore, rows: slice, whole: bool) -> np.ndarray:
    """int64 [rows]: tokens from each row's begin that count: its prompt, or all of its sequences."""
    n = store.seqs_per_row
    all_tokens = np.diff(store.offsets[n * rows.start : n * rows.stop + 1 : n])
    if whole:
        return all_tokens
    prompts = store.prompt_lengths(rows)[::n]
    return np.where(prompts >= SHORTEST, prompts, all_tokens)


def _weights(length: int) -> np.ndarray:
    """uint64 [length], odd; the same beginning for every length."""
    return np.random.Philox(key=1).random_raw(length) | np.uint64(1)


def _tokens(store: TokenStore, row: int, whole: bool) -> np.ndarray:
    begin = int(store.offsets[row * store.seqs_per_row])
    return store.tokens[begin : begin + int(_lengths(store, slice(row, row + 1), whole)[0])]
