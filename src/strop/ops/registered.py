"""The operations as PyTorch knows them: torch.ops.strop.*, with fake implementations and autograd.

Each chooses its backend inside (native kernels, else the reference), by what its tensors are, so that
torch.compile sees one node and checks of values happen where there are values. Made with
torch.library.Library. Its calls cost some 100 µs where a gradient is wanted, and a step of a small model has
a thousand: where nobody looks on, a call goes past the dispatcher, straight to the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from strop.ops import head, native, preference, reference
from strop.ops.reference import Scalings

LIB = torch.library.Library("strop", "DEF")


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    setup: Optional[Callable[..., None]] = None,
    autograd: Optional[Callable[..., Any]] = None,
) -> Callable[..., Any]:
    """Register an operation, with its derivative if `autograd` is given (as torch.library.register_autograd
    takes them), and return what calls it."""
    LIB.define(schema)
    name = schema.partition("(")[0]
    LIB.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"strop::{name}", fake, lib=LIB)
    direct = None
    if autograd is not None:
        torch.library.register_autograd(f"strop::{name}", autograd, setup_context=setup, lib=LIB)
        direct = _function(name, implementation, setup, autograd).apply
    registered = getattr(torch.ops.strop, name).default

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _is_watched(arguments):
            return registered(*arguments)
        if direct is not None and torch.is_grad_enabled():
            return direct(*arguments)
        return implementation(*arguments)

    return call


def _function(name: str, implementation: Any, setup: Any, autograd: Any) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *arguments: Any) -> Any:
        output = implementation(*arguments)
        ctx.is_direct = True
        setup(ctx, arguments, output)
        return output

    parts = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(autograd))}
    return type(name, (torch.autograd.Function,), parts)


def _is_watched(arguments: Iterable[Any]) -> bool:
    """Whether a mode, a transform, the profiler or a tensor's own class wants to see operations."""
    if (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
    ):
        return True
    for x in arguments:
        kind = type(x)
        if kind is not Tensor and kind is not Parameter and isinstance(x, Tensor):
            return True
    return False


def _check_targets(target: Tensor, vocab: int) -> None:
    """On a GPU that would wait for it: there a target outside gives NaN."""
    if target.device.type == "cpu" and target.numel() and not 0 <= target.min() <= target.max() < vocab:
        raise ValueError(f"targets must be in [0, {vocab}), not {target.min()}..{target.max()}")


def _rows_like(x: Tensor, count: int = 5) -> tuple[Tensor, ...]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return tuple(x.new_empty(x.shape[0], dtype=wide) for _ in range(count))


# ---- linear_logprob


def _head(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Optional[Tensor],
    softcap: Optional[float],
    temperature: float,
    keep: int,
) -> tuple[Tensor, ...]:
    _check_targets(target, len(weight))
    scalings = Scalings(bias, softcap, temperature)
    keep = head.what_fits(keep, hidden, weight, softcap)
    if head.engine(hidden, weight) != "reference":
        walked, kept, tops = head.forward(hidden, weight, target.contiguous(), scalings, keep)
        return (*walked, kept, tops)
    walked = reference.head_forward(hidden, weight, target, scalings)
    kept = hidden.new_empty(0)
    if keep == head.FROZEN:
        ones, needs = torch.ones_like(walked.lse), (True, False, False)
        u, _, _ = reference.head_backward(ones, hidden, weight, target, scalings, walked.lse, needs)
        assert u is not None
        kept = u
    return (*walked, kept, hidden.new_empty(0))


def _head_fake(hidden, weight, target, bias, softcap, temperature, keep):
    kept, tops = head.kept_shape(hidden, weight, head.what_fits(keep, hidden, weight, softcap))
    return (*_rows_like(hidden), hidden.new_empty(kept), hidden.new_empty(tops))


def _head_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Optional[Tensor],
    softcap: Optional[float],
    temperature: float,
    lse: Tensor,
    kept: Optional[Tensor],
    tops: Optional[Tensor],
    needs: list[bool],
    over_kept: bool = False,
) -> tuple[Tensor, ...]:
    scalings = Scalings(bias, softcap, temperature)
    wanted = (needs[0], needs[1], needs[2])
    if head.engine(hidden, weight) == "reference":
        grads = reference.head_backward(grad, hidden, weight, target, scalings, lse, wanted)
    else:
        target = target.contiguous()
        grads = head.backward(grad, hidden, weight, target, scalings, lse, kept, tops, wanted, over_kept)
    return tuple(hidden.new_empty(0) if g is None else g for g in grads)


def _head_backward_fake(
    grad, hidden, weight, target, bias, softcap, temperature, lse, kept, tops, needs
):  # fmt: skip
    like = (hidden, weight, bias)
    return tuple(
        hidden.new_empty(0)
        if x is None or not need
        else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x, need in zip(like, needs)
    )


def head_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    """What torch.ops.strop.head_backward gives. Where nobody looks on, the weight's gradient may lie where
    kept was, of which the caller knows that nobody else has it. An operation's results may not."""
    if torch.compiler.is_compiling() or _is_watched(arguments):
        return torch.ops.strop.head_backward(*arguments)
    given = [*arguments, True]  # over_kept
    return _head_backward(*given)


def _head_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, bias, softcap, temperature, keep = inputs
    _, lse, _, _, _, kept, tops = output
    ctx.keep, ctx.softcap, ctx.temperature, ctx.dtype = keep, softcap, temperature, hidden.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    if keep == head.FROZEN:
        ctx.save_for_backward(kept)
    else:
        ctx.save_for_backward(hidden, weight, target, bias, lse, kept, tops)


def _head_autograd(ctx: Any, grad: Optional[Tensor], *_: Any) -> tuple[Optional[Tensor], ...]:
    if grad is None:
        return (None,) * 7
    if ctx.keep == head.FROZEN:
        (u,) = ctx.saved_tensors
        return (u * grad[:, None]).to(ctx.dtype), None, None, None, None, None, None
    hidden, weight, target, bias, lse, kept, tops = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    has_kept = kept.numel() > 0
    gradients = head_gradients if getattr(ctx, "is_direct", False) else torch.ops.strop.head_backward
    d_hidden, d_weight, d_bias = gradients(
        grad, hidden, weight, target, bias, ctx.softcap, ctx.temperature, lse,
        kept if has_kept else None, tops if has_kept else None, needs,
    )  # fmt: skip
    given = [g if need else None for g, need in zip((d_hidden, d_weight, d_bias), needs)]
    return given[0], given[1], None, given[2], None, None, None


call_head = define(
    "head(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float? softcap, float temperature, "
    "int keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _head,
    _head_fake,
    _head_setup,
    _head_autograd,
)
define(
    "head_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float? softcap, "
    "float temperature, Tensor lse, Tensor? kept, Tensor? tops, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _head_backward,
    _head_backward_fake,
)


# ---- logprob


def _native_logits(logits: Tensor) -> bool:
    if not native.takes(logits, "logprob"):
        return False
    return logits.stride(1) == 1 or native.refuse("logprob", "the logits' rows are not contiguous")


def _logprob(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    _check_targets(target, logits.shape[1])
    if _native_logits(logits):
        return tuple(head.logprob_forward(logits, target.contiguous()))
    return tuple(reference.logprob_forward(logits, target))


def _logprob_backward(grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor) -> Tensor:
    if _native_logits(logits):
        return head.logprob_backward(grad.contiguous(), logits, target.contiguous(), lse)
    return reference.logprob_backward(grad, logits, target, lse)


def _logprob_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _logprob_autograd(ctx: Any, grad: Optional[Tensor], *_: Any) -> tuple[Optional[Tensor], None]:
    if grad is None:
        return None, None
    return torch.ops.strop.logprob_backward(grad, *ctx.saved_tensors), None


define(
    "logprob(Tensor logits, Tensor target) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _logprob,
    lambda logits, target: _rows_like(logits),
    _logprob_setup,
    _logprob_autograd,
)
define(
    "logprob_backward(Tensor grad, Tensor logits, Tensor target, Tensor lse) -> Tensor",
    _logprob_backward,
    lambda grad, logits, target, lse: torch.empty_like(logits, memory_format=torch.contiguous_format),
)


# ---- segment_sum


def _check_segments(num_tokens: int, cu_seqlens: Tensor) -> None:
    if cu_seqlens.device.type != "cpu":
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != num_tokens:
        raise ValueError(
            f"cu_seqlens must run from 0 to {num_tokens}, not {cu_seqlens[0]} to {cu_seqlens[-1]}"
        )
    if (cu_seqlens.diff() < 0).any():
        raise ValueError("cu_seqlens must not fall")


def _segment_sum(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    if x.dtype != torch.float32 or not native.takes(x, "segment_sum"):
        _check_segments(len(x), cu_seqlens)
        return reference.segment_sum(x, cu_seqlens)
    x, edges = x.contiguous(), cu_seqlens.int().contiguous()
    out = x.new_empty(len(edges) - 1)
    try:
        native.call("strop_segment_sum", x, x, len(x), edges, len(out), out)
    except ValueError:
        _check_segments(len(x), cu_seqlens)  # says which
        raise
    return out


def _segment_spread(g: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    if g.dtype != torch.float32 or not native.takes(g, "segment_sum"):
        return reference.segment_spread(g, cu_seqlens)
    g, edges = g.contiguous(), cu_seqlens.int().contiguous()
    out = g.new_empty(num_tokens)
    native.call("strop_segment_spread", g, g, num_tokens, edges, len(g), out)
    return out


def _segment_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cu_seqlens = inputs
    ctx.num_tokens = x.shape[0]
    ctx.save_for_backward(cu_seqlens)


def _segment_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.strop.segment_spread(grad, *ctx.saved_tensors, ctx.num_tokens), None


define(
    "segment_sum(Tensor x, Tensor cu_seqlens) -> Tensor",
    _segment_sum,
    lambda x, cu_seqlens: x.new_empty(cu_seqlens.shape[0] - 1),
    _segment_setup,
    _segment_autograd,
)
define(
    "segment_spread(Tensor g, Tensor cu_seqlens, SymInt num_tokens) -> Tensor",
    _segment_spread,
    lambda g, cu_seqlens, num_tokens: g.new_empty(num_tokens),
)


# ---- dpo_loss


def _dpo_loss(
    ratio: Tensor, kind: str, beta: float, label_smoothing: float, delta: float
) -> tuple[Tensor, Tensor]:
    """Native only: the reference's derivatives are autograd's, which no op can call inside."""
    ratio = ratio.contiguous()
    loss, slope = ratio.new_empty(len(ratio)), torch.empty_like(ratio)
    code = list(preference.KINDS).index(kind)
    native.call("strop_dpo_loss", ratio, ratio, len(ratio), code, beta, label_smoothing, delta, loss, slope)
    return loss, slope


def _dpo_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _dpo_autograd(ctx: Any, grad: Tensor, _: Any) -> tuple[Optional[Tensor], ...]:
    (slope,) = ctx.saved_tensors
    return slope * grad[:, None], None, None, None, None


define(
    "dpo_loss(Tensor ratio, str kind, float beta, float label_smoothing, float delta) -> (Tensor, Tensor)",
    _dpo_loss,
    lambda ratio, kind, beta, label_smoothing, delta: (
        ratio.new_empty(ratio.shape[0]),
        torch.empty_like(ratio, memory_format=torch.contiguous_format),
    ),
    _dpo_setup,
    _dpo_autograd,
)
