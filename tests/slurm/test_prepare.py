"""sbatch/prepare.sh and sbatch/cpt.sh with the real programs on the local cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from strop.slurm import command
from tests import toy as t
from tests.slurm.body_jobs import ended, wait_until

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slurm


@pytest.fixture
def submit(slurm_cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", slurm_cluster.environment()["SLURM_CONF"])
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.chdir(tmp_path)
    started: list[str] = []

    def run(template: str, *words: str) -> str:
        shell = ["sbatch", "--parsable", str(ROOT / "sbatch" / template), *words]
        started.append(subprocess.run(shell, check=True, capture_output=True, text=True).stdout.strip())
        return started[-1]

    yield run
    for job in started:
        subprocess.run(["scancel", job], capture_output=True)


def test_preparation_and_training_as_jobs(submit, toy, tmp_path):
    """USR1 soon after its start, as before the time limit: back into the queue, and then to the end. The
    training job finds the store, and an error of the user ends the next preparation with code 78."""
    config = t.config(toy, "cpt", tmp_path / "c.yaml", train={"max_steps": 2})
    words = ["--config", str(config), f"data.cache_dir={tmp_path / 'stores'}", f"run.dir={tmp_path / 'runs'}"]
    job = submit("prepare.sh", *words)
    wait_until(lambda: (command.show_job(job) or {}).get("JobState") == "RUNNING")
    wait_until(Path(f"prepare-{job}.out").exists)
    command.slurm(["scancel", "--batch", "--signal=USR1", job])
    wait_until(lambda: int((command.show_job(job) or {}).get("Restarts", 0)) == 1)
    record = ended(job, limit_s=150)
    output = Path(f"prepare-{job}.out").read_text()
    assert (record["JobState"], record["ExitCode"]) == ("COMPLETED", "0:0"), output
    assert "back into the queue" in output
    assert f"store: {tmp_path / 'stores' / 'text-'}" in output
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "stores").iterdir()}
    assert len(before) == 2  # training and validation

    job = submit("cpt.sh", *words, "run.name=first")
    record = ended(job, limit_s=150)
    assert record["ExitCode"] == "0:0", Path(f"cpt-{job}.out").read_text()
    lines = [json.loads(line) for line in (tmp_path / "runs/first/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "stores").iterdir()}

    job = submit("prepare.sh", *words, "data.train=nowhere.txt")
    assert ended(job, limit_s=60)["ExitCode"] == "78:0"
    assert "nowhere.txt" in Path(f"prepare-{job}.out").read_text()
