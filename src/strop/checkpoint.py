"""Checkpoints that are either whole or not there.

Every rank writes its shards into `step-N.aX.tmp` (DCP), hashes and syncs them; rank 0 writes the manifest,
renames the directory and puts COMMITTED.json into it. That marker is the commit: a directory without it is
rubble of a dead attempt and removed. On resume all ranks verify the newest committed one against its
manifest before DCP reads anything (its `.metadata` is a pickle); a damaged one is set aside, and the one
before is used. A run directory is trusted input all the same: whoever can write the manifest can write the
pickle. What `tools.convert_dcp_to_hf` exports holds no code.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
import time
from pathlib import Path
from typing import Any, Optional

import torch.distributed.checkpoint as dcp
from torch import Tensor

from strop import files
from strop.dist import Dist
from strop.errors import StorageError, Superseded
from strop.slurm import attempts
from strop.slurm.attempts import MARKER

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"

RETRY_S = 2.0
"""Between the two tries of a save: a full disk may be cleaned up, a file server come back."""


class Damaged(ValueError):
    """A committed checkpoint does not match its manifest; the message names the file."""


def step_dir(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


def save(
    root: Path, step: int, attempt: int, tensors: dict[str, Tensor], state: dict[str, Any], dist: Dist
) -> bool:
    """Write and commit `step`; False if it is committed already. Collective.

    What was committed before is untouched until this one is. Raises StorageError on every rank if any rank
    could not write, after a second try, and Superseded if a newer attempt of the run has begun.
    """
    final = step_dir(root, step)
    if dist.any((final / MARKER).exists()):
        return False
    if dist.any(not attempts.holds_lease(root.parent, attempt)):
        raise Superseded(f"attempt {attempt} commits nothing: a newer attempt has begun")
    failure = _write(root, final, attempt, tensors, state, dist)
    if failure:
        log.warning("checkpoint of step %d: %s; trying once more in %.0f s", step, failure, RETRY_S)
        time.sleep(RETRY_S)
        failure = _write(root, final, attempt, tensors, state, dist)
    if failure:
        raise StorageError(errno.EIO, f"checkpoint of step {step} could not be written: {failure}")
    return True


def _write(
    root: Path, final: Path, attempt: int, tensors: dict[str, Tensor], state: dict[str, Any], dist: Dist
) -> Optional[str]:
    """Write aside and commit; None, or the first failure of any rank, with nothing left behind."""
    tmp = root / f"{final.name}.a{attempt}.tmp"
    failure = _attempted(lambda: _clear(tmp, final)) if dist.is_main else None
    if not (failure := _first(dist.gather(failure))):
        failure = _attempted(
            lambda: dcp.save(
                tensors,
                storage_writer=dcp.FileSystemWriter(tmp, sync_files=True),
                process_group=dist.group,
            )
        )
        # DCP's error names every rank; one of them suffices.
        failure = _first(dist.gather(failure))
    if not failure:
        entries: dict[str, Any] = {}
        failure = _attempted(lambda: entries.update(_hash_own(tmp, dist)))
        gathered = dist.gather((failure, entries))
        failure = _first([f for f, _ in gathered])
        if dist.is_main and not failure:
            hashes = {name: entry for _, part in gathered for name, entry in part.items()}
            failure = _attempted(lambda: _commit(tmp, final, hashes, state))
        failure = dist.broadcast(failure)
    if failure and dist.is_main:
        shutil.rmtree(tmp, ignore_errors=True)
    return failure


def _attempted(action: Any) -> Optional[str]:
    """None, or what went wrong; so that one rank's full disk is not the other ranks' time-out."""
    try:
        action()
    except (OSError, dcp.CheckpointException, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _first(failures: list[Optional[str]]) -> Optional[str]:
    return next((f for f in failures if f), None)


def _clear(tmp: Path, final: Path) -> None:
    """DCP leaves a stale `.metadata` valid while it rewrites a directory, so none is ever reused."""
    for rubble in (tmp, final):
        if rubble.exists():
            shutil.rmtree(rubble)
    tmp.mkdir(parents=True)


def _hash_own(tmp: Path, dist: Dist) -> dict[str, Any]:
    names = sorted(p.name for p in tmp.iterdir())
    return {name: describe(tmp / name) for name in names[dist.rank :: dist.world_size]}


def describe(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest: size in bytes and SHA-256."""
    return {"size": path.stat().st_size, "sha256": files.sha256(path)}


def _commit(tmp: Path, final: Path, hashes: dict[str, Any], state: dict[str, Any]) -> None:
    files.write_json(tmp / STATE, state)
    hashes = {**hashes, STATE: describe(tmp / STATE)}
    files.write_json(tmp / MANIFEST, {"files": dict(sorted(hashes.items()))})
    tmp.rename(final)
    files.fsync(final.parent)
    files.write_json(final / MARKER, {"step": state["step"], "manifest": describe(final / MANIFEST)})
    files.write_atomic(final.parent / "LATEST", final.name + "\n")


def verify(path: Path, part: int = 0, num_parts: int = 1) -> None:
    """Compare a committed checkpoint with its manifest; `part` of `num_parts` of its files.

    Raises Damaged naming the first file that is missing, has another size or another hash.
    """
    try:
        marker = json.loads((path / MARKER).read_text())
        if describe(path / MANIFEST) != marker["manifest"]:
            raise Damaged(f"{path / MANIFEST} is not the one that was committed")
        hashes = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise error if isinstance(error, Damaged) else Damaged(f"{path}: {error}") from error
    for name in sorted(hashes)[part::num_parts]:
        if not (path / name).is_file() or (path / name).stat().st_size != hashes[name]["size"]:
            raise Damaged(f"{path / name} is missing or truncated")
        if describe(path / name) != hashes[name]:
            raise Damaged(f"{path / name} has changed since it was written")


def newest_verified(root: Path, dist: Dist) -> Optional[int]:
    """The newest committed step whose files are intact; None if nothing was ever committed. Collective.

    Damaged ones are set aside as `step-N.damaged-K`. Raises StorageError if all are damaged: a run that had
    committed something never silently starts from step 0.
    """
    steps = dist.broadcast(attempts.committed_steps(root) if dist.is_main else None)
    for step in reversed(steps):
        path = step_dir(root, step)
        complaint = None
        try:
            verify(path, dist.rank, dist.world_size)
        except Damaged as error:
            complaint = str(error)
        if not (complaint := _first(dist.gather(complaint))):
            return step
        log.error("CHECKPOINT DAMAGED: %s. It is set aside and the one before is used.", complaint)
        if dist.is_main:
            _set_aside(path)
    if steps:
        raise StorageError(errno.EIO, f"every committed checkpoint in {root} is damaged (set aside there)")
    return None


def _set_aside(path: Path) -> None:
    k = 1
    while (target := path.with_name(f"{path.name}.damaged-{k}")).exists():
        k += 1
    path.rename(target)


def read_state(root: Path, step: int) -> dict[str, Any]:
    """What was committed beside tensors. Call after `newest_verified`."""
    return json.loads((step_dir(root, step) / STATE).read_text())


def load(root: Path, step: int, tensors: dict[str, Tensor]) -> None:
    """Read `step` into `tensors` in place. Collective; call after `newest_verified`."""
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(step_dir(root, step)))


def clean_up(root: Path, keep_last: int, best: Optional[int]) -> None:
    """Rank 0: delete all but the newest `keep_last` commits and the best one; the marker goes first."""
    for step in attempts.committed_steps(root)[:-keep_last]:
        if step != best:
            path = step_dir(root, step)
            (path / MARKER).unlink()
            shutil.rmtree(path)


def remove_rubble(root: Path) -> None:
    """Rank 0, at start: what attempts that died while saving or deleting have left."""
    for path in root.glob("step-*"):
        if path.name.endswith(".tmp") or (
            re.fullmatch(r"step-\d+", path.name) and not (path / MARKER).exists()
        ):
            shutil.rmtree(path)
