"""Files -> lines in order, in Python: what csrc/merge.cpp does, where there is no compiler.

Each rank of each attempt is a stream: its structured segments one after the other, with its raw lines put in
by the marks. Its keys never fall, so a heap of the streams' next lines gives the order of all.
"""

from __future__ import annotations

import errno
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Optional

from strop.obs import secrets
from strop.obs.log_files import SegmentFile, Stream
from strop.obs.log_text import LAST_TIME_US, RAW, Line, parse_line, redact_line, valid_utf8

MAX_LINE = 256 << 10
"""Of a longer line only so much is shown."""
LARGEST_CHUNK, SMALLEST_CHUNK = 32 << 10, 1 << 10
CHUNKS_BYTES = 32 << 20
"""For all streams together."""
CLOCK_BACK_US = 100_000
"""Threads may write a little out of order; more than this is a clock that was set back."""
COUNTS = (
    "read", "raw", "shown", "foreign", "torn", "cut", "bad_utf8", "clock_back", "overwritten", "dropped",
)  # fmt: skip
"""What is counted for each stream: see csrc/merge.hpp."""
WHOLE, TRUNCATED = 1, 2


@dataclass(slots=True)
class Counted:
    """What became of one stream."""

    counts: dict[str, int]
    status: list[int]
    """Of each segment, the structured ones first: 0 not read, WHOLE, TRUNCATED, else -errno."""


def new_counted(stream: Stream) -> Counted:
    return Counted(dict.fromkeys(COUNTS, 0), [0] * (len(stream.structured) + len(stream.raw)))


Piece = tuple[int, int, bytes, bool]
"""Segment's index, offset of the first byte, the line, whether it had its newline."""


def pieces(
    segments: Sequence[SegmentFile], counted: Counted, first: int, chunk_bytes: int
) -> Iterator[Piece]:
    """The lines of consecutive segments. `first`: of which status the first one's is."""
    for number, segment in enumerate(segments, first):
        position, start, rest = 0, 0, b""
        while chunk := _read(segment, position, counted, number, chunk_bytes):
            before, *lines = chunk.split(b"\n")
            position += len(chunk)
            del chunk  # of 20,000 ranks' files all lie here at once
            rest = (rest + before)[: MAX_LINE + 1]
            end = position - sum(map(len, lines)) - len(lines) + 1
            for line in lines:
                yield segment.index, start, _cut(rest, counted), True
                rest, start = line, end
                end += len(line) + 1
        if rest:
            yield segment.index, start, _cut(rest, counted), False


def _read(segment: SegmentFile, position: int, counted: Counted, number: int, chunk_bytes: int) -> bytes:
    """The next bytes; none at the end, or where the file fails, which is noted."""
    if position >= segment.size:
        counted.status[number] = WHOLE
        return b""
    try:
        with open(segment.path, "rb", buffering=0) as file:
            file.seek(position)
            chunk = file.read(min(chunk_bytes, segment.size - position))
    except OSError as error:
        counted.status[number] = -(error.errno or errno.EIO)
        return b""
    if not chunk:
        counted.status[number] = TRUNCATED
    return chunk


def _cut(line: bytes, counted: Counted) -> bytes:
    if len(line) <= MAX_LINE:
        return line
    counted.counts["cut"] += 1
    return line[:MAX_LINE]


class Rank:
    """What a rank's line depends on of those before: the last key, and the step that raw lines belong to."""

    __slots__ = ("_counts", "_hints", "_last", "_redact", "_timed", "key", "stream")

    def __init__(self, stream: Stream, counts: dict[str, int], redact: Callable[[str], str]):
        self.key = stream.floor_us
        self.stream = stream
        self._counts = counts
        self._hints = secrets.hint_words()
        self._redact = redact
        self._timed = False
        self._last = Line(node=stream.node.encode("utf-8", "backslashreplace"))

    def structured(self, text: bytes, whole: bool) -> Line:
        """A line of a structured file, in its place; one that is no JSON is shown as it is."""
        counts = self._counts
        counts["read"] += 1
        lower = text.lower()
        if any(hint in lower for hint in self._hints):
            text = redact_line(text, self._redact)
        line = parse_line(text)
        if line is None:
            counts["foreign"] += 1
            counts["torn"] += not whole
            return self._plain(text)
        counts["bad_utf8"] += line.bad_utf8
        counts["dropped"] = max(counts["dropped"], line.dropped)  # a running total
        line.rank, line.attempt = self.stream.rank, self.stream.attempt
        line.time = min(max(line.time - self.stream.offset_us, 0), LAST_TIME_US)
        counts["clock_back"] += self._timed and line.time < self.key - CLOCK_BACK_US
        self.key = line.key = max(self.key, line.time)
        self._timed = True
        return line

    def raw(self, text: bytes) -> Line:
        self._counts["read"] += 1
        self._counts["raw"] += 1
        return self._plain(text)

    def shown(self, line: Line) -> None:
        """`line` is given out now: raw lines behind it belong to its step."""
        if not line.plain:
            self._last = line

    def raw_text(self, text: bytes) -> bytes:
        """What a terminal would show of a raw line: behind the last carriage return. Blank: nothing."""
        text = text.rstrip(b"\r")
        self._counts["overwritten"] += text.count(b"\r")
        return text[text.rfind(b"\r") + 1 :]

    def _plain(self, text: bytes) -> Line:
        if not self._timed:
            self.key = max(self.key, self.stream.began_us)
        bad = not valid_utf8(text)
        self._counts["bad_utf8"] += bad
        decoded = text.decode("utf-8", "surrogateescape")
        redacted = self._redact(decoded)
        if redacted != decoded:
            text = redacted.encode("utf-8", "surrogateescape")
        last = self._last
        return Line(
            self.key, self.key, self.stream.rank, self.stream.attempt, True, level=RAW, message=text,
            phase=last.phase, node=last.node, step=last.step, bad_utf8=bad,
        )  # fmt: skip


def lines_of(
    stream: Stream, counted: Counted, redact: Callable[[str], str], chunk_bytes: int
) -> Iterator[Line]:
    """A stream's lines in the order of the files, a raw line before the first mark behind its start."""
    rank = Rank(stream, counted.counts, redact)
    raws = _raw_pieces(stream, counted, rank, chunk_bytes)
    raw = next(raws, None)
    for _, _, text, whole in pieces(stream.structured, counted, 0, chunk_bytes):
        if not text:  # behind a torn line
            continue
        line = rank.structured(text, whole)
        while raw is not None and line.mark is not None and raw[:2] < line.mark:
            yield rank.raw(raw[2])
            raw = next(raws, None)
        rank.shown(line)
        yield line
    while raw is not None:
        rank.key = max(rank.key, stream.raw_end_us)
        yield rank.raw(raw[2])
        raw = next(raws, None)


def _raw_pieces(
    stream: Stream, counted: Counted, rank: Rank, chunk_bytes: int
) -> Iterator[tuple[int, int, bytes]]:
    for index, offset, text, _ in pieces(stream.raw, counted, len(stream.structured), chunk_bytes):
        if shown := rank.raw_text(text):
            yield index, offset, shown


def merged(
    streams: Sequence[Stream], counted: Sequence[Counted], redact: Callable[[str], str], until_us: int
) -> Iterator[Line]:
    """All lines by (key, rank, attempt), up to the time `until_us`. A stream is opened when it comes near."""
    heap: list[tuple[int, int, int, int, Optional[Line]]] = [
        (s.floor_us, s.rank, s.attempt, i, None) for i, s in enumerate(streams)
    ]
    heapq.heapify(heap)
    sources: dict[int, Iterator[Line]] = {}
    chunk_bytes = min(LARGEST_CHUNK, max(SMALLEST_CHUNK, CHUNKS_BYTES // max(1, len(streams))))
    while heap and heap[0][0] <= until_us:
        _, rank, attempt, i, line = heap[0]
        if line is None:
            sources[i] = lines_of(streams[i], counted[i], redact, chunk_bytes)
        else:
            yield line
        following = next(sources[i], None)
        if following is None:
            heapq.heappop(heap)
            del sources[i]
        else:
            heapq.heapreplace(heap, (following.key, rank, attempt, i, following))
