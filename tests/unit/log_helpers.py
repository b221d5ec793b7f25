"""Runs with logs, built by hand as files; and what a merge must give, worked out from them without it."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Optional

from strop.obs import log_files, log_line
from strop.obs.log_text import Selection, View
from strop.obs.merge import Merge

T0 = datetime(2026, 11, 20, 3, 0, 0, tzinfo=timezone.utc)
BEGAN_S = T0.timestamp()


def at(seconds: float) -> str:
    """The time on disk, so many seconds after T0."""
    return f"{T0 + timedelta(microseconds=round(1e6 * seconds)):%Y-%m-%dT%H:%M:%S.%fZ}"


def line(seconds: float, message: str, *, rank: int = 0, level: str = "INFO", **fields: Any) -> bytes:
    """As the writer makes it."""
    head: dict[str, Any] = {"time": at(seconds), "rank": rank, "node": f"n{rank // 2}", "attempt": 1}
    head |= {"step": None, "phase": None}
    more = {key: fields.pop(key) for key in list(fields) if key in head}
    content = {**head, **more, "level": level, "logger": fields.pop("logger", "strop"), "message": message}
    return log_line.encode({**content, **fields})


class LogRun:
    """A run directory that is written piece by piece."""

    def __init__(self, directory: Path):
        self.directory = directory
        (directory / "attempts").mkdir(parents=True)

    def attempt(
        self, number: int = 1, offsets: Optional[dict[int, float]] = None, began: float = 0.0, **facts: Any
    ) -> Path:
        """Its record, its directory of logs and its clock.json."""
        record = {"attempt": number, "state": "DONE", "began": BEGAN_S + began, "nodes": ["n0"], **facts}
        (self.directory / "attempts" / f"{number:04d}.json").write_text(json.dumps(record))
        logs = self.directory / "logs" / f"{number:04d}"
        logs.mkdir(parents=True)
        if offsets is not None:
            ranks = [
                {"rank": rank, "node": f"n{rank // 2}", "offset_s": offset_s, "error_s": 0.0}
                for rank, offset_s in offsets.items()
            ]
            (logs / "clock.json").write_text(json.dumps({"reference_rank": 0, "ranks": ranks}))
        return logs

    def write(self, rank: int, *content: bytes, attempt: int = 1, index: int = 0, raw: bool = False) -> Path:
        """Append to a segment."""
        folder = self.directory / "logs" / f"{attempt:04d}"
        path = folder / log_line.Segment(rank, index, raw).name
        with open(path, "ab") as file:
            file.write(b"".join(content))
        return path


VIEWS = (
    View(json=True),
    View(collapse=False),
    View(),
    View(ranges=True),
    View(colour=True, show_attempt=True),
)


def both(directory: Path, view: View = VIEWS[1], selection: Selection = Selection()) -> tuple[str, list[str]]:  # noqa: B008
    """The text and the notes, after both engines have given the same ones."""
    results = []
    for native in (True, False):
        merge = Merge(log_files.find(directory), selection, view, native=native)
        results.append((b"".join(merge), merge.notes(), [c.counts for c in merge.counted]))
    assert results[0] == results[1]
    return results[0][0].decode(), results[0][1]


def messages(text: str) -> list[str]:
    """Of lines without step, phase and logger."""
    return [row.split("] ", 1)[1][9:] for row in text.splitlines()]
