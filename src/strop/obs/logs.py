"""Python's logging in a rank: rank 0 speaks to stdout, which is the job's .out file or the terminal; the
others to stderr, which the launcher sends to the rank's own file.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO

CHATTY = ("transformers", "datasets", "huggingface_hub", "httpx", "urllib3", "filelock", "fsspec", "absl")
"""Libraries of which only warnings are shown, unless the level is debug."""


class _Handler(logging.StreamHandler[TextIO]):
    """Looks stdout or stderr up at each line: a progress bar replaces them while it is drawn."""

    def __init__(self, stream_name: str):
        self._stream_name = stream_name
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return getattr(sys, self._stream_name)

    @stream.setter
    def stream(self, value: Any) -> None:
        raise AttributeError("the stream is looked up by name")


class _Formatter(logging.Formatter):
    def __init__(self, prefix: str):
        super().__init__(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.levelno >= logging.WARNING:
            record.message = f"{record.levelname}: {record.message}"
        return super().formatMessage(record)


def setup(level: str, rank: int) -> None:
    """Send all logging and warnings of this process to one place. Calling it again replaces the first."""
    handler = _Handler("stdout" if rank == 0 else "stderr")
    handler.setFormatter(_Formatter("" if rank == 0 else f"rank {rank} "))
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.DEBUG if level == "debug" else logging.WARNING)
