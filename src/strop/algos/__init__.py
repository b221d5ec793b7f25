"""The algorithms, one module of functions each: `count(batch)`, `loss(out, batch, cfg)` and `derived(means)`,
the metrics that follow from means; where it has rewards, also `rewards(out, batch, cfg)`, those of each
sequence, for the user's own metrics. Where `needs_reference(cfg)`, batches carry the log-probs of the model
that `reference_model(cfg)` names. A loss that compares rewards with a baseline (strop.baseline) has either
`needs_mismatched(cfg)` and `kl(out, batch, cfg)`, a (sum, count) measured before the step, or
`running_reward(means, cfg)`, whose mean over all earlier steps it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

Metrics = dict[str, tuple[Tensor, Tensor]]
"""(sum, count) by name: what a loss measures beside itself, added over batches and ranks by the loop. With
SMALLEST or LARGEST in place of the count it is no sum but a value, of which the loop takes that one."""

SMALLEST, LARGEST = torch.tensor(-1.0), torch.tensor(1.0)
