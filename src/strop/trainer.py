"""What the loop works with: the parts of a run, its state, and what follows from them.

Only `State` changes from step to step, and it is what a checkpoint holds beside the tensors.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Optional

import numpy as np
import torch

from strop.algos import Algorithm
from strop.config import Config
from strop.data import plan
from strop.data.mismatched import Mismatched
from strop.data.sets import RowSet
from strop.dist import Dist
from strop.models import hf
from strop.models.policy import Policy
from strop.report import Report
from strop.run import Position, Run
from strop.saver import Saver
from strop.stragglers import Pace

SAFETY = 1.5
"""A save and a step may take this much longer than the slowest so far."""

SHUTDOWN_S = 10.0
"""From the commit to the end of the batch script, the requeue included."""


@dataclass
class State:
    """What a checkpoint holds beside tensors. The data's state is `step`, since the plan is a function."""

    step: int = 0
    """Optimiser steps done."""
    num_updates: int = 0
    """Those that changed the weights: all but fp16 steps whose gradient overflowed."""
    num_tokens: int = 0
    """Tokens seen in training, prompts included."""
    validated: bool = False
    """The validation that is due after `step` has been done."""
    best_value: Optional[float] = None
    best_step: Optional[int] = None
    misses: int = 0
    """Validations since the best one."""
    reward_sum: float = 0.0
    """Of all pairs of all steps so far, the mean of a pair's two rewards (bco_pair)."""
    num_rewarded: int = 0
    """How many these are."""
    loss_scale: float = 1.0
    """Above 1 for fp16 only."""
    scale_steps: int = 0
    """Steps since the loss scale changed (fp16)."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl at the commit: what lies beyond is of steps that are done again."""
    frozen: Optional[dict[str, str]] = None
    """What the adapters belong to, see models.lora.facts; None where all weights are trained."""

    @property
    def mean_reward(self) -> float:
        return self.reward_sum / self.num_rewarded if self.num_rewarded else 0.0


@dataclass
class Trainer:
    """What the loop works with; only `state` changes."""

    run: Run
    config: Config
    algo: Algorithm
    dist: Dist
    policy: Policy
    optimizer: torch.optim.AdamW
    train_store: RowSet
    val_store: Optional[RowSet]
    watched: dict[str, RowSet]
    """Further validation sets, by name."""
    report: Report
    position: Position
    steps_per_epoch: int
    max_steps: int
    train_ref: Optional[np.ndarray] = None
    val_ref: Optional[np.ndarray] = None
    mismatched: dict[str, Mismatched] = field(default_factory=dict)
    """What the baseline of train and validation is measured on (KTO), and the reference's log-probs of it."""
    mismatched_refs: dict[str, np.ndarray] = field(default_factory=dict)
    state: State = field(default_factory=State)
    pace: Pace = field(init=False)
    saver: Saver = field(init=False)
    """Made when the weights are there."""
    ready: bool = False
    """False if asked to stop before the first step."""
    step_s: float = 0.0
    """Seconds of the slowest step so far."""
    reduce_each: bool = False
    """Gradients are reduced after every micro batch instead of once a step."""


def tensors(t: Trainer) -> dict[str, torch.Tensor]:
    """What a checkpoint holds: fp32 weights and both moments of AdamW, by name. Of a model with adapters only
    what is trained."""
    state = hf.distinct_state(t.policy.lm)
    if t.policy.adapters is not None:
        state = {name: tensor for name, tensor in state.items() if tensor.requires_grad}
    out = {f"model.{name}": tensor.detach() for name, tensor in state.items()}
    for name, tensor in state.items():
        for key, moment in t.optimizer.state.get(tensor, {}).items():
            if key != "step":  # the same for all parameters, and known from the state
                out[f"optim.{name}.{key}"] = moment
    return out


def check_data(t: Trainer) -> None:
    """UserError if somebody has written to the stores that this run reads: its steps since the last commit
    may have seen anything."""
    for store in (t.train_store, t.val_store, *t.watched.values()):
        if store is not None:
            store.check_unwritten()


def step_bins(t: Trainer, step: int, store: Optional[Mismatched] = None) -> list[list[np.ndarray]]:
    """[rank][micro batch] -> row ids of optimiser step `step` (from 0), packed by the lengths in `store`."""
    c, weights = t.config.train, t.config.data.weights
    rows = plan.step_rows(t.train_store.num_rows, c.global_batch_size, c.seed, step, c.limit_train_batches)
    if weights is not None:
        rows = plan.blend(rows, t.train_store.part_rows, weights, c.seed, step // t.steps_per_epoch)
    return plan.pack(
        rows,
        (store or t.train_store).row_lengths,
        world_size=t.dist.world_size,
        max_tokens=c.micro_batch_tokens,
        max_rows=c.micro_batch_size,
    )


def validation_bins(t: Trainer, store: RowSet | Mismatched) -> list[list[np.ndarray]]:
    """[rank][micro batch] -> row ids of a validation set, or of its first `limit_val_batches`."""
    c = t.config.train
    num_rows = store.num_rows
    if c.limit_val_batches is not None:
        num_rows = min(num_rows, c.limit_val_batches * c.global_batch_size)
    return plan.eval_bins(
        num_rows,
        store.row_lengths,
        world_size=t.dist.world_size,
        max_tokens=c.micro_batch_tokens,
        max_rows=c.micro_batch_size,
    )


def stop_agreed(t: Trainer) -> bool:
    """Whether any rank must stop. Collective; asked after every batch, so it feeds the watchdog."""
    t.position.beat()
    return t.dist.any(must_stop(t))


def must_stop(t: Trainer) -> bool:
    """Whether this rank was asked to stop, or the job ends so soon that the state must be committed now."""
    if t.run.stop.poll() is not None:
        return True
    end = t.run.env.end_time
    if end is None or t.state.step == 0:
        return False
    need_s = SAFETY * (t.saver.expected_s + t.step_s) + SHUTDOWN_S
    if time.time() + need_s > end:
        t.run.stop.reason = f"time limit: {end - time.time():.0f} s left, {need_s:.0f} s needed to commit"
        return True
    return False
