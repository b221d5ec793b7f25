"""Reward model: a scalar score of a whole conversation, learnt from preference pairs (Bradley-Terry).

A row holds a chosen and a rejected completion of one prompt, side by side in the batch. The model gives one
score a sequence (strop.models.reward), r_c and r_d, and the chance that the chosen one is the better is taken
to be σ(r_c - r_d). A row may say in its column `margin` by how much it is better: then the scores must differ
by that much more (Touvron et al. 2023, "Llama 2", equation 2). Only differences of scores are learnt from, so
their mean may drift; the centring term holds it near zero (Eisenstein et al. 2023; TRL's name and formula).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from strop.algos import LARGEST, SMALLEST, Metrics
from strop.config import Config
from strop.data.batch import Batch
from strop.models.reward import Scores


def count(batch: Batch) -> int:
    """What the loss is divided by: pairs."""
    return len(batch.rows)


def loss(out: Scores, batch: Batch, cfg: Config) -> tuple[Tensor, Metrics]:
    """-log σ(r_c - r_d - margin) + λ (r_c + r_d)², summed over the P pairs, and metrics.

    λ is `rm.center_rewards_coefficient`; a row without a margin has margin 0.
    """
    assert batch.value_R is not None
    c, d = out.score_S[0::2], out.score_S[1::2]
    losses = -F.logsigmoid(c - d - batch.value_R.nan_to_num(nan=0.0))
    if cfg.rm.center_rewards_coefficient is not None:
        losses = losses + cfg.rm.center_rewards_coefficient * (c + d).square()
    with torch.no_grad():
        metrics = _metrics(c, d)
    return losses.sum(), metrics


def rewards(out: Scores, batch: Batch, cfg: Config) -> Tensor:
    """[2P] of each completion: its score."""
    return out.score_S


def _metrics(c: Tensor, d: Tensor) -> Metrics:
    """TRL's names; the rewards are those of both halves of the pairs, and a tie is not accurate."""
    pairs = torch.full((), float(len(c)), device=c.device)  # a fill: a copy to a GPU would wait for it
    return {
        "accuracy": ((c > d).float().sum(), pairs),
        "margin": ((c - d).sum(), pairs),
        "mean_reward": ((c + d).sum(), 2 * pairs),
        "min_reward": (torch.minimum(c, d).min(), SMALLEST),
        "max_reward": (torch.maximum(c, d).max(), LARGEST),
    }
