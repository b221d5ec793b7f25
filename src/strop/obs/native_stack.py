"""The native (C++) stack of a rank that crashes: on its stderr, in front of faulthandler's Python stacks.

csrc/crash.cpp is built once, when strop is installed (`build`). `install` puts its handler in front of
faulthandler's for SIGSEGV, SIGBUS, SIGFPE, SIGILL and SIGABRT, and touches no other signal.
`strop.slurm.crash` reads what it wrote.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("csrc") / "crash.cpp"
LIBRARY = SOURCE.parents[1] / "lib" / "libstrop_crash.so"


def build_command(target: Path) -> list[str]:
    flags = ["-std=c++17", "-O3", "-shared", "-fPIC", "-Wall", "-Wextra"]
    return ["g++", *flags, "-o", str(target), str(SOURCE)]


def build() -> None:
    """Make the library; whoever has the old one open keeps it. Raises OSError without a compiler."""
    LIBRARY.parent.mkdir(exist_ok=True)
    aside = LIBRARY.with_suffix(f".{os.getpid()}")
    subprocess.run(build_command(aside), check=True)
    os.replace(aside, LIBRARY)


def install() -> bool:
    """Native stacks from now on, after `faulthandler.enable()`; False where the library is not built."""
    if not LIBRARY.exists():
        return False
    if ctypes.CDLL(str(LIBRARY)).strop_crash_install() != 0:
        raise RuntimeError(f"{LIBRARY}: the system refused its signal handlers")
    return True
