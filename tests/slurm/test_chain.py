"""What Slurm will not do for a job: successors where it is not requeued, and a controller that is away.

A cluster of its own, since a partition is added and the controller is stopped. The truth is Slurm's: the
states of the jobs of a chain, beside the run's records and the steps that the fake trainer has made.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from strop.slurm import attempts, command, stop
from strop.slurm.local_cluster import LocalCluster
from tests import jobs
from tests.slurm.body_jobs import causes, ended, output, steps, submitting, wait_until

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[LocalCluster]:
    with jobs.cluster_with("chain", "PartitionName=cancel", "PreemptMode=CANCEL") as cluster:
        yield cluster


@pytest.fixture
def submit(own_cluster, tmp_path, monkeypatch):
    yield from submitting(own_cluster, tmp_path, monkeypatch)
    for record in command.parse_jobs(own_cluster.slurm("scontrol", "show", "job")):
        if record["JobState"] in ("PENDING", "RUNNING"):  # the rest of a chain
            own_cluster.slurm("scancel", record["JobId"])


def successors(run: Path) -> list[str | None]:
    return [record.get("successor") for record in attempts.read_all(run)]


def state(job: str) -> str:
    return command.show_job(job)["JobState"]


def test_preemption_that_cancels(submit):
    """The whole job is killed and never runs again; what waited behind it goes on with the same run."""
    args = ["steps=40", "+note=it's here"]
    job = submit("--nodes=2", "--partition=cancel", "--comment=a b", "--output=x-%j.log", *args)
    run = Path(f"runs/dpo-{job}")
    wait_until(lambda: len(steps(run)) >= 3)
    (second,) = successors(run)
    waiting = command.show_job(second)
    # not its Reason, which Slurm writes only when its scheduler has looked
    assert (waiting["JobState"], waiting["NumNodes"]) == ("PENDING", "2-2")
    assert waiting["Dependency"].startswith(f"afterany:{job}")
    assert (waiting["Comment"].strip(), waiting["Partition"]) == ("a b", "cancel")
    assert waiting["StdOut"] == str(Path(f"x-{second}.log").resolve())
    submit("--nodes=2", "--partition=high", "steps=2", "run.name=high")
    assert ended(job)["JobState"] == "PREEMPTED"
    assert ended(second, 90)["ExitCode"] == "0:0"
    assert causes(run) == ["preempted", "done"]
    assert [s["step"] for s in steps(run)] == list(range(1, 41))
    third = successors(run)[1]
    assert [r["target"] for r in attempts.read_all(run)] == [job, second]
    assert state(third) == "CANCELLED"  # each attempt has one; the last one's is taken out of the queue
    assert len({job, second, third}) == 3


def test_what_waits_for_a_cancelled_job_waits_for_its_successor(submit, tmp_path, monkeypatch):
    """Killed without a word: nothing of the job can act then, and afterok alone would end what waits."""
    waiting = tmp_path / "waiting"
    monkeypatch.setenv("STROP_DEPENDANTS", str(waiting))
    job = submit("--nodes=2", "--partition=cancel", "--hold", "steps=30", "run.name=w")
    option = ["--kill-on-invalid-dep=yes", "--parsable", "--output=/dev/null", "--wrap=true"]
    behind = [command.slurm(["sbatch", f"--dependency=afterok:{job}", *option]).strip() for _ in range(2)]
    waiting.write_text(behind[0] + "\n")  # the other one is not told
    command.slurm(["scontrol", "release", job])
    run = Path("runs/w")
    wait_until(lambda: len(steps(run)) >= 3)
    (second,) = successors(run)
    assert command.show_job(behind[0])["Dependency"] == (
        f"afterok:{job}(unfulfilled)?afterok:{second}(unfulfilled)"
    )
    submit("--nodes=2", "--partition=high", "steps=2", "run.name=high-w")
    assert ended(job)["JobState"] == "PREEMPTED"
    assert ended(behind[1])["JobState"] == "CANCELLED"
    assert state(behind[0]) == "PENDING"
    assert ended(second, 90)["ExitCode"] == "0:0"
    assert ended(behind[0])["JobState"] == "COMPLETED"


def test_no_requeue_goes_on_in_a_successor(submit):
    job = submit("--nodes=1", "--no-requeue", "steps=25", "run.name=no")
    run = Path("runs/no")
    wait_until(lambda: len(steps(run)) >= 3)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    assert ended(job)["ExitCode"] == "75:0"
    second = successors(run)[0]
    assert f"job {second} goes on" in output(job)
    assert ended(second)["ExitCode"] == "0:0"
    assert causes(run) == ["time_limit", "done"]
    assert [s["step"] for s in steps(run)] == list(range(1, 26))


def test_users_error_ends_the_chain(submit):
    job = submit("--nodes=1", "--no-requeue", "steps=25", "fail=user", "run.name=user")
    assert ended(job)["ExitCode"] == "78:0"
    (second,) = successors(Path("runs/user"))
    wait_until(lambda: state(second) == "CANCELLED", 5)


def test_scancel_without_the_time_to_commit_ends_the_chain(submit):
    """The parent alone is cancelled, and killed before it could write a record: `end` never runs."""
    job = submit("--nodes=1", "--no-requeue", "steps=600", "hold_commit_s=60", "run.name=hard")
    run = Path("runs/hard")
    wait_until(lambda: len(steps(run)) >= 3)
    (second,) = successors(run)
    subprocess.run(["scancel", job], check=True)
    wait_until(lambda: state(second) == "CANCELLED", 8)  # before KILL
    assert ended(job)["JobState"] == "CANCELLED"
    assert len(attempts.read_all(run)) == 1


def test_controller_away_while_the_job_decides(own_cluster, submit):
    """The job waits for it, and leaves behind what is to be done should it be killed meanwhile."""
    job = submit("--nodes=1", "steps=25", "run.name=away")
    run = Path("runs/away")
    wait_until(lambda: len(steps(run)) >= 3)
    controller = own_cluster.daemons()["slurmctld"]
    os.kill(controller, signal.SIGSTOP)
    try:
        stop.request(run, 1, "by hand")
        pending = run / "requeue_pending"
        wait_until(lambda: pending.exists() and pending.read_text(), 60)
        assert pending.read_text() == f"scontrol requeue {job}\n"
        assert causes(run) == ["stopped"]
    finally:
        os.kill(controller, signal.SIGCONT)
    # The last test of this file: a node's slurmd repeats a message that was lost only after a minute.
    wait_until(lambda: command.show_job(job)["Restarts"] == "1", 30)
    wait_until(lambda: not pending.exists(), 5)
    assert "requeued" in output(job)
