"""Logs of a real job whose ranks write to their nodes' own disk, and one of which is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from strop.obs import log_files
from strop.slurm import attempts
from tests.log_lines import read
from tests.slurm.body_jobs import causes, ended, output, submitting, wait_until

PASSWORD = "correct-horse-battery"

pytestmark = pytest.mark.slurm


@pytest.fixture
def submit(slurm_cluster, tmp_path, monkeypatch):
    yield from submitting(slurm_cluster, tmp_path, monkeypatch)


def test_what_a_killed_rank_had_written_is_collected(submit, tmp_path, monkeypatch):
    """Rank 1 is killed long before it copies its files by itself. The two nodes of the test cluster are one
    machine and so share the disk: each finds what the other has not yet collected."""
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setenv("STROP_LOG_DIR", str(disk))
    monkeypatch.setenv("STROP_TEST_PYTHON", sys.executable)
    monkeypatch.setenv("DB_PASSWORD", PASSWORD)
    words = ["run.name=r", "log=1", "steps=6", "fail=kill", "rank=1", "at=3", "once=1"]
    job = submit("--nodes=2", *words, f"+metadata.api_key={PASSWORD}")
    assert ended(job, 240)["JobState"] == "COMPLETED", output(job)
    run = Path("runs/r").resolve()
    assert causes(run) == ["killed", "done"], output(job)
    assert list(disk.iterdir()) == [], output(job)
    assert "strop: logs:" not in output(job)
    for attempt, goals in ((1, (3, 3)), (2, (6, 6))):
        for rank in (0, 1):
            lines = read(run / f"logs/{attempt:04d}", rank)
            assert {(line["attempt"], line["rank"], line["node"]) for line in lines} == {
                (attempt, rank, f"node{rank + 1}")
            }
            said = [line["message"] for line in lines if line["message"].startswith("step")]
            assert said == [f"step {i} of 6" for i in range(1, goals[rank] + 1)]
            times = [line["time"] for line in lines]
            assert times == sorted(times)
            assert (run / f"logs/{attempt:04d}/rank{rank:05d}.err").is_file()
    for i in range(1, 7):
        assert f"step {i} of 6" in output(job)  # rank 0's, which it also says in the job's output
    assert PASSWORD not in output(job) + json.dumps(attempts.read_all(run))
    assert attempts.read(run, 1)["args"][-1] == "+metadata.api_key=[secret]"


@pytest.mark.parametrize("kind", ["segv", "kill", "exception"])
def test_no_secret_of_a_dying_rank_reaches_a_disk(submit, tmp_path, monkeypatch, kind):
    """Written by C past Python, whole and in halves, the last time just before the end. The words around it
    are there, and Slurm's own view of the end is that of a rank without a writer."""
    monkeypatch.setenv("DB_PASSWORD", PASSWORD)
    monkeypatch.setenv("STROP_TEST_PYTHON", sys.executable)
    words = ["run.name=r", "log=1", "steps=4", f"fail={kind}", "rank=1", "at=2", "once=1", "leak=DB_PASSWORD"]
    job = submit("--nodes=2", *words)
    assert ended(job, 240)["JobState"] == "COMPLETED", output(job)
    cause = {"segv": "segfault", "kill": "killed"}.get(kind, kind)
    assert causes(Path("runs/r")) == [cause, "done"], output(job)
    raw = Path("runs/r/logs/0001/rank00001.err").read_text()
    assert raw.startswith("before [secret] after\nhalf: [secret] done\nlast words [secret]"), raw
    assert ("Segmentation fault" in raw) == (kind == "segv")
    for path in [p for p in tmp_path.rglob("*") if p.is_file()]:
        assert PASSWORD.encode() not in path.read_bytes(), path
    assert PASSWORD not in output(job)


def test_logs_that_cannot_be_collected_do_not_keep_the_job_from_its_end(submit, tmp_path, monkeypatch):
    """A directory stands where one copy of the second attempt should go."""
    assert ended(submit("run.name=r", "steps=1"), 240)["JobState"] == "COMPLETED"
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "runs/r/logs/0002/rank00000.jsonl").mkdir(parents=True)
    monkeypatch.setenv("STROP_LOG_DIR", str(disk))
    monkeypatch.setenv("STROP_TEST_PYTHON", sys.executable)
    job = submit("--nodes=2", "run.name=r", "log=1", "steps=2")
    assert ended(job, 240)["JobState"] == "COMPLETED", output(job)
    assert causes(Path("runs/r")) == ["done", "done"]
    assert "Is a directory" in output(job)
    assert f"logs were left on the nodes, in {disk}" in output(job)
    assert (disk / "r/0002/rank00000.jsonl").is_file()
    assert (tmp_path / "runs/r/logs/0002/rank00001.err").is_file()  # the others are copied all the same


def test_what_a_killed_job_left_on_its_nodes_is_fetched_by_the_next_attempt(submit, tmp_path, monkeypatch):
    """The batch shell is killed with its ranks, long before they copy anything by themselves."""
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setenv("STROP_LOG_DIR", str(disk))
    monkeypatch.setenv("STROP_TEST_PYTHON", sys.executable)
    job = submit("--nodes=2", "run.name=r", "log=1", "steps=600", "step_s=0.3")
    local = disk / "r/0001"
    wait_until(lambda: all((local / f"rank0000{r}.jsonl").exists() for r in (0, 1)), 120)
    wait_until(lambda: len(read(local, 1)) > 2, 60)
    subprocess.run(["scancel", "--full", "--signal=KILL", job], check=True)
    ended(job, 120)
    written = {path.name: path.read_bytes() for path in local.iterdir()}
    run = Path("runs/r")
    assert any(f"newer lines may lie on node1, node2, in {local}" in n for n in log_files.find(run).notes)
    job = submit("--nodes=2", "run.name=r", "log=1", "steps=1")
    assert ended(job, 240)["JobState"] == "COMPLETED", output(job)
    assert list(disk.iterdir()) == [], output(job)
    assert {name: (run / "logs/0001" / name).read_bytes() for name in written} == written
    assert not any("newer lines" in note for note in log_files.find(run).notes)
