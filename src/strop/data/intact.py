"""Files of a store, read so that one which is not whole is named, with what to do about it.

A process that dies leaves no store that is half there: stores are written aside and renamed. But copies break
off, disks fill, and people tidy up.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np

from strop.errors import UserError


def damaged(file: Path, what: str) -> UserError:
    return UserError(f"{file} is damaged ({what}): delete {file.parent} and prepare it again")


def record(file: Path) -> Any:
    """What a JSON file holds."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise damaged(file, "missing") from None
    except ValueError:  # also of bytes that are no UTF-8
        raise damaged(file, "no JSON") from None


def array(file: Path, length: Optional[int] = None, mmap_mode: Optional[Literal["r"]] = None) -> np.ndarray:
    """What a .npy file holds: `length` rows, if that is known."""
    try:
        found = np.load(file, mmap_mode=mmap_mode)
    except FileNotFoundError:
        raise damaged(file, "missing") from None
    except (ValueError, EOFError):
        raise damaged(file, "no array, or a part of one") from None
    if length is not None and len(found) != length:
        raise damaged(file, f"{len(found):,} rows, not {length:,}")
    return found


def flat(file: Path, dtype: type, length: int) -> np.ndarray:
    """Map a file that is nothing but `length` numbers."""
    wanted = length * np.dtype(dtype).itemsize
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        raise damaged(file, "missing") from None
    if size != wanted:
        raise damaged(file, f"its size is {size:,}, not {wanted:,}")
    return np.memmap(file, dtype=dtype, mode="r")
