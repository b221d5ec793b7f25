"""Of which checkpoint an exported model is: a small record inside of it, by which an export is done or not.

Written after the model, so a directory without one was cut off or is somebody else's. Standard library only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from strop import files
from strop.slurm import attempts

RECORD = "strop_export.json"


def identity(checkpoint: Path, dtype: Optional[str], adapter: bool) -> dict[str, Any]:
    """What a checkpoint's export is told by: the hash of the manifest, which has the hashes of all files."""
    return {
        "run": checkpoint.parent.parent.name,
        "checkpoint": checkpoint.name,
        "manifest": files.sha256(checkpoint / "manifest.json"),
        "dtype": dtype,
        **({"adapter": True} if adapter else {}),
    }


def mark(out: Path, checkpoint: Path, dtype: Optional[str], adapter: bool = False) -> None:
    files.write_json(out / RECORD, identity(checkpoint, dtype, adapter))


def is_of(out: Path, checkpoint: Path, dtype: Optional[str], adapter: bool = False) -> bool:
    return files.read_json(out / RECORD) == identity(checkpoint, dtype, adapter)


def is_done(out: Path, run: Path, step: str, dtype: Optional[str]) -> bool:
    """Whether `out` is the export of the run's checkpoint that `step` means. Where the checkpoints were
    deleted since, what was exported stands."""
    checkpoint = attempts.find_checkpoint(run, step)
    if checkpoint is None:
        return (out / RECORD).is_file()
    return is_of(out, checkpoint, dtype)
