"""What a local cluster is, and the configuration files that say so to Slurm.

A `Spec` (nodes, GPUs, ports, directory) becomes the text of slurm.conf, cgroup.conf and gres.conf: pure
functions, pinned by golden files. The options are those that Slurm 21.08 to 24.05 all accept.
Standard library only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

CPUS_PER_NODE = 16
"""Claimed, whatever the host has: several ranks per node must be schedulable on a laptop."""

MEM_PER_NODE_MIB = 1_000_000
"""Claimed as well, so that a real job's `--mem` is no obstacle. Slurm does not enforce it here."""

GRACE_TIME_S = 30
"""What a preempted job of partition `low` has for its checkpoint."""

KILL_WAIT_S = 10
"""Between TERM and KILL on scancel, requeue and time limit."""


@dataclass(frozen=True)
class Spec:
    """Everything that the configuration files depend on; kept as cluster.json in the cluster's directory."""

    name: str
    directory: str
    host: str
    """Short name of this machine: slurmctld refuses to start under another one."""
    user: str
    num_nodes: int
    gpus_per_node: int
    port: int
    """slurmctld's port; the nodes' slurmd have the ones after it."""
    slurm_version: tuple[int, int]

    def node_names(self) -> list[str]:
        return [f"node{i}" for i in range(1, self.num_nodes + 1)]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Spec:
        fields = json.loads(text)
        fields["slurm_version"] = tuple(fields["slurm_version"])
        return Spec(**fields)


def parse_version(text: str) -> tuple[int, int]:
    """(22, 5) from the answer of `slurmd -V`, "slurm 22.05.8" (distributions write slurm-wlm)."""
    number = text.split()[-1].split(".")
    return int(number[0]), int(number[1])


def munge_socket(directory: str | Path) -> Path:
    return Path(directory) / "munge" / "socket"


def slurm_conf(spec: Spec) -> str:
    """slurm.conf: two partitions, preemption with a grace time, a scheduler that looks every few seconds."""
    return f"""\
# Written by strop's local cluster; `up` writes it anew.
ClusterName={spec.name}
SlurmctldHost={spec.host}(127.0.0.1)
SlurmctldPort={spec.port}
SlurmUser={spec.user}
SlurmdUser={spec.user}

# cred_expire: a requeued job may start again only when its old credentials have expired (120 s by default).
AuthType=auth/munge
AuthInfo=socket={munge_socket(spec.directory)},cred_expire=5

StateSaveLocation={spec.directory}/state
SlurmdSpoolDir={spec.directory}/spool/%n
SlurmctldPidFile={spec.directory}/run/slurmctld.pid
SlurmdPidFile={spec.directory}/run/slurmd-%n.pid
SlurmctldLogFile={spec.directory}/log/slurmctld.log
# One folder a node: slurmd works in it, and its slurmstepd with it, which tells whose they are.
SlurmdLogFile={spec.directory}/log/%n/slurmd.log

# Nothing that needs cgroups, systemd, a database or a mail program.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true

# Nodes may claim more CPUs and memory than this machine has, and come back by themselves after a crash.
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=20
SlurmctldTimeout=20
KillWait={KILL_WAIT_S}
UnkillableStepTimeout=60
MinJobAge=86400
JobRequeue=1

SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=200000,bf_interval=2,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE

{_nodes(spec)}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE \
GraceTime={GRACE_TIME_S}
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def _nodes(spec: Spec) -> str:
    gres = f" Gres=gpu:{spec.gpus_per_node}" if spec.gpus_per_node else ""
    lines = ["GresTypes=gpu"] if spec.gpus_per_node else []
    lines += [
        f"NodeName={node} NodeHostname={spec.host} NodeAddr=127.0.0.1 Port={spec.port + i} "
        f"CPUs={CPUS_PER_NODE} RealMemory={MEM_PER_NODE_MIB}{gres} State=UNKNOWN"
        for i, node in enumerate(spec.node_names(), start=1)
    ]
    return "\n".join(lines)


def cgroup_conf(slurm_version: tuple[int, int]) -> str:
    """cgroup.conf: slurmd loads a cgroup plugin even if nothing uses it, and v2's fails without systemd.

    "disabled" exists since 24.05. Before, v1's plugin touches nothing as long as nobody asks it for a
    controller.
    """
    return "CgroupPlugin=" + ("disabled" if slurm_version >= (24, 5) else "cgroup/v1") + "\n"


def gres_conf(spec: Spec) -> str:
    """gres.conf: GPUs without hardware: empty files in place of devices, since slurmd counts what it sees."""
    lines = [f"Name=gpu File={path}" for path in gpu_files(spec)]
    return "\n".join(["AutoDetect=off", *lines, ""]) if lines else ""


def gpu_files(spec: Spec) -> list[Path]:
    """The empty files; every node has the same ones, as it does not own them anyway."""
    return [Path(spec.directory) / "gpus" / f"gpu{i}" for i in range(spec.gpus_per_node)]
