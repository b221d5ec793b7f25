"""Files and directories that are whole whenever somebody reads them.

A small file (a record, a verdict, a marker) is written aside, flushed to disk and renamed over its name. A
result (an exported model, an imported one, demo data) is made in a hidden directory beside its target and
renamed likewise. So a reader never sees half of anything, and what a killed process leaves is never taken
for a result. Standard library only: the batch host's python3 runs this too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

BLOCK_BYTES = 2**20


def write_atomic(path: Path, text: str) -> None:
    """Write aside, fsync, rename, fsync the directory: a reader sees the old text or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(aside, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Optional[Any]:
    """None where the file is missing, or was cut off by the death of its writer."""
    with contextlib.suppress(FileNotFoundError, ValueError, RecursionError):  # no JSON, or no UTF-8
        return json.loads(path.read_text())
    return None


def tail(path: Path, num_bytes: int) -> bytes:
    """The last bytes of a file that may be growing; all of a shorter one. Raises OSError."""
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - num_bytes))
        return file.read()


@contextmanager
def new_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` when the block ends without an exception.

    An existing `target` is an error unless `replace` is set; then it stays in place until the new one
    is complete. Raises FileExistsError, OSError.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and not replace:
        raise FileExistsError(f"{target} exists")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.parent / f".{target.name}.{os.getpid()}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        _give_usual_permissions(aside)
        fsync_tree(aside)
        if target.exists() and not replace:  # made by somebody else meanwhile
            raise FileExistsError(f"{target} exists")
        old = target.parent / f".{target.name}.{os.getpid()}.old"
        if target.exists():
            target.rename(old)
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    fsync(target.parent)


def remove_left_over(target: Path) -> None:
    """What killed writers of `new_directory(target)` have left beside it. Nobody may write it now."""
    for path in target.parent.glob(f".{target.name}.*"):
        if re.fullmatch(r"\.\d+\.(tmp|old)", path.name[len(target.name) + 1 :]):
            shutil.rmtree(path, ignore_errors=True)


def _give_usual_permissions(directory: Path) -> None:
    """safetensors makes its files readable by their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for root, _, names in os.walk(directory):
        for name in names:
            (Path(root) / name).chmod(0o666 & ~umask)


def fsync_tree(directory: Path) -> None:
    """Every file below `directory`, and the directories themselves."""
    for root, _, names in os.walk(directory):
        for name in names:
            fsync(Path(root) / name)
        fsync(Path(root))


def fsync(path: Path) -> None:
    """A file's content, or the names in a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
