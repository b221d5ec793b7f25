"""When to commit a checkpoint, and how without holding training up.

In the background, training waits only while its shards are copied (staged); a thread then writes, hashes
and commits the copy through the same `checkpoint.save`, over process groups of its own. At most one save is
in flight: the next one waits for it. What goes wrong in the thread goes wrong on every rank alike, since
`checkpoint.save` is collective, and is raised at the next step's boundary.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.tensor import DTensor

from strop import checkpoint, files
from strop.config import CheckpointConfig
from strop.dist import Dist
from strop.report import Report
from strop.run import Run
from strop.slurm import attempts

PRIOR_MTTI_S = 4 * 3600.0
"""Mean time to an interruption that is assumed before anything was observed; weighs as one observation."""

MEMORY_SHARE = 0.5
"""Of the memory that is free on a host, what the staging copies of its ranks may take by default."""

SLOW_DISK_BYTES_PER_S = 100e6
"""Assumed for the first save's duration, before one was measured."""

UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Interval:
    """`checkpoint.every`: steps, seconds, or null for both (only at the end and when stopped)."""

    steps: Optional[int] = None
    seconds: Optional[float] = None
    auto: bool = False


def parse_interval(every: Union[int, str, None]) -> Interval:
    """100 (steps), "90s", "10m", "1.5h", "auto" or null, as `config.load` has checked it."""
    if every is None or isinstance(every, int):
        return Interval(steps=every)
    if every == "auto":
        return Interval(auto=True)
    return Interval(seconds=float(every[:-1]) * UNITS_S[every[-1]])


def best_interval_s(save_s: float, running_s: float, interruptions: int) -> float:
    """√(2 w MTTI) (Young 1974), w the seconds that a save takes, MTTI the mean time to an interruption of
    any kind, preemptions included; never shorter than a save."""
    mtti_s = (running_s + PRIOR_MTTI_S) / (interruptions + 1)
    return max(math.sqrt(2 * save_s * mtti_s), save_s)


class Saver:
    """Commits states of one run. All methods but `due` and `expected_s` are collective."""

    def __init__(
        self, run: Run, config: CheckpointConfig, dist: Dist, report: Report, tensors: dict[str, Tensor]
    ):
        self._run, self._config, self._report = run, config, report
        self._interval = parse_interval(config.every)
        self._dist = dist.another()
        num_bytes = local_bytes(tensors)
        self.background = config.async_save
        if self.background is None:
            free = free_memory() * MEMORY_SHARE / run.env.local_size
            self.background = not dist.any(num_bytes > free)
        self._pinned = dist.device.type == "cuda"
        # Not DefaultStager, which is around it: in torch 2.11 that one stages once and never again.
        self._stager = StateDictStager(pin_memory=self._pinned) if self.background else None
        self._thread: Optional[threading.Thread] = None
        self._error: Optional[BaseException] = None
        self._last_start = time.monotonic()
        self._save_s: Optional[float] = None
        self._guess_s = num_bytes / SLOW_DISK_BYTES_PER_S

    @property
    def expected_s(self) -> float:
        """How long a save will take: the slowest so far, or a guess from its size."""
        return self._guess_s if self._save_s is None else self._save_s

    @property
    def failed(self) -> bool:
        return self._error is not None

    def due(self, step: int) -> bool:
        """Whether the state after `step` is to be committed by this rank's clock. Steps say the same on all
        ranks, clocks do not: rank 0's counts."""
        if self._interval.steps is not None:
            return step % self._interval.steps == 0
        if self._interval.seconds is None and not self._interval.auto:
            return False
        return time.monotonic() - self._last_start >= (self._interval.seconds or self._auto_s())

    def _auto_s(self) -> float:
        records = attempts.read_all(self._run.dir)
        running_s = sum((r.get("ended") or time.time()) - r["began"] for r in records)
        return best_interval_s(self.expected_s, running_s, len(records) - 1)

    def start(self, tensors: dict[str, Tensor], state: dict[str, Any], *, last: bool = False) -> None:
        """Commit `state` (a step that is committed already is left as it is), in the background if so set.

        `last`: no training goes on beside it, so a copy would only cost time and memory.
        """
        self.wait()
        self._last_start = begin = time.monotonic()
        if self._stager is None or last:
            self._commit(tensors, state, begin)
            self.wait()
            if not last:
                self._report.stalled(time.monotonic() - begin)
            return
        staged = self._stager.stage(tensors, non_blocking=self._pinned)
        if self._pinned:
            torch.cuda.synchronize()
        self._thread = threading.Thread(target=self._commit, args=(staged, state, begin), name="saver")
        self._thread.start()
        self._report.stalled(time.monotonic() - begin)

    def wait(self) -> None:
        """Until nothing is in flight. Raises what went wrong there."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def _commit(self, tensors: dict[str, Tensor], state: dict[str, Any], begin: float) -> None:
        if self._dist.device.type == "cuda":
            # A thread begins at the first GPU, and there the writer would set up every rank's half a GiB.
            torch.cuda.set_device(self._dist.device)
        try:
            root = self._run.checkpoints
            new = checkpoint.save(root, state["step"], self._run.attempt, tensors, state, self._dist)
            if self._dist.is_main:
                # Also where the step was committed before, by an attempt that died right after.
                self._after(root, state)
        except Exception as error:
            self._error = error
            return
        if new:
            self._save_s = max(self._save_s or 0.0, time.monotonic() - begin)
            self._report.saved(state["step"], seconds=time.monotonic() - begin)

    def _after(self, root: Path, state: dict[str, Any]) -> None:
        """Rank 0, once the commit stands: note the best, delete what is not kept."""
        if state["best_step"] == state["step"]:
            best = {"step": state["step"], "metric": self._config.best_metric, "value": state["best_value"]}
            files.write_json(root / "BEST.json", best)
        checkpoint.clean_up(root, self._config.keep_last, state["best_step"])


def local_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of this rank's shards."""
    locals_ = (t.to_local() if isinstance(t, DTensor) else t for t in tensors.values())
    return sum(t.numel() * t.element_size() for t in locals_)


def free_memory() -> int:
    """Bytes that the kernel thinks can be had without swapping; less where a cgroup says so."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free
