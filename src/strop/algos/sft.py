"""Supervised fine-tuning: cross-entropy on the completion's tokens, all tokens of a step weighted alike."""

from __future__ import annotations

import torch
from torch import Tensor

from strop.algos import Metrics
from strop.config import Config
from strop.data.batch import Batch
from strop.models.policy import Output

per_token = True
"""The loss is a sum over tokens."""


def count(batch: Batch) -> int:
    """What the loss is divided by: trained tokens."""
    return int(batch.trained_T.sum())


def loss(out: Output, batch: Batch, cfg: Config) -> tuple[Tensor, Metrics]:
    """-Σ log p(token) over the trained tokens, and (sum, count) metrics."""
    tokens = batch.trained_T.float().sum()
    metrics = {
        "entropy": (out.entropy_T.sum(), tokens),
        "mean_token_accuracy": (out.correct_T.sum(), tokens),
    }
    return -torch.sum(out.logp_T), metrics
