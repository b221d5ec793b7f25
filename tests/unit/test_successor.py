"""The submission of a successor, word by word, and when it stands down. Slurm's texts are 22.05's."""

from __future__ import annotations

import os

import pytest

from strop.slurm import attempts, body, code, command, env, successor

RECORD = """\
JobId=13 ArrayJobId=12 ArrayTaskId=4 JobName=my job
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   Priority=4294901741 Nice=0 Account=physics QOS=(null)
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=0 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:07 TimeLimit=1-00:00:00 TimeMin=N/A
   Partition=low AllocNode:Sid=localhost:24061
   ReqNodeList=(null) ExcNodeList=n[3-4]
   NumNodes=2 NumCPUs=32 NumTasks=4 CPUs/Task=8 ReqB:S:C:T=0:0:*:*
   Socks/Node=* NtasksPerN:B:S:C=2:0:*:* CoreSpec=*
   MinCPUsNode=1 MinMemoryNode=100M MinTmpDiskNode=0
   Features=a100&ib DelayBoot=00:00:00
   OverSubscribe=NO Contiguous=0 Licenses=(null) Network=(null)
   Command=/home/me/strop/sbatch/dpo.sh max_steps=3
   WorkDir=/home/me/with space
   Comment=two words
   StdErr=/home/me/logs-12_4/dpo-12_4.out
   StdOut=/home/me/logs-12_4/dpo-12_4.out
   TresPerNode=gres:gpu:a100:2
   MailUser=me MailType=END,FAIL
"""
SCRIPT = """\
#!/bin/bash
# a comment
#SBATCH --job-name=dpo
#SBATCH --gres=gpu:8 --signal=B:USR1@600
#SBATCH -p low -a 0-9 --switches 2   # a comment
##SBATCH --time=1

module load cuda
#SBATCH --nodes=7
exec bash lib.sh
"""


def test_options_are_those_of_the_running_job():
    (record,) = command.parse_jobs(RECORD)
    assert successor.options(record, "12_4") == [
        *("--job-name=my job", "--partition=low", "--account=physics", "--constraint=a100&ib"),
        *("--exclude=n[3-4]", "--nodes=2", "--ntasks=4", "--time=1-00:00:00", "--mail-user=me"),
        *("--mail-type=END,FAIL", "--comment=two words", "--chdir=/home/me/with space"),
        *("--gres=gpu:a100:2", "--ntasks-per-node=2", "--cpus-per-task=8", "--mem=100M", "--exclusive"),
        *("--no-requeue", "--output=/home/me/logs-12_4/dpo-%j.out", "--open-mode=append", "--export=ALL"),
        "--dependency=afterany:12_4",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "option"),
    [
        ({"TresPerJob": "gres:gpu:8"}, "--gpus=8"),
        ({"TresPerNode": "gres/gpu:h100:8"}, "--gres=gpu:h100:8"),  # 23.11 writes a slash
        ({"TresPerTask": "cpu=4,gres/gpu=1"}, "--gpus-per-task=1"),  # and 24.05 the CPUs as well
        ({"MinMemoryCPU": "2G"}, "--mem-per-cpu=2G"),
        ({"OverSubscribe": "USER"}, "--exclusive=user"),
        ({"Requeue": "1"}, "--requeue"),
        ({"StdOut": "/a/130-13-x13", "StdErr": "/a/e13"}, "--output=/a/130-%j-x%j"),
        ({"StdOut": "/a/o", "StdErr": "/a/e13"}, "--error=/a/e%j"),
    ],
)
def test_option(fields, option):
    assert option in successor.options({"JobId": "13", **fields}, "13")


def test_script_keeps_the_lines_that_slurm_cannot_tell():
    """What is of this one job (the array), or would contradict what the controller says, is left out."""
    text = successor.body_script(SCRIPT, ["dpo", "run.name=x", "a=it's"])
    lib = code.REPOSITORY / "sbatch/lib.sh"
    assert text.splitlines() == [
        "#!/usr/bin/env bash",
        "#SBATCH --job-name=dpo",
        "#SBATCH --signal=B:USR1@600",
        "#SBATCH -p low",
        "#SBATCH --switches 2",
        f"""exec bash {lib} dpo run.name=x 'a=it'"'"'s'""",
    ]


def test_environment_is_the_users_and_not_the_jobs():
    inside = {"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "2", "SLURM_CONF": "/c", "STROP_ATTEMPT": "1"}
    kept = {
        "HF_HOME": "/h",
        "PYTHON": "p",
        "STROP_NOTIFY": "n",
        "SBATCH_ACCOUNT": "a",
        "STROP_SUCCESSOR": "1",
    }
    inside.update(kept, STROP_SUCCESSOR_OF="3", SBATCH_GPUS_PER_NODE="8")
    assert env.submission_variables("7", inside) == {**kept, "SLURM_CONF": "/c", "STROP_SUCCESSOR_OF": "7"}


@pytest.mark.parametrize(
    ("fields", "mode", "wish", "expected"),
    [
        ({}, "REQUEUE", None, False),
        ({}, "CANCEL", None, True),
        ({}, "GANG,CANCEL", None, True),
        ({}, "OFF", None, False),
        ({"Requeue": "0"}, "REQUEUE", None, True),
        ({"Requeue": "0"}, "CANCEL", False, False),
        ({}, "REQUEUE", True, True),  # a QOS that cancels
        ({"BatchFlag": "0", "Requeue": "0"}, "CANCEL", True, False),  # salloc: there is no script
        ({"HetJobId": "12"}, "CANCEL", True, False),
    ],
)
def test_needed(monkeypatch, fields, mode, wish, expected):
    monkeypatch.setattr(command, "slurm", lambda args: f"   OverTimeLimit=NONE PreemptMode={mode}\n")
    record = {"Partition": "low", "Requeue": "1", "BatchFlag": "1", **fields}
    assert successor.needed(record, wish) is expected


def job(job_id="8", of="7"):
    return env.Job(job_id, None, None, 0, ("n1",), "slurm", None, None, os.getpid(), None, of)


@pytest.mark.parametrize(
    ("record", "state", "expected"),
    [
        ({"state": "FAIL", "cause": "preempted", "action": "successor"}, "PREEMPTED", None),
        ({"state": "YIELD", "cause": "time_limit", "action": "successor"}, "FAILED", None),
        ({}, "PREEMPTED", None),  # killed at once, no record
        ({}, "NODE_FAIL", None),
        ({}, None, None),  # Slurm has forgotten the job
        ({}, "CANCELLED", "was cancelled"),
        (
            {"state": "YIELD", "action": "requeue"},
            "CANCELLED",
            "was cancelled",
        ),  # while it waited in the queue
        ({"state": "FAIL", "cause": "user", "action": "stop"}, "FAILED", "has ended with job 7: user"),
        ({"state": "DONE"}, "NODE_FAIL", "has ended with job 7: done"),
        ({"state": "FAIL", "action": "hold"}, "FAILED", None),  # it was held as well, and released
        ({"target": "9"}, "FAILED", "taken over by job 9"),
    ],
)
def test_stand_down(tmp_path, monkeypatch, record, state, expected):
    monkeypatch.setattr(command, "show_job", lambda target: state and {"JobState": state})
    attempts.begin(tmp_path, job_id="7", restart_count=0, nodes=["n1"], target="7")
    attempts.update(tmp_path, 1, **record)
    line = successor.stand_down(job(), tmp_path, attempts.read_all(tmp_path))
    assert line is None if expected is None else expected in line
    others = [job(of=None), job("7", of="3")]  # no successor; one that was requeued after it had begun
    if not record.get("target"):
        assert [successor.stand_down(j, tmp_path, attempts.read_all(tmp_path)) for j in others] == [
            None,
            None,
        ]


def test_a_removed_run_is_not_begun_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(body.NothingToDo, match="runs/x is gone"):
        body.begin("dpo", ["run.name=x"], job())
    assert not (tmp_path / "runs").exists()


def test_predecessor_whose_shell_the_kernel_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "show_job", lambda target: {"JobState": "OUT_OF_MEMORY"})
    attempts.begin(tmp_path, job_id="7", restart_count=0, nodes=["n1"], target="7")
    assert successor.stand_down(job(), tmp_path, attempts.read_all(tmp_path)) is None
    assert attempts.read(tmp_path, 1)["cause"] == "oom"
