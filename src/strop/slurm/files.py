"""Small files that must be whole whenever somebody reads them."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, Optional


def write_atomic(path: Path, text: str) -> None:
    """Write aside, fsync, rename, fsync the directory: a reader sees the old text or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    fsync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Optional[Any]:
    """None where the file is missing, or was cut off by the death of its writer."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        return json.loads(path.read_text())
    return None
