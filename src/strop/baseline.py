"""The number that some losses compare rewards with, one for all batches of a step: `Batch.baseline`.

KTO: the mean log-ratio of mismatched completions under the weights of now, by a forward of its own without
gradient over the global batch (in validation over the whole set) before the loss is computed. BCO: the mean
reward over all steps before this one, which `State` carries along. Both are means over all ranks, so that
neither ranks nor micro batches nor packing change them; for all other losses the baseline is 0 and unused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Optional

import torch
from torch import Tensor

from strop import trainer
from strop.data.batch import Batch, Prefetcher, make_batch
from strop.trainer import Trainer


def of_step(t: Trainer, mismatched: Iterable[Batch]) -> Optional[float]:
    """The baseline of the next step; None if asked to stop."""
    return _measured(t, mismatched) if "train" in t.mismatched else t.state.mean_reward


def of_validation(t: Trainer) -> Optional[float]:
    """The same for the validation set."""
    if "validation" not in t.mismatched:
        return t.state.mean_reward
    store, ref = t.mismatched["validation"], t.mismatched_refs["validation"]
    bins = trainer.validation_bins(t, store)[t.dist.rank]
    with Prefetcher(make_batch(store, rows, ref).ready_for(t.dist.device) for rows in bins) as batches:
        return _measured(t, batches)


def batches(t: Trainer, step: int) -> Iterator[Batch]:
    """What the baseline of an optimiser step is measured on, by this rank; mostly nothing."""
    if "train" in t.mismatched:
        store, ref = t.mismatched["train"], t.mismatched_refs["train"]
        for rows in trainer.step_bins(t, step, store)[t.dist.rank]:
            yield make_batch(store, rows, ref)


def remember(t: Trainer, means: dict[str, float], count: float) -> None:
    """After a step: its mean reward over `count` rows, where the loss wants to know it in later ones."""
    reward = t.algo.running_reward(means, t.config)
    if reward is not None:
        t.state.reward_sum += reward * count
        t.state.num_rewarded += int(count)


def _measured(t: Trainer, batches: Iterable[Batch]) -> Optional[float]:
    """The mean over all sequences of all ranks; None if asked to stop. Collective."""
    assert t.algo.kl is not None
    sums: list[Tensor] = []
    num_rows = 0
    for batch in batches:
        if trainer.stop_agreed(t):
            return None
        with torch.no_grad():
            moved = batch.to(t.dist.device)
            total, count = t.algo.kl(t.policy(moved), moved, t.config)
        sums.append(total)
        num_rows += count
    log_ratio, num_rows_of_all = t.dist.sum([float(torch.stack(sums).sum()), num_rows])
    return log_ratio / num_rows_of_all
