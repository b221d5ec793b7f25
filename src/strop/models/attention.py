"""Attention over packed sequences through transformers' AttentionInterface.

On the CPU all sequences go through one native kernel (bf16); elsewhere, or without flash-attn, each goes
through SDPA by itself (`strop_packed`). On a GPU with flash-attn its variable-length kernel is used by
transformers itself: it takes the same cu_seq_lens. A sequence that has more keys than tokens (cu_seq_lens_k)
follows a shared prompt: the keys it lacks are the first ones of the sequence before it.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from strop.ops import layers

NAME = "strop_packed"


class PackingUnsupported(ValueError):
    """This model's attention cannot be run on packed sequences here: it takes the padded path."""


def packed_implementation(device: torch.device) -> str:
    """Name of the attention implementation for packed sequences on this device."""
    if device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        return "flash_attention_2"
    return NAME


def packed_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Optional[Tensor],
    scaling: Optional[float] = None,
    sliding_window: Optional[int] = None,
    cu_seq_lens_q: Optional[Tensor] = None,
    cu_seq_lens_k: Optional[Tensor] = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence: query [1, heads, T, D], key and value [1, kv heads, T, D],
    cu_seq_lens_q and cu_seq_lens_k [S+1] -> [1, T, heads, D]."""
    if cu_seq_lens_q is None or attention_mask is not None:
        raise PackingUnsupported("the model does not hand cu_seq_lens on to its attention")
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise PackingUnsupported("attention with a soft cap or sinks")
    _windows_of_attention.add(sliding_window)
    if layers.attends(query, key, value):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        cu_keys = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
        return layers.attention(query, key, value, cu_seq_lens_q, cu_keys, scale, sliding_window), None
    lengths = cu_seq_lens_q.diff().tolist()
    num_keys = lengths if cu_seq_lens_k is None else cu_seq_lens_k.diff().tolist()
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


_windows_of_masks: set[Optional[int]] = set()
_windows_of_attention: set[Optional[int]] = set()


def _no_mask(*args: Any, local_size: Optional[int] = None, **kwargs: Any) -> None:
    """Causality and the bounds of sequences are the attention function's own business."""
    _windows_of_masks.add(local_size)


def forget_windows() -> None:
    """Before the forward that `check_windows` is to judge."""
    _windows_of_masks.clear()
    _windows_of_attention.clear()


def check_windows() -> None:
    """Raise PackingUnsupported if a window stood in a mask only, which packed attention does not see:
    chunked attention, and models that leave their sliding window to the mask. A probe with short sequences
    would not notice."""
    unseen = _windows_of_masks - _windows_of_attention - {None}
    if unseen:
        raise PackingUnsupported(f"a window of {min(u for u in unseen if u)} tokens that only the mask knows")


AttentionInterface.register(NAME, packed_sdpa)
AttentionMaskInterface.register(NAME, _no_mask)
