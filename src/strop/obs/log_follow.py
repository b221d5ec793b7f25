"""The log of a running job as it is written: new lines, ranks, segments and attempts appear by themselves.

Every POLL_S the directories of the two newest attempts are listed with their files' sizes, which works on
shared file systems too, where nothing is announced; only files that have grown are read. Lines wait
REORDER_S for older ones of other ranks, then they are given out in order, equal ones of that moment as one.
So a line is shown within a second, and an idle run costs the listing alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from strop.obs import log_files, log_line, merge_python, run_files, secrets
from strop.obs.log_files import Logs, SegmentFile, Stream
from strop.obs.log_text import Line, Printer, Selection, View, passes
from strop.obs.merge import WORDS
from strop.obs.merge_python import MAX_LINE, Rank
from strop.obs.status import RUNNING, assess
from strop.slurm import attempts as records

POLL_S = 0.2
REORDER_S = 0.4
STATE_S = 5.0
"""How often it is asked whether the run goes on."""
READ_BYTES = 4 << 20
"""Of a file in one poll."""


@dataclass(frozen=True)
class Watched:
    """Which files; what is selected of their lines is `Selection`'s."""

    ranks: Optional[log_files.Ranges] = None
    attempt: Optional[int] = None
    raw: bool = True


def up_to_last_newlines(logs: Logs) -> Logs:
    """The logs without the lines that are just being written: `follow` begins with them."""
    streams = [
        dataclasses.replace(s, structured=_trimmed(s.structured), raw=_trimmed(s.raw)) for s in logs.streams
    ]
    return dataclasses.replace(logs, streams=streams)


def _trimmed(segments: tuple[SegmentFile, ...]) -> tuple[SegmentFile, ...]:
    """Only the newest segment is written to."""
    if not segments:
        return segments
    last = segments[-1]
    with contextlib.suppress(OSError), open(last.path, "rb") as file:
        start = max(0, last.size - MAX_LINE)
        file.seek(start)
        newline = file.read(last.size - start).rfind(b"\n")
        if newline >= 0 or start == 0:
            return (*segments[:-1], dataclasses.replace(last, size=start + newline + 1))
    return segments


class _File:
    """One file that is read to its end again and again."""

    def __init__(self, path: Path, segment: log_line.Segment, attempt: int, position: int):
        self.path = path
        self.segment = segment
        self.attempt = attempt
        self.position = position
        self.size = position
        self.inode: Optional[int] = None
        self._rest = b""

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(offset, line) of what is new and whole."""
        with open(self.path, "rb") as file:
            file.seek(self.position)
            chunk = file.read(min(READ_BYTES, self.size - self.position))
        start = self.position - len(self._rest)
        self.position += len(chunk)
        *whole, self._rest = (self._rest + chunk).split(b"\n")
        for line in whole:
            yield start, line
            start += len(line) + 1

    def restart(self) -> None:
        """It became shorter: what is there now has been shown or is lost."""
        self.position, self._rest = self.size, b""

    def replaced(self) -> None:
        """Another file has its name: nothing of it has been shown."""
        self.position, self._rest = 0, b""

    @property
    def unread(self) -> int:
        return self.size - self.position


class Follower:
    """The state between two polls. `poll` gives text."""

    def __init__(self, run_dir: Path, logs: Logs, watched: Watched, selection: Selection, view: View):
        self._run_dir = run_dir
        self._watched = watched
        self._selection = selection
        self._view = view
        self._printer = Printer(view)
        self._files: dict[tuple[int, str], Optional[_File]] = {}
        self._ranks: dict[tuple[int, int], Rank] = {}
        self._clocks: dict[int, int] = {}
        self._counts = dict.fromkeys(merge_python.COUNTS, 0)
        self._waiting: list[tuple[int, int, int, int, Line]] = []
        self._arrived: deque[tuple[float, int]] = deque()
        self._number = 0
        self._old = max(logs.attempts, default=0)
        self.notes: list[str] = []
        for stream in logs.streams:
            for file in (*stream.structured, *stream.raw):
                segment = log_line.segment(file.path)
                assert segment is not None, file
                known = _File(file.path, segment, stream.attempt, file.size)
                with contextlib.suppress(OSError):  # what vanishes now, the next listing notes
                    known.inode = file.path.stat().st_ino
                self._files[stream.attempt, file.path.name] = known

    def poll(self, now: float) -> bytes:
        """What is due at `now` (unix seconds)."""
        numbers = log_files.attempt_numbers(self._run_dir)
        deleted = {attempt for attempt, _ in self._files}.difference(numbers)
        grown = [file for number in (*sorted(deleted), *numbers[-2:]) for file in self._scan(number)]
        newest = 0
        for rank, files in _by_rank(grown):
            for line in self._read(rank, files, int(1e6 * now)):
                newest = max(newest, line.key)
                if passes(line, self._selection):
                    self._number += 1
                    entry = (line.key, line.rank, line.attempt, self._number, line)
                    heapq.heappush(self._waiting, entry)
        if newest:
            self._arrived.append((now, newest))
        return self._release(now - REORDER_S)

    def drain(self) -> bytes:
        """Everything that still waits."""
        return self._release(float("inf"))

    def told(self) -> list[str]:
        """What was not shown, or not as it was written."""
        counted = {name: self._counts[name] for name in ("foreign", "bad_utf8", "clock_back", "overwritten")}
        return [*(f"{number} {WORDS[name]}" for name, number in counted.items() if number), *self.notes]

    def _release(self, arrived_before: float) -> bytes:
        """All lines up to the newest key that has waited long enough."""
        ready = 0
        while self._arrived and self._arrived[0][0] <= arrived_before:
            ready = max(ready, self._arrived.popleft()[1])
        while self._waiting and self._waiting[0][0] <= ready:
            line = heapq.heappop(self._waiting)[-1]
            if line.attempt > max(1, self._old) and not self._view.show_attempt:
                self._view = dataclasses.replace(self._view, show_attempt=True)
                self._printer = Printer(self._view)
            self._printer.add(line)
        self._printer.flush()
        return self._printer.take()

    def _scan(self, attempt: int) -> list[_File]:
        """The attempt's files that have grown."""
        if self._watched.attempt not in (None, attempt):
            return []
        directory = records.log_dir(self._run_dir, attempt)
        grown, there = [], set()
        # the directory of a run that is being deleted
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(directory) as entries:
            for entry in entries:
                key = (attempt, entry.name)
                there.add(key)
                if key not in self._files:
                    self._files[key] = self._new(directory / entry.name, attempt)
                file = self._files[key]
                with contextlib.suppress(FileNotFoundError):
                    if file is not None and self._has_grown(file, log_files.status_of(entry)):
                        grown.append(file)
                    elif entry.name == "clock.json":
                        self._read_clock(attempt, entry.stat().st_mtime_ns)
        for key in [k for k in self._files if k[0] == attempt and k not in there]:
            gone = self._files.pop(key)
            if gone is not None and gone.unread:
                self.notes.append(f"{gone.path} vanished, {gone.unread} bytes of it had not been read")
        return grown

    def _has_grown(self, file: _File, status: os.stat_result) -> bool:
        file.size = status.st_size
        before, file.inode = file.inode, status.st_ino
        if before not in (None, status.st_ino):
            self.notes.append(f"{file.path} was replaced: the end of the old one may be missing")
            file.replaced()
        elif file.size < file.position:
            self.notes.append(f"{file.path} became shorter: lines of it may be missing")
            file.restart()
        return file.unread > 0

    def _new(self, path: Path, attempt: int) -> Optional[_File]:
        """None for what is no log of a rank that is watched."""
        segment = log_line.segment(path)
        if segment is None or (segment.raw and not self._watched.raw):
            return None
        ranges = self._watched.ranks
        if ranges is not None and not any(low <= segment.rank <= high for low, high in ranges):
            return None
        return _File(path, segment, attempt, 0)

    def _read_clock(self, attempt: int, changed_ns: int) -> None:
        if self._clocks.get(attempt) == changed_ns:
            return
        self._clocks[attempt] = changed_ns
        clock = log_files.read_clock(self._run_dir, attempt)
        for (number, rank), state in self._ranks.items():
            if number == attempt:
                state.stream = dataclasses.replace(state.stream, offset_us=clock.offsets_us.get(rank, 0))

    def _rank(self, attempt: int, rank: int) -> Rank:
        if (attempt, rank) not in self._ranks:
            clock = log_files.read_clock(self._run_dir, attempt)
            began = log_files.began_us(self._run_dir, attempt)
            offset = clock.offsets_us.get(rank, 0)
            stream = Stream(rank, attempt, (), (), clock.nodes.get(rank, ""), offset, began)
            self._ranks[attempt, rank] = Rank(stream, self._counts, secrets.redact)
        return self._ranks[attempt, rank]

    def _read(self, key: tuple[int, int], files: list[_File], now_us: int) -> Iterator[Line]:
        """New lines of one rank; raw ones before their mark, or of now."""
        rank = self._rank(*key)
        raws: deque[tuple[int, int, bytes]] = deque()
        texts: list[bytes] = []
        for file in sorted(files, key=lambda f: f.segment.index):
            try:
                for offset, text in file.lines():
                    if not file.segment.raw:
                        texts += [text] if text else []
                    elif shown := rank.raw_text(text):
                        raws.append((file.segment.index, offset, shown))
            except FileNotFoundError:
                continue  # the next listing notes it
            except OSError as error:  # perhaps a file server's hiccup: the next listing tries again
                note = f"{file.path} could not be read: {error.strerror}"
                self.notes += [note] if note not in self.notes else []
        for text in texts:
            line = rank.structured(text, True)
            while raws and line.mark is not None and raws[0][:2] < line.mark:
                yield rank.raw(raws.popleft()[2])
            rank.shown(line)
            yield line
        for _, _, text in raws:
            line = rank.raw(text)
            line.key = line.time = max(line.key, now_us)
            yield line


def _by_rank(files: list[_File]) -> Iterator[tuple[tuple[int, int], list[_File]]]:
    groups: dict[tuple[int, int], list[_File]] = {}
    for file in files:
        groups.setdefault((file.attempt, file.segment.rank), []).append(file)
    return iter(sorted(groups.items()))


def state_of(run_dir: Path) -> Optional[str]:
    """None while the run goes on or will; else in which state it stands."""
    state = assess(run_files.read(run_dir, quick=True)).state
    return None if state in (*RUNNING, "queued") else state


def follow(follower: Follower, ended: Callable[[], Optional[str]]) -> Iterator[bytes]:
    """Text as it comes, until `ended` says so."""
    asked = time.monotonic()
    while True:
        if text := follower.poll(time.time()):
            yield text
        if time.monotonic() - asked >= STATE_S:
            asked = time.monotonic()
            if state := ended():
                yield follower.poll(time.time()) + follower.drain()
                follower.notes.append(f"the run is {state}: nothing more will come")
                return
        time.sleep(POLL_S)
