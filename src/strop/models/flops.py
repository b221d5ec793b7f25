"""How many tokens a second a device could train on if it did nothing but this model's matmuls.

A token costs 6 operations for each weight that it is multiplied with (forward 2, backward 4; a frozen one
has no gradient: 4 in all) and, in each layer, 6 for each of the heads' dimensions and each key that it sees:
half of its sequence, on average.
(Chowdhery et al. 2022, appendix B, with causal attention.) What is computed twice, as with activation
checkpointing, or never, as a shared prompt, does not count: model FLOPs utilisation compares runs.
"""

from __future__ import annotations

from typing import Any, Optional

import numpy as np
from transformers import PreTrainedModel

from strop.data.sets import RowSet
from strop.data.store import TokenStore

PEAK_TFLOPS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H200 NVL", 835.0),
    ("A100", 312.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("B200", 2250.0),
)
"""Dense bf16 peaks as NVIDIA's data sheets give them, by a part of the device's name; the first that fits."""


def per_token(lm: PreTrainedModel, store: RowSet) -> float:
    """Operations of training on one token of `store`, averaged over its tokens. (A reward model's head, one
    number for each of the hidden state's, is counted for every token although it meets the last one only.)"""
    config = lm.config.get_text_config()
    head: Any = lm.get_output_embeddings()
    embedding: Any = lm.get_input_embeddings()
    looked_up = head is None or head.weight is not embedding.weight  # not multiplied
    multiplied = [p for p in lm.parameters() if not (looked_up and p is embedding.weight)]
    weights = sum((6.0 if p.requires_grad else 4.0) * p.numel() for p in multiplied)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    # Documents within a block are not looked up: their attention is then counted as that of the whole block.
    lengths = np.diff(store.offsets) if isinstance(store, TokenStore) else store.row_lengths
    lengths = lengths.astype(np.float64)
    mean_length = float((lengths**2).sum() / lengths.sum())
    return weights + 6.0 * config.num_hidden_layers * width * mean_length


def peak_tokens_per_s(lm: PreTrainedModel, store: RowSet, device_name: Optional[str]) -> Optional[float]:
    """Tokens a second at the device's peak; None for a device or a model whose figures are not known."""
    peak = next((peak for name, peak in PEAK_TFLOPS if name in (device_name or "")), None)
    if peak is None or not hasattr(lm.config.get_text_config(), "num_attention_heads"):
        return None
    return peak * 1e12 / per_token(lm, store)
