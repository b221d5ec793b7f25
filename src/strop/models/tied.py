"""A weight that is both embedding and head: its gradient by both, in the memory of one.

Autograd makes a gradient [V, H] for each of the two and adds them, though the embedding's has only the rows
of the tokens looked up. Here the lookup gives just those (torch's sparse gradient), and they are added to the
head's in place. A row's tokens are summed in fp32 in their order and rounded once, on top of what the head
gave: half the error of torch's sum in bf16.

Shapes: V vocabulary, H hidden size, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from strop.models.lora import LoraLinear


@contextlib.contextmanager
def apart(lm: PreTrainedModel) -> Iterator[Optional[Tensor]]:
    """Gives what stands for the head's weight, while the embedding looks up in a twin of it; None where the
    two are not one trained matrix on the CPU, and autograd's way stays."""
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if not torch.is_grad_enabled() or not _is_tied(embedding, head):
        yield None
        return
    looked_up, multiplied = _Twins.apply(embedding.weight)
    vars(embedding).update(weight=looked_up, sparse=True)  # found before the parameter
    try:
        yield multiplied
    finally:
        del vars(embedding)["weight"]
        embedding.sparse = False  # type: ignore[assignment]


def _is_tied(embedding: nn.Module, head: Optional[nn.Module]) -> bool:
    weight = getattr(head, "weight", None)
    return (
        isinstance(embedding, nn.Embedding)
        and not isinstance(head, LoraLinear)
        and embedding.weight is weight
        and type(weight) is nn.Parameter  # no DTensor
        and weight.requires_grad
        and weight.device.type == "cpu"
        and embedding.max_norm is None
        and not embedding.scale_grad_by_freq
        and not embedding.sparse
    )


class _Twins(torch.autograd.Function):
    """weight [V, H] -> the same twice: for the lookup and for the head."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Optional[Tensor]) -> Optional[Tensor]:
        of_lookup, of_head = grads
        if of_lookup is None:
            return of_head
        if of_head is None:
            return of_lookup.to_dense()
        if not of_lookup.is_sparse:  # the model has used the embedding's weight in another way too
            return of_head.add_(of_lookup)
        tokens_T, grad_TH = of_lookup._indices()[0], of_lookup._values()
        rows, which_T = tokens_T.unique(return_inverse=True)
        wide = torch.promote_types(of_head.dtype, torch.float32)
        total = of_head[rows].to(wide).index_add_(0, which_T, grad_TH.to(wide))
        return of_head.index_copy_(0, rows, total.to(of_head.dtype))
