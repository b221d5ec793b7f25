"""The algorithms, one module of functions each: `count(batch)`, `loss(out, batch, cfg)`."""

from __future__ import annotations

from torch import Tensor

Metrics = dict[str, tuple[Tensor, Tensor]]
"""(sum, count) by name: what a loss measures beside itself, added over batches and ranks by the loop."""
