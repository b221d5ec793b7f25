"""What a rank's stderr files say about a death that left no verdict.

`obs/csrc/crash.cpp` writes the native stack of the thread that crashed, then faulthandler the Python stacks
of all threads. Only the thread that crashed is the cause; what the others did differs from one time to the
next, and must not get into the fingerprint by which a repeated crash is known. Nor must addresses.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Optional, Union

from strop import files
from strop.obs import log_line, secrets
from strop.slurm import attempts, decide, peers

TAIL_BYTES = 1 << 16
"""faulthandler's list of extension modules alone takes some thousand."""
STACKS_BYTES = 1 << 20
FATAL = re.compile(
    r"Fatal Python error: (Segmentation fault|Bus error|Illegal instruction|Aborted|Floating.point exception)"
)
NATIVE_STACK = "strop: native stack of the thread that crashed"
NATIVE_FRAME = re.compile(r"^  native #\d+ (\S+)\+0x[0-9a-f]+ in ", re.MULTILINE)
WAY_OUT = re.compile(
    r"_?_?(gsignal|raise|abort|pthread_kill|assert_fail|libc_message|cxa_\w+)|_ZSt9terminatev|_ZN9__gnu_cxx.*"
)
"""How a process ends itself, rather than why."""
SHOWN = 3


def find(logs: Path) -> Optional[decide.Crash]:
    """The first rank whose stderr ends in the dump of a native crash that stands for itself."""
    for rank, paths in log_line.files_by_rank(logs, raw=True).items():
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
    native = _native(text[: match.start()].rpartition(NATIVE_STACK)[2])
    frames = re.findall(r'File "([^"]+)", line (\d+) in (.+)', python)
    places = [f"{os.path.basename(file)}:{line} in {name}" for file, line, name in frames[:SHOWN]]
    words = [match[1], *(["at " + " < ".join(places)] if places else [])]
    words += ["native: " + " < ".join(native)] if native else []
    message = f"{', '.join(words)} (stacks in {paths[-1]})"
    return decide.Crash(rank, message, attempts.fingerprint(" < ".join([match[1], *native]), python))


def _native(text: str) -> list[str]:
    """The innermost functions that have a name; from the interpreter's on, the Python stack says more."""
    inside = itertools.takewhile(lambda name: not name.startswith("_PyEval"), NATIVE_FRAME.findall(text))
    names = [name for name in inside if not WAY_OUT.fullmatch(name)]
    return [readable(name) for name in names[:SHOWN]]


def readable(symbol: str) -> str:
    """at::native::add of _ZN2at6native3addERKNS_6TensorE: the names at the front of a C++ symbol."""
    mangled = re.match(r"_ZN?[rVK]*(?=\d)", symbol)
    rest, names = symbol[mangled.end() :] if mangled else "", []
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        names.append(rest[length.end() : end])
        rest = rest[end:] if symbol.startswith("_ZN") else ""
    return "::".join(names) or symbol


def _paragraph(text: str, mark: str) -> str:
    """The text from the line with `mark` to the next empty line; "" without such a line."""
    _, found, rest = text.partition(mark)
    return rest.partition("\n\n")[0] if found else ""


def last_words(logs: Path, spoken: set[int]) -> str:
    """The end of the stderr of the first rank that wrote something but left no verdict."""
    for rank, paths in log_line.files_by_rank(logs, raw=True).items():
        lines = tail(paths, TAIL_BYTES).strip().splitlines()
        if lines and rank not in spoken:
            return "\n  ".join([f"the end of {paths[-1]}:", *map(secrets.redact, lines[-12:])])
    return ""


def tail(paths: Sequence[Path], num_bytes: int) -> str:
    """The last bytes of the segments taken together: the newest one may have just begun."""
    parts: list[bytes] = []
    left = num_bytes
    for path in reversed(paths):
        parts.append(files.tail(path, left))
        left -= len(parts[-1])
        if left <= 0:
            break
    return b"".join(reversed(parts)).decode(errors="replace")
