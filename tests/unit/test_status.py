"""Runs built by hand as files, at fixed times; states and costs are worked out by hand beside them."""

from __future__ import annotations

import os
import socket

import pytest

from strop.obs import run_files
from strop.slurm import command, lease
from tests.unit.status_runs import CONFIG, T, assess, interrupted


def test_cost_of_an_interruption(run, slurm):
    interrupted(run)
    slurm(JobState="RUNNING", Restarts="1", EndTime="2027-01-15T10:00:00")
    s = assess(run, now=45)
    first, second = s.attempts
    # Step 4 was done at 12 + 3 * 2 = 18 s, the death came at 24 s; step 5 of attempt 2 began at 35 s.
    assert (first.lost_s, first.resume_s, first.repeated_steps, first.steps) == (6.0, 5.0, 2, 6)
    assert (second.lost_s, second.ended, second.cause, second.committed_step) == (None, None, None, 8)
    # Steps 1-8 once: 16 s; attempts ran 24 s and 15 s.
    assert (s.kept_s, s.wall_s, s.queue_s) == (16.0, 45.0, 6.0)
    assert s.effective_ratio == pytest.approx(16 / 39)
    assert (s.state, s.step, s.total_steps, s.eta_s, s.tokens_per_s) == ("validating", 8, 10, 4.0, 50.0)
    run.evaluation(8)
    assert assess(run, now=45).state == "training"


def test_between_two_attempts_nothing_runs(run, slurm):
    """Slurm has started the job again, and its batch shell has not come to `begin` yet."""
    interrupted(run)
    (run.path / "attempts" / "0002.json").unlink()
    slurm(JobState="RUNNING", Restarts="1")
    s = assess(run, now=30)
    assert (s.state, s.attempts[-1].ended, s.wall_s, s.queue_s) == ("starting", T + 24, 30.0, 6.0)


def test_a_dead_run_keeps_only_what_is_committed(run, slurm):
    """Slurm has forgotten the job: nobody goes on. Steps 5 and 6 lie beyond the commit of step 4."""
    run.attempt(1, 0, heartbeat=23)
    run.steps(1, range(1, 7), first_end=12)
    run.commit(4)
    s = assess(run, now=5000)
    assert (s.state, s.kept_s, s.wall_s, s.attempts[0].cause) == ("dead", 8.0, 23.0, "lost")
    assert s.attempts[0].lost_s == 23 - 18
    assert s.next_action.endswith("sbatch --nodes=2 sbatch/dpo.sh run.name=r")
    assert "step 4" in s.next_action


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["run.name=r"], "run.name=r"),
        (["seed=1"], "seed=1 run.name=r"),
        (["run.name=sweep", "seed=1"], "run.name=sweep seed=1 run.name=r"),  # the task of an array
    ],
)
def test_what_to_type_names_the_run(run, slurm, args, said):
    run.attempt(1, 0, args=args)
    assert assess(run, now=5000).next_action.endswith(f"sbatch/dpo.sh {said}")


def test_death_before_the_first_commit_loses_all_steps(run, slurm):
    run.attempt(1, 0, cause="killed", action="requeue", state="FAIL", closed=T + 24)
    run.attempt(2, 30, heartbeat=31)
    run.steps(1, range(1, 7), first_end=12)
    slurm(JobState="RUNNING", Restarts="1")
    s = assess(run, now=33)
    assert (s.attempts[0].lost_s, s.attempts[0].resume_s, s.state) == (14.0, None, "starting")


END = {"state": "FAIL", "closed": T + 9, "cause": "exception"}
CASES = [
    # fields of the last record, Slurm's answer, state, a piece of the next action
    ({}, {"JobState": "RUNNING", "Restarts": "0"}, "starting", "it runs in job 17 on n1, n2"),
    ({}, {"JobState": "RUNNING", "Restarts": "1"}, "starting", "it runs"),
    ({}, {"JobState": "COMPLETING"}, "stopping", "the job ends"),
    ({}, {"JobState": "PENDING", "Reason": "BeginTime"}, "queued", "(BeginTime), Slurm does not know yet"),
    ({}, {"JobState": "PENDING", "Reason": "JobHeldUser"}, "held", "scontrol release 17"),
    ({}, {"JobState": "CANCELLED"}, "cancelled", "submit it again"),
    ({}, {"JobState": "FAILED"}, "dead", "submit it again"),
    ({**END, "action": "requeue"}, {}, "dead", "submit it again"),
    (
        {**END, "action": "requeue"},
        {"JobState": "PENDING", "Reason": "None", "StartTime": "2027-01-15T10:00:00"},
        "queued",
        "pending in the queue, Slurm expects it to start at 2027-01-15T10:00:00",
    ),
    ({**END, "action": "requeue"}, {"JobState": "RUNNING", "Restarts": "0"}, "stopping", "decides"),
    ({**END, "action": "hold"}, {"JobState": "PENDING", "Reason": "JobHeldAdmin"}, "held", "release 17"),
    ({**END, "action": "hold"}, {"JobState": "PENDING", "Reason": "Resources"}, "queued", "Resources"),
    ({**END, "action": "pending"}, {"JobState": "FAILED"}, "pending", "submit it again"),
    ({**END, "action": "pending"}, {"JobState": "PENDING", "Reason": "None"}, "queued", "job 17"),
    ({**END, "action": "stop", "cause": "user"}, {}, "failed", "see to the cause"),
    ({**END, "action": "stop", "cause": "diverged"}, {}, "failed", "start a new run"),
    ({**END, "action": "stop", "cause": "cancelled"}, {}, "cancelled", "to go on"),
    ({**END, "action": "stop", "cause": "time_limit", "state": "YIELD"}, {}, "stopped", "to go on"),
    ({**END, "action": "finished", "cause": "done", "state": "DONE"}, {}, "finished", "convert_dcp_to_hf"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "job", "state", "action"), CASES)
def test_states(run, slurm, fields, job, state, action):
    run.attempt(1, 0, heartbeat=5, **fields)
    slurm(**job)
    s = assess(run, now=10)
    assert s.state == state
    assert action in s.next_action


@pytest.mark.parametrize(
    # what was recorded, the state of the successor (job 18) beside Slurm's other words for it
    ("fields", "behind", "state", "action"),
    [
        ({**END, "action": "successor"}, {"JobState": "PENDING", "Reason": "Dependency"}, "queued", "job 18"),
        ({**END, "action": "successor"}, {"JobState": "RUNNING"}, "starting", "nothing"),
        ({**END, "action": "hold"}, {"JobState": "PENDING", "Reason": "JobHeldUser"}, "held", "release 18"),
        ({}, {"JobState": "PENDING", "Reason": "Priority"}, "queued", "job 18"),  # killed: nothing recorded
        ({**END, "action": "successor"}, {"JobState": "CANCELLED"}, "dead", "submit it again"),
        ({**END, "action": "successor"}, None, "dead", "submit it again"),  # forgotten
    ],
)
def test_a_successor_goes_on_when_the_job_has_ended(run, slurm, monkeypatch, fields, behind, state, action):
    run.attempt(1, 0, **{**fields, "successor": "18"})
    jobs = {"17": {"JobId": "17", "JobState": "COMPLETED"}, "18": behind and {"JobId": "18", **behind}}
    monkeypatch.setattr(command, "show_job", lambda target, deadline_s: jobs[target])
    s = assess(run, 60)
    assert s.state == state
    assert action in s.next_action
    assert s.job_id == ("17" if state == "dead" else "18")


def test_while_the_job_runs_its_successor_is_not_asked_about(run, slurm, monkeypatch):
    run.attempt(1, 0, successor="18")
    monkeypatch.setattr(
        command, "show_job", lambda target, deadline_s: {"17": {"JobId": "17", "JobState": "RUNNING"}}[target]
    )
    assert (assess(run, 60).state, assess(run, 60).job_id) == ("starting", "17")


def test_without_slurm_the_heartbeat_decides(run, monkeypatch):
    monkeypatch.setattr(run_files.shutil, "which", lambda name: None)
    run.attempt(1, 0, heartbeat=100)
    assert assess(run, now=100 + lease.HEARTBEAT_LIMIT_S - 1).state == "starting"
    assert assess(run, now=100 + lease.HEARTBEAT_LIMIT_S + 1).state == "dead"


def test_a_local_run_is_looked_up_by_its_process(run):
    me = os.getpid()
    mine = {"job_id": None, "target": None, "launcher": "local", "host": socket.gethostname(), "pid": me}
    run.attempt(1, 0, **mine, pid_start=lease.process_start(me))
    assert assess(run, now=10).state == "starting"
    run.attempt(1, 0, **mine, pid_start="1")  # a process of that number, but another one
    s = assess(run, now=10)
    assert s.state == "dead"
    assert s.next_action.endswith(
        "STROP_LAUNCHER=local STROP_LOCAL_RANKS=1 bash sbatch/lib.sh dpo run.name=r"
    )


DIRECT = {"launcher": "direct", "job_id": None, "target": None, "state": "FAIL", "reason": "user"}


@pytest.mark.parametrize(
    "refused",
    [
        {**END, "cause": "user", "action": "stop", "summary": "train.seed: 42 -> 43\nwrong"},
        {**DIRECT, "summary": "train.seed: 42 -> 43"},
    ],
)
def test_a_finished_run_stays_finished_when_a_later_start_is_refused(run, slurm, refused):
    """Twice refused, the second time with a command line that asks for more steps."""
    run.attempt(1, 0, state="DONE", cause="done", action="finished", closed=T + 30, max_steps=10)
    run.steps(1, range(1, 11), first_end=12)
    run.commit(10)
    run.attempt(2, 40, committed_step=10, **refused)
    run.attempt(3, 50, committed_step=10, args=["run.name=r", "max_steps=20"], **refused)
    s = assess(run, now=60)
    assert (s.state, s.step, s.total_steps, len(s.attempts)) == ("finished", 10, 10, 3)
    assert s.detail == "a later start was refused: train.seed: 42 -> 43"
    run.steps(3, range(11, 13), first_end=55)  # it did train: then it failed
    assert assess(run, now=60).state == "failed"


def test_a_stopped_run_whose_next_start_is_refused_has_failed(run, slurm):
    """Somebody wanted it to go on, and it does not."""
    run.attempt(1, 0, state="YIELD", cause="stopped", action="stop", closed=T + 30)
    run.attempt(2, 40, state="FAIL", cause="user", action="stop", closed=T + 44)
    assert assess(run, now=60).state == "failed"


def test_a_requeue_that_the_controller_never_took(run, slurm):
    """The command is left behind; whether the controller answers now or not."""
    run.attempt(1, 0, heartbeat=590, state="YIELD", cause="preempted", action="pending", closed=T + 590)
    (run.path / "requeue_pending").write_text("scontrol requeue 17\n")
    s = assess(run, now=600)  # forgotten by Slurm
    assert (s.state, s.next_action.rpartition(": ")[2]) == ("pending", "scontrol requeue 17")
    slurm(JobState="COMPLETED")
    assert assess(run, now=600).state == "pending"
    slurm(JobState="RUNNING", Restarts="1")
    assert assess(run, now=600).state == "starting"


def test_phases(run, slurm):
    run.attempt(1, 0)
    slurm(JobState="RUNNING", Restarts="0")
    run.steps(1, range(1, 4), first_end=5)
    assert assess(run, now=10).state == "training"
    (run.path / "checkpoints" / "step-000003.a1.tmp").mkdir(parents=True)
    assert assess(run, now=10).state == "saving"
    (run.path / "checkpoints" / "step-000003.a1.tmp").rename(run.path / "checkpoints" / "step-000002.a0.tmp")
    assert assess(run, now=10).state == "training"
    run.path.joinpath("attempts", "0001.stop").write_text("USR1\n")
    assert assess(run, now=10).detail == "asked to stop: USR1"


def test_total_steps_of_an_extended_run_and_of_epochs(run, slurm):
    run.attempt(1, 0, args=["run.name=r", "max_steps=25"])
    assert assess(run, now=1).total_steps == 25
    (run.path / "config.yaml").write_text(CONFIG.replace("max_steps: 10", "max_steps: null"))
    run.attempt(1, 0, args=["train.max_epochs=2.5"])
    assert assess(run, now=1).total_steps is None  # the rows are not known yet
    (run.path / "data").mkdir()
    (run.path / "data" / "ledger.json").write_text('{"train": {"used": 9}}')
    assert assess(run, now=1).total_steps == 8  # 9 rows / 4 = 3 steps an epoch, 2.5 of them: 7.5


def test_total_steps_as_rank_0_recorded_them(run, slurm):
    """Also where neither config.yaml nor the command line tells: 10 and 25 here."""
    run.attempt(1, 0, args=["run.name=r", "max_steps=25"], max_steps=17)
    assert assess(run, now=1).total_steps == 17


def test_only_the_last_steps_make_the_eta(run, slurm):
    """40 slow steps, then 32 fast ones: 31 gaps count."""
    (run.path / "config.yaml").write_text(CONFIG.replace("max_steps: 10", "max_steps: 100"))
    run.attempt(1, 0)
    run.steps(1, range(1, 41), first_end=10, step_s=10)
    run.steps(1, range(41, 73), first_end=401, step_s=1)
    slurm(JobState="RUNNING", Restarts="0")
    assert assess(run, now=440).eta_s == 28.0


def test_damaged_files_are_left_out(run, slurm):
    interrupted(run)
    for name in ("timing.jsonl", "metrics.jsonl"):
        with open(run.path / name, "ab") as file:
            file.write(b"[1]\nnot json\n\xff\xfe\n" + b'{"step": 9, "lo')  # the last one torn
    (run.path / "attempts" / "0003.json").write_text('{"attempt": 3, "sta')
    (run.path / "config.yaml").write_text("a: [")
    (run.path / "checkpoints" / "BEST.json").write_text("")
    (run.path / "checkpoints" / "step-000006").mkdir()  # no marker
    (run.path / "checkpoints" / "step-000002.damaged-1").mkdir()
    os.utime(run.path / "attempts" / "0003.json", (T + 50, T + 50))
    s = assess(run, now=60)
    assert (s.step, s.total_steps, len(s.attempts), s.state) == (8, None, 3, "starting")
    assert s.checkpoints.committed == (4, 8)
    assert (s.checkpoints.damaged, s.checkpoints.best) == (("step-000002.damaged-1",), None)
    assert assess(run, now=200).state == "dead"


def test_a_record_of_nothing_but_braces(run, slurm):
    run.attempt(1, 0)
    (run.path / "attempts" / "0001.json").write_text("{}")
    assert assess(run, now=10_000_000).state == "dead"
