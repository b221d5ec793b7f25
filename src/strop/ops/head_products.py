"""From the gradients by the logits of chunks of words to the gradients by hidden states and weight.

Beside the fused head bf16 has kernels of its own: torch's take 10 to 15 % longer, and would round every
chunk's part of hidden's gradient to bf16. Elsewhere it is torch's matmul.

Shapes: N trained tokens, H hidden size, d_words [words, N] of one chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strop.ops import workspace
from strop.ops.native import PANEL, TILE, call


class Products:
    """Gradients by hidden and weight, whichever are wanted, summed up from d_words of chunks.

    fused: the fused head made d_words; most_words: the most that a chunk has.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, by_hidden: bool, by_weight: bool, fused: bool, most_words: int
    ) -> None:
        self.hidden, self.weight = hidden, weight
        num_tokens, size = hidden.shape
        padded, columns = -num_tokens // TILE * -TILE, -size // PANEL * -PANEL
        self.own = fused and hidden.dtype == torch.bfloat16
        shape = (columns, padded) if self.own else (num_tokens, size)
        self.sum = hidden.new_zeros(shape, dtype=torch.float32) if by_hidden else None
        self.by_weight = None
        if by_weight:
            self.by_weight = workspace.empty(list(weight.shape), weight.dtype, weight.device)
        if self.own and by_hidden:
            self.scratch = hidden.new_empty((columns + padded) * (most_words + 1))
        if self.own and self.by_weight is not None:
            # A fault for each 4 KiB of fresh memory would cost a tenth of the product that fills it.
            call("strop_huge_pages", hidden, self.by_weight, self.by_weight.nbytes)
            self.turned = hidden.new_empty(padded * (-size // TILE * -TILE))
            call("strop_head_turn", hidden, hidden, num_tokens, size, hidden.stride(0), self.turned)

    def add(self, d_words: Tensor, start: int) -> None:
        """d_words [words, N], whose rows are padded to the tile where the fused head made them."""
        num_words, (num_tokens, size) = len(d_words), self.hidden.shape
        weight = self.weight[start : start + num_words]
        block = None if self.by_weight is None else self.by_weight[start : start + num_words]
        if self.own:
            if self.sum is not None:
                call(
                    "strop_head_d_hidden", d_words, d_words, weight, num_tokens, size, weight.stride(0),
                    num_words, self.scratch, self.sum,
                )  # fmt: skip
            if block is not None:
                call("strop_head_d_weight", d_words, d_words, self.turned, num_tokens, size, num_words, block)
            return
        if self.sum is not None:
            self.sum += torch.mm(d_words.t(), weight)
        if block is not None:
            torch.mm(d_words, self.hidden, out=block)

    def shrink(self, factor: Tensor) -> None:
        """What is summed so far of hidden's gradient, times factor [N]."""
        assert self.sum is not None
        view = self.sum[:, : len(factor)] if self.own else self.sum.t()
        view *= factor

    def by_hidden(self) -> Tensor:
        """fp32 [N, H]."""
        assert self.sum is not None
        num_tokens, size = self.hidden.shape
        return self.sum[:size, :num_tokens].t() if self.own else self.sum
