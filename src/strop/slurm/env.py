"""The only reader of os.environ.

Three sides read it. A *rank* reads what its wrapper has set (`read_env`): who it is and which attempt of
which run it belongs to. The *batch host* reads what Slurm says about the job (`read_job`). The rank's
*wrapper* stands between both: it reads what srun, or the local launcher, says about the task
(`read_task`) and turns it into the variables of a rank (`rank_variables`).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from strop.errors import UserError
from strop.slurm import hostlist

OF_THIS_ATTEMPT = {
    *("STROP_RUN_DIR", "STROP_ATTEMPT", "STROP_JOB_ID", "STROP_RESTART_COUNT", "STROP_END_TIME"),
    *("STROP_TASKS_PER_NODE", "STROP_GPUS_PER_NODE", "STROP_NUM_NODES", "STROP_SHELL_PID"),
    *("STROP_LOCAL_RESTARTS", "STROP_SUCCESSOR_JOB", "STROP_LEFT_LOGS"),
}
OF_THIS_SUBMISSION = {
    *("SBATCH_ARRAY_INX", "SBATCH_GRES", "SBATCH_GPUS", "SBATCH_GPUS_PER_NODE", "SBATCH_GPUS_PER_TASK"),
    *("SBATCH_GPUS_PER_SOCKET", "SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_CPU", "SBATCH_EXCLUSIVE"),
    *("SBATCH_REQUEUE", "SBATCH_NO_REQUEUE", "SBATCH_WAIT"),
}


@dataclass(frozen=True)
class Env:
    """What a rank knows about itself before torch is imported."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    node: str
    run_dir: Optional[Path]
    attempt: Optional[int]
    job_id: Optional[str]
    restart_count: int
    end_time: Optional[float]
    """Unix seconds at which Slurm ends the job; None when it has no end."""
    ifname: Optional[str]
    stdout_fd: Optional[int] = None
    """Rank 0's way to the job's output, where its descriptors 1 and 2 go to a file of their own."""
    log_dir: Optional[Path] = None
    """STROP_LOG_DIR: where ranks write their logs first, on the node's own disk."""
    raw_fd: Optional[int] = None
    """The way to the process that writes what comes out of descriptors 1 and 2 (strop.obs.raw_writer)."""


@dataclass(frozen=True)
class Job:
    """What the batch host knows about the job; outside of Slurm `job_id` is None."""

    job_id: Optional[str]
    array_job_id: Optional[str]
    array_task_id: Optional[str]
    restart_count: int
    nodes: tuple[str, ...]
    launcher: str
    """"slurm" or "local"."""
    run_dir: Optional[Path]
    """Of the attempt that has begun; None before."""
    attempt: Optional[int]
    shell_pid: Optional[int]
    """Of the batch shell, which lives exactly as long as the attempt."""
    notify: Optional[str]
    successor_of: Optional[str] = None
    """The job behind which this one was submitted (strop.slurm.successor)."""
    successor_wish: Optional[bool] = None
    """STROP_SUCCESSOR=1 or 0: the user's word on whether there is to be a successor."""
    end_time: Optional[float] = None
    """Of an attempt that has begun, in unix seconds; None when Slurm names no end."""
    log_dir: Optional[Path] = None
    """As in Env."""
    dependants: Optional[Path] = None
    """STROP_DEPENDANTS: file of the jobs that wait for this one (strop.slurm.dependants)."""
    node: str = ""
    """Where this process is."""

    @property
    def target(self) -> Optional[str]:
        """The job's name for scontrol. The number alone of an array's task may mean the whole array."""
        if self.array_job_id and self.array_task_id:
            return f"{self.array_job_id}_{self.array_task_id}"
        return self.job_id


@dataclass(frozen=True)
class Task:
    """One task of srun or of the local launcher."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    node: str
    cpus: Optional[int]
    run_dir: Path
    attempt: int
    python: Optional[str]
    ifname: Optional[str]
    log_dir: Optional[Path] = None
    """As in Env."""


def read_env(environ: Optional[Mapping[str, str]] = None) -> Env:
    """Without STROP_RANK this is a single process that nobody launched: rank 0 of 1, no run directory."""
    e = os.environ if environ is None else environ
    return Env(
        rank=int(e.get("STROP_RANK", 0)),
        world_size=int(e.get("STROP_WORLD_SIZE", 1)),
        local_rank=int(e.get("STROP_LOCAL_RANK", 0)),
        local_size=int(e.get("STROP_LOCAL_SIZE", 1)),
        node=e.get("STROP_NODE") or socket.gethostname(),
        run_dir=Path(e["STROP_RUN_DIR"]) if e.get("STROP_RUN_DIR") and "STROP_RANK" in e else None,
        attempt=int(e["STROP_ATTEMPT"]) if e.get("STROP_ATTEMPT") and "STROP_RANK" in e else None,
        job_id=e.get("STROP_JOB_ID") or None,
        restart_count=int(e.get("STROP_RESTART_COUNT") or 0),
        end_time=float(e["STROP_END_TIME"]) if e.get("STROP_END_TIME") else None,
        ifname=e.get("STROP_IFNAME") or None,
        stdout_fd=int(e["STROP_STDOUT_FD"]) if e.get("STROP_STDOUT_FD") and "STROP_RANK" in e else None,
        log_dir=_log_dir(e) if "STROP_RANK" in e else None,
        raw_fd=int(e["STROP_RAW_FD"]) if e.get("STROP_RAW_FD") and "STROP_RANK" in e else None,
    )


def _log_dir(e: Mapping[str, str]) -> Optional[Path]:
    return Path(e["STROP_LOG_DIR"]) if e.get("STROP_LOG_DIR") else None


def read_job(environ: Optional[Mapping[str, str]] = None) -> Job:
    """The job as the batch host sees it; the local launcher keeps its own restart count."""
    e = os.environ if environ is None else environ
    local = e.get("STROP_LAUNCHER") == "local" or not e.get("SLURM_JOB_ID")
    nodes = hostlist.expand(e.get("SLURM_JOB_NODELIST", "")) if not local else [socket.gethostname()]
    restarts = e.get("STROP_LOCAL_RESTARTS") if local else e.get("SLURM_RESTART_COUNT")
    return Job(
        job_id=None if local else e["SLURM_JOB_ID"],
        array_job_id=None if local else e.get("SLURM_ARRAY_JOB_ID"),
        array_task_id=None if local else e.get("SLURM_ARRAY_TASK_ID"),
        restart_count=int(restarts or 0),
        nodes=tuple(nodes),
        launcher="local" if local else "slurm",
        run_dir=Path(e["STROP_RUN_DIR"]) if e.get("STROP_RUN_DIR") else None,
        attempt=int(e["STROP_ATTEMPT"]) if e.get("STROP_ATTEMPT") else None,
        shell_pid=int(e["STROP_SHELL_PID"]) if e.get("STROP_SHELL_PID") else None,
        notify=e.get("STROP_NOTIFY") or None,
        successor_of=None if local else e.get("STROP_SUCCESSOR_OF") or None,
        successor_wish={"1": True, "0": False}.get(e.get("STROP_SUCCESSOR", "")),
        end_time=float(e["STROP_END_TIME"]) if e.get("STROP_END_TIME") else None,
        log_dir=_log_dir(e),
        dependants=Path(e["STROP_DEPENDANTS"]) if e.get("STROP_DEPENDANTS") and not local else None,
        node=(None if local else e.get("SLURMD_NODENAME")) or socket.gethostname(),
    )


def read_task(environ: Optional[Mapping[str, str]] = None) -> Task:
    """srun's variables; the local launcher sets the same ones, so that there is one way to start a rank.

    `local_size` comes from SLURM_STEP_TASKS_PER_NODE ("4(x2),3"), since nodes may differ.
    """
    e = os.environ if environ is None else environ
    node_index = int(e.get("SLURM_NODEID", 0))
    return Task(
        rank=int(e["SLURM_PROCID"]),
        world_size=int(e["SLURM_NTASKS"]),
        local_rank=int(e["SLURM_LOCALID"]),
        local_size=expand_counts(e["SLURM_STEP_TASKS_PER_NODE"])[node_index],
        node=e.get("SLURMD_NODENAME") or socket.gethostname(),
        cpus=int(e["SLURM_CPUS_PER_TASK"]) if e.get("SLURM_CPUS_PER_TASK") else None,
        run_dir=Path(e["STROP_RUN_DIR"]),
        attempt=int(e["STROP_ATTEMPT"]),
        python=e.get("PYTHON") or None,
        ifname=e.get("STROP_IFNAME") or None,
        log_dir=_log_dir(e),
    )


FRUGAL = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "THP_MEM_ALLOC_ENABLE": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Packed batches differ in shape from step to step. With oneDNN's 1,024 cached kernels and glibc's growing
threshold a rank's memory doubled within 60 steps on CPUs; with the first two it stays. But then every large
tensor is fresh memory, whose page faults took a third of the CPU time: the other two (torch's own, and
glibc's from 2.35 on) ask for huge pages, which leaves a third of the faults and the same memory. With an
`allocator` of its own a rank has neither the growth nor the faults."""


GPU_MEMORY = "expandable_segments:True"
"""PYTORCH_ALLOC_CONF. Packed batches differ in shape: blocks of GPU memory that were cut for one do not fit
the next. Segments that grow have no such left-overs."""


ALLOCATORS = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
LIBRARY_DIRS = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/lib",
)


def allocator(environ: Mapping[str, str], folders: Iterable[str] = LIBRARY_DIRS) -> Optional[str]:
    """tcmalloc's library, where a package or Conda has brought it. It keeps the memory that tensors free, in
    bounds, so the next ones cause no page faults: a step takes a quarter less time than with FRUGAL."""
    conda = environ.get("CONDA_PREFIX")
    places = [*([f"{conda}/lib"] if conda else []), *folders]
    paths = (os.path.join(place, name) for place in places for name in ALLOCATORS)
    return next((path for path in paths if os.path.exists(path)), None)


def rank_variables(task: Task, environ: Mapping[str, str], num_cpus: int) -> dict[str, str]:
    """The environment of a rank: everything it has, plus its STROP_* variables.

    Without OMP_NUM_THREADS every rank of a node would start as many threads as the node has CPUs.
    `num_cpus` is what this process may run on; with no binding that is the whole node.
    """
    share = max(1, num_cpus // task.local_size)
    threads = min(task.cpus, num_cpus) if task.cpus else share
    variables = dict(environ)
    variables.setdefault("OMP_NUM_THREADS", str(threads))
    for name, value in FRUGAL.items():
        variables.setdefault(name, value)
    on_cpu = environ.get("STROP_GPUS_PER_NODE", "0") == "0"
    if not on_cpu and "PYTORCH_CUDA_ALLOC_CONF" not in environ:  # its older name
        variables.setdefault("PYTORCH_ALLOC_CONF", GPU_MEMORY)
    if on_cpu and "LD_PRELOAD" not in environ and (library := allocator(environ)) is not None:
        variables["LD_PRELOAD"] = library
    variables.update(
        STROP_RANK=str(task.rank),
        STROP_WORLD_SIZE=str(task.world_size),
        STROP_LOCAL_RANK=str(task.local_rank),
        STROP_LOCAL_SIZE=str(task.local_size),
        STROP_NODE=task.node,
    )
    if task.ifname:
        variables.setdefault("GLOO_SOCKET_IFNAME", task.ifname)
        variables.setdefault("NCCL_SOCKET_IFNAME", task.ifname)
    return variables


def expand_counts(text: str) -> list[int]:
    """Slurm's short form for a number per node: "4(x2),3" -> [4, 4, 3]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ValueError(f"not a list of counts per node: {text!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def num_gpus(environ: Optional[Mapping[str, str]] = None) -> int:
    """GPUs of this node in the allocation; 0 when Slurm names none.

    Which variable is set depends on how they were asked for (--gpus-per-node, --gres, --gpus, --exclusive).
    """
    e = os.environ if environ is None else environ
    if e.get("SLURM_GPUS_ON_NODE"):
        return int(e["SLURM_GPUS_ON_NODE"])
    if e.get("SLURM_GPUS_PER_NODE"):  # "8", "a100:8" or "a100:4,v100:4"
        return sum(int(part.rsplit(":", 1)[-1]) for part in e["SLURM_GPUS_PER_NODE"].split(","))
    for name in ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):  # indices: "0,1,2" or "0-3"
        if e.get(name):
            return len(hostlist.expand(f"[{e[name]}]"))
    return 0


def num_cpus(environ: Optional[Mapping[str, str]] = None) -> int:
    """CPUs that this process may use: those it is bound to, at most as many as its job has on this node."""
    e = os.environ if environ is None else environ
    cpus = len(os.sched_getaffinity(0))
    return min(cpus, int(e.get("SLURM_CPUS_ON_NODE") or cpus))


def tasks_per_node(environ: Optional[Mapping[str, str]] = None) -> int:
    """One task a GPU; on nodes without GPUs one a node. --ntasks-per-node, if given, is obeyed."""
    e = os.environ if environ is None else environ
    gpus = num_gpus(e)
    asked = e.get("SLURM_NTASKS_PER_NODE")
    if not asked:
        return max(1, gpus)
    if gpus and int(asked) > gpus:
        raise UserError(
            f"--ntasks-per-node={asked}: the allocation has {gpus} GPU(s) on a node; at most one task a GPU"
        )
    return int(asked)


def host_python(environ: Optional[Mapping[str, str]] = None) -> str:
    """HOST_PYTHON: what takes the decisions on batch hosts."""
    e = os.environ if environ is None else environ
    return e.get("HOST_PYTHON") or "python3"


def all_variables() -> dict[str, str]:
    """A copy of the environment, to pass on to a child."""
    return dict(os.environ)


def submission_variables(target: str, environ: Optional[Mapping[str, str]] = None) -> dict[str, str]:
    """The environment for submitting the successor of job `target` from inside of it.

    The job's own SLURM_* would be taken for the new one's, and an attempt's STROP_* are of this attempt. An
    SBATCH_* of the resources that are asked for explicitly would contradict them.
    """
    e = os.environ if environ is None else environ
    kept = {
        name: value
        for name, value in e.items()
        if not (name.startswith("SLURM") or name in OF_THIS_ATTEMPT or name in OF_THIS_SUBMISSION)
    }
    if "SLURM_CONF" in e:
        kept["SLURM_CONF"] = e["SLURM_CONF"]
    return {**kept, "STROP_SUCCESSOR_OF": target}


def local_ranks(environ: Optional[Mapping[str, str]] = None) -> int:
    """How many ranks the local launcher starts."""
    e = os.environ if environ is None else environ
    told = e.get("STROP_LOCAL_RANKS") or "1"
    if not told.isdecimal() or int(told) < 1:
        raise UserError(f"STROP_LOCAL_RANKS is {told!r}; expected how many ranks to start, 1 or more")
    return int(told)
