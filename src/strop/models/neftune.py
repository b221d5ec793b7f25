"""Noise on the embeddings in training (NEFTune, Jain et al. 2024, arXiv 2310.05914).

To each embedding of a sequence of L tokens and hidden size H, uniform noise in ±α/√(L H) is added. It is a
hash of the channel and of the token's key (strop.data.draws), which the batch brings along as `draw_T`. So
the numbers are the same bits in any packing, on any number of ranks, on CPU and GPU, and in a step that is
done again after a stop.

Shapes: T tokens, S sequences, L longest sequence, H hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from strop.data.batch import Batch

WORD = 0xFFFFFFFF
TAG = 0x4E454654
"""Mixed into the channels, as LoRA's dropout mixes in a layer's name: from one key both draw apart."""


@contextlib.contextmanager
def noise(embedding: nn.Module, batch: Batch, alpha: float | None, layout: str) -> Iterator[None]:
    """Within it, what `embedding` gives for the batch has noise added; none where the batch has no keys
    (validation). layout: packed ([1, T, H]) or padded ([S, L, H], tokens to the left)."""
    if alpha is None or batch.draw_T is None:
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
    assert batch.draw_T is not None
    lengths_S, hidden = batch.cu_seqlens.diff().long(), out.shape[-1]
    lengths_T = lengths_S.repeat_interleave(lengths_S, output_size=len(batch.draw_T))
    size_T = alpha / (lengths_T * hidden).sqrt()
    noise_TH = (uniform(batch.draw_T, hidden) * size_T[:, None]).to(out.dtype)
    if layout == "packed":
        return noise_TH[None]
    mask_SL = torch.arange(out.shape[1], device=out.device) < lengths_S[:, None]
    return torch.zeros_like(out).masked_scatter(mask_SL[..., None], noise_TH)


def uniform(draw_T: Tensor, hidden: int) -> Tensor:
    """fp32 [T, hidden] in (-1, 1) from int32 [T]."""
    channels_H = _mix(torch.arange(hidden, device=draw_T.device) ^ TAG)
    words = _mix((draw_T.long() & WORD)[:, None] ^ channels_H)
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
