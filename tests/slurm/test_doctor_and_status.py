"""What the doctor and the status tool learn from a real Slurm."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from strop.doctor.checks import Checks
from strop.doctor.place import ask_slurm
from strop.obs import run_files, status
from strop.slurm import command

ROOT = Path(__file__).resolve().parents[2]
FAKE = Path(__file__).parent / "fake_python"

pytestmark = pytest.mark.slurm


@pytest.fixture
def here(slurm_cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", slurm_cluster.environment()["SLURM_CONF"])
    monkeypatch.setenv("PYTHON", str(FAKE))
    monkeypatch.chdir(tmp_path)


def asked(*options: str) -> tuple[str, str]:
    checks = Checks()
    ask_slurm("dpo", ["run.name=x"], list(options), checks)
    [check] = checks.found
    return check.level, check.text


def test_slurm_is_asked_before_the_submission(here, monkeypatch):
    """Two nodes are there, nine are not; the environment's SBATCH_PARTITION counts as it will for the job."""
    level, text = asked("--nodes=2")
    assert level == "ok"
    assert text.startswith("sbatch --nodes=2 sbatch/dpo.sh run.name=x: Job ")
    assert " to start at " in text
    level, text = asked("--nodes=9")
    assert level == "FAIL"
    assert "Requested node configuration is not available" in text or "Node count" in text
    monkeypatch.setenv("SBATCH_PARTITION", "nosuch")
    assert asked("--nodes=1") == (
        "FAIL",
        "sbatch --nodes=1 sbatch/dpo.sh run.name=x: allocation failure: Invalid partition name specified",
    )
    assert not Path("runs").exists()


def test_status_follows_a_requeued_job(here):
    """running -> (requeue) queued -> running, by Slurm's own states; cancelled at the end."""
    shell = ["sbatch", "--parsable", "--nodes=1", str(ROOT / "sbatch" / "dpo.sh"), "steps=600", "run.name=q"]
    job = subprocess.run(shell, check=True, capture_output=True, text=True).stdout.strip()
    seen: list[str] = []
    try:
        _watch(seen, lambda s: s.state == "starting" and Path("runs/q/steps.jsonl").exists())
        command.slurm(["scontrol", "requeue", job])
        _watch(seen, lambda s: s.state == "queued" and f"job {job} is pending" in s.next_action)
        _watch(seen, lambda s: len(s.attempts) == 2 and s.state == "starting")
    finally:
        command.slurm(["scancel", job])
    last = _watch(seen, lambda s: s.state == "cancelled")
    assert [a.cause for a in last.attempts] == ["requeued", "cancelled"]
    assert last.queue_s > 0
    assert set(seen) <= {"starting", "stopping", "queued", "cancelled"}


def _watch(seen: list[str], until) -> status.Status:
    """The first status that fits; the fake trainer writes no metrics, so a living attempt is `starting`."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if run_files.is_run(Path("runs/q")):
            s = status.assess(run_files.read(Path("runs/q")))
            if s.attempts:
                seen.append(s.state)
                if until(s):
                    return s
        time.sleep(0.1)
    raise AssertionError(f"seen: {list(dict.fromkeys(seen))}")
