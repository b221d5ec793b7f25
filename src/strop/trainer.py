"""What the loop works with: a run's parts once they are built, and the state that a checkpoint keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Optional

import numpy as np
import torch

from strop.config import Config
from strop.data.store import TokenStore
from strop.dist import Dist
from strop.models.policy import Policy
from strop.report import Report
from strop.run import Position, Run


@dataclass
class State:
    """All that a checkpoint holds beside tensors. Of the data it is `step`, since the plan is a function."""

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
    loss_scale: float = 1.0
    """Above 1 for fp16 only."""
    scale_steps: int = 0
    """Steps since the loss scale changed (fp16)."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl at the commit: what lies beyond is of steps that are done again."""


@dataclass
class Trainer:
    """What the loop works with; only `state` changes."""

    run: Run
    config: Config
    algo: ModuleType
    dist: Dist
    policy: Policy
    optimizer: torch.optim.AdamW
    train_store: TokenStore
    val_store: Optional[TokenStore]
    report: Report
    position: Position
    steps_per_epoch: int
    max_steps: int
    train_ref: Optional[np.ndarray] = None
    val_ref: Optional[np.ndarray] = None
    state: State = field(default_factory=State)
    ready: bool = False
    reduce_each: bool = False
    """Gradients are reduced after every micro batch instead of once a step."""
