"""Large tensors that come back every step, on the CPU: their memory is kept from one to the next.

Fresh memory of hundreds of MiB costs a page fault for each 4 KiB, a tenth of the head's forward and backward
under glibc's allocator, which gives such memory back to the system whenever a tensor dies. tcmalloc
(strop.slurm.env.allocator) keeps it for any tensor, and most tensors are left to it. But cut up for smaller
ones it is no longer there when the next large one comes, for which the heap grows then. So the largest have
one piece of memory there as well, apart from the heap: what the head keeps for its backward, and when that
has gone the fp32 gradient of the weights at the root (strop.parallel), which goes at the end of the step.

Where the head itself gives the gradient in fp32, it is written over what was kept while that is read
(`at_end`, `over`): two tensors of the same memory, which PyTorch takes for two of their own.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import threading
import weakref
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

LEAST = 16 * 2**20
"""Bytes; smaller tensors come from the allocator."""
GRAIN = 16 * 2**20
"""Memory is taken in multiples of it, so that steps of slightly different size share it."""
LINE = 64
"""Bytes of a cache line, by which whole ones are written."""
MOST_IDLE = 3
"""The exponentials that a head keeps, their tops, the weight's gradient."""
MOST_IDLE_BESIDE_TCMALLOC = 1

_lock = threading.RLock()  # a finaliser may run at any point, in the thread that holds it too
_idle: list[mmap.mmap] = []  # the smallest first
_ends: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""Of what `at_end` gave: its address, and the memory that it ends."""


def empty(shape: list[int], dtype: torch.dtype, device: torch.device, largest: bool = False) -> Tensor:
    """An uninitialised tensor, contiguous. On the CPU its memory is used again after its death; of the
    memory that lies idle the largest MOST_IDLE pieces are kept. largest: of those of which only one at a time
    is alive, as a rule."""
    size = math.prod(shape) * dtype.itemsize
    left_to_others = device.type != "cpu" or (_allocator_keeps_memory() and not largest)
    if size < LEAST or left_to_others:  # torch's own does it on a GPU
        return torch.empty(shape, dtype=dtype, device=device)
    return _part(_window(size), 0, shape, dtype)


def at_end(shape: list[int], dtype: torch.dtype, device: torch.device, room: int) -> Tensor:
    """One of the largest, as `empty` gives it, at the end of memory of at least `room` bytes, whose beginning
    `over` gives. What `empty` would leave to PyTorch is an ordinary tensor."""
    size = math.prod(shape) * dtype.itemsize
    if size == 0 or max(size, room) < LEAST or device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    whole = -max(size, room) // LINE * -LINE
    window = _window(whole)
    kept = _part(window, whole - size, shape, dtype)
    with _lock:
        _ends[kept.data_ptr()] = window
    return kept


def over(kept: Tensor, shape: list[int], dtype: torch.dtype) -> Optional[Tensor]:
    """A tensor at the beginning of the memory that `kept`, of `at_end`, ends; kept is gone from now on
    (`is_gone`), but for who writes the one and knows how far that of the other is read. None if there is no
    such memory: kept came in another way, or is a copy."""
    with _lock:
        window = _ends.get(kept.data_ptr())
        if window is None or window.gone:
            return None
        window.gone = True
    assert math.prod(shape) * dtype.itemsize <= len(window)
    return _part(window, 0, shape, dtype)


def is_gone(kept: Tensor) -> bool:
    """Whether another tensor is written, or has been, where this one is."""
    with _lock:
        window = _ends.get(kept.data_ptr())
        return window is not None and window.gone


def _part(window: Any, offset: int, shape: list[int], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(window, dtype=dtype, offset=offset, count=math.prod(shape)).view(shape)


def _window(size: int) -> Any:
    """`size` bytes, which come back when the last tensor of them dies."""
    with _lock:
        fits = [i for i, memory in enumerate(_idle) if len(memory) >= size]
        # Where none fits, the largest goes before its successor comes.
        memory = _idle.pop(fits[0] if fits else -1) if _idle else None
    if memory is None or len(memory) < size:
        memory = None
        memory = mmap.mmap(-1, -size // GRAIN * -GRAIN, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    window: Any = (ctypes.c_char * size).from_buffer(memory)
    window.gone = False
    weakref.finalize(window, _came_back, memory).atexit = False
    return window


@functools.cache
def _allocator_keeps_memory() -> bool:
    maps = Path("/proc/self/maps")
    return maps.exists() and "tcmalloc" in maps.read_text()


def _came_back(memory: mmap.mmap) -> None:
    with _lock:
        _idle.append(memory)
        _idle.sort(key=len)
        del _idle[: -(MOST_IDLE_BESIDE_TCMALLOC if _allocator_keeps_memory() else MOST_IDLE)]
