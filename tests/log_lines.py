"""A rank's log as tests see it: made in one call, and read back by json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

from strop.config import LogConfig
from strop.obs import logs
from strop.obs.rank_log import RankLog
from strop.run import Position
from strop.slurm.env import Env


def setup(
    directory: str,
    level: str = "info",
    rank: int = 0,
    stdout_fd: Optional[int] = None,
    shared: Optional[str] = None,
) -> RankLog:
    """`strop.obs.logs.setup` as the trainer calls it."""
    env = Env(rank, rank + 1, 0, 1, "node1", None, None, None, 0, None, None, stdout_fd=stdout_fd)
    folder = Path(directory)
    return logs.setup(LogConfig(level=level), env, folder, Path(shared or directory), 1, Position())


def read(directory: Path, rank: int = 0) -> list[dict[str, Any]]:
    """All lines of a rank in the order of its segments."""
    first = directory / f"rank{rank:05d}.jsonl"
    rest = sorted(directory.glob(f"rank{rank:05d}.*.jsonl"), key=lambda path: int(path.name.split(".")[1]))
    found = [path for path in (first, *rest) if path.exists()]
    return [json.loads(line) for path in found for line in path.read_bytes().splitlines()]
