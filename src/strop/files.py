"""Directories that appear complete or not at all.

A result (an exported model, an imported one, demo data) is written into a hidden directory beside its
target, flushed to disk and renamed. Whoever reads the target never sees half a model, and an interrupted
tool leaves nothing that looks like a result. Standard library only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
        sync_directory(aside)
        if target.exists() and not replace:  # made by somebody else meanwhile
            raise FileExistsError(f"{target} exists")
        old = target.parent / f".{target.name}.{os.getpid()}.old"
        if target.exists():
            target.rename(old)
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _sync(target.parent)


def sync_directory(directory: Path) -> None:
    """fsync every file below `directory` and the directories themselves.

    Files get the usual permissions too: safetensors makes its own readable by their owner alone.
    """
    umask = os.umask(0)
    os.umask(umask)
    for root, _, names in os.walk(directory):
        for name in names:
            (Path(root) / name).chmod(0o666 & ~umask)
            _sync(Path(root) / name)
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
