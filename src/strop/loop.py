"""The one training loop, for every algorithm.

Rank 0 prepares the data, then all ranks meet, shard the model, go back to the newest committed checkpoint
and step through the plan. A step: the batches of this rank (made ahead by a thread), their count over all
ranks, forward and backward with the loss's *sum* divided by that count, one update. Whatever one rank
alone finds out (a signal, a NaN) is reduced before anybody acts on it, so all ranks leave the loop together.

Stopping at any moment is ordinary: what is not committed is computed again to the same bits.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Optional

import numpy as np
import torch

from strop import checkpoint, optim, parallel
from strop import run as run_module
from strop.algos import reference
from strop.config import Config
from strop.data import plan, prepare
from strop.data.batch import Batch, Prefetcher, make_batch
from strop.data.store import TokenStore
from strop.dist import Dist, choose_device
from strop.dist import start as start_dist
from strop.errors import Diverged, UserError
from strop.models import hf
from strop.models.policy import Policy
from strop.obs.report import Report
from strop.run import Run
from strop.slurm import attempts, files, rendezvous

log = logging.getLogger("strop")

FIRST_LOSS_SCALE = 2.0**16
LOSS_SCALE_GROWS_EVERY = 2000


@dataclass
class Position:
    """Where this rank is, for its verdict."""

    phase: str = "start"
    step: Optional[int] = None


@dataclass
class State:
    """All that a checkpoint holds beside tensors. The data's state is `step`, since the plan is a function."""

    step: int = 0
    """Optimiser steps done."""
    num_tokens: int = 0
    """Tokens seen in training, prompts included."""
    validated: bool = False
    """The validation that is due after `step` has been done."""
    best_value: Optional[float] = None
    best_step: Optional[int] = None
    misses: int = 0
    """Validations since the best one."""
    loss_scale: float = FIRST_LOSS_SCALE
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
    max_steps: int
    train_ref: Optional[np.ndarray] = None
    val_ref: Optional[np.ndarray] = None
    state: State = field(default_factory=State)


def train(run: Run, config: Config, position: Position) -> None:
    """Train to the end or to a stop request; the record says which. Raises what ends the attempt."""
    algo = importlib.import_module(f"strop.algos.{config.algo}")
    assert config.model.path is not None
    hf.check_model(config.model.path)
    report = Report(run, config)
    position.phase = "data"
    train_store, val_store = _data(run, config, algo, report)
    position.phase = "rendezvous"
    dist = start_dist(config.dist, run.env, run.dir, run.attempt, run.stop)
    position.phase = "model"
    config = _settle(run, config, dist)
    with report.phase("building the model"):
        policy = Policy(hf.build_empty(config.model))
        policy.eval()  # dropout is off: the policy and its reference must be one function
        _check_disk(run, config, policy, dist)
        parallel.shard(policy, config.train, dist)
        optimizer = optim.build(config.optim, policy)
    per_epoch = _steps_per_epoch(config, train_store)
    max_steps = config.train.max_steps or math.ceil(config.train.max_epochs * per_epoch)
    t = Trainer(
        run, config, algo, dist, policy, optimizer, train_store, val_store, report, position, max_steps
    )
    outcome = _steps(t) if _load(t) else "YIELD"
    if dist.is_main:
        reason = run.stop.reason if outcome == "YIELD" else None
        attempts.finish(run.dir, run.attempt, outcome, step=t.state.step, reason=reason)
    report.close()
    # Nobody leaves before the record is there: a rank that ends early may have the others ended.
    dist.barrier()
    dist.close()


def _data(run: Run, config: Config, algo: ModuleType, report: Report) -> tuple[TokenStore, Optional[TokenStore]]:
    """Rank 0 tokenises (or finds it done) and tells the others where; they wait without a collective,
    whose time-out long work would exceed."""
    told = run.logs / "data.json"
    if run.env.rank == 0:
        run_module.agree(run, config)
        cache = Path(config.data.cache_dir or run.dir.parent / ".cache")
        tokenizer = hf.load_tokenizer(config.model)
        digest = hf.tokenizer_digest(tokenizer)
        paths: dict[str, Optional[str]] = {"train": None, "validation": None}
        ledgers = []
        splits = ["train"] + (["validation"] if prepare.has_validation(config.data) else [])
        for split in splits:
            with report.phase(f"{split} data"):
                store, ledger = prepare.prepare(config, tokenizer, digest, cache, algo.KIND, split)
            ledgers.append(ledger)
            paths[split] = str(store.path)
        report.ledgers(ledgers)
        files.write_json(told, paths)
    else:
        rendezvous.wait_for_file(run.dir, run.attempt, run.env.rank, told, run.stop)
        paths = json.loads(told.read_text())
    assert paths["train"] is not None
    return TokenStore.open(paths["train"]), TokenStore.open(paths["validation"]) if paths["validation"] else None


def _settle(run: Run, config: Config, dist: Dist) -> Config:
    """The configuration with its machine-dependent choices made, the same on every rank."""
    if dist.is_main:
        config = run_module.agree(run, config)
        facts = {
            "device": torch.cuda.get_device_name() if dist.device.type == "cuda" else _cpu_name(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "ranks": dist.world_size,
        }
        run_module.record_machine(run, facts)
    config = dist.broadcast(config)
    if config.train.precision == "auto":
        precision = "bf16" if not dist.any(not parallel.has_bf16(dist.device)) else "fp32"
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision))
    return config


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def _check_disk(run: Run, config: Config, policy: Policy, dist: Dist) -> None:
    """Weights and two moments in fp32, once while writing beside the ones that are kept."""
    need = 12 * sum(p.numel() for p in policy.parameters())
    free = dist.broadcast(shutil.disk_usage(run.dir).free)
    if free < need:
        raise UserError(
            f"run.dir: {free / 2**30:.1f} GiB free in {run.dir}, but one checkpoint of this model takes "
            f"{need / 2**30:.1f} GiB"
        )


def _steps_per_epoch(config: Config, store: TokenStore) -> int:
    limit = config.train.limit_train_batches
    return plan.steps_per_epoch(store.num_rows, config.train.global_batch_size, limit)


def _load(t: Trainer) -> bool:
    """Weights, reference log-probs and the newest checkpoint; False if asked to stop on the way.

    A resumed run whose reference is complete reads nothing but its checkpoint.
    """
    root = t.run.checkpoints
    root.mkdir(exist_ok=True)
    if t.dist.is_main:
        checkpoint.remove_rubble(root)
    t.position.phase = "resume"
    with t.report.phase("verifying checkpoints"):
        step = checkpoint.newest_verified(root, t.dist)
    weights = t.config.model.path
    if step is None:
        with t.report.phase("loading weights"):
            hf.scatter_weights(t.policy, t.config.model, t.dist)
    _choose_layout(t)
    if t.algo.NEEDS_REFERENCE and not _reference(t, weights_loaded=step is None):
        return False
    if step is not None:
        with t.report.phase(f"loading checkpoint of step {step}"):
            tensors = _tensors(t)
            t.state = State(**checkpoint.load(root, step, tensors))
            _mark_optimizer(t)
        t.position.step = step
        log.info("resumed at step %d", step)
    t.report.start(t.state.metrics_bytes, t.max_steps, t.state.step)
    return True
