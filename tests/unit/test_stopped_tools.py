"""A preparation or an export that is stopped: what it says by its exit code, and what it leaves behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from strop import files
from tools.prepare import Finished

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("calls", "set_is_there", "expected"),
    [
        ([], False, False),
        ([], True, False),  # found, not made
        ([(3, 9)], False, False),  # three parts of an earlier call
        ([(3, 9), (4, 9)], False, True),
        ([(0, 9)], False, False),
        ([(9, 9)], True, True),  # the last steps of a set whose parts were there
        ([(1000, 0), (2000, 0)], False, False),  # rows: a set is made whole or not
        ([(1000, 0), (2000, 0)], True, True),
    ],
)
def test_whether_anything_was_finished(calls, set_is_there, expected):
    finished = Finished()
    for done, total in calls:
        finished(done, total)
    if set_is_there:
        finished.set_is_there()
    assert finished.any is expected


def test_a_second_set_counts_from_its_own_beginning():
    finished = Finished()
    finished.set_is_there()
    finished(7, 9)
    assert not finished.any


def test_term_cleans_up_and_a_second_one_does_not_disturb(tmp_path):
    """The exit code is asked for when the signal comes."""
    program = (
        "import os, signal, sys, time\n"
        "from tools.command_line import end_on_term\n"
        "code = [143]\n"
        "end_on_term(lambda: code[0])\n"
        "code[0] = 75\n"
        "try:\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "finally:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('cleaned', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": "src"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert process.stdout.read() == "cleaned\n"


def test_left_overs_of_killed_writers(tmp_path):
    """Only of this very target: not of one whose name begins with its own."""
    program = (
        "import os, pathlib\n"
        "from strop import files\n"
        "with files.new_directory(pathlib.Path('latest')):\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    variables = {"PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=variables)
    (left,) = tmp_path.iterdir()
    (tmp_path / ".latest.18.old").mkdir()
    kept = [tmp_path / name for name in ("latest", ".latest.bf16.17.tmp", ".latest-bf16.17.tmp", ".latest.x")]
    for path in kept:
        path.mkdir()
    files.remove_left_over(tmp_path / "latest")
    assert not left.exists()
    assert sorted(tmp_path.iterdir()) == sorted(kept)


TOOLS = [path.stem for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text()]


@pytest.mark.parametrize("tool", TOOLS)
def test_ctrl_c_during_the_first_imports_is_one_line(tmp_path, tool):
    """All tools import argparse; this one takes as long as it needs to be interrupted."""
    (tmp_path / "argparse.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", f"tools.{tool}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "interrupted\n")
    assert process.returncode == 130


def test_ctrl_c_cleans_up_once_the_tool_has_begun():
    """And whoever only imports a tool keeps what Ctrl-C does for him."""
    program = (
        "import signal, tools\n"
        "from tools.command_line import run\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "signal.signal(signal.SIGINT, tools.end_at_once)  # as of `python -m tools.NAME`\n"
        "def main():\n"
        "    try:\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    finally:\n"
        "        print('cleaned', flush=True)\n"
        "run(main)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "cleaned\n", "interrupted\n")
