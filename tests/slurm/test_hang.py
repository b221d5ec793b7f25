"""A hang in a real job: one rank of two, on two nodes, is stopped while it trains."""

from __future__ import annotations

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
from tests.processes import pid_of_rank, steps

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slurm


def test_a_stopped_rank_costs_one_restart(slurm_cluster: LocalCluster, tmp_path, monkeypatch):
    """Slurm has to get rid of a process that takes no signal but KILL, requeue, and run to the end."""
    monkeypatch.setenv("SLURM_CONF", slurm_cluster.environment()["SLURM_CONF"])
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.chdir(tmp_path)
    impatient = {"step_s": 5.0, "step_factor": 1.0, "save_s": 5.0}
    config = toy.config(
        toy.make(tmp_path / "toy"), "dpo", Path("c.yaml"), watchdog=impatient,
        train={"max_steps": 60}, checkpoint={"every": 5},
    )  # fmt: skip
    shell = ["sbatch", "--parsable", "--nodes=2", str(ROOT / "sbatch/dpo.sh"), "--config", str(config)]
    job = subprocess.run([*shell, "run.name=r"], check=True, capture_output=True, text=True).stdout.strip()
    try:
        run = Path("runs/r").resolve()
        deadline = time.monotonic() + 240
        while not steps(run) or steps(run)[-1]["step"] < 7:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(pid_of_rank(run, 1), signal.SIGSTOP)
        fields = jobs.wait_for_state(slurm_cluster, job, "COMPLETED", "FAILED", timeout_s=300)
    finally:
        subprocess.run(["scancel", job], capture_output=True)
    output = Path(f"dpo-{job}.out").read_text()
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), output
    first, second = attempts.read_all(run)
    assert (first["cause"], first["action"], second["cause"]) == ("hang", "requeue", "done")
    # Slurm sends CONT before it kills, so the rank may just have had the time to say that it was stopped.
    assert re.search(r"rank 1 on node2( left no stacks|: was stopped)", first["summary"].splitlines()[0])
    assert "noticed by rank 0 on node1" in first["summary"]
    assert [s["step"] for s in steps(run)] == list(range(1, 61))
