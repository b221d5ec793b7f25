"""The language model's head on the native kernels: hidden states to log-probs of targets, and back.

Two engines. *fused* (CPUs with AVX-512, or AMX beside it): matmul and softmax in one kernel, logits in fp32
and only a tile at a time.
*chunked* (other CPUs, GPUs): torch's matmul of one chunk of the vocabulary, one read of it by a row kernel.
The floors of 2, 6, 8 and 4NHV operations (log-probs only, one pass, recompute, frozen head) are the same.

What a forward keeps for its backward: nothing (recompute), the exponentials or logits of all words (one
pass: memory for time) or, in the fused engine, of the first ones, as many as its limit allows, or with a
frozen weight u = (e_y - p) W, all that hidden's gradient needs.

A weight in fp32 beside hidden states in 16 bit is rounded to their type as it is read, a panel or a chunk at
a time: it stays as it is, and nowhere is there a copy of it. Its gradient is fp32, and where the forward kept
exponentials the fused engine writes it over them (`workspace.over`): the two together take the memory of
the larger. A chunk's are read before its part of the gradient is written, the chunks go up the vocabulary,
and the exponentials end where the memory ends: what the words before `end` give always ends before what the
others have kept begins.

Shapes: N trained tokens, n = N padded to the tile of a packed tensor, H hidden size, V vocabulary.
"""

from __future__ import annotations

import ctypes
from typing import Optional

import torch
from torch import Tensor

from strop.ops import native, workspace
from strop.ops.head_products import Products
from strop.ops.native import DTYPES, PANEL, SEGMENT, TILE, call, is_rounded
from strop.ops.reference import Scalings, Walked

NOTHING, ALL, FROZEN = 0, 1, 2
"""What the forward keeps."""
KEPT_BYTES = 512 * 2**20
"""The most that `ALL` may keep on the CPU; more is recomputed, or taken in parts (`linear_loss`)."""
KEPT_IN_ANY_CASE = 64 * 2**20
"""What the fused engine may keep beside the smallest weight."""
TIMES_ON_CUDA = 4
"""Times as much on a GPU: 8,192 tokens of 131,072 words."""
CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 64 * 2**20}
"""Logits, or their gradients, of one chunk. On a GPU several tensors of about that size are alive at a time,
and most of one stays in its cache; a chunk's matmuls still fill all of its processors."""
CUDA_WORDS = 256
"""Of which a chunk's are a multiple on a GPU: from rows of odd lengths matmuls take longer to read."""
CPU_WORDS = SEGMENT // 2
"""The most words in a chunk on the CPU: it then stays in the caches between kernel and matmul."""


def engine(hidden: Tensor, weight: Tensor) -> str:
    """fused, chunked or reference, by device, dtype and layout alone: forward and backward agree."""
    if not native.takes(hidden, "linear_logprob"):
        return "reference"
    if weight.stride(1) != 1 and weight.shape[1] != 1:
        native.refuse("linear_logprob", "the weight's rows are not contiguous")
        return "reference"
    even = hidden.shape[1] % 2 == 0 or hidden.dtype == torch.float32
    return "fused" if hidden.device.type == "cpu" and even and native.head_kernel(hidden.dtype) else "chunked"


def most_kept(hidden: Tensor, weight: Tensor) -> int:
    """Bytes that `ALL` may keep. In the fused engine, which need not keep all words, no more than twice the
    weight's in hidden's type: in bf16 that is its gradient in fp32, which the end of the backward needs in
    any case, and then finds in the same memory (`workspace`). All words fit of up to 2H tokens."""
    if hidden.device.type == "cuda":
        return KEPT_BYTES * TIMES_ON_CUDA
    if engine(hidden, weight) != "fused":
        return KEPT_BYTES
    return most_kept_fused(weight.numel() * hidden.element_size())


def most_kept_fused(weight_bytes: int) -> int:
    return min(KEPT_BYTES, max(2 * weight_bytes, KEPT_IN_ANY_CASE))


def words_kept(hidden: Tensor, weight: Tensor, softcap: Optional[float]) -> int:
    """Of how many of the first words `ALL` keeps exponentials or logits: all, where memory allows it. Else
    none, or in the fused engine those of some segments of the walk, which adds up the same sums in the same
    order however many they are. None where exponentials do not tell the derivative."""
    which, vocab = engine(hidden, weight), len(weight)
    if which == "reference" or (which == "fused" and softcap is not None):
        return 0
    fit = most_kept(hidden, weight) // max(1, hidden.shape[0] * hidden.element_size())
    if fit >= vocab:
        return vocab
    return max(0, fit) // SEGMENT * SEGMENT if which == "fused" else 0


def what_fits(keep: int, hidden: Tensor, weight: Tensor, softcap: Optional[float]) -> int:
    """`NOTHING` in place of an `ALL` that keeps no words."""
    return NOTHING if keep == ALL and words_kept(hidden, weight, softcap) == 0 else keep


def kept_shape(hidden: Tensor, weight: Tensor, keep: int) -> tuple[list[int], list[int]]:
    """Shapes of the two tensors that a forward keeps; [0] for none."""
    num_tokens, vocab = hidden.shape[0], weight.shape[0]
    which = engine(hidden, weight)
    if keep == FROZEN:
        return [num_tokens, hidden.shape[1]], [0]
    if keep == NOTHING or which == "reference":
        return [0], [0]
    if which == "chunked":
        return [num_tokens, vocab], [0]
    padded = (num_tokens + TILE - 1) // TILE * TILE
    words = words_kept(hidden, weight, None)
    return [words, padded], [(words + PANEL - 1) // PANEL, padded]


def chunk_words(hidden: Tensor, vocab: int) -> int:
    """Words of a chunk, a multiple of a panel, or on a GPU of `CUDA_WORDS`."""
    device = hidden.device.type
    element = 4 if _is_wide(hidden) else hidden.element_size()
    fit = CHUNK_BYTES[device] // (max(len(hidden), 1) * element)
    unit = CUDA_WORDS
    if device == "cpu":
        unit, fit = PANEL, min(fit, CPU_WORDS)
    return max(unit, min(fit, vocab + unit) // unit * unit)


def chunks(hidden: Tensor, vocab: int, first: int = 0) -> list[tuple[int, int]]:
    """Of the words from `first` on."""
    width = chunk_words(hidden, vocab)
    return [(start, min(start + width, vocab)) for start in range(first, vocab, width)]


class _Rows:
    """The tensors that stand behind a walk and a head, alive while the kernels use their addresses."""

    def __init__(self, hidden: Tensor, scalings: Scalings) -> None:
        num_tokens = len(hidden)
        self.top = hidden.new_full((num_tokens,), -torch.inf, dtype=torch.float32)
        self.total, self.weighted, self.plain, self.at_target = (
            hidden.new_zeros(num_tokens, dtype=torch.float32) for _ in range(4)
        )
        parts = (self.top, self.total, self.weighted, self.plain, self.at_target)
        self.walk = native.Walk(*(p.data_ptr() for p in parts))
        self.bias = None if scalings.bias is None else scalings.bias.detach().float().contiguous()
        self.softcap, self.scale = scalings.softcap or 0.0, 1.0 / scalings.temperature

    def head(self, start: int = 0) -> native.Head:
        """The head of the words from `start`."""
        bias = None if self.bias is None else self.bias.data_ptr() + 4 * start
        return native.Head(bias, self.softcap, self.scale)

    def result(self, vocab: int) -> Walked:
        lse = self.top + torch.log(self.total)
        logprob = (self.at_target - lse).clamp(max=0.0)
        correct = (self.at_target >= self.top).float()
        return Walked(logprob, lse, lse - self.weighted / self.total, correct, self.plain / vocab)


def _code(x: Tensor) -> int:
    return DTYPES[x.device.type][x.dtype]


def forward(
    hidden: Tensor, weight: Tensor, target: Tensor, scalings: Scalings, keep: int
) -> tuple[Walked, Tensor, Tensor]:
    """Log-probs with statistics, and what is kept. Raises ValueError for a target outside the vocabulary."""
    hidden, rows = hidden.contiguous(), _Rows(hidden, scalings)
    shape, tops_shape = kept_shape(hidden, weight, keep)
    fused = engine(hidden, weight) == "fused"
    if keep == ALL and fused and is_rounded(hidden, weight):
        kept = workspace.at_end(shape, hidden.dtype, hidden.device, room=weight.nbytes)
    else:
        kept = workspace.empty(shape, hidden.dtype, hidden.device, largest=True)
    tops = workspace.empty(tops_shape, hidden.dtype, hidden.device)
    if keep == FROZEN and not (fused and scalings.softcap):
        kept.copy_((_frozen_fused if fused else _frozen_chunked)(hidden, weight, target, rows))
    elif fused:
        _walk_fused(hidden, weight, target, rows, kept if keep == ALL else None, tops)
    else:
        _walk_chunked(hidden, weight, target, rows, kept if keep == ALL else None)
    walked = rows.result(len(weight))
    if keep == FROZEN and fused and scalings.softcap:
        ones = torch.ones_like(walked.lse)
        d_hidden, _, _ = backward(
            ones, hidden, weight, target, scalings, walked.lse, None, None, (True, False, False)
        )
        assert d_hidden is not None
        kept = d_hidden
    return walked, kept, tops


def _pack(hidden: Tensor) -> Tensor:
    num_tokens, size = hidden.shape
    packed = hidden.new_empty((num_tokens + TILE - 1) // TILE * TILE * size)
    call("strop_head_pack", hidden, hidden, _code(hidden), num_tokens, size, hidden.stride(0), packed)
    return packed


def _scratch(hidden: Tensor, num_words: int) -> Tensor:
    padded = (len(hidden) + TILE - 1) // TILE * TILE
    return hidden.new_empty(4 * padded * ((num_words + SEGMENT - 1) // SEGMENT), dtype=torch.float32)


def _walk_fused(
    hidden: Tensor, weight: Tensor, target: Tensor, rows: _Rows, exps: Optional[Tensor], tops: Tensor
) -> None:
    """Keeps the exponentials of as many words as `exps` has rows."""
    vocab, kept = len(weight), 0 if exps is None else len(exps)
    packed, scratch, head = _pack(hidden), _scratch(hidden, max(kept, vocab - kept)), rows.head()
    for start, end in ((0, kept), (kept, vocab)):
        if start == end:
            continue
        call(
            "strop_head_walk", hidden, packed, weight, _code(hidden), _code(weight), *hidden.shape,
            weight.stride(0), start, end - start, vocab, target, ctypes.byref(head), ctypes.byref(rows.walk),
            exps if end == kept else None, tops if end == kept else None, scratch,
        )  # fmt: skip


def _frozen_fused(hidden: Tensor, weight: Tensor, target: Tensor, rows: _Rows) -> Tensor:
    """u = (W[y] - Σ p W) / temperature in the one walk: the sum is kept relative to the top so far."""
    vocab, (num_tokens, size) = len(weight), hidden.shape
    packed, head, width = _pack(hidden), rows.head(), chunk_words(hidden, vocab)
    padded = packed.numel() // size
    exps, out = hidden.new_empty(2, width, padded)
    tops = hidden.new_empty(width // PANEL, padded)
    scratch, minus = _scratch(hidden, width), hidden.new_full((num_tokens,), -1.0, dtype=torch.float32)
    mean = Products(hidden, weight, True, None, True, width)
    for start, end in chunks(hidden, vocab):
        before, num_words = rows.top.clone(), end - start
        call(
            "strop_head_walk", hidden, packed, weight, _code(hidden), _code(weight), num_tokens, size,
            weight.stride(0), start, num_words, vocab, target, ctypes.byref(head), ctypes.byref(rows.walk),
            exps, tops, scratch,
        )  # fmt: skip
        call(
            "strop_head_grad_kept", hidden, exps, tops, _code(hidden), num_tokens, start, num_words, vocab,
            None, rows.scale, rows.top, minus, out,
        )  # fmt: skip
        mean.shrink(torch.exp(before - rows.top))
        mean.add(out[:num_words, :num_tokens], start)
    return _rows_of(weight, target, hidden.dtype).mul_(rows.scale) - mean.by_hidden() / rows.total[:, None]


def _exact(hidden: Tensor, weight: Tensor, target: Tensor) -> Optional[Tensor]:
    """The target's matmul output in fp32, which stands for the rounded one of a 16-bit matmul everywhere."""
    if hidden.dtype == torch.float32:
        return None
    return torch.linalg.vecdot(hidden.float(), _rows_of(weight, target, hidden.dtype))


def _rows_of(weight: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 [N, H], of values in dtype. A target outside the vocabulary, which a GPU reports as NaN later,
    must not fault here."""
    return weight[target.clamp(0, len(weight) - 1)].to(dtype).float()


def _is_wide(hidden: Tensor) -> bool:
    """Whether torch gives the sums of a 16-bit matmul unrounded. On the CPU it does not."""
    return hidden.device.type == "cuda" and hidden.dtype != torch.float32


def _multiply(hidden: Tensor, words: Tensor) -> Tensor:
    """Logits [N, words] of a chunk, fp32 where they can be: rounded to bf16 they cost 5e-3 nats a token."""
    words = words.to(hidden.dtype)
    if _is_wide(hidden):
        return torch.mm(hidden, words.t(), out_dtype=torch.float32)
    return torch.mm(hidden, words.t())


def _walk_chunked(
    hidden: Tensor, weight: Tensor, target: Tensor, rows: _Rows, logits: Optional[Tensor]
) -> None:
    """`logits` keeps them in hidden's type: wide ones are rounded for the gradient alone."""
    vocab, num_tokens = len(weight), len(hidden)
    if _is_wide(hidden):
        for start, end in chunks(hidden, vocab):
            x = _multiply(hidden, weight[start:end])
            _walk_logits(x, target, start, vocab, None, rows)
            if logits is not None:
                logits[:, start:end] = x
            del x  # before there is the next one
        return
    exact = _exact(hidden, weight, target)
    at_once = logits is not None and not is_rounded(hidden, weight)
    parts = [(0, vocab)] if at_once else chunks(hidden, vocab)
    buffer = hidden.new_empty(num_tokens * parts[0][1] if logits is None else 0)
    for start, end in parts:
        if logits is None:
            x = buffer[: num_tokens * (end - start)].view(num_tokens, end - start)
        else:
            x = logits[:, start:end]
        torch.mm(hidden, weight[start:end].to(hidden.dtype).t(), out=x)
        _walk_logits(x, target, start, vocab, exact, rows)


def _walk_logits(
    x: Tensor, target: Tensor, start: int, vocab: int, exact: Optional[Tensor], rows: _Rows
) -> None:
    head = rows.head(start)
    call(
        "strop_walk_chunk", x, x, _code(x), *x.shape, x.stride(0), start, vocab, target, exact,
        ctypes.byref(head), ctypes.byref(rows.walk),
    )  # fmt: skip


def _grad_logits(
    x: Tensor, out: Tensor, target: Tensor, start: int, vocab: int, exact: Optional[Tensor], rows: _Rows,
    lse: Tensor, grad: Tensor, d_bias: Optional[Tensor] = None,
) -> None:  # fmt: skip
    head = rows.head(start)
    call(
        "strop_grad_chunk", x, x, out, _code(x), _code(out), *x.shape, x.stride(0), out.stride(0), start,
        vocab, target, exact, ctypes.byref(head), lse, grad, d_bias,
    )  # fmt: skip


def _gradients_memory(x: Tensor, dtype: torch.dtype, in_place: bool = True) -> Tensor:
    """Where the gradient by x, in dtype, may be written."""
    if in_place and x.dtype == dtype:
        return x
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _frozen_chunked(hidden: Tensor, weight: Tensor, target: Tensor, rows: _Rows) -> Tensor:
    """As `_frozen_fused`; a target that no chunk holds makes the kernel give the probabilities alone."""
    vocab, exact = len(weight), None if _is_wide(hidden) else _exact(hidden, weight, target)
    minus, nowhere = torch.full_like(rows.top, -1.0), torch.full_like(target, vocab)
    mean = torch.zeros_like(hidden, dtype=torch.float32)
    for start, end in chunks(hidden, vocab):
        x = _multiply(hidden, weight[start:end])
        before = rows.top.clone()
        _walk_logits(x, target, start, vocab, exact, rows)
        p = _gradients_memory(x, hidden.dtype)
        _grad_logits(x, p, nowhere, start, vocab + 1, None, rows, rows.top, minus)
        del x  # before there is the next one
        part = torch.mm(p, weight[start:end].to(hidden.dtype))
        del p
        mean.mul_(torch.exp(before - rows.top)[:, None]).add_(part)
    slope = torch.full_like(rows.top, rows.scale)
    if rows.softcap:
        slope *= 1 - (rows.at_target / (rows.softcap * rows.scale)) ** 2
    return _rows_of(weight, target, hidden.dtype).mul_(slope[:, None]).sub_(mean.div_(rows.total[:, None]))


def backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    scalings: Scalings,
    lse: Tensor,
    kept: Optional[Tensor],
    tops: Optional[Tensor],
    needs: tuple[bool, bool, bool],
    over_kept: bool = False,
) -> tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """Gradients by hidden, weight and bias, those that are needed; kept and tops as `ALL` gave them, or None.
    What was not kept is computed again. over_kept: the gradient by a weight that is rounded may take the
    memory of kept, which is gone then: another backward knows it, and computes all again.

    Every block of the weight's gradient is written once, in its final type.
    """
    hidden, grad, vocab = hidden.contiguous(), grad.contiguous(), len(weight)
    rows, fused = _Rows(hidden, scalings), engine(hidden, weight) == "fused"
    kept = None if kept is None or workspace.is_gone(kept) else kept
    d_weight = None
    if needs[1] and over_kept and kept is not None and is_rounded(hidden, weight):
        d_weight = workspace.over(kept, list(weight.shape), weight.dtype)
    if needs[1] and d_weight is None:
        d_weight = workspace.empty(list(weight.shape), weight.dtype, weight.device)
    products = Products(hidden, weight, needs[0], d_weight, fused, chunk_words(hidden, vocab))
    d_bias = hidden.new_zeros(vocab, dtype=torch.float32) if needs[2] else None
    gradients = _Fused(hidden, weight, target, rows) if fused else _Chunked(hidden, weight, target, rows)
    kept_words = 0 if kept is None else len(kept) if fused else vocab
    for start, end in chunks(hidden, kept_words) + chunks(hidden, vocab, kept_words):
        block = None if d_bias is None else d_bias[start:end]
        of_chunk = kept if end <= kept_words else None
        d_words = gradients.of(start, end, lse, grad, of_chunk, tops, block)  # [words, N]
        products.add(d_words, start)
        del d_words  # before there is the next one
    bias = scalings.bias
    return (
        products.by_hidden().to(hidden.dtype, memory_format=torch.contiguous_format) if needs[0] else None,
        d_weight,
        None if d_bias is None or bias is None else d_bias.to(bias.dtype),
    )


class _Fused:
    """Gradients by the logits of a chunk, [words, N], as the fused kernels give them."""

    def __init__(self, hidden: Tensor, weight: Tensor, target: Tensor, rows: _Rows) -> None:
        self.hidden, self.weight, self.target, self.rows = hidden, weight, target, rows
        self.packed = _pack(hidden)
        padded = self.packed.numel() // hidden.shape[1]
        self.out = hidden.new_empty(chunk_words(hidden, len(weight)), padded)

    def of(self, start, end, lse, grad, kept, tops, d_bias):
        hidden, weight, head = self.hidden, self.weight, self.rows.head()
        if kept is not None:
            call(
                "strop_head_grad_kept", hidden, kept[start:end], tops[start // PANEL :], _code(hidden),
                len(hidden), start, end - start, len(weight), self.target, self.rows.scale, lse,
                grad, self.out,
            )  # fmt: skip
        else:
            call(
                "strop_head_grad", hidden, self.packed, weight, _code(hidden), _code(weight), *hidden.shape,
                weight.stride(0), start, end - start, len(weight), self.target,
                ctypes.byref(head), lse, grad, self.out,
            )  # fmt: skip
        d_words = self.out[: end - start, : len(hidden)]
        if d_bias is not None:
            torch.sum(d_words, dim=1, dtype=torch.float32, out=d_bias)
        return d_words


class _Chunked:
    """The same from logits that are kept, or computed again."""

    def __init__(self, hidden: Tensor, weight: Tensor, target: Tensor, rows: _Rows) -> None:
        self.hidden, self.weight, self.target, self.rows = hidden, weight, target, rows
        self.exact: Optional[Tensor] = None

    def of(self, start, end, lse, grad, kept, tops, d_bias):
        x = _multiply(self.hidden, self.weight[start:end]) if kept is None else kept[:, start:end]
        out = _gradients_memory(x, self.hidden.dtype, in_place=kept is None)
        if self.exact is None and x.dtype == self.hidden.dtype:
            self.exact = _exact(self.hidden, self.weight, self.target)
        _grad_logits(x, out, self.target, start, len(self.weight), self.exact, self.rows, lse, grad, d_bias)
        return out.t()


def logprob_forward(logits: Tensor, target: Tensor) -> Walked:
    """Log-probs and statistics of logits [N, V] that exist: one read."""
    rows = _Rows(logits, Scalings())
    _walk_logits(logits, target, 0, logits.shape[1], None, rows)
    return rows.result(logits.shape[1])


def logprob_backward(grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor) -> Tensor:
    """One read, one write."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _grad_logits(logits, out, target, 0, logits.shape[1], None, _Rows(logits, Scalings()), lse, grad)
    return out
