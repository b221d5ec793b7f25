"""sbatch/prepare.sh and sbatch/convert.sh when Slurm ends their job early, and what waits for them.

The tool is a fake one, the preemption is Slurm's own. The truth is the controller's: states, restarts and
exit codes of the jobs, beside the starts that the tool has noted. A cluster of its own, for a partition in
which preempted jobs get no grace time.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from strop.slurm import command
from strop.slurm.local_cluster import LocalCluster
from tests import jobs
from tests.slurm.body_jobs import ended, wait_until

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[LocalCluster]:
    with jobs.cluster_with("tools", "PartitionName=quick", "PreemptMode=REQUEUE") as cluster:
        yield cluster


@pytest.fixture
def submit(own_cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", own_cluster.environment()["SLURM_CONF"])
    monkeypatch.setenv("PYTHON", str(Path(__file__).parent / "fake_tool"))
    monkeypatch.chdir(tmp_path)
    started: list[str] = []

    def run(*words: str) -> str:
        shell = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes", *words]
        started.append(subprocess.run(shell, check=True, capture_output=True, text=True).stdout.strip())
        return started[-1]

    yield run
    for job in started:
        subprocess.run(["scancel", job], capture_output=True)


def template(name: str) -> str:
    return str(ROOT / "sbatch" / f"{name}.sh")


def starts() -> list[str]:
    return Path("starts").read_text().splitlines() if Path("starts").exists() else []


def state(job: str) -> str:
    return (command.show_job(job) or {})["JobState"]


def test_preempted_preparation_and_export_go_on(submit):
    """Both keep their numbers, and what waits for them waits on."""
    jobs = [submit("--partition=quick", template(name), "3") for name in ("prepare", "convert")]
    last = submit(f"--dependency=afterok:{':'.join(jobs)}", "--output=/dev/null", "--wrap=true")
    wait_until(lambda: len(starts()) == 2)
    submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    for job in jobs:
        wait_until(lambda job=job: int((command.show_job(job) or {})["Restarts"]) == 1)
    assert state(last) == "PENDING"
    assert ended(last)["JobState"] == "COMPLETED"
    assert [state(job) for job in jobs] == ["COMPLETED", "COMPLETED"]
    assert sorted(starts()) == [
        f"tools.{name} {n}" for name in ("convert_dcp_to_hf", "prepare") for n in (0, 1)
    ]


def test_time_limit_until_nothing_is_finished_any_more(submit):
    """USR1, as a minute before the end: first without, then with something finished, then without again."""
    job = submit(template("prepare"), "60")
    behind = submit(f"--dependency=afterok:{job}", "--output=/dev/null", "--wrap=true")
    for number, code in enumerate(("143", "75", "143")):
        Path("code").write_text(code)
        wait_until(lambda number=number: len(starts()) == number + 1)
        assert state(behind) == "PENDING"
        command.slurm(["scancel", "--batch", "--signal=USR1", job])
        if number < 2:
            wait_until(lambda number=number: int((command.show_job(job) or {})["Restarts"]) == number + 1)
    record = ended(job)
    assert (record["JobState"], record["ExitCode"]) == ("FAILED", "75:0")
    assert ended(behind)["JobState"] == "CANCELLED"
    output = Path(f"prepare-{job}.out").read_text()
    assert output.count("time limit near; what is finished is kept: back into the queue") == 2
    assert "nothing was finished in this start, number 3 of the job; raise --time" in output


def test_cancelled_tool_is_not_put_back(submit):
    Path("code").write_text("143")
    job = submit(template("convert"), "60")
    wait_until(lambda: len(starts()) == 1)
    command.slurm(["scancel", job])
    assert ended(job)["JobState"] == "CANCELLED"
    assert "cancelled; what is finished is kept" in Path(f"convert-{job}.out").read_text()


def test_tool_that_does_not_end_is_killed(tmp_path, monkeypatch):
    """TERM in vain: the body does not wait longer than it has. Without Slurm; the waiting is made short."""
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "timeout": '#!/usr/bin/env bash\necho "$1" >patience\nshift\n'
        f'exec {shutil.which("timeout")} 1 "$@"\n',
        "scontrol": "#!/usr/bin/env bash\necho 'JobId=7 JobState=RUNNING Requeue=1 Restarts=0'\n"
        '[[ $1 == show ]] || echo "$@" >asked\n',
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "PYTHON": str(Path(__file__).parent / "fake_tool"),
    }
    body = subprocess.Popen(
        ["bash", str(ROOT / "sbatch/tool.sh"), "tools.prepare", "60"],
        env=variables, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: len(starts()) == 1)
    body.send_signal(signal.SIGUSR1)
    _, told = body.communicate(timeout=20)
    assert told.endswith("strop: time limit near; what is finished is kept: back into the queue\n")
    assert Path("asked").read_text() == "requeue 7\n"
    assert int(Path("patience").read_text()) < 60 - 20  # of the minute between USR1 and the end of the job
