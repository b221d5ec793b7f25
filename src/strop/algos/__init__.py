"""The algorithms, one module of functions each: `count(batch)`, `loss(out, batch, cfg)` and `derived(means)`,
the metrics of a validation set that follow from its means; where it has rewards, also `rewards(out, batch,
cfg)`, those of each sequence, for the user's own metrics. Where `needs_reference(cfg)`, batches carry the
log-probs of the model that `reference_model(cfg)` names.
"""

from __future__ import annotations

import torch
from torch import Tensor

Metrics = dict[str, tuple[Tensor, Tensor]]
"""(sum, count) by name: what a loss measures beside itself, added over batches and ranks by the loop. With
SMALLEST or LARGEST in place of the count it is no sum but a value, of which the loop takes that one."""

SMALLEST, LARGEST = torch.tensor(-1.0), torch.tensor(1.0)
