"""FSDP2: every transformer block, and what is left at the root, sharded over the mesh's last axis.

Weights are fp32 shards (frozen ones in the compute type); a block's are gathered in the compute type just
before its forward and its backward. Gradients are summed, not averaged, in fp32: the loss has been divided by
the global count already. One rank on a CPU, where there is nothing to gather, uses its weights as they are
wherever the model allows it (strop.models.whole).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from strop.config import TrainConfig
from strop.dist import Dist
from strop.models import whole
from strop.models.policy import Policy
from strop.ops import workspace

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

WHOLE_GRADIENT_BYTES = 2 * 2**30
"""Up to this size of the fp32 gradient of all weights, weights (of several ranks) and gradient are kept whole
on each rank over the micro batches of a step: gathered once, reduced once. Larger ones are gathered for each
forward and each backward and reduced after every micro batch, to save memory."""

_SAVED_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.strop.attention.default,
    torch.ops.strop.linear.default,
    torch.ops.strop.silu_mul_linear.default,
    torch.ops.strop.varlen.default,
}


def shard(policy: Policy, config: TrainConfig, dist: Dist) -> None:
    """Checkpoint, compile and shard `policy` in place. Needs the resolved precision."""
    dtype = DTYPES[config.precision]
    stays_whole = dist.world_size == 1 and whole.install(policy, dtype, dist.device)
    mp = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # One rank only casts its own weights, which is cheaper than keeping a copy of them.
    frees = dist.world_size == 1 or reduce_each_micro_batch(policy)
    for parent, name, block in transformer_blocks(policy.lm):
        if config.activation_checkpointing != "none":
            block = _checkpointed(block, config.activation_checkpointing)
            setattr(parent, name, block)
        if config.compile:
            block.compile()
        if stays_whole:
            continue
        fully_shard(block, mesh=dist.mesh, mp_policy=mp, reshard_after_forward=frees)
    if stays_whole:
        return
    fully_shard(policy, mesh=dist.mesh, mp_policy=mp)
    for module in policy.modules():
        if not isinstance(module, FSDPModule):
            continue
        on_cpu = dist.device.type == "cpu"
        if dist.world_size > 1:
            module.set_gradient_divide_factor(1.0)  # of one rank it would make copies
            # gloo knows plain sums only.
            module.set_force_sum_reduction_for_comms(True)
            if module is policy and on_cpu:
                module.set_custom_reduce_scatter(_SumAtRoot())
        elif on_cpu:
            module.set_custom_reduce_scatter(_SumOfOne(module is policy))  # type: ignore[arg-type]


class _SumOfOne:
    """The reduction of a gradient over one rank. fully_shard asks for an input and then for an output; given
    the same tensor for both, its copy of the one to the other costs nothing. Not on a GPU: there the output
    is added to the gradient on a stream of its own, while the input's memory may serve the next block."""

    def __init__(self, at_root: bool) -> None:
        self._at_root = at_root
        self._input: Optional[Tensor] = None

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        given, self._input = self._input, None
        if given is None:
            given = self._input = _gradient(self._at_root, size, dtype, device)
        return given

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        assert output_tensor is input_tensor


class _SumAtRoot(DefaultReduceScatter):
    """Of several ranks: the input, which is the larger, is asked for first."""

    _has_input = False

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        self._has_input = not self._has_input
        return _gradient(self._has_input, size, dtype, device)


def _gradient(at_root: bool, size: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for one. That of the root (embedding, head) comes when all others are there: where the head's
    exponentials have been."""
    if at_root:
        return workspace.empty([*size], dtype, device, largest=True)
    return torch.empty(*size, dtype=dtype, device=device)


def transformer_blocks(model: PreTrainedModel) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, attribute, block) of each repeated block, as the model itself names their classes."""
    names = set(model._no_split_modules or ())
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    children = [(parent, name, block) for parent in lists for name, block in parent.named_children()]
    return [c for c in children if type(c[2]).__name__ in names]


def _checkpointed(block: nn.Module, mode: str) -> nn.Module:
    # Dropout is off, so there is no random state to restore in the recomputation.
    if mode == "full":
        return checkpoint_wrapper(block, preserve_rng_state=False)

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in _SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE

    return checkpoint_wrapper(
        block, context_fn=lambda: create_selective_checkpoint_contexts(policy), preserve_rng_state=False
    )


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 matmuls run in hardware here: Ampere or newer, AMX or AVX-512 bf16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def reduce_each_micro_batch(policy: Policy) -> bool:
    """Whether weights are freed and gradients reduced after every micro batch instead of once a step. Frozen
    weights have no gradient, but stand there all the same."""
    whole = sum((4 if p.requires_grad else p.element_size()) * p.numel() for p in policy.parameters())
    return whole > WHOLE_GRADIENT_BYTES
