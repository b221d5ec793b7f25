"""One line of a rank's log, as it lies on disk: the contract between those who write and those who read.

    logs/0001/rank00037.jsonl      structured lines, one `write` each
    logs/0001/rank00037.1.jsonl    the next segment, once the first is full; some in the middle may be gone
    logs/0001/rank00037.err        what the process and its libraries wrote to the raw descriptors
    logs/0001/rank00037.1.err      its next segment
    logs/0001/clock.json           every rank's clock against rank 0's, by the pre-flight check

A line is a JSON object whose first key is the time in UTC, of fixed width: its bytes from TIME_START to
TIME_END sort as text, so a merge need not parse anything. Raw bytes have no time of their own. A
structured line therefore says in `raw` how long the raw file was when it was written: bytes before that
point are at most as late as the line, bytes after it are later.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from strop import files

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
PREFIX = b'{"time":"'
TIME_START = len(PREFIX)
TIME_END = TIME_START + len("2026-11-22T00:11:49.123456Z")
_ENCODE = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
NAME = re.compile(r"rank(\d{5,7})(?:\.(\d{1,9}))?\.(jsonl|err)")


@dataclass(frozen=True)
class Segment:
    """A file of one rank, told by its name."""

    rank: int
    index: int
    """0 is the first."""
    raw: bool
    """Raw stderr and stdout, not structured lines."""

    @property
    def name(self) -> str:
        middle = f".{self.index}" if self.index else ""
        return f"rank{self.rank:05d}{middle}.{'err' if self.raw else 'jsonl'}"


def segment(path: Path) -> Optional[Segment]:
    """What the file is by its name; None if it is no rank's log."""
    match = NAME.fullmatch(path.name)
    return match and Segment(int(match[1]), int(match[2] or 0), match[3] == "err")


def files_by_rank(directory: Path, *, raw: bool) -> dict[int, list[Path]]:
    """Every rank's files of one kind, by rank, in the order in which they were written."""
    names = os.listdir(directory) if directory.is_dir() else []
    found = [s for name in names if (s := segment(Path(name))) and s.raw == raw]
    by_rank: dict[int, list[Path]] = {}
    for s in sorted(found, key=lambda s: (s.rank, s.index)):
        by_rank.setdefault(s.rank, []).append(directory / s.name)
    return by_rank


def last_records(path: Path, num_bytes: int) -> Iterator[dict[str, Any]]:
    """The structured lines among the last bytes of a file, newest first; what is torn is left out, and of a
    file that cannot be read there are none."""
    try:
        lines = files.tail(path, num_bytes).split(b"\n")
    except OSError:
        return
    for line in reversed(lines):
        if line.startswith(PREFIX):
            try:
                yield json.loads(line.decode(errors="replace"))
            except ValueError:
                continue


def quoted(text: str) -> str:
    """As a JSON string."""
    return _ENCODE(text)


def encode(fields: dict[str, Any]) -> bytes:
    """The line with its newline. `fields` in the order of the file: time, rank, node, attempt, step, phase,
    level, logger, message; then, where there is one: traceback, raw ([segment, offset]), dropped (how many
    lines of this rank are gone so far, a running total: deleted with their segment, or never written for
    want of a disk)."""
    text = _ENCODE(fields)
    return text.encode("utf-8", "backslashreplace") + b"\n"
