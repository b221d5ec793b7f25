"""Following a log while it is written: by hand with the clock in the test's hand, and once for real."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest

from strop.obs import log_files, log_follow
from strop.obs.log_follow import Follower, Watched
from strop.obs.log_text import Selection, View
from tests.unit.log_helpers import BEGAN_S, LogRun, line

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path: Path) -> LogRun:
    run = LogRun(tmp_path / "runs" / "live")
    run.attempt(1, state="X")
    return run


def follower(run: LogRun, watched: Watched = Watched(), view: View = View()) -> Follower:  # noqa: B008
    logs = log_follow.up_to_last_newlines(log_files.find(run.directory, live=True))
    return Follower(run.directory, logs, watched, Selection(), view)


class Clock:
    """Polls at times of its own."""

    def __init__(self, tested: Follower):
        self.now = BEGAN_S + 60
        self._tested = tested

    def after(self, seconds: float) -> list[str]:
        self.now += seconds
        return [row[11:] for row in self._tested.poll(self.now).decode().splitlines()]


def test_lines_wait_for_older_ones_of_other_ranks(run: LogRun) -> None:
    """Rank 1's file grows one poll later, with the older line: it still comes first, after a wait."""
    run.write(0, line(1, "before"))
    clock = Clock(follower(run))
    assert clock.after(0.2) == []
    run.write(0, line(5.1, "b"))
    assert clock.after(0.2) == []
    run.write(1, line(5.0, "a", rank=1), line(5.3, "c", rank=1))
    assert clock.after(0.2) == []
    assert clock.after(0.2) == ["03:00:05.000 [1] INFO     a", "03:00:05.100 [0] INFO     b"]
    assert clock.after(0.2) == ["03:00:05.300 [1] INFO     c"]
    assert clock.after(9) == []


def test_ranks_segments_and_attempts_appear(run: LogRun) -> None:
    """Clock offsets are used as soon as they are there; the second attempt's lines are marked."""
    clock = Clock(follower(run))
    run.write(0, line(1, "start"))
    assert clock.after(0.2) + clock.after(0.5) == ["03:00:01.000 [0] INFO     start"]
    run.write(7, line(4, "new rank", rank=7))
    run.write(0, line(3, "new segment"), index=1)
    assert clock.after(0.2) + clock.after(0.5) == [
        "03:00:03.000 [0] INFO     new segment",
        "03:00:04.000 [7] INFO     new rank",
    ]
    second = run.attempt(2, began=30, state="X")
    run.write(7, line(33, "skewed", rank=7, attempt=2), attempt=2)
    assert clock.after(0.2) + clock.after(0.5) == ["03:00:33.000 #2 [7] INFO     skewed"]
    ranks = [{"rank": 7, "node": "n3", "offset_s": 2.0, "error_s": 0.0}]
    (second / "clock.json").write_text(json.dumps({"reference_rank": 0, "ranks": ranks}))
    run.write(7, line(37, "corrected", rank=7, attempt=2), attempt=2)
    run.write(0, line(34.5, "corrected", attempt=2), line(35, "corrected", attempt=2), attempt=2)
    clock.after(0.0)  # lists clock.json, perhaps behind the files
    run.write(7, line(38, "later", rank=7, attempt=2), attempt=2)
    assert (clock.after(0.2) + clock.after(0.5))[-1] == "03:00:36.000 #2 [7] INFO     later"
    run.write(0, line(40, "late words", attempt=1))
    assert clock.after(0.2) + clock.after(0.5) == ["03:00:40.000 #1 [0] INFO     late words"]


def test_equal_lines_of_a_moment_are_one(run: LogRun) -> None:
    clock = Clock(follower(run))
    for rank in range(512):
        run.write(rank, line(5 + rank * 1e-4, "saved", rank=rank, step=3))
    assert clock.after(0.2) + clock.after(0.5) == ["03:00:05.000 [0-511] INFO     step 3: saved"]


def test_half_lines_wait_for_their_other_half(run: LogRun) -> None:
    text = line(6, "in two writes")
    run.write(0, line(5, "shown before"), text[:40])
    run.write(0, b"raw be", raw=True)
    clock = Clock(follower(run))
    assert clock.after(1) + clock.after(1) == []
    run.write(0, text[40:])
    run.write(0, b"hind\nwith its mark\n", raw=True)
    run.write(0, line(7, "marked", raw=[0, 11]))
    rows = clock.after(0.2) + clock.after(0.5)
    assert rows[:3] == [
        "03:00:06.000 [0] INFO     in two writes",
        "03:00:07.000 [0] RAW      raw behind",
        "03:00:07.000 [0] INFO     marked",
    ]
    assert rows[3].endswith("RAW      with its mark")  # no mark yet: of now


def test_files_that_vanish_or_shrink_are_told(run: LogRun) -> None:
    paths = [run.write(rank, line(1, "x", rank=rank)) for rank in range(3)]
    tested = follower(run)
    clock = Clock(tested)
    clock.after(0.2)
    os.truncate(paths[0], 5)
    paths[1].unlink()  # all of it has been read
    clock.after(0.2)
    run.write(0, b"\n", line(9, "after the cut"))
    rows = clock.after(0.2) + clock.after(0.5)
    assert rows == ["03:00:09.000 [0] INFO     after the cut"]
    assert [note.rsplit("/", 1)[1] for note in tested.notes] == [
        "rank00000.jsonl became shorter: lines of it may be missing"
    ]


def test_a_file_that_is_replaced_under_its_name_is_shown_from_its_beginning(run: LogRun) -> None:
    """By a longer one within a poll, and by one that was there when following began."""
    paths = [run.write(rank, line(1, "old", rank=rank)) for rank in range(2)]
    tested = follower(run)
    clock = Clock(tested)
    for number in (0, 1):
        aside = paths[number].with_name("aside")
        aside.write_bytes(
            line(5, "new, and longer than the old one", rank=number) + line(6, "b", rank=number)
        )
        aside.rename(paths[number])
        rows = clock.after(0.2) + clock.after(0.5)
        assert [row.split("INFO     ")[1] for row in rows] == ["new, and longer than the old one", "b"]
    assert [note.split(" was ")[1][:8] for note in tested.notes] == ["replaced", "replaced"]


def test_only_what_is_watched(run: LogRun) -> None:
    clock = Clock(follower(run, Watched(ranks=[(1, 2)], raw=False)))
    for rank in range(4):
        run.write(rank, line(1, f"from {rank}", rank=rank))
        run.write(rank, b"raw\n", raw=True)
    assert [row[-6:] for row in clock.after(0.2) + clock.after(0.5)] == ["from 1", "from 2"]


def start(run: LogRun, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    command = [sys.executable, "-m", "tools.logs", str(run.directory), "--follow", *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # a background job of a shell, such as CI's, ignores SIGINT and hands that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(process: subprocess.Popen[str], text: str) -> float:
    """Seconds until a line with `text` came."""
    assert process.stdout is not None
    begin = time.monotonic()
    for row in process.stdout:
        if text in row:
            return time.monotonic() - begin
    raise AssertionError(f"{text!r} did not come: {process.stderr and process.stderr.read()}")


def now() -> float:
    return datetime.now(timezone.utc).timestamp() - BEGAN_S


def test_for_real_over_a_requeue_until_the_run_ends(run: LogRun) -> None:
    """A living attempt of this process; its successor; then the record says DONE."""
    living = {"state": "X", "began": time.time(), "hostname": os.uname().nodename, "pid": os.getpid()}
    record = run.directory / "attempts" / "0001.json"
    run.write(0, line(now(), "line before"))
    process = start(run)
    try:
        wait_for(process, "line before")
        time.sleep(0.5)
        run.write(3, line(now(), "first", rank=3))
        assert wait_for(process, "[3] INFO     first") < 1.5  # 1 s, and this machine's other work
        second = record.with_name("0002.json")
        (run.directory / "logs" / "0002").mkdir()
        second.write_text(json.dumps({"attempt": 2, **living}))
        run.write(0, line(now(), "again", attempt=2), attempt=2)
        wait_for(process, "#2 [0] INFO     again")
        run.write(0, line(now(), "the end", attempt=2), attempt=2)
        second.write_text(json.dumps({"attempt": 2, **living, "state": "DONE"}))
        wait_for(process, "the end")
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert err == "logs: the run is finished: nothing more will come\n"


def test_ctrl_c_is_quiet(run: LogRun) -> None:
    run.write(0, line(1, "line before"))
    process = start(run)
    try:
        wait_for(process, "line before")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "")


def test_what_cannot_be_read_is_noted_once_and_the_rest_is_followed(tmp_path):
    run = LogRun(tmp_path / "run")
    logs = run.attempt(1)
    follower = Follower(
        run.directory, log_files.Logs(run.directory, (1,), [], 0), Watched(), Selection(), View()
    )
    (logs / "rank00001.jsonl").mkdir()
    (logs / "rank00002.jsonl").symlink_to("rank00002.jsonl")
    run.write(0, line(1, "hello"))
    text = follower.poll(1.0) + follower.poll(2.0) + follower.drain()
    assert text.endswith(b"[0] INFO     hello\n")
    assert len(follower.notes) == 2
    shutil.rmtree(logs)
    assert follower.poll(3.0) == b""
    logs.mkdir()
    run.write(0, line(2, "again"))
    assert (follower.poll(4.0) + follower.drain()).endswith(b"[0] INFO     again\n")
