"""Log-probabilities of target tokens straight from hidden states, in plain torch.

The logits [N, V] never exist: the vocabulary is walked in chunks with an online log-sum-exp, and the
backward walks it again (8NHV operations instead of 6NHV, in memory that does not grow with V). Chunks of
the vocabulary, not of tokens, keep the matmuls tall enough for bf16 units on CPUs.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

CHUNK_BYTES = 32 * 2**20
"""fp32 logits that are alive at a time."""


class TokenStats(NamedTuple):
    """What the same walk over the vocabulary tells beside the log-probs; without gradient, fp32 [N]."""

    entropy: Tensor
    """Entropy of the predicted distribution in nats."""
    correct: Tensor
    """1.0 where the target has the highest logit."""
    mean_logit: Tensor
    """Mean of the logits over the vocabulary."""


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Optional[Tensor] = None,
    softcap: Optional[float] = None,
    temperature: float = 1.0,
) -> tuple[Tensor, TokenStats]:
    """log softmax(softcap(hidden @ weight.T + bias) / temperature)[target], and statistics beside it.

    hidden [N, H], weight [V, H] of the same dtype, target int64 [N], bias [V] -> log-prob fp32 [N], never
    above 0. The log-sum-exp is fp32, and the target's logit is the same rounded value that stands in it:
    an exact one above a rounded sum would give positive log-probs. softcap(z) = c tanh(z / c).

    Raises ValueError for shapes or dtypes that do not fit and for targets outside the vocabulary.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [N,H] and [V,H]"
        )
    if target.shape != hidden.shape[:1]:
        raise ValueError(f"target {tuple(target.shape)} must be [{hidden.shape[0]}]")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} but weight is {weight.dtype}")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    if hidden.device.type == "cpu" and target.numel() and not 0 <= target.min() <= target.max() < len(weight):
        raise ValueError(f"targets must be in [0, {len(weight)}), not {target.min()}..{target.max()}")
    logprob, entropy, correct, mean_logit = _LinearLogprob.apply(
        hidden, weight, target, bias, softcap, temperature
    )
    return logprob, TokenStats(entropy, correct, mean_logit)


def _chunks(num_tokens: int, vocab: int) -> list[tuple[int, int]]:
    width = max(256, CHUNK_BYTES // (4 * max(num_tokens, 1)))
    return [(start, min(start + width, vocab)) for start in range(0, vocab, width)]


def _logits(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], softcap: Optional[float], temperature: float
):
    """fp32 logits of one chunk, and tanh(z / softcap) for its derivative."""
    z = torch.mm(hidden, weight.t()).float()
    if bias is not None:
        z += bias.float()
    tanh = None
    if softcap is not None:
        tanh = torch.tanh(z / softcap)
        z = softcap * tanh
    if temperature != 1.0:
        z = z / temperature
    return z, tanh


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, bias, softcap, temperature):
        num_tokens, vocab = hidden.shape[0], weight.shape[0]
        new = hidden.new_empty
        top = new(num_tokens, dtype=torch.float32).fill_(-torch.inf)
        total, weighted, plain, at_target = (new(num_tokens, dtype=torch.float32).zero_() for _ in range(4))
        for start, end in _chunks(num_tokens, vocab):
            chunk_bias = None if bias is None else bias[start:end]
            z, _ = _logits(hidden, weight[start:end], chunk_bias, softcap, temperature)
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
        ctx.save_for_backward(hidden, weight, target, bias, lse)
        ctx.softcap, ctx.temperature = softcap, temperature
        stats = (lse - weighted / total, (at_target >= top).float(), plain / vocab)
        ctx.mark_non_differentiable(*stats)
        return (at_target - lse).clamp(max=0.0), *stats

    @staticmethod
    def backward(ctx, grad, *_):
        hidden, weight, target, bias, lse = ctx.saved_tensors
        need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
        d_hidden = (
            torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if need_hidden else None
        )
        d_weight = torch.empty_like(weight) if need_weight else None
        d_bias = torch.empty_like(bias) if need_bias else None
        for start, end in _chunks(len(target), len(weight)):
            chunk = weight[start:end]
            chunk_bias = None if bias is None else bias[start:end]
            z, tanh = _logits(hidden, chunk, chunk_bias, ctx.softcap, ctx.temperature)
            d = torch.exp(z - lse[:, None]).mul_(-grad[:, None])
            inside = (target >= start) & (target < end)
            d.scatter_add_(1, (target - start).clamp(0, end - start - 1)[:, None], (grad * inside)[:, None])
            if ctx.temperature != 1.0:
                d /= ctx.temperature
            if tanh is not None:
                d *= 1 - tanh * tanh
            if d_bias is not None:
                d_bias[start:end] = d.sum(0)
            d = d.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden += torch.mm(d, chunk)
            if d_weight is not None:
                torch.mm(d.t(), hidden, out=d_weight[start:end])
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, None, d_bias, None, None


def logprob(logits: Tensor, target: Tensor) -> tuple[Tensor, TokenStats]:
    """log softmax(logits)[target] and statistics, of logits that exist anyway.

    logits [N, V] of any float type, target int64 [N] -> log-prob fp32 [N], computed in fp32.
    """
    logp = torch.log_softmax(logits.float(), dim=1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(1)
        correct = (logits.argmax(1) == target).float()
        mean_logit = logits.float().mean(1)
    return logp.gather(1, target[:, None])[:, 0], TokenStats(entropy, correct, mean_logit)


def segment_sum(x_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums of consecutive segments: x [T], cu_seqlens int [S+1] from 0 to T -> [S], summed in a fixed order.

    Raises ValueError if x is not one-dimensional, or (on the CPU) if cu_seqlens does not span it.
    """
    if x_T.ndim != 1:
        raise ValueError(f"x must be [T], not {tuple(x_T.shape)}")
    if x_T.device.type == "cpu" and (cu_seqlens[0] != 0 or cu_seqlens[-1] != len(x_T)):
        raise ValueError(f"cu_seqlens must run from 0 to {len(x_T)}, not {cu_seqlens[0]} to {cu_seqlens[-1]}")
    return torch.segment_reduce(x_T, "sum", lengths=cu_seqlens.diff().long(), unsafe=True)
