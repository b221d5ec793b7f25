"""Fixtures of tests of more than one file here."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from strop.obs import run_files
from strop.slurm import command
from tests.unit.pipeline_helpers import CONFIG
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


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A configuration file in the working directory, which is the test's own."""
    monkeypatch.chdir(tmp_path)
    return Path("c.yaml")


@pytest.fixture
def make_text(tmp_path):
    """make_text({file name: content or rows}, ...): text_helpers.make in the test's own directory."""
    from tests.unit import text_helpers

    return functools.partial(text_helpers.make, tmp_path)


@pytest.fixture
def look_at(tmp_path):
    """look_at(kind, {train: rows, validation: rows}, ...): look_helpers.look in the test's own directory."""
    from tests.unit import look_helpers

    return functools.partial(look_helpers.look, tmp_path)


@pytest.fixture
def pipeline_place(tmp_path, monkeypatch):
    """The working directory: one with a configuration of each algorithm that the pipelines have."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    for algo in ("cpt", "sft", "dpo"):
        (tmp_path / f"configs/{algo}.yaml").write_text(CONFIG)


@pytest.fixture
def use(monkeypatch):
    """use(engine, keep): from now on linear_logprob computes like that (ops_engines.choose)."""
    from tests.unit import ops_engines  # torch, which most tests here do without

    return functools.partial(ops_engines.choose, monkeypatch)
