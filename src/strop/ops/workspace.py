"""Large tensors that come back every step, on the CPU: their memory is kept from one to the next.

Fresh memory of hundreds of MiB costs a page fault for each 4 KiB, a tenth of the head's forward and backward
under glibc's allocator, which gives such memory back to the system whenever a tensor dies. tcmalloc keeps it
for any tensor, which is better still: where it is loaded (strop.slurm.env.allocator), nothing is done here.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import threading
import weakref
from pathlib import Path

import torch
from torch import Tensor

LEAST = 16 * 2**20
"""Bytes; smaller tensors come from the allocator."""
GRAIN = 16 * 2**20
"""Memory is taken in multiples of it, so that steps of slightly different size share it."""
MOST_IDLE = 3
"""The exponentials that a head keeps, their tops, the weight's gradient."""

_lock = threading.RLock()  # a finaliser may run at any point, in the thread that holds it too
_idle: list[mmap.mmap] = []  # the smallest first


def empty(shape: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor, contiguous. On the CPU its memory is used again after its death; of the
    memory that lies idle the largest MOST_IDLE pieces are kept."""
    size = math.prod(shape) * dtype.itemsize
    if size < LEAST or device.type != "cpu" or _allocator_keeps_memory():  # as torch's own does on a GPU
        return torch.empty(shape, dtype=dtype, device=device)
    with _lock:
        fits = [i for i, memory in enumerate(_idle) if len(memory) >= size]
        # Where none fits, the largest goes before its successor comes.
        memory = _idle.pop(fits[0] if fits else -1) if _idle else None
    if memory is None or len(memory) < size:
        memory = None
        memory = mmap.mmap(-1, -size // GRAIN * -GRAIN, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    window = (ctypes.c_char * size).from_buffer(memory)
    weakref.finalize(window, _came_back, memory).atexit = False
    return torch.frombuffer(window, dtype=dtype).view(shape)


@functools.cache
def _allocator_keeps_memory() -> bool:
    maps = Path("/proc/self/maps")
    return maps.exists() and "tcmalloc" in maps.read_text()


def _came_back(memory: mmap.mmap) -> None:
    with _lock:
        _idle.append(memory)
        _idle.sort(key=len)
        del _idle[:-MOST_IDLE]
