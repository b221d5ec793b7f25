"""The command lines for containers, against a fake srun that prints what it gets.

Neither Pyxis nor Apptainer is here; their documented forms are the truth:
`srun --container-image=IMAGE --container-mounts=SRC:DST,... --container-workdir=DIR COMMAND` and
`apptainer exec [--nv] --bind SRC:DST,... --pwd DIR IMAGE COMMAND`.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYXIS = "      --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH"
SRUN = """#!/usr/bin/env bash
if [[ $1 == --help ]]; then echo "$FAKE_SRUN_HELP"; exit 0; fi
printf '%s\\n' "$@" >srun.args
exit 1
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then
    echo 'JobId=7 JobName=dpo'
    echo '   JobState=RUNNING Reason=None Requeue=1 Restarts=0 BatchFlag=1 EndTime=Unknown Partition=gpu'
    echo '   PartitionName=gpu PreemptMode=REQUEUE'
fi
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Run a body as the batch host of job 7 on two nodes; the words that srun (or apptainer) was given."""

    def run(
        *, gpus: int, programs: dict[str, str], body: str = "lib.sh dpo", **variables: str
    ) -> tuple[list[str], str, int]:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, **programs}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        environment = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_CPUS_ON_NODE": "32",
            **({"SLURM_GPUS_ON_NODE": str(gpus)} if gpus else {}),
            **variables,
        }
        command = ["bash", *f"{ROOT}/sbatch/{body}".split(), "run.name=r", "max_steps=3"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        path = tmp_path / "srun.args"
        return path.read_text().splitlines() if path.exists() else [], done.stderr, done.returncode

    return run


def test_pyxis_on_two_nodes_of_eight_gpus(job, tmp_path):
    words, _, _ = job(
        gpus=8,
        programs={},
        FAKE_SRUN_HELP=PYXIS,
        CONTAINER="/images/strop.sqsh",
        MOUNTS="/data:/data",
    )
    mounts = f"{ROOT}:{ROOT},{tmp_path}:{tmp_path},{tmp_path}/runs:{tmp_path}/runs,/data:/data"
    assert words == [
        "--kill-on-bad-exit=1",
        "--wait=30",
        "--export=ALL",
        "--nodes=2",
        "--ntasks-per-node=8",
        "--ntasks=16",
        "--cpus-per-task=4",
        "--gpus-per-node=8",
        "--container-image=/images/strop.sqsh",
        f"--container-mounts={mounts}",
        f"--container-workdir={tmp_path}",
        "python3",  # the container's, not the repository's virtual environment
        "-m",
        "strop.slurm.launch",
        "--",
        "dpo",
        "run.name=r",
        "max_steps=3",
    ]


@pytest.mark.parametrize(("gpus", "nv"), [(0, []), (2, ["--nv"])])
def test_apptainer(job, tmp_path, gpus, nv):
    words, _, _ = job(
        gpus=gpus,
        programs={"apptainer": "#!/bin/sh\n"},
        FAKE_SRUN_HELP="",
        CONTAINER="/images/strop.sif",
        PYTHON="/opt/python",
    )
    mounts = f"{ROOT}:{ROOT},{tmp_path}:{tmp_path},{tmp_path}/runs:{tmp_path}/runs"
    at = words.index("apptainer")
    container = ["apptainer", "exec", "--bind", mounts, "--pwd", str(tmp_path), *nv, "/images/strop.sif"]
    assert words[at:] == [
        *container, "/opt/python", "-m", "strop.slurm.launch", "--", "dpo", "run.name=r", "max_steps=3",
    ]  # fmt: skip


@pytest.mark.parametrize("body", ["lib.sh dpo", "tool.sh tools.prepare"])
def test_no_container_tool_is_the_users_error(job, tmp_path, body):
    words, stderr, code = job(
        gpus=0, programs={}, body=body, FAKE_SRUN_HELP="", CONTAINER="/images/strop.sif"
    )
    assert (words, code) == ([], 78)
    assert "neither Pyxis" in stderr
    assert not (tmp_path / "runs").exists()


def test_tool_under_pyxis(job, tmp_path):
    words, _, code = job(
        gpus=0,
        programs={},
        body="tool.sh tools.prepare",
        FAKE_SRUN_HELP=PYXIS,
        CONTAINER="/images/strop.sqsh",
    )
    assert words == [
        "--ntasks=1",
        "--cpus-per-task=32",
        "--container-image=/images/strop.sqsh",
        f"--container-mounts={ROOT}:{ROOT},{tmp_path}:{tmp_path}",
        f"--container-workdir={tmp_path}",
        *("python3", "-m", "tools.prepare", "run.name=r", "max_steps=3"),
    ]
    assert code == 1  # as srun's


@pytest.mark.parametrize(("gpus", "nv"), [(0, []), (2, ["--nv"])])
def test_tool_under_apptainer(job, tmp_path, gpus, nv):
    """Without a step: it is a child of the batch shell."""
    words, _, code = job(
        gpus=gpus,
        programs={"apptainer": SRUN},
        body="tool.sh tools.prepare",
        FAKE_SRUN_HELP="",
        CONTAINER="/images/strop.sif",
        MOUNTS="/data:/data",
    )
    mounts = f"{ROOT}:{ROOT},{tmp_path}:{tmp_path},/data:/data"
    container = ["exec", "--bind", mounts, "--pwd", str(tmp_path), *nv, "/images/strop.sif"]
    assert words == [*container, "python3", "-m", "tools.prepare", "run.name=r", "max_steps=3"]
    assert code == 1
