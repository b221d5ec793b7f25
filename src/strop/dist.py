"""The ranks of a run: who they are, and the few things they say to each other outside the model.

Only this module makes process groups. Decisions and counts travel over gloo on the CPU even where the
weights travel over NCCL, so that a stop request never waits behind a kernel.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as td
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from strop.config import DistConfig
from strop.errors import UserError
from strop.slurm import rendezvous
from strop.slurm.env import Env
from strop.slurm.stop import StopRequest


@dataclass(frozen=True)
class Dist:
    """A started group of ranks. Every method is collective: all ranks call it, in the same order."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh
    """Axes (replicate, shard) for hybrid sharding, else (shard,)."""
    group: td.ProcessGroup
    """Where the methods below talk."""
    timeout: Optional[datetime.timedelta] = None
    """Of that group; None: torch's default."""

    def another(self) -> Dist:
        """The same ranks over a gloo group of their own, for a thread beside the loop. Collective."""
        return dataclasses.replace(self, group=td.new_group(backend="gloo", timeout=self.timeout))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over the ranks, in fp64."""
        total = torch.tensor(values, dtype=torch.float64)
        td.all_reduce(total, group=self.group)
        return total.tolist()

    def max(self, values: Sequence[float]) -> list[float]:
        top = torch.tensor(values, dtype=torch.float64)
        td.all_reduce(top, op=td.ReduceOp.MAX, group=self.group)
        return top.tolist()

    def any(self, flag: bool) -> bool:
        """Whether any rank says so: what one rank alone decides is reduced before it is acted on."""
        return self.max([float(flag)])[0] > 0

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        td.broadcast_object_list(box, src=0, device=torch.device("cpu"), group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value in rank order, on every rank."""
        out: list[Any] = [None] * self.world_size
        td.all_gather_object(out, value, group=self.group)
        return out

    def barrier(self) -> None:
        self.sum([0.0])

    def all_reduce_s(self, num_bytes: int) -> float:
        """Seconds of an all-reduce of fp32 between the devices, the fastest of three after a warm-up.

        Raises RuntimeError if the sum is wrong.
        """
        times = []
        for _ in range(4):
            x = torch.full((num_bytes // 4,), float(self.rank + 1), device=self.device)
            self.barrier()
            begin = time.monotonic()
            td.all_reduce(x)
            low, high = x.aminmax()
            span = (float(low), float(high))
            times.append(time.monotonic() - begin)
            if span != (expected := self.world_size * (self.world_size + 1) / 2, expected):
                raise RuntimeError(f"an all-reduce gave {span[0]} to {span[1]} instead of {expected}")
        return min(times[1:])

    def close(self) -> None:
        td.destroy_process_group()


def start(config: DistConfig, env: Env, run_dir: Path, attempt: int, stop: StopRequest) -> Dist:
    """Join the other ranks: rank 0 publishes where it listens, in this attempt's directory."""
    device = choose_device(config, env)
    timeout = datetime.timedelta(seconds=config.timeout_s)
    store = _store(config, env, run_dir, attempt, timeout, stop)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    td.init_process_group(backend, store=store, rank=env.rank, world_size=env.world_size, timeout=timeout)
    shard = config.shard_size or env.world_size
    if env.world_size % shard:
        raise UserError(f"dist.shard_size: {shard} does not divide the number of ranks, {env.world_size}")
    if shard == env.world_size:
        mesh = init_device_mesh(device.type, (shard,), mesh_dim_names=("shard",))
    else:
        names = ("replicate", "shard")
        mesh = init_device_mesh(device.type, (env.world_size // shard, shard), mesh_dim_names=names)
    # Objects and decisions travel over gloo: the CPU part of the default group, or the whole of it.
    group = td.new_group(backend="gloo", timeout=timeout)
    return Dist(env.rank, env.world_size, device, mesh, group, timeout)


def choose_device(config: DistConfig, env: Env) -> torch.device:
    """This rank's GPU, or the CPU where the machine has none or the backend is gloo."""
    if config.backend == "gloo" or (config.backend == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        raise UserError("dist.backend: nccl needs a GPU, and this node shows none")
    if env.local_size > num_gpus and num_gpus > 1:
        raise UserError(
            f"{env.local_size} ranks on {env.node} but only {num_gpus} GPUs: start one task a GPU"
        )
    # Slurm may show each task only its own GPU.
    device = torch.device("cuda", 0 if num_gpus == 1 else env.local_rank)
    torch.cuda.set_device(device)
    return device


def _store(
    config: DistConfig, env: Env, run_dir: Path, attempt: int, timeout: datetime.timedelta, stop: StopRequest
) -> td.Store:
    if env.world_size == 1:
        return td.HashStore()
    if env.rank == 0:
        address = rendezvous.own_address(env.ifname)
        # Port 0: the system gives a free one, so that two jobs on one node never collide.
        store = td.TCPStore(
            address, 0, env.world_size, is_master=True, timeout=timeout, wait_for_workers=False
        )
        rendezvous.publish(run_dir, attempt, address, store.port)
    address, port = rendezvous.wait_for(
        run_dir, attempt, env.rank, env.world_size, config.rendezvous_timeout_s, stop
    )
    if env.rank == 0:
        return store
    return td.TCPStore(
        address, port, env.world_size, is_master=False, timeout=timeout, wait_for_workers=False
    )
