"""`--why` on runs of 512 ranks that were written by hand: it must name the rank and the cause that the test
has struck, whatever the 511 others say and the clocks of the nodes show. The text is pinned by golden files.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from strop.errors import UserError
from strop.obs import run_files, why
from strop.slurm import attempts
from tests.unit.rank_files import NCCL_TIMEOUT, TRACE, Made, T
from tools import logs as tool

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
STEPS = list(range(101, 121))
INDEX = "index 5 is out of bounds for dimension 0 with size 4"
OTHER_TRACE = TRACE.format(
    place='losses.py", line 71, in preference\n    margin = chosen[index]', error=f"IndexError: {INDEX}"
)
NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 8796093022208 bytes. Error code 12 (Cannot allocate memory)"
)
NCCL_SYSTEM = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, unhandled system error, "
    "NCCL version 2.27.5\nncclSystemError: System call (e.g. socket, malloc) or external library call failed."
)
OOM_EVENT = (
    "slurmstepd: error: Detected 1 oom_kill event in StepId=812.0. "
    "Some of the step tasks have been OOM Killed."
)
NODE_FAILURE = (
    "slurmstepd-gpu000: error: *** STEP 812.0 ON gpu000 CANCELLED AT 2026-11-18T12:28:47 DUE TO NODE "
    "FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***"
)
DUMP = """\
Fatal Python error: {words}

Current thread 0x00007f1c (most recent call first):
  File "/repo/src/strop/ops/native.py", line 61 in linear_logprobs
  File "/repo/src/strop/loop.py", line 165 in _step

Extension modules: numpy._core._multiarray_umath (total: 1)
"""


def all_but(made: Made, *ranks: int) -> list[int]:
    return [r for r in range(made.num_ranks) if r not in ranks]


def raises(made: Made) -> None:
    """Rank 29's clock is 3.1 s ahead: by the times as written most followers failed before it. Some ranks
    were ended before they spoke, and one fails of something else a moment later."""
    made.live(125.0, STEPS)
    made.verdict(
        29,
        125.0,
        "exception",
        "index 5 is out of bounds for dimension 0 with size 4",
        "IndexError",
        OTHER_TRACE,
    )
    made.follow([r for r in all_but(made, 29) if r % 50], 125.05)
    made.verdict(300, 125.1, "exception", "unexpected end of stream", "OSError",
                 OTHER_TRACE.replace("losses.py", "store.py"))  # fmt: skip
    made.srun("srun: error: gpu003: task 29: Exited with exit code 1", "srun: Terminating StepId=812.0",
              "srun: error: gpu010: tasks 80-87: Exited with exit code 1")  # fmt: skip
    made.close(1, 130.0)


def is_killed(made: Made) -> None:
    """SIGKILL leaves nothing; three ranks notice with words that nobody knows, before the others."""
    made.live(125.0, STEPS, silent={200: 121.0})
    made.follow([r for r in all_but(made, 200) if r > 3], 125.1)
    for rank in (1, 2, 3):
        made.verdict(rank, 125.0, "exception", "unpack requires a buffer of 8 bytes", "error", OTHER_TRACE)
    made.srun("srun: error: gpu025: task 200: Killed", "srun: Terminating StepId=812.0",
              "srun: error: gpu000: tasks 1-3: Exited with exit code 1")  # fmt: skip
    made.close(137, 130.0)


def crashes(made: Made) -> None:
    """The others' NCCL watchdogs abort their processes ten minutes later, which looks like a crash too."""
    made.live(125.0, STEPS)
    made.stderr(477, DUMP.format(words="Segmentation fault"))
    for rank in all_but(made, 477):
        made.stderr(rank, NCCL_TIMEOUT.format(rank) + "\nterminate called\n" + DUMP.format(words="Aborted"))
    made.srun("srun: error: gpu059: task 477: Segmentation fault (core dumped)",
              "srun: error: gpu000: tasks 0-7: Aborted (core dumped)")  # fmt: skip
    made.close(139, 730.0)


def hangs(made: Made) -> None:
    made.live(125.0, STEPS, silent={511: 118.0})
    for rank in all_but(made, 511):
        made.verdict(
            rank, 725.0, "hang", "no progress within 600 s: dist.py:52 in sum < loop.py:150 in _step"
        )
    made.srun("srun: error: gpu000: tasks 0-7: Exited with exit code 70")
    made.close(70, 740.0)


def starves(made: Made) -> None:
    made.live(125.0, STEPS, silent={66: 124.0})
    made.follow(all_but(made, 66), 125.0)
    made.srun(OOM_EVENT, "srun: error: gpu008: task 66: Out Of Memory", "srun: Terminating StepId=812.0")
    made.close(1, 130.0)


def starves_in_torch(made: Made) -> None:
    """An allocation that fails is a RuntimeError on the CPU; an older trainer called it an exception."""
    made.live(125.0, STEPS)
    made.verdict(0, 125.0, "oom", NO_MEMORY, "RuntimeError", OTHER_TRACE)
    made.follow(all_but(made, 0), 125.0)
    made.close(1, 130.0)


def loses_a_node(made: Made) -> None:
    """Eight ranks are silent, the others' NCCL reports a remote end; nobody says that it was them."""
    made.live(125.0, STEPS, silent=dict.fromkeys(range(96, 104), 119.0))
    made.follow(all_but(made, *range(96, 104)), 126.0, NCCL_SYSTEM)
    made.srun("srun: error: Node failure on gpu012", NODE_FAILURE)
    made.close(1, 130.0)


def is_the_users(made: Made) -> None:
    for rank in all_but(made):
        made.verdict(
            rank, 12.0, "user", "optim.lrr: unknown key; did you mean optim.lr?", None, None, None, "start"
        )
    made.close(78, 13.0)


CASES: dict[str, tuple[Callable[[Made], None], str, int]] = {
    "raises": (raises, "exception", 29),
    "is_killed": (is_killed, "killed", 200),
    "crashes": (crashes, "segfault", 477),
    "hangs": (hangs, "hang", 511),
    "starves": (starves, "oom", 66),
    "starves_in_torch": (starves_in_torch, "oom", 0),
    "loses_a_node": (loses_a_node, "killed", 96),
    "is_the_users": (is_the_users, "user", 0),
}


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_files.shutil, "which", lambda name: None)  # job 812 may be somebody's
    made = Made(tmp_path)
    made.commit(100)
    made.begin()
    return made


@pytest.mark.parametrize("name", CASES)
def test_512_ranks(made, name):
    strike, cause, rank = CASES[name]
    strike(made)
    began = time.process_time()
    found = why.explain(Path("runs/big"))
    assert time.process_time() - began < 2.0  # the machine may be busy
    assert (found.cause, found.first and found.first.rank) == (cause, rank)
    assert attempts.read(made.dir, 1)["cause"] == cause  # the job body decided so too
    told = [rank, *(found.alike.ranks if found.alike else ())]
    told += [r for group in (*found.others, *found.followed, *found.silent) for r in group.ranks]
    assert sorted(told) == list(range(512))  # everybody once
    text = why.text(found)
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 160
    golden(f"why_{name}.txt", text)


@pytest.mark.parametrize("name", CASES)
def test_without_a_decision(made, name, monkeypatch):
    """The batch shell died too: the same witnesses, read by whoever looks."""
    monkeypatch.setattr(made, "close", lambda *args: None)
    strike, cause, rank = CASES[name]
    strike(made)
    os.utime(attempts.record_file(made.dir, 1), (T, T))
    found = why.explain(Path("runs/big"))
    assert (found.cause, found.first and found.first.rank) == (cause, rank)
    assert found.decision == "none was recorded: its batch shell died too"


def golden(name: str, text: str) -> None:
    assert text == (GOLDEN / name).read_text()


# ------------------------------------------------------------------------------------- other states of a run


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Two nodes of four ranks, an attempt that has begun."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_files.shutil, "which", lambda name: None)
    small = Made(tmp_path, ranks=8, per_node=4)
    small.begin()
    return small


def test_a_failure_is_still_told_when_the_run_has_gone_on(small):
    small.live(125.0, STEPS)
    small.verdict(5, 125.0, "exception", INDEX, "IndexError", OTHER_TRACE)
    small.close(1, 130.0)
    small.begin(200.0)
    small.live(325.0, STEPS)
    attempts.finish(small.dir, 2, "DONE", step=120)
    small.close(0, 330.0)
    found = why.explain(small.dir)
    assert (found.state, found.attempt, found.first and found.first.rank) == ("finished", 1, 5)
    assert found.next == "nothing: attempt 2 went on, and the run is finished"
    second = why.explain(small.dir, 2)
    assert (second.cause, second.first, second.followed, second.silent) == ("done", None, (), ())
    with pytest.raises(UserError, match=r"--attempt 3: .* has 1-2"):
        why.explain(small.dir, 3)


def test_a_run_that_is_well(small):
    small.live(125.0, STEPS)
    text = why.text(why.explain(small.dir))
    assert text.startswith("big: starting\nno attempt has failed\nnext      nothing: it runs")


def test_a_failure_under_way(small):
    """The rank has failed, and Slurm has not yet ended the others."""
    small.live(125.0, STEPS)
    small.verdict(5, 125.0, "exception", INDEX, "IndexError", OTHER_TRACE)
    found = why.explain(small.dir)
    assert (found.cause, found.first and found.first.rank) == ("exception", 5)
    assert found.decision == "none yet: the job body waits for the other ranks to end"


def test_the_third_failure_in_a_row_says_what_is_spent(small):
    for n in range(3):
        small.begin(200.0 * (n + 1)) if n else None
        small.live(125.0, STEPS)
        small.verdict(5, 125.0, "exception", INDEX, "IndexError", OTHER_TRACE)
        small.close(1, 130.0)
    found = why.explain(small.dir)
    assert (found.attempt, found.state) == (3, "failed")
    assert found.decision == (
        "the same failure 3 times without a new checkpoint (failure 3 of 5 without a new checkpoint)"
    )
    second = why.explain(small.dir, 2).decision
    assert second == (
        "requeued (failure 2 of 5 without a new checkpoint); the same failure as in 1 attempt before"
    )


@pytest.mark.parametrize("text", ["", '{"rank": 3, "ki', "null", "[1]", '{"kind": 7}', "\x00\udcff"])
def test_a_torn_verdict_is_counted(small, text):
    small.live(125.0, STEPS)
    (small.logs / "verdict-00003.json").write_bytes(text.encode(errors="surrogateescape"))
    small.verdict(5, 125.0, "exception", INDEX, "IndexError", OTHER_TRACE)
    (small.logs / "clock.json").write_text('{"ranks": [{"rank": 0}')
    (small.logs / "rank00005.jsonl").write_bytes(b'\xff\xfe{"time":"20')
    small.close(1, 130.0)
    found = why.explain(small.dir)
    assert (found.cause, found.first and found.first.rank) == ("exception", 5)
    assert found.notes == ("cut off and unreadable: verdict of rank 3",)
    assert [g.ranks for g in found.others] == [(3,)]


def test_a_watchdog_that_was_faster_than_the_news(small):
    """Rank 3 waited in a collective when its own watchdog fired: it followed. Rank 4 stood elsewhere."""
    small.live(125.0, STEPS)
    small.verdict(0, 125.0, "oom", NO_MEMORY, "RuntimeError", OTHER_TRACE)
    stack = '  File "/r/src/strop/loop.py", line 9, in _step\n  File "{}", line 7, in wait\n'
    for rank, file in ((3, "/venv/torch/distributed/distributed_c10d.py"), (4, "/r/src/strop/data/batch.py")):
        small.verdict(rank, 129.0, "hang", "no progress within 4 s", None, stack.format(file))
    small.close(1, 130.0)
    found = why.explain(small.dir)
    assert (found.cause, found.first and found.first.rank) == ("oom", 0)
    assert [g.ranks for g in found.followed] == [(3,)]
    assert [g.ranks for g in found.others] == [(4,)]


def test_no_logs(small):
    for path in small.logs.iterdir():
        path.unlink()
    small.logs.rmdir()
    os.utime(attempts.record_file(small.dir, 1), (T, T))
    found = why.explain(small.dir)
    assert (found.cause, found.first) == ("lost", None)
    assert "holds no logs" in found.notes[0]
    assert "died without a word" in why.text(found)


def test_all_silent_blames_nobody(small):
    small.live(125.0, STEPS)
    os.utime(attempts.record_file(small.dir, 1), (T, T))
    found = why.explain(small.dir)
    assert (found.cause, found.first) == ("lost", None)
    assert [g.ranks for g in found.silent] == [tuple(range(8))]


def test_nothing_has_begun_and_no_run(tmp_path):
    (tmp_path / "r/attempts").mkdir(parents=True)
    assert "no attempt has begun" in why.text(why.explain(tmp_path / "r"))
    with pytest.raises(UserError, match="not a run of strop"):
        why.explain(tmp_path)


def test_a_run_is_only_read(small):
    small.live(125.0, STEPS)
    small.verdict(5, 125.0, "exception", INDEX, "IndexError", OTHER_TRACE)
    small.close(1, 130.0)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in small.dir.rglob("*")}
    why.explain(small.dir)
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in small.dir.rglob("*")}


def test_secrets_are_masked(small):
    small.live(125.0, STEPS)
    small.verdict(5, 125.0, "exception", "password=hunter2222 was refused", "ValueError")
    small.close(1, 130.0)
    assert "hunter2222" not in why.text(why.explain(small.dir))


def test_colour_is_only_colour(small):
    small.live(125.0, STEPS)
    small.verdict(5, 125.0, "exception", INDEX, "IndexError", OTHER_TRACE)
    small.close(1, 130.0)
    found = why.explain(small.dir)
    assert "\x1b[31m" in why.text(found, color=True)
    assert re.sub(r"\x1b\[\d+m", "", why.text(found, color=True)) == why.text(found)


def test_as_a_user_calls_it(small, monkeypatch, capsys):
    """Exit code 0 for an explanation, 78 (UserError) for a mistake; nothing but the explanation on stdout."""
    small.live(125.0, STEPS)
    small.verdict(5, 125.0, "exception", INDEX, "IndexError", OTHER_TRACE)
    small.close(1, 130.0)

    def call(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["logs", *words])
        tool.main()
        return capsys.readouterr().out

    assert call("runs/big", "--why") == why.text(why.explain(small.dir))
    assert call("runs/big", "--why", "--attempt", "1", "--color", "always").startswith("big: \x1b[1m")
    assert call("runs/big", "--html", "page.html") == "page.html\n"
    assert Path("page.html").read_text().startswith("<!DOCTYPE html>")
    for words, named in {
        ("--why", "--attempt", "7"): "--attempt 7",
        ("--why", "--attempt", "x"): "--attempt x",
        ("--html", "none/page.html"): "--html none/page.html",
    }.items():
        with pytest.raises(UserError, match=named) as refused:
            call("runs/big", *words)
        assert refused.value.exit_code == 78
