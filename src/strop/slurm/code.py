"""Which code an attempt runs. A `git pull` between two requeues must not change a running experiment."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from strop.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
REPOSITORY = PACKAGE.parents[1]
"""With sbatch/, configs/ and tools/, which are not installed: strop runs from there."""
SUFFIXES = {".py", ".cu", ".cuh", ".cpp", ".h"}


def identify() -> dict[str, Optional[str]]:
    """The digest of the package's sources, and the git commit where there is one."""
    digest = hashlib.sha256()
    for path in sorted(p for p in PACKAGE.rglob("*") if p.suffix in SUFFIXES):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(PACKAGE)} {len(content)}\n".encode() + content)
    return {"digest": digest.hexdigest()[:16], "commit": _commit()}


def _commit() -> Optional[str]:
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=20
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def check(
    now: Mapping[str, Any], records: Sequence[Mapping[str, Any]], *, allow: bool, stage: str = ""
) -> Optional[str]:
    """Compare with the newest attempt of the run, whichever job it belonged to.

    Before the first checkpoint nothing of the old code is in the model, so any code may go on. After it,
    other code is a UserError, or with `run.allow_code_change=true` a line to print. `stage`: "NAME." of a
    stage of a pipeline, whose user says that word with the stage before it.
    """
    before = next((r["code"] for r in reversed(records) if r.get("code")), None)
    if before is None or before["digest"] == now["digest"]:
        return None
    changed = f"the code has changed since the last attempt: {_name(before)} then, {_name(now)} now"
    if not allow:
        raise UserError(
            f"{changed}; go back to that code, or say {stage}run.allow_code_change=true "
            "to go on with the new one"
        )
    return f"{changed}; going on, since run.allow_code_change=true"


def _name(code: Mapping[str, Any]) -> str:
    commit = f"commit {code['commit'][:10]}, " if code.get("commit") else ""
    return f"{commit}digest {code['digest']}"
