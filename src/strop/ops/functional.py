"""The public functions: what may come in is checked here, in words; the work is torch.ops.strop's.

Shapes: N trained tokens, H hidden size, V vocabulary, T packed tokens, S sequences, P pairs.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from strop.config_check import NEEDS_SMOOTHING
from strop.ops import head, native, preference, registered

assert registered.LIB is not None  # importing it defines torch.ops.strop

ROWS_PER_PART = {"cpu": 512, "cuda": 1600}
"""Rows whose logits are computed again in the time that adding a part's weight gradient to the others' takes:
on a CPU as measured, on a GPU by arithmetic (12 bytes a weight at 3 TB/s, 2 operations at 790 TFLOP/s)."""


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

    hidden [N, H], weight [V, H], target int64 [N], bias [V] -> log-prob fp32 [N] (fp64 of fp64), never above
    0. The weight has hidden's dtype, or is fp32 beside hidden in 16 bit: then it is rounded to hidden's dtype
    as it is read, and its gradient is fp32. The log-sum-exp is fp32, and the target's logit is the same value
    that stands in it: an exact one above a rounded sum would give positive log-probs. softcap(z) = c tanh(z /
    c). A sharded weight (DTensor) is gathered, and its gradient summed over the ranks.

    Raises ValueError for shapes, dtypes or devices that do not fit and (on the CPU; on a GPU the result is
    NaN) for targets outside the vocabulary.
    """
    weight, bias = _whole(weight), None if bias is None else _whole(bias)
    _check_head(hidden, weight, target, bias, softcap, temperature)
    keep = _what_to_keep(hidden, weight, bias)
    logprob, _, *stats, _, _ = registered.call_head(hidden, weight, target, bias, softcap, temperature, keep)
    return logprob, TokenStats(*stats)


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    loss_fn: Callable[[Tensor, slice], Tensor],
    groups: Optional[Sequence[int]] = None,
    bias: Optional[Tensor] = None,
    softcap: Optional[float] = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, TokenStats]:
    """Sum of `loss_fn` over all rows, log-probs and statistics, with the gradient formed in the forward.

    `loss_fn(logprob [n], rows)` is a pure function of the log-probs of the rows `rows` -> scalar, a sum over
    groups (sequences or pairs). groups: row numbers 0 = g0 <= g1 <= ... <= N at which rows may be parted;
    None: nowhere. Rows are taken as many whole groups at a time as may keep their exponentials (logits read
    once, 6NHV); what larger groups may not keep is recomputed (up to 8NHV). Other arguments and errors as
    `linear_logprob`.

    The gradient is stored in the types of hidden and weight until the backward multiplies it: in fp16 give
    `loss_fn` the factors that would otherwise follow.
    """
    weight, bias = _whole(weight), None if bias is None else _whole(bias)
    _check_head(hidden, weight, target, bias, softcap, temperature)
    edges = groups if groups is not None else [0, len(hidden)]
    rises = all(edges[i] <= edges[i + 1] for i in range(len(edges) - 1))
    if len(edges) == 0 or edges[0] != 0 or edges[-1] != len(hidden) or not rises:
        raise ValueError(f"groups must rise from 0 to {len(hidden)}, not {edges}")
    loss, logprob, *stats = _LinearLoss.apply(
        hidden, weight, bias, target, loss_fn, edges, softcap, temperature
    )
    return loss, logprob, TokenStats(*stats)


def one_pass_pays(
    hidden: Tensor, weight: Tensor, groups: Sequence[int], softcap: Optional[float] = None
) -> bool:
    """Whether `linear_loss` is the quicker way to the gradients of hidden [N, H] and weight [V, H]: where
    `linear_logprob` would compute logits again, and parts of these groups need not. Looks at no values.
    """
    if _what_to_keep(hidden, weight, None) != head.ALL or len(hidden) == 0:
        return False
    parts = _row_chunks(groups, hidden, weight, softcap)
    in_parts = sum(_recomputed(hidden[rows], weight, softcap) for rows in parts)
    saved = _recomputed(hidden, weight, softcap) - in_parts
    return saved > 0 and saved > len(parts) * ROWS_PER_PART[hidden.device.type]


def logprob(logits: Tensor, target: Tensor) -> tuple[Tensor, TokenStats]:
    """log softmax(logits)[target] and statistics, of logits that exist anyway.

    logits [N, V] of any float type, target int64 [N] -> log-prob fp32 [N] (fp64 of fp64), never above 0. One
    read forward; one read and one write backward. Raises ValueError as `linear_logprob`.
    """
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits {tuple(logits.shape)} must be [N,V]")
    _check_target(target, logits)
    values, _, *stats = torch.ops.strop.logprob(logits, target)
    return values, TokenStats(*stats)


def segment_sum(x_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums of consecutive segments: x [T], cu_seqlens int [S+1] from 0 to T -> [S], summed in a fixed order.

    Raises ValueError if x is not one-dimensional, or (on the CPU) if cu_seqlens does not span it or falls.
    """
    if x_T.ndim != 1:
        raise ValueError(f"x must be [T], not {tuple(x_T.shape)}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be integers [S+1], not {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    _same_device(x=x_T, cu_seqlens=cu_seqlens)
    return torch.ops.strop.segment_sum(x_T, cu_seqlens)


def dpo_loss(
    ratio_P2: Tensor, kind: str, beta: float, label_smoothing: float = 0.0, delta: float = 0.0
) -> Tensor:
    """Preference loss of each pair, by `preference.KINDS`; value and derivative in one pass.

    ratio [P, 2]: log p_policy - log p_reference of chosen and rejected (`REFERENCE_FREE`: log
    p_policy), summed over the completion, or averaged (`preference.AVERAGED`) -> [P]. delta: bco_pair's
    running mean of rewards, simpo's γ.

    Raises ValueError for another kind or shape, and for beta or label smoothing outside their ranges.
    """
    if ratio_P2.ndim != 2 or ratio_P2.shape[1] != 2:
        raise ValueError(f"ratio must be [P,2], not {tuple(ratio_P2.shape)}")
    if kind not in preference.KINDS:
        raise ValueError(f"kind must be one of {', '.join(preference.KINDS)}, not {kind}")
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be above 0, not {beta}")
    if not 0 <= label_smoothing < 0.5 or (kind in NEEDS_SMOOTHING and label_smoothing == 0):
        least = "above 0" if kind in NEEDS_SMOOTHING else "at least 0"
        raise ValueError(f"label_smoothing must be {least} and below 0.5 for {kind}, not {label_smoothing}")
    if ratio_P2.dtype == torch.float32 and native.is_loaded(ratio_P2.device.type):
        return torch.ops.strop.dpo_loss(ratio_P2, kind, beta, label_smoothing, delta)[0]
    return preference.KINDS[kind](ratio_P2[:, 0], ratio_P2[:, 1], beta, label_smoothing, delta)


def backend(device: torch.device, dtype: torch.dtype) -> str:
    """What computes on this device: "native-<hash of the library>", with how the head is done, or
    "reference". Numbers may differ in their last bits between any two of these."""
    name = native.identity(device.type) if device.type in native.DTYPES else "reference"
    if name == "reference" or dtype not in native.DTYPES[device.type]:
        return "reference"
    kernel = native.head_kernel(dtype) if device.type == "cpu" else ""
    return f"{name}-" + {"": "chunked", "avx512": "fused", "amx": "fused-amx"}[kernel]


def _whole(weight: Tensor) -> Tensor:
    """A DTensor's full tensor. Each rank has rows of its own, so its gradient is one part of a sum."""
    if isinstance(weight, DTensor):
        return weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)
    return weight


def _same_device(**tensors: Optional[Tensor]) -> None:
    devices = {name: str(t.device) for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device: {places}")


def _check_target(target: Tensor, rows: Tensor) -> None:
    if target.shape != rows.shape[:1]:
        raise ValueError(f"target {tuple(target.shape)} must be [{rows.shape[0]}]")
    if target.dtype != torch.int64:
        raise ValueError(f"target must be torch.int64, not {target.dtype}")
    if not rows.dtype.is_floating_point:
        raise ValueError(f"logits or hidden states must be floating-point, not {rows.dtype}")
    _same_device(target=target, rows=rows)


def _check_head(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Optional[Tensor],
    softcap: Optional[float],
    temperature: float,
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [N,H] and [V,H]"
        )
    if 0 in weight.shape:
        raise ValueError(f"weight {tuple(weight.shape)} has no words or no width")
    if hidden.dtype != weight.dtype and not native.is_rounded(hidden, weight):
        raise ValueError(f"hidden is {hidden.dtype} but weight is {weight.dtype}")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.dtype.is_floating_point):
        raise ValueError(
            f"bias {tuple(bias.shape)} of {bias.dtype} must be floating-point [{weight.shape[0]}]"
        )
    _check_target(target, hidden)
    _same_device(hidden=hidden, weight=weight, bias=bias)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be above 0, not {temperature}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be above 0, not {softcap}")


def _what_to_keep(hidden: Tensor, weight: Tensor, bias: Optional[Tensor]) -> int:
    """For the backward, if there will be one."""
    wanted = [x is not None and x.requires_grad for x in (hidden, weight, bias)]
    if not torch.is_grad_enabled() or not any(wanted):
        return head.NOTHING
    return head.FROZEN if wanted == [True, False, False] else head.ALL


def _recomputed(hidden: Tensor, weight: Tensor, softcap: Optional[float]) -> float:
    """Rows whose logits the backward computes again; a part of the words counts as that part of the rows."""
    return len(hidden) * (1 - head.words_kept(hidden, weight, softcap) / len(weight))


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, loss_fn, edges, softcap, temperature):
        ctx.needs = [n and x is not None for n, x in zip(ctx.needs_input_grad, (hidden, weight, bias))]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        parts: list[tuple[Tensor, ...]] = []
        d_hidden: list[Tensor] = []
        d_weight = d_bias = None
        for rows in _row_chunks(edges, hidden, weight, softcap):
            own, wanted = hidden[rows], target[rows]
            keep = head.ALL if any(ctx.needs) else head.NOTHING
            logp, lse, *stats, kept, tops = torch.ops.strop.head(
                own, weight, wanted, bias, softcap, temperature, keep
            )
            with torch.enable_grad():
                leaf = logp.detach().requires_grad_()
                value = loss_fn(leaf, rows)
                (grad,) = torch.autograd.grad(value, leaf)
            loss += value.detach()
            parts.append((logp, *stats))
            if not any(ctx.needs):
                continue
            has_kept = kept.numel() > 0
            dh, dw, db = registered.head_gradients(
                grad, own, weight, wanted, bias, softcap, temperature, lse,
                kept if has_kept else None, tops if has_kept else None, ctx.needs,
            )  # fmt: skip
            d_hidden.append(dh)
            d_weight = _add(d_weight, dw)
            d_bias = _add(d_bias, db)
            del kept, tops, dw  # the next part wants their memory
        every = [torch.cat(x) for x in zip(*parts)] if parts else [loss.new_empty(0) for _ in range(4)]
        ctx.mark_non_differentiable(*every)
        whole: list[Optional[Tensor]] = [torch.cat(d_hidden) if d_hidden else None, d_weight, d_bias]
        ctx.save_for_backward(*(_like(g, x) for g, x in zip(whole, (hidden, weight, bias))))
        return (loss, *every)

    @staticmethod
    def backward(ctx, grad, *_):
        # In place, since a head's gradient is large; a second backward is refused by autograd's own check.
        given = [g if need else None for g, need in zip(ctx.saved_tensors, ctx.needs)]
        # In bf16 a factor 1 / count would be off by up to 0.4 %: on a GPU one without an axis is rounded to
        # the type of what it multiplies. On a CPU it is not, and one with an axis takes 20 times as long.
        factor = grad if grad.device.type == "cpu" else grad.view(1)
        for g in given:
            if g is not None:
                torch.mul(g, factor, out=g)
        return (*given, None, None, None, None, None)


def _like(grad: Optional[Tensor], x: Optional[Tensor]) -> Optional[Tensor]:
    if x is None:
        return None
    return torch.zeros_like(x) if grad is None else grad.to(x.dtype)


def _add(total: Optional[Tensor], part: Tensor) -> Tensor:
    """The first part as it is; from the second on the sum is fp32."""
    if total is None:
        return part
    return (total if total.dtype == torch.float32 else total.float()).add_(part)


def _row_chunks(
    edges: Sequence[int], hidden: Tensor, weight: Tensor, softcap: Optional[float]
) -> list[slice]:
    """As many whole groups at a time as may keep everything; of those that may not, all in a row."""
    most = head.most_kept(hidden, weight) // (len(weight) * hidden.element_size())
    if head.words_kept(hidden[:1], weight, softcap) < len(weight):
        most = 0
    out: list[slice] = []
    while (start := out[-1].stop if out else 0) < edges[-1]:
        end = edges[bisect_right(edges, start + most) - 1]
        if end == start:
            end = _next_that_fits(edges, start, most)
        out.append(slice(start, end))
    return out


def _next_that_fits(edges: Sequence[int], start: int, most: int) -> int:
    """Where the first group of 1 to `most` rows after those from `start` on begins; else the end."""
    first = bisect_right(edges, start)
    later = (a for a, b in zip(edges[first:], edges[first + 1 :]) if 0 < b - a <= most)
    return next(later, edges[-1])
