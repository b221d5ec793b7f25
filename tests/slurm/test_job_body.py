"""The job body on the real local cluster, with a fake trainer: what becomes of a job, however it ends.

The truth is Slurm's: job state, restart count and exit code as `scontrol show job` gives them, beside the
run's own records. A fake trainer is enough, since here only the job is tested.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from strop import submission
from strop.slurm import attempts, command
from tests.slurm.body_jobs import causes, ended, output, steps, submitting, wait_until

pytestmark = pytest.mark.slurm


@pytest.fixture
def submit(slurm_cluster, tmp_path, monkeypatch):
    yield from submitting(slurm_cluster, tmp_path, monkeypatch)


def test_two_nodes_to_the_end(submit):
    job = submit("--nodes=2", "steps=3")
    assert ended(job)["ExitCode"] == "0:0"
    run = Path(f"runs/dpo-{job}")
    record = attempts.read(run, 1)
    assert (record["state"], record["nodes"], record["job_id"]) == ("DONE", ["node1", "node2"], job)
    assert [s["step"] for s in steps(run)] == [1, 2, 3]
    assert len(list((run / "logs/0001").glob("present-*"))) == 2  # one rank a node without GPUs


def test_usr1_yields_requeues_and_finishes(submit):
    """Slurm's --signal=B:USR1@... goes to the batch shell alone; `scancel --batch` sends the same."""
    job = submit("--nodes=2", "steps=25", "run.name=usr1")
    run = Path("runs/usr1")
    wait_until(lambda: len(steps(run)) >= 3)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    record = ended(job)
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("COMPLETED", "0:0", "1")
    assert causes(run) == ["time_limit", "done"]
    assert [s["step"] for s in steps(run)] == list(range(1, 26))  # no step twice, none missing
    assert "requeued" in output(job)
    assert "attempt 2" in output(job)  # appended to, not truncated


def test_preemption_with_grace(submit):
    """TERM goes to the steps only; a job that exits 0 now would never run again, so it requeues itself."""
    job = submit("--nodes=2", "--partition=low", "steps=40", "run.name=low")
    wait_until(lambda: len(steps(Path("runs/low"))) >= 3)
    high = submit("--nodes=2", "--partition=high", "steps=2", "run.name=high")
    assert ended(high)["JobState"] == "COMPLETED"
    record = ended(job)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "1")
    assert causes(Path("runs/low")) == ["preempted", "done"]
    assert [s["step"] for s in steps(Path("runs/low"))] == list(range(1, 41))


def test_scancel_commits_and_is_final(submit):
    job = submit("--nodes=2", "steps=600", "run.name=cancelled")
    run = Path("runs/cancelled")
    wait_until(lambda: len(steps(run)) >= 3)
    subprocess.run(["scancel", job], check=True)
    record = ended(job)
    assert (record["JobState"], record["Restarts"]) == ("CANCELLED", "0")
    wait_until(lambda: causes(run) == ["cancelled"], 15)
    assert attempts.committed_step(run) == steps(run)[-1]["step"]
    assert "not requeued" in output(job)


def test_users_error_is_final_and_readable(submit):
    job = submit("--nodes=2", "steps=50", "fail=user", "rank=1", "message=optim.lrr: unknown key")
    record = ended(job)
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("FAILED", "78:0", "0")
    assert "strop: optim.lrr: unknown key" in output(job).splitlines()
    assert "node2" in output(job)  # which rank, and where


def test_bad_arguments_end_before_any_rank_starts(submit):
    job = submit("run.name=a/b")
    record = ended(job)
    assert (record["JobState"], record["ExitCode"]) == ("FAILED", "78:0")
    assert "run.name='a/b'" in output(job)
    assert not Path("runs").exists()


def test_killed_rank_is_requeued_and_counted(submit):
    job = submit("--nodes=2", "steps=20", "fail=kill", "rank=1", "at=3", "once=1", "run.name=killed")
    record = ended(job, 90)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "1")
    assert causes(Path("runs/killed")) == ["killed", "done"]
    assert "failure 1 of 5" in output(job)
    assert "a rank was killed (rank 1, node2): rank 1 on node2: Killed" in output(job)


def test_segfault_twice_is_final(submit):
    job = submit("--nodes=1", "steps=20", "fail=segv", "run.name=segv")
    record = ended(job, 90)
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("FAILED", "1:0", "1")
    assert causes(Path("runs/segv")) == ["segfault", "segfault"]
    assert re.search(r"Segmentation fault.*fake_trainer\.py", output(job))


def test_requeue_by_hand(submit):
    """The owner's `scontrol requeue`: TERM, then KILL; the ranks commit in between, and nobody asks twice."""
    job = submit("--nodes=2", "steps=40", "run.name=hand")
    run = Path("runs/hand")
    wait_until(lambda: len(steps(run)) >= 3)
    subprocess.run(["scontrol", "requeue", job], check=True)
    record = ended(job)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "1")
    assert causes(run) == ["requeued", "done"]
    assert [s["step"] for s in steps(run)] == list(range(1, 41))


def test_no_requeue_and_no_successor_ends_with_75(submit, monkeypatch):
    monkeypatch.setenv("STROP_SUCCESSOR", "0")
    job = submit("--nodes=1", "--no-requeue", "steps=600", "run.name=no")
    wait_until(lambda: len(steps(Path("runs/no"))) >= 3)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    record = ended(job)
    assert (record["JobState"], record["ExitCode"]) == ("FAILED", "75:0")
    again = submit("--nodes=1", "--no-requeue", f"steps={len(steps(Path('runs/no'))) + 2}", "run.name=no")
    assert ended(again)["ExitCode"] == "0:0"  # the same name goes on where it stands


def test_array_tasks_are_runs_of_their_own(submit):
    array = submit("--nodes=1", "--array=3-4", "steps=8")
    for task in ("3", "4"):
        wait_until(lambda: len(steps(Path(f"runs/dpo-{array}_{task}"))) >= 2)  # noqa: B023
    # The number of one task equals the array's: a requeue of it must not touch the other.
    subprocess.run(["scancel", "--batch", "--signal=USR1", f"{array}_4"], check=True)
    assert ended(f"{array}_3")["Restarts"] == "0"
    assert ended(f"{array}_4")["Restarts"] == "1"
    assert causes(Path(f"runs/dpo-{array}_4")) == ["time_limit", "done"]
    assert causes(Path(f"runs/dpo-{array}_3")) == ["done"]


def test_array_with_a_name_makes_a_run_of_each_task(submit):
    array = submit("--nodes=1", "--array=3-4", "steps=2", "run.name=x")
    assert {ended(f"{array}_{task}")["ExitCode"] for task in (3, 4)} == {"0:0"}
    assert sorted(path.name for path in Path("runs").glob("x*")) == ["x-3", "x-4"]
    again = submit("--nodes=1", "--array=4", "steps=3", "run.name=x")
    assert ended(f"{again}_4")["ExitCode"] == "0:0"
    assert [step["attempt"] for step in steps(Path("runs/x-4"))] == [1, 1, 2]  # it went on


def test_second_job_of_a_living_run_is_refused(submit):
    job = submit("--nodes=1", "steps=600", "run.name=shared")
    wait_until(lambda: steps(Path("runs/shared")))
    second = submit("--nodes=1", "steps=600", "run.name=shared")
    assert ended(second)["ExitCode"] == "1:0"
    assert f"in use by job {job} (RUNNING)" in output(second)
    assert len(attempts.read_all(Path("runs/shared"))) == 1


def test_time_limit(submit):
    """The real thing once: Slurm's own signal before the end of --time=1. It may come up to 60 s early."""
    job = submit("--nodes=1", "--time=1", "--signal=B:USR1@50", "steps=400", "run.name=limit")
    record = ended(job, 180)
    assert (record["JobState"], record["ExitCode"]) == ("COMPLETED", "0:0")
    assert int(record["Restarts"]) >= 1
    assert set(causes(Path("runs/limit"))) == {"time_limit", "done"}
    assert [s["step"] for s in steps(Path("runs/limit"))] == list(range(1, 401))


def test_too_little_time_to_commit(submit):
    """The commit takes longer than there is: killed, requeued, and the next one starts from what is there."""
    job = submit("--nodes=2", "--partition=low", "steps=40", "hold_commit_s=60", "run.name=slow")
    run = Path("runs/slow")
    wait_until(lambda: len(steps(run)) >= 3)
    wait_until(lambda: command.show_job(job)["JobState"] == "RUNNING")
    subprocess.run(["scontrol", "requeue", job], check=True)  # KillWait is all the time there is
    wait_until(lambda: len(attempts.read_all(run)) == 2, 60)
    first = attempts.read(run, 1)
    assert first["state"] in ("X", "FAIL")
    assert first.get("cause", "requeued") == "requeued"
    assert attempts.committed_step(run) is None
    assert steps(run)[-1]["attempt"] in (1, 2)


def test_through_tools_submit(submit):
    """submitit's sbatch file runs the same body: a signal, a requeue, and the job's exit code."""
    Path("c.yaml").write_text("model:\n  path: m\ndata:\n  train: x.jsonl\n")
    job = submission.submit(
        "sft", ["--config", "c.yaml", "+metadata.steps=25", "run.name=s"], nodes=2, time="00:10:00"
    )
    assert isinstance(job, submission.Job)
    assert job.run_dir == Path("runs/s").resolve()
    wait_until(lambda: len(steps(job.run_dir)) >= 3)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job.job_id], check=True)
    states: list[str] = []
    assert job.wait(states.append) == 0
    assert causes(job.run_dir) == ["time_limit", "done"]
    assert any("PENDING" in line for line in states)
    assert "attempt 2" in job.output.read_text()


def test_node_that_failed_the_preflight_check_is_left_out(submit):
    job = submit("--nodes=1", "steps=5", "fail=exception", "phase=PREFLIGHT", "once=1", "run.name=node")
    record = ended(job, 90)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "1")
    first, second = attempts.read_all(Path("runs/node"))
    assert first["exclude"] == first["nodes"]
    assert second["nodes"] != first["nodes"]
    assert record["ExcNodeList"] == first["nodes"][0]


def test_storage_error_is_held_until_somebody_makes_room(submit, monkeypatch):
    """And STROP_NOTIFY: told that it is held, told that it is done, and its output is no answer to lib.sh."""
    monkeypatch.setenv("STROP_NOTIFY", "cat >>told; echo requeue 0")
    job = submit("--nodes=2", "steps=8", "fail=storage", "message=disk full", "once=1", "run.name=full")
    record = wait_until(lambda: held(job))
    assert (record["JobState"], record["Restarts"]) == ("PENDING", "1")
    first = attempts.read(Path("runs/full"), 1)
    assert (first["cause"], first["action"], first["exit_code"]) == ("storage", "hold", 74)
    told = Path("told").read_text()
    assert f"scontrol release {job}" in told
    assert re.search(r"GiB free", told)
    subprocess.run(["scontrol", "release", job], check=True)
    assert ended(job)["ExitCode"] == "0:0"
    assert causes(Path("runs/full")) == ["storage", "done"]
    assert Path("told").read_text().count("attempt ") == 2


def held(job: str) -> dict[str, str] | None:
    record = command.show_job(job)
    there = record and record["JobState"] == "PENDING"  # COMPLETING first
    return record if there and "held" in record["Reason"].lower() else None
