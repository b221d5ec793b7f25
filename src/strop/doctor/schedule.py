"""Steps, tokens, cadences, memory and disk: what follows from configuration, data and model by arithmetic."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path
from typing import Optional

from strop.config import Config
from strop.data import plan
from strop.doctor import memory
from strop.doctor.checks import Checks, gib
from strop.doctor.model import Shape
from strop.doctor.rows import Scan


def steps(config: Config, train: Scan, world_size: int, checks: Checks) -> Optional[int]:
    """Optimiser steps of the run; None if no row can be used."""
    c, rows = config.train, train.usable_rows
    if not rows or not train.row_tokens:
        return None
    per_epoch = plan.steps_per_epoch(rows, c.global_batch_size, c.limit_train_batches)
    total = c.max_steps or math.ceil(c.max_epochs * per_epoch)
    mean = sum(train.row_tokens) / len(train.row_tokens)
    step_tokens = mean * min(c.global_batch_size, rows)
    about = "" if train.complete else "about "
    checks.ok(
        "steps",
        f"{about}{rows:,} rows / {c.global_batch_size} = {per_epoch:,} steps an epoch; {total:,} steps are "
        f"{total / per_epoch:.2f} epochs, {about}{step_tokens:,.0f} tokens a step, "
        f"{step_tokens * total / 1e6:,.2f} million in all",
    )
    if rows < c.global_batch_size:
        checks.warn("steps", f"the whole set is smaller than train.global_batch_size={c.global_batch_size}")
    if c.global_batch_size < world_size:
        text = f"train.global_batch_size={c.global_batch_size} rows for {world_size} ranks"
        checks.warn("steps", text, "some ranks would stand idle: raise it, or take fewer nodes")
    longest = max(train.row_tokens)
    if longest > c.micro_batch_tokens:
        text = f"the longest row has {longest:,} tokens, train.micro_batch_tokens={c.micro_batch_tokens:,}"
        checks.warn("steps", text, "it makes a batch of its own, which needs more memory than the others")
    return total


def cadences(config: Config, total: int, validation_rows: int, checks: Checks) -> None:
    """Warm-up, validation and checkpoints against the length of the run."""
    o, v, c = config.optim, config.validation, config.checkpoint
    if o.warmup_steps >= total:
        text = f"optim.warmup_steps={o.warmup_steps}, but the run has {total} steps"
        checks.warn("warm-up", text, "the learning rate never reaches optim.lr: shorten it")
    decay = o.decay_steps if o.decay_steps >= 1 else o.decay_steps * total
    if o.schedule == "wsd" and o.warmup_steps + decay > total:
        text = (
            f"optim.warmup_steps={o.warmup_steps}, optim.decay_steps={o.decay_steps:g}, {total} steps in all"
        )
        checks.fail("schedule", text, "together they are longer than the run: shorten one")
    if o.lr == 0:
        checks.warn("optimiser", "optim.lr=0 trains nothing")
    validates = validation_rows > 0 and bool(v.at_start or v.at_end or (v.every and v.every <= total))
    if v.every and not validation_rows:
        checks.warn(
            "validation", "validation.every is set, but there is no validation set", "data.validation"
        )
    elif v.every and v.every > total:
        checks.warn("validation", f"validation.every={v.every} is more than the run's {total} steps")
    elif validation_rows:
        number = (total // v.every if v.every else 0) + bool(v.at_start)
        number += bool(v.at_end and not (v.every and total % v.every == 0))
        checks.ok("validation", f"{number} times over about {validation_rows:,} rows")
    if c.best_metric and not (validates and (v.at_end or (v.every and v.every <= total))):
        text = f"checkpoint.best_metric={c.best_metric}, but nothing is validated after step 0"
        checks.warn("checkpoints", text, "set validation.every or validation.at_end")
    if c.every is None:
        text = "checkpoint.every=null: a kill without warning loses everything"
        checks.warn("checkpoints", text, "set checkpoint.every")
    elif c.every > total:
        text = f"checkpoint.every={c.every} is more than the run's {total} steps"
        checks.warn("checkpoints", text, "a kill without warning loses everything: lower it")
    else:
        checks.ok("checkpoints", f"{total // c.every} commits, every {c.every} steps, and at the end")


def needed_memory(
    config: Config,
    shape: Shape,
    longest_row: int,
    world_size: int,
    gpu: bool,
    gpu_mem_gib: Optional[float],
    checks: Checks,
) -> memory.Memory:
    c = config.train
    precision = c.precision if c.precision != "auto" else "bf16"
    # A rank's share of a step may be smaller than a micro batch may be.
    share = -(-c.global_batch_size // world_size) * longest_row
    m = memory.estimate(
        shape,
        num_ranks=config.dist.shard_size or world_size,
        micro_batch_tokens=min(max(c.micro_batch_tokens, longest_row), share or c.micro_batch_tokens),
        precision=precision,
        activation_checkpointing=c.activation_checkpointing,
        gpu=gpu,
    )
    text = (
        f"{gib(m.total)} a rank with {world_size} ranks: weights {gib(m.weights)}, AdamW {gib(m.optimizer)}, "
        f"gradients {gib(m.gradients)}, gathered {gib(m.gathered)} ({precision}), activations about "
        f"{gib(m.activations)}, logits {gib(m.head)}, framework {gib(m.framework)}"
    )
    if gpu_mem_gib is None:
        checks.ok("memory", text)
    elif m.total > gpu_mem_gib * 2**30:
        advice = "more ranks, a smaller train.micro_batch_tokens, or train.activation_checkpointing=full"
        level = checks.fail if m.states + m.framework > gpu_mem_gib * 2**30 else checks.warn
        level("memory", f"{text}; more than --gpu-mem {gpu_mem_gib:g} GiB", advice)
    elif m.total > 0.9 * gpu_mem_gib * 2**30:
        checks.warn("memory", f"{text}; more than 90 % of {gpu_mem_gib:g} GiB", "activations are an estimate")
    else:
        checks.ok("memory", f"{text}; fits {gpu_mem_gib:g} GiB")
    staging = f"{gib(m.host_staging)} a rank while a checkpoint is staged" if gpu else ""
    loading = f"{gib(m.loading)} more on rank 0 while it reads the weights"
    checks.ok("main memory", "; ".join(filter(None, [staging, loading])))
    return m


def disk(config: Config, shape: Shape, run_dir: Path, checks: Checks) -> None:
    """Free space and quota where the run will lie, against the checkpoints that are kept."""
    c = config.checkpoint
    one = memory.checkpoint_bytes(shape)
    need = memory.disk_bytes(shape, c.keep_last, c.best_metric is not None)
    place = next(p for p in (run_dir, *run_dir.parents) if p.exists())
    free = shutil.disk_usage(place).free
    best = " + the best" if c.best_metric else ""
    text = (
        f"a checkpoint takes {gib(one)}, the {c.keep_last} newest{best} + the one being written "
        f"{gib(need)}; {gib(free)} free in {place}"
    )
    if free < one:
        checks.fail("disk", text, "make room, or choose another run.dir")
    elif free < need:
        checks.warn("disk", text, "make room before it fills")
    else:
        checks.ok("disk", text)
    left = _quota_left(place)
    if left is not None and left < need:
        text = f"your quota in {place} leaves {gib(left)}, the checkpoints need {gib(need)}"
        level = checks.fail if left < one else checks.warn
        level("disk", text, "make room, or choose another run.dir")


def _quota_left(place: Path) -> Optional[int]:
    """Bytes that `quota` leaves on the file system of `place`; None where it does not say so quickly."""
    if shutil.which("quota") is None:
        return None
    try:
        done = subprocess.run(["quota", "-w", "-p"], capture_output=True, text=True, timeout=3)
        mounts = dict(line.split()[1::-1] for line in Path("/proc/mounts").read_text().splitlines())
    except (OSError, subprocess.TimeoutExpired):
        return None
    here = next((str(p) for p in (place.resolve(), *place.resolve().parents) if str(p) in mounts), None)
    return parse_quota(done.stdout, mounts[here]) if here else None


def parse_quota(text: str, device: str) -> Optional[int]:
    """Bytes left under the hard limit (else the soft one); lines are `/dev/sda1 1234* 5000 6000`, in KiB."""
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 4 and words[0] == device and words[1].rstrip("*").isdigit():
            used, soft, hard = (int(word.rstrip("*")) for word in words[1:4])
            if hard or soft:
                return ((hard or soft) - used) * 1024
    return None
