"""The log of one rank: every line is one `write` to an append-only file of its own (`strop.obs.log_line`).

`RankLog.write` may be called by any thread. The time is taken under the lock, just before the write, so the
lines of a file are in the order of their times. A file that is full is followed by the next segment. The
first segment and the newest ones stay; what goes is counted, and so is a line that could not be written
(a full disk must not end the training): the running total stands in the next line as `dropped`.

A thread of its own looks once a second whether the raw files (`strop.obs.raw`) have grown without a line that
says when, writes such a line, and deletes old segments of theirs. Where the files lie on a
node's own disk it also copies them to the run directory from time to time.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, Protocol

from strop.obs import log_line, secrets
from strop.obs.raw import RawFiles, victim
from strop.slurm import collect

SEGMENTS = 4
"""Of a rank's files of one kind that stay: the first and the newest three."""
TICK_S = 1.0
RETRY_S = 1.0
SYNC_S = 30.0
LONGEST = 1 << 16
"""Characters of a message or traceback; of a longer one the middle is left out, and it says so."""


class Place(Protocol):
    """Where the rank is: strop.run.Position."""

    @property
    def step(self) -> Optional[int]: ...

    @property
    def phase(self) -> str: ...


class RankLog:
    def __init__(
        self,
        directory: Path,
        rank: int,
        node: str,
        attempt: int,
        *,
        position: Place,
        max_bytes: int,
        raw: Optional[RawFiles] = None,
        shared: Optional[Path] = None,
        redact: Callable[[str], str] = secrets.redact,
    ) -> None:
        """`max_bytes`: of all structured lines of this rank together. `shared`: where the files are copied
        to, if `directory` is on the node's own disk. Raises nothing: a log that cannot be written says so
        on stderr, and tries again."""
        self._directory = directory
        self._rank = rank
        self._who = {"rank": rank, "node": node, "attempt": attempt}
        self._position = position
        self._segment_bytes = max_bytes // SEGMENTS
        self._raw = raw
        self._shared = shared
        self._redact = redact
        self._lock = threading.RLock()
        self._fd: Optional[int] = None
        self._index = 0
        self._size = 0
        self._counts = {0: 0}
        """Lines by segment."""
        self._gone = 0
        """Lines that are nowhere any more, in all."""
        self._told = 0
        """What the last `dropped` said."""
        self._torn = False
        """The file ends within a line: the disk was full."""
        self._failed_at: Optional[float] = None
        self._complained = False
        self._marked = (0, 0) if raw is not None else None
        self._last = 0.0
        self._second = (0, "")
        self._closed = threading.Event()
        os.register_at_fork(after_in_child=self._in_child)
        self._thread = threading.Thread(target=self._watch, name="rank-log", daemon=True)

    @property
    def captured(self) -> bool:
        """Whether the raw output of this process goes to files beside this one."""
        return self._raw is not None

    def _in_child(self) -> None:
        """A forked worker of a data loader: the lock may be held by a thread that is not here."""
        self._lock = threading.RLock()

    def start(self) -> None:
        self._thread.start()

    def write(self, level: str, logger: str, message: str, traceback: Optional[str] = None) -> None:
        """One line. Never raises for want of a disk."""
        message = _shortened(self._redact(message))
        trace = _shortened(self._redact(traceback)) if traceback else None
        with self._lock:
            now = time.monotonic()
            if self._failed_at is not None and now - self._failed_at < RETRY_S:
                self._gone += 1
                return
            try:
                self._append(level, logger, message, trace)
            except OSError as error:
                self._gone += 1
                self._failed_at = now
                self._reopen()
                self._complain(f"cannot be written, lines are lost until it can: {error}")
            else:
                self._failed_at = None
                self._last = now

    def _append(self, level: str, logger: str, message: str, traceback: Optional[str]) -> None:
        if self._fd is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._fd = self._open(self._index)
        elif self._size >= self._segment_bytes:
            self._next_segment(self._fd)
        fields: dict[str, Any] = {"time": _NO_TIME, **self._who}
        fields.update(step=self._position.step, phase=self._position.phase)
        fields.update(level=level, logger=logger, message=message)
        if traceback:
            fields["traceback"] = traceback
        mark = self._raw.mark() if self._raw is not None else None
        if mark != self._marked:
            fields["raw"] = mark
        gone = self._gone
        if gone != self._told or (gone and self._size == 0):
            fields["dropped"] = gone
        text = log_line.encode(fields)[log_line.TIME_END :]
        line = b"".join((b"\n" if self._torn else b"", log_line.PREFIX, self._stamp(), text))
        written = os.write(self._fd, line)
        self._size += written
        if written < len(line):
            self._torn = True
            raise OSError(f"only {written} of {len(line)} bytes were written")
        self._torn = False
        self._counts[self._index] += 1
        self._marked, self._told = mark, gone

    def _stamp(self) -> bytes:
        """The time, of fixed width. Formatting the seconds costs more than all the rest, so it is kept."""
        second, fraction_ns = divmod(time.time_ns(), 10**9)
        if second != self._second[0]:
            self._second = (second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)))
        return f"{self._second[1]}.{fraction_ns // 1000:06d}Z".encode()

    def _open(self, index: int) -> int:
        path = self._directory / log_line.Segment(self._rank, index, False).name
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._size = os.fstat(descriptor).st_size
        return descriptor

    def _reopen(self) -> None:
        """Next time: a file server may have forgotten the descriptor."""
        if self._fd is not None:
            with contextlib.suppress(OSError):  # what an earlier write could not store
                os.close(self._fd)
            self._fd = None

    def _next_segment(self, old: int) -> None:
        self._fd = self._open(self._index + 1)
        os.close(old)
        self._index += 1
        self._counts[self._index] = 0
        self._torn = False
        gone = victim(self._index, SEGMENTS)
        if gone is not None:
            (self._directory / log_line.Segment(self._rank, gone, False).name).unlink(missing_ok=True)
            self._gone += self._counts.pop(gone)

    def _complain(self, what: str) -> None:
        """Once, on the raw stderr."""
        if not self._complained:
            self._complained = True
            with contextlib.suppress(OSError):
                os.write(2, f"strop: the log of rank {self._rank} in {self._directory} {what}\n".encode())

    def _watch(self) -> None:
        synced = time.monotonic()
        while not self._closed.wait(TICK_S):
            self.tick()
            if time.monotonic() - synced >= SYNC_S:
                self.sync()
                synced = time.monotonic()

    def tick(self) -> None:
        """Look after the files: called once a second."""
        with self._lock:
            if self._fd is not None and os.fstat(self._fd).st_nlink == 0:
                self._gone += self._counts[self._index]
                self._counts[self._index] = 0
                self._complain("was deleted, and begins anew")
                self._reopen()
        if self._raw is None:
            return
        with self._lock:
            try:
                self._gone += self._raw.delete_old(SEGMENTS)
            except OSError as error:
                self._complain(f"cannot lose its old raw files: {error}")
            idle = time.monotonic() - self._last >= TICK_S
            if idle and (self._raw.mark() != self._marked or self._gone != self._told):
                self.write("DEBUG", "raw", "raw output")

    def sync(self) -> None:
        """Copy what is new to the run directory, if the files lie elsewhere."""
        if self._shared is not None:
            try:
                collect.sync(self._directory, self._shared, self._rank)
            except OSError as error:
                self._complain(f"cannot be copied to {self._shared}: {error}")

    def close(self) -> None:
        """Say what has not been said yet, and copy the rest. A line that comes later is still written."""
        self._closed.set()
        with self._lock:
            self._failed_at = None
            if self._gone != self._told:
                self.write("WARNING", "strop", "lines of this log are missing")
            if self._raw is not None and self._raw.mark() != self._marked:
                self.write("DEBUG", "raw", "raw output")
        self.sync()


_NO_TIME = "0" * (log_line.TIME_END - log_line.TIME_START)


def _shortened(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"
