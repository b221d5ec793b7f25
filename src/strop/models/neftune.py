"""Noise on the embeddings in training (NEFTune, Jain et al. 2024, arXiv 2310.05914).

To each embedding of a sequence of L tokens and hidden size H, uniform noise in ±α/√(L H) is added. The draws
are a function of (seed, step, row, position in its sequence, channel) and of nothing else: 32 bits from two
rounds of an integer hash. So they are the same bits in any packing, on any number of ranks, on CPU and GPU,
and in a step that is done again after a stop.

Shapes: T tokens, S sequences, L longest sequence, H hidden size.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from strop.data.batch import Batch

WORD = 0xFFFFFFFF


def keys(seed: int, step: int, rows: np.ndarray) -> Tensor:
    """int64 [R, 2]: two words of 32 bits for each row's draws in this step."""
    text = (f"{seed} {step} {row}".encode() for row in rows.tolist())
    raw = b"".join(hashlib.blake2b(one, digest_size=8).digest() for one in text)
    return torch.from_numpy(np.frombuffer(raw, dtype="<u4").astype(np.int64).reshape(-1, 2))


@contextlib.contextmanager
def noise(embedding: nn.Module, batch: Batch, alpha: float | None, layout: str) -> Iterator[None]:
    """Within it, what `embedding` gives for the batch has noise added; none where the batch has no keys
    (validation). layout: packed ([1, T, H]) or padded ([S, L, H], tokens to the left)."""
    if alpha is None or batch.keys_S is None:
        yield
        return

    def add_noise(module: nn.Module, args: object, out: Tensor) -> Tensor:
        return out + _noise(out, batch, alpha, layout)

    handle = embedding.register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


def _noise(out: Tensor, batch: Batch, alpha: float, layout: str) -> Tensor:
    assert batch.keys_S is not None
    lengths_S, hidden = batch.cu_seqlens.diff().long(), out.shape[-1]
    if layout == "packed":
        keys_T2, lengths = (x.repeat_interleave(lengths_S, dim=0) for x in (batch.keys_S, lengths_S))
        drawn = uniform(keys_T2, batch.positions_T, hidden)[None]
        scale = alpha / (lengths * hidden).sqrt()[None, :, None]
    else:
        positions = torch.arange(out.shape[1], device=out.device)
        drawn = uniform(batch.keys_S[:, None], positions[None], hidden)
        scale = alpha / (lengths_S * hidden).sqrt()[:, None, None]
    return (drawn * scale).to(out.dtype)


def uniform(keys: Tensor, positions: Tensor, hidden: int) -> Tensor:
    """fp32 [..., hidden] in (-1, 1). keys: int64 [..., 2], positions: int64 [...], which broadcast."""
    counter = positions[..., None] * hidden + torch.arange(hidden, device=positions.device)
    words = _mix(counter ^ keys[..., :1])
    words = _mix(words.add_(keys[..., 1:]).bitwise_and_(WORD))
    # The middles of 2^23 equal parts: fp32 holds each of them exactly.
    return words.bitwise_right_shift_(9).float().add_(0.5).mul_(2.0**-22).sub_(1.0)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words (in int64) that spreads each bit over all, in place. Both factors are below
    2^31, so that no product leaves int64. (Wellons, hash-prospector: 16 21f0aaad 15 735a2d97 15.)"""
    x ^= x >> 16
    x *= 0x21F0AAAD
    x &= WORD
    x ^= x >> 15
    x *= 0x735A2D97
    x &= WORD
    x ^= x >> 15
    return x
