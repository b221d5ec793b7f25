"""Which errors only follow another rank's end. The texts are torch's and NCCL's own; of each it is known
whether the rank that wrote it was at fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from strop import run as run_module
from strop.slurm import crash, peers
from strop.slurm.decide import Crash

TEXTS = json.loads((Path(__file__).resolve().parents[1] / "golden" / "peer_errors.json").read_text())
"""{"follow": [[exception, message, reason in short]], "own": [[exception, message]]}"""
DIST_TRACE = """Traceback (most recent call last):
  File "/venv/torch/distributed/distributed_c10d.py", line 3118, in all_reduce
    work.wait()
"""
LOADER_TRACE = """Traceback (most recent call last):
  File "/venv/urllib3/response.py", line 10, in read
"""


@pytest.mark.parametrize(("exception", "message", "reason"), TEXTS["follow"])
def test_followers(exception, message, reason):
    assert peers.reason(exception, message, None) == reason


@pytest.mark.parametrize(("exception", "message"), TEXTS["own"])
def test_who_failed_by_itself(exception, message):
    assert peers.reason(exception, message, LOADER_TRACE) is None


def test_a_data_loaders_own_connection_is_its_own_failure():
    """The same words out of a download and out of a collective."""
    for error in ("ConnectionResetError", "RuntimeError"):
        assert peers.reason(error, "[Errno 104] Connection reset by peer", LOADER_TRACE) is None
        assert peers.reason(error, "Connection reset by peer", DIST_TRACE) is not None


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("[gloo/pair.cc:534] Connection closed by peer"), "peer"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), "oom"),
        (OSError(12, "Cannot allocate memory"), "oom"),
        (MemoryError(), "oom"),
        (RuntimeError("no backend gloo in this build: not built with it"), "exception"),
        (ConnectionResetError(104, "Connection reset by peer"), "exception"),
    ],
)
def test_verdicts(error, kind):
    assert run_module.classify(error) == (kind, 1)


def test_an_abort_by_nccls_watchdog_is_no_crash(tmp_path):
    """Rank 5 crashed; the others' watchdogs aborted theirs. By file name rank 2 would be the first."""
    dump = (
        "Fatal Python error: {}\n\nCurrent thread 0x1 (most recent call first):\n"
        '  File "/r/a.py", line 3 in f\n\n'
    )
    abort = "[Rank 2] Watchdog caught collective operation timeout: WorkNCCL(...)\n" + dump.format("Aborted")
    (tmp_path / "rank00002.err").write_text(abort)
    assert crash.find(tmp_path) is None
    (tmp_path / "rank00005.err").write_text(dump.format("Segmentation fault"))
    found = crash.find(tmp_path)
    assert isinstance(found, Crash)
    assert found.rank == 5
    (tmp_path / "rank00001.err").write_text("free(): invalid pointer\n" + dump.format("Aborted"))
    found = crash.find(tmp_path)
    assert isinstance(found, Crash)
    assert found.rank == 1
