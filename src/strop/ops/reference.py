"""The operations in plain torch, for any device and float type: the simplest versions that are right.

The logits [N, V] never exist: the vocabulary is walked in chunks with an online log-sum-exp, and the
backward walks it again (8NHV operations instead of 6NHV, in memory that does not grow with V). Chunks of
the vocabulary, not of tokens, keep the matmuls tall enough for bf16 units on CPUs.

Shapes: N trained tokens, H hidden size, V vocabulary, T packed tokens, S sequences.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

CHUNK_BYTES = 32 * 2**20
"""fp32 logits that are alive at a time."""


class Scalings(NamedTuple):
    """How a head turns x = hidden @ weight.T into logits: softcap(x + bias) / temperature."""

    bias: Optional[Tensor] = None
    softcap: Optional[float] = None
    temperature: float = 1.0


class Walked(NamedTuple):
    """What a walk over the vocabulary gives, fp32 [N] each (fp64 of fp64)."""

    logprob: Tensor
    lse: Tensor
    entropy: Tensor
    correct: Tensor
    mean_logit: Tensor


def _chunks(num_tokens: int, vocab: int) -> list[tuple[int, int]]:
    width = max(256, CHUNK_BYTES // (4 * max(num_tokens, 1)))
    return [(start, min(start + width, vocab)) for start in range(0, vocab, width)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _logits(hidden: Tensor, weight: Tensor, scalings: Scalings, start: int, end: int):
    """fp32 logits of one chunk, and tanh(z / softcap) for its derivative."""
    z = torch.mm(hidden, weight[start:end].to(hidden.dtype).t()).to(_wide(hidden.dtype))
    if scalings.bias is not None:
        z += scalings.bias[start:end].to(z.dtype)
    tanh = None
    if scalings.softcap is not None:
        tanh = torch.tanh(z / scalings.softcap)
        z = scalings.softcap * tanh
    if scalings.temperature != 1.0:
        z = z / scalings.temperature
    return z, tanh


def head_forward(hidden: Tensor, weight: Tensor, target: Tensor, scalings: Scalings) -> Walked:
    """Log-probs of `target` and statistics, by a walk over chunks of the vocabulary."""
    num_tokens, vocab = hidden.shape[0], weight.shape[0]
    wide = _wide(hidden.dtype)
    top = hidden.new_full((num_tokens,), -torch.inf, dtype=wide)
    total, weighted, plain, at_target = (hidden.new_zeros(num_tokens, dtype=wide) for _ in range(4))
    for start, end in _chunks(num_tokens, vocab):
        z, _ = _logits(hidden, weight, scalings, start, end)
        inside = (target >= start) & (target < end)
        picked = z.gather(1, (target - start).clamp(0, end - start - 1)[:, None])[:, 0]
        at_target = torch.where(inside, picked, at_target)
        plain += z.sum(1)
        new_top = torch.maximum(top, z.amax(1))
        p = torch.exp(z - new_top[:, None])
        shrink = torch.exp(top - new_top)
        weighted = weighted * shrink + torch.linalg.vecdot(p, z)
        total = total * shrink + p.sum(1)
        top = new_top
    lse = top + torch.log(total)
    logprob = (at_target - lse).clamp(max=0.0)
    return Walked(logprob, lse, lse - weighted / total, (at_target >= top).to(wide), plain / vocab)


def head_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    scalings: Scalings,
    lse: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """Gradients by hidden, weight and bias, those that are needed. grad, lse [N]."""
    bias = scalings.bias
    d_hidden = torch.zeros_like(hidden, dtype=_wide(hidden.dtype)) if needs[0] else None
    d_weight = torch.empty_like(weight) if needs[1] else None
    d_bias = torch.empty_like(bias) if needs[2] and bias is not None else None
    for start, end in _chunks(len(target), len(weight)):
        z, tanh = _logits(hidden, weight, scalings, start, end)
        d = torch.exp(z - lse[:, None]).mul_(-grad[:, None])
        inside = (target >= start) & (target < end)
        d.scatter_add_(1, (target - start).clamp(0, end - start - 1)[:, None], (grad * inside)[:, None])
        if scalings.temperature != 1.0:
            d /= scalings.temperature
        if tanh is not None:
            d *= 1 - tanh * tanh
        if d_bias is not None:
            d_bias[start:end] = d.sum(0)
        d = d.to(hidden.dtype)
        if d_hidden is not None:
            d_hidden += torch.mm(d, weight[start:end].to(hidden.dtype))
        if d_weight is not None:
            d_weight[start:end] = torch.mm(d.t(), hidden)
    return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias


def logprob_forward(logits: Tensor, target: Tensor) -> Walked:
    """The same of logits [N, V] that exist."""
    z = logits.to(_wide(logits.dtype))
    logp = torch.log_softmax(z, dim=1)
    lse = torch.logsumexp(z, dim=1)
    entropy = lse - torch.linalg.vecdot(logp.exp(), z)
    correct = (logits.argmax(1) == target).to(z.dtype)
    return Walked(logp.gather(1, target[:, None])[:, 0], lse, entropy, correct, z.mean(1))


def logprob_backward(grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor) -> Tensor:
    d = torch.exp(logits.to(lse.dtype) - lse[:, None]).mul_(-grad[:, None])
    return d.scatter_add_(1, target[:, None], grad[:, None]).to(logits.dtype)


def segment_sum(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums of consecutive segments: x [T] -> [S], in a fixed order."""
    return torch.segment_reduce(x, "sum", lengths=cu_seqlens.diff().long(), unsafe=True)


def segment_spread(g: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Its backward: g [S] -> [T], every token its segment's value."""
    return g.repeat_interleave(cu_seqlens.diff().long())
