"""Sixteen ranks of the real trainer on four nodes of a real Slurm, and what `--why` says of their end.

One rank raises, is killed, crashes, hangs or runs out of memory; the others' errors are gloo's own. The truth
is what was done to which rank. Both the job body's decision and the explanation must name it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from strop.obs import html, why
from strop.slurm import attempts
from strop.slurm.local_cluster import LocalCluster
from tests import toy
from tests.slurm import forked
from tests.slurm.body_jobs import wait_until

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
NUM_NODES, RANKS_PER_NODE = 4, 4
FAULTS = {
    "raise": (6, "exception", "KeyError: 'this row has no chosen side'"),
    "kill": (9, "killed", "srun says: Killed"),
    "segv": (3, "segfault", " in strike < forked.py"),
    "hang": (14, "hang", "strike"),
    "memory": (0, "oom", "can't allocate memory"),
}
"""(rank, cause, words that the explanation must hold)."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    folder = tempfile.TemporaryDirectory(prefix="strop-", dir="/tmp")
    cluster = LocalCluster("why", Path(folder.name) / "cluster")
    cluster.up(num_nodes=NUM_NODES)
    yield cluster
    cluster.down()
    folder.cleanup()


@pytest.fixture(scope="module")
def work(cluster, tmp_path_factory) -> Iterator[Path]:
    """A directory with a configuration, and the process that forks the ranks."""
    folder = tmp_path_factory.mktemp("why")
    toy.config(
        toy.make(folder / "toy"), "dpo", folder / "c.yaml",
        train={"max_steps": 8, "global_batch_size": 16},
        watchdog={"step_s": 4.0, "step_factor": 1.0, "save_s": 30.0},
    )  # fmt: skip
    variables = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "tests.slurm.forked", str(folder / "socket")]
    server = subprocess.Popen(words, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    yield folder
    server.kill()
    server.wait()


@pytest.fixture
def here(cluster, work, monkeypatch) -> Path:
    monkeypatch.chdir(work)
    monkeypatch.setenv("SLURM_CONF", cluster.environment()["SLURM_CONF"])
    monkeypatch.setenv("PYTHON", str(ROOT / "tests/slurm/forked_python"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(forked.VARIABLE, str(work / "socket"))
    return work


@pytest.mark.parametrize("kind", FAULTS)
def test_the_right_rank_and_cause(here, kind):
    rank, cause, words = FAULTS[kind]
    run = Path("runs") / kind
    job = submit(f"+metadata.fault={kind}:{rank}:3", f"run.name={kind}")
    try:
        wait_until(lambda: run.exists() and closed(run), 120)
    finally:
        subprocess.run(["scancel", job], capture_output=True)
    record = attempts.read(run, 1)
    began = time.process_time()
    found = why.explain(run, 1)
    text = why.text(found)
    assert time.process_time() - began < 2.0
    assert (record["cause"], record["rank"]) == (cause, rank), text
    assert found.first is not None
    assert (found.cause, found.first.rank, found.first.node) == (cause, rank, f"node{rank // 4 + 1}"), text
    assert (found.first.step, found.first.phase) == (3, "train"), text
    assert words in text
    assert "requeued (failure 1 of 5 without a new checkpoint)" in text
    others = sorted(r for group in (*found.followed, *found.silent) for r in group.ranks)
    assert others == [r for r in range(16) if r != rank], text
    assert found.others == ()
    assert f"rank {rank}" in html.report(run)


def submit(*words: str) -> str:
    options = [f"--nodes={NUM_NODES}", f"--ntasks-per-node={RANKS_PER_NODE}"]
    shell = ["sbatch", "--parsable", *options, str(ROOT / "sbatch/dpo.sh"), "--config", "c.yaml", *words]
    return subprocess.run(shell, check=True, capture_output=True, text=True).stdout.strip()


def closed(run: Path) -> bool:
    records = attempts.read_all(run)
    return bool(records) and "closed" in records[0]
