"""Duplicates among documents: equal texts by a hash, nearly equal ones by MinHash (rensa) and banding.

A document is the set of its shingles, five neighbouring tokens each. Its sketch estimates how large a share
of them it has in common with another (Jaccard). Sketches and the hashes of their bands lie in files; one
band at a time is sorted in memory (16 bytes a document), and only documents that agree in a whole band are
compared by their sketches. The first of two is kept, in the order of the input, so the result is the same
whatever the number of workers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from strop.errors import UserError

SHINGLE = 5
"""Tokens."""
NUM_HASHES = 128
SEED = 1
MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)
"""Odd constants of splitmix and xxhash; numbers here are 64 bits wide and wrap."""


def version() -> str:
    """What sketches depend on beside the text; part of a store's address. UserError if rensa is missing."""
    return f"rensa {_rensa().ALGORITHM_VERSION}"


def _rensa() -> Any:
    try:
        import rensa
    except ImportError:
        raise UserError("prepare.near_duplicates needs the Python package rensa: pip install rensa") from None
    return rensa.RMinHash


def bands(threshold: float) -> int:
    """Bands that the 128 hashes are cut into: the fewest that find a pair at the threshold 9 times of 10."""
    for num in (4, 8, 16, 32, 64):
        if 1 - (1 - threshold ** (NUM_HASHES // num)) ** num >= 0.9:
            return num
    return NUM_HASHES


def sketch(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """uint32 [documents, NUM_HASHES] of documents side by side in `tokens`, int32 [sum of lengths]."""
    shingles, offsets = _shingles(tokens, lengths)
    matrix = _rensa().digest_matrix_from_flat_token_hashes(shingles, offsets, NUM_HASHES, SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(lengths), NUM_HASHES)


def _shingles(tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes uint64 of shingles, and where a document's begin; a short document is one shingle."""
    ends = np.cumsum(lengths)
    begins = ends - lengths
    words = _mix(tokens.astype(np.uint64) + np.uint64(1))
    sums = np.zeros(len(tokens), dtype=np.uint64)
    powers = np.array([pow(int(MULTIPLIERS[0]), i, 2**64) for i in range(SHINGLE)], dtype=np.uint64)
    for shift in range(min(SHINGLE, len(tokens))):  # shingles beyond a document's end are left out below
        sums[: len(tokens) - shift] += words[shift:] * powers[shift]
    hashes = _mix(sums)
    counts = np.maximum(lengths - SHINGLE + 1, 1)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
    keep = np.zeros(len(tokens) + 1, dtype=np.int64)  # +1 where shingles of a document begin, -1 behind
    np.add.at(keep, begins, 1)
    np.add.at(keep, begins + counts, -1)
    picked = hashes[np.cumsum(keep[:-1]) > 0]
    for row in np.flatnonzero(lengths < SHINGLE):
        weighed = words[begins[row] : ends[row]] * powers[: lengths[row]]
        picked[int(offsets[row])] = _mix(weighed.sum(keepdims=True))[0]
    return picked, offsets


def _mix(x: np.ndarray) -> np.ndarray:
    """Spread the bits (splitmix64's finaliser)."""
    x = (x ^ (x >> np.uint64(30))) * MULTIPLIERS[1]
    x = (x ^ (x >> np.uint64(27))) * MULTIPLIERS[2]
    return x ^ (x >> np.uint64(31))


def band_hashes(sketches: np.ndarray, num_bands: int) -> np.ndarray:
    """uint64 [num_bands, documents]."""
    columns = sketches.reshape(len(sketches), num_bands, sketches.shape[1] // num_bands).astype(np.uint64)
    out = np.zeros((num_bands, len(sketches)), dtype=np.uint64)
    for i in range(columns.shape[2]):
        out = _mix(out * MULTIPLIERS[0] + columns[:, :, i].T + np.uint64(1))
    return out


def equal_texts(hashes: np.ndarray) -> np.ndarray:
    """int64 [documents]: the first document with the same 128-bit hash (uint64 [documents, 2]), or -1."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: the first of equal ones stands first
    ordered = hashes[order]
    new = np.ones(len(order), dtype=np.bool_)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    heads = order[new][np.cumsum(new) - 1]
    first = np.full(len(order), -1, dtype=np.int64)
    first[order[~new]] = heads[~new]
    return first


def near_duplicates(
    band_files: list[Path], sketch_file: Path, gone: np.ndarray, threshold: float
) -> np.ndarray:
    """int64 [documents]: an earlier document that shares `threshold` of the shingles, or -1.

    band_files: uint64 [documents] each; sketch_file: uint32 [documents, NUM_HASHES]; gone bool [documents]:
    those that are left out already.
    """
    alike = np.full(len(gone), -1, dtype=np.int64)
    with open(sketch_file, "rb", buffering=0) as file:
        for path in band_files:
            for group in _groups(np.fromfile(path, dtype=np.uint64), gone | (alike >= 0)):
                sketches = _read_sketches(file, group)
                while len(group) > 1:
                    shared = (sketches[1:] == sketches[0]).mean(axis=1)
                    alike[group[1:][shared >= threshold]] = group[0]
                    group, sketches = group[1:][shared < threshold], sketches[1:][shared < threshold]
    return alike


def _read_sketches(file: FileIO, rows: np.ndarray) -> np.ndarray:
    """Read, not mapped: pages of a map would count as this process's memory."""
    size = 4 * NUM_HASHES
    content = b"".join(os.pread(file.fileno(), size, size * int(row)) for row in rows)
    return np.frombuffer(content, dtype=np.uint32).reshape(-1, NUM_HASHES)


def _groups(keys: np.ndarray, gone: np.ndarray) -> Iterator[np.ndarray]:
    """The documents of each key that more than one has, in the order of the input."""
    order = np.argsort(keys, kind="stable")
    order = order[~gone[order]]
    ordered = keys[order]
    edges = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
    for begin, end in zip(edges[:-1], edges[1:]):
        if end - begin > 1:
            yield order[begin:end]
