"""What a rank's stderr file says about a death that left no verdict.

Where torch's handler is switched on it prints the native stacks of all threads, then faulthandler the Python
stacks. Of both only the thread that crashed is the cause; what the others did differs from one time to the
next, and must not get into the fingerprint by which a repeated crash is known.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Optional, Union

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
    for path in newest(logs):
        found = of_file(path)
        if isinstance(found, decide.Crash):
            return found
    return None


def of_file(path: Path) -> Union[decide.Crash, str, None]:
    """The native crash that a rank's stderr ends in. A string: why that abort only follows another rank's
    end (NCCL's watchdog aborts the process after a time-out)."""
    found = list(FATAL.finditer(text := _tail(path, TAIL_BYTES)))
    if not found:
        return None
    follows = peers.reason(None, text[: found[-1].start()]) if found[-1][1] == "Aborted" else None
    return follows or _read(path)


def newest(logs: Path) -> list[Path]:
    """Each rank's raw file, by rank; of one that was rotated (rank00037.1.err) the last segment."""
    by_rank: dict[int, tuple[int, Path]] = {}
    for path in logs.glob("rank*.err"):
        number = re.fullmatch(r"rank(\d+)(?:\.(\d+))?\.err", path.name)
        if number:
            by_rank[int(number[1])] = max(
                by_rank.get(int(number[1]), (-1, path)), (int(number[2] or 0), path)
            )
    return [by_rank[rank][1] for rank in sorted(by_rank)]


def _read(path: Path) -> decide.Crash:
    text = _tail(path, STACKS_BYTES)
    match = list(FATAL.finditer(text))[-1]
    python = _paragraph(text[match.end() :], "Current thread ")
    native = NATIVE_FRAME.findall(_paragraph(text[: match.start()], "FatalSignalHandler::fatalSignalHandler"))
    frames = re.findall(r'File "([^"]+)", line (\d+) in (.+)', python)
    places = [f"{os.path.basename(file)}:{line} in {name}" for file, line, name in frames[:SHOWN]]
    words = [match[1], *(["at " + " < ".join(places)] if places else [])]
    words += ["native: " + " < ".join(native[:SHOWN])] if native else []
    message = f"{', '.join(words)} (stacks in {path})"
    return decide.Crash(_rank(path), message, attempts.fingerprint(match[1], python or " ".join(native)))


def _paragraph(text: str, mark: str) -> str:
    """The text from the line with `mark` to the next empty line; "" without such a line."""
    _, found, rest = text.partition(mark)
    return rest.partition("\n\n")[0] if found else ""


def last_words(logs: Path, spoken: set[int]) -> str:
    """The end of the stderr of the first rank that wrote something but left no verdict."""
    for path in newest(logs):
        lines = _tail(path, TAIL_BYTES).strip().splitlines()
        if lines and _rank(path) not in spoken:
            return "\n  ".join([f"the end of {path}:", *lines[-12:]])
    return ""


def _rank(path: Path) -> int:
    return int(path.name[len("rank") :].partition(".")[0])


def _tail(path: Path, num_bytes: int) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - num_bytes))
        return file.read().decode(errors="replace")
