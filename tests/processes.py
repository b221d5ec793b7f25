"""The ranks of a running job, as a test sees them: their processes, and the steps that they have done."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any


def steps(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def pid_of_rank(run: Path, rank: int) -> int:
    """The trainer process of a rank of this run, wherever on this machine it is."""
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            variables = (folder / "environ").read_bytes().split(b"\0")
            words = (folder / "cmdline").read_bytes().split(b"\0")
            ours = f"STROP_RUN_DIR={run.resolve()}".encode() in variables
            if ours and f"STROP_RANK={rank}".encode() in variables and b"strop.train" in words:
                return int(folder.name)
    raise AssertionError(f"no process of rank {rank} of {run}")
