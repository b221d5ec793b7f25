"""strop_ops.h by ctypes, on memory with guarded borders, and its functions once more in numpy's fp64.

Every array handed to a kernel ends where a page begins that must not be touched: an element too far ends the
test run with SIGSEGV. No torch here; the interface is plain pointers.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np

F32, BF16, F16 = 0, 1, 2
OK, EDTYPE, ESHAPE, ETARGET, EKIND, ENULL, ECUDA = range(7)
STORAGE = {F32: np.float32, BF16: np.uint16, F16: np.float16}
HALF_STEP = {F32: 2.0**-24, BF16: 2.0**-8, F16: 2.0**-11}
"""What rounding to nearest may cost, relatively."""
TINY = {F32: 2.0**-126, BF16: 2.0**-126, F16: 2.0**-25}
"""The same below the smallest normal number, absolutely; in fp32 a GPU writes 0 there."""
PROT_NONE = 0
LIBC = ctypes.CDLL(None, use_errno=True)


def guarded(count: int, dtype: Any) -> np.ndarray:
    """`count` elements of 0x7f bytes that end where a page begins that must not be touched."""
    num_bytes = count * np.dtype(dtype).itemsize
    size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), np.uint8)
    memory[:] = 0x7F
    if LIBC.mprotect(ctypes.c_void_p(memory.ctypes.data + size), mmap.PAGESIZE, PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    return memory[size - num_bytes : size].view(dtype)


def copied(values: Any, dtype: Any) -> np.ndarray:
    values = np.asarray(values)
    array = guarded(values.size, dtype).reshape(values.shape)
    array[...] = values
    return array


def encode(values: np.ndarray, dtype: int) -> np.ndarray:
    """Rounded to the nearest, ties to even; bf16 as its bits."""
    with np.errstate(over="ignore"):
        single = np.asarray(values, np.float32)
        if dtype != BF16:
            return single.astype(STORAGE[dtype])
    bits = single.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(single), 0x7FC0, rounded).astype(np.uint16)


def decode(raw: np.ndarray, dtype: int) -> np.ndarray:
    """fp64."""
    if dtype == BF16:
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float64)


@dataclass
class Matrix:
    """[N, V] whose rows begin `stride` elements apart."""

    flat: np.ndarray
    shape: tuple[int, int]
    dtype: int
    stride: int

    @classmethod
    def of(cls, values: np.ndarray, dtype: int, stride: Optional[int] = None) -> Matrix:
        rows, cols = values.shape
        stride = stride or cols
        matrix = cls(
            guarded((rows - 1) * stride + cols if rows else 0, STORAGE[dtype]), (rows, cols), dtype, stride
        )
        matrix.raw[...] = encode(values, dtype)
        return matrix

    @property
    def raw(self) -> np.ndarray:
        steps = (self.stride * self.flat.itemsize, self.flat.itemsize)
        return np.lib.stride_tricks.as_strided(self.flat, self.shape, steps)

    @property
    def values(self) -> np.ndarray:
        return decode(self.raw, self.dtype)


class Head(ctypes.Structure):
    _fields_ = (("bias", ctypes.c_void_p), ("softcap", ctypes.c_float), ("inv_temperature", ctypes.c_float))


class WalkPointers(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("top", "total", "weighted", "plain", "at_target"))


@dataclass(frozen=True)
class HeadSettings:
    """What becomes of a matmul's output: bias [V], softcap (0 for none), temperature."""

    bias: Optional[np.ndarray] = None
    softcap: float = 0.0
    temperature: float = 1.0

    def columns(self, first: int, last: int) -> HeadSettings:
        bias = None if self.bias is None else copied(self.bias[first:last], np.float32)
        return HeadSettings(bias, self.softcap, self.temperature)

    def struct(self, at: Callable[[Optional[np.ndarray]], Optional[int]]) -> Head:
        return Head(at(self.bias), self.softcap, 1.0 / self.temperature)

    def logits(self, x: np.ndarray) -> np.ndarray:
        """fp64."""
        if self.bias is not None:
            x = x + self.bias.astype(np.float64)
        if self.softcap:
            x = self.softcap * np.tanh(x / self.softcap)
        return x / self.temperature

    def slopes(self, x: np.ndarray) -> np.ndarray:
        """Their derivative by x."""
        if self.bias is not None:
            x = x + self.bias.astype(np.float64)
        slope = np.ones_like(x) if not self.softcap else 1 - np.tanh(x / self.softcap) ** 2
        return slope / self.temperature


def address(array: Optional[np.ndarray]) -> Optional[int]:
    return None if array is None else array.ctypes.data


@dataclass
class Walk:
    """The state of a walk over the vocabulary, as it begins; fp32 [N] each."""

    num_rows: int
    stats: bool = True
    top: np.ndarray = field(init=False)
    total: np.ndarray = field(init=False)
    weighted: Optional[np.ndarray] = field(init=False)
    plain: Optional[np.ndarray] = field(init=False)
    at_target: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.top = copied(np.full(self.num_rows, -np.inf), np.float32)
        self.total, self.at_target = (copied(np.zeros(self.num_rows), np.float32) for _ in range(2))
        self.weighted = copied(np.zeros(self.num_rows), np.float32) if self.stats else None
        self.plain = copied(np.zeros(self.num_rows), np.float32) if self.stats else None

    def struct(self, at: Callable[[Optional[np.ndarray]], Optional[int]]) -> WalkPointers:
        return WalkPointers(*map(at, (self.top, self.total, self.weighted, self.plain, self.at_target)))

    @property
    def lse(self) -> np.ndarray:
        return self.top.astype(np.float64) + np.log(self.total.astype(np.float64))

    @property
    def entropy(self) -> np.ndarray:
        assert self.weighted is not None
        return self.lse - self.weighted.astype(np.float64) / self.total

    def bits(self) -> list[bytes]:
        arrays = (self.top, self.total, self.weighted, self.plain, self.at_target)
        return [a.tobytes() for a in arrays if a is not None]


I64, I32, F, P = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p
SIGNATURES = {
    "strop_walk_chunk": (P, ctypes.c_int, I64, I64, I64, I64, I64, P, P, P, P, P),
    "strop_grad_chunk": (P, P, ctypes.c_int, ctypes.c_int, I64, I64, I64, I64, I64, I64, P, P, P, P, P, P, P),
    "strop_segment_sum": (P, I64, P, I64, P, P),
    "strop_segment_spread": (P, I64, P, I64, P, P),
    "strop_dpo_loss": (P, I64, ctypes.c_int, F, F, F, P, P, P),
}


class Library:
    """A library on CPU memory; the methods take arrays and give back the status."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.c = ctypes.CDLL(str(path))
        self.c.strop_error.restype = ctypes.c_char_p
        for function, types in SIGNATURES.items():
            getattr(self.c, function).argtypes = types

    def at(self, array: Optional[np.ndarray]) -> Optional[int]:
        """Where the library finds an array."""
        return address(array)

    def done(self, status: int) -> int:
        """After a call: results are in the arrays."""
        return status

    def walk(
        self,
        x: Matrix,
        target: np.ndarray,
        walk: Walk,
        head: HeadSettings = HeadSettings(),
        first: int = 0,
        vocab: Optional[int] = None,
        exact: Optional[np.ndarray] = None,
    ) -> int:
        rows, cols = x.shape
        how, state = head.struct(self.at), walk.struct(self.at)
        status = self.c.strop_walk_chunk(
            self.at(x.flat), x.dtype, rows, cols, x.stride, first, cols if vocab is None else vocab,
            self.at(target), self.at(exact), ctypes.addressof(how), ctypes.addressof(state), None,
        )  # fmt: skip
        return self.done(status)

    def grad(
        self,
        x: Matrix,
        out: Matrix,
        target: np.ndarray,
        lse: np.ndarray,
        grad: np.ndarray,
        head: HeadSettings = HeadSettings(),
        first: int = 0,
        vocab: Optional[int] = None,
        exact: Optional[np.ndarray] = None,
        bias_grad: Optional[np.ndarray] = None,
    ) -> int:
        rows, cols = x.shape
        how = head.struct(self.at)
        status = self.c.strop_grad_chunk(
            self.at(x.flat), self.at(out.flat), x.dtype, out.dtype, rows, cols, x.stride, out.stride, first,
            cols if vocab is None else vocab, self.at(target), self.at(exact), ctypes.addressof(how),
            self.at(lse), self.at(grad), self.at(bias_grad), None,
        )  # fmt: skip
        return self.done(status)

    def segment_sum(self, x: np.ndarray, cu_seqlens: np.ndarray, out: np.ndarray) -> int:
        pointers = self.at(x), self.at(cu_seqlens), self.at(out)
        segments = len(cu_seqlens) - 1
        return self.done(
            self.c.strop_segment_sum(pointers[0], len(x), pointers[1], segments, pointers[2], None)
        )

    def segment_spread(self, g: np.ndarray, cu_seqlens: np.ndarray, dx: np.ndarray) -> int:
        segments = len(cu_seqlens) - 1
        return self.done(
            self.c.strop_segment_spread(self.at(g), len(dx), self.at(cu_seqlens), segments, self.at(dx), None)
        )

    def dpo(
        self,
        ratio: np.ndarray,
        kind: int,
        beta: float,
        eps: float,
        delta: float,
        loss: np.ndarray,
        d_ratio: np.ndarray,
    ) -> int:
        status = self.c.strop_dpo_loss(
            self.at(ratio), len(ratio), kind, beta, eps, delta, self.at(loss), self.at(d_ratio), None
        )
        return self.done(status)


class GpuLibrary(Library):
    """libstrop_cuda.so: every array is copied to the device, as misaligned as it is here, and back."""

    def __init__(self, name: str, path: Path) -> None:
        super().__init__(name, path)
        self.copies: dict[int, tuple[np.ndarray, Any]] = {}

    def at(self, array: Optional[np.ndarray]) -> Optional[int]:
        import torch

        if array is None or array.size == 0:
            return None
        host = array.ctypes.data
        if host not in self.copies:
            raw, offset = array.reshape(-1).view(np.uint8), host % 16
            device = torch.empty(raw.size + 16, dtype=torch.uint8, device="cuda")[offset:][: raw.size]
            device.copy_(torch.from_numpy(raw))
            self.copies[host] = raw, device
        return self.copies[host][1].data_ptr()

    def done(self, status: int) -> int:
        import torch

        torch.cuda.synchronize()
        for raw, device in self.copies.values():
            raw[:] = device.cpu().numpy()
        self.copies.clear()
        return status
