"""Attention over packed sequences through transformers' AttentionInterface, by the first of these that a
model agrees with (`implementations`):

`strop_varlen`, on a GPU: one kernel for all sequences, which torch has built in.
`flash_attention_2`, on a GPU with flash-attn, for models whose attention has a soft cap: by transformers
itself, which takes the same cu_seq_lens.
`strop_packed`: on the CPU one native kernel (bf16), elsewhere each sequence by itself through SDPA.

A sequence that has more keys than tokens (cu_seq_lens_k) follows a shared prompt: the keys it lacks are the
first ones of the sequence before it. Only `strop_packed` knows that.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import is_flash_attn_2_available

from strop.ops import layers, varlen

NAME = "strop_packed"
VARLEN = "strop_varlen"
FLASH = "flash_attention_2"


class PackingUnsupported(ValueError):
    """This model's attention cannot be run on packed sequences here: it takes the padded path."""


def implementations(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Names of what packed sequences may be given to on this device, the one to be tried first in front."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return [NAME]
    return [VARLEN, *([FLASH] if is_flash_attn_2_available() else []), NAME]


def settings(name: str) -> dict[str, Any]:
    """What the model's forward is given for an implementation. flash-attn's backward adds up in another order
    in each run, unless told: a run that was stopped would not give the same bits."""
    return {"deterministic": True} if name == FLASH else {}


def packed_varlen(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Optional[Tensor],
    scaling: Optional[float] = None,
    sliding_window: Optional[int] = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence, shapes as in `packed_sdpa`."""
    cu_seqlens, cu_keys = _offsets(attention_mask, sliding_window, kwargs)
    longest = kwargs.get("max_length_q")
    if longest is None or cu_keys is not cu_seqlens:
        raise PackingUnsupported("the model does not hand max_length on, or prompts are shared")
    if not varlen.attends(query, key, value):
        raise PackingUnsupported(f"no kernel for heads of {query.shape[-1]} and {value.shape[-1]}")
    return varlen.attention(query, key, value, cu_seqlens, longest, scaling, sliding_window), None


def _offsets(mask: Optional[Tensor], window: Optional[int], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """cu_seqlens of queries and of keys. Raises PackingUnsupported for what our functions do not know."""
    cu_seqlens, cu_keys = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if cu_seqlens is None or mask is not None:
        raise PackingUnsupported("the model does not hand cu_seq_lens on to its attention")
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise PackingUnsupported("attention with a soft cap or sinks")
    if _watching:
        _windows_of_attention.add(window)
    return cu_seqlens, cu_seqlens if cu_keys is None else cu_keys


def packed_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Optional[Tensor],
    scaling: Optional[float] = None,
    sliding_window: Optional[int] = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence: query [1, heads, T, D], key and value [1, kv heads, T, D],
    cu_seq_lens_q and cu_seq_lens_k [S+1] -> [1, T, heads, D]."""
    cu_queries, cu_keys = _offsets(attention_mask, sliding_window, kwargs)
    if layers.attends(query, key, value):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return layers.attention(query, key, value, cu_queries, cu_keys, scale, sliding_window), None
    lengths, num_keys = _lengths(cu_queries), _lengths(cu_keys)
    # One split for all sequences: the backward of S slices would fill S gradients of the whole batch.
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    pieces = []
    for i, (q, k, v) in enumerate(zip(queries, keys, values)):
        if num_shared := num_keys[i] - lengths[i]:
            k = torch.cat((keys[i - 1][:, :, :num_shared], k), dim=2)
            v = torch.cat((values[i - 1][:, :, :num_shared], v), dim=2)
        mask = _mask(lengths[i], num_keys[i], sliding_window, query.device)
        pieces.append(
            F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            ).transpose(1, 2)
        )
    return torch.cat(pieces, dim=1), None


def _mask(length: int, num_keys: int, window: Optional[int], device: torch.device) -> Optional[Tensor]:
    """bool [L, K] of a causal sliding window over the last L of K positions; None where plain causality
    says the same."""
    if length == num_keys and (window is None or length <= window):
        return None
    at_key = torch.arange(num_keys, device=device)
    distance = at_key[num_keys - length :, None] - at_key[None, :]
    return (distance >= 0) & (distance < (window or num_keys))


_last_lengths: list[tuple[weakref.ref[Tensor], list[int]]] = []


def _lengths(cu_seqlens: Tensor) -> list[int]:
    """Of each sequence. On a GPU, which must be waited for, those of the last two tensors are known still:
    all layers ask for the same."""
    if cu_seqlens.device.type != "cuda":
        return cu_seqlens.diff().tolist()
    for known, lengths in _last_lengths:
        if known() is cu_seqlens:
            return lengths
    lengths = cu_seqlens.diff().tolist()
    _last_lengths[:] = [(weakref.ref(cu_seqlens), lengths), *_last_lengths[:1]]
    return lengths


_watching = False
_windows_of_masks: set[Optional[int]] = set()
_windows_of_attention: set[Optional[int]] = set()


def _no_mask(*args: Any, local_size: Optional[int] = None, **kwargs: Any) -> None:
    """Causality and the bounds of sequences are the attention function's own business."""
    _windows_of_masks.add(local_size)


@contextlib.contextmanager
def watch_windows() -> Iterator[None]:
    """Around the forward that `check_windows` is to judge.

    Only here transformers asks us for masks. For an attention without a function of that name it makes none,
    and does not look for packed sequences in the positions either, for which it would wait for the GPU."""
    global _watching
    _windows_of_masks.clear()
    _windows_of_attention.clear()
    masks = AttentionMaskInterface._global_mapping
    masks.update({NAME: _no_mask, VARLEN: _no_mask})
    _watching = True
    try:
        yield
    finally:
        _watching = False
        del masks[NAME], masks[VARLEN]


def check_windows(name: str) -> None:
    """Raise PackingUnsupported if a window stood in a mask only, which packed attention does not see:
    chunked attention, and models that leave their sliding window to the mask. A probe with short sequences
    would not notice. (transformers' own flash attention has masks of its own.)"""
    unseen = _windows_of_masks - _windows_of_attention - {None}
    if name != FLASH and unseen:
        raise PackingUnsupported(f"a window of {min(u for u in unseen if u)} tokens that only the mask knows")


AttentionInterface.register(NAME, packed_sdpa)
AttentionInterface.register(VARLEN, packed_varlen)
