"""Of which checkpoint an exported model is: a small record inside of it, by which an export is done or not.

Written after the model, so a directory without one was cut off or is somebody else's. Standard library only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from strop import files
from strop.slurm import attempts

RECORD = "strop_export.json"


def identity(checkpoint: Path, dtype: Optional[str]) -> dict[str, Any]:
    """What a checkpoint's export is told by: the hash of the manifest, which has the hashes of all files."""
    return {
        "run": checkpoint.parent.parent.name,
        "checkpoint": checkpoint.name,
        "manifest": files.sha256(checkpoint / "manifest.json"),
        "dtype": dtype,
    }


def mark(out: Path, checkpoint: Path, dtype: Optional[str]) -> None:
    files.write_json(out / RECORD, identity(checkpoint, dtype))


def is_of(out: Path, checkpoint: Path, dtype: Optional[str]) -> bool:
    return files.read_json(out / RECORD) == identity(checkpoint, dtype)


def is_done(out: Path, run: Path, step: str, dtype: Optional[str]) -> bool:
    """Whether `out` is the export of the run's checkpoint that `step` means. Where the checkpoints were
    deleted since, what was exported stands."""
    checkpoint = chosen(run, step)
    if checkpoint is None:
        return (out / RECORD).is_file()
    return is_of(out, checkpoint, dtype)


def chosen(run: Path, step: str) -> Optional[Path]:
    """The checkpoint that best, latest or a number means; None if it is not there."""
    if step == "best":
        best = files.read_json(run / "checkpoints" / "BEST.json")
        number = best.get("step") if isinstance(best, dict) else None
    else:
        number = attempts.committed_step(run) if step == "latest" else int(step)
    if number is None:
        return None
    directory = run / "checkpoints" / f"step-{number:06d}"
    return directory if (directory / "manifest.json").is_file() else None
