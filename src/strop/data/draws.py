"""Random keys of tokens: what a layer draws at random follows from them, wherever a token lies.

A key is a hash of (seed, optimiser step, row id, place in the row), so neither packing nor the number of
ranks nor a resume changes what is drawn. The place is the token's position in its sequence: both sequences
of a pair draw alike, and a prompt that is computed once draws what it would draw twice. Blocks of text, in
which positions begin anew in every document, count from the start of the block. Whoever draws mixes in
something of its own (LoRA's dropout a layer's name, NEFTune a constant), so that their numbers go apart.
"""

from __future__ import annotations

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def token_keys(seed: int, step: int, row_T: np.ndarray, place_T: np.ndarray) -> np.ndarray:
    """int32 [T] for tokens of the rows row_T at the places place_T (int64 [T] each)."""
    key = _mixed(np.array([seed], dtype=np.uint64))
    for number in (np.array([step]), row_T, place_T):
        key = _mixed(key ^ (number.astype(np.uint64) + np.uint64(1)) * GOLDEN)
    return (key >> np.uint64(32)).astype(np.uint32).view(np.int32)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
