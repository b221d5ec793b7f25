"""The same job body without Slurm, with the fake trainer: two ranks on this machine."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from strop import submission
from strop.slurm import attempts

ROOT = Path(__file__).resolve().parents[2]
FAKE = Path(__file__).parent / "fake_python"


def hear_ctrl_c() -> None:
    """A background job of a shell, such as CI's, ignores SIGINT and hands that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started: list[subprocess.Popen[str]] = []

    def run(*args: str, ranks: int = 2, umask: int = -1) -> subprocess.Popen[str]:
        variables = {
            **os.environ,
            "STROP_LAUNCHER": "local",
            "STROP_LOCAL_RANKS": str(ranks),
            "PYTHON": str(FAKE),
        }
        process = subprocess.Popen(
            ["bash", str(ROOT / "sbatch/lib.sh"), "dpo", *args],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=hear_ctrl_c,
            text=True,
            start_new_session=True,
            umask=umask,
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
    assert (
        "to go on: STROP_LAUNCHER=local STROP_LOCAL_RANKS=2 bash sbatch/lib.sh dpo run.name=b steps=600"
        in output
    )
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


def test_signals_at_every_moment_of_the_start(start):
    """Until srun or the launcher watches for it, USR1 would kill the process that is about to become it."""
    job = start("run.name=g", "steps=40", ranks=1)
    time.sleep(0.2)  # a bash that has not set its traps yet would die of it
    deadline = time.monotonic() + 4
    while time.monotonic() < deadline:
        os.kill(job.pid, signal.SIGUSR1)
        time.sleep(0.003)
    assert job.wait(60) == 0
    assert set(causes("g")) == {"time_limit", "done"}
    assert len(causes("g")) > 2
    assert steps("g") == list(range(1, 41))


def test_group_shares_the_run(start, tmp_path):
    """umask 002 and a directory with setgid: whatever the body makes, the group may write."""
    (tmp_path / "runs").mkdir(mode=0o775)
    (tmp_path / "runs").chmod(0o2775)
    job = start("run.name=h", "steps=600", umask=0o002)
    wait_for_step("h", 2)
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(30) == 75
    paths = [tmp_path / "runs/h", *(tmp_path / "runs/h").rglob("*")]
    modes = {str(p.relative_to(tmp_path)): stat.S_IMODE(p.stat().st_mode) for p in paths}
    assert {
        name for name, mode in modes.items() if mode != (0o2775 if (tmp_path / name).is_dir() else 0o664)
    } == set()
    assert {"runs/h/attempts/0001.json", "runs/h/attempts/0001.stop"} < set(modes)


def test_out_of_memory_at_the_same_step_twice(start):
    job = start("run.name=i", "steps=20", "fail=oom", "at=3")
    output, _ = job.communicate(timeout=60)
    assert (job.returncode, causes("i")) == (78, ["oom", "oom"])
    assert "train.micro_batch_tokens" in output


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


def test_a_refused_start_without_a_name_leaves_nothing(start):
    """Its name is the time at which it began. With a name of its own it keeps its record."""
    for name, left in (([], []), (["run.name=mine"], ["mine"])):
        job = start("fail=user", "steps=5", *name)
        output, _ = job.communicate(timeout=60)
        assert job.returncode == 78, output
        assert [path.name for path in Path("runs").iterdir()] == left


def test_no_ranks_at_all(start):
    """It would end well, and have done nothing."""
    for told in (0, -1):
        process = start("run.name=none", ranks=told)
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 78, out
        assert f"STROP_LOCAL_RANKS is '{told}'; expected how many ranks to start, 1 or more" in out
    assert not Path("runs/none").exists()
