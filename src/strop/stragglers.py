"""Which rank is slower than the others, although all steps take equally long.

Every collective waits for the slowest, so the time of a step says nothing. What differs is the time that a
rank spends in its own work: in the forward of the transformer blocks, between the gathering of their
weights and the next collective, and in waiting for its own batches. It is wall time, because a rank that
was stopped, or shares its core or a throttled GPU, uses no more CPU time than the others. Every few steps
the ranks tell each other their seconds per token; one that is far above the median of the others in
several windows in a row is reported, or its node if all ranks of that are slow.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from typing import Any, Union

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from strop.dist import Dist

log = logging.getLogger("strop")

EVERY = 10
"""Steps in a window."""
SLOW = 1.5
PERSISTENT = 3
"""Windows in a row before a rank is reported, and then again each time that the number has doubled."""

Mark = Union[float, torch.cuda.Event]


class Pace:
    """Measures this rank and compares it with the others. `step` is collective in every EVERYth step."""

    def __init__(self, policy: nn.Module, dist: Dist, nodes: Sequence[str]) -> None:
        self._dist = dist
        self._cuda = dist.device.type == "cuda"
        self._judge = Judge(nodes)
        self._marks: list[tuple[Mark, Mark]] = []
        self._begin: Mark = 0.0
        self._tokens = 0
        self._data_s = 0.0
        if dist.world_size == 1:
            return
        blocks = [m for m in policy.modules() if isinstance(m, FSDPModule) and m is not policy]
        if self._cuda:  # events are not free, and every block tells the same
            blocks = blocks[len(blocks) // 2 :][:1]
        for block in blocks:
            assert isinstance(block, nn.Module)
            # FSDP gathers the weights in a hook before this one, and frees them in one after the other.
            block.register_forward_pre_hook(self._enter)
            block.register_forward_hook(self._leave, prepend=True)

    def _now(self) -> Mark:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @torch.compiler.disable
    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            self._begin = self._now()

    @torch.compiler.disable
    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            self._marks.append((self._begin, self._now()))

    def step(self, step: int, tokens: int, data_s: float) -> dict[str, Any]:
        """After step `step`, which read `tokens` tokens here and waited data_s for them: what timing.jsonl
        is to say at the end of a window."""
        if self._dist.world_size == 1:
            return {}
        self._tokens += tokens
        self._data_s += data_s
        if step % EVERY:
            return {}
        own_s = self._data_s + sum(_between_s(a, b) for a, b in self._marks)
        mine = [0.0] * self._dist.world_size
        mine[self._dist.rank] = own_s / self._tokens
        paces = self._dist.sum(mine)
        self._marks.clear()
        self._tokens, self._data_s = 0, 0.0
        for line in self._judge.window(paces):
            if self._dist.is_main:
                log.warning("%s", line)
        ratios = slowness(paces)
        slowest = max(range(len(ratios)), key=ratios.__getitem__)
        return {"slowest_rank": slowest, "slowest_ratio": round(ratios[slowest], 3)}


def _between_s(begin: Mark, end: Mark) -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    assert isinstance(begin, float)
    assert isinstance(end, float)
    return end - begin


def slowness(paces: Sequence[float]) -> list[float]:
    """Each rank's seconds per token over the median of the other ranks'."""
    return [p / statistics.median([*paces[:r], *paces[r + 1 :]]) for r, p in enumerate(paces)]


class Judge:
    """Turns one window after the other into lines for the log. Pure."""

    def __init__(self, nodes: Sequence[str]) -> None:
        self._nodes = nodes
        self._slow = [0] * len(nodes)
        """Windows in a row in which the rank was slow."""

    def window(self, paces: Sequence[float]) -> list[str]:
        ratios = slowness(paces)
        lines = []
        for rank, ratio in enumerate(ratios):
            if ratio < SLOW and self._slow[rank] >= PERSISTENT:
                lines.append(f"rank {rank} on {self._nodes[rank]} keeps pace again")
            self._slow[rank] = self._slow[rank] + 1 if ratio >= SLOW else 0
        told: set[str] = set()
        for rank, ratio in enumerate(ratios):
            node, count = self._nodes[rank], self._slow[rank]
            if not _is_due(count) or node in told:
                continue
            ranks = [r for r, n in enumerate(self._nodes) if n == node]
            who = f"rank {rank} on {node}"
            if len(ranks) > 1 and all(self._slow[r] >= PERSISTENT for r in ranks):
                told.add(node)
                who, ratio = f"{node} (all {len(ranks)} ranks)", min(ratios[r] for r in ranks)
            lines.append(f"{who} is {ratio:.1f} x slower than the median for the last {count * EVERY} steps")
        return lines


def _is_due(count: int) -> bool:
    """After 1, 2, 4, 8, ... times PERSISTENT windows."""
    times, rest = divmod(count, PERSISTENT)
    return times > 0 and rest == 0 and times & (times - 1) == 0
