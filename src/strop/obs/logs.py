"""Everything that a rank says goes to its log (`strop.obs.rank_log`): Python's logging and warnings, the
libraries that would rather keep to themselves, what is printed, and exceptions that nobody caught.

Rank 0 speaks to stdout as well, which is the job's .out file or the terminal. Where a rank's stderr does not
go to a file of its own, the other ranks speak to stderr.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Optional, TextIO

from strop.config import LogConfig
from strop.obs import log_line, secrets
from strop.obs.rank_log import SEGMENTS, Place, RankLog
from strop.obs.raw import RawFiles
from strop.obs.raw_writer import tell
from strop.slurm.env import Env

MIB = 1 << 20
CHATTY = ("transformers", "datasets", "huggingface_hub", "httpx", "urllib3", "filelock", "fsspec", "absl")
"""Libraries of which only warnings are shown, unless the level is debug."""


class _Library(logging.Logger):
    """A library's top logger that cannot take its lines elsewhere: on import some put a handler of their
    own there and end the propagation to ours."""

    @property
    def propagate(self) -> bool:
        return True

    @propagate.setter
    def propagate(self, value: bool) -> None:
        pass

    def addHandler(self, hdlr: logging.Handler) -> None:
        pass


class ToRankLog(logging.Handler):
    def __init__(self, rank_log: RankLog) -> None:
        super().__init__()
        self._rank_log = rank_log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except Exception as error:  # of an object's own __str__, or a wrong format: the line is worth more
            message = f"{record.msg!r} % {len(record.args or ())} arguments: {type(error).__name__}: {error}"
        parts = [_FORMATTER.formatException(record.exc_info)] if record.exc_info else []
        parts += [record.stack_info] if record.stack_info else []
        name = log_line.LEVELS[min(max(record.levelno // 10, 1), 5) - 1]
        self._rank_log.write(name, record.name, message.rstrip("\n"), "\n".join(parts) or None)

    def close(self) -> None:
        """At the end, by logging.shutdown."""
        if isinstance(sys.stdout, Printed):
            sys.stdout.finish()
        self._rank_log.close()
        super().close()


_FORMATTER = logging.Formatter()


class _Console(logging.StreamHandler):
    """Looks stdout or stderr up at each line: a progress bar replaces them while it is drawn."""

    def __init__(self, stream_name: str):
        self._stream_name = stream_name
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        stream = getattr(sys, self._stream_name)
        return stream.out if isinstance(stream, Printed) else stream

    @stream.setter
    def stream(self, value: Any) -> None:
        raise AttributeError("the stream is looked up by name")


class _Formatter(logging.Formatter):
    def __init__(self, prefix: str):
        super().__init__(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.levelno >= logging.WARNING:
            record.message = f"{record.levelname}: {record.message}"
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return secrets.redact(super().format(record))


class Printed(io.TextIOBase):
    """sys.stdout of a launched rank: each printed line is a line of its log, and goes to `out` on rank 0."""

    def __init__(self, rank_log: RankLog, out: Optional[TextIO]) -> None:
        self.out = out
        self._rank_log = rank_log
        self._lock = threading.RLock()
        os.register_at_fork(after_in_child=self._in_child)
        self._begun = ""
        """A line without its end: already in `out` up to `_shown` if somebody flushed."""
        self._shown = 0

    def _in_child(self) -> None:
        """As of RankLog: a forked worker must not wait for a thread that it does not have."""
        self._lock = threading.RLock()

    encoding = "utf-8"
    errors = "backslashreplace"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.out.fileno() if self.out is not None else 1

    @property
    def buffer(self) -> Any:
        """For bytes: past all this, to the raw descriptor."""
        return self.out.buffer if self.out is not None else sys.__stdout__ and sys.__stdout__.buffer

    def write(self, text: str) -> int:
        with self._lock:
            *lines, rest = (self._begun + text).split("\n")
            for line in lines:
                self._show(line, "\n")
                self._shown = 0
                self._rank_log.write("INFO", "stdout", line)
            self._begun = rest
        return len(text)

    def _show(self, line: str, end: str) -> None:
        if self.out is not None:
            self.out.write(secrets.redact(line)[self._shown :] + end)

    def flush(self) -> None:
        with self._lock:
            if self._begun and self.out is not None:
                self._show(self._begun, "")
                self._shown = len(secrets.redact(self._begun))
            if self.out is not None:
                self.out.flush()

    def finish(self) -> None:
        """At the end: what has no line end is a line all the same."""
        with self._lock:
            if self._begun:
                self.write("\n")
            self.flush()


def setup(
    config: LogConfig,
    env: Env,
    directory: Path,
    shared: Path,
    attempt: int,
    position: Place,
) -> RankLog:
    """Send all of this process there. `directory` holds the rank's files; `shared` is the run's directory for
    them. Calling it again replaces the first."""
    max_bytes = config.max_mib * MIB // 2  # lines, and as much of raw output
    rank_log = RankLog(
        directory,
        env.rank,
        env.node,
        attempt,
        position=position,
        max_bytes=max_bytes,
        raw=_raw_files(directory, env, max_bytes // SEGMENTS),
        shared=shared if shared != directory else None,
    )
    _send_logging(config.level, env.rank, rank_log)
    if rank_log.captured:
        _capture_prints(env, rank_log)
    sys.excepthook = _uncaught
    threading.excepthook = _uncaught_in_thread
    rank_log.start()
    return rank_log


def _raw_files(directory: Path, env: Env, segment_bytes: int) -> Optional[RawFiles]:
    """None where stderr goes elsewhere: to a terminal in a direct run, to the job's output without a file."""
    control = env.raw_fd
    if control is None:
        return None
    os.set_inheritable(control, False)
    secrets.teach(lambda values: tell(control, values, segment_bytes))
    try:
        return RawFiles(directory, env.rank, segment_bytes)
    except OSError:
        return None


def _send_logging(level: str, rank: int, rank_log: RankLog) -> None:
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, (_Console, ToRankLog))]:
        root.removeHandler(old)
        old.close()
    root.addHandler(ToRankLog(rank_log))
    if rank == 0 or not rank_log.captured:
        console = _Console("stdout" if rank == 0 else "stderr")
        console.setFormatter(_Formatter("" if rank == 0 else f"rank {rank} "))
        root.addHandler(console)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    for name in CHATTY:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.__class__ = _Library
        logger.setLevel(logging.DEBUG if level == "debug" else logging.WARNING)


def _capture_prints(env: Env, rank_log: RankLog) -> None:
    """A terminal is left alone: there a progress bar is drawn."""
    out: Optional[TextIO] = None
    if env.stdout_fd is not None:
        binary = io.FileIO(env.stdout_fd, "w", closefd=False)
        out = io.TextIOWrapper(io.BufferedWriter(binary), "utf-8", "backslashreplace", line_buffering=True)
    sys.stdout = out if out is not None and out.isatty() else Printed(rank_log, out)


def _uncaught(kind: type[BaseException], error: BaseException, trace: Optional[TracebackType]) -> None:
    logging.getLogger("strop").critical("%s: %s", kind.__name__, error, exc_info=(kind, error, trace))


def _uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is SystemExit:
        return
    name = args.thread.name if args.thread is not None else "?"
    error = args.exc_value or args.exc_type()
    exc_info = (args.exc_type, error, args.exc_traceback)
    log = logging.getLogger("strop")
    log.error("in thread %s: %s: %s", name, args.exc_type.__name__, error, exc_info=exc_info)
