"""Files of a store, read so that one which is not whole is named, with what to do about it.

A process that dies leaves no store that is half there: stores are written aside and renamed. But copies break
off, disks fill, people tidy up, and copy another store over one that a run is reading. So a store is sealed:
`store.json` has size, time of writing and SHA-256 of each file with numbers. Where size and time are the same
the content is taken to be (as git does), else it is hashed; and while a run reads a store, it looks whether
somebody has written to the very files that it has mapped.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np

from strop import files
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


def seal(directory: Path) -> dict[str, dict[str, Any]]:
    """Of each file with numbers, what `check_seal` compares; for the "files" of store.json."""
    found = sorted([*directory.glob("*.bin"), *directory.glob("*.npy")])
    return {
        file.name: {
            "size": file.stat().st_size,
            "mtime_ns": file.stat().st_mtime_ns,
            "sha256": files.sha256(file),
        }
        for file in found
    }


def check_seal(directory: Path) -> None:
    """UserError for a file of the store that holds something else than what was written."""
    for name, sealed in record(directory / "store.json")["files"].items():
        file = directory / name
        if not file.exists():
            raise damaged(file, "missing")
        status = file.stat()
        if (status.st_size, status.st_mtime_ns) == (sealed["size"], sealed["mtime_ns"]):
            continue
        if files.sha256(file) != sealed["sha256"]:
            raise damaged(file, "its content is not what was written")


def content(directory: Path) -> str:
    """Address of what a store holds, wherever it lies and whatever it was made of."""
    sealed = record(directory / "store.json")["files"]
    what = sorted((name, entry["sha256"]) for name, entry in sealed.items() if name != "rows.npy")
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


@dataclass(frozen=True)
class Mapped:
    """A file as it was when it was mapped."""

    file: Path
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def now(cls, file: Path) -> Mapped:
        status = file.stat()
        return cls(file, status.st_ino, status.st_size, status.st_mtime_ns)

    def check(self) -> None:
        """UserError if somebody has written to it since. One that was removed or replaced is still mapped."""
        if not self.file.exists():
            return
        now = Mapped.now(self.file)
        if now.inode == self.inode and now != self:
            raise UserError(
                f"{self.file} was written to while this run was reading it: delete {self.file.parent}, "
                "prepare it again, and let the run go on from its last checkpoint"
            )
