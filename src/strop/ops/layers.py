"""What stands between a model's matmuls on the CPU, one pass each: RMS norm, SiLU times gate, rotary
embedding, and causal attention over packed sequences. Native kernels only (AVX-512; `supports` says where):
elsewhere the model's own code runs, whose formulas these are. In bf16 intermediate results stay in fp32 but
where a docstring says otherwise, so some elements differ from those of torch's operations by a rounding.

Registered as torch.ops.strop.*, so torch.compile sees one node each. Shapes: T tokens, H heads of queries, K
of keys and values, D size of a head.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Optional

import torch
from torch import Tensor

from strop.ops import linear, native, remade
from strop.ops.registered import define

NORM_ROWS = 64
"""strop_cpu.h: rows whose weight gradients are summed by one thread."""


def supports(x: Tensor) -> bool:
    """Whether these kernels run on x's device, for its dtype."""
    return x.device.type == "cpu" and _has_kernels(x.dtype)


@torch.compiler.assume_constant_result
def _has_kernels(dtype: torch.dtype) -> bool:
    return native.is_loaded("cpu") and native.has_avx512(dtype)


def _code(x: Tensor) -> int:
    return native.DTYPES["cpu"][x.dtype]


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether a weight has x's dtype, or is one that is rounded to it."""
    return weight.dtype == x.dtype or native.is_rounded(x, weight)


def _check_weight(x: Tensor, weight: Tensor) -> None:
    if not fits(x, weight) or weight.device != x.device:
        _check_alike(x, weight=weight)


def _check_alike(x: Tensor, **others: Tensor) -> None:
    """C gets addresses, which it takes to be the CPU's and of x's dtype."""
    if x.device.type != "cpu":
        raise ValueError(f"tensors of the CPU, not of device {x.device}")
    for name, other in others.items():
        if other.dtype != x.dtype or other.device != x.device:
            raise ValueError(f"{name} {other.dtype} on {other.device} beside {x.dtype} on {x.device}")


# ---- RMS norm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / √(mean(x²) + eps) over the last dim; the normalised row is rounded to x's dtype first.

    x [..., size], weight [size] of the same dtype or fp32 (`fits`). Zhang and Sennrich 2019, as transformers
    computes it.
    """
    _check_alike(x)
    _check_weight(x, weight)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {tuple(weight.shape)} for x {tuple(x.shape)}")
    y = _NORM(x, weight, eps)[0]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # A copy of the weight: FSDP frees gathered ones, and gathers a block's in its own backward only.
        remade.note(
            y, functools.partial(_norm_again, eps), x.detach(), weight.detach().to(x.dtype, copy=True)
        )
    return y


def _norm_again(eps: float, x: Tensor, weight: Tensor) -> Tensor:
    return _NORM(x, weight, eps)[0]


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, weight = x.contiguous(), weight.to(x.dtype).contiguous()
    y, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    native.call("strop_norm", x, x, weight, _code(x), inverse.numel(), x.shape[-1], eps, y, inverse)
    return y, inverse


def _norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, train: bool
) -> tuple[Tensor, Tensor]:
    dtype = weight.dtype
    x, weight, dy = x.contiguous(), weight.to(x.dtype).contiguous(), dy.contiguous()
    rows, size = inverse.numel(), x.shape[-1]
    dx, d_weight = torch.empty_like(x), torch.zeros_like(weight) if train else weight.new_empty(0)
    partial = None
    if train:
        partial = x.new_empty(-(-rows // NORM_ROWS) * size, dtype=torch.float32)
    native.call(
        "strop_norm_grad", x, x, weight, dy, inverse, _code(x), rows, size, dx, partial,
        d_weight if train else None,
    )  # fmt: skip
    return dx, d_weight.to(dtype)


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])


def _norm_autograd(ctx: Any, dy: Optional[Tensor], _: Any) -> tuple[Optional[Tensor], ...]:
    if dy is None:
        return None, None, None
    train = ctx.needs_input_grad[1]
    dx, d_weight = _NORM_BACKWARD(dy, *ctx.saved_tensors, train)
    return dx, d_weight if train else None, None


_NORM = define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _norm,
    lambda x, weight, eps: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
    ),
    _norm_setup,
    _norm_autograd,
)
_NORM_BACKWARD = define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor inverse, bool train) -> (Tensor, Tensor)",
    _norm_backward,
    lambda dy, x, weight, inverse, train: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight) if train else weight.new_empty(0),
    ),
)


# ---- SiLU times gate


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, of one shape and dtype; silu(gate) is rounded to it first (SwiGLU; Shazeer 2020)."""
    _check_gate(gate, up)
    return _GATE(gate, up)


def _gate(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    native.call("strop_gate", gate, gate, up, _code(gate), gate.numel(), out)
    return out


def silu_mul_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """(silu(gate) · up) @ weight.T: a gated MLP's last two steps, which keep gate and up alone for the
    backward. Their product, a third of what the MLP would keep, is made again there by the same pass.

    gate and up [..., I], weight [O, I] of the same dtype or fp32 (`fits`) -> [..., O].
    """
    _check_gate(gate, up)
    _check_weight(gate, weight)
    if weight.ndim != 2 or weight.shape[1:] != gate.shape[-1:]:
        raise ValueError(f"weight {tuple(weight.shape)} for gate {tuple(gate.shape)}")
    return _GATE_LINEAR(gate, up, weight)


def _check_gate(gate: Tensor, up: Tensor) -> None:
    _check_alike(gate, up=up)
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)}")


def _gate_backward(dy: Tensor, gate: Tensor, up: Tensor, product: bool) -> tuple[Tensor, Tensor, Tensor]:
    gate, up, dy = gate.contiguous(), up.contiguous(), dy.contiguous()
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    made = torch.empty_like(gate) if product else gate.new_empty(0)
    native.call(
        "strop_gate_grad", gate, gate, up, dy, _code(gate), gate.numel(), d_gate, d_up,
        made if product else None,
    )  # fmt: skip
    return d_gate, d_up, made


def _gate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gate_autograd(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up, _ = _GATE_BACKWARD(dy, *ctx.saved_tensors, False)
    return d_gate, d_up


def _gate_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    return linear.linear(_gate(gate, up), weight)


def _gate_linear_autograd(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    gate, up, weight = ctx.saved_tensors
    train = ctx.needs_input_grad[2]
    d_product = linear.d_input(dy, weight)
    d_gate, d_up, product = _GATE_BACKWARD(d_product, gate, up, train)
    d_weight = linear.d_weight(dy, product, weight.dtype) if train else None
    return d_gate, d_up, d_weight


_GATE = define(
    "silu_mul(Tensor gate, Tensor up) -> Tensor",
    _gate,
    lambda gate, up: gate.new_empty(gate.shape),
    _gate_setup,
    _gate_autograd,
)
_GATE_BACKWARD = define(
    "silu_mul_backward(Tensor dy, Tensor gate, Tensor up, bool product) -> (Tensor, Tensor, Tensor)",
    _gate_backward,
    lambda dy, gate, up, product: (
        gate.new_empty(gate.shape),
        up.new_empty(up.shape),
        gate.new_empty(gate.shape if product else 0),
    ),
)
_GATE_LINEAR = define(
    "silu_mul_linear(Tensor gate, Tensor up, Tensor weight) -> Tensor",
    _gate_linear,
    lambda gate, up, weight: gate.new_empty(*gate.shape[:-1], weight.shape[0]),
    _gate_setup,
    _gate_linear_autograd,
)


# ---- Rotary embedding


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x cos + (-x₂, x₁) sin over the halves of each head (Su et al. 2021, in GPT-NeoX's order).

    x [1, H, T, D] of any strides with the last one 1; cosine, sine [1, T, D] of the same dtype. The result is
    laid out token by token.
    """
    _check_alike(x, cosine=cosine, sine=sine)
    if x.ndim != 4 or x.shape[0] != 1:
        raise ValueError(f"one packed batch [1, H, T, D], not {tuple(x.shape)}")
    num_tokens, size = x.shape[2:]
    if cosine.shape != (1, num_tokens, size) or sine.shape != cosine.shape or size % 2:
        raise ValueError(f"cosine {tuple(cosine.shape)}, sine {tuple(sine.shape)} for x {tuple(x.shape)}")
    return _ROTATE(x, cosine, sine, False)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor, inverse: bool) -> Tensor:
    _, num_heads, num_tokens, size = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    cosine, sine = cosine.contiguous(), sine.contiguous()
    out = x.new_empty(1, num_tokens, num_heads, size)
    native.call(
        "strop_turn", x, x, _code(x), x.stride(2), x.stride(1), cosine, sine, num_tokens, num_heads, size,
        int(inverse), out,
    )  # fmt: skip
    return out.transpose(1, 2)


def _rotate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cosine, sine, ctx.inverse = inputs
    ctx.save_for_backward(cosine, sine)


def _rotate_autograd(ctx: Any, dy: Tensor) -> tuple[Optional[Tensor], ...]:
    return _ROTATE(dy, *ctx.saved_tensors, not ctx.inverse), None, None, None


def _by_token(x: Tensor, num_heads: int) -> Tensor:
    """What comes out, for torch.compile: [1, H, T, D] over memory of [1, T, H, D]."""
    return x.new_empty(1, x.shape[2], num_heads, x.shape[3]).transpose(1, 2)


_ROTATE = define(
    "rotate(Tensor x, Tensor cosine, Tensor sine, bool inverse) -> Tensor",
    _rotate,
    lambda x, cosine, sine, inverse: _by_token(x, x.shape[1]),
    _rotate_setup,
    _rotate_autograd,
)


# ---- Attention


class _Attention(ctypes.Structure):
    """strop_attention"""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((f"{name}_{what}", ctypes.c_int64) for name in "qkv" for what in ("token", "head")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_heads", "num_kv_heads", "size", "num_seqs")),
        ("cu_queries", ctypes.c_void_p),
        ("cu_keys", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("window", ctypes.c_int64),
    )


def attends(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attention` takes these: bf16, and heads of one size, a multiple of 16."""
    size = query.shape[-1]
    return all(
        x.dtype == torch.bfloat16 and x.shape[-1] == size and size % 16 == 0 and supports(x)
        for x in (query, key, value)
    )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    scale: float,
    window: Optional[int] = None,
) -> Tensor:
    """Causal attention within each packed sequence: query [1, H, T, D], key and value [1, K, T, D], bf16, H a
    multiple of K; cu_queries, cu_keys int32 [S+1] -> [1, T, H, D].

    A sequence with more keys than queries begins with keys of the one before it. Each query sees the last
    `window` keys up to its own, or all. Raises ValueError for shapes and offsets that do not fit.
    """
    _check_alike(query, key=key, value=value)
    if cu_queries.device != query.device or cu_keys.device != query.device:
        raise ValueError(f"cu_queries on {cu_queries.device}, cu_keys on {cu_keys.device}, not the CPU")
    shapes = [tuple(x.shape) for x in (query, key, value)]
    if not all(len(shape) == 4 and shape[0] == 1 and shape[2:] == shapes[0][2:] for shape in shapes):
        raise ValueError(f"query, key and value {shapes}")
    if shapes[1] != shapes[2] or not attends(query, key, value):
        raise ValueError(f"query, key and value {shapes} of {query.dtype}")
    cu_queries, cu_keys = cu_queries.int().contiguous(), cu_keys.int().contiguous()
    if cu_queries.shape != cu_keys.shape or cu_queries.ndim != 1 or len(cu_queries) == 0:
        raise ValueError(f"cu_queries {tuple(cu_queries.shape)} and cu_keys {tuple(cu_keys.shape)}")
    return _ATTENTION(query, key, value, cu_queries, cu_keys, scale, window or 0)[0]


def _call(query, key, value, cu_queries, cu_keys, scale, window) -> tuple[_Attention, list[Tensor]]:
    """The struct, and the tensors behind it, which must stay alive."""
    parts = [x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value)]
    strides = [stride for x in parts for stride in (x.stride(2), x.stride(1))]
    _, num_heads, num_tokens, size = query.shape
    a = _Attention(
        *(x.data_ptr() for x in parts), *strides, num_tokens, num_heads, key.shape[1], size,
        len(cu_queries) - 1, cu_queries.data_ptr(), cu_keys.data_ptr(), scale, window,
    )  # fmt: skip
    return a, parts


def _attention(query, key, value, cu_queries, cu_keys, scale, window):
    _, num_heads, num_tokens, size = query.shape
    a, alive = _call(query, key, value, cu_queries, cu_keys, scale, window)
    out = query.new_empty(1, num_tokens, num_heads, size)
    lse = query.new_empty(num_heads, num_tokens, dtype=torch.float32)
    native.call("strop_attend", alive[0], ctypes.byref(a), out, lse)
    return out, lse


def _attention_backward(d_out, query, key, value, cu_queries, cu_keys, out, lse, scale, window):
    _, num_heads, num_tokens, size = query.shape
    a, alive = _call(query, key, value, cu_queries, cu_keys, scale, window)
    d_out = d_out.contiguous()
    d_query = query.new_empty(1, num_tokens, num_heads, size)
    d_key, d_value = query.new_empty(2, 1, num_tokens, key.shape[1], size)
    native.call("strop_attend_grad", alive[0], ctypes.byref(a), out, d_out, lse, d_query, d_key, d_value)
    return d_query.transpose(1, 2), d_key.transpose(1, 2), d_value.transpose(1, 2)


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _attention_autograd(ctx: Any, d_out: Optional[Tensor], _: Any) -> tuple[Optional[Tensor], ...]:
    if d_out is None:
        return (None,) * 7
    grads = _ATTENTION_BACKWARD(d_out, *ctx.saved_tensors, ctx.scale, ctx.window)
    return (*grads, None, None, None, None)


_ATTENTION = define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor cu_queries, Tensor cu_keys, float scale, "
    "int window) -> (Tensor, Tensor)",
    _attention,
    lambda query, key, value, cu_queries, cu_keys, scale, window: (
        query.new_empty(1, query.shape[2], query.shape[1], query.shape[3]),
        query.new_empty(query.shape[1], query.shape[2], dtype=torch.float32),
    ),
    _attention_setup,
    _attention_autograd,
)
_ATTENTION_BACKWARD = define(
    "attention_backward(Tensor d_out, Tensor query, Tensor key, Tensor value, Tensor cu_queries, "
    "Tensor cu_keys, Tensor out, Tensor lse, float scale, int window) -> (Tensor, Tensor, Tensor)",
    _attention_backward,
    lambda d_out, query, key, value, cu_queries, cu_keys, out, lse, scale, window: (
        _by_token(query, query.shape[1]),
        _by_token(query, key.shape[1]),
        _by_token(query, key.shape[1]),
    ),
)
