"""The same job body without Slurm, with the fake trainer: two ranks on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from strop import submission
from strop.slurm import attempts

ROOT = Path(__file__).resolve().parents[2]
FAKE = Path(__file__).parent / "fake_python"


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started: list[subprocess.Popen[str]] = []

    def run(*args: str) -> subprocess.Popen[str]:
        variables = {**os.environ, "STROP_LAUNCHER": "local", "STROP_LOCAL_RANKS": "2", "PYTHON": str(FAKE)}
        process = subprocess.Popen(
            ["bash", str(ROOT / "sbatch/lib.sh"), "dpo", *args],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def steps(name: str) -> list[int]:
    path = Path("runs") / name / "steps.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(name: str, step: int) -> None:
    deadline = time.monotonic() + 30
    while len(steps(name)) < step:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def causes(name: str) -> list[str]:
    return [record["cause"] for record in attempts.read_all(Path("runs") / name)]


def test_usr1_yields_and_resumes_by_itself(start):
    job = start("run.name=a", "steps=20")
    wait_for_step("a", 3)
    os.kill(job.pid, signal.SIGUSR1)
    assert job.wait(30) == 0
    assert causes("a") == ["time_limit", "done"]
    assert steps("a") == list(range(1, 21))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_user_stops_it_and_goes_on_later(start, number):
    """Ctrl-C reaches the whole process group; only the body may act on it."""
    job = start("run.name=b", "steps=600")
    wait_for_step("b", 3)
    os.killpg(job.pid, number)
    output, _ = job.communicate(timeout=30)
    assert job.returncode == 75
    assert "to go on: STROP_LAUNCHER=local bash sbatch/lib.sh dpo run.name=b steps=600" in output
    done = len(steps("b"))
    assert attempts.committed_step(Path("runs/b")) == done
    assert start("run.name=b", f"steps={done + 2}").wait(30) == 0
    assert steps("b") == list(range(1, done + 3))


def test_second_ctrl_c_does_not_wait(start):
    job = start("run.name=c", "steps=600", "hold_commit_s=60")
    wait_for_step("c", 2)
    os.killpg(job.pid, signal.SIGINT)
    time.sleep(1)
    assert job.poll() is None  # it waits for the commit
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait(10) == 1


def test_killed_rank_takes_the_others_along_and_is_retried(start):
    job = start("run.name=d", "steps=20", "fail=kill", "rank=1", "at=3", "once=1")
    assert job.wait(30) == 0
    assert causes("d") == ["killed", "done"]


def test_same_exception_three_times(start):
    job = start("run.name=e", "steps=20", "fail=exception", "message=step 5: bad thing")
    output, _ = job.communicate(timeout=60)
    assert (job.returncode, causes("e")) == (1, ["exception"] * 3)
    assert "step 5: bad thing" in output


def test_users_error(start):
    job = start("run.name=f", "steps=20", "fail=user", "rank=1", "message=data.train: no such file x.jsonl")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 78
    lines = [line for line in output.splitlines() if "attempt" not in line]
    assert lines[0] == "strop: data.train: no such file x.jsonl"


def test_outside_of_slurm_the_template_says_what_to_do(tmp_path):
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "STROP_"))}
    command = ["bash", str(ROOT / "sbatch/dpo.sh"), "x=1"]
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 78
    assert "sbatch sbatch/dpo.sh" in done.stderr
    assert "STROP_LAUNCHER=local" in done.stderr


def test_local_executor(tmp_path, monkeypatch):
    """tools.submit --executor local: the job outlives the call, and is found by its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHON", str(FAKE))
    Path("c.yaml").write_text("model:\n  path: m\ndata:\n  train: x.jsonl\n")
    job = submission.submit("dpo", ["--config", "c.yaml"], executor="local", ntasks_per_node=2)
    assert isinstance(job, submission.Job)
    assert job.wait() == 0
    assert attempts.read_all(job.run_dir)[0]["state"] == "DONE"
    assert len(list((job.run_dir / "logs/0001").glob("rank*.err"))) == 2
