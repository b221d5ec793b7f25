"""How a rank learns that it should stop: a signal, or a file in the run directory. Either suffices.

The file is there because a wrapper or a container between Slurm and the rank may swallow the signal; the
signal, because a shared file system may show a new file a minute late. USR1 and TERM are blocked before
Python or torch start (`strop.slurm.launch`), so neither kills a rank and no handler ever runs: the trainer
asks at its safe points, threads and all (they inherit the mask). A run that was started by hand in a terminal
also hears Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Optional

SIGNALS = frozenset({signal.SIGUSR1, signal.SIGTERM})
CTRL_C = "Ctrl-C"
LOOK_EVERY_S = 0.2
HEARTBEAT_EVERY_S = 30.0


def block_signals() -> None:
    """Hold back USR1 and TERM, and nothing else, until `StopRequest.poll` fetches them. Outlives an exec."""
    signal.pthread_sigmask(signal.SIG_SETMASK, SIGNALS)


def stop_file(run_dir: Path, attempt: int) -> Path:
    return run_dir / "attempts" / f"{attempt:04d}.stop"


def request(run_dir: Path, attempt: int, reason: str) -> None:
    """Ask every rank of this attempt to stop. An earlier request stays as it is."""
    try:
        with open(stop_file(run_dir, attempt), "x") as file:
            file.write(reason + "\n")
    except FileExistsError:
        pass


class StopRequest:
    """Sticky: once there is a reason, it stays.

    Polling also says that this attempt lives, by touching its record now and then: another machine that
    cannot look at our processes goes by that (`strop.slurm.lease`).
    """

    def __init__(self, run_dir: Optional[Path], attempt: Optional[int]) -> None:
        self.reason: Optional[str] = None
        self._file: Optional[str] = None
        self._record: Optional[str] = None
        if run_dir is not None and attempt is not None:
            self._file = str(stop_file(run_dir, attempt))
            self._record = str(run_dir / "attempts" / f"{attempt:04d}.json")
        self._next_look = self._next_heartbeat = 0.0
        self._interrupted = False

    def hear_ctrl_c(self) -> None:
        """From now on the first Ctrl-C asks to stop; the second is a KeyboardInterrupt, as ever."""

        def note(number: int, frame: object) -> None:
            self._interrupted = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        # Elsewhere it is ignored: a shell's background jobs shall not hear it.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, note)

    def poll(self) -> Optional[str]:
        """None, or why: "USR1", "TERM", "Ctrl-C" or "file: <first line>". A few microseconds."""
        if self.reason is None:
            received = signal.sigtimedwait(SIGNALS, 0)
            if self._interrupted:
                self.reason = CTRL_C
            elif received is not None:
                self.reason = signal.Signals(received.si_signo).name[3:]
            elif self._file is not None and time.monotonic() >= self._next_look:
                self._look()
        return self.reason

    def _look(self) -> None:
        assert self._file is not None
        assert self._record is not None
        now = time.monotonic()
        self._next_look = now + LOOK_EVERY_S
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + HEARTBEAT_EVERY_S
            with contextlib.suppress(FileNotFoundError):  # a run directory without attempts, as in a test
                os.utime(self._record)
        if os.path.exists(self._file):
            with open(self._file) as file:
                self.reason = "file: " + file.readline().strip()
