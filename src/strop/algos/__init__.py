"""What an algorithm is: a module of functions, which `load` gathers into an `Algorithm` by its name.

A module has `count` and `loss`, and of the other functions those that it needs: the fields of `Algorithm` say
what each is for, and what holds without it. It knows nothing of ranks, checkpoints or Slurm. (`reference` is
no algorithm: it computes the log-probs that some of them need.)
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from strop.config import Config
from strop.data.batch import Batch

Metrics = dict[str, tuple[Tensor, Tensor]]
"""(sum, count) by name: what a loss measures beside itself, added over batches and ranks by the loop. With
SMALLEST or LARGEST in place of the count it is no sum but a value, of which the loop takes that one."""

SMALLEST, LARGEST = torch.tensor(-1.0), torch.tensor(1.0)


@dataclass(frozen=True)
class Algorithm:
    """`out` is what the model gives for a batch: `models.policy.Output`, or `models.reward.Scores`."""

    count: Callable[[Batch], int]
    """(batch): what the loss is divided by: trained tokens, rows or pairs."""
    loss: Callable[[Any, Batch, Config], tuple[Tensor, Metrics]]
    """(out, batch, cfg): the loss's sum over the batch, and what it measures beside."""
    per_token: bool = False
    """Whether that sum is over tokens, so that a batch may be parted anywhere; else it is over rows."""
    derived: Callable[[dict[str, float]], dict[str, float]] = lambda means: {}
    """(means): metrics that follow from the means of a step or of a validation set."""
    rewards: Optional[Callable[[Any, Batch, Config], Tensor]] = None
    """(out, batch, cfg): [S] of each sequence, for the user's own metrics; None: it has no such thing."""
    needs_reference: Callable[[Config], bool] = lambda cfg: False
    """(cfg): whether batches carry the log-probs of a reference model."""
    reference_model: Callable[[Config], Optional[str]] = lambda cfg: None
    """(cfg): which model that is; None: the policy before training."""
    needs_mismatched: Callable[[Config], bool] = lambda cfg: False
    """(cfg): whether `Batch.baseline` is measured before each step, on prompts with the completions of others
    (strop.baseline), by `kl`."""
    kl: Optional[Callable[[Any, Batch, Config], tuple[Tensor, int]]] = None
    """(out, batch, cfg): (sum, count) of that, over a batch of mismatched rows."""
    running_reward: Callable[[dict[str, float], Config], Optional[float]] = lambda means, cfg: None
    """(means, cfg): the mean reward of a step, where `Batch.baseline` is its mean over all earlier steps."""


def load(name: str) -> Algorithm:
    """The algorithm of that module, which must be one of config.ALGOS."""
    functions = vars(importlib.import_module(f"strop.algos.{name}"))
    return Algorithm(
        **{f.name: functions[f.name] for f in dataclasses.fields(Algorithm) if f.name in functions}
    )
