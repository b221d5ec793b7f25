"""Which log files a run has, and how each rank's clock stood: what the merge reads, found without reading it.

    logs/0001/rank00037.jsonl, .1.jsonl, ...    -> one Stream for each rank of each attempt
    logs/0001/clock.json                        -> its offset_s: corrected time = time - offset_s
    attempts/0001.json                          -> when the attempt began
    clock.json, present-RRRRR, verdict-RRRRR    -> ranks that lived, so that one without a line is noticed

Sizes are taken once, here: what a living run appends afterwards is not read, so a merge ends. What is missing
is told in `Logs.notes`; nothing is repaired, and nothing is written.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from strop import files
from strop.errors import UserError
from strop.obs import log_line
from strop.slurm import attempts as records
from strop.slurm import collect
from strop.slurm.hostlist import ranges

OPEN_EARLY_US = 600_000_000
"""No line is taken as older than this before its attempt began: batch host and rank 0 have two clocks."""
LIVED = re.compile(r"(?:present|verdict)-(\d{5,7})(?:\.json)?")
Ranges = Sequence[tuple[int, int]]
"""Inclusive: ((0, 7), (12, 12))."""


@dataclass(frozen=True, slots=True)
class SegmentFile:
    path: Path
    index: int
    size: int


@dataclass(frozen=True, slots=True)
class Stream:
    """One rank of one attempt."""

    rank: int
    attempt: int
    structured: tuple[SegmentFile, ...]
    raw: tuple[SegmentFile, ...]
    node: str = ""
    offset_us: int = 0
    began_us: int = 0
    raw_end_us: int = 0
    """When the raw file was last written to."""

    @property
    def floor_us(self) -> int:
        return max(0, self.began_us - OPEN_EARLY_US)


@dataclass
class Logs:
    """The log files of a run, or of a part of it."""

    run_dir: Path
    attempts: tuple[int, ...]
    """All that the run has logs of, also those that were not asked for."""
    streams: list[Stream]
    """By attempt, then by rank."""
    newest_us: int
    """When any of the files was last written to; 0 without files."""
    notes: list[str] = field(default_factory=list)
    """What is missing, in words."""


@dataclass(frozen=True)
class Clock:
    """clock.json of an attempt."""

    offsets_us: dict[int, int] = field(default_factory=dict)
    nodes: dict[int, str] = field(default_factory=dict)


def find(
    run_dir: Path,
    *,
    attempts: Union[str, int] = "all",
    ranks: Optional[Ranges] = None,
    nodes: Optional[frozenset[str]] = None,
    raw: bool = True,
    live: bool = False,
) -> Logs:
    """The logs of the run: of "all" attempts, the "last" one, or one by number; of these ranks and nodes.

    Raises UserError if the run has no logs, or none of that attempt or those ranks, unless it is `live`: they
    may come.
    """
    numbers = attempt_numbers(run_dir)
    if live and (not numbers or (isinstance(attempts, int) and attempts not in numbers)):
        return Logs(run_dir, tuple(numbers), [], 0)
    if not numbers:
        state = "has no logs" if run_dir.is_dir() else "no such run"
        raise UserError(f"{run_dir}: {state} (expected {run_dir}/logs/0001/rank00000.jsonl)")
    if isinstance(attempts, int) and attempts not in numbers:
        raise UserError(f"{run_dir}: no logs of attempt {attempts}; there are {ranges(numbers)}")
    chosen = [attempts] if isinstance(attempts, int) else numbers[-1:] if attempts == "last" else numbers
    logs = Logs(run_dir, tuple(numbers), [], 0)
    known: set[int] = set()
    for attempt in chosen:
        known |= _add(logs, attempt, ranks, nodes, raw)
    if ranks is not None and not logs.streams and not live:
        raise UserError(f"{run_dir}: no logs of rank {_written(ranks)}; there are {ranges(known)}")
    if not logs.streams and not logs.notes:
        logs.notes.append("there are no log files")
    return logs


def attempt_numbers(run_dir: Path) -> list[int]:
    """Attempts that have a directory of logs, oldest first."""
    try:
        names = os.listdir(run_dir / "logs")
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(name) for name in names if re.fullmatch(r"\d{4,9}", name))


def scan(directory: Path) -> Iterator[tuple[log_line.Segment, os.DirEntry[str], os.stat_result]]:
    """The log files in an attempt's directory. One that vanishes meanwhile is left out."""
    with os.scandir(directory) as entries:
        for entry in entries:
            segment = log_line.segment(Path(entry.name))
            if segment is not None:
                with contextlib.suppress(FileNotFoundError):
                    yield segment, entry, status_of(entry)


def status_of(entry: os.DirEntry[str]) -> os.stat_result:
    """Of the link itself where it leads nowhere that may be seen: reading it then tells why it cannot be."""
    try:
        return entry.stat()
    except FileNotFoundError:
        raise
    except OSError:
        return entry.stat(follow_symlinks=False)


def read_clock(run_dir: Path, attempt: int) -> Clock:
    """Empty where there is no clock.json (yet): one process, or an attempt that died before it."""
    try:
        content = files.read_json(records.log_dir(run_dir, attempt) / "clock.json")
    except (OSError, UnicodeDecodeError):
        content = None
    rows: Any = content.get("ranks") if isinstance(content, dict) else None
    offsets, nodes = {}, {}
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and isinstance(row.get("rank"), int):
            offset = row.get("offset_s")
            usable = isinstance(offset, (int, float)) and math.isfinite(offset) and abs(offset) < 1e9
            offsets[row["rank"]] = round(1e6 * float(offset or 0)) if usable else 0
            nodes[row["rank"]] = str(row.get("node") or "")
    return Clock(offsets, nodes)


def began_us(run_dir: Path, attempt: int) -> int:
    """When the attempt began, by its record; 0 without one."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        began = records.read(run_dir, attempt).get("began")
        if isinstance(began, (int, float)) and 0 < began < 1e11:
            return int(1e6 * began)
    return 0


def _add(
    logs: Logs, attempt: int, ranks: Optional[Ranges], nodes: Optional[frozenset[str]], raw: bool
) -> set[int]:
    """One attempt's streams and notes. Returns the ranks that it has."""
    directory = records.log_dir(logs.run_dir, attempt)
    clock, began = read_clock(logs.run_dir, attempt), began_us(logs.run_dir, attempt)
    found: dict[int, tuple[list[SegmentFile], list[SegmentFile]]] = {}
    raw_end: dict[int, int] = {}
    for segment, entry, status in scan(directory):
        pair = found.setdefault(segment.rank, ([], []))
        pair[segment.raw].append(SegmentFile(directory / entry.name, segment.index, status.st_size))
        logs.newest_us = max(logs.newest_us, status.st_mtime_ns // 1000)
        if segment.raw:
            raw_end[segment.rank] = max(raw_end.get(segment.rank, 0), status.st_mtime_ns // 1000)
    known = {*found, *clock.offsets_us, *_lived(directory)}
    asked = {r for r in known if ranks is None or any(low <= r <= high for low, high in ranks)}
    if nodes is not None:  # what clock.json does not know is told by the lines
        asked = {r for r in asked if clock.nodes.get(r, "") in {"", *nodes}}
    for rank in sorted(asked & set(found)):
        structured, raw_files = (tuple(sorted(f, key=lambda s: s.index)) for f in found[rank])
        logs.streams.append(
            Stream(
                rank,
                attempt,
                structured,
                raw_files if raw else (),
                clock.nodes.get(rank, ""),
                clock.offsets_us.get(rank, 0),
                began,
                raw_end.get(rank, 0),
            )
        )
    silent = {r for r in asked if not any(f.size for kind in found.get(r, ()) for f in kind)}
    _note(logs, attempt, "wrote nothing", silent, known)
    _note_uncollected(logs, attempt, clock)
    gaps = {r for r in asked & set(found) if any(_has_gap(kind) for kind in found[r])}
    _note(logs, attempt, "lack(s) a segment that was deleted, by rotation or by hand", gaps, known)
    return known


def _note_uncollected(logs: Logs, attempt: int, clock: Clock) -> None:
    """Where logs are that were written to nodes' own disks, and not all copied: of ranks that still run, or
    of an attempt that was killed together with its batch shell."""
    try:
        record = records.read(logs.run_dir, attempt)
    except (OSError, UnicodeDecodeError):
        return
    left = collect.uncollected(logs.run_dir, record)
    if not left:
        return
    ranks_there = [rank for rank, node in clock.nodes.items() if node in left]
    whose = f" (rank {ranges(ranks_there)})" if ranks_there else ""
    where = records.rank_log_dir(logs.run_dir, attempt, Path(record["log_dir"]))
    nodes = ", ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")
    logs.notes.append(
        f"attempt {attempt}: newer lines may lie on {nodes}{whose}, in {where}: "
        "they are copied when it ends, or by --collect"
    )


def _lived(directory: Path) -> set[int]:
    return {int(match[1]) for name in os.listdir(directory) if (match := LIVED.fullmatch(name))}


def _has_gap(segments: Sequence[SegmentFile]) -> bool:
    return bool(segments) and len(segments) <= max(s.index for s in segments)


def _note(logs: Logs, attempt: int, what: str, ranks: set[int], known: set[int]) -> None:
    if ranks:
        logs.notes.append(f"attempt {attempt}: rank {ranges(ranks)} of {len(known)} {what}")


def _written(chosen: Ranges) -> str:
    return ",".join(f"{low}-{high}" if high > low else str(low) for low, high in chosen)
