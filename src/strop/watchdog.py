"""Ends a rank that makes no progress, after it has said where it stands.

A thread in every rank looks once a second at the position (phase, step, beats) that the trainer keeps.
When that has not changed for longer than its phase allows, the rank is hung: it announces that in hang.json,
dumps all its stacks into its own stderr file and leaves a verdict. The watchdogs of the other ranks see the
announcement and do the same, so the stacks of *all* ranks are there before anybody is ended; only then do
they exit with code 70. A rank that is stopped, or whose machine is gone, leaves nothing: that silence is
what `strop.slurm.hang` goes by when it names the culprit.

The time in which this process itself did not run (suspended with its job, or stopped) does not count. A
native call that keeps the interpreter's lock also keeps this thread from running: faulthandler's own
thread, which needs no lock, dumps the stacks then, and the other ranks end the attempt.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Optional

from strop.config import WatchdogConfig
from strop.errors import EXIT_HANG
from strop.run import Position, Run
from strop.slurm import attempts, hang

POLL_S = 1.0
ASLEEP_S = 5.0
"""A longer pause between two looks means that this process did not run."""
GRACE_S = 10.0
"""How long ranks that have dumped their stacks wait for the others to do so."""
STEPPED = ("reference", "train", "validation")
RECENT = 50
STDERR = 2
"""The rank's own file, whatever a progress bar has put in place of sys.stderr."""

Place = tuple[Any, ...]


class Clock:
    """How long this rank has been at one place, and how long it may be. Pure: fed with places and times."""

    def __init__(self, config: WatchdogConfig, now: float) -> None:
        self._config = config
        self._place: Place = ("start",)
        self._since = self._last_look = now
        self.slept_s = 0.0
        """How long this process did not run before the last look."""
        self._warm = False
        self._recent: dict[str, deque[float]] = {}

    def look(self, place: Place, now: float, warm: bool = False) -> bool:
        """Note where the rank is (`place[0]` is the phase); whether it has moved.

        warm: it has made progress in this phase before, even if that was too quick to be seen here.
        """
        self._warm = warm
        pause = now - self._last_look
        self._last_look = now
        self.slept_s = pause if pause > ASLEEP_S else 0.0
        self._since += self.slept_s
        if place == self._place:
            return False
        phase = self._place[0]
        self._recent.setdefault(phase, deque(maxlen=RECENT)).append(now - self._since)
        self._place, self._since = place, now
        return True

    @property
    def elapsed_s(self) -> float:
        return self._last_look - self._since

    @property
    def limit_s(self) -> float:
        """Until the first of its kind is done, a step has the time of a start: compilation, connections."""
        phase, c = self._place[0], self._config
        if phase == "save":
            return c.save_s
        recent = self._recent.get(phase, [0.0])
        if phase not in STEPPED:
            return c.start_s
        floor_s = c.step_s if self._warm or phase in self._recent else max(c.start_s, c.step_s)
        return max(floor_s, c.step_factor * statistics.median(recent))


class Watchdog:
    """`with Watchdog(...)`: the position is watched until the block is left."""

    def __init__(self, run: Run, config: WatchdogConfig, position: Position) -> None:
        self._run = run
        self._position = position
        self._clock = Clock(config, time.monotonic())
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._enabled = config.enabled
        self._main = threading.main_thread().ident
        self._alive = run.logs / "alive"
        self._armed = -float("inf")

    def __enter__(self) -> Watchdog:
        if self._enabled:
            self._thread.start()
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], tb: Optional[TracebackType]
    ) -> None:
        self._closed.set()
        if self._enabled:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        announcement = hang.announcement(self._run.dir, self._run.attempt)
        while not self._closed.wait(POLL_S):
            now = time.monotonic()
            phase = self._position.phase
            moved = self._clock.look(self._place(), now, phase in self._position.warm)
            if moved and self._run.env.rank == 0 and phase == "data":
                self._alive.touch()
            self._arm(now)
            if announcement.exists():
                slept_s = self._clock.slept_s
                why = f"this process did not run for {slept_s:.0f} s" if slept_s else "another rank is hung"
                self._end(why, hang.STOPPED if slept_s else None)
            if self._clock.elapsed_s > self._clock.limit_s:
                self._end(f"no progress within {self._clock.limit_s:.0f} s")

    def _place(self) -> Place:
        """While rank 0 prepares the data the others wait without a collective: its progress is theirs."""
        p = self._position
        place: Place = (p.phase, p.step, p.beats)
        if p.phase == "data" and self._run.env.rank != 0:
            with contextlib.suppress(FileNotFoundError):
                place = (*place, self._alive.stat().st_mtime_ns)
        return place

    def _arm(self, now: float) -> None:
        """Let faulthandler dump the stacks if this thread does not come back to put it off."""
        silence_s = max(ASLEEP_S, self._clock.limit_s / 2)
        if now - self._armed > silence_s / 4:
            self._armed = now
            faulthandler.dump_traceback_later(silence_s, file=STDERR)

    def _end(self, why: str, exception: Optional[str] = None) -> None:
        """Announce, dump, leave the verdict, wait for the others to have done so, exit. No logging here:
        the hung thread may hold its lock."""
        run, env, phase, step = self._run, self._run.env, self._position.phase, self._position.step
        frame = sys._current_frames().get(self._main or 0)
        elapsed_s = self._clock.elapsed_s
        facts = {"rank": env.rank, "node": env.node, "phase": phase, "step": step, "elapsed_s": elapsed_s}
        hang.announce(run.dir, run.attempt, {**facts, "limit_s": self._clock.limit_s, "time": time.time()})
        message = f"{why}: {elapsed_s:.0f} s in phase {phase}, step {step}, at {_where(frame)}"
        os.write(STDERR, f"watchdog: {message}; the stacks of all threads:\n".encode())
        faulthandler.cancel_dump_traceback_later()
        faulthandler.dump_traceback(file=STDERR)
        _dump_threads()
        attempts.write_verdict(
            run.dir,
            run.attempt,
            env.rank,
            kind="hang",
            exit_code=EXIT_HANG,
            message=f"{message} (stacks in {run.logs / f'rank{env.rank:05d}.err'})",
            exception=exception,
            traceback="".join(traceback.format_stack(frame)),
            step=step,
            phase=phase,
            node=env.node,
        )
        if not run.launched:
            attempts.finish(run.dir, run.attempt, "FAIL", step=step, reason="hang")
        _wait_for_verdicts(run.logs, env.world_size)
        os._exit(EXIT_HANG)


def _where(frame: Optional[FrameType]) -> str:
    """The innermost frame, and the innermost one of ours if that is another: "a.py:3 in f < b.py:7 in g"."""
    stack = traceback.extract_stack(frame) if frame is not None else []
    if not stack:
        return "an unknown place"
    ours = [f for f in stack[:-1] if f"{os.sep}strop{os.sep}" in f.filename]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno} in {f.name}" for f in [stack[-1], *ours[-1:]])


def _dump_threads() -> None:
    """What the kernel knows of all threads, those without Python frames too: name, state (R runs, D waits
    for a device or file server), and where in the kernel it waits.

    Not the C++ stacks: taking them with a signal, as torch does on a crash, broke live processes.
    """
    lines = []
    for task in sorted(Path("/proc/self/task").iterdir()):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            name = (task / "comm").read_text().strip()
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            lines.append(f"  thread {task.name} {name}: {state} {(task / 'wchan').read_text()}\n")
    os.write(STDERR, ("watchdog: what the kernel says of the threads:\n" + "".join(lines)).encode())


def _wait_for_verdicts(logs: Path, world_size: int) -> None:
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and len(list(logs.glob("verdict-*.json"))) < world_size:
        time.sleep(0.2)
