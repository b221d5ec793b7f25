"""Fixtures for all tests, and the selection of GPU tests."""

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU its tests are deselected, not skipped: a skip would look like something missing."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not has_gpu():
        items[:] = [item for item in items if item not in gpu_items]
        config.hook.pytest_deselected(items=gpu_items)
        print(f"\nno NVIDIA GPU here: {len(gpu_items)} tests marked gpu are deselected")


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
