"""Fixtures of tests of more than one file here."""

from __future__ import annotations

import pytest

from strop.obs import run_files
from strop.slurm import command
from tests.unit.status_runs import RunDir


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "runs" / "r")


@pytest.fixture
def slurm(monkeypatch):
    """slurm(JobState="PENDING", ...): what scontrol would answer; None: it has forgotten the job."""
    monkeypatch.setattr(run_files.shutil, "which", lambda name: f"/bin/{name}")

    def answer(**job):
        record = {"JobId": "17", **job} if job else None
        monkeypatch.setattr(command, "show_job", lambda target, deadline_s: record)

    answer()
    return answer
