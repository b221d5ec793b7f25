"""The local cluster with its real daemons: two side by side, preempted, broken, repaired, taken down."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from strop.slurm.local_cluster import ClusterError, LocalCluster
from tests.jobs import show, submit, wait_for_job, wait_for_state, wait_for_text

pytestmark = pytest.mark.slurm

LOOP = "#!/bin/bash\necho started ${SLURM_RESTART_COUNT:-0}\nsleep 600\n"


@pytest.fixture(scope="module")
def small() -> Iterator[LocalCluster]:
    """A second cluster: one node with two GPUs, for tests that break things."""
    with tempfile.TemporaryDirectory(prefix="strop-", dir="/tmp") as directory:
        cluster = LocalCluster("small", Path(directory) / "cluster")
        cluster.up(num_nodes=1, gpus_per_node=2)
        yield cluster
        cluster.down()


@pytest.fixture
def loop(tmp_path: Path) -> list[str]:
    """sbatch's arguments for a job that takes a node to itself and says each time it starts."""
    script = tmp_path / "loop.sh"
    script.write_text(LOOP)
    output = tmp_path / "loop.out"
    return ["--exclusive", "--requeue", "--open-mode=append", f"--output={output}", str(script)]


def tool(*args: str) -> subprocess.CompletedProcess[str]:
    repo = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "tools.local_slurm", *args]
    return subprocess.run(command, cwd=repo, capture_output=True, text=True, timeout=60)


def wait_until_saved(cluster: LocalCluster, job: str) -> None:
    """Until slurmctld has written its state: what it accepted in its last seconds dies with it. It writes
    when something has changed, and may have done so before this asks."""
    start = time.time()
    cluster.slurm("scontrol", "update", f"JobId={job}", "Comment=changed")
    state = cluster.directory / "state" / "job_state"
    while not state.exists() or state.stat().st_mtime < start:
        assert time.time() < start + 30
        time.sleep(0.2)


def processes_naming(text: str) -> list[str]:
    """Living processes (zombies aside) with the text in their command line."""
    lines = subprocess.run(["ps", "-eo", "stat=,args="], capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if text in line and not line.startswith("Z")]


def test_second_up_changes_nothing(slurm_cluster):
    before = slurm_cluster.daemons()
    assert set(before) == {"munged", "slurmctld", "node1", "node2"}
    assert slurm_cluster.up() is False
    assert slurm_cluster.daemons() == before


def test_other_size_is_refused(slurm_cluster):
    with pytest.raises(ClusterError, match="has 2 nodes with 0 GPUs each, not 3 with 0: take it down first"):
        slurm_cluster.up(num_nodes=3)


def test_srun_reaches_both_nodes(slurm_cluster):
    names = slurm_cluster.slurm(
        "srun", "--nodes=2", "--ntasks-per-node=4", "/usr/bin/printenv", "SLURMD_NODENAME"
    )
    assert sorted(names.split()) == ["node1"] * 4 + ["node2"] * 4


def test_clusters_side_by_side(slurm_cluster, small, loop):
    job = submit(small, *loop)
    wait_for_state(small, job, "RUNNING")
    assert slurm_cluster.slurm("squeue", "--noheader", "--name=loop.sh") == ""
    small.slurm("scancel", job)
    wait_for_state(small, job, "CANCELLED")


def test_gpus_without_hardware(small):
    assert small.slurm("srun", "--gpus-per-node=2", "/usr/bin/printenv", "SLURM_GPUS_ON_NODE") == "2\n"
    with pytest.raises(ClusterError, match="not available"):
        small.slurm("srun", "--gpus-per-node=3", "/bin/true")


def test_high_preempts_low_which_is_requeued(small, loop, tmp_path):
    small.slurm("scontrol", "update", "PartitionName=low", "GraceTime=3")
    low = submit(small, *loop)
    wait_for_text(tmp_path / "loop.out", "started 0")
    high = submit(
        small, "--partition=high", "--exclusive", f"--output={tmp_path}/high.out", "--wrap", "sleep 2"
    )
    wait_for_job(small, low, lambda fields: fields["JobState"] == "PENDING" and fields["Restarts"] == "1")
    wait_for_state(small, high, "COMPLETED")
    wait_for_text(tmp_path / "loop.out", "started 1")
    small.slurm("scancel", low)


def test_requeue_starts_again_within_15_s(small, loop, tmp_path):
    job = submit(small, *loop)
    wait_for_text(tmp_path / "loop.out", "started 0")
    start = time.monotonic()
    small.slurm("scontrol", "requeue", job)
    wait_for_text(tmp_path / "loop.out", "started 1", timeout_s=30)
    assert time.monotonic() - start < 15
    small.slurm("scancel", job)


@pytest.mark.parametrize(
    ("daemon", "how"),
    [
        ("node1", signal.SIGKILL),
        ("slurmctld", signal.SIGKILL),
        ("munged", signal.SIGKILL),
        ("slurmctld", signal.SIGSTOP),
    ],
)
def test_up_repairs(small, daemon, how, loop, tmp_path):
    job = submit(small, *loop)
    wait_for_text(tmp_path / "loop.out", "started 0")
    wait_until_saved(small, job)
    os.kill(small.daemons()[daemon], how)
    deadline = time.monotonic() + 10
    while not small.problems():
        assert time.monotonic() < deadline
    assert small.problems() == [f"{daemon} does not run"]
    assert small.up() is True
    assert small.problems() == []
    assert show(small, job)["JobState"] == "RUNNING"  # jobs outlive the daemons
    small.slurm("scancel", job)
    wait_for_state(small, job, "CANCELLED")


def test_processes_of_one_node(slurm_cluster, tmp_path):
    script = tmp_path / "two.sh"
    script.write_text("#!/bin/bash\nsrun --ntasks-per-node=1 sh -c 'echo up >&2; sleep 600'\n")
    output = tmp_path / "two.out"
    job = submit(slurm_cluster, "--nodes=2", f"--output={output}", str(script))
    wait_for_text(output, "up\nup\n")
    on_2 = slurm_cluster.job_processes("node2")
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode() for pid in on_2]
    assert re.search(r"slurmstepd: \[\d+\.0\]", " ".join(commands))
    assert sum("sleep 600" in command for command in commands) >= 1
    assert not any("slurm_script" in command for command in commands)  # the batch shell runs on node1
    assert not set(on_2) & set(slurm_cluster.job_processes("node1"))
    slurm_cluster.slurm("scancel", job)
    wait_for_state(slurm_cluster, job, "CANCELLED")


def test_command_line_from_up_to_down(tmp_path):
    with tempfile.TemporaryDirectory(prefix="strop-", dir="/tmp") as parent:
        where = ["--name", "cli", "--dir", f"{parent}/c"]
        assert tool("status", *where).returncode == 1
        assert tool("env", *where).returncode == 1
        # Returns although the daemons live on: they do not hold our pipe.
        first = tool("up", "--nodes", "1", *where)
        assert (first.returncode, first.stderr) == (0, "")
        assert "is up: 1 nodes" in first.stdout
        assert "was up already" in tool("up", *where).stdout
        assert "node1      idle" in tool("status", *where).stdout

        commands = 'sbatch --output=/dev/null --wrap "sleep 600"; sinfo -hN'
        shell = f'eval "{tool("env", *where).stdout.strip()}"; {commands}'
        env = {"PATH": os.environ["PATH"]}
        seen = subprocess.run(["bash", "-c", shell], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert "Submitted batch job 1\nnode1" in seen.stdout, seen
        wait_for_state(LocalCluster("cli", f"{parent}/c"), "1", "RUNNING")

        assert tool("down", *where).returncode == 0
        assert processes_naming(parent) == []
        assert os.listdir(parent) == []
        again = tool("down", *where)
        assert (again.returncode, "nothing to do" in again.stdout) == (0, True)
        assert os.listdir(parent) == []


def test_concurrent_ups_start_one_cluster():
    with tempfile.TemporaryDirectory(prefix="strop-", dir="/tmp") as parent:
        where = ["--name", "race", "--dir", f"{parent}/c"]
        command = [sys.executable, "-m", "tools.local_slurm", "up", "--nodes", "1", *where]
        repo = Path(__file__).resolve().parents[2]
        racers = [subprocess.Popen(command, cwd=repo, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        said = [racer.communicate(timeout=60)[0] for racer in racers]
        assert [racer.returncode for racer in racers] == [0, 0, 0]
        assert sum("was up already" in text for text in said) == 2
        assert len([line for line in processes_naming(f"{parent}/c") if "slurmd" in line]) == 1
        LocalCluster("race", f"{parent}/c").down()


def test_a_daemon_that_fails_shows_its_last_words():
    with tempfile.TemporaryDirectory(prefix="strop-", dir="/tmp") as parent:
        cluster = LocalCluster("broken", f"{parent}/c")
        cluster.up(num_nodes=1)
        os.kill(cluster.daemons()["node1"], signal.SIGKILL)
        cluster.conf.write_text("Nonsense=1\n" + cluster.conf.read_text())
        with pytest.raises(ClusterError, match=r"(?s)node1 .*Nonsense"):
            cluster.up()
        cluster.down()
