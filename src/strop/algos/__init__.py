"""The algorithms, one module of functions each: `count(batch)`, `loss(out, batch, cfg)` and `derived(means)`,
the metrics of a validation set that follow from its means; where it has rewards, also `rewards(out, batch,
cfg)`, those of each sequence, for the user's own metrics. Where `needs_reference(cfg)`, batches carry the
log-probs of the model that `reference_model(cfg)` names.
"""

from __future__ import annotations

from torch import Tensor

Metrics = dict[str, tuple[Tensor, Tensor]]
"""(sum, count) by name: what a loss measures beside itself, added over batches and ranks by the loop."""
