"""A model on one rank of a CPU, whose weights stay what they are: fp32 parameters, used in place.

Nothing has to be gathered or reduced there, so fully_shard would only copy: each weight to the compute type
before a forward and a backward, each gradient back to fp32. Here the operations round a weight as they read
it, and write its gradient in fp32 (ops.linear, ops.layers, the head). What else has weights is treated alike:
an embedding's rows are rounded as they are looked up, vectors (of norms that keep their own code) as their
module is called. A model with a matrix elsewhere, or whose code goes by the type of its weights, is left to
fully_shard.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from strop.models import fused
from strop.models.policy import Policy, probe_batch


def install(policy: Policy, dtype: torch.dtype, device: torch.device) -> bool:
    """Make `policy` compute in `dtype` with its fp32 weights and say whether that can be done; else nothing
    is changed. The weights need no values yet."""
    if device.type != "cpu" or policy.adapters is not None:
        return False
    if dtype == torch.float32:
        return True
    if any(p.dtype != torch.float32 or not p.requires_grad for p in policy.parameters()):
        return False
    if not is_known(policy):
        return False
    exchanged = [module for module in policy.modules() if _exchange(module, dtype)]
    if _computes_in(policy, dtype, device):
        return True
    for module in exchanged:
        del module.forward
    return False


def is_known(model: nn.Module) -> bool:
    """Whether all matrices are those of linear layers and embeddings: what can be said without a forward."""
    return all(
        type(module) in (nn.Linear, nn.Embedding) or all(p.ndim < 2 for p in module.parameters(recurse=False))
        for module in model.modules()
    )


def _exchange(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the module's `forward` was exchanged: it has weights, and `fused` has not seen to it."""
    if "forward" in vars(module) or not any(True for _ in module.parameters(recurse=False)):
        return False
    if type(module) is nn.Linear:
        fused.use_linear(module)
    elif type(module) is nn.Embedding:
        module.forward = types.MethodType(_embedding(dtype), module)  # type: ignore[method-assign]
    else:
        module.forward = types.MethodType(_with_rounded_vectors(dtype), module)
    return True


def _embedding(dtype: torch.dtype) -> Callable[[nn.Embedding, Tensor], Tensor]:
    def forward(self: nn.Embedding, ids: Tensor) -> Tensor:
        return nn.Embedding.forward(self, ids).to(dtype)

    return forward


def _with_rounded_vectors(dtype: torch.dtype) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        rounded = {name: p.to(dtype) for name, p in self._parameters.items() if p is not None}
        vars(self).update(rounded)  # found before the parameters
        try:
            return type(self).forward(self, *args, **kwargs)
        finally:
            for name in rounded:
                del vars(self)[name]

    return forward


@torch.no_grad()
def _computes_in(policy: Policy, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a few tokens go through, and every linear layer is given `dtype`."""
    given: set[Any] = set()
    handles = [
        module.register_forward_pre_hook(lambda _, args: given.add(args[0].dtype if args else None))
        for module in policy.modules()
        if isinstance(module, nn.Linear)
    ]
    head, batch = policy.head, probe_batch(policy.lm.config.get_text_config().vocab_size, device)
    policy.set_layout("padded", device)
    try:
        for policy.head in ("logits", head):
            policy(batch)
    except (RuntimeError, TypeError, ValueError):
        return False  # of a product of two types, as a rule
    finally:
        policy.head = head
        for handle in handles:
            handle.remove()
    return given == {dtype}
