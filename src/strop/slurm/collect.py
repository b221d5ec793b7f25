"""Rank files from a node's own disk (STROP_LOG_DIR) to the run directory: while a rank runs, and after it.

Both sides only ever grow, so what is missing is what lies beyond the copy's length. It is written at its
place in the file, not appended: whoever does it twice at once does no harm. A rank does this for its own
files from time to time and at its end. Ranks that were killed could not, so the batch shell runs
`python3 -m strop.slurm collect` on every node once all have ended. Where Slurm ended the batch shell too, the
next attempt does so on the nodes that it gets, before its own ranks start, and `python -m tools.logs RUN
--collect` on all. `logs/NNNN/collected-NODE` says that a node has nothing left; `uncollected` names the
others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, Optional

from strop.obs import log_line
from strop.slurm import attempts

BLOCK_BYTES = 4 << 20


def sync(local: Path, shared: Path, rank: Optional[int] = None) -> list[Path]:
    """Bring the copies up to date: of one rank, or of all that have files here. The local files.

    For the rank itself, copies of segments that it has deleted go, too; a collection deletes no copy: of
    what is not here another one may have taken it. Raises OSError for the first that cannot be copied, once
    all others are.
    """
    found = {path.name: path for path in local.iterdir() if _is_of(path, rank)}
    shared.mkdir(parents=True, exist_ok=True)
    failed: Optional[OSError] = None
    for path in found.values():
        try:
            _copy_rest(path, shared / path.name)
        except OSError as error:
            if path.exists():  # else its rank has just deleted a segment
                failed = failed or error
    if rank is not None:
        _remove_deleted(found, shared, rank)
    if failed is not None:
        raise failed
    return list(found.values())


def collect(local: Path, shared: Path) -> int:
    """Copy everything that this node still has, and remove it here. How many files.

    One at a time: where several nodes share what STROP_LOG_DIR names, the second finds it done.
    """
    try:
        folder = os.open(local, os.O_RDONLY)
    except FileNotFoundError:  # none of the ranks was here, or none could write here
        return 0
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        paths = sync(local, shared) if local.is_dir() else []
        for path in paths:
            if (shared / path.name).stat().st_size < path.stat().st_size:
                raise OSError(f"{shared / path.name} is shorter than {path}")
            _keep_if_new(path, shared / path.name)
            path.unlink()
        for empty in (local, local.parent):
            with contextlib.suppress(OSError):  # another attempt's files are still there
                empty.rmdir()
    finally:
        os.close(folder)
    return len(paths)


def uncollected(run_dir: Path, record: Mapping[str, Any]) -> list[str]:
    """The nodes that may still have logs of this attempt on their own disk."""
    if not record.get("log_dir"):
        return []
    shared = attempts.log_dir(run_dir, record["attempt"])
    return [node for node in record.get("nodes", []) if not _mark(shared, node).exists()]


def from_this_node(run_dir: Path, log_dir: Path, node: str, current: int, *, earlier: bool) -> list[str]:
    """Collect what this node has of the run: of the current attempt (or, with `earlier`, not yet of it), and
    of those before it that left something here. What could not be copied, in words."""
    before = [r for r in attempts.read_all(run_dir) if r["attempt"] < current]
    left = [r for r in before if r.get("log_dir") == str(log_dir) and node in uncollected(run_dir, r)]
    failed = []
    for number in [*(r["attempt"] for r in left), *([] if earlier else [current])]:
        shared = attempts.log_dir(run_dir, number)
        try:
            collect(attempts.rank_log_dir(run_dir, number, log_dir), shared)
            _mark(shared, node).touch()
        except OSError as error:
            failed.append(str(error))
    return failed


def _mark(shared: Path, node: str) -> Path:
    return shared / f"collected-{node}"


def _is_of(path: Path, rank: Optional[int]) -> bool:
    segment = log_line.segment(path)
    return segment is not None and rank in (None, segment.rank)


def _remove_deleted(found: Container[str], shared: Path, rank: int) -> None:
    """Copies of segments that the rank has deleted. It never deletes the first of a kind: where that is not
    here the files were collected, and their copies are all that there is."""
    for copy in shared.iterdir():
        segment = log_line.segment(copy)
        if segment is None or segment.rank != rank or copy.name in found:
            continue
        if dataclasses.replace(segment, index=0).name in found:
            copy.unlink(missing_ok=True)


def _keep_if_new(source: Path, target: Path) -> None:
    """Lines that a rank wrote after its file had been collected are in a file begun anew, which is shorter
    than the copy: they go behind it, unless an earlier collection was ended when it had just done so."""
    size, copied = source.stat().st_size, target.stat().st_size
    if size == copied:
        return
    content = source.read_bytes()
    with open(target, "r+b") as file:
        begin = file.read(size)
        file.seek(copied - size)
        if content not in (begin, file.read(size)):
            file.seek(copied)
            file.write(content)


def _copy_rest(source: Path, target: Path) -> None:
    with open(source, "rb") as file:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            offset = os.fstat(descriptor).st_size
            file.seek(offset)
            while block := file.read(BLOCK_BYTES):
                while block:
                    written = os.pwrite(descriptor, block, offset)
                    block, offset = block[written:], offset + written
        finally:
            os.close(descriptor)
