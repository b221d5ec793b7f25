"""metrics.jsonl and timing.jsonl: one JSON object a line.

A record goes from the trainer's reduced numbers to one line in one `write`, so that a reader sees whole
lines. A commit brings the file to disk and records its length. A job that dies leaves lines of steps that
were never committed, the last one perhaps torn; the resume cuts the file back to the recorded length
before it writes on, so that no step is there twice. Nobody else writes while a run is held.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Union

from strop.errors import StorageError

log = logging.getLogger(__name__)
BLOCK = 1 << 16
Number = Union[int, float, str, None]


class MetricsFile:
    """Appends records to a file, after cutting off a line that a killed writer left torn."""

    def __init__(self, path: Path):
        self.path = path
        if path.exists():
            cut_back(path, path.stat().st_size)
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, record: Mapping[str, Number]) -> None:
        """Append one line. StorageError if it does not reach the file whole."""
        line = encode(record)
        try:
            written = os.write(self._fd, line)
        except OSError as e:
            raise StorageError(e.errno, f"{self.path}: {e.strerror}") from e
        if written != len(line):
            raise StorageError(f"{self.path}: only {written} of {len(line)} bytes were written")

    def sync(self) -> int:
        """Bring everything to disk; the file's length in bytes, for the commit. StorageError if it fails."""
        try:
            os.fsync(self._fd)
        except OSError as e:
            raise StorageError(e.errno, f"{self.path}: {e.strerror}") from e
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        os.close(self._fd)


def encode(record: Mapping[str, Number]) -> bytes:
    """One line: `step` first, the rest by name, floats as repr (the shortest text that reads back equal).

    JSON has no NaN or infinity: they become null, which is what readers can parse; a run whose loss is not
    finite ends with its own error, so nothing is hidden by it.
    """
    ordered = {"step": record["step"], **{key: record[key] for key in sorted(record) if key != "step"}}
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in ordered.items()}
    return (json.dumps(finite, allow_nan=False) + "\n").encode()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file that may still be written; a torn last line is left out."""
    with open(path, "rb") as f:
        for number, raw in enumerate(f, 1):
            record = _decode(raw)
            if record is not None:
                yield record
            elif raw.endswith(b"\n"):
                log.warning("%s:%d is not a record", path, number)


def cut_back(path: Path, num_bytes: int) -> int:
    """Keep the first `num_bytes`, as a commit recorded them, up to their last whole line.

    Returns how many bytes were dropped. StorageError for a file that is shorter: it was damaged from outside,
    and a run that goes on would hide that.
    """
    size = path.stat().st_size if path.exists() else 0
    if size < num_bytes:
        raise StorageError(
            errno.EIO, f"{path} has {size} bytes, but {num_bytes} were committed: records are missing"
        )
    if size == 0:
        return 0
    try:
        with open(path, "r+b") as f:
            end = _end_of_last_line(f, num_bytes)
            if end < size:
                f.truncate(end)
                os.fsync(f.fileno())
    except OSError as e:
        raise StorageError(e.errno, f"{path}: {e.strerror}") from e
    return size - end


def _end_of_last_line(f: BinaryIO, end: int) -> int:
    """Offset behind the last newline before `end`; looks back block by block, a file may be long."""
    while end > 0:
        start = max(0, end - BLOCK)
        f.seek(start)
        newline = f.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _decode(raw: bytes) -> Any:
    """The record of a whole line, else None."""
    if not raw.endswith(b"\n"):
        return None
    try:
        record = json.loads(raw)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
