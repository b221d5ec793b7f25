"""Logs of a real job whose ranks write to their nodes' own disk, and one of which is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from strop.slurm import attempts
from strop.slurm.local_cluster import LocalCluster
from tests import jobs, toy
from tests.log_lines import read
from tests.processes import pid_of_rank, steps

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "correct-horse-battery"

pytestmark = pytest.mark.slurm


def test_a_killed_ranks_log_is_collected(slurm_cluster: LocalCluster, tmp_path, monkeypatch):
    """What rank 1 had written when it was killed is all in the run directory afterwards, and a second attempt
    goes on. The two nodes of the test cluster are one machine, and so share the disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setenv("SLURM_CONF", slurm_cluster.environment()["SLURM_CONF"])
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("STROP_LOG_DIR", str(disk))
    monkeypatch.setenv("DB_PASSWORD", PASSWORD)
    monkeypatch.chdir(tmp_path)
    config = toy.config(
        toy.make(tmp_path / "toy"), "dpo", Path("c.yaml"), train={"max_steps": 30}, checkpoint={"every": 5}
    )
    words = ["--nodes=2", str(ROOT / "sbatch/dpo.sh"), "--config", str(config), "run.name=r"]
    job = jobs.submit(slurm_cluster, *words, f"+metadata.note={PASSWORD}", "log.level=debug")
    run = Path("runs/r").resolve()
    try:
        deadline = time.monotonic() + 240
        while not steps(run) or steps(run)[-1]["step"] < 7:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(pid_of_rank(run, 1), signal.SIGKILL)
        written = {path.name: path.read_bytes() for path in (disk / "r/0001").glob("rank00001*")}
        fields = jobs.wait_for_state(slurm_cluster, job, "COMPLETED", "FAILED", timeout_s=300)
    finally:
        subprocess.run(["scancel", job], capture_output=True)
    output = Path(f"dpo-{job}.out").read_text()
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), output
    assert [record["cause"] for record in attempts.read_all(run)] == ["killed", "done"]
    assert list(disk.iterdir()) == [], output
    assert sorted(written) == ["rank00001.err", "rank00001.jsonl"]
    for name, content in written.items():
        assert (run / "logs/0001" / name).read_bytes() == content
    for attempt in (1, 2):
        for rank in (0, 1):
            lines = read(run / f"logs/{attempt:04d}", rank)
            assert {(line["attempt"], line["rank"]) for line in lines} == {(attempt, rank)}
            assert {line["node"] for line in lines} == {f"node{rank + 1}"}
            times = [line["time"] for line in lines]
            assert times == sorted(times)
    last = [line for line in read(run / "logs/0002", 0) if line["logger"] == "strop.progress"]
    assert re.match(r"step 30/30 +loss", next(m for m in (ln["message"] for ln in last) if "step 30/" in m))
    assert {line["step"] for line in last} >= set(range(27, 30))
    # what the job's output has of the trainer's progress is what the log has, without the secret
    for line in last:
        assert line["message"] in output
    everything = output + json.dumps(attempts.read_all(run))
    everything += "".join(p.read_text() for p in run.glob("logs/*/*") if p.is_file())
    assert PASSWORD not in everything
