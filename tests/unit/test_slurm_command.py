"""Slurm's answers: texts of `scontrol show job` (22.05), and a controller that is away for a while."""

from __future__ import annotations

import time
import types

import pytest

from strop.slurm import command, decide, evidence

RUNNING = """\
JobId=13 ArrayJobId=12 ArrayTaskId=4 JobName=my job
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   Priority=4294901741 Nice=0 Account=(null) QOS=(null)
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:07 TimeLimit=1-00:00:00 TimeMin=N/A
   PreemptEligibleTime=2026-11-21T21:24:20 PreemptTime=None
   NodeList=node[1-2]
   TRES=cpu=32,node=2,billing=32
   MinCPUsNode=1 MinMemoryNode=0 MinTmpDiskNode=0
   Command=/home/me/strop/sbatch/dpo.sh run.name=x +custom.A=1 Note=two words
   WorkDir=/home/me/with space
   StdOut=/home/me/dpo-13.out
   Power=

JobId=12 ArrayJobId=12 ArrayTaskId=5 JobName=my job
   JobState=COMPLETING Reason=TimeLimit Dependency=(null)
   Requeue=0 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
"""


def test_parse():
    first, second = command.parse_jobs(RUNNING)
    assert first["JobName"] == "my job"
    assert first["Command"] == "/home/me/strop/sbatch/dpo.sh run.name=x +custom.A=1 Note=two words"
    assert first["WorkDir"] == "/home/me/with space"
    assert (first["JobState"], first["PreemptTime"], first["Power"]) == ("RUNNING", "None", "")
    assert (second["JobId"], second["JobState"]) == ("12", "COMPLETING")


@pytest.mark.parametrize(("target", "job"), [("12_4", "13"), ("12_5", "12"), ("13", "13"), ("12", "12")])
def test_the_right_task_of_an_array(monkeypatch, target, job):
    monkeypatch.setattr(command, "slurm", lambda args, deadline_s: RUNNING)
    assert command.show_job(target)["JobId"] == job


def test_state_of_the_job():
    running, completing = command.parse_jobs(RUNNING)
    assert evidence.read_state(running, 0) == decide.JobState()
    state = evidence.read_state(completing, 2)
    assert (state.ended, state.time_limit, state.can_requeue, state.requeued) == (True, True, False, False)
    assert evidence.read_state(completing, 1).requeued
    grace = {**running, "PreemptTime": "2026-11-21T21:24:30"}
    assert evidence.read_state(grace, 0).preempted


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A fake scontrol that refuses `times` times with `message`, then answers "fine"."""

    def make(times: int, message: str) -> list[str]:
        path = tmp_path / "scontrol"
        path.write_text(
            f"#!/bin/bash\necho x >>{tmp_path}/calls\n"
            f"if (( $(wc -l <{tmp_path}/calls) <= {times} )); then echo '{message}' >&2; exit 1; fi\n"
            "echo fine\n"
        )
        path.chmod(0o755)
        return [str(path)]

    pauses: list[float] = []
    monkeypatch.setattr(command, "time", types.SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic))
    make.pauses = pauses
    return make


def test_waits_for_the_controller(scontrol):
    args = scontrol(3, "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    assert command.slurm(args) == "fine\n"
    assert scontrol.pauses == [1.0, 2.0, 4.0]


def test_gives_up_at_the_deadline(scontrol):
    with pytest.raises(command.NoController, match="Unable to contact"):
        command.slurm(scontrol(99, "Unable to contact slurm controller"), deadline_s=0.5)


def test_a_refusal_is_not_repeated(scontrol):
    with pytest.raises(command.SlurmError, match="Requested operation is presently disabled"):
        command.slurm(scontrol(99, "Requested operation is presently disabled"))
    assert scontrol.pauses == []


def test_forgotten_job(monkeypatch, scontrol, tmp_path):
    scontrol(99, "slurm_load_jobs error: Invalid job id specified")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert command.show_job("99") is None


def test_lost_nodes(monkeypatch):
    """States as `scontrol --oneliner show node` (22.05) writes them; only the times are invented."""
    answer = "\n".join(
        f"NodeName={name} Arch=x86_64 OS=Linux #1 SMP State={state} BootTime={time_} SlurmdStartTime={time_}"
        for name, state, time_ in (
            ("n1", "ALLOCATED", "2026-11-22T01:00:00"),
            ("n2", "ALLOCATED", "2026-11-22T01:18:23"),  # back already, but it was away
            ("n3", "ALLOCATED*", "2026-11-22T01:00:00"),
            ("n4", "DOWN+DRAIN", "None"),
            ("n5", "MIXED", "None"),
        )
    )
    monkeypatch.setattr(command, "slurm", lambda args, **_: answer)
    since = time.mktime((2026, 11, 22, 1, 18, 19, 0, 0, -1))
    assert command.lost_nodes(["n1", "n2", "n3", "n4", "n5"], since) == ["n2", "n3", "n4"]
