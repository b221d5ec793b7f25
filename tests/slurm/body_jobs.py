"""Jobs whose body is ours and whose trainer is the fake one: submit, wait, read what the run says."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from strop.slurm import attempts, command
from strop.slurm.local_cluster import LocalCluster

ROOT = Path(__file__).resolve().parents[2]
FAKE = Path(__file__).parent / "fake_python"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


def submitting(
    cluster: LocalCluster, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., str]]:
    """For a fixture: submit("--nodes=2", "steps=5") -> job id; words with -- are sbatch's."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment()["SLURM_CONF"])
    monkeypatch.setenv("PYTHON", str(FAKE))
    monkeypatch.chdir(folder)
    started: list[str] = []

    def run(*words: str) -> str:
        options = [w for w in words if w.startswith("--")]
        args = [w for w in words if not w.startswith("--")]
        shell = ["sbatch", "--parsable", *options, str(ROOT / "sbatch" / "dpo.sh"), *args]
        job = subprocess.run(shell, check=True, capture_output=True, text=True).stdout.strip()
        started.append(job)
        return job

    yield run
    for job in started:
        subprocess.run(["scancel", job], capture_output=True)


def wait_until(what, limit_s: float = 60.0):
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        value = what()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {limit_s} s")


def ended(job: str, limit_s: float = 60.0) -> dict[str, str]:
    def look():
        record = command.show_job(job)
        return record if record and record["JobState"] in ENDED else None

    return wait_until(look, limit_s)


def steps(run: Path) -> list[dict]:
    path = run / "steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def causes(run: Path) -> list[str]:
    return [record.get("cause") for record in attempts.read_all(run)]


def output(job: str) -> str:
    return Path(f"dpo-{job}.out").read_text()
