"""From the gradients by the logits of chunks of words to the gradients by hidden states and weight.

Beside the fused head bf16 has kernels of its own: torch's take 10 to 15 % longer, and would round every
chunk's part of hidden's gradient to bf16. Elsewhere it is torch's matmul.

Shapes: N trained tokens, H hidden size, d_words [words, N] of one chunk.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from strop.ops.native import DTYPES, PANEL, TILE, call


class Products:
    """Gradients by hidden and weight, whichever are wanted, summed up from d_words of chunks.

    by_weight: where the weight's is written, of the same shape and dtype, or None; fused: the fused head made
    d_words; most_words: the most that a chunk has. A weight in fp32 beside 16-bit hidden states counts as
    rounded to their type.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        by_hidden: bool,
        by_weight: Optional[Tensor],
        fused: bool,
        most_words: int,
    ) -> None:
        self.hidden, self.weight, self.by_weight = hidden, weight, by_weight
        num_tokens, size = hidden.shape
        padded, columns = -num_tokens // TILE * -TILE, -size // PANEL * -PANEL
        self.own = fused and hidden.dtype == torch.bfloat16
        shape = (columns, padded) if self.own else (num_tokens, size)
        self.sum = hidden.new_zeros(shape, dtype=torch.float32) if by_hidden else None
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
            code = DTYPES["cpu"][weight.dtype]
            if self.sum is not None:
                call(
                    "strop_head_d_hidden", d_words, d_words, weight, code, num_tokens, size, weight.stride(0),
                    num_words, self.scratch, self.sum,
                )  # fmt: skip
            if block is not None:
                call(
                    "strop_head_d_weight", d_words, d_words, self.turned, num_tokens, size, num_words, code,
                    block,
                )  # fmt: skip
            return
        if self.sum is not None:
            self.sum += torch.mm(d_words.t(), weight.to(self.hidden.dtype))
        if block is not None and block.dtype == self.hidden.dtype:
            torch.mm(d_words, self.hidden, out=block)
        elif block is not None:
            block.copy_(torch.mm(d_words, self.hidden))

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
