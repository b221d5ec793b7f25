"""What becomes of a tool's job: the decisions of slurm.md's table, for jobs without a run directory."""

from __future__ import annotations

import dataclasses

import pytest

from strop.slurm import command, env, tool_end
from strop.slurm.decide import JobState

RUNNING = JobState()
SCANCEL = JobState(ended=True)
NO_REQUEUE = JobState(can_requeue=False)


@pytest.mark.parametrize(
    ("state", "exit_code", "signals", "starts", "expected"),
    [
        (RUNNING, 1, [], 1, ("stop", 1)),  # an error of its own
        (RUNNING, 137, [], 1, ("stop", 137)),
        (RUNNING, 143, ["USR1"], 1, ("requeue", 75)),
        (RUNNING, 137, ["USR1"], 2, ("requeue", 75)),  # it did not end by itself
        (RUNNING, 143, ["USR1"], 3, ("stop", 75)),  # nothing finished
        (RUNNING, 75, ["USR1"], 30, ("requeue", 75)),  # something finished
        (JobState(preempted=True), 143, [], 30, ("requeue", 75)),  # TERM to the step of a container
        (JobState(preempted=True, ended=True, requeued=True), 143, ["TERM"], 3, ("requeue", 75)),
        (RUNNING, 143, [], 1, ("requeue", 75)),
        (JobState(known=False), 143, [], 1, ("requeue", 75)),
        (JobState(known=False), 143, ["TERM"], 1, ("stop", 143)),
        (SCANCEL, 143, ["TERM"], 1, ("stop", 143)),
        (SCANCEL, 75, ["USR1", "TERM"], 1, ("stop", 75)),
        (JobState(ended=True, time_limit=True), 143, ["TERM"], 1, ("requeue", 75)),  # USR1 never came
        (NO_REQUEUE, 143, ["USR1"], 1, ("stop", 75)),
    ],
)
def test_decisions(state, exit_code, signals, starts, expected):
    ending = tool_end.judge(state, exit_code, signals, starts)
    assert (ending.action, ending.exit_code) == expected


@pytest.fixture
def job() -> env.Job:
    return env.read_job({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": "1"})


@pytest.fixture
def asked(monkeypatch):
    """The Slurm commands that were run; what scontrol requeue answers."""
    words: list[list[str]] = []
    answer: list[Exception] = []

    def slurm(args, **_):
        words.append(list(args))
        if args[1].startswith("requeue") and answer:
            raise answer[0]
        return "JobId=7 JobState=RUNNING Requeue=1 BatchFlag=1 Restarts=1 PreemptTime=None"

    monkeypatch.setattr(command, "slurm", slurm)
    return words, answer


def test_what_needs_no_answer_of_slurm(job, asked):
    words, _ = asked
    assert tool_end.end(job, 0, ["USR1"]).exit_code == 0
    assert tool_end.end(job, 78, ["USR1"]).exit_code == 78
    assert tool_end.end(dataclasses.replace(job, job_id=None), 143, ["USR1"]).exit_code == 143
    assert words == []


def test_full_disk_holds_the_job(job, asked):
    words, _ = asked
    ending = tool_end.end(job, 74, [])
    assert (ending.exit_code, ending.words) == (74, "held: make room, then: scontrol release 7")
    assert words == [["scontrol", "requeuehold", "7"]]


def test_requeue_refused(job, asked):
    words, answer = asked
    assert tool_end.end(job, 143, ["USR1"]).action == "requeue"
    answer.append(command.SlurmError("scontrol requeue 7: Job is pending execution"))
    assert tool_end.end(job, 143, ["USR1"]).action == "requeue"  # it is there already
    answer[:] = [command.SlurmError("scontrol requeue 7: Requested operation is presently disabled")]
    ending = tool_end.end(job, 143, ["USR1"])
    assert (ending.action, ending.exit_code) == ("stop", 75)
    assert ending.words.splitlines() == [
        "time limit near; what is finished is kept",
        "not requeued: scontrol requeue 7: Requested operation is presently disabled",
    ]
    assert words[-1] == ["scontrol", "requeue", "7"]
