"""The process between a rank and its raw log: no secret that a library prints reaches a disk.

    srun -> python -m strop.slurm.launch  --fork-->  the trainer: its descriptors 1 and 2 are a pipe
            stays and reads the pipe      <-pipe---  (rank 0: a second pipe, to the job's output)
            -> strop.obs.raw_filter -> rankNNNNN[.K].err

What a dying process has written stands in the pipe and is read all the same, whether it ended by exit, abort,
SIGSEGV or SIGKILL. The reader is the one whom Slurm started, and ends last, in the way in which the trainer
ended: so Slurm waits until everything is written, and sees the same exit code or signal. USR1 and TERM that
reach only the reader are handed on. If the reader is killed the trainer dies with it; then, as when Slurm
kills the whole step, at most the last lines in the pipe are lost. The reader waits for nothing but
the disk, and the pipe holds 1 MiB until then.

The trainer says over a third pipe (STROP_RAW_FD) which secrets its configuration has and how large a file may
be. It is read after the data and before that is filtered: what was said before a write counts for the write.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, Optional, Protocol

from strop.obs import log_line, secrets
from strop.obs.raw_filter import Filter

PIPE_BYTES = 1 << 20
BLOCK_BYTES = 1 << 16
HOLD_S = 1.0
"""After this time an unfinished line is shown as far as it is harmless."""
RETRY_S = 1.0
PR_SET_PDEATHSIG = 1
FORWARDED = (signal.SIGUSR1, signal.SIGTERM)


class Sink(Protocol):
    def write(self, data: bytes) -> None: ...

    def limit(self, segment_bytes: int) -> None: ...


class Segments:
    """The files rankNNNNN.err, rankNNNNN.1.err, ... Each ends with the line that fills it; who deletes old
    ones is strop.obs.raw."""

    def __init__(self, directory: Path, rank: int):
        """Raises OSError if there can be no file."""
        self._directory = directory
        self._rank = rank
        self._index = 0
        self._limit: Optional[int] = None
        self._lost = 0
        self._failed_at: Optional[float] = None
        self._fd: Optional[int] = self._open()

    def limit(self, segment_bytes: int) -> None:
        self._limit = segment_bytes

    def write(self, data: bytes) -> None:
        """A disk that is full or gone costs bytes, which are counted, and never the run."""
        if self._failed_at is not None and time.monotonic() - self._failed_at < RETRY_S:
            self._lost += len(data)
            return
        try:
            if self._fd is None:
                self._fd = self._open()
            if self._failed_at is not None:
                self._put(b"\nstrop: %d bytes of raw output could not be written here\n" % self._lost)
                self._lost, self._failed_at = 0, None
            while data:
                stop = len(data)
                if self._limit is not None:
                    if self._size >= self._limit:
                        self._next()
                    stop = data.find(b"\n", max(self._limit - self._size - 1, 0)) + 1 or len(data)
                self._put(data[:stop])
                data = data[stop:]
        except OSError:
            self._lost += len(data)
            self._failed_at = time.monotonic()
            if self._fd is not None:
                with contextlib.suppress(OSError):  # what an earlier write could not store
                    os.close(self._fd)
                self._fd = None

    def _open(self) -> int:
        path = self._directory / log_line.Segment(self._rank, self._index, True).name
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._size = os.fstat(descriptor).st_size
        return descriptor

    def _next(self) -> None:
        assert self._fd is not None
        self._index += 1
        old, self._fd = self._fd, None
        os.close(old)
        self._fd = self._open()

    def _put(self, data: bytes) -> None:
        assert self._fd is not None
        while data:
            written = os.write(self._fd, data)
            self._size += written
            data = data[written:]


class Descriptor:
    """The job's output."""

    def __init__(self, fd: int):
        self._fd = fd
        self._ready = select.poll()
        self._ready.register(fd, select.POLLOUT)

    def limit(self, segment_bytes: int) -> None:
        pass

    def write(self, data: bytes) -> None:
        try:
            while data:
                try:
                    data = data[os.write(self._fd, data) :]
                except BlockingIOError:  # whoever opened it said O_NONBLOCK, and its reader is slow
                    self._ready.poll()
        except OSError as error:  # a full disk, or srun is gone: the training goes on
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EPIPE, errno.ESTALE):
                raise


class _Input:
    """A pipe, and where its text goes."""

    def __init__(self, fd: int, sink: Sink, screen: Filter):
        self.fd = fd
        self.sink = sink
        self.filter = screen
        self.due: Optional[float] = None

    def take(self, data: bytes) -> None:
        self.put(self.filter.feed(data))
        self.due = time.monotonic() + HOLD_S if self.filter.unfinished else None

    def put(self, data: bytes) -> None:
        if data:
            self.sink.write(data)


def run(
    become: Callable[[Mapping[str, str]], NoReturn], sink: Sink, values: Sequence[str], *, to_job: bool
) -> NoReturn:
    """Fork. The child calls `become` with the variables that it gets from here; this process reads what the
    child writes until its end, and ends likewise. `values`: secrets beside those of the environment.
    `to_job`: the child gets STROP_STDOUT_FD, too."""
    raw_read, raw_write = _pipe()
    control_read, control_write = os.pipe()
    known = secrets.known_values(values)
    redact = secrets.redactor(values)
    inputs = [_Input(raw_read, sink, Filter(redact, known))]
    given = {"STROP_RAW_FD": control_write}
    if to_job and os.isatty(1):  # no log; and a progress bar is drawn there
        given["STROP_STDOUT_FD"] = os.dup(1)
    elif to_job:
        out_read, given["STROP_STDOUT_FD"] = _pipe()
        inputs.append(_Input(out_read, Descriptor(1), Filter(redact, known)))
    reader = os.getpid()
    child = os.fork()
    if child == 0:
        _die_with(reader)
        for descriptor in given.values():
            os.set_inheritable(descriptor, True)
        for number in (1, 2):
            os.dup2(raw_write, number)
        become({name: str(descriptor) for name, descriptor in given.items()})
    for descriptor in (raw_write, *given.values()):
        os.close(descriptor)
    end_as(_Reader(child, inputs, control_read, list(values)).run())


def _pipe() -> tuple[int, int]:
    read, write = os.pipe()
    with contextlib.suppress(OSError):  # a user may have only so much of it: then it holds 64 KiB
        fcntl.fcntl(write, getattr(fcntl, "F_SETPIPE_SZ", 1031), PIPE_BYTES)
    return read, write


def _die_with(reader: int) -> None:
    """Nobody would read what is written, and the local launcher kills the reader when it means the rank."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != reader:
        os.kill(os.getpid(), signal.SIGKILL)


def end_as(status: int) -> NoReturn:
    """End as the process with this wait status did."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the trainer has left one
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [-code])
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 128 - code)  # a container's first process cannot be killed by itself


class _Reader:
    def __init__(self, child: int, inputs: list[_Input], control: int, values: list[str]):
        self._child = child
        self._inputs = inputs
        self._control = control
        self._values = values
        self._said = b""
        os.set_blocking(control, False)

    def run(self) -> int:
        """The child's wait status, once all it wrote is stored. What is left of its own children is not
        waited for, as nobody waited for them before."""
        wake = self._listen_to_signals()
        poller = select.poll()
        by_fd = {source.fd: source for source in self._inputs}
        for fd in (*by_fd, self._control, wake):
            poller.register(fd, select.POLLIN)
        ended = 0
        while by_fd and not ended:
            for fd, _ in poller.poll(self._wait_ms()):
                if fd in by_fd and not self._read(by_fd[fd]):
                    poller.unregister(fd)
                    del by_fd[fd]
                elif fd == self._control and not self._hear():
                    poller.unregister(fd)
                elif fd == wake:
                    os.read(wake, 512)
                    ended, status = os.waitpid(self._child, os.WNOHANG)
            self._show_unfinished()
        if not ended:
            _, status = os.waitpid(self._child, 0)
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        for source in by_fd.values():
            self._drain(source)
        for source in self._inputs:
            source.put(source.filter.end())
        return status

    def _listen_to_signals(self) -> int:
        """A descriptor that has something to read when the child has ended."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in FORWARDED:
            signal.signal(number, self._forward)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [*FORWARDED, signal.SIGCHLD])
        return read

    def _forward(self, number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child, number)

    def _wait_ms(self) -> Optional[float]:
        due = [source.due for source in self._inputs if source.due is not None]
        return max(0.0, 1e3 * (min(due) - time.monotonic())) if due else None

    def _read(self, source: _Input) -> bool:
        """False at the end of the pipe."""
        data = os.read(source.fd, BLOCK_BYTES)
        self._hear()
        source.take(data)
        return bool(data)

    def _drain(self, source: _Input) -> None:
        """What stands in the pipe when the child has ended; one of its own children may still hold it."""
        os.set_blocking(source.fd, False)
        with contextlib.suppress(BlockingIOError):
            for _ in range(2 * PIPE_BYTES // BLOCK_BYTES):
                if not self._read(source):
                    return

    def _show_unfinished(self) -> None:
        now = time.monotonic()
        for source in self._inputs:
            if source.due is not None and source.due <= now:
                source.due = None
                source.put(source.filter.idle())

    def _hear(self) -> bool:
        """What the trainer says, a JSON object a line. False once nobody can say anything any more."""
        try:
            while data := os.read(self._control, BLOCK_BYTES):
                self._said += data
                *lines, self._said = self._said.split(b"\n")
                for line in lines:
                    self._obey(json.loads(line))
        except BlockingIOError:
            return True
        return False

    def _obey(self, said: Mapping[str, object]) -> None:
        values, limit = said["secrets"], said["segment_bytes"]
        assert isinstance(values, list)
        assert isinstance(limit, int)
        self._values += values
        known, redact = secrets.known_values(self._values), secrets.redactor(self._values)
        for source in self._inputs:
            source.filter.learn(redact, known)
            source.sink.limit(limit)


def tell(control: int, values: Sequence[str], segment_bytes: int) -> None:
    """The trainer's side of STROP_RAW_FD."""
    message = json.dumps({"secrets": list(values), "segment_bytes": segment_bytes}).encode() + b"\n"
    with contextlib.suppress(BrokenPipeError):
        while message:
            message = message[os.write(control, message) :]
