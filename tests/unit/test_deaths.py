"""Who was killed, from srun's own words (22.05, as measured on a cluster) and the kernel's counters."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from strop.slurm import attempts, deaths, decide

KILLED = """\
srun: error: node2: task 1: Killed
srun: launch/slurm: _step_signal: Terminating StepId=6.0
slurmstepd-node1: error: *** STEP 6.0 ON node1 CANCELLED AT 2026-11-21T22:01:36 ***
srun: error: node1: task 0: Terminated
"""
FAILED_THEN_KILLED = (
    "srun: error: node1: task 0: Exited with exit code 1\nsrun: error: node2: task 1: Killed\n"
)
EVENT = (
    "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed."
)
OLD_EVENT = "slurmstepd: error: Detected 2 oom-kill event(s) in StepId=7.0 cgroup."  # 21.08
STARVED = f"{EVENT}\nsrun: error: node2: tasks 4-5: Out Of Memory\nsrun: error: node1: tasks 0-3: Killed\n"
PEER = decide.Verdict(0, "node1", "peer", 1, "Connection closed by peer", step=12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("srun: error: node1: task 0: Terminated\n", None),
        (FAILED_THEN_KILLED, (1, "node2", False, "rank 1 on node2: Killed")),  # rank 0 says that it followed
        (FAILED_THEN_KILLED.replace("task 0", "task 2"), None),  # srun's own kill, after another's failure
        (KILLED, (1, "node2", False, "rank 1 on node2: Killed")),
        (STARVED, (4, "node2", True, f"ranks 4-5 on node2: Out Of Memory; {EVENT}")),
        (KILLED + EVENT + "\n", (1, "node2", True, f"rank 1 on node2: Killed; {EVENT}")),
        (OLD_EVENT, (None, None, True, OLD_EVENT)),
    ],
)
def test_words(tmp_path, text, expected):
    """An earlier attempt's lines in the same file do not count."""
    out = tmp_path / "out"
    out.write_text(STARVED)
    record = {"output": [str(out), out.stat().st_size], "oom_kills": deaths.oom_kills()}
    out.write_text(STARVED + text)
    death = deaths.find(tmp_path, record, [PEER])
    assert (death and (death.rank, death.node, death.oom, death.message)) == expected
    assert death is None or death.step == 12


def test_kernels_count_makes_a_kill_an_oom(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.write_text("local_launch: error: vm: task 1: Killed\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n{"step": 4, "loss": 1.0}\n{"st')
    monkeypatch.setattr(deaths, "oom_kills", lambda: 3)
    deaths_before = [deaths.find(tmp_path, {"output": [str(out), 0], "oom_kills": n}, []) for n in (3, 2)]
    assert [(d.oom, d.rank, d.step) for d in deaths_before] == [(False, 1, 4), (True, 1, 4)]


@pytest.mark.parametrize(
    ("line", "file"),
    [
        (
            "0::/system.slice/slurmstepd.scope/job_7/step_batch/user/task_0",
            "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/memory.events",
        ),
        (
            "4:memory:/slurm/uid_0/job_7/step_batch",
            "sys/fs/cgroup/memory/slurm/uid_0/job_7/memory.oom_control",
        ),
        ("0::/", "sys/fs/cgroup/memory.events"),  # in a container
    ],
)
def test_cgroups_of_both_versions(tmp_path, line, file):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"3:cpu:/x\n{line}\n")
    assert deaths.oom_kills(tmp_path) == 0
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text("low 0\noom 5\noom_kill 2\noom_group_kill 0\n")
    assert deaths.oom_kills(tmp_path) == 2


def test_out_of_memory_at_the_same_step_is_the_users(tmp_path):
    """Through the records, as `end` writes them: the second one knows at which step the first one died."""
    death = decide.Death(1, "node2", EVENT, oom=True, step=12)
    facts = decide.Facts("X", 137, verdicts=(PEER,), death=death)
    first = decide.decide(facts)
    assert (first.cause, first.action, first.step) == ("oom", "requeue", 12)
    assert "train.micro_batch_tokens" in first.summary
    attempts.begin(tmp_path, job_id=None, restart_count=0, nodes=["n"])
    attempts.update(tmp_path, 1, state="FAIL", cause=first.cause, action=first.action, step=first.step)
    history = decide.since_progress(attempts.read_all(tmp_path), None)
    again = decide.decide(decide.Facts("X", 137, death=death, history=history))
    assert (again.action, again.exit_code) == ("stop", 78)
    assert (
        decide.decide(
            decide.Facts("X", 137, death=decide.Death(1, "n", "", True, 13), history=history)
        ).action
        == "requeue"
    )


def test_certain_causes_come_first():
    """A rank that the kernel killed is no cause where another one found the disk full or was cancelled."""
    death = decide.Death(1, "node2", EVENT, oom=True)
    for kind, cause in [("storage", "storage"), ("user", "user"), ("exception", "oom"), ("hang", "oom")]:
        verdict = decide.Verdict(0, "n", kind, 1, "m", step=7)
        assert decide.classify(decide.Facts("X", 1, verdicts=(verdict,), death=death)).name == cause
    cancelled = decide.JobState(ended=True)
    assert decide.classify(decide.Facts("X", 1, death=death, job=cancelled)).name == "cancelled"
    assert decide.classify(decide.Facts("DONE", 0, death=death)).name == "done"


def test_space_names_the_file_system(tmp_path):
    text = deaths.describe_space(tmp_path)
    point = next(p for p in [tmp_path, *tmp_path.parents] if os.path.ismount(p))
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize / 2**30
    assert text.startswith(f"{point} (")
    assert abs(float(text.split("): ")[1].split()[0]) - free) < 1.0
    assert deaths.describe_space(Path("/proc")).startswith("/proc (proc)")
