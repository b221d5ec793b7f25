"""Fixtures for all tests, and the selection of those that need other hardware."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from strop.slurm.local_cluster import LocalCluster

REPO = Path(__file__).resolve().parents[1]


def has_gpu() -> bool:
    return (
        bool(shutil.which("nvidia-smi"))
        and not subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode
    )


def has_avx512() -> bool:
    return {"avx512f", "avx512bw", "avx512_bf16"} <= set(Path("/proc/cpuinfo").read_text().split())


HARDWARE = {"gpu": ("no NVIDIA GPU", has_gpu), "avx512": ("no AVX-512 with bf16", has_avx512)}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of hardware that is not here are deselected, not skipped: a skip would look like something
    missing."""
    for mark, (lack, is_there) in HARDWARE.items():
        theirs = [item for item in items if item.get_closest_marker(mark)]
        if theirs and not is_there():
            items[:] = [item for item in items if item not in theirs]
            config.hook.pytest_deselected(items=theirs)
            print(f"\n{lack} here: {len(theirs)} tests marked {mark} are deselected")


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return REPO


def pytest_sessionstart() -> None:
    """The native libraries as an installation builds them; quick where they are there."""
    words = ("--cpu", "--log", "--crash", "--quiet")
    subprocess.run([sys.executable, "-m", "tools.build_kernels", *words], check=True, cwd=REPO)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[LocalCluster]:
    """A running two-node cluster: tests/run.sh's, or one for this session alone.

    `slurm_cluster.slurm("squeue", ...)` runs a Slurm command there, `slurm_cluster.environment()` is for
    other processes, tests/jobs.py has the rest. Nobody may take it down or change its partitions.
    """
    shared = os.environ.get("STROP_TEST_CLUSTER")
    if shared:
        yield LocalCluster("tests", shared)
        return
    directory = Path(tempfile.mkdtemp(prefix="strop-", dir="/tmp")) / "cluster"
    cluster = LocalCluster("tests", directory)
    cluster.up(num_nodes=2)
    yield cluster
    cluster.down()
    directory.parent.rmdir()


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ and the data of tests/toy.py."""
    from tests import toy

    return toy.make(tmp_path_factory.mktemp("toy"))
