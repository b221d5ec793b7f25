"""Jobs on the test cluster, as tests see them: submit, look, wait. Every wait has a limit."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from strop.slurm.local_cluster import LocalCluster


@contextmanager
def cluster_with(name: str, *partition: str) -> Iterator[LocalCluster]:
    """A cluster of two nodes for one module's tests, with one more partition, as scontrol's words give it."""
    folder = Path(tempfile.mkdtemp(prefix="strop-", dir="/tmp"))
    cluster = LocalCluster(name, folder / "cluster")
    cluster.up(num_nodes=2)
    cluster.slurm("scontrol", "create", *partition, "Nodes=ALL", "PriorityTier=1", "State=UP")
    yield cluster
    cluster.down()
    shutil.rmtree(folder)


def submit(cluster: LocalCluster, *args: str) -> str:
    """The id of the job that `sbatch ARGS` makes."""
    return cluster.slurm("sbatch", "--parsable", *args).strip().split(";")[0]


def show(cluster: LocalCluster, job_id: str) -> dict[str, str]:
    """The fields of `scontrol show job`: JobState, Restarts, Reason, ExitCode, ..."""
    words = cluster.slurm("scontrol", "--oneliner", "show", "job", job_id).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def wait_for_job(
    cluster: LocalCluster, job_id: str, condition: Callable[[dict[str, str]], bool], timeout_s: float = 60
) -> dict[str, str]:
    """The job's fields as soon as the condition holds for them."""
    deadline = time.monotonic() + timeout_s
    while not condition(fields := show(cluster, job_id)):
        seen = {key: fields.get(key) for key in ("JobState", "Reason", "Restarts", "ExitCode")}
        assert time.monotonic() < deadline, f"job {job_id} after {timeout_s} s: {seen}"
        time.sleep(0.2)
    return fields


def wait_for_state(cluster: LocalCluster, job_id: str, *states: str, timeout_s: float = 60) -> dict[str, str]:
    """The job's fields as soon as its state is one of these (RUNNING, COMPLETED, ...)."""
    return wait_for_job(cluster, job_id, lambda fields: fields["JobState"] in states, timeout_s)


def wait_for_text(path: Path, text: str, timeout_s: float = 60) -> str:
    """The file's content as soon as it holds the text."""
    deadline = time.monotonic() + timeout_s
    while text not in (content := path.read_text() if path.exists() else ""):
        assert time.monotonic() < deadline, f"{path} after {timeout_s} s without {text!r}:\n{content}"
        time.sleep(0.1)
    return content
