"""A linear layer in bf16 on CPUs with AVX-512's bf16 dot product and without AMX: native kernels for
y = x W^T + b and for both products of its backward, whose sums run in fp32 and are rounded once.

A row of y does not depend on the rows beside it, which torch's bf16 matmuls do not promise, and nothing
depends on the number of threads. Weight and bias may be fp32 beside 16-bit x: they are rounded to x's dtype
as they are read, and their gradients are fp32. No rounded copy of them outlives a product, on any CPU.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from strop.ops import native, remade
from strop.ops.registered import define

_CODES = native.DTYPES["cpu"]


def takes(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> bool:
    """Whether `linear` has kernels for these: x in bf16, weight and bias too or in fp32, I and O even."""
    if weight.ndim != 2 or x.dtype != torch.bfloat16 or not x.is_cpu or not weight.is_cpu:
        return False
    if bias is not None and not (bias.is_cpu and bias.dtype == weight.dtype):
        return False
    num_out, num_in = weight.shape
    return _has_kernels_for(num_out, num_in, weight.dtype)


def _has_kernels_for(num_out: int, num_in: int, dtype: torch.dtype) -> bool:
    known = dtype == torch.bfloat16 or dtype == torch.float32
    return known and num_out % 2 == num_in % 2 == 0 < num_out * num_in and _has_kernels()


@torch.compiler.assume_constant_result
def _has_kernels() -> bool:
    """With AMX torch multiplies bf16 several times as fast as AVX-512 can."""
    return native.has_avx512(torch.bfloat16) and not torch.cpu._is_amx_tile_supported()


def applies(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> bool:
    """Whether `linear` is more than torch's own: by its kernels, or since torch refuses an fp32 weight."""
    return native.is_rounded(x, weight) or takes(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """x W^T + b: x [..., I], weight [O, I], bias [O] -> [..., O] in x's dtype. torch multiplies what `takes`
    refuses.

    Raises ValueError for shapes that do not fit.
    """
    if not applies(x, weight, bias):
        return F.linear(x, weight, bias)
    num_out, num_in = weight.shape
    if x.ndim == 0 or x.shape[-1] != num_in or (bias is not None and bias.shape != (num_out,)):
        of_bias = None if bias is None else tuple(bias.shape)
        raise ValueError(f"weight {tuple(weight.shape)} and bias {of_bias} for x {tuple(x.shape)}")
    return _LINEAR(x, weight, bias)


def d_input(dy: Tensor, weight: Tensor) -> Tensor:
    """dy [..., O], weight [O, I] -> [..., I] in dy's dtype, the gradient by x."""
    return _D_INPUT(dy, weight)


def d_weight(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dy [..., O], x [..., I] -> [O, I] in dtype, the gradient by the weight."""
    return _D_WEIGHT(dy, x, dtype)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    if not takes(x, weight, None):
        return F.linear(x, weight.to(x.dtype), bias)
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    num_out, num_in = weight.shape
    y = x.new_empty(*x.shape[:-1], num_out)
    scratch = x.new_empty(_padded(num_out, native.TILE) * num_in)
    native.call(
        "strop_linear",
        x,
        x,
        weight,
        _CODES[weight.dtype],
        bias,
        x.numel() // num_in,
        num_in,
        num_out,
        scratch,
        y,
    )
    return y


def _d_input(dy: Tensor, weight: Tensor) -> Tensor:
    if not takes(dy, weight, None):
        return dy @ weight.to(dy.dtype)
    dy, weight = dy.contiguous(), weight.contiguous()
    num_out, num_in = weight.shape
    dx = dy.new_empty(*dy.shape[:-1], num_in)
    scratch = dy.new_empty(_padded(num_in, native.TILE) * num_out)
    native.call(
        "strop_linear_d_input", dy, dy, weight, _CODES[weight.dtype], dy.numel() // num_out, num_in, num_out,
        scratch, dx,
    )  # fmt: skip
    return dx


def _d_weight(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    num_out, num_in = dy.shape[-1], x.shape[-1]
    plain = dy.is_cpu and dy.dtype == x.dtype == torch.bfloat16
    if not plain or not _has_kernels_for(num_out, num_in, dtype):
        return (torch.atleast_2d(dy).flatten(0, -2).t() @ torch.atleast_2d(x).flatten(0, -2)).to(dtype)
    dy, x = dy.contiguous(), x.contiguous()
    num_tokens = dy.numel() // num_out
    d_weight = x.new_empty(num_out, num_in, dtype=dtype)
    columns = _padded(num_in, native.TILE) + _padded(num_out, native.PANEL)
    scratch = x.new_empty(columns * _padded(num_tokens, 2))
    native.call(
        "strop_linear_d_weight", dy, dy, x, num_tokens, num_in, num_out, scratch, d_weight, _CODES[dtype]
    )
    return d_weight


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Only what a gradient needs is kept, and nothing that can be made again."""
    x, weight, bias = inputs
    ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
    need_x, need_weight = ctx.needs_input_grad[:2]
    source = remade.source_of(x) if need_weight else None
    of_x: tuple[Optional[Tensor], ...] = (x if need_weight else None,)
    ctx.maker = None
    if source is not None:
        ctx.maker, of_x = source.maker, source.parts
        ctx.maker.add_user()
    ctx.save_for_backward(weight if need_x else None, *of_x)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Optional[Tensor], ...]:
    weight, *of_x = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    dx = _D_INPUT(dy, weight) if need_x else None
    d_weight = None
    if need_weight:
        x = of_x[0] if ctx.maker is None else ctx.maker.make(of_x)
        d_weight = _D_WEIGHT(dy, x, ctx.weight_dtype)
    d_bias = torch.atleast_2d(dy).flatten(0, -2).sum(0, dtype=ctx.bias_dtype) if need_bias else None
    return dx, d_weight, d_bias


_LINEAR = define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _linear,
    lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
    _setup,
    _autograd,
)
_D_INPUT = define(
    "linear_d_input(Tensor dy, Tensor weight) -> Tensor",
    _d_input,
    lambda dy, weight: dy.new_empty(*dy.shape[:-1], weight.shape[1]),
)
_D_WEIGHT = define(
    "linear_d_weight(Tensor dy, Tensor x, ScalarType dtype) -> Tensor",
    _d_weight,
    lambda dy, x, dtype: x.new_empty(dy.shape[-1], x.shape[-1], dtype=dtype),
)
