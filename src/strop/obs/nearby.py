"""The log around a failure: the culprit's own last lines, and what other ranks warned of at that moment.

Structured lines are read backwards from each file's end, a bounded number of bytes; a rank that has none is
heard through its raw file. Lines of many ranks that are equal but for their numbers become one with their
ranks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from strop.obs import log_line
from strop.obs.fates import Fates, clock_offsets, unix_time
from strop.obs.secrets import redact
from strop.slurm import attempts, crash
from strop.slurm.hostlist import ranges

TAIL_BYTES = 1 << 15
OWN_LINES, OTHER_LINES, RAW_LINES = 6, 4, 4
SOURCE = re.compile(r"\[/\S*/([\w.-]+:\d+)\]")
"""The long path of a C++ source file, as gloo and NCCL begin their messages."""
BEFORE_S, AFTER_S = 30.0, 2.0
LOUD = ("WARNING", "ERROR", "CRITICAL")
OTHER_RANKS = 64
"""So many other ranks are read at most: the first ones stand for the rest."""


@dataclass(frozen=True)
class Line:
    """A line of one rank, or the same line of several."""

    time: Optional[float]
    """Unix seconds by rank 0's clock; None for raw text, which has no time."""
    ranks: str
    level: str
    """"" for raw text."""
    message: str


def around(run_dir: Path, attempt: int, found: Fates) -> list[Line]:
    """The lines to show beside the first failure, by time; without a culprit the last ones of rank 0."""
    logs = attempts.log_dir(run_dir, attempt)
    if not logs.is_dir() or not found.ranks:
        return []
    first = found.first or found.ranks[0]
    offsets = clock_offsets(run_dir, attempt)
    structured = log_line.files_by_rank(logs, raw=False)
    own = _lines(structured.get(first.rank, ()), first.rank, offsets)
    at = first.time if first.time is not None else max((line.time or 0 for line in own), default=0.0)
    own = [line for line in own if line.time is None or line.time <= at + AFTER_S][-OWN_LINES:]
    if not own or first.kind in ("silent", "killed", "torn"):
        own += _raw(logs, first.rank)  # without a verdict these are its last words
    others: dict[tuple[str, str], list[tuple[float, int, str]]] = {}
    for fate in [f for f in found.ranks if f.rank != first.rank][:OTHER_RANKS]:
        for line in _lines(structured.get(fate.rank, ()), fate.rank, offsets):
            if line.level in LOUD and line.time is not None and at - BEFORE_S <= line.time <= at + AFTER_S:
                key = line.level, re.sub(r"\d+", "#", line.message)
                others.setdefault(key, []).append((line.time, fate.rank, line.message))
    shared = [
        Line(min(seen)[0], ranges([rank for _, rank, _ in seen], 4), level, min(seen)[2])
        for (level, _), seen in others.items()
    ]
    shared.sort(key=lambda line: line.time or 0.0)
    lines = [*own, *shared[:OTHER_LINES]]
    return sorted(lines, key=lambda line: (line.time is None, line.time or 0.0))


def _lines(segments: Sequence[Path], rank: int, offsets: dict[int, float]) -> list[Line]:
    """The last lines of a rank's newest segment, oldest first."""
    found = [r for path in segments[-1:] for r in log_line.last_records(path, TAIL_BYTES)]
    return [_line(fields, rank, offsets) for fields in reversed(found)]


def _line(fields: dict[str, Any], rank: int, offsets: dict[int, float]) -> Line:
    stamp = unix_time(fields.get("time"))
    message = next(iter(str(fields.get("message", "")).strip().splitlines()), "")
    at = None if stamp is None else stamp - offsets.get(rank, 0.0)
    message = SOURCE.sub(r"[\1]", redact(message))
    return Line(at, str(rank), str(fields.get("level") or "INFO"), message)


def _raw(logs: Path, rank: int) -> list[Line]:
    """The end of the rank's raw files, without empty lines."""
    words = crash.tail(log_line.files_by_rank(logs, raw=True).get(rank, []), TAIL_BYTES).splitlines()
    return [Line(None, str(rank), "", redact(line.rstrip())) for line in words if line.strip()][-RAW_LINES:]
