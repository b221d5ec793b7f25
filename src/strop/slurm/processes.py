"""Processes of this machine as /proc shows them; what is gone, or another user's, reads as empty.

Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path


def read_or_empty(path: str | Path) -> bytes:
    """The file's bytes; empty when the process (or file) is gone or not ours."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def command_lines() -> Iterator[tuple[int, list[str]]]:
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (line := read_or_empty(f"/proc/{entry}/cmdline")):
            yield int(entry), [os.fsdecode(arg) for arg in line.rstrip(b"\0").split(b"\0")]


def working_folder(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return ""


def process_state(pid: int | None) -> str:
    """The process' state letter; X if it is gone, or a zombie that nobody has collected yet."""
    # The state comes behind the command's name, which is in brackets and may itself hold blanks and brackets.
    fields = read_or_empty(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return fields[0].decode().upper().replace("Z", "X") if fields else "X"


def kill(pids: list[int]) -> None:
    """SIGKILL, and wait until the processes are gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(process_state(pid) != "X" for pid in pids):
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {pids} survive SIGKILL for 10 s")
        time.sleep(0.02)
