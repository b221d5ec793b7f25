"""How sequences begin and end: BOS once, and an end that is trained, or the model never learns to stop.

Many sequences lie side by side in flat arrays, as in a token store; everything is looked at for all of them
at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ENDING = 3
"""The end-of-turn token is among so many last tokens; templates write a line break after it."""
NONE = -1


@dataclass(frozen=True)
class Ends:
    """Of S sequences."""

    has_bos_S: np.ndarray
    """bool: the first token is BOS."""
    double_bos_S: np.ndarray
    """bool: the first two are."""
    last_S: np.ndarray
    """int64: the last trained special token near the end, NONE where there is none."""
    double_end_S: np.ndarray
    """bool: the one before it is the same."""


def look(
    tokens_T: np.ndarray,
    trained_T: np.ndarray,
    offsets_S1: np.ndarray,
    special_V: np.ndarray,
    bos: int | None,
) -> Ends:
    """tokens int32 [T], trained bool [T] of sequences that begin at offsets [S + 1]; none is empty."""
    begins, ends = offsets_S1[:-1], offsets_S1[1:]
    has_bos = tokens_T[begins] == bos if bos is not None else np.zeros(len(begins), dtype=np.bool_)
    second = np.minimum(begins + 1, ends - 1)
    double_bos = has_bos & (second > begins) & (tokens_T[second] == (NONE if bos is None else bos))
    # The last tokens of each sequence, from its end.
    at = ends[:, None] - 1 - np.arange(ENDING)
    inside = at >= begins[:, None]
    at = np.where(inside, at, begins[:, None])
    tail = tokens_T[at]
    marks = inside & trained_T[at] & special_V[tail]
    row = np.arange(len(begins))
    first = marks.argmax(axis=1)
    found = marks[row, first]
    last = np.where(found, tail[row, first], NONE).astype(np.int64)
    marks[row, first] = False
    again = marks.argmax(axis=1)
    return Ends(has_bos, double_bos, last, marks[row, again] & (tail[row, again] == last))
