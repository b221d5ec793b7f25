"""libstrop_cpu.so for a CPU with AMX, on one without: the same source, its tiles in memory.

A fault of the real instructions (tiles of no shape, or not configured in this thread) ends the test run.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace

from strop.ops import native
from tools import build_kernels


@functools.cache
def emulated() -> ctypes.CDLL:
    """The library, compiled now if it is not up to date."""
    cpu = next(one for one in build_kernels.LIBRARIES if one.name == "cpu")
    recipe = replace(cpu, name="amx", flags=(*cpu.flags, "-DSTROP_EMULATE_AMX"))
    target = recipe.target(in_prefix=False)
    build_kernels.build(recipe, target, ())
    library = native._checked(target, "cpu")
    assert library.strop_head_uses_amx()
    return library
