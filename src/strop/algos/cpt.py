"""Continued pretraining: every token of a block is predicted from those before it in its document.

A row is a block of documents (strop.data.blocks). The loss is that of SFT with everything trained: the sum
over all predicted tokens of a step, divided by their number over all ranks.
"""

from __future__ import annotations

import math

from strop.algos.sft import count, loss, per_token

__all__ = ["count", "derived", "loss", "per_token"]


def derived(means: dict[str, float]) -> dict[str, float]:
    """Metrics of a validation set that follow from its means."""
    return {"perplexity": math.exp(min(means["loss"], 700.0))}
