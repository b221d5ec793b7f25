"""The merge by lib/libstrop_log.so (csrc/merge.cpp, log_text.cpp) through its C interface, csrc/merge.hpp.

tools/build_kernels.py compiles it; `load` gives None where that was not done, and `strop.obs.merge` goes
on in Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

from strop import libraries
from strop.obs import log_text, secrets
from strop.obs.log_files import Logs, Stream
from strop.obs.log_text import Selection, View
from strop.obs.merge_python import COUNTS, Counted

PLACES = libraries.places(Path(__file__).parent, "log")
ABI = 2
BUFFERS_BYTES = 64 << 20
"""For all streams together."""
LARGEST_BUFFER, SMALLEST_BUFFER = 128 << 10, 1 << 10
SPARE_DESCRIPTORS = 64
"""For everything else that the process opens."""


class _Segment(ctypes.Structure):
    _fields_ = (
        ("path", ctypes.c_char_p), ("size", ctypes.c_int64), ("index", ctypes.c_int64),
        ("status", ctypes.c_int64),
    )  # fmt: skip


class _Stream(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in (
            "rank", "attempt", "offset_us", "floor_us", "began_us", "raw_end_us", "num_structured", "num_raw",
        )),
        ("segments", ctypes.POINTER(_Segment)), ("node", ctypes.c_char_p),
        ("counts", ctypes.c_int64 * len(COUNTS)),
    )  # fmt: skip


_GREP = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int64)
_REDACT = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64))


class _Options(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("since_us", "until_us", "step_low", "step_high")),
        ("phase", ctypes.c_char_p), ("nodes", ctypes.c_char_p),
        *((name, ctypes.c_int64) for name in (
            "level", "window_us", "max_groups", "max_open", "buffer_bytes",
            "json", "collapse", "ranges", "colour", "show_attempt",
        )),
        ("grep", _GREP), ("redact", _REDACT), ("redact_line", _REDACT), ("hints", ctypes.c_char_p),
    )  # fmt: skip


def load() -> Optional[ctypes.CDLL]:
    """None if it was not built, or of another version."""
    for path in PLACES:
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(str(path))
            if library.strop_log_abi() == ABI:
                return _typed(library)
    return None


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    library.strop_log_open.restype = ctypes.c_void_p
    library.strop_log_open.argtypes = [ctypes.POINTER(_Stream), ctypes.c_int64, ctypes.POINTER(_Options)]
    library.strop_log_next.argtypes = [
        ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int64)
    ]  # fmt: skip
    library.strop_log_close.argtypes = [ctypes.c_void_p]
    library.strop_log_close.restype = None
    return library


def blocks(
    library: ctypes.CDLL, logs: Logs, selection: Selection, view: View, counted: list[Counted]
) -> Iterator[bytes]:
    streams = (_Stream * len(logs.streams))(*map(_c_stream, logs.streams))
    failures: list[BaseException] = []
    options = _c_options(selection, view, len(streams), failures)
    merge = library.strop_log_open(streams, len(streams), ctypes.byref(options))
    text, size, more = ctypes.c_void_p(), ctypes.c_int64(), True
    try:
        while more:
            more = library.strop_log_next(merge, ctypes.byref(text), ctypes.byref(size))
            if failures:
                raise failures[0]
            if size.value:
                yield ctypes.string_at(text, size.value)
    finally:
        library.strop_log_close(merge)
        for stream, result in zip(streams, counted):
            result.counts.update(zip(COUNTS, stream.counts))
            result.status = [stream.segments[i].status for i in range(len(result.status))]


def _c_stream(stream: Stream) -> _Stream:
    files = [*stream.structured, *stream.raw]
    segments = (_Segment * len(files))(*(_Segment(os.fsencode(f.path), f.size, f.index, 0) for f in files))
    return _Stream(
        stream.rank, stream.attempt, stream.offset_us, stream.floor_us, stream.began_us, stream.raw_end_us,
        len(stream.structured), len(stream.raw), segments, stream.node.encode("utf-8", "backslashreplace"),
    )  # fmt: skip


def _c_options(selection: Selection, view: View, num: int, failures: list[BaseException]) -> _Options:
    low, high = selection.steps or (-1, -1)
    nodes = None if selection.nodes is None else "\n" + "".join(f"{n}\n" for n in sorted(selection.nodes))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    max_open = max(0, soft - SPARE_DESCRIPTORS)
    buffer_bytes = min(LARGEST_BUFFER, max(SMALLEST_BUFFER, BUFFERS_BYTES // max(1, num)))
    return _Options(
        selection.since_us, selection.until_us, low, high,
        None if selection.phase is None else selection.phase.encode("utf-8", "backslashreplace"),
        None if nodes is None else nodes.encode("utf-8", "backslashreplace"),
        selection.level, log_text.WINDOW_US, log_text.MAX_GROUPS, max_open, buffer_bytes,
        view.json, view.collapse, view.ranges, view.colour, view.show_attempt,
        _grep_callback(selection.grep, failures), _redact_callback(_redact_text, failures),
        _redact_callback(log_text.redact_line, failures), b"".join(h + b"\n" for h in secrets.hints()),
    )  # fmt: skip


def _grep_callback(pattern: Optional[re.Pattern[str]], failures: list[BaseException]) -> Any:
    if pattern is None:
        return _GREP()

    def grep(text: int, size: int) -> int:
        try:
            return (
                pattern.search(ctypes.string_at(text, size).decode("utf-8", "backslashreplace")) is not None
            )
        except BaseException as error:  # a KeyboardInterrupt would be lost in the C frame
            failures.append(error)
            return -1

    return _GREP(grep)


def _redact_text(text: bytes, redact: Callable[[str], str]) -> bytes:
    return redact(text.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")


def _redact_callback(
    redacted: Callable[[bytes, Callable[[str], str]], bytes], failures: list[BaseException]
) -> Any:
    kept: list[Any] = []

    def redact(text: int, size: int, new_size: Any) -> Optional[int]:
        try:
            old = ctypes.string_at(text, size)
            new = redacted(old, secrets.redact)
            if new == old:
                return None
            kept[:] = [ctypes.create_string_buffer(new, len(new) + 1)]
            new_size[0] = len(new)
            return ctypes.addressof(kept[0])
        except BaseException as error:  # as above
            failures.append(error)
            new_size[0] = 0
            return None

    return _REDACT(redact)
