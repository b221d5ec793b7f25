"""Causal attention over packed sequences on a GPU, by the variable-length flash attention that torch has
built in: nothing else need be installed. The forward is torch's own; the backward asks for the kernels that
sum in a fixed order, since a run that was stopped must give the same bits. They take more memory and time.

Registered as torch.ops.strop.*, so torch.compile sees one node each. Shapes: T tokens, H heads of queries, K
of keys and values, D size of a head, S sequences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch import Tensor

from strop.ops.registered import define

MOST_HEAD_SIZE = 256
MULTIPLE = 8
"""A head's size must be a multiple of it."""
LEAST_CAPABILITY = (8, 0)

_FORWARD = torch.ops.aten._flash_attention_forward
_BACKWARD = torch.ops.aten._flash_attention_backward


def attends(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attention` takes these: 16-bit floats on a GPU from Ampere on, and heads of one size."""
    size = query.shape[-1]
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and all(x.dtype == query.dtype and x.shape[-1] == size for x in (key, value))
        and size % MULTIPLE == 0
        and size <= MOST_HEAD_SIZE
        and _has_kernels(query.device)
    )


@torch.compiler.assume_constant_result
def _has_kernels(device: torch.device) -> bool:
    built_in = torch.backends.cuda.is_flash_attention_available()
    return built_in and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: Optional[float] = None,
    window: Optional[int] = None,
) -> Tensor:
    """query [1, H, T, D], key and value [1, K, T, D], cu_seqlens int32 [S+1] on the device, max_seqlen the
    length of the longest (known to the host: looking for it would wait for the GPU) -> [1, T, H, D].

    Each query sees the last `window` keys up to its own, or all. scale: by which products are multiplied,
    None: one over the root of D.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    parts = (x[0].transpose(0, 1) for x in (query, key, value))
    return _VARLEN(*parts, cu_seqlens, max_seqlen, scale, window or 0)[0][None]


def _bounds(window: int) -> dict[str, int]:
    """torch counts the keys beside a query's own; a causal mask is one without a bound to the left."""
    return {"window_size_left": window - 1, "window_size_right": 0} if window else {}


def _varlen(query, key, value, cu_seqlens, max_seqlen, scale, window):
    out, lse, *_ = _FORWARD(
        query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, not window, False,
        scale=scale, **_bounds(window),
    )  # fmt: skip
    return out, lse


def _varlen_backward(d_out, query, key, value, cu_seqlens, out, lse, max_seqlen, scale, window):
    # What a dropout would have drawn: there is none.
    state, unused = query.new_zeros(2, dtype=torch.uint64), query.new_empty(0)
    with _fixed_order():
        return _BACKWARD(
            d_out.contiguous(), query, key, value, out, lse, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
            0.0, not window, state, unused, scale=scale, **_bounds(window),
        )  # fmt: skip


@contextlib.contextmanager
def _fixed_order() -> Iterator[None]:
    """torch's kernel asks this switch when it is started, and there is no other way to tell it. Elsewhere it
    stays off: on, operations that cannot keep an order are refused, and all fresh memory is filled. (The
    public function changes settings of the compiler beside it.)"""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fills = torch._C._get_deterministic_fill_uninitialized_memory()
    torch._C._set_deterministic_fill_uninitialized_memory(False)
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
        torch._C._set_deterministic_fill_uninitialized_memory(fills)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.max_seqlen, ctx.scale, ctx.window = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _autograd(ctx: Any, d_out: Optional[Tensor], _: Any) -> tuple[Optional[Tensor], ...]:
    if d_out is None:
        return (None,) * 7
    settings = (ctx.max_seqlen, ctx.scale, ctx.window)
    return (*_VARLEN_BACKWARD(d_out, *ctx.saved_tensors, *settings), None, None, None, None)


_VARLEN = define(
    "varlen(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, int max_seqlen, float scale, "
    "int window) -> (Tensor, Tensor)",
    _varlen,
    lambda query, key, value, cu_seqlens, max_seqlen, scale, window: (
        torch.empty_like(query, memory_format=torch.contiguous_format),
        query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32),
    ),
    _setup,
    _autograd,
)
_VARLEN_BACKWARD = define(
    "varlen_backward(Tensor d_out, Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, Tensor out, "
    "Tensor lse, int max_seqlen, float scale, int window) -> (Tensor, Tensor, Tensor)",
    _varlen_backward,
    lambda d_out, query, key, value, cu_seqlens, out, lse, max_seqlen, scale, window: tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
    ),
)
