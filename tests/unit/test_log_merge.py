"""The merge of rank logs, native and in Python: against an independent sort, by hand, and each other."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strop.obs import log_files, log_text
from strop.obs.log_text import Selection, View
from strop.obs.merge import Merge, lines
from tests.unit.log_helpers import BEGAN_S, VIEWS, LogRun, at, both, line, messages

# --------------------------------------------------------------------------------------------- order

entry = st.tuples(st.integers(0, 40), st.integers(0, 3))
"""Tenths of a second after T0, and which segment step: equal times of several ranks are frequent."""


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    streams=st.lists(st.lists(entry, max_size=12), min_size=1, max_size=6),
    offsets=st.lists(st.integers(-20, 20), min_size=6, max_size=6),
    attempts=st.lists(st.sampled_from([1, 2]), min_size=6, max_size=6),
)
def test_order_is_that_of_a_sort_of_all_lines(
    streams: list[list[tuple[int, int]]], offsets: list[int], attempts: list[int]
) -> None:
    """Independent truth: `sorted` over (largest corrected time so far, rank, attempt, place in the file)."""
    with tempfile.TemporaryDirectory() as folder:
        run = LogRun(Path(folder) / "run")
        clocks = {rank: offsets[rank] / 10 for rank in range(6)}
        for number in (1, 2):
            run.attempt(number, clocks)
        expected = []
        for rank, content in enumerate(streams):
            newest, index = -(10**9), 0
            for place, (tenths, step) in enumerate(content):
                index += step == 3  # a new segment
                name = f"{rank}.{place}"
                text = line(tenths / 10, name, rank=rank, attempt=attempts[rank])
                run.write(rank, text, attempt=attempts[rank], index=index)
                newest = max(newest, tenths - offsets[rank])
                corrected = at(tenths / 10 - clocks[rank])
                expected.append(((newest, rank, attempts[rank], place), name, corrected))
        shown, _ = both(run.directory, VIEWS[0])
        found = [(fields["message"], fields["time"]) for fields in map(json.loads, shown.splitlines())]
        assert found == [(name, corrected) for _, name, corrected in sorted(expected)]


awkward = st.one_of(
    st.binary(max_size=30),
    st.text(max_size=20).map(lambda t: t.encode("utf-8", "surrogatepass")),
    st.builds(
        lambda seconds, message, step, level, mark, trace: line(
            seconds / 10, message, step=step, level=level, **mark, **trace
        )[:-1],
        st.integers(-9, 30),
        st.one_of(st.text(max_size=20), st.sampled_from(["took 3 ms", "took -4.5e-3 ms", "a\tb\x1b\n c\n"])),
        st.one_of(st.none(), st.integers(0, 3)),
        st.sampled_from(["DEBUG", "INFO", "WARNING", "ERROR", "RAW", "MINE", ""]),
        st.one_of(st.just({}), st.builds(lambda *mark: {"raw": mark}, st.integers(0, 2), st.integers(0, 60))),
        st.one_of(st.just({}), st.text(max_size=9).map(lambda t: {"traceback": t})),
    ),
    st.sampled_from([
        b'{"time":"2026-11-20T03:00:00.000000Z","level":"INFO","message":"\\ud83d\\ude00 \\ud83d \\u00e9"}',
        b'{"time":"2026-02-30T03:00:00.000000Z","message":"no such day"}',
        b'{"time":"2026-11-20T03:00:01.000000Z","message":"x","more":{"a":1}}',
        b'{"time":"2026-11-20T03:00:01.000000Z","message":"cut\\"}',
        b'{"time":"2026-11-20T03:00:01.000000Z","message":"\xff\xe2\x82 \xc2\x9b\xed\xa0\x80"}',
        b'{"time":"2026-11-20T03:00:01.000000Z","step":1.5,"a":[1,-2.5e3],"message":null}',
        b"12 of 13\r13 of 13\r",
        b"took 3 ms", b"took 4 ms", b"-1 -2 (-3) a-4 5.6.7 1e999 8e",
    ]),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    content=st.dictionaries(
        st.tuples(st.integers(0, 2), st.integers(0, 2), st.booleans()),
        st.tuples(st.lists(awkward, max_size=6), st.booleans()),
        min_size=1,
        max_size=5,
    ),
    view=st.sampled_from(VIEWS),
    level=st.sampled_from([0, 30]),
)
def test_native_and_python_give_the_same_bytes(content: object, view: View, level: int) -> None:
    """Whatever lies in the files. The output is UTF-8 without control characters, --json is JSON."""
    assert isinstance(content, dict)
    with tempfile.TemporaryDirectory() as folder:
        run = LogRun(Path(folder) / "run")
        run.attempt(1, {0: 0.0, 1: 0.25})
        for (rank, index, raw), (texts, torn) in content.items():
            path = run.write(rank, b"\n".join(texts), b"" if torn else b"\n", index=index, raw=raw)
            os.utime(path, (1_795_300_000, 1_795_300_000))
        text, _ = both(run.directory, view, Selection(level=level))
        if view.json:
            for row in text.split("\n")[:-1]:
                assert json.loads(row)["time"][:2] == "20"
        else:
            assert not {c for c in text.replace("\x1b[", "") if ord(c) < 32 and c not in "\n\t"}


# ---------------------------------------------------------------------------------------- collapsing


def test_equal_lines_of_many_ranks_are_one(tmp_path: Path) -> None:
    """It stands at its first one; a rank that repeats itself, another step or 2 s later make another line."""
    run = LogRun(tmp_path / "run")
    run.attempt(1, dict.fromkeys(range(8), 0.0))
    for rank in range(8):
        run.write(rank, line(0.1 * rank, "loaded shard", rank=rank))
    run.write(3, line(1.0, "only here", rank=3), line(1.1, "loaded shard", rank=3))
    run.write(0, line(0.05, "before the others have it", rank=0))
    run.write(7, line(3.2, "loaded shard", rank=7), line(3.3, "step", rank=7, step=1))
    run.write(6, line(3.3, "step", rank=6, step=2), line(3.3, "step", rank=6, step=3, level="ERROR"))
    run.write(1, line(4.0, "edge of the window", rank=1))
    run.write(2, line(6.0, "edge of the window", rank=2), line(6.000001, "edge of the window", rank=2))
    run.write(4, line(6.000001, "edge of the window", rank=4))
    text, notes = both(run.directory, View())
    assert notes == []
    assert text.splitlines() == [
        "2026-11-20 03:00:00.000 [0-7] INFO     loaded shard",
        "2026-11-20 03:00:00.050 [0] INFO     before the others have it",
        "2026-11-20 03:00:01.000 [3] INFO     only here",
        "2026-11-20 03:00:01.100 [3] INFO     loaded shard",
        "2026-11-20 03:00:03.200 [7] INFO     loaded shard",
        "2026-11-20 03:00:03.300 [6] INFO     step 2: step",
        "2026-11-20 03:00:03.300 [6] ERROR    step 3: step",
        "2026-11-20 03:00:03.300 [7] INFO     step 1: step",
        "2026-11-20 03:00:04.000 [1-2] INFO     edge of the window",
        "2026-11-20 03:00:06.000 [2,4] INFO     edge of the window",
    ]


def test_ranges_collapse_what_differs_in_numbers(tmp_path: Path) -> None:
    run = LogRun(tmp_path / "run")
    run.attempt(1)
    for rank, (shard, seconds) in enumerate([(3, "1.1"), (17, "0.8"), (5, "1.4"), (9, "1.0")]):
        text = f"loaded shard {shard} of 64 in {seconds} s, change -{shard}"
        run.write(rank, line(0.1 * rank, text, rank=rank, step=rank))
    for rank, text in enumerate(("1.0 ms", "1 ms", "2e0 ms", "2 ms")):  # of equal ones, the first's words
        run.write(rank, line(1, text, rank=rank))
    assert messages(both(run.directory, View(ranges=True))[0]) == [
        "step 0: loaded shard [3..17] of 64 in [0.8..1.4] s, change [-17..-3]",
        "[1.0..2e0] ms",
    ]


def test_the_number_of_waiting_lines_is_bounded(tmp_path: Path) -> None:
    """One more than fit: the first is given out, so its twin behind it stands alone."""
    run = LogRun(tmp_path / "run")
    run.attempt(1)
    num = log_text.MAX_GROUPS
    run.write(0, *(line(i * 1e-6, f"m{i}") for i in range(num + 1)))
    run.write(1, line(1.0, "m0", rank=1), line(1.0, f"m{num}", rank=1))
    rows = both(run.directory, View())[0].splitlines()
    assert len(rows) == num + 2
    assert rows[0].endswith("[0] INFO     m0")
    assert rows[-2:] == [
        f"2026-11-20 03:00:00.016 [0-1] INFO     m{num}",
        "2026-11-20 03:00:01.000 [1] INFO     m0",
    ]


# ----------------------------------------------------------------------------------------- selection


def test_selection_against_a_filter_by_hand(tmp_path: Path) -> None:
    run = LogRun(tmp_path / "run")
    run.attempt(1, {0: 0.0, 2: 0.5})
    wanted = []
    for rank in (0, 2):
        for i in range(60):
            level = ("DEBUG", "INFO", "WARNING", "ERROR")[i % 4]
            phase = ("train", "save")[i % 2]
            seconds = i / 10 + (0.5 if rank == 2 else 0.0)
            text = line(seconds, f"é message {i}", rank=rank, level=level, step=i // 5, phase=phase)
            run.write(rank, text)
            if 20 <= i <= 49 and i % 4 >= 2 and i % 2 and 4 <= i // 5 <= 8 and "3" in str(i) and rank == 2:
                wanted.append(f"é message {i}")
    chosen = Selection(
        since_us=int(1e6 * (BEGAN_S + 2)),
        until_us=int(1e6 * (BEGAN_S + 4.9)),
        level=30,
        steps=(4, 8),
        phase="save",
        nodes=frozenset({"n1", "n9"}),
        grep=re.compile(r"^é .*3"),
    )
    found, _ = both(run.directory, View(json=True), chosen)
    assert [json.loads(row)["message"] for row in found.splitlines()] == wanted
    assert wanted
    assert [fields["message"] for fields in lines(log_files.find(run.directory), chosen)] == wanted


# ----------------------------------------------------------------------------------------- bad input


def test_torn_foreign_and_undecodable_lines_are_shown_and_counted(tmp_path: Path) -> None:
    run = LogRun(tmp_path / "run")
    run.attempt(1, {0: 0.0, 1: 0.0})
    run.write(
        0, line(1, "whole"), b"not JSON\n", line(2, "bad").replace(b"bad", b"b\xffd"), line(3, "torn")[:50]
    )
    run.write(1, line(4, "only the newline is missing", rank=1)[:-1])
    text, notes = both(run.directory)
    assert text.splitlines() == [
        "2026-11-20 03:00:01.000 [0] INFO     whole",
        "2026-11-20 03:00:01.000 [0] RAW      not JSON",
        "2026-11-20 03:00:02.000 [0] INFO     b\\xffd",
        "2026-11-20 03:00:02.000 [0] RAW      " + line(3, "torn")[:50].decode(),
        "2026-11-20 03:00:04.000 [1] INFO     only the newline is missing",
    ]
    assert notes == [
        "2 line(s) in another form than strop's, shown as RAW (attempt 1: rank 0)",
        "1 of them torn off at the end of a file (attempt 1: rank 0)",
        "1 line(s) with bytes that are not UTF-8, shown as \\xNN (attempt 1: rank 0)",
    ]


def test_a_clock_that_jumps_back_keeps_the_files_order(tmp_path: Path) -> None:
    run = LogRun(tmp_path / "run")
    run.attempt(1, {0: 0.0, 1: 0.0})
    run.write(0, line(5, "a"), line(1, "b"), line(2, "c"), line(6, "d"))
    run.write(1, *(line(s, f"other {s}", rank=1) for s in (1, 4, 5, 6)))
    text, notes = both(run.directory)
    assert messages(text) == ["other 1", "other 4", "a", "b", "c", "other 5", "d", "other 6"]
    assert "2026-11-20 03:00:01.000 [0] INFO     b" in text.splitlines()
    assert notes == ["2 time(s) a clock went back; the order of the file was kept (attempt 1: rank 0)"]


@pytest.mark.parametrize("native", [True, False])
def test_files_that_vanish_or_become_shorter(tmp_path: Path, native: bool) -> None:
    """Between the listing and the reading."""
    run = LogRun(tmp_path / "run")
    run.attempt(1)
    paths = [run.write(rank, *(line(i, f"{rank}.{i}", rank=rank) for i in range(4))) for rank in range(3)]
    logs = log_files.find(run.directory)
    paths[1].unlink()
    os.truncate(paths[2], len(line(0, "2.0", rank=2)))
    merge = Merge(logs, Selection(), VIEWS[1], native=native)
    assert messages(b"".join(merge).decode()) == ["0.0", "2.0", "0.1", "0.2", "0.3"]
    assert merge.notes() == [
        "file(s) vanished before they were read (attempt 1: rank 1)",
        "file(s) became shorter while they were read (attempt 1: rank 2)",
    ]


def test_silent_ranks_missing_segments_and_deleted_lines_are_named(tmp_path: Path) -> None:
    run = LogRun(tmp_path / "run")
    logs = run.attempt(1, dict.fromkeys(range(6), 0.0))
    run.write(0, line(0, "first"))
    run.write(0, line(9, "newest", dropped=70), line(10, "total so far", dropped=80), index=3)
    run.write(1, line(1, "x", rank=1))
    run.write(2)  # empty
    (logs / "verdict-00007.json").write_text("{}")
    (logs / "present-00008").touch()
    _, notes = both(run.directory)
    assert notes == [
        "attempt 1: rank 2-5,7-8 of 8 wrote nothing",
        "attempt 1: rank 0 of 8 lack(s) a segment that was deleted, by rotation or by hand",
        "80 line(s) deleted by the rotation of a full log (attempt 1: rank 0)",
    ]


def test_two_attempts_of_one_job_stay_apart(tmp_path: Path) -> None:
    """A requeued job has the same id; what a dying rank of the first still wrote comes in its place."""
    run = LogRun(tmp_path / "run")
    run.attempt(1, {0: 0.0}, job_id="77")
    run.attempt(2, {0: 1.0}, began=20, job_id="77")
    run.write(0, line(1, "same"), line(31, "late"))
    run.write(0, line(31, "same", attempt=2), line(33, "end", attempt=2), attempt=2)
    text, _ = both(run.directory, View(show_attempt=True))
    assert text.splitlines() == [
        "2026-11-20 03:00:01.000 #1 [0] INFO     same",
        "2026-11-20 03:00:30.000 #2 [0] INFO     same",
        "2026-11-20 03:00:31.000 #1 [0] INFO     late",
        "2026-11-20 03:00:32.000 #2 [0] INFO     end",
    ]


def test_a_line_without_end_is_cut(tmp_path: Path) -> None:
    """Many buffers long; the lines around it are whole, and marks behind it are still met."""
    run = LogRun(tmp_path / "run")
    run.attempt(1)
    for size in (262143, 262144, 262145, 900000):
        run.write(0, b"x" * size + b"\n", raw=True)
    run.write(0, b"behind\n", raw=True)
    total = 262143 + 262144 + 262145 + 900000 + 4
    run.write(0, line(1, "mark", raw=[0, total]), line(2, "end"))
    text, notes = both(run.directory)
    shown = messages(text)
    assert [len(m) for m in shown[:4]] == [262143, 262144, 262144, 262144]
    assert shown[4:] == ["mark", "end", "behind"]
    assert notes == [
        "2 line(s) longer than 256 KiB, of which only the beginning is shown (attempt 1: rank 0)"
    ]


LIMITED = """
import hashlib, resource, sys
from pathlib import Path
from strop.obs import log_files
from strop.obs.log_text import Selection, View
from strop.obs.merge import Merge
resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
for native in (True, False):
    merge = Merge(log_files.find(Path(sys.argv[1])), Selection(), View(json=True), native=native)
    print(hashlib.sha256(b"".join(merge)).hexdigest(), merge.notes())
"""


def test_more_files_than_descriptors(tmp_path: Path) -> None:
    run = LogRun(tmp_path / "run")
    run.attempt(1)
    for rank in range(60):
        run.write(rank, *(line(i / 10, f"{rank} {i} " + 200 * "x", rank=rank) for i in range(300)))
    text, _ = both(run.directory, View(json=True))
    child = subprocess.run(
        [sys.executable, "-c", LIMITED, str(run.directory)], capture_output=True, text=True, check=True
    )
    assert child.stdout == f"{hashlib.sha256(text.encode()).hexdigest()} []\n" * 2
