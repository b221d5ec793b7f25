"""A model's own code exchanged for `ops.layers` and `ops.linear`, where it is shown to compute just that.

Linear layers are those of `nn.Linear` itself, but for the head, which has kernels of its own. Norms, gated
MLPs and the rotary embedding are found by what they hold, not by the model's name. Each module's `forward` is
tried on a few numbers, since two of one class may differ: what gives another result (a weight counted from 1,
another activation, another order of halves) keeps its own code. So does whatever runs elsewhere than on a CPU
with the kernels, which is asked at each call, since it costs nothing.

What is exchanged computes the same formula. In bf16 it may round elsewhere, and is then at least as close to
the exact result: the rotary embedding is rounded once, not at each of three steps. A norm that rounds less
often than the kernel (Olmo 2 rounds only after the weight) keeps its own code.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strop.ops import layers
from strop.ops.linear import applies, linear

TOLERANCE = 1e-5
"""In fp32, on numbers around 1."""

MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
MORE_ERROR = 1.05
"""What the error of a kernel in bf16 may be, as a multiple of that of the model's own code."""

EPS_NAMES = ("variance_epsilon", "eps")


def install(model: nn.Module) -> None:
    """Exchange what can be, in place. A `forward` that somebody has set on a module stays."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for module in model.modules():
        if "forward" in vars(module):
            continue
        if type(module) is nn.Linear and module is not head:
            use_linear(module)
        elif _looks_like_norm(module) and _is_norm(module):
            module.forward = types.MethodType(_norm, module)
        elif _looks_like_mlp(module) and _is_mlp(module):
            module.forward = types.MethodType(_mlp, module)
    for name in {type(module).__module__ for module in model.modules()}:
        _install_rotary(sys.modules[name])


def _eps(module: nn.Module) -> float:
    return next(getattr(module, name) for name in EPS_NAMES if hasattr(module, name))


def _looks_like_norm(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_parameters()}
    return (
        names == {"weight"}
        and getattr(module, "weight", torch.empty(0)).ndim == 1
        and any(isinstance(getattr(module, name, None), float) for name in EPS_NAMES)
        and not any(True for _ in module.children())
        and not any(True for _ in module.buffers())
    )


@torch.no_grad()
def _is_norm(module: nn.Module) -> bool:
    """In fp32 the same numbers; in bf16 no closer to the exact ones than the kernel, which rounds twice."""
    x, weight = torch.linspace(-2, 1, 256).view(1, 32, 8), torch.linspace(-1.5, 2.0, 8)

    def own(x: Tensor, weight: Tensor) -> Tensor:
        trial = copy.copy(module)
        trial._parameters = {"weight": nn.Parameter(weight)}
        return trial.forward(x)

    def normalised(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _eps(module))

    if not _agree(lambda: own(x, weight), weight * normalised(x)):
        return False
    x, weight = x.bfloat16(), weight.bfloat16()
    exact = weight.double() * normalised(x.double())
    theirs, ours = own(x, weight), weight * normalised(x.float()).bfloat16()
    of_theirs, of_ours = ((y.double() - exact).norm() for y in (theirs, ours))
    return theirs.dtype == ours.dtype and bool(of_ours <= MORE_ERROR * of_theirs)


def _norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    if layers.supports(hidden_states) and layers.fits(hidden_states, self.weight):  # type: ignore[arg-type]
        return layers.rms_norm(hidden_states, self.weight, _eps(self))  # type: ignore[arg-type]
    return type(self).forward(self, hidden_states)


def use_linear(module: nn.Linear) -> None:
    module.forward = types.MethodType(_linear, module)  # type: ignore[method-assign]


def _linear(self: nn.Linear, x: Tensor) -> Tensor:
    """torch's own for what `linear` adds nothing to, and for sharded weights."""
    if type(self.weight) is nn.Parameter and type(x) is Tensor and applies(x, self.weight, self.bias):
        return linear(x, self.weight, self.bias)
    return nn.Linear.forward(self, x)


def _looks_like_mlp(module: nn.Module) -> bool:
    return {name for name, _ in module.named_children()} == MLP_PARTS


@torch.no_grad()
def _is_mlp(module: nn.Module) -> bool:
    trial = copy.copy(module)
    # Made on "meta" they draw no random numbers.
    gate, up, down = (nn.Linear(*sizes, device="meta") for sizes in ((4, 6), (4, 6), (6, 4)))
    parts = {"gate_proj": gate, "up_proj": up, "down_proj": down, "act_fn": module.act_fn}
    trial._modules = parts  # type: ignore[assignment]
    for i, part in enumerate((gate, up, down)):
        part.weight = nn.Parameter(torch.linspace(-1, 1.5 + i, 24).view_as(part.weight))
        part.bias = nn.Parameter(torch.zeros(len(part.weight)))
    x = torch.linspace(-2, 3, 12).view(1, 3, 4)
    return _agree(lambda: trial.forward(x), down(F.silu(gate(x)) * up(x)))


def _mlp(self: nn.Module, x: Tensor) -> Tensor:
    gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj  # type: ignore[operator]
    if not layers.supports(gate) or not _is_plain(self.act_fn):  # type: ignore[arg-type]
        return down(self.act_fn(gate) * up)  # type: ignore[operator]
    if type(down) is nn.Linear and down.bias is None and layers.fits(gate, down.weight) and _is_plain(down):
        return layers.silu_mul_linear(gate, up, down.weight)
    return down(layers.silu_mul(gate, up))  # type: ignore[operator]


def _is_plain(module: nn.Module) -> bool:
    """Whether a call runs its class's `forward`, or ours, and no hooks: then it need not be called."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    own = module.__dict__.get("forward")
    return not any(len(h) for h in hooks) and (own is None or getattr(own, "__func__", None) is _linear)


def _install_rotary(module: types.ModuleType) -> None:
    """The function is one of the model's source file, so all models of it get the exchanged one."""
    original = getattr(module, "apply_rotary_pos_emb", None)
    if original is None or hasattr(original, "__wrapped__"):
        return
    q, k = torch.linspace(-1, 1, 48).view(1, 2, 3, 8), torch.linspace(2, -1, 24).view(1, 1, 3, 8)
    cos, sin = torch.linspace(0.1, 1, 24).view(1, 3, 8), torch.linspace(1, -0.3, 24).view(1, 3, 8)
    wanted = torch.cat([(x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin).flatten() for x in (q, k)])
    if _agree(lambda: torch.cat([x.flatten() for x in original(q, k, cos, sin)]), wanted):
        module.apply_rotary_pos_emb = _rotary(original)  # type: ignore[attr-defined]


def _rotary(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        plain = not args and not kwargs and q.shape[0] == 1 and cos.shape == (1, *q.shape[2:])
        if plain and layers.supports(q) and q.dtype == k.dtype == cos.dtype == sin.dtype:
            return layers.rotate(q, cos, sin), layers.rotate(k, cos, sin)
        return original(q, k, cos, sin, *args, **kwargs)

    return apply_rotary_pos_emb


@torch.no_grad()
def _agree(trial: Callable[[], Tensor], wanted: Tensor) -> bool:
    """Whether the model's own code gives what is wanted; code that wants something else does not."""
    try:
        found = trial()
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= TOLERANCE)
