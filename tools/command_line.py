"""How every tool ends: the user's mistakes as one message on stderr and their exit code, no traceback."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, Callable, NoReturn, Optional

from strop.errors import EXIT_TERM, StorageError, UserError
from tools import end_at_once

LINE_EVERY_S = 5.0


class Progress:
    """A line on stderr now and then: what is done, of how many (0: that is not known), and the time."""

    def __init__(self) -> None:
        self.begin = self.last = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last > LINE_EVERY_S:
            self.last = now
            of = f" of {total:,}" if total else ""
            print(f"  {what}: {done:,}{of}, {now - self.begin:.0f} s", file=sys.stderr, flush=True)


def run(main: Callable[[], None]) -> None:
    """Call `main` and leave the process with its exit code (0, the error's own, 130 for Ctrl-C)."""
    try:
        if signal.getsignal(signal.SIGINT) is end_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        main()
    except (UserError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        sys.stderr.close()
        sys.exit(0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def end_on_term(exit_code: Callable[[], int] = lambda: EXIT_TERM) -> None:
    """TERM ends the tool as Ctrl-C does: half-written files are removed, finished ones stay. A second one (of
    Slurm, behind that of the job's body) must not disturb this."""

    def end(number: int, frame: Optional[FrameType]) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(exit_code())

    signal.signal(signal.SIGTERM, end)


def write_json(record: Any, path: str) -> None:
    """What --json asks for: a file, or stdout for "-"."""
    text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}") from error


def command_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose --help shows the tool's module docstring as it is written."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
