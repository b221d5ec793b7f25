"""Rows that are longer than data.max_length, cut by the user's policy.

truncate_prompt_left takes the oldest tokens out of the prompt, which is what stands before the first trained
token: those that follow BOS, whatever a template has written there, as many from each sequence of a row, so
that a pair keeps one prompt. One token at least stays before the completion, which otherwise would begin with
a token that nothing predicts. truncate_completion keeps the first max_length tokens. Neither puts an end of
turn where there was none: a model must not learn to stop in the middle of a sentence.
"""

from __future__ import annotations

from typing import Optional

import numpy as np

Sequences = list[tuple[np.ndarray, np.ndarray]]
"""[(tokens int32 [T], trained bool [T])] of one row."""


def prompt_left(sequences: Sequences, max_length: int, bos: Optional[int]) -> Optional[Sequences]:
    """The row with shorter prompts; None where the prompts have not that many tokens."""
    excess = max(len(tokens) for tokens, _ in sequences) - max_length
    begin = int(all(tokens[0] == bos for tokens, _ in sequences))
    first_trained = min(int(trained.argmax()) for _, trained in sequences)
    if excess > first_trained - max(begin, 1):
        return None
    gone = np.s_[begin : begin + excess]
    return [(np.delete(tokens, gone), np.delete(trained, gone)) for tokens, trained in sequences]


def completion(sequences: Sequences, max_length: int) -> Optional[Sequences]:
    """The beginning of each sequence; None where one has no trained token left, or both halves of a pair are
    the same now."""
    short = [(tokens[:max_length], trained[:max_length]) for tokens, trained in sequences]
    if not all(trained.any() for _, trained in short):
        return None
    if len(short) == 2 and np.array_equal(short[0][0], short[1][0]):
        return None
    return short
