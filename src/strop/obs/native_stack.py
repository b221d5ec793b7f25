"""The native (C++) stack of a rank that crashes: on its stderr, in front of faulthandler's Python stacks.

csrc/crash.cpp is built once, when strop is installed (tools/build_kernels.py). `install` puts its handler in
front of faulthandler's for SIGSEGV, SIGBUS, SIGFPE, SIGILL and SIGABRT, and touches no other signal.
`strop.slurm.crash` reads what it wrote.
"""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

from strop import libraries

PLACES = libraries.places(Path(__file__).parent, "crash")


def install() -> bool:
    """Native stacks from now on, after `faulthandler.enable()`; False where the library is not built."""
    for path in PLACES:
        with contextlib.suppress(OSError):  # not built, or against a newer C library
            if ctypes.CDLL(str(path)).strop_crash_install() != 0:
                raise RuntimeError(f"{path}: the system refused its signal handlers")
            return True
    return False
