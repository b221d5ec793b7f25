"""Rows that are there twice, in one set or in two, and rows that share a prompt.

Two rows are the same if all their tokens are, sequence by sequence. They share a prompt if the tokens before
the first trained one, in the first sequence of each, are the same; nothing, or BOS alone, is no prompt, so
plain text counts as a whole only. Rows that share a prompt without being the same are counted apart: several
answers to one question are often meant, but in training and validation they give the answer away.

A set is read once, a few million tokens at a time; 16 bytes of each row are kept, a hash of the row and one
of its prompt. Rows with equal hashes are then compared token by token. Nothing is taken out: the ledger and
tools.look_at_data tell, by the same functions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from strop.data import units
from strop.data.ledger import EXAMPLES, Ledger, place
from strop.data.sets import Place, RowSet
from strop.data.store import TokenStore
from strop.data.units import Chunk

SHORTEST = 2
"""Tokens of a prompt that says something."""
NO_PROMPT = 0
"""The hash of a shorter one; no other hash is 0."""
CHUNK_ROWS = 2**20
"""Whose hashes are looked up at a time."""


@dataclass(frozen=True)
class Contents:
    """A set by the hashes of its R rows (or documents), uint64 [R] each."""

    rows: RowSet
    whole_R: np.ndarray
    prompts_R: np.ndarray

    @classmethod
    def of(cls, rows: RowSet) -> Contents:
        return cls.gathered(rows, (hashes(chunk, rows.seqs_per_row) for chunk in units.chunks(rows)))

    @classmethod
    def gathered(cls, rows: RowSet, pieces: Iterable[tuple[np.ndarray, np.ndarray]]) -> Contents:
        """From the hashes of all chunks, in order."""
        return cls(rows, *(np.concatenate(column) for column in zip(*pieces)))

    def hashes_R(self, whole: bool) -> np.ndarray:
        return self.whole_R if whole else self.prompts_R

    def tokens(self, row: int, whole: bool) -> list[np.ndarray]:
        """What is compared of a row: all its sequences, or its prompt."""
        sequences = units.sequences(self.rows, row)
        if whole:
            return [tokens for tokens, _ in sequences]
        tokens, trained = sequences[0]
        return [tokens[: int(np.append(trained, True).argmax())]]


@dataclass(frozen=True)
class Repeats:
    """int64 [N] each: rows that repeat another one, in order, and the first that each of them repeats."""

    rows_N: np.ndarray
    firsts_N: np.ndarray

    @property
    def count(self) -> int:
        return len(self.rows_N)

    def pairs(self, most: int) -> list[tuple[int, int]]:
        """[(row, the row that it repeats)], the first ones."""
        return list(zip(self.rows_N[:most].tolist(), self.firsts_N[:most].tolist()))


def hashes(chunk: Chunk, seqs_per_row: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a chunk's rows and of their prompts, uint64 [R] each: Σ w[position] (token + 1) mod 2^64 of a
    sequence, and the same of a row's sequences; w is random and odd."""
    begins_S, lengths_S = chunk.offsets_S1[:-1], np.diff(chunk.offsets_S1)
    position_T = np.arange(len(chunk.tokens_T)) - np.repeat(begins_S, lengths_S)
    terms_T = _weights(int(lengths_S.max()))[position_T]
    terms_T *= chunk.tokens_T.astype(np.uint64) + np.uint64(1)
    whole_S = np.add.reduceat(terms_T, begins_S)
    whole_R = (whole_S.reshape(-1, seqs_per_row) * _weights(seqs_per_row)).sum(axis=1, dtype=np.uint64)
    prompts_S = chunk.prompts_S
    terms_T[position_T >= np.repeat(prompts_S, lengths_S)] = 0
    prompts_R = np.maximum(np.add.reduceat(terms_T, begins_S)[::seqs_per_row], 1)
    prompts_R[prompts_S[::seqs_per_row] < SHORTEST] = NO_PROMPT
    return np.maximum(whole_R, 1), prompts_R


def within(own: Contents) -> tuple[Repeats, Repeats]:
    """(rows that are an earlier one again, other rows with the prompt of an earlier one)."""
    return _matches(own, own)


def leakage(train: Contents, other: Contents) -> tuple[Repeats, Repeats]:
    """(rows of `other` that are training rows, others of its rows that have the prompt of one)."""
    return _matches(train, other)


def _matches(known: Contents, asked: Contents) -> tuple[Repeats, Repeats]:
    is_left_R = np.ones(len(asked.whole_R), dtype=np.bool_)
    same = _firsts(known, asked, is_left_R, whole=True)
    is_left_R[same.rows_N] = False
    is_left_R &= asked.prompts_R != NO_PROMPT
    return same, _firsts(known, asked, is_left_R, whole=False)


def _firsts(known: Contents, asked: Contents, is_asked_R: np.ndarray, whole: bool) -> Repeats:
    """The rows of `asked` (bool [R]: which) that have an equal in `known`, and the first one there;
    within one set, those that have an earlier one."""
    known_R, asked_R = known.hashes_R(whole), asked.hashes_R(whole)
    if known is asked:  # every hash is there once; what is there twice matters
        wanted = np.sort(known_R[known_R != NO_PROMPT])
        wanted = wanted[1:][wanted[1:] == wanted[:-1]]
    else:
        wanted = np.sort(asked_R[is_asked_R])
    rows_K = _among(known_R, wanted)
    rows_K = rows_K[np.argsort(known_R[rows_K], kind="stable")]
    hashes_K = known_R[rows_K]
    rows_A = _among(asked_R, hashes_K)
    rows_A = rows_A[is_asked_R[rows_A]]
    begin_A, end_A = (np.searchsorted(hashes_K, asked_R[rows_A], side) for side in ("left", "right"))
    found = []
    for row, begin, end in zip(rows_A.tolist(), begin_A.tolist(), end_A.tolist()):
        if known is asked and rows_K[begin] == row:
            continue
        tokens = asked.tokens(row, whole)
        for first in map(int, rows_K[begin:end]):
            if known is asked and first == row:
                break
            if _equal(tokens, known.tokens(first, whole)):
                found.append((row, first))
                break
    return Repeats(*np.array(found, dtype=np.int64).reshape(-1, 2).T)


def _among(hashes_R: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """int64: the rows whose hash is one of `wanted`, which is sorted."""
    found = [np.zeros(0, dtype=np.int64)]
    for begin in range(0, len(hashes_R) if len(wanted) else 0, CHUNK_ROWS):
        own = hashes_R[begin : begin + CHUNK_ROWS]
        at = np.minimum(np.searchsorted(wanted, own), len(wanted) - 1)
        found.append(begin + np.flatnonzero(wanted[at] == own))
    return np.concatenate(found)


def _equal(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


def _weights(length: int) -> np.ndarray:
    """uint64 [length], odd; the same beginning for every length."""
    return np.random.Philox(key=1).random_raw(length) | np.uint64(1)


def digest(sequences: Iterable[np.ndarray]) -> bytes:
    """16 bytes that stand for a row which is in no set yet, so that nothing can be compared: equal for the
    same rows, and for others by no chance worth a thought."""
    out = hashlib.blake2b(digest_size=16)
    for tokens in sequences:
        out.update(len(tokens).to_bytes(8, "little"))
        out.update(np.ascontiguousarray(tokens, dtype=np.int32).data)
    return out.digest()


def find_overlap(
    ledger: Ledger, place: Place, train_place: Place, known: dict[str, Any] | None = None
) -> None:
    """Tell the ledger of a set of rows what the set shares with the training set. known: what was told
    before, which is told again if it is of the same sets. Not of text: reading all of it would keep the GPUs
    waiting, and tools.look_at_data does it."""
    if not isinstance(place, str) or not isinstance(train_place, str):
        return
    sets = [Path(train_place).name, Path(place).name]
    if known is None or known.get("sets") != sets:
        train, other = (Contents.of(TokenStore.open(path)) for path in (train_place, place))
        known = {"sets": sets, **record(train, other)}
    ledger.overlap = known


def record(train: Contents, other: Contents) -> dict[str, Any]:
    """What the ledger of a set tells: how many of its rows are training rows, how many others have the prompt
    of one, and examples."""
    rows, prompts = leakage(train, other)
    examples = [
        f"{place(*other.rows.row_id(row))} {what} {place(*train.rows.row_id(first))}"
        for found, what in ((rows, "is"), (prompts, "has the prompt of"))
        for row, first in found.pairs(EXAMPLES)
    ]
    return {"rows": rows.count, "prompts": prompts.count, "of": len(other.whole_R), "examples": examples}
