"""The pure halves of watchdog, blame, crash reports, stragglers and clocks, against cases worked by hand."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from strop import preflight, stragglers
from strop.config import WatchdogConfig
from strop.slurm import attempts, crash, decide, hang
from strop.slurm.decide import Crash, Facts, Verdict
from strop.slurm.hang import Suspect
from strop.watchdog import Clock

CONFIG = WatchdogConfig(start_s=1000, step_s=100, step_factor=10, save_s=500)


def walk(clock: Clock, *places: tuple, every_s: float, start: float = 0.0) -> float:
    """Look once a second while the rank is `every_s` at each place; the time afterwards."""
    now = start
    for place in places:
        for _ in range(int(every_s)):
            now += 1
            clock.look(place, now)
    return now


def steps(phase: str, number: int) -> list[tuple]:
    return [(phase, step, 0) for step in range(number)]


def test_limits_by_phase():
    clock = Clock(CONFIG, 0.0)
    now = walk(clock, ("model", None, 0), every_s=3)
    assert clock.limit_s == 1000
    now = walk(clock, ("train", 0, 0), every_s=1, start=now)
    assert clock.limit_s == 1000  # nothing is known of this kind: compilation, first connections
    now = walk(clock, *steps("train", 6)[1:], every_s=4, start=now)
    assert clock.limit_s == 100  # 10 x 4 s is less than the floor
    now = walk(clock, *steps("train", 90)[6:], every_s=25, start=now)
    assert clock.limit_s == 250
    now = walk(clock, ("save", 90, 0), every_s=3, start=now)
    assert (clock.limit_s, clock.elapsed_s) == (500, 2)
    walk(clock, ("validation", 90, 1), every_s=3, start=now)
    assert clock.limit_s == 1000


def test_steps_that_were_quicker_than_a_look():
    """The rank stands at step 3 when it is first seen in training: the first step is behind it."""
    clock = Clock(CONFIG, 0.0)
    clock.look(("train", 3, 4), 1.0, warm=True)
    assert clock.limit_s == 100


def test_every_beat_is_progress():
    clock = Clock(CONFIG, 0.0)
    now = walk(clock, *[("data", None, rows) for rows in range(50)], every_s=900)
    assert clock.elapsed_s < 1000 < now


def test_time_in_which_the_process_did_not_run_does_not_count():
    """The job was suspended for an hour, with all its ranks."""
    clock = Clock(CONFIG, 0.0)
    now = walk(clock, *steps("train", 5), every_s=2)
    clock.look(("train", 4, 0), now + 3600)
    assert clock.elapsed_s < 3
    walk(clock, ("train", 4, 0), every_s=101, start=now + 3600)
    assert clock.elapsed_s > clock.limit_s == 100


def test_the_watchdog_costs_less_than_a_thousandth_of_a_core(tmp_path):
    """CPU time of its thread over four seconds, with a position that moves all the time."""
    from strop.run import Position, Run
    from strop.slurm.env import read_env
    from strop.slurm.stop import StopRequest
    from strop.watchdog import Watchdog

    attempts.log_dir(tmp_path, 1).mkdir(parents=True)
    run = Run(tmp_path, 1, read_env({}), StopRequest(tmp_path, 1), launched=True)
    position = Position(phase="train", step=0)
    with Watchdog(run, WatchdogConfig(), position) as watchdog:
        clock_id = time.pthread_getcpuclockid(watchdog._thread.ident or 0)
        begin = time.monotonic()
        while time.monotonic() - begin < 4:
            position.beat()
            time.sleep(0.01)
        used = time.clock_gettime(clock_id)
    assert used / 4 < 0.001
    assert "watchdog" not in [t.name for t in threading.enumerate()]


WAIT = 'File "/x/torch/distributed/distributed_c10d.py", line 9, in all_reduce\n'
LOSS = 'File "/repo/src/strop/algos/dpo.py", line 5, in loss\n'


def said(rank: int, trace: str = WAIT, step: int = 7, kind: str = "hang") -> dict:
    return {"rank": rank, "node": f"n{rank // 2}", "kind": kind, "message": f"m{rank}", "phase": "train",
            "step": step, "traceback": trace, "fingerprint": attempts.fingerprint(kind, trace)}  # fmt: skip


@pytest.mark.parametrize(
    ("verdicts", "rank", "text"),
    [
        # one left nothing; its node is known from the pre-flight check
        ([said(0), said(1), said(3)], 2, "rank 2 on n1 left no stacks"),
        ([said(0)], 1, "rank 1 on n0, rank 2 on n1, rank 3 on n1 left no stacks"),
        # one ran again while it was being killed
        ([said(0), said(1), said(2) | {"exception": "ProcessStopped"}, said(3, LOSS)], 2,
         "rank 2 on n1: was stopped; m2"),
        # and found the others gone before it found itself late
        ([said(0) | {"time": 50.0}, said(1) | {"time": 51.0}, said(2, kind="peer") | {"time": 60.0},
          said(3, kind="peer") | {"time": 51.2}], 2, "rank 2 on n1: was stopped; m2"),
        ([said(0) | {"time": 50.0}, *(said(r, kind="peer") | {"time": 50.5} for r in (1, 2, 3))], None, ""),
        # all speak: the one that does not wait
        ([said(0), said(1), said(2, LOSS), said(3)], 2, "rank 2 on n1: not inside a collective"),
        ([said(0, LOSS), said(1), said(2, LOSS), said(3)], 0, "rank 0 on n0, rank 2 on n1: not inside"),
        # all wait, but not for the same: the few
        ([said(0), said(1), said(2), said(3, step=6)], 3, "rank 3 on n1: not where the others are"),
        # writing a checkpoint is no waiting, although DCP lies under torch/distributed
        ([said(0), said(1, WAIT.replace("distributed_c10d", "checkpoint/filesystem")), said(2), said(3)], 1,
         "rank 1 on n0: not inside a collective"),
        # nobody stands out
        ([said(0), said(1), said(2), said(3)], None, ""),
        ([said(0), said(1), said(2, step=6), said(3, step=6)], None, ""),
        ([said(r, LOSS) for r in range(4)], None, ""),
        # no hang at all
        ([said(0, kind="exception")], None, ""),
    ],
)  # fmt: skip
def test_who_is_to_blame(verdicts, rank, text):
    nodes = {0: "n0", 1: "n0", 2: "n1", 3: "n1"}
    suspect = hang.suspect(verdicts, 4, nodes)
    assert (suspect.rank if suspect else None) == rank
    assert text in (suspect.message if suspect else "")


def test_a_single_rank_blames_nobody():
    assert hang.suspect([said(0)], 1, {}) is None


def test_the_first_announcement_stays(tmp_path):
    attempts.log_dir(tmp_path, 1).mkdir(parents=True)
    hang.announce(tmp_path, 1, {"rank": 3})
    hang.announce(tmp_path, 1, {"rank": 1})
    assert '"rank": 3' in hang.announcement(tmp_path, 1).read_text()
    assert [p.name for p in attempts.log_dir(tmp_path, 1).iterdir()] == ["hang.json"]


def test_decision_names_the_suspect_and_its_node():
    verdict = Verdict(0, "n0", "hang", 70, "no progress", step=7, phase="train", fingerprint="f")
    decision = decide.decide(
        Facts("X", 70, verdicts=(verdict,), suspect=Suspect(2, "n1", "rank 2 is silent"))
    )
    assert (decision.action, decision.exit_code, decision.fingerprint) == ("requeue", 70, "f")
    first, second = decision.summary.splitlines()[:2]
    assert first == "hung (rank 2, n1, phase train, step 7): rank 2 is silent"
    assert second == "  noticed by rank 0 on n0: no progress"


def test_a_silent_rank_on_a_lost_node_did_not_hang():
    verdict = Verdict(0, "n0", "hang", 70, "no progress", phase="rendezvous", fingerprint="f")
    suspect = Suspect(1, None, "rank 1 left no stacks", silent=True)
    facts = Facts("X", 70, verdicts=(verdict,), suspect=suspect, lost_nodes=("n1",))
    decision = decide.decide(facts)
    assert (decision.cause, decision.action) == ("killed", "requeue")
    assert "(rank 1, n1, phase rendezvous): lost: n1; rank 1 left no stacks" in decision.summary
    stopped = dataclasses.replace(facts, suspect=dataclasses.replace(suspect, silent=False))
    assert decide.decide(stopped).cause == "hang"  # its stacks are there: it hung


@pytest.mark.parametrize(
    ("num_nodes", "bad", "excluded"),
    [(4, ["n2"], ("n2",)), (4, ["n3", "n1"], ("n1", "n3")), (2, ["n0", "n1"], ()), (1, ["n0"], ("n0",))],
)
def test_excluded_nodes(num_nodes, bad, excluded):
    """Where all of several nodes fail, none of them is to blame."""
    verdicts = tuple(Verdict(i, node, "exception", 1, "m", phase="preflight") for i, node in enumerate(bad))
    facts = Facts("X", 1, verdicts=verdicts, num_nodes=num_nodes)
    assert decide.decide(facts).exclude == excluded
    other = dataclasses.replace(
        facts, verdicts=tuple(dataclasses.replace(v, phase="train") for v in verdicts)
    )
    assert decide.decide(other).exclude == ()


DUMP = """\
noise
strop: native stack of the thread that crashed, signal 11:
  native #0 +0x16ce2e in /lib/libc.so.6
  native #1 _ZN2at6native10bad_kernelERKNS_6TensorE+0x{offset} in /x/libtorch_cpu.so
  native #2 _Z6callerv+0x10 in /x/libtorch_cpu.so
  native #3 ffi_call+0x12 in /x/libffi.so.8
  native #4 PyObject_Call+0x12 in /usr/bin/python3

Fatal Python error: Segmentation fault

Thread 0x01 (most recent call first):
  File "/x/threading.py", line {other} in wait

Current thread 0x02 (most recent call first):
  File "/r/ops.py", line 12 in kernel
  File "/r/loop.py", line 30 in _step

Extension modules: numpy._core (total: 1)
"""


def test_a_crash_is_told_by_the_thread_that_crashed(tmp_path):
    (tmp_path / "rank00000.err").write_text("Connection closed by peer\n")
    (tmp_path / "rank00004.err").write_text(DUMP.format(other=331, offset="1f"))
    found = crash.find(tmp_path)
    assert found is not None
    assert found.rank == 4
    assert found.message.startswith(
        "Segmentation fault, at ops.py:12 in kernel < loop.py:30 in _step, "
        "native: at::native::bad_kernel < caller < ffi_call (stacks"
    )
    (tmp_path / "rank00004.err").write_text(
        DUMP.format(other=327, offset="2a")
    )  # another thread was elsewhere
    assert crash.find(tmp_path) == found
    for old, new in (("line 12", "line 13"), ("ffi_call", "other_call")):
        (tmp_path / "rank00004.err").write_text(DUMP.format(other=331, offset="1f").replace(old, new))
        other = crash.find(tmp_path)
        assert other is not None
        assert other.fingerprint != found.fingerprint


def test_a_crash_without_python_frames(tmp_path):
    text = DUMP[: DUMP.index("\nThread 0x01")].format(offset="1f")
    (tmp_path / "rank00000.err").write_text(text)
    found = crash.find(tmp_path)
    assert isinstance(found, Crash)
    assert "native: at::native::bad_kernel <" in found.message
    (tmp_path / "rank00000.err").write_text(text.replace("bad_kernel", "other_kernel"))
    other = crash.find(tmp_path)
    assert other is not None
    assert other.fingerprint != found.fingerprint


def test_no_crash(tmp_path):
    (tmp_path / "rank00000.err").write_text("Timeout (0:00:05)!\nThread 0x01\n")
    assert crash.find(tmp_path) is None
    assert "Timeout" in crash.last_words(tmp_path, set())
    assert crash.last_words(tmp_path, {0}) == ""


NODES = ["a", "a", "b", "b"]


def test_slowness_is_relative_to_the_others():
    assert stragglers.slowness([1.0, 3.0]) == [pytest.approx(1 / 3), 3.0]  # two ranks: to each other
    assert stragglers.slowness([1.0, 1.0, 4.0, 2.0]) == [0.5, 0.5, 4.0, 2.0]


def test_a_slow_rank_is_told_when_it_stays_slow():
    judge = stragglers.Judge(NODES)
    slow = [1.0, 1.0, 2.3, 1.0]
    told = [judge.window(slow) for _ in range(13)]
    line = "rank 2 on b is 2.3 x slower than the median for the last {} steps"
    assert {i + 1: lines for i, lines in enumerate(told) if lines} == {
        3: [line.format(30)],
        6: [line.format(60)],
        12: [line.format(120)],
    }
    assert judge.window([1.0] * 4) == ["rank 2 on b keeps pace again"]
    assert judge.window([1.0] * 4) == []


def test_slow_now_and_then_is_nothing():
    judge = stragglers.Judge(NODES)
    for window in range(20):
        assert judge.window([1.0, 1.0, 1.0, 3.0 if window % 3 else 1.0]) == []


def test_a_slow_node_is_one_line():
    judge = stragglers.Judge(["a", "a", "b", "b", "c", "c"])
    told = [judge.window([1, 1, 2, 3, 1, 1]) for _ in range(3)]
    assert told == [[], [], ["b (all 2 ranks) is 2.0 x slower than the median for the last 30 steps"]]


@pytest.mark.parametrize("offset", [0.0, 5.0, -3.25])
def test_clock_offsets(offset, monkeypatch):
    """Two simulated ranks leave each barrier up to 3 ms after the other; rank 1's clock is off by `offset`.

    The true offset must lie within the interval that is told, and that must be as narrow as the best round.
    """
    delays = [(0.001, 0.003), (0.002, 0.0), (0.0001, 0.0004), (0.003, 0.001)] * 2
    times: list[tuple[list[float], list[float]]] = [([], []), ([], [])]
    now = 100.0
    for pair in delays:
        for rank, delay in enumerate(pair):
            skew = offset * rank
            times[rank][0].append(now + delay + skew)
            times[rank][1].append(now + max(pair) + 0.0002 + delay / 10 + skew)
        now += 1
    clock = iter(value for a, b in zip(*times[0]) for value in (a, b))
    monkeypatch.setattr(preflight.time, "time", lambda: next(clock))
    dist = SimpleNamespace(barrier=lambda: None, gather=lambda mine: [mine, times[1]])
    zero, (told, error) = preflight.clock_offsets(dist)  # type: ignore[arg-type]
    assert zero == (0.0, 0.0)
    assert abs(told - offset) <= error < 0.0006


def test_storage_check(tmp_path, monkeypatch):
    run = SimpleNamespace(dir=tmp_path, logs=tmp_path, env=SimpleNamespace(rank=3, node="n1", local_rank=0))
    preflight.check_storage(run)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"other")
    with pytest.raises(preflight.PreflightError, match="n1 reads other bytes"):
        preflight.check_storage(run)  # type: ignore[arg-type]


@pytest.mark.parametrize(("number", "kind"), [(28, preflight.StorageError), (5, preflight.PreflightError)])
def test_a_full_disk_is_everybodys_and_an_io_error_the_nodes(tmp_path, monkeypatch, number, kind):
    run = SimpleNamespace(dir=tmp_path, logs=tmp_path, env=SimpleNamespace(rank=3, node="n1", local_rank=0))

    def fsync(descriptor):
        raise OSError(number, "made up")

    monkeypatch.setattr(preflight.os, "fsync", fsync)
    with pytest.raises(kind):
        preflight.check_storage(run)  # type: ignore[arg-type]


def test_a_directory_that_one_node_can_only_read_is_named(tmp_path, monkeypatch):
    """The batch host has written the attempt's record there: it is the node's mount, or the container's."""
    run = SimpleNamespace(dir=tmp_path, logs=tmp_path, env=SimpleNamespace(rank=3, node="n1", local_rank=0))

    def replace(source, target):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(preflight.os, "replace", replace)
    with pytest.raises(preflight.PreflightError, match=f"^n1 can only read {tmp_path}: .*MOUNTS"):
        preflight.check_storage(run)  # type: ignore[arg-type]
