"""Rows that are there twice, in one set or in two, by hashes of their tokens: 16 bytes a row in memory.

A row has a hash of all its tokens, and one of its prompt (the tokens before the first trained one). Equal
prompts with other completions are counted apart: several answers to one question are often meant, but in
training and validation they give the answer away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NO_PROMPT = 0
"""The hash of a prompt of one token or none: BOS alone is no prompt."""
EXAMPLES = 3


@dataclass(frozen=True)
class Hashes:
    """uint64 [R] each."""

    rows_R: np.ndarray
    prompts_R: np.ndarray


@dataclass(frozen=True)
class Repeats:
    count: int
    examples: list[tuple[int, int]]
    """[(row, the row that it repeats)], the first few."""


def row_hash(sequences: Sequence[np.ndarray]) -> int:
    """Of the tokens, int32, of all sequences of a row."""
    digest = hashlib.blake2b(digest_size=8)
    for tokens in sequences:
        digest.update(np.ascontiguousarray(tokens, dtype=np.int32).data)
        digest.update(b"|")
    return int.from_bytes(digest.digest(), "little")


def prompt_hash(tokens: np.ndarray) -> int:
    """Of the tokens before the first trained one."""
    return row_hash([tokens]) if len(tokens) > 1 else NO_PROMPT


def repeated_rows(hashes: Hashes) -> Repeats:
    """Rows equal to an earlier one."""
    later, first = _later(hashes.rows_R)
    return _repeats(later, first)


def repeated_prompts(hashes: Hashes) -> Repeats:
    """Rows with the prompt of an earlier one and another completion."""
    rest = np.ones(len(hashes.rows_R), dtype=np.bool_)
    rest[_later(hashes.rows_R)[0]] = False
    rows = np.flatnonzero(rest & (hashes.prompts_R != NO_PROMPT))
    later, first = _later(hashes.prompts_R[rows])
    return _repeats(rows[later], rows[first])


def leakage(train: Hashes, validation: Hashes) -> tuple[Repeats, Repeats]:
    """(validation rows that are training rows, others whose prompt is one of training); the examples are
    (row of validation, row of training)."""
    same, there = _shared(train.rows_R, validation.rows_R)
    rest = np.ones(len(validation.rows_R), dtype=np.bool_)
    rest[same] = False
    rows = np.flatnonzero(rest & (validation.prompts_R != NO_PROMPT))
    prompts, elsewhere = _shared(train.prompts_R, validation.prompts_R[rows])
    return _repeats(same, there), _repeats(rows[prompts], elsewhere)


def _repeats(rows: np.ndarray, others: np.ndarray) -> Repeats:
    return Repeats(len(rows), list(zip(rows[:EXAMPLES].tolist(), others[:EXAMPLES].tolist())))


def _later(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(indices of values that stood before, where each stood first), in order."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    stood = first[inverse]
    later = np.flatnonzero(stood != np.arange(len(values)))
    return later, stood[later]


def _shared(train: np.ndarray, validation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(indices into validation of values that are in train, where each is there first)."""
    if not len(train):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    known, first = np.unique(train, return_index=True)
    at = np.minimum(np.searchsorted(known, validation), len(known) - 1)
    both = np.flatnonzero(known[at] == validation)
    return both, first[at[both]]
