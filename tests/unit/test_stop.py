"""Stop requests: real signals to a real process, and the file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from strop.slurm import attempts, stop

CHILD = """
import sys, time
from pathlib import Path
from strop.slurm import stop
stop.block_signals()
request = stop.StopRequest(Path(sys.argv[1]), 1)
assert request.poll() is None
print("ready", flush=True)
deadline = time.monotonic() + 20
while request.poll() is None and time.monotonic() < deadline:
    time.sleep(0.01)
first = request.poll()
time.sleep(0.3)
print(first, request.poll(), flush=True)
"""


@pytest.fixture
def child(tmp_path):
    (tmp_path / "attempts").mkdir()
    variables = {**os.environ, "PYTHONPATH": "src"}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=variables
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_does_not_kill_and_is_seen(child, number):
    child.send_signal(number)
    assert child.communicate(timeout=20)[0] == f"{number.name[3:]} {number.name[3:]}\n"
    assert child.returncode == 0


def test_the_first_reason_stays(child):
    child.send_signal(signal.SIGUSR1)
    time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    assert child.communicate(timeout=20)[0] == "USR1 USR1\n"


def test_the_file_alone_suffices(child, tmp_path):
    stop.request(tmp_path, 1, "by hand")
    stop.request(tmp_path, 1, "too late")
    assert child.communicate(timeout=20)[0] == "file: by hand file: by hand\n"


def test_a_new_attempt_stops_the_ranks_of_the_one_before(tmp_path):
    """Slurm declares a node dead and restarts the job, but the node lives: its ranks must not go on."""
    attempts.begin(tmp_path, job_id="5", restart_count=0, nodes=["n1"])
    old = stop.StopRequest(tmp_path, 1)
    assert old.poll() is None
    assert attempts.holds_lease(tmp_path, 1)
    attempts.begin(tmp_path, job_id="5", restart_count=1, nodes=["n2"])
    assert not attempts.holds_lease(tmp_path, 1)
    time.sleep(stop.LOOK_EVERY_S)
    assert old.poll() == "file: superseded by attempt 2"
    assert stop.StopRequest(tmp_path, 2).poll() is None


def test_polling_is_cheap(tmp_path):
    """It stands in the loop's innermost places: 20 microseconds at most, the looks at the file included."""
    (tmp_path / "attempts").mkdir()
    request = stop.StopRequest(tmp_path, 1)
    start = time.perf_counter()
    for _ in range(20_000):
        request.poll()
    assert (time.perf_counter() - start) / 20_000 < 20e-6


def test_nobody_launched_us():
    assert stop.StopRequest(None, None).poll() is None
