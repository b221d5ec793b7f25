"""Prompts with the completions of other rows: what KTO measures its baseline on.

Row i is the prompt of row i of a token store followed by the completion of row i + shift. Nothing of it is on
disk: both parts are read from the store. The pairing depends on the store alone, so that the reference's
log-probs of these sequences are computed once, as those of the rows themselves are. (Within a batch, as the
paper and TRL pair them, they would be others in every epoch.)
"""

from __future__ import annotations

import numpy as np

from strop.data.store import CHUNK_ROWS, TokenStore
from strop.errors import UserError

SHIFT = 0.381966
"""Of the rows, rounded: the golden section. Rows of one prompt often lie side by side, or in a second half of
the file in the same order; neither is this far away."""


class Mismatched:
    """Reads like a token store with one sequence a row; rows have the same numbers as the store's."""

    seqs_per_row = 1
    shared_R = None

    def __init__(self, store: TokenStore, max_length: int, what: str) -> None:
        """max_length: tokens at which a long prompt with a long completion ends. what: the set's name. Raises
        UserError where there is no other row."""
        assert store.seqs_per_row == 1
        if store.num_rows < 2:
            raise UserError(
                f"the {what} set has one usable row, and kto.loss=kto compares each with the completions of "
                "others: give more rows, or kto.loss=apo_zero_unpaired"
            )
        self.num_rows = store.num_rows
        self.values_R = store.values_R
        self.digest = f"{store.digest}-mismatched-{max_length}"
        self._store = store
        self._shift = max(1, round(SHIFT * store.num_rows))
        begins = range(0, store.num_rows, CHUNK_ROWS)
        self._prompt_R = np.concatenate([store.prompt_lengths(slice(b, b + CHUNK_ROWS)) for b in begins])
        own_R = np.diff(store.offsets)
        others_R = np.roll(own_R - self._prompt_R, -self._shift)
        self.row_lengths = np.minimum(self._prompt_R + others_R, max_length)
        self.offsets = np.concatenate([[0], np.cumsum(self.row_lengths)])

    def sequences(self, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """[(tokens int32 [T], trained bool [T])] of one row: prompt, then trained the other's completion."""
        other = (int(row) + self._shift) % self.num_rows
        ((own, _),) = self._store.sequences(row)
        ((theirs, trained),) = self._store.sequences(other)
        n, begin, end = self._prompt_R[row], self._prompt_R[other], self.row_lengths[row]
        tokens = np.concatenate([own[:n], theirs[begin:]])[:end]
        return [(tokens, np.concatenate([np.zeros(n, dtype=np.bool_), trained[begin:]])[:end])]

    def spans(self, row: int) -> list[tuple[int, int]]:
        """[(begin, end)] of the row's sequence, were all of them laid one after another."""
        return [(int(self.offsets[row]), int(self.offsets[int(row) + 1]))]

    def first_positions(self, row: int) -> list[int]:
        return [0]
