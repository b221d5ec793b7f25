"""What a rank and its libraries write to the raw descriptors 1 and 2: the files rankNNNNN[.K].err.

They are written, and begun anew when they are full, by a process of their own (`strop.obs.raw_writer`), which
leaves out secrets. The rank itself looks how long they are, tells that process what it has to know, and
deletes old ones.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import termios
import time
from pathlib import Path
from typing import Optional

from strop.obs import log_line

BLOCK_BYTES = 1 << 20
WRITER_S = 0.001
"""What the writer usually needs for what it finds in the pipe."""


def victim(index: int, segments: int) -> Optional[int]:
    """The segment to delete when number `index` begins: the first and the newest are to make `segments`."""
    gone = index - segments + 1
    return gone if gone >= 1 else None


class RawFiles:
    def __init__(self, directory: Path, rank: int, segment_bytes: int) -> None:
        """Raises FileNotFoundError if the launcher could make no file."""
        self._directory = directory
        self._rank = rank
        self._segment_bytes = segment_bytes
        self._index = 0
        self._deleted = 0
        """The newest segment that went."""
        self._fd = os.open(self._path(0), os.O_RDONLY)

    def _path(self, index: int) -> Path:
        return self._directory / log_line.Segment(self._rank, index, True).name

    def mark(self) -> tuple[int, int]:
        """(segment, its length): all raw bytes so far, but for what the writer takes longer for."""
        if _pending() > 0:
            time.sleep(WRITER_S)
        size = os.fstat(self._fd).st_size
        while size >= self._segment_bytes and self._follow():
            size = os.fstat(self._fd).st_size
        return self._index, size

    def _follow(self) -> bool:
        """To the next segment, if it has begun."""
        try:
            new = os.open(self._path(self._index + 1), os.O_RDONLY)
        except FileNotFoundError:
            return False
        os.close(self._fd)
        self._fd = new
        self._index += 1
        return True

    def delete_old(self, segments: int) -> int:
        """Keep the first and the newest. How many lines are gone with the others."""
        self.mark()
        newest_gone, lines = victim(self._index, segments) or 0, 0
        while self._deleted < newest_gone:
            self._deleted += 1
            with contextlib.suppress(FileNotFoundError):
                lines += _count_lines(self._path(self._deleted))
                self._path(self._deleted).unlink()
        return lines


def _pending() -> int:
    """Bytes that were written to stderr and not read yet by the writer."""
    number = array.array("i", [0])
    with contextlib.suppress(OSError):  # something else has been put in place of descriptor 2
        fcntl.ioctl(2, termios.FIONREAD, number)
    return number[0]


def _count_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(BLOCK_BYTES), b""))
