"""What a rank and its libraries write to the raw descriptors 1 and 2: the files rankNNNNN[.K].err.

`strop.slurm.launch` opens the first segment and puts it in place of both before anything is imported. When a
segment is full both descriptors are made to point to the next one, which takes effect at once for
native code too. Nothing is filtered here: what is shown goes through `strop.obs.secrets` first.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Optional

from strop.obs import log_line

BLOCK_BYTES = 1 << 20


def victim(index: int, segments: int) -> Optional[int]:
    """The segment to delete when number `index` begins: the first and the newest are to make `segments`."""
    gone = index - segments + 1
    return gone if gone >= 1 else None


class RawFiles:
    def __init__(self, directory: Path, rank: int, segment_bytes: int) -> None:
        """Raises FileNotFoundError if the wrapper has made no file."""
        self._directory = directory
        self._rank = rank
        self._segment_bytes = segment_bytes
        self._index = 0
        self._descriptors = [fd for fd in (1, 2) if os.path.samestat(os.fstat(fd), self._path(0).stat())]

    @classmethod
    def of_this_process(cls, directory: Path, rank: int, segment_bytes: int) -> Optional[RawFiles]:
        """None where stderr is something else: a terminal in a direct run."""
        try:
            raw = cls(directory, rank, segment_bytes)
        except OSError:
            return None
        return raw if 2 in raw._descriptors else None

    def _path(self, index: int) -> Path:
        return self._directory / log_line.Segment(self._rank, index, True).name

    def mark(self) -> tuple[int, int]:
        """(segment, its length): all raw bytes so far."""
        return self._index, os.fstat(2).st_size

    def rotate_if_full(self, segments: int) -> int:
        """How many lines were deleted for it."""
        if os.fstat(2).st_size < self._segment_bytes:
            return 0
        new = os.open(self._path(self._index + 1), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for descriptor in self._descriptors:
            os.dup2(new, descriptor)
        os.close(new)
        self._index += 1
        gone = victim(self._index, segments)
        if gone is None:
            return 0
        lines = _count_lines(self._path(gone))
        self._path(gone).unlink()
        return lines


def _count_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(BLOCK_BYTES), b""))
