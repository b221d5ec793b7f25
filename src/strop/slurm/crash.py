"""What a rank's stderr files say about a death that left no verdict.

Where torch's handler is switched on it prints the native stacks of all threads, then faulthandler the Python
stacks. Of both only the thread that crashed is the cause; what the others did differs from one time to the
next, and must not get into the fingerprint by which a repeated crash is known.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Optional, Union

from strop.obs import log_line, secrets
from strop.slurm import attempts, decide, peers

TAIL_BYTES = 1 << 16
"""faulthandler's list of extension modules alone takes some thousand."""
STACKS_BYTES = 1 << 20
FATAL = re.compile(
    r"Fatal Python error: (Segmentation fault|Bus error|Illegal instruction|Aborted|Floating.point exception)"
)
NATIVE_FRAME = re.compile(r"frame #\d+: (?!<unknown function>|c10::FatalSignalHandler)(.+?) \+ 0x")
SHOWN = 3


def find(logs: Path) -> Optional[decide.Crash]:
    """The first rank whose stderr ends in the dump of a native crash that stands for itself."""
    for rank, paths in raw_files(logs).items():
        found = of_rank(rank, paths)
        if isinstance(found, decide.Crash):
            return found
    return None


def of_rank(rank: int, paths: Sequence[Path]) -> Union[decide.Crash, str, None]:
    """The native crash that a rank's stderr ends in. A string: why that abort only follows another rank's
    end (NCCL's watchdog aborts the process after a time-out)."""
    found = list(FATAL.finditer(text := tail(paths, TAIL_BYTES)))
    if not found:
        return None
    follows = peers.reason(None, text[: found[-1].start()]) if found[-1][1] == "Aborted" else None
    return follows or _read(rank, paths)


def _read(rank: int, paths: Sequence[Path]) -> decide.Crash:
    text = tail(paths, STACKS_BYTES)
    match = list(FATAL.finditer(text))[-1]
    python = _paragraph(text[match.end() :], "Current thread ")
    native = NATIVE_FRAME.findall(_paragraph(text[: match.start()], "FatalSignalHandler::fatalSignalHandler"))
    frames = re.findall(r'File "([^"]+)", line (\d+) in (.+)', python)
    places = [f"{os.path.basename(file)}:{line} in {name}" for file, line, name in frames[:SHOWN]]
    words = [match[1], *(["at " + " < ".join(places)] if places else [])]
    words += ["native: " + " < ".join(native[:SHOWN])] if native else []
    message = f"{', '.join(words)} (stacks in {paths[-1]})"
    return decide.Crash(rank, message, attempts.fingerprint(match[1], python or " ".join(native)))


def _paragraph(text: str, mark: str) -> str:
    """The text from the line with `mark` to the next empty line; "" without such a line."""
    _, found, rest = text.partition(mark)
    return rest.partition("\n\n")[0] if found else ""


def last_words(logs: Path, spoken: set[int]) -> str:
    """The end of the stderr of the first rank that wrote something but left no verdict."""
    for rank, paths in raw_files(logs).items():
        lines = tail(paths, TAIL_BYTES).strip().splitlines()
        if lines and rank not in spoken:
            return "\n  ".join([f"the end of {paths[-1]}:", *map(secrets.redact, lines[-12:])])
    return ""


def raw_files(logs: Path) -> dict[int, list[Path]]:
    """Every rank's raw segments in the order in which they were written."""
    named = [(log_line.segment(path), path) for path in logs.glob("rank*.err")]
    files: dict[int, list[Path]] = {}
    for rank, _, path in sorted((s.rank, s.index, path) for s, path in named if s):
        files.setdefault(rank, []).append(path)
    return files


def tail(paths: Sequence[Path], num_bytes: int) -> str:
    """The last bytes of the segments taken together: the newest one may have just begun."""
    parts: list[bytes] = []
    left = num_bytes
    for path in reversed(paths):
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - left))
            parts.append(file.read())
        left -= len(parts[-1])
        if left <= 0:
            break
    return b"".join(reversed(parts)).decode(errors="replace")
