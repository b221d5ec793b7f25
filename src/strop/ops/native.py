"""The compiled kernels: found, loaded by ctypes, checked, and called with raw pointers.

`csrc/strop_ops.h` is the contract, one library a device type. What a call needs to be safe (device, dtype,
contiguity, lifetimes) is the caller's to see to; a status that is not 0 becomes a ValueError here.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from strop import libraries

log = logging.getLogger(__name__)

ABI = 5
DTYPES = {
    "cpu": {torch.float32: 0, torch.bfloat16: 1},
    "cuda": {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2},
}
TILE, PANEL, SEGMENT = 32, 12, 3072
"""strop_cpu.h: tokens that a packed tensor is padded to, words of a panel, words of a segment."""


class Head(Structure):
    """strop_head: what becomes of the matmul's output before the softmax."""

    _fields_ = (("bias", c_void_p), ("softcap", c_float), ("inv_temperature", c_float))


class Walk(Structure):
    """strop_walk: per-row state of the walk over the vocabulary."""

    _fields_ = tuple((name, c_void_p) for name in ("top", "total", "weighted", "plain", "at_target"))


_P, _N, _I, _F = c_void_p, c_int64, c_int, c_float
_HEAD, _WALK = POINTER(Head), POINTER(Walk)
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "strop_walk_chunk": (_P, _I, _N, _N, _N, _N, _N, _P, _P, _HEAD, _WALK, _P),
    "strop_grad_chunk": (_P, _P, _I, _I, _N, _N, _N, _N, _N, _N, _P, _P, _HEAD, _P, _P, _P, _P),
    "strop_segment_sum": (_P, _N, _P, _N, _P, _P),
    "strop_segment_spread": (_P, _N, _P, _N, _P, _P),
    "strop_dpo_loss": (_P, _N, _I, _F, _F, _F, _P, _P, _P),
}
CPU_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "strop_huge_pages": (_P, _N),
    "strop_head_supported": (_I,),
    "strop_head_uses_amx": (),
    "strop_head_pack": (_P, _I, _N, _N, _N, _P),
    "strop_head_walk": (_P, _P, _I, _I, _N, _N, _N, _N, _N, _N, _P, _HEAD, _WALK, _P, _P, _P),
    "strop_head_grad": (_P, _P, _I, _I, _N, _N, _N, _N, _N, _N, _P, _HEAD, _P, _P, _P),
    "strop_head_grad_kept": (_P, _P, _I, _N, _N, _N, _N, _P, _F, _P, _P, _P),
    "strop_head_turn": (_P, _N, _N, _N, _P),
    "strop_head_d_weight": (_P, _P, _N, _N, _N, _I, _P),
    "strop_head_d_hidden": (_P, _P, _I, _N, _N, _N, _N, _P, _P),
    "strop_norm": (_P, _P, _I, _N, _N, _F, _P, _P),
    "strop_norm_grad": (_P, _P, _P, _P, _I, _N, _N, _P, _P, _P),
    "strop_gate": (_P, _P, _I, _N, _P),
    "strop_gate_grad": (_P, _P, _P, _I, _N, _P, _P, _P),
    "strop_turn": (_P, _I, _N, _N, _P, _P, _N, _N, _N, _I, _P),
    "strop_linear": (_P, _P, _I, _P, _N, _N, _N, _P, _P),
    "strop_linear_d_input": (_P, _P, _I, _N, _N, _N, _P, _P),
    "strop_linear_d_weight": (_P, _P, _N, _N, _N, _P, _P, _I),
    "strop_attend": (_P, _P, _P),
    "strop_attend_grad": (_P, _P, _P, _P, _P, _P, _P),
}


@functools.cache
def library(device: str) -> Optional[ctypes.CDLL]:
    """The library of a device type ("cpu", "cuda"), or None with a line that says why."""
    for path in libraries.places(Path(__file__).parent, device):
        if path.exists():
            try:
                return _checked(path, device)
            except (OSError, AttributeError) as error:
                log.warning("%s cannot be used: %s", path, error)
    log.warning(
        "no native kernels for %s (python -m tools.build_kernels makes them): "
        "PyTorch's own operations are used, with the same results",
        device,
    )
    return None


@torch.compiler.assume_constant_result
def is_loaded(device: str) -> bool:
    """Whether there are kernels for a device type; torch.compile asks once."""
    return device in DTYPES and library(device) is not None


def _checked(path: Path, device: str) -> ctypes.CDLL:
    """Raises OSError if the library does not load, is of another ABI or not for this GPU, AttributeError if a
    symbol lacks. Later such a GPU would fail at each launch, in the middle of a run."""
    lib = ctypes.CDLL(str(path))
    if (found := lib.strop_abi_version()) != ABI:
        raise OSError(
            f"its ABI version is {found}, not {ABI}: build it again (python -m tools.build_kernels)"
        )
    lib.strop_error.restype = c_char_p
    for name, arguments in {**SIGNATURES, **(CPU_SIGNATURES if device == "cpu" else {})}.items():
        getattr(lib, name).argtypes = arguments
    if device == "cuda":
        lib.strop_problem.restype = c_char_p
        if torch.cuda.is_available() and (problem := lib.strop_problem()):
            raise OSError(f"{problem.decode()} (built with nvcc for another driver or GPU? See `nvidia-smi`)")
    return lib


@functools.cache
def identity(device: str) -> str:
    """What this device's numbers depend on: "native" and the library's hash, or "reference"."""
    lib = library(device)
    if lib is None:
        return "reference"
    return f"native-{hashlib.sha256(Path(lib._name).read_bytes()).hexdigest()[:12]}"


@functools.cache
def has_avx512(dtype: torch.dtype) -> bool:
    """Whether this CPU runs what strop_cpu.h has for dtype."""
    lib = library("cpu")
    return lib is not None and dtype in DTYPES["cpu"] and bool(lib.strop_head_supported(DTYPES["cpu"][dtype]))


@functools.cache
def has_amx() -> bool:
    """Whether the fused head multiplies bf16 by AMX; a CPU that could but may not is named once."""
    if not has_avx512(torch.bfloat16):
        return False
    lib = library("cpu")
    assert lib is not None
    if not (found := bool(lib.strop_head_uses_amx())) and torch.cpu._is_amx_tile_supported():
        log.warning(
            "this CPU has AMX, but %s was built without it (g++ 11 or newer knows it) or the system refuses "
            "it: AVX-512 does the head's bf16 matmuls, with the same accuracy and more slowly",
            lib._name,
        )
    return found


def is_rounded(x: Tensor, weight: Tensor) -> bool:
    """Whether a weight is fp32 beside x in 16 bit: it is rounded to x's type as it is read, its gradient is
    fp32."""
    return weight.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)


def head_kernel(dtype: torch.dtype) -> str:
    """What makes matmul and softmax one kernel for dtype on this CPU: "amx", "avx512", or "" for nothing."""
    if not has_avx512(dtype):
        return ""
    return "amx" if dtype == torch.bfloat16 and has_amx() else "avx512"


def takes(x: Tensor, what: str) -> bool:
    """Whether there are kernels for x's device and dtype; if not, says so once."""
    device = x.device.type
    if device not in DTYPES:
        _note(f"{what}: no native kernels for tensors on {device}, the reference is used")
        return False
    if not is_loaded(device):
        return False
    if x.dtype not in DTYPES[device]:
        _note(f"{what}: no native kernel for {x.dtype} on {device}, the reference is used")
        return False
    return True


@functools.cache
def _note(line: str) -> None:
    log.warning("%s", line)


def refuse(what: str, reason: str) -> bool:
    """False, having said once why the reference is used."""
    _note(f"{what}: {reason}, the reference is used")
    return False


def call(name: str, like: Tensor, *arguments: Any) -> None:
    """Run a function of `like`'s library; tensors become pointers (None: null). The caller keeps them alive.

    On a GPU it runs on the current stream of `like`'s device. Raises ValueError with the library's words.
    """
    device = like.device.type
    lib = library(device)
    assert lib is not None, name
    raw = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    if device == "cuda":
        with torch.cuda.device(like.device):
            status = getattr(lib, name)(*raw, torch.cuda.current_stream().cuda_stream)
    elif name in CPU_SIGNATURES:
        status = getattr(lib, name)(*raw)
    else:
        status = getattr(lib, name)(*raw, None)
    if status != 0:
        raise ValueError(f"{name}: {lib.strop_error(status).decode()}")
