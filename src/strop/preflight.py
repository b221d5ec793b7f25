"""What is looked at before minutes go into loading a model: this rank's machine, then all of them together.

`check_machine` runs before the ranks meet: the node's first rank writes, syncs, renames and reads back in
the run directory, and every rank multiplies on its GPU. A failure there is this node's: the verdict of phase
"preflight" names it, and the requeue keeps the job off it for a while. `check_together` needs all ranks: the
clocks' offsets go to logs/NNNN/clock.json, by which logs are merged later, and an all-reduce is timed.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time

import torch

from strop import files
from strop.config import DistConfig
from strop.dist import Dist, choose_device
from strop.errors import StorageError, UserError
from strop.models.policy import Policy
from strop.run import Run
from strop.slurm import env

log = logging.getLogger("strop")

CLOCK_ROUNDS = 8
CLOCK_WARNING_S = 2.0
GLOO_BYTES = 4 * 2**20
NCCL_BYTES = 64 * 2**20
MATMUL_SIZE = 1024
READ_ONLY = "can only read {}: mounted so on this node, or so bound into the container (MOUNTS)"
FULL = (errno.ENOSPC, errno.EDQUOT)


class PreflightError(RuntimeError):
    """This node must not be used; the message names the node and the check."""


def check_machine(run: Run, config: DistConfig) -> None:
    """Raises PreflightError for what is wrong with this node, StorageError for a full file system."""
    if run.env.local_rank == 0:
        check_storage(run)
    check_gpu(run, config)


def check_storage(run: Run) -> None:
    """A file goes all the way that a checkpoint's files go."""
    path = run.logs / f"preflight-{run.env.rank:05d}"
    text = os.urandom(1 << 15).hex()
    try:
        files.write_atomic(path, text)
        same = path.read_bytes() == text.encode()
        path.unlink()
    except OSError as error:
        if error.errno in FULL:
            raise StorageError(error.errno, f"{run.dir}: {error.strerror}") from error
        if error.errno == errno.EROFS:  # the attempt's record was written, so it is not so everywhere
            raise PreflightError(f"{run.env.node} {READ_ONLY.format(run.dir)}") from error
        raise PreflightError(f"{run.env.node} cannot use the run directory: {error}") from error
    if not same:
        raise PreflightError(f"{run.env.node} reads other bytes than it wrote in {run.logs}")


def check_gpu(run: Run, config: DistConfig) -> None:
    """The GPU that Slurm gave is there, and multiplies whole numbers without an error."""
    asked = env.num_gpus()
    if config.backend == "gloo" or not (asked or torch.cuda.is_available()):
        return
    if not torch.cuda.is_available():
        raise PreflightError(f"{run.env.node}: Slurm gave it {asked} GPU(s), but torch sees none")
    device = choose_device(config, run.env)
    generator = torch.Generator().manual_seed(run.env.rank)
    a, b = torch.randint(-8, 9, (2, MATMUL_SIZE, MATMUL_SIZE), generator=generator).float()
    try:
        wrong = int((a.to(device) @ b.to(device)).cpu().ne(a @ b).sum())
    except RuntimeError as error:
        raise PreflightError(f"{run.env.node}: GPU {device.index} does not multiply: {error}") from error
    if wrong:
        raise PreflightError(f"{run.env.node}: GPU {device.index} multiplies wrongly in {wrong} places")


def check_together(run: Run, dist: Dist) -> list[str]:
    """Clocks and network, logged by rank 0. Collective. The node of every rank."""
    nodes = dist.gather(run.env.node)
    clocks = clock_offsets(dist)
    ranks = [
        {"rank": rank, "node": node, "offset_s": offset_s, "error_s": error_s}
        for rank, (node, (offset_s, error_s)) in enumerate(zip(nodes, clocks))
    ]
    if dist.is_main:
        files.write_json(run.logs / "clock.json", {"reference_rank": 0, "ranks": ranks})
        for node, (offset_s, _) in dict(zip(nodes, clocks)).items():
            if abs(offset_s) > CLOCK_WARNING_S:
                log.warning("the clock of %s is off by %+.1f s from that of %s", node, offset_s, nodes[0])
    if dist.world_size > 1:
        num_bytes = NCCL_BYTES if dist.device.type == "cuda" else GLOO_BYTES
        seconds = dist.max([dist.all_reduce_s(num_bytes)])[0]
        # Bus bandwidth, as nccl-tests has it: what each link carried, whatever the number of ranks.
        gb_per_s = 2 * (dist.world_size - 1) / dist.world_size * num_bytes / seconds / 1e9
        if dist.is_main:
            spread_ms = 1e3 * max(abs(offset_s) for offset_s, _ in clocks)
            text = (
                "pre-flight: %d ranks on %d nodes, all-reduce of %d MiB at %.2f GB/s, clocks within %.1f ms"
            )
            log.info(text, dist.world_size, len(set(nodes)), num_bytes // 2**20, gb_per_s, spread_ms)
    return nodes


def clock_offsets(dist: Dist) -> list[tuple[float, float]]:
    """(offset in seconds from rank 0's clock, largest error of that) of every rank. Collective.

    Nobody leaves an all-reduce before everybody has entered it. So rank r's clock on leaving, less rank 0's
    on entering, is at least r's offset; the other way round it is at most that. The rounds' intervals are
    intersected, and the middle is taken.
    """
    entered, left = [], []
    for _ in range(CLOCK_ROUNDS):
        dist.barrier()
        entered.append(time.time())
        dist.barrier()
        left.append(time.time())
    times = dist.gather((entered, left))
    entered_0, left_0 = times[0]
    out = [(0.0, 0.0)]
    for entered_r, left_r in times[1:]:
        high = min(r - zero for r, zero in zip(left_r, entered_0))
        low = max(r - zero for r, zero in zip(entered_r, left_0))
        out.append(((low + high) / 2, (high - low) / 2))
    return out


def check_disk(run: Run, policy: Policy, dist: Dist) -> None:
    """Weights and two moments in fp32, once while writing beside the ones that are kept."""
    need = 12 * sum(p.numel() for p in policy.parameters() if p.requires_grad)
    free = dist.broadcast(shutil.disk_usage(run.dir).free)
    if free < need:
        raise UserError(
            f"run.dir: {free / 2**30:.1f} GiB free in {run.dir}, but one checkpoint of this model takes "
            f"{need / 2**30:.1f} GiB"
        )
