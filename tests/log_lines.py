"""A rank's log as tests see it: made in one call, in a process launched as a rank is, read back by json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Optional, Union

from strop.config import LogConfig
from strop.obs import logs
from strop.obs.rank_log import RankLog
from strop.run import Position
from strop.slurm.env import Env, read_env

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = """
import os, sys
from pathlib import Path
from strop.obs import raw_writer
folder, rank, code = sys.argv[1:]
def become(given):
    os.execve(sys.executable, [sys.executable, "-c", code], {**os.environ, **given, "STROP_RANK": rank})
raw_writer.run(become, raw_writer.Segments(Path(folder), int(rank)), [], to_job=rank == "0")
"""


def launched(
    folder: Path, code: str, rank: int = 0, *, stdout: Union[int, Any, None] = None, **variables: str
) -> subprocess.CompletedProcess[bytes]:
    """Run `code` with its descriptors 1 and 2 in folder/rankNNNNN.err, by way of its writer."""
    return subprocess.run(
        [sys.executable, "-c", LAUNCH, str(folder), str(rank), code],
        env={"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", **variables},
        stdout=stdout,
        stderr=stdout,
    )


def setup(directory: str, level: str = "info", rank: int = 0, shared: Optional[str] = None) -> RankLog:
    """`strop.obs.logs.setup` as the trainer calls it."""
    told = read_env()
    env = Env(
        rank, rank + 1, 0, 1, "node1", None, None, None, 0, None, None,
        stdout_fd=told.stdout_fd, raw_fd=told.raw_fd,
    )  # fmt: skip
    folder = Path(directory)
    return logs.setup(LogConfig(level=level), env, folder, Path(shared or directory), 1, Position())


def read(directory: Path, rank: int = 0) -> list[dict[str, Any]]:
    """All lines of a rank in the order of its segments."""
    first = directory / f"rank{rank:05d}.jsonl"
    rest = sorted(directory.glob(f"rank{rank:05d}.*.jsonl"), key=lambda path: int(path.name.split(".")[1]))
    found = [path for path in (first, *rest) if path.exists()]
    return [json.loads(line) for path in found for line in path.read_bytes().splitlines()]
