"""The log of a run as one text: files -> lines by (corrected time, rank, sequence) -> filtered -> text.

    logs = log_files.find(run_dir)
    merge = Merge(logs, Selection(level=30), View())
    for block in merge: ...            # bytes of whole lines
    merge.notes()                      # what could not be shown, or not as it was written

`lines` gives objects in place of text. One pass; the memory does not depend on the number of lines. The work
is done by lib/libstrop_log.so (of csrc/) where `python -m tools.build_kernels` has built it, else in Python,
at a tenth of the speed or less, with the same output.

Raw stderr has no times: a raw line stands before the first structured line that was written after it began,
with that line's time, and what is behind the last one has the file's. It is shown at level RAW, which counts
as a warning. Our writers have left out secrets already; another one's are taken out here.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from typing import Any, Optional

from strop.obs import log_text, merge_native, merge_python, secrets
from strop.obs.log_files import Logs
from strop.obs.log_text import Selection, View, passes
from strop.obs.merge_python import TRUNCATED, WHOLE, Counted, new_counted
from strop.slurm.hostlist import ranges

BLOCK_BYTES = 1 << 20


class Merge:
    """Iterate once for the text; then `notes`."""

    def __init__(self, logs: Logs, selection: Selection, view: View, *, native: Optional[bool] = None):
        """`native`: None for the library if it is there, False for Python, True for an error without it."""
        library = None if native is False else merge_native.load()
        if native and library is None:
            raise FileNotFoundError(f"{merge_native.PLACES[0]} has not been built, or is of another version")
        self.native = library is not None
        self.logs = logs
        self.counted: list[Counted] = [new_counted(stream) for stream in logs.streams]
        self._blocks = (
            _python_blocks(logs, selection, view, self.counted)
            if library is None
            else merge_native.blocks(library, logs, selection, view, self.counted)
        )

    def __iter__(self) -> Iterator[bytes]:
        return self._blocks

    def notes(self) -> list[str]:
        """What could not be shown, or not as it was written: a line each, with the ranks that it concerns."""
        return [
            *self.logs.notes,
            *_file_notes(self.logs, self.counted),
            *_line_notes(self.logs, self.counted),
        ]


def lines(logs: Logs, selection: Selection) -> Iterator[dict[str, Any]]:
    """The selected lines as objects, in order, with the keys of log_line; `time` is the corrected one."""
    for block in Merge(logs, selection, View(json=True)):
        for text in block.split(b"\n")[:-1]:
            yield json.loads(text)


def _python_blocks(logs: Logs, selection: Selection, view: View, counted: list[Counted]) -> Iterator[bytes]:
    printer = log_text.Printer(view)
    by_stream = {(s.rank, s.attempt): c.counts for s, c in zip(logs.streams, counted)}
    for line in merge_python.merged(logs.streams, counted, secrets.redact, selection.until_us):
        if passes(line, selection):
            by_stream[line.rank, line.attempt]["shown"] += 1
            printer.add(line)
            if printer.size >= BLOCK_BYTES:
                yield printer.take()
    printer.flush()
    yield printer.take()


# --------------------------------------------------------------------------------------------- notes


WORDS = {
    "foreign": "line(s) in another form than strop's, shown as RAW",
    "torn": "of them torn off at the end of a file",
    "cut": f"line(s) longer than {merge_python.MAX_LINE >> 10} KiB, of which only the beginning is shown",
    "bad_utf8": "line(s) with bytes that are not UTF-8, shown as \\xNN",
    "clock_back": "time(s) a clock went back; the order of the file was kept",
    "overwritten": "state(s) of progress bars that a carriage return overwrote, not shown",
    "dropped": "line(s) deleted by the rotation of a full log",
}


def _line_notes(logs: Logs, counted: list[Counted]) -> list[str]:
    notes = []
    for name, words in WORDS.items():
        number = sum(c.counts[name] for c in counted)
        if number:
            notes.append(f"{number} {words} ({_ranks(logs, [c.counts[name] > 0 for c in counted])})")
    return notes


def _file_notes(logs: Logs, counted: list[Counted]) -> list[str]:
    """Files that could not be read to the end that they had when the merge began."""
    troubles: dict[str, list[bool]] = {}
    for i, (stream, result) in enumerate(zip(logs.streams, counted)):
        for file, status in zip([*stream.structured, *stream.raw], result.status):
            if status not in (0, WHOLE) and file.size:
                what = _trouble(status)
                troubles.setdefault(what, [False] * len(counted))[i] = True
    return [f"{what} ({_ranks(logs, which)})" for what, which in troubles.items()]


def _trouble(status: int) -> str:
    if status == TRUNCATED:
        return "file(s) became shorter while they were read"
    if -status == errno.ENOENT:
        return "file(s) vanished before they were read"
    return f"file(s) that could not be read: {os.strerror(-status)}"


def _ranks(logs: Logs, which: list[bool]) -> str:
    """attempt 1: rank 0-3; attempt 2: rank 7"""
    by_attempt: dict[int, set[int]] = {}
    for stream, concerned in zip(logs.streams, which):
        if concerned:
            by_attempt.setdefault(stream.attempt, set()).add(stream.rank)
    return "; ".join(f"attempt {a}: rank {ranges(ranks)}" for a, ranks in sorted(by_attempt.items()))
